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
from eval.statistics import FULL, Key, Row, paired_difference, ratio_of_sums

Cell = dict[str, Any]

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the share of a prompt's tokens that were reused."""

_GROUPS = ("task", "place", "share", "value", "ends", "turn")
"""Besides all rows together: a field of the row, or of its `extra`."""

METRICS = {"agreement": "agreement", "fact": "right facts", "rouge_l": "ROUGE-L", "chrf": "chrF"}
"""What scores are called, by the metric of their rows."""

_RESAMPLES = 4000


def summarise(rows: Sequence[Row]) -> list[Cell]:
    """Cells of all rows together (`group` None), then of those of one task, place, share and so on, method by method.

    Means are over the rows whose status is ok, each prompt alike; `kl_p95` and `kl_max` are of all tokens of all
    prompts. KL and agreement that some row has none of are None: a mean would be of other prompts than others' means.

    An interval is `{"mean", "low", "high"}`: of the mean difference over the same prompts, 95%, by paired bootstrap
    over the texts that prompts are made of; bounds are None for a single text, the whole is None without prompts that
    both have. `default_better` is positive where `default` has more agreement, or less KL. `times_faster` is a ratio of
    sums, as of the means beside it; of `full` itself, of its two readings: that says what timing is worth.
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
    agreements = _all(row["agreement"] for row in rows)
    kls = _all(row["kl"] for row in rows)
    pooled = np.concatenate(kls) if kls is not None else None
    metrics = {row["metric"] for row in rows}
    metric = metrics.pop() if len(metrics) == 1 else None
    reused = [row["reused_share"] for row in rows]
    caching = _mean(row.get("caching_seconds") for row in rows)
    fired = _mean(row["kind"] != "none" for row in rows)
    saved = statistics.fmean(row["full_seconds"] - row["seconds_to_first_token"] for row in rows) - (caching or 0.0)
    donor_caching = _mean(row.get("donor_caching_seconds") for row in rows)
    takes_kv = caching is not None
    return {
        "texts": len({row["text"] for row in rows}),
        "tasks": len({row["task"] for row in rows}),
        "context_tokens": _mean(row["context_tokens"] for row in rows),
        "edited": _mean(row["extra"].get("edited") for row in rows),
        "metric": metric,
        "score": _mean(row["score"] for row in rows) if metric and (metric != "agreement" or agreements) else None,
        "kl_mean": _mean(map(statistics.fmean, kls)) if kls is not None else None,
        "kl_p95": float(np.quantile(pooled, 0.95)) if pooled is not None else None,
        "kl_max": float(pooled.max()) if pooled is not None else None,
        "kl_first": _mean(kl[0] for kl in kls) if kls is not None else None,
        "agreement": _mean(agreements) if agreements is not None else None,
        "before_divergence": _mean(_before_divergence(row) for row in rows),
        "first_divergence": _mean(row["first_divergence"] for row in rows),
        "identical": _mean(row["first_divergence"] == row["generated_tokens"] for row in rows),
        "fired": fired,
        "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "found_share": _mean(row["found_share"] for row in rows),
        "reused_share": _mean(reused),
        "reused_share_quantiles": [float(each) for each in np.quantile(reused, QUANTILES)],
        "computed_share": _mean(row["computed_share"] for row in rows),
        "seconds_to_first_token": _mean(row["seconds_to_first_token"] for row in rows),
        "full_seconds": _mean(row["full_seconds"] for row in rows),
        "times_faster": _times_faster(some),
        "seconds_to_find": _mean(row.get("seconds_to_find") for row in rows),
        "caching_seconds": caching,
        "donor_caching_seconds": donor_caching,
        "break_even_uses": donor_caching / saved if donor_caching is not None and fired and saved > 0 else None,
        "saved_seconds": len(rows) * saved if takes_kv and donor_caching is None else None,
        "most_cached_bytes": max(row["cached_bytes"] for row in rows) if takes_kv else None,
        "edit_bytes": _mean(row.get("edit_bytes") for row in rows),
        "evicted": sum(row.get("evicted", 0) for row in rows),
        "donor_answers": sum(row["donor_answer"] for row in rows) if "donor_answer" in rows[0] else None,
        "reference_score": _mean(row.get("reference_score") for row in rows) if metric else None,
        **_bleus(rows),
        "more_than_full": _difference(some, full, lambda row: row["score"]) if metric else None,
        "default_better": {
            "agreement": _difference(default, some, lambda row: row["agreement"]) if agreements is not None else None,
            "before_divergence": _difference(default, some, _before_divergence),
            "kl": _difference(some, default, lambda row: statistics.fmean(row["kl"])) if kls is not None else None,
        },
    }


def _all(values: Iterable[Any]) -> list[Any] | None:
    """None if one is missing."""
    found = list(values)
    return None if any(value is None for value in found) else found


def _times_faster(rows: Mapping[Key, Row]) -> dict[str, float | None] | None:
    """Seconds of all full readings by those of a method; of full reading itself, first readings by second ones."""
    full, seconds = "full_seconds", "seconds_to_first_token"
    if any(row["policy"] == FULL for row in rows.values()):
        full, seconds = seconds, "seconds_again"
    timed = {key: row for key, row in rows.items() if row.get(seconds) is not None}
    if not timed:
        return None
    sums = [{key: row[name] for key, row in timed.items()} for name in (full, seconds)]
    text_of = {key: row["text"] for key, row in timed.items()}
    if len(set(text_of.values())) < 2:
        return {"mean": sum(sums[0].values()) / sum(sums[1].values()), "low": None, "high": None}
    return {**ratio_of_sums(sums[0], sums[1], text_of, resamples=_RESAMPLES)._asdict()}


def _before_divergence(row: Row) -> float:
    """Share of the tokens before greedy decoding first goes another way."""
    return float(row["first_divergence"] / row["generated_tokens"])


def _bleus(rows: Sequence[Row]) -> Cell:
    """Of one task's answers as a whole, to those of full reading and to those that people wrote."""
    answered = [row for row in rows if row.get("full_prediction") is not None]
    found: Cell = {"bleu": None, "reference_bleu": None}
    if not answered or len({row["task"] for row in answered}) > 1:
        return found
    found["bleu"] = bleu([row["prediction"] for row in answered], [[row["full_prediction"]] for row in answered])
    referred = [row for row in answered if row["answers"]]
    if referred and len({len(row["answers"]) for row in referred}) == 1:
        found["reference_bleu"] = bleu([row["prediction"] for row in referred], [row["answers"] for row in referred])
    return found


def _difference(
    some: Mapping[Key, Row], others: Mapping[Key, Row], figure: Callable[[Row], float]
) -> dict[str, float | None] | None:
    shared = some.keys() & others.keys()
    if not shared:
        return None
    ours, theirs = ({key: figure(rows[key]) for key in shared} for rows in (some, others))
    text_of = {key: some[key]["text"] for key in shared}
    if len(set(text_of.values())) < 2:
        return {"mean": statistics.fmean(ours[key] - theirs[key] for key in shared), "low": None, "high": None}
    return {**paired_difference(ours, theirs, resamples=_RESAMPLES, text_of=text_of)._asdict()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def tables(cells: Sequence[Cell]) -> list[Table]:
    """For people: what each method costs and gives, and how that depends on what rows are grouped by. None where no row
    has an answer."""
    answered = [cell for cell in cells if cell["count"]]
    whole = [cell for cell in answered if cell["group"] == "all"]
    if not whole:
        return []
    found = [_quality(whole), _costs(whole)]
    by_task = [cell for cell in answered if cell["group"] == "task"] or whole
    for task in dict.fromkeys(cell["value"] for cell in by_task):
        of_task = [cell for cell in by_task if cell["value"] == task]
        if any(cell["bleu"] is not None for cell in of_task):
            found.append(_answers(of_task, task))
    for group in dict.fromkeys(cell["group"] for cell in answered if cell["group"] != "all"):
        found.append(_by_group([cell for cell in answered if cell["group"] == group], group))
    return found


def _quality(cells: Sequence[Cell]) -> Table:
    metric = cells[0]["metric"]
    has_score = metric not in (None, "agreement")
    caption = (
        "prompts are of so many texts, which intervals are over (95%, paired bootstrap; too narrow for fewer than "
        "twenty); found: share of the tokens that the cache has; KL(full || method) in nats, mean of the prompts' "
        "means, p95 and max of all tokens; agreement: share of the tokens of full reading's greedy answer that are "
        "chosen after those before them; before divergence: share before greedy decoding first goes another way; in "
        "points of 100"
    )
    if cells[0]["tasks"] > 1:
        caption += ". Over several tasks together, means are of what was asked here, not of any use"
    if any(cell["method"].startswith("first-") or cell["method"] == "value" for cell in cells):
        caption += (
            ". first-* and value choose as EPIC and CacheBlend do, but here cached KV has seen the donor's text before "
            "it, and theirs was computed alone"
        )
    table = Table(
        "method",
        "prompts",
        "texts",
        "tokens",
        "fired",
        "found",
        "computed",
        "KL mean",
        "default better by",
        "p95",
        "max",
        "agreement",
        "default better by",
        "before divergence",
        "default better by",
        "identical",
        *((METRICS[metric], "more than full") if has_score else ()),
        title="What reuse changes: beside full reading of the same prompts",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    for cell in cells:
        better = cell["default_better"]
        table.add_row(
            cell["method"],
            str(cell["count"]),
            str(cell["texts"]),
            _number(cell["context_tokens"], ",.0f"),
            _percent(cell["fired"]),
            _percent(cell["found_share"]),
            _percent(cell["computed_share"]),
            _number(cell["kl_mean"], ".5f"),
            _interval(better["kl"], 1, 5),
            *(_number(cell[name], ".5f") for name in ("kl_p95", "kl_max")),
            _percent(cell["agreement"], 1),
            _interval(better["agreement"]),
            _percent(cell["before_divergence"], 1),
            _interval(better["before_divergence"]),
            _percent(cell["identical"]),
            *((_score(cell), _interval(cell["more_than_full"])) if has_score else ()),
        )
    return _right(table)


def _costs(cells: Sequence[Cell]) -> Table:
    arrived = any(cell["saved_seconds"] is not None for cell in cells)
    table = Table(
        "method",
        "first token, s",
        "in full, s",
        "times faster",
        "to find, ms",
        "to cache, ms",
        "saved in all, s" if arrived else "pays after, uses",
        "most cached, MiB",
        "evicted" if arrived else "edit, MiB",
        title="What it costs",
        title_justify="left",
        caption="in full: mean of a reading before the methods and one after them; times faster: ratio of the two "
        "means, with 95% interval, and for full of its two readings, which is what timing is worth; to cache: the new "
        "prompt, after its answer; "
        + (
            "saved in all: over full reading of all prompts, less what caching them took; evicted: for want of room"
            if arrived
            else "pays after: uses after which caching the donor, which was to be read anyway, has paid for itself, "
            "what caching each new prompt takes counted; edit: what the new prompt adds to the cache"
        ),
        caption_justify="left",
    )
    for cell in cells:
        table.add_row(
            cell["method"],
            _number(cell["seconds_to_first_token"], ".3f"),
            _number(cell["full_seconds"], ".3f"),
            _interval(cell["times_faster"], 1, 2, sign=""),
            _number(cell["seconds_to_find"], ".1f", 1e3),
            _number(cell["caching_seconds"], ".1f", 1e3),
            _number(cell["saved_seconds"], ".1f") if arrived else _number(cell["break_even_uses"], ".2f"),
            _number(cell["most_cached_bytes"], ".1f", 2**-20),
            (str(cell["evicted"]) if cell["caching_seconds"] is not None else "-")
            if arrived
            else _number(cell["edit_bytes"], ".1f", 2**-20),
        )
    return _right(table)


def _answers(cells: Sequence[Cell], task: str | None) -> Table:
    measure = METRICS[cells[0]["metric"]]
    table = Table(
        "method",
        measure,
        "BLEU",
        f"{measure} to references",
        "BLEU to references",
        "kinds",
        "reused, mean",
        *(f"{quantile:.0%}" for quantile in QUANTILES),
        title=f"{task or 'Answers'}: beside full reading's and people's, and what arrivals had in the cache",
        title_justify="left",
        caption="quantiles, over all arrivals, of the share of a prompt's tokens whose KV was not computed",
        caption_justify="left",
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
    metric = cells[0]["metric"] if len({cell["metric"] for cell in cells}) == 1 else None
    table = Table(
        "method",
        *(_head([cell for cell in cells if cell["value"] == value]) for value in values),
        title=f"By {group}: {METRICS[metric] if metric else 'score'}, mean KL, share computed",
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


def _head(cells: Sequence[Cell]) -> str:
    """What a group is called, how much of its prompts is edited, and how many there are."""
    most = max(cells, key=lambda cell: cell["count"])
    edited = "" if most["edited"] is None else f", {_percent(most['edited'])}% edited"
    return f"{most['value']}{edited} ({_counted(most['count'], 'prompt')}, {_counted(most['texts'], 'text')})"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


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


def _interval(found: Mapping[str, float | None] | None, scale: float = 100, decimals: int = 1, sign: str = "+") -> str:
    if found is None:
        return "-"
    mean, low, high = (
        None if found[name] is None else f"{scale * found[name]:{sign}.{decimals}f}" for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low is not None else str(mean)
