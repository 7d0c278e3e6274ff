"""Means over the rows of a run, and how sure they are: differences to full attention by paired bootstrap.

Policies are asked the same examples, so what differs between two of them is taken example by example: that examples are
hard or easy cancels, and only what the policy does is left. Intervals are percentiles of means over examples drawn
again with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). They speak of other
examples of the same tasks, not of other tasks, and with fewer than about twenty examples they are too narrow.

Where rows name the `text` that they are about, texts are drawn with all their examples in place of examples: a hundred
questions about one text are one text's.

This module knows rows and numbers, nothing of files, tables or plots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

AVERAGE = "average"
"""What the task is called in cells over all tasks of a suite."""

FULL = "full"
"""The policy that all others are compared with."""

PERPLEXITY = "log_likelihood"
"""The metric of rows that score a text instead of an answer."""

MEANS = ("seconds_to_read", "seconds_to_first_token", "seconds_per_token", "kv_gpu_bytes", "kv_dense_bytes")
"""What a cell has the mean of, over the rows that have it; seconds and bytes."""

_DRAWN_AT_ONCE = 2_000_000
"""Examples drawn in one piece, which bounds memory to some tens of megabytes."""

Key = tuple[str, str, int]
"""An example: its task, its id within that, and the length that was asked for."""

Row = Mapping[str, Any]
"""A line of rows.jsonl."""

Cell = dict[str, Any]
"""What `summarise` says of one task, length, policy and budget."""

_Place = tuple[str, int, str, int | None]


class Interval(NamedTuple):
    """A figure, and where it lies with the probability asked for."""

    mean: float
    low: float
    high: float


def paired_difference(
    scores: Mapping[Key, float],
    baseline: Mapping[Key, float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    text_of: Mapping[Key, str] | None = None,
) -> Interval:
    """Mean of `scores` minus `baseline` over the examples that both have, with its bootstrap interval.

    `text_of`: what each example is about; then texts are drawn, each with all its examples, since those of one text
    tend to come out alike.

    An example that only one has is left out, as one that ran out of memory says nothing of the other. The order of the
    mappings does not matter, and one seed gives one result. Raises ValueError for fewer than two shared examples, of
    which no interval can be made, or of one text, and for `resamples` below 1 or a `level` that is not between 0 and 1.
    """
    shared = sorted(scores.keys() & baseline.keys())
    texts = [text_of[key] for key in shared] if text_of is not None else shared
    if len(set(texts)) < 2:
        raise ValueError(f"an interval needs two examples that both have, got {len(set(texts))}; run more examples")
    differences = [scores[key] - baseline[key] for key in shared]
    if text_of is None:
        return _mean_of_tasks([_column(differences)], resamples, seed, level)
    return _mean_of_texts([list(zip(texts, differences, strict=True))], resamples, seed, level)


def ratio_of_sums(
    numerators: Mapping[Key, float],
    denominators: Mapping[Key, float],
    text_of: Mapping[Key, str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Sum of `numerators` by that of `denominators`, of the same examples, with its interval: texts are drawn, each
    with all its examples. Raises ValueError for fewer than two texts."""
    texts = sorted({text_of[key] for key in numerators})
    if len(texts) < 2:
        raise ValueError(f"an interval needs two texts, got {len(texts)}; run more examples")
    sums = np.zeros((len(texts), 2))
    for key, value in numerators.items():
        sums[texts.index(text_of[key])] += value, denominators[key]
    above, below = _resampled_sums(sums, resamples, np.random.default_rng(seed)).T
    return Interval(float(sums[:, 0].sum() / sums[:, 1].sum()), *_bounds(above / below, level))


def summarise(rows: Iterable[Row], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> list[Cell]:
    """One cell for each task, length, policy and budget, then one for each average over tasks.

    Every cell has `task`, `length`, `policy`, `budget_tokens` (None where all is read), `count` (rows whose status is
    ok: what means are over), `failed` (the number of others by status), `paired` (examples that are ok here and under
    `full`), `differing` (those of them that came out otherwise, or the texts that they are about) and the means of
    `MEANS` over the ok rows that have them.

    Of answers: `score`, the mean over all `count` rows; `full`, the mean of `full` over the paired examples;
    `difference`, the mean over the paired examples of score minus that of `full`, with the bounds `low` and `high`.
    Where nothing failed, `difference` is `score - full`. In an average, each of these is the mean of the tasks' values,
    so that every task weighs the same, and examples are drawn within their tasks.

    Of perplexity: `perplexity`, the exponential of minus the log-likelihood per token, over all `tokens` scored;
    `full_perplexity`, that of `full` over the paired segments; `ratio`, the perplexity over the paired segments by
    `full_perplexity`, with the bounds `low` and `high` from segments drawn with their tokens. An average is over all
    segments of all tasks as if they were one text, so that every token weighs the same.

    What cannot be known is None: the comparison where `full` has none of the examples, bounds where fewer than two are
    paired. An average, which has the number of `tasks` that it is over, has a figure only where each task of that
    length has it: the mean of fewer tasks would be another average. There are no averages where all rows are of one
    task.

    Cells come in the order in which the rows name tasks and policies, lengths and budgets ascending. Raises ValueError
    for two rows of one example under one policy and budget, a score outside 0..1, no tokens in a segment, and answers
    mixed with perplexity.
    """
    rows = list(rows)
    kinds = {row["metric"] == PERPLEXITY for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"rows with the metric {PERPLEXITY!r} and others cannot be averaged; summarise them apart")
    weigh, figure = (_perplexity, PERPLEXITY) if kinds == {True} else (_scores, "score")
    found: dict[_Place, dict[Key, Row]] = {}
    for row in rows:
        _check(row)
        place = (row["task"], row["length"], row["policy"], row["budget_tokens"])
        asked = found.setdefault(place, {})
        if _key(row) in asked:
            raise ValueError(
                f"{row['task']} {row['id']!r} at {row['length']} was asked twice under {row['policy']} with budget "
                f"{row['budget_tokens']}; leave one of the rows out"
            )
        asked[_key(row)] = row
    tasks = list(dict.fromkeys(task for task, *_ in found))
    policies = list(dict.fromkeys(policy for *_, policy, _ in found))
    full = {key: row for place, asked in found.items() if place[2] == FULL for key, row in _ok(asked).items()}

    def order(place: _Place) -> tuple[int, int, int, int]:
        return tasks.index(place[0]), place[1], policies.index(place[2]), place[3] or 0

    def cell(task: str, place: _Place, members: Sequence[Mapping[Key, Row]]) -> Cell:
        every = [row for asked in members for row in asked.values()]
        right = [_ok(asked) for asked in members]
        return {
            "task": task,
            "length": place[1],
            "policy": place[2],
            "budget_tokens": place[3],
            "count": sum(len(asked) for asked in right),
            "failed": dict(sorted(Counter(row["status"] for row in every if row["status"] != "ok").items())),
            "paired": sum(len(asked.keys() & full.keys()) for asked in right),
            "differing": len(
                {
                    _text_of(row)
                    for asked in right
                    for key, row in asked.items()
                    if key in full and row[figure] != full[key][figure]
                }
            ),
            **weigh(right, full, resamples, seed, level),
            **{name: _mean([_mean([row.get(name) for row in asked.values()]) for asked in right]) for name in MEANS},
        }

    cells = [cell(place[0], place, [found[place]]) for place in sorted(found, key=order)]
    if len(tasks) > 1:
        columns = {place[1:]: place for place in sorted(found, key=order)}
        for place in sorted(columns.values(), key=lambda place: order(place)[1:]):
            there = [task for task in tasks if any(other[:2] == (task, place[1]) for other in found)]
            members = [found.get((task, *place[1:]), {}) for task in there]
            cells.append({**cell(AVERAGE, place, members), "tasks": sum(bool(_ok(asked)) for asked in members)})
    return cells


def _scores(
    members: Sequence[Mapping[Key, Row]], full: Mapping[Key, Row], resamples: int, seed: int, level: float
) -> Cell:
    pairs = [
        [(row["score"], full[key]["score"]) for key, row in sorted(asked.items()) if key in full] for asked in members
    ]
    whole = all(len(pair) > 0 for pair in pairs)
    differences = [_column([score - reference for score, reference in pair]) for pair in pairs]
    texts = [[_text_of(row) for key, row in sorted(asked.items()) if key in full] for asked in members]
    bounds = None
    if min(len(set(some)) for some in texts) > 1:
        if any("text" in row for asked in members for row in asked.values()):
            columns = zip(texts, differences, strict=True)
            valued = [list(zip(some, each[:, 0].tolist(), strict=True)) for some, each in columns]
            bounds = _mean_of_texts(valued, resamples, seed, level)
        else:
            bounds = _mean_of_tasks(differences, resamples, seed, level)
    return {
        "score": _mean([_mean([row["score"] for row in asked.values()]) for asked in members], whole=True),
        "full": _mean([_mean([reference for _, reference in pair]) for pair in pairs], whole=True),
        "difference": float(np.mean([difference.mean() for difference in differences])) if whole else None,
        "low": bounds.low if bounds else None,
        "high": bounds.high if bounds else None,
    }


def _perplexity(
    members: Sequence[Mapping[Key, Row]], full: Mapping[Key, Row], resamples: int, seed: int, level: float
) -> Cell:
    segments = [row for asked in members for _, row in sorted(asked.items())]
    paired = [(row, full[key]) for asked in members for key, row in sorted(asked.items()) if key in full]
    whole = all(members)
    compared = all(asked.keys() & full.keys() for asked in members)
    # Columns: what is lost in nats against full, and tokens.
    lost = np.array(
        [(reference["log_likelihood"] - row["log_likelihood"], row["tokens"]) for row, reference in paired]
    ).reshape(-1, 2)
    low = high = None
    if compared and len(paired) > 1:
        sums = _resampled_sums(lost, resamples, np.random.default_rng(seed))
        low, high = _bounds(np.exp(sums[:, 0] / sums[:, 1]), level)
    return {
        "perplexity": _perplexity_of(segments) if whole else None,
        "full_perplexity": _perplexity_of([reference for _, reference in paired]) if compared else None,
        "ratio": math.exp(lost[:, 0].sum() / lost[:, 1].sum()) if compared else None,
        "low": low,
        "high": high,
        "tokens": sum(row["tokens"] for row in segments),
    }


def _perplexity_of(segments: Sequence[Row]) -> float:
    return math.exp(-sum(row["log_likelihood"] for row in segments) / sum(row["tokens"] for row in segments))


def _mean_of_tasks(tasks: Sequence[NDArray[np.float64]], resamples: int, seed: int, level: float) -> Interval:
    """Mean of the tasks' means, each `[examples, 1]`, examples drawn within their task."""
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled_sums(task, resamples, rng)[:, 0] / len(task) for task in tasks], axis=0)
    return Interval(float(np.mean([task.mean() for task in tasks])), *_bounds(drawn, level))


def _mean_of_texts(tasks: Sequence[Sequence[tuple[Any, float]]], resamples: int, seed: int, level: float) -> Interval:
    """Mean of the tasks' means, each of texts and values; texts are drawn, with all their values in all tasks."""
    texts = sorted({text for task in tasks for text, _ in task})
    sums = np.zeros((len(texts), 2 * len(tasks)))
    for column, task in enumerate(tasks):
        for text, value in task:
            sums[texts.index(text), 2 * column : 2 * column + 2] += value, 1
    drawn = _resampled_sums(sums, resamples, np.random.default_rng(seed))
    with np.errstate(invalid="ignore"):  # a draw may have nothing of a task, and is the mean of the others then
        means = drawn[:, 0::2] / drawn[:, 1::2]
    mean = float(np.mean([np.mean([value for _, value in task]) for task in tasks]))
    return Interval(mean, *_bounds(np.nanmean(means, axis=1), level))


def _resampled_sums(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`[resamples, columns]`: sums of as many rows of `values`, `[examples, columns]`, drawn with replacement."""
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, got {resamples}")
    sums = np.empty((resamples, values.shape[1]))
    step = max(1, _DRAWN_AT_ONCE // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        sums[start : start + count] = values[rng.integers(len(values), size=(count, len(values)))].sum(axis=1)
    return sums


def _bounds(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}; 0.95 leaves a fortieth on either side")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def _mean(values: Sequence[float | None], whole: bool = False) -> float | None:
    """Mean of the values there; None if there is none, or, of a `whole`, if one is missing."""
    known = [value for value in values if value is not None]
    return None if not known or (whole and len(known) < len(values)) else float(np.mean(known))


def _key(row: Row) -> Key:
    return row["task"], row["id"], row["length"]


def _text_of(row: Row) -> str | Key:
    """What is drawn together: the examples of a text, or one example by itself."""
    return row["text"] if "text" in row else _key(row)


def _ok(asked: Mapping[Key, Row]) -> dict[Key, Row]:
    return {key: row for key, row in asked.items() if row["status"] == "ok"}


def _check(row: Row) -> None:
    if row["status"] != "ok":
        return
    name = f"{row['task']} {row['id']!r} under {row['policy']}"
    if row["metric"] == PERPLEXITY:
        if not row["tokens"] > 0:
            raise ValueError(f"{name}: tokens must be 1 or more where the status is ok, got {row['tokens']!r}")
    elif row["score"] is None or not 0 <= row["score"] <= 1:
        raise ValueError(f"{name}: score must be a number from 0 to 1 where the status is ok, got {row['score']!r}")
