"""What the rows of a run come to: a cell for each method, and for what else rows are grouped by; tables of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from eval.reuse.measures import bleu
from eval.reuse.methods import DEFAULT
from eval.statistics import FULL, Interval, Key, Row, paired_difference

Cell = dict[str, Any]

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the share of a prompt's tokens that were reused."""

_GROUPS = ("task", "place", "share", "value", "ends", "turn")
"""Besides all rows together: a field of the row, or of its `extra`."""

_RESAMPLES = 4000


def summarise(rows: Sequence[Row]) -> list[Cell]:
    """Cells of all rows together (`group` None), then of those of one task, place, share and so on, method by method.

    Means are over the rows whose status is ok. `kl_p95` and `kl_max` are of all tokens of all prompts. An interval is
    `{"mean", "low", "high"}`: of the mean difference over the same prompts, 95%, by paired bootstrap; None for fewer
    than two prompts. `more_than` is of this method less `full`, `default_more` of `default` less this method.
    """
    cells = _cells(rows, "all", None)
    for name in _GROUPS:
        values = list(dict.fromkeys(value for row in rows if (value := _value(row, name)) is not None))
        if len(values) > 1:
            for value in sorted(values) if name != "task" else values:
                cells += _cells([row for row in rows if _value(row, name) == value], name, value)
    return cells


def _value(row: Row, name: str) -> Any:
    return row["task"] if name == "task" else row["extra"].get(name)


def _cells(rows: Sequence[Row], group: str, value: Any) -> list[Cell]:
    by_method: dict[str, dict[Key, Row]] = {}
    for row in rows:
        by_method.setdefault(row["policy"], {})[row["task"], row["id"], row["length"]] = row
    ok = {
        method: {key: row for key, row in some.items() if row["status"] == "ok"} for method, some in by_method.items()
    }
    return [
        {
            "group": group,
            "value": value,
            "method": method,
            "count": len(ok[method]),
            "failed": len(by_method[method]) - len(ok[method]),
            **(_cell(ok[method], ok.get(DEFAULT, {}), ok.get(FULL, {})) if ok[method] else {}),
        }
        for method in by_method
    ]


def _cell(some: Mapping[Key, Row], default: Mapping[Key, Row], full: Mapping[Key, Row]) -> Cell:
    rows = list(some.values())
    kls = [row["kl"] for row in rows if row["kl"] is not None]
    pooled = np.concatenate([np.asarray(kl) for kl in kls]) if kls else None
    seconds, full_seconds = (sum(row[name] for row in rows) for name in ("seconds_to_first_token", "full_seconds"))
    caching = [row["caching_seconds"] for row in rows if row.get("caching_seconds") is not None]
    saved = full_seconds - seconds
    reused = [row["reused_share"] for row in rows]
    cell: Cell = {
        "score": _mean(row["score"] for row in rows),
        "kl_mean": float(pooled.mean()) if pooled is not None else None,
        "kl_p95": float(np.quantile(pooled, 0.95)) if pooled is not None else None,
        "kl_max": float(pooled.max()) if pooled is not None else None,
        "kl_first": _mean(kl[0] for kl in kls),
        "agreement": _mean(row["agreement"] for row in rows),
        "before_divergence": _mean(_before_divergence(row) for row in rows),
        "first_divergence": _mean(row["first_divergence"] for row in rows),
        "identical": _mean(row["first_divergence"] == row["generated_tokens"] for row in rows),
        "fired": _mean(row["kind"] != "none" for row in rows),
        "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "reused_share": _mean(reused),
        "reused_share_quantiles": [float(each) for each in np.quantile(reused, QUANTILES)],
        "computed_share": _mean(row["computed_share"] for row in rows),
        "seconds_to_first_token": seconds / len(rows),
        "full_seconds": full_seconds / len(rows),
        "times_faster": full_seconds / seconds,
        "seconds_to_find": _mean(row.get("seconds_to_find") for row in rows),
        "caching_seconds": _mean(caching),
        "break_even_uses": sum(caching) / saved if caching and saved > 0 else None,
        "cached_bytes": _mean(row.get("cached_bytes") for row in rows),
        "edit_bytes": _mean(row.get("edit_bytes") for row in rows),
        "donor_answers": sum(row["donor_answer"] for row in rows) if "donor_answer" in rows[0] else None,
        "reference_score": _mean(row.get("reference_score") for row in rows),
        **_bleus(rows),
    }
    cell["more_than_full"] = {
        "score": _difference(some, full, lambda row: row["score"]),
        # Of seconds: how much longer than full reading, as a share of it.
        "time": _difference(some, some, lambda row: row["seconds_to_first_token"] / row["full_seconds"], _one),
    }
    cell["default_more"] = {
        "agreement": _difference(default, some, lambda row: row["agreement"]),
        "before_divergence": _difference(default, some, _before_divergence),
        "kl": _difference(default, some, lambda row: None if row["kl"] is None else statistics.fmean(row["kl"])),
    }
    return cell


def _one(row: Row) -> float:
    return 1.0


def _before_divergence(row: Row) -> float:
    """Share of the tokens before greedy decoding first goes another way."""
    return row["first_divergence"] / row["generated_tokens"]


def _bleus(rows: Sequence[Row]) -> Cell:
    """Of answers as a whole, to those of full reading and to those that people wrote."""
    answered = [row for row in rows if row.get("full_prediction") is not None]
    found: Cell = {"bleu": None, "reference_bleu": None}
    if answered:
        found["bleu"] = bleu([row["prediction"] for row in answered], [[row["full_prediction"]] for row in answered])
    referred = [row for row in answered if row["answers"]]
    if referred and len({len(row["answers"]) for row in referred}) == 1:
        found["reference_bleu"] = bleu([row["prediction"] for row in referred], [row["answers"] for row in referred])
    return found


def _difference(
    some: Mapping[Key, Row],
    others: Mapping[Key, Row],
    figure: Callable[[Row], float | None],
    other_figure: Callable[[Row], float | None] | None = None,
) -> dict[str, float] | None:
    columns: list[dict[Key, float]] = []
    for rows, each in ((some, figure), (others, other_figure or figure)):
        columns.append({key: value for key, row in rows.items() if (value := each(row)) is not None})
    if len(columns[0].keys() & columns[1].keys()) < 2:
        return None
    found: Interval = paired_difference(*columns, resamples=_RESAMPLES)
    return found._asdict()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def tables(cells: Sequence[Cell]) -> list[Table]:
    """For people: what each method costs and gives, and how that depends on what rows are grouped by."""
    whole = [cell for cell in cells if cell["group"] == "all" and cell["count"]]
    found = [_quality(whole), _costs(whole)]
    if any(cell["bleu"] is not None for cell in whole):
        found.append(_answers(whole))
    for group in dict.fromkeys(cell["group"] for cell in cells if cell["group"] != "all"):
        found.append(_by_group([cell for cell in cells if cell["group"] == group and cell["count"]], group))
    return found


def _quality(cells: Sequence[Cell]) -> Table:
    table = Table(
        "method",
        "prompts",
        "fired",
        "computed",
        "KL mean",
        "default's is higher by",
        "p95",
        "max",
        "agreement",
        "default's is higher by",
        "before divergence",
        "default's is higher by",
        "identical",
        "score",
        title="What reuse changes: beside full reading of the same prompts",
        title_justify="left",
        caption="KL in nats; agreement: share of the tokens of full reading's greedy answer that are chosen after "
        "those before them; before divergence: share before greedy decoding first goes another way; in points of 100, "
        "with 95% intervals (paired bootstrap)",
    )
    for cell in cells:
        more = cell["default_more"]
        table.add_row(
            cell["method"],
            str(cell["count"]),
            _percent(cell["fired"]),
            _percent(cell["computed_share"]),
            _number(cell["kl_mean"], ".5f"),
            _interval(more["kl"], 1, 5),
            *(_number(cell[name], ".5f") for name in ("kl_p95", "kl_max")),
            _percent(cell["agreement"], 1),
            _interval(more["agreement"]),
            _percent(cell["before_divergence"], 1),
            _interval(more["before_divergence"]),
            _percent(cell["identical"]),
            _score(cell),
        )
    return _right(table)


def _costs(cells: Sequence[Cell]) -> Table:
    table = Table(
        "method",
        "first token, s",
        "in full, s",
        "times faster",
        "longer by, %",
        "to find, ms",
        "to cache, ms",
        "break-even uses",
        "cached, MiB",
        "edit, MiB",
        title="What it costs",
        title_justify="left",
        caption="longer by: mean over prompts, with 95% interval; break-even: uses after which caching has paid for "
        "itself; edit: what the new prompt adds to the cache",
    )
    for cell in cells:
        table.add_row(
            cell["method"],
            _number(cell["seconds_to_first_token"], ".2f"),
            _number(cell["full_seconds"], ".2f"),
            _number(cell["times_faster"], ".2f"),
            _interval(cell["more_than_full"]["time"]) if cell["method"] != FULL else "-",
            _number(cell["seconds_to_find"], ".1f", 1e3),
            _number(cell["caching_seconds"], ".1f", 1e3),
            _number(cell["break_even_uses"], ".2f"),
            _number(cell["cached_bytes"], ".1f", 2**-20),
            _number(cell["edit_bytes"], ".1f", 2**-20),
        )
    return _right(table)


def _answers(cells: Sequence[Cell]) -> Table:
    table = Table(
        "method",
        "ROUGE-L",
        "BLEU",
        "ROUGE-L to references",
        "BLEU to references",
        "kinds",
        "reused, mean",
        *(f"{quantile:.0%}" for quantile in QUANTILES),
        title="Answers beside full reading's and people's, and what arrivals had in the cache",
        title_justify="left",
        caption="quantiles, over all arrivals, of the share of a prompt's tokens whose KV was not computed",
    )
    for cell in cells:
        table.add_row(
            cell["method"],
            *(_percent(cell[name], 1) for name in ("score", "bleu", "reference_score", "reference_bleu")),
            ", ".join(f"{kind} {count}" for kind, count in cell["kinds"].items()),
            _percent(cell["reused_share"]),
            *(_percent(each) for each in cell["reused_share_quantiles"]),
        )
    return _right(table)


def _by_group(cells: Sequence[Cell], group: str) -> Table:
    values = list(dict.fromkeys(cell["value"] for cell in cells))
    table = Table(
        "method",
        *(str(value) for value in values),
        title=f"By {group}: score, mean KL, share computed",
        title_justify="left",
    )
    for method in dict.fromkeys(cell["method"] for cell in cells if cell["method"] != FULL):
        entries = []
        for value in values:
            cell = next((c for c in cells if (c["value"], c["method"]) == (value, method)), None)
            parts = (
                (_score(cell), _number(cell["kl_mean"], ".4f"), _percent(cell["computed_share"])) if cell else ("-",)
            )
            entries.append("  ".join(parts))
        table.add_row(method, *entries)
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    table.columns[0].no_wrap = True
    return table


def _score(cell: Cell) -> str:
    said = _percent(cell["score"], 1)
    return said if cell["donor_answers"] is None else f"{said}, donor's {cell['donor_answers']}"


def _percent(share: float | None, decimals: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{decimals}f}"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(scale * value, form)


def _interval(found: Mapping[str, float] | None, scale: float = 100, decimals: int = 1) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{scale * found[name]:+.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
