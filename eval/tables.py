"""Tables of what `eval.statistics.summarise` found, as the page shows them: words and marks, no markup.

This module knows cells, nothing of files or pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from eval.statistics import AVERAGE, FULL, Cell

FEWEST_DIFFERING = 6
"""Examples that must differ from `full` before a difference is marked: fewer are all of one sign by chance more often
than once in twenty (2 ** (1 - 5) is 6%), and the bootstrap does not see that."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table's entry: a figure, its comparison, and remarks. `mark` is `better`, `worse` or empty."""

    value: str
    detail: str = ""
    interval: str = ""
    mark: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a table: of a policy, with its budget as the label, or of a task."""

    label: str
    entries: list[Entry]
    policy: str = ""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows that belong together, under a title or none."""

    lines: list[Line]
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Group:
    """A heading over so many columns: a policy, or a label."""

    columns: int
    label: str = ""
    policy: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """What the page draws as a table; `corner` is what its rows are."""

    corner: str
    columns: list[str]
    sections: list[Section]
    groups: tuple[Group, ...] = ()
    title: str = ""


def is_perplexity(cells: Sequence[Cell]) -> bool:
    """Whether the cells are of perplexity, not of answers."""
    return bool(cells) and "perplexity" in cells[0]


def by_length(cells: Sequence[Cell]) -> Table:
    """Policies and budgets down, lengths across; `cells` are of one task, or averages."""
    lengths = sorted({cell["length"] for cell in cells})
    most = max(asked(cell) for cell in cells)
    lines = [
        Line(_budget(budget), [entry(_find(cells, length, policy, budget), most) for length in lengths], policy)
        for policy, budget in _kinds(cells)
    ]
    natural = lengths == [0] and not is_perplexity(cells)
    names = ["texts as long as they are"] if natural else [f"{length:,}" for length in lengths]
    groups = () if natural else (Group(len(lengths), "context, tokens"),)
    return Table("policy, budget", names, [Section(lines)], groups)


def by_task(cells: Sequence[Cell], length: int) -> Table:
    """Tasks of one length down, policies and budgets across, the average first."""
    here = [cell for cell in cells if cell["length"] == length]
    kinds = _kinds(here)
    lines = []
    for task in sorted(dict.fromkeys(cell["task"] for cell in here), key=lambda task: task != AVERAGE):
        of_task = [cell for cell in here if cell["task"] == task]
        most = max(asked(cell) for cell in of_task)
        entries = [entry(_find(of_task, length, policy, budget), most) for policy, budget in kinds]
        lines.append(Line(f"{task} ({most:,})", entries, strong=task == AVERAGE))
    policies = list(dict.fromkeys(policy for policy, _ in kinds))
    groups = tuple(Group(sum(policy == name for policy, _ in kinds), policy=name) for name in policies)
    columns = [_budget(budget) or "all" for _, budget in kinds]
    corner = "task (segments)" if is_perplexity(cells) else "task (answers)"
    return Table(corner, columns, [Section(lines)], groups, _title(here))


def by_group(groups: Mapping[str, Sequence[Cell]], corner: str) -> Table:
    """Groups of examples down, policies and budgets across; cells of a group are averages, or of its one task."""
    named = [{**cell, "task": group} for group, cells in groups.items() for cell in cells]
    return dataclasses.replace(by_task(named, named[0]["length"]), corner=corner, title="")


def costs(cells: Sequence[Cell]) -> Table:
    """Memory and time of policies and budgets, length by length."""
    sections = []
    for length in sorted({cell["length"] for cell in cells}):
        here = [cell for cell in cells if cell["length"] == length]
        lines = [
            Line(
                _budget(cell["budget_tokens"]),
                [
                    Entry(_number(cell["kv_gpu_bytes"], 2**-20, ",.1f")),
                    Entry(_share(cell)),
                    Entry(_number(cell["seconds_to_read"], 1, ",.2f")),
                    Entry(_number(cell["seconds_to_first_token"], 1, ",.2f")),
                    Entry(_number(cell["seconds_per_token"], 1000, ",.1f")),
                ],
                cell["policy"],
            )
            for cell in here
        ]
        sections.append(Section(lines, _title(here)))
    columns = ["KV on the GPU, MiB", "of dense", "reading, s", "first token, s", "ms per token"]
    return Table("policy, budget", columns, sections)


def entry(cell: Cell | None, most: int) -> Entry:
    """A cell as the tables show it; None, where nothing was asked, as a dash. `most` others of its kind were asked."""
    if cell is None:
        return Entry("–")
    perplexity = is_perplexity([cell])
    figure, scale, form = (cell["perplexity"], 1, ".3f") if perplexity else (cell["score"], 100, ".1f")
    notes = tuple(f"{count:,} {status.replace('_', ' ')}" for status, count in cell["failed"].items())
    if cell["count"] > 0 and asked(cell) < most:
        notes += (f"over {cell['count']:,}",)
    if 0 < cell["paired"] < cell["count"]:
        notes += (f"compared over {cell['paired']:,}",)
    if cell["count"] and figure is None:
        notes += (f"only {cell['tasks']:,} of the tasks",)
    value = _number(figure, scale, form)
    if perplexity:
        compared, low, high = ((x - 1 if x is not None else None) for x in (cell["ratio"], cell["low"], cell["high"]))
    else:
        compared, low, high = cell["difference"], cell["low"], cell["high"]
    if cell["policy"] == FULL or compared is None:
        return Entry(value, notes=notes)
    decimals, unit = (2, "%") if perplexity else (1, "")
    detail = _signed(compared, decimals) + unit
    if low is None or high is None:
        return Entry(value, detail, notes=notes)
    above, below = ("worse", "better") if perplexity else ("better", "worse")
    mark = above if low > 0 else below if high < 0 else ""
    if cell["differing"] < FEWEST_DIFFERING:
        mark = ""
    return Entry(value, detail, f"[{_signed(low, decimals)}, {_signed(high, decimals)}]", mark, notes)


def asked(cell: Cell) -> int:
    """Rows of a cell, those that failed among them."""
    return int(cell["count"] + sum(cell["failed"].values()))


def _title(cells: Sequence[Cell]) -> str:
    length = cells[0]["length"]
    return f"{length:,} tokens" if length or is_perplexity(cells) else "Texts as long as they are"


def _kinds(cells: Iterable[Cell]) -> list[tuple[str, int | None]]:
    """Policies with their budgets, in the cells' order of policies."""
    kinds = list(dict.fromkeys((cell["policy"], cell["budget_tokens"]) for cell in cells))
    policies = list(dict.fromkeys(policy for policy, _ in kinds))
    return sorted(kinds, key=lambda kind: (policies.index(kind[0]), kind[1] or 0))


def _find(cells: Iterable[Cell], length: int, policy: str, budget: int | None) -> Cell | None:
    wanted = (length, policy, budget)
    return next((c for c in cells if (c["length"], c["policy"], c["budget_tokens"]) == wanted), None)


def _budget(budget: int | None) -> str:
    return f"{budget:,}" if budget else ""


def _number(value: float | None, scale: float, form: str) -> str:
    return "–" if value is None else format(scale * value, form)


def _share(cell: Cell) -> str:
    dense = cell["kv_dense_bytes"]
    return "–" if not dense or cell["kv_gpu_bytes"] is None else f"{100 * cell['kv_gpu_bytes'] / dense:.1f}%"


def _signed(fraction: float, decimals: int) -> str:
    """In hundredths: `+1.0`, `−1.0`, and `0.0` without a sign."""
    said = f"{abs(100 * fraction):.{decimals}f}"
    return said if float(said) == 0 else f"{'+' if fraction > 0 else '−'}{said}"
