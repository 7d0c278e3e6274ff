"""One page about all runs below a folder: tables, plots and wrong answers, in a file that needs no network.

    python -m eval.report runs
    python -m eval.report runs/needle --out needle.html

A run is a folder with `config.json` and `rows.jsonl`; one that has not ended is shown as far as it came. Beside the
page its plots are written as PNG files, named after the page and the run. What the figures are: `eval/statistics.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from eval import figures
from eval.figures import DARK, LIGHT, Theme
from eval.statistics import AVERAGE, FULL, MEANS, Cell, Row, summarise
from eval.tables import FEWEST_DIFFERING, Table, asked, by_group, by_length, by_task, costs, is_perplexity

MOST_SAMPLES = 10
"""Wrong answers shown of a policy."""

_SHOWN_CHARACTERS = 400
"""Of an answer; more are left out, and counted."""

_LIKENESS = ("agreement", "rouge_l", "chrf")
"""Metrics of what comes close to another reading's answer (`eval/reuse`)."""

_FIELDS = ("task", "id", "length", "policy", "budget_tokens", "metric", "status")
"""What every row must have."""

_FACTS = ("model", "hardware", "dtype", "versions", "commit", "date", "seed", "command")
"""Settings shown at the head of a run, where they are there; the others are folded away."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds, and what is to be known about that."""

    folder: Path
    name: str
    """The folder's, below the one that was asked for; its own where it is that one."""
    config: Mapping[str, Any]
    rows: list[Row]
    notes: list[str]


def find_runs(directory: Path) -> list[Path]:
    """Run folders: `directory` itself and all below it that hold config.json and rows.jsonl, in order of their names.

    Raises ValueError if there is none.
    """
    found = sorted(path.parent for path in directory.rglob("config.json") if (path.parent / "rows.jsonl").is_file())
    if not found:
        raise ValueError(f"no run below {directory}: a run is a folder with config.json and rows.jsonl")
    return found


def read_run(folder: Path, directory: Path) -> Run:
    """Settings and rows of a run folder, that may still be growing.

    A last line without an end, as an interruption leaves it, is left out with a note. Raises ValueError naming the
    file, the line and what is wrong for any other line that is no row.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it, or move the run elsewhere") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object with the run's settings, got {type(config).__name__}")
    rows, notes = _read_rows(folder / "rows.jsonl")
    expected = expected_rows(config)
    if expected is not None and len(rows) < expected:
        notes.insert(0, f"This run is incomplete: {len(rows):,} of {expected:,} rows.")
    elif expected is None and not (folder / "summary.json").is_file():
        notes.insert(0, f"This run is incomplete: it has no summary.json. {len(rows):,} rows so far.")
    name = folder.relative_to(directory).as_posix() if folder != directory else folder.resolve().name
    return Run(folder, name, config, rows, notes)


def expected_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of a run that has ended: `examples`, asked once under `full` and under the others with every budget.

    None where the settings do not say how many examples, which policies or which budgets.
    """
    examples, policies, budgets = (config.get(name) for name in ("examples", "policies", "budgets"))
    if not isinstance(examples, int) or not isinstance(policies, list) or not isinstance(budgets, list):
        return None
    return examples * sum(1 if policy == FULL else len(budgets) for policy in policies)


def _read_rows(path: Path) -> tuple[list[Row], list[str]]:
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = text.split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # What is no UTF-8 is refused here, with its line.
            row = json.loads(line.encode("utf-8", errors="surrogateescape"))
        except ValueError as error:
            if number == len(lines):
                return rows, ["The last line of rows.jsonl was half written and is left out."]
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); take the line out, or run it again"
            ) from error
        missing = [field for field in _FIELDS if field not in row] if isinstance(row, dict) else list(_FIELDS)
        if missing:
            raise ValueError(f"{path}, line {number} is no row: it lacks {', '.join(missing)}; take the line out")
        rows.append({"extra": {}, "score": None, **row})
    return rows, []


def render(directory: Path, out: Path) -> list[Path]:
    """Write the page about all runs at or below `directory`, and its plots beside it; the files written, page first.

    Raises ValueError where there is no run, or one that cannot be read.
    """
    runs = [read_run(folder, directory) for folder in find_runs(directory)]
    colour_of = figures.colours(row["policy"] for run in runs for row in run.rows)
    written: list[Path] = []
    views = []
    for number, run in enumerate(runs, start=1):
        try:
            cells = summarise(run.rows)
        except ValueError as error:
            raise ValueError(f"{run.folder}: {error}") from error
        stem = "-".join(filter(None, (out.stem, str(number) if len(runs) > 1 else "", _slug(run.name))))
        plots = []
        for name, caption, draw in _drawings(run, cells, colour_of):
            light, dark = draw(LIGHT), draw(DARK)
            if light is None or dark is None:
                continue
            path = out.with_name(f"{stem}-{name}.png")
            path.write_bytes(figures.png(light))
            written.append(path)
            plots.append(
                {
                    "caption": caption,
                    "light": base64.b64encode(path.read_bytes()).decode(),
                    "dark": base64.b64encode(figures.png(dark)).decode(),
                    "width": round(96 * light.get_figwidth()),
                }
            )
        views.append({"anchor": f"run-{number}", "plots": plots, **_view(run, cells)})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=views[0]["title"] if len(views) == 1 else "Evaluation",
        runs=views,
        colour_of=colour_of,
        light=LIGHT,
        dark=DARK,
        most_samples=MOST_SAMPLES,
    )
    # Predictions may hold halves of surrogate pairs, which no encoding writes.
    out.write_bytes(page.encode("utf-8", errors="replace"))
    return [out, *written]


def _drawings(
    run: Run, cells: Sequence[Cell], colour_of: Mapping[str, str]
) -> list[tuple[str, str, Callable[[Theme], Figure | None]]]:
    """Name, caption and drawer of every plot that there might be."""
    if not cells:
        return []
    if is_perplexity(cells):
        caption = (
            "Perplexity by the tokens of context before those scored, and its ratio to that of full; bands are 95% "
            "intervals. Lower is better."
        )
        return [("perplexity", caption, lambda theme: figures.perplexity_by_position(cells, colour_of, theme))]
    over = ", mean of the tasks" if any(cell["task"] == AVERAGE for cell in cells) else ""
    longest = max(cell["length"] for cell in cells)
    return [
        (
            "length",
            f"Score by length of the context{over}.",
            lambda theme: figures.score_by_length(cells, colour_of, theme),
        ),
        (
            "budget",
            f"Score by budget{over}. Dashed: policies that read everything.",
            lambda theme: figures.score_by_budget(cells, colour_of, theme),
        ),
        (
            "depth",
            "Score by depth of the fact and length of the context. Depth 0 is the beginning of the text.",
            lambda theme: figures.depth_maps(run.rows, theme),
        ),
        (
            "tasks",
            f"Score by task, {figures.context(longest)}.",
            lambda theme: figures.score_by_task(cells, colour_of, theme),
        ),
    ]


def _view(run: Run, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the template shows of a run, besides its plots."""
    config = run.config
    title = ": ".join(str(config[name]) for name in ("suite", "model") if config.get(name)) or run.name
    perplexity = is_perplexity(cells)
    averages = [cell for cell in cells if cell["task"] == AVERAGE]
    single = _overall(cells)
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    over = tasks[0] if tasks else ""
    if averages:
        over = f"all {len(tasks) - 1} texts together" if perplexity else f"mean of {len(tasks) - 1} tasks"
    return {
        "title": title,
        "notes": run.notes if run.rows else [*run.notes, "There are no rows yet."],
        "facts": [(name, _words(config[name], name)) for name in _FACTS if config.get(name) not in (None, "")],
        "settings": json.dumps(config, indent=2, ensure_ascii=False),
        "measure": f"{'Perplexity' if perplexity else 'Score'}, {over}",
        "legend": _legend(single),
        "overall": by_length(single) if cells else None,
        "by_task": [by_task(cells, length) for length in sorted({c["length"] for c in cells})] if averages else [],
        "by_words": _by_words(run.rows),
        "costs": costs(single) if any(cell[name] is not None for cell in single for name in MEANS) else None,
        "samples": [] if perplexity else wrong_answers(run.rows),
    }


def _overall(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The averages, or the cells themselves where they are of one task."""
    return [cell for cell in cells if cell["task"] == AVERAGE] or cells


def _by_words(rows: Sequence[Row]) -> Table | None:
    """Scores by length of the text, as LongBench-E's are; None for rows that are not grouped so."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "length_group" in row["extra"]:
            groups.setdefault(row["extra"]["length_group"], []).append(row)
    if not groups:
        return None
    return by_group({group: _overall(summarise(groups[group])) for group in sorted(groups)}, "words (answers)")


def _legend(cells: Sequence[Cell]) -> str:
    """How the tables of scores or perplexities are read."""
    most = max(map(asked, cells), default=0)
    if not any(cell["paired"] for cell in cells):
        what = _counted(most, "segment") if is_perplexity(cells) else f"{_counted(most, 'answer')}, in points of 100,"
        return f"Over {what} where nothing else is said."
    marked = (
        f"is worse and ▲ better than full, where the interval excludes 0 and {FEWEST_DIFFERING} or more differ from "
        "full. Of twenty differences that are 0 in truth, about one is marked by chance; intervals of fewer than "
        "twenty are too narrow."
    )
    if is_perplexity(cells):
        return (
            f"Over {_counted(most, 'segment')} where nothing else is said. Below each figure: by how much it is above "
            f"that of full on the same segments, with the 95% interval (bootstrap over segments); ▼ {marked}"
        )
    return (
        f"In points of 100, over {_counted(most, 'answer')} where nothing else is said. Below each figure: its "
        f"difference to full on the same questions, with the 95% interval (paired bootstrap); ▼ {marked} An interval "
        "without width says that all of these questions came out alike, not that all others would."
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def wrong_answers(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Of each policy the task with the lowest mean score over all lengths and budgets, and its lowest answers.

    Only policies that have an answer with less than the whole score; among equals the lot decides, always in the same
    way. Predictions and answers are shortened. Going on a little otherwise than full reading does is no answer, and not
    wrong: rows of `_LIKENESS` are left out.
    """
    scored: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["metric"] not in _LIKENESS:
            scored.setdefault(row["policy"], {}).setdefault(row["task"], []).append(row)
    samples = []
    for policy, tasks in scored.items():
        mean_of = {task: sum(row["score"] for row in there) / len(there) for task, there in tasks.items()}
        worst = min(mean_of, key=lambda task: mean_of[task])
        wrong = [row for row in tasks[worst] if row["score"] < 1]
        random.Random(0).shuffle(wrong)
        wrong.sort(key=lambda row: row["score"])
        if wrong:
            answers = [_answer(row) for row in wrong[:MOST_SAMPLES]]
            score = f"{100 * mean_of[worst]:.1f} of 100"
            samples.append({"policy": policy, "task": worst, "score": score, "answers": answers})
    return samples


def _answer(row: Row) -> dict[str, str]:
    expected = row.get("answers", row["extra"].get("answers", ()))
    expected = [expected] if isinstance(expected, str) else expected
    about = [str(row["id"])]
    about += [figures.context(row["length"])] if row["length"] else []
    about += [f"budget {row['budget_tokens']:,}"] if row["budget_tokens"] else []
    about += [f"depth {row['extra']['depth']}"] if "depth" in row["extra"] else []
    return {
        "about": ", ".join([*about, f"score {100 * row['score']:.1f}"]),
        "prediction": _shortened(str(row.get("prediction") or "(nothing)")),
        "expected": _shortened(" | ".join(str(each) for each in expected)),
    }


def _shortened(text: str) -> str:
    left_out = len(text) - _SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left_out:,} more characters)"


def _words(value: Any, name: str) -> str:
    """A setting in one line."""
    if name == "command":
        return value if isinstance(value, str) else shlex.join(str(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')} {_words(each, key)}" for key, each in value.items() if each not in (None, "")
        )
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    return str(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")


def main(
    directory: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A run's folder, or one with runs below it.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the folder if not given.")] = None,
) -> None:
    """Make one page about all runs below a folder."""
    out = out or directory / "report.html"
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} must be a folder to write {out.name} in; make it first")
    try:
        written = render(directory, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for path in written:
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
