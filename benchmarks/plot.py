"""Time per output token against context, from one or more results of `benchmarks.decode`.

    python -m benchmarks.plot benchmarks/results/decode-*.json

Writes PNG and SVG beside the first file, one panel for each model shape. Rows that were not timed are not drawn, nor
are the steps on the way to the recorded one, which are timed at one context only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.rows import GENERATION

HIT_RATE = 0.85
"""Of the line; the band around it covers all hit rates."""

_OURS = ("#0b6e99", "#c4541a", "#5b8c2a", "#7b4fa3")
_OTHERS = {
    "transformers": ("transformers, dense", "#444444"),
    "transformers, no cuDNN": ("transformers, dense", "#444444"),
    "transformers, offloaded": ("transformers, offloaded", "#8a8a8a"),
    "full, resident, graph": ("our kernels, all KV on the GPU", "#a68a00"),
}


class Line(NamedTuple):
    """One variant: milliseconds at each context."""

    label: str
    color: str
    ms_of: dict[int, float]
    low_of: dict[int, float] = {}  # noqa: RUF012 - never mutated
    high_of: dict[int, float] = {}  # noqa: RUF012 - never mutated
    dashed: bool = False


def lines_of(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """What is drawn of the rows of one shape; of two rows for one point, the faster."""
    timed = [row for row in rows if row["status"] == "ok" and row["batch"] == 1]
    found: dict[str, Line] = {}
    for row in timed:
        if row["variant"] in _OTHERS:
            label, color = _OTHERS[row["variant"]]
            _put(found.setdefault(label, Line(label, color, {})).ms_of, row, min)
    budgets = sorted({row["budget_tokens"] for row in timed if row["budget_tokens"]})
    variants = {row["variant"] for row in timed}
    variant = GENERATION if GENERATION in variants else "graph, fused"
    kinds = sorted({(row["policy"], row["budget_tokens"]) for row in timed if row["variant"] == variant})
    for i, (policy, budget) in enumerate(kinds):
        color = _OURS[i % len(_OURS)]
        ours = [row for row in timed if row["variant"] == variant and row["policy"] == policy]
        ours = [row for row in ours if row["budget_tokens"] == budget]
        rates = {row["hit_rate_asked"] for row in ours}
        shown = HIT_RATE if HIT_RATE in rates else ours[-1]["hit_rate_asked"]
        name = f"sentencekv, {policy}" + (f" {budget}" if len(budgets) > 1 else "")
        line = Line(name, color, {}, {}, {})
        floor = Line(f"floor, {policy}", color, {}, dashed=True)
        for row in ours:
            _put(line.low_of, row, min)
            _put(line.high_of, row, max)
            if row["hit_rate_asked"] == shown:
                _put(line.ms_of, row, min)
                floor.ms_of[row["context_tokens"]] = row["floor_ms"]
        found[name] = line
        found[floor.label] = floor
    return list(found.values())


def _put(ms_of: dict[int, float], row: dict[str, Any], choose: Any) -> None:
    context, ms = row["context_tokens"], row["tpot_ms_median"]
    ms_of[context] = choose(ms, ms_of.get(context, ms))


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """One panel for each shape, contexts and milliseconds on logarithmic axes."""
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    made = Figure(figsize=(7.6 * len(shapes), 5.2), layout="constrained")
    panels = made.subplots(1, len(shapes), squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        chosen = [result for result in results if result["shape"] == shape]
        rows = [row for result in chosen for row in result["rows"]]
        _draw(panel, lines_of(rows))
        some = chosen[0]
        place = some["hardware"].get("gpu", "CPU")
        budgets = sorted({row["budget_tokens"] for row in rows if row["budget_tokens"]})
        panel.set_title(f"Time per output token, {shape}", loc="left", fontsize=12, fontweight="bold", pad=24)
        budget = f", budget {', '.join(f'{b:,}' for b in budgets)} tokens" if budgets else ""
        panel.text(
            0,
            1.02,
            f"{some['dtype']}, batch 1{budget}; {place}. Lines: hit rate {HIT_RATE}; bands: all hit rates timed.",
            transform=panel.transAxes,
            fontsize=8.5,
            color="#555555",
        )
    return made


def _draw(panel: Axes, lines: Sequence[Line]) -> None:
    contexts = sorted({context for line in lines for context in line.ms_of})
    values = [ms for line in lines for ms_of in (line.ms_of, line.low_of, line.high_of) for ms in ms_of.values()]
    if not values:
        return
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    low, high = min(values) / 1.35, max(values) * 1.35
    for line in lines:
        if not line.ms_of:
            continue
        at, ms = zip(*sorted(line.ms_of.items()), strict=True)
        style: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.1} if line.dashed else {"marker": "o"}
        panel.plot(
            at, ms, color=line.color, markersize=4, **{"linewidth": 1.9, **style}, zorder=2 if line.dashed else 3
        )
        if line.low_of and line.low_of != line.high_of:
            places = sorted(line.low_of)
            least, most = ([bound[place] for place in places] for bound in (line.low_of, line.high_of))
            panel.fill_between(places, least, most, color=line.color, alpha=0.1, linewidth=0, zorder=1)
    panel.set_ylim(low, high)
    panel.set_xlim(contexts[0] / 1.25, contexts[-1] * 1.25)
    panel.xaxis.set_major_locator(FixedLocator(contexts))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    panel.xaxis.set_minor_locator(NullLocator())
    steps = [factor * 10.0**power for power in range(-4, 6) for factor in (1, 2, 5)]
    panel.yaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("context, tokens")
    panel.set_ylabel("ms per token")
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    drawn = [line for line in lines if line.ms_of]
    wanted = [math.log(line.ms_of[max(line.ms_of)] / low) / math.log(high / low) for line in drawn]
    for line, place in zip(drawn, spread(wanted, 0.048), strict=True):
        longest = max(line.ms_of)
        value = line.ms_of[longest]
        panel.annotate(
            f"{line.label}  {_milliseconds(value)} ms" + ("" if longest == contexts[-1] else f" at {_tokens(longest)}"),
            xy=(longest, value),
            xycoords="data",
            xytext=(1.015, place),
            textcoords="axes fraction",
            fontsize=8.5,
            color=line.color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.color, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 4},
        )


def _milliseconds(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _tokens(number: float) -> str:
    return f"{number / 1024:.0f}K" if number >= 1024 else f"{number:.0f}"


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of those wanted and near them."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            missing = gap - (placed[i + 1] - placed[i])
            if missing > 1e-6:
                placed[i] -= missing / 2
                placed[i + 1] += missing / 2
    lowest = min(placed, default=0.0)
    placed = [place - min(lowest, 0.0) for place in placed]
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def save(results: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg."""
    made = figure(results)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    for file in written:
        made.savefig(file, dpi=160)
    return written


def main(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSON files of benchmarks.decode.")],
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.png and OUT.svg; else tpot beside the first file.")
    ] = None,
) -> None:
    """Draw time per output token against context."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    results = [result for result in results if result.get("benchmark") == "decode" and "rows" in result]
    if not results:
        raise typer.BadParameter("none of the files is a result of benchmarks.decode over contexts")
    for file in save(results, out or files[0].parent / "tpot"):
        print(file)


if __name__ == "__main__":
    typer.run(main)
