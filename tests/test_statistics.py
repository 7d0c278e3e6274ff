"""Intervals are where they should be, and cells say what their rows do."""

import math
from typing import Any

import numpy as np
import pytest

from eval import statistics
from eval.statistics import Cell, Interval, paired_difference, ratio_of_sums, summarise


def keyed(values: Any, task: str = "t") -> dict[tuple[str, str, int], float]:
    return {(task, f"{i:03}", 4096): float(value) for i, value in enumerate(values)}


def row(policy: str, budget: int | None, id: str, score: float | None, **other: Any) -> dict[str, Any]:
    made = {"task": "t", "id": id, "length": 4096, "policy": policy, "budget_tokens": budget, "metric": "exact"}
    return {**made, "score": score, "status": "ok", "extra": {}, **other}


def segment(policy: str, budget: int | None, id: str, nats: float, tokens: int, **other: Any) -> dict[str, Any]:
    made = row(policy, budget, id, None, metric="log_likelihood")
    return {**made, "log_likelihood": nats, "tokens": tokens, **other}


def find(cells: list[Cell], task: str, policy: str, length: int = 4096) -> Cell:
    (found,) = [c for c in cells if (c["task"], c["policy"], c["length"]) == (task, policy, length)]
    return found


def test_equal_scores_differ_by_nothing() -> None:
    scores = keyed(np.random.default_rng(0).random(30))
    assert paired_difference(scores, scores) == Interval(0, 0, 0)


def test_a_constant_shift_is_found_exactly() -> None:
    baseline = keyed(np.arange(16) / 32)
    assert paired_difference({key: value + 0.25 for key, value in baseline.items()}, baseline) == (0.25, 0.25, 0.25)
    assert paired_difference(baseline, {key: value + 0.25 for key, value in baseline.items()}).high == -0.25


def test_examples_that_only_one_has_are_left_out() -> None:
    scores = {**keyed([1, 1]), ("t", "other", 4096): 0.0}
    baseline = {**keyed([0, 0]), ("t", "000", 8192): 1.0}
    assert paired_difference(scores, baseline) == (1, 1, 1)


def test_one_seed_gives_one_result_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    scores, baseline = keyed(rng.random(50)), keyed(rng.random(50))
    once = paired_difference(scores, baseline, resamples=500)
    turned = dict(reversed(scores.items()))
    assert paired_difference(turned, baseline, resamples=500) == once
    assert paired_difference(scores, baseline, resamples=500, seed=1) != once
    # Drawn in pieces, it is the same.
    monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", 50 * 7)
    assert paired_difference(scores, baseline, resamples=500) == pytest.approx(once, abs=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = {0.95: 0, 0.5: 0}
    for _ in range(300):
        baseline = rng.random(40)
        scores = baseline + rng.normal(0.1, 0.3, size=40)
        for level in held:
            found = paired_difference(keyed(scores), keyed(baseline), resamples=500, level=level)
            held[level] += found.low <= 0.1 <= found.high
    # Of 300, one standard deviation is 1.3% and 2.9%; percentile intervals of 40 are a little too narrow.
    assert 0.90 <= held[0.95] / 300 <= 0.98
    assert 0.42 <= held[0.5] / 300 <= 0.58


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    rng = np.random.default_rng(3)
    baseline = 100 * rng.random(400)
    differences = rng.normal(0, 1, size=400)
    found = paired_difference(keyed(baseline + differences), keyed(baseline))
    assert found.mean == pytest.approx(differences.mean())
    # That examples differ by a hundred times more than policies does not matter.
    assert found.high - found.low == pytest.approx(2 * 1.96 * differences.std() / math.sqrt(400), rel=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 0}, "resamples must be 1 or more, got 0"),
        ({"level": 95}, "level must be between 0 and 1, got 95"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(keyed([0, 1]), keyed([0, 1]), **options)


def test_texts_are_drawn_with_all_their_examples() -> None:
    """A text asked a hundred times is one text: the interval is as wide as that of its mean asked once."""
    rng = np.random.default_rng(5)
    means = rng.normal(size=12)
    once = paired_difference(keyed(means), keyed(np.zeros(12)))
    often = keyed(np.repeat(means, 25))
    text_of = {key: f"text {at // 25:02}" for at, key in enumerate(often)}
    nothing = dict.fromkeys(often, 0.0)
    found = paired_difference(often, nothing, text_of=text_of)
    assert found == pytest.approx(once)
    alone = paired_difference(often, nothing)
    assert (alone.high - alone.low) * 4 < found.high - found.low
    with pytest.raises(ValueError, match="two examples that both have, got 1"):
        paired_difference(often, nothing, text_of=dict.fromkeys(often, "one"))


def test_a_ratio_is_of_sums() -> None:
    """As of the means, not the mean of ratios, which the shortest would decide."""
    above, below = keyed([10, 1, 10, 1]), keyed([5, 1, 5, 1])
    texts = dict(zip(above, "aabb", strict=True))
    assert ratio_of_sums(above, below, texts) == pytest.approx((22 / 12,) * 3)
    apart = ratio_of_sums(above, below, {key: key[1] for key in above})
    assert apart == pytest.approx((22 / 12, 1.0, 2.0))
    with pytest.raises(ValueError, match="two texts, got 1"):
        ratio_of_sums(above, below, dict.fromkeys(above, "one"))


def test_rows_that_name_their_text_have_intervals_over_texts() -> None:
    def asked(texts: str, task: str = "t") -> list[dict[str, Any]]:
        return [
            row(policy, None, f"{at}", 1.0 if policy == "full" else at % 2, text=text, task=task)
            for policy in ("full", "other")
            for at, text in enumerate(texts)
        ]

    one = find(summarise(asked("aaaaaaaa")), "t", "other")
    assert (one["difference"], one["low"], one["high"], one["differing"]) == (-0.5, None, None, 1)
    two = find(summarise(asked("abababab")), "t", "other")
    assert (two["difference"], two["low"], two["high"], two["differing"]) == (-0.5, -1.0, 0.0, 1)
    # Of two tasks that ask the same texts, texts are drawn for both: it is no narrower than that of one.
    both = find(summarise([*asked("abababab"), *asked("abababab", "u")]), "average", "other")
    assert (both["difference"], both["low"], both["high"], both["differing"]) == (-0.5, -1.0, 0.0, 1)
    # A text that one task has nothing of, in a draw of nothing else.
    uneven = find(summarise([*asked("abababab"), *asked("cdcdcdcd", "u")]), "average", "other")
    assert uneven["low"] < uneven["difference"] == -0.5 < uneven["high"]


def test_one_example_makes_no_interval() -> None:
    with pytest.raises(ValueError, match="two examples that both have, got 1"):
        paired_difference(keyed([1, 1]), keyed([1]))


def test_cells_have_means_failures_and_the_difference_to_full() -> None:
    rows = [
        row("full", None, "a", 1.0, seconds_per_token=0.5),
        row("full", None, "b", 1.0, seconds_per_token=1.5),
        row("full", None, "c", None, status="out_of_memory"),
        row("codes", 512, "c", 0.0, kv_gpu_bytes=300, kv_dense_bytes=3000),
        row("codes", 512, "a", 0.5, kv_gpu_bytes=100, kv_dense_bytes=1000),
        row("codes", 512, "b", 0.5, kv_gpu_bytes=200, kv_dense_bytes=2000),
        row("codes", 256, "a", 0.5),
        row("codes", 256, "b", None, status="too_long"),
        row("codes", 256, "c", None, status="too_long"),
    ]
    full, small, large = summarise(rows)
    assert (full["policy"], full["budget_tokens"]) == ("full", None)
    assert (full["score"], full["full"], full["difference"], full["low"], full["high"]) == (1, 1, 0, 0, 0)
    assert (full["count"], full["failed"], full["seconds_per_token"]) == (2, {"out_of_memory": 1}, 1.0)
    assert (small["budget_tokens"], small["score"], small["failed"]) == (256, 0.5, {"too_long": 2})
    # One example has a difference, but no interval.
    assert (small["full"], small["difference"], small["low"], small["high"]) == (1, -0.5, None, None)
    assert [(cell["paired"], cell["differing"]) for cell in (full, small, large)] == [(2, 0), (1, 1), (2, 2)]
    # What full ran out of memory for is in the score and not in the comparison.
    assert (large["count"], large["paired"], large["score"]) == (3, 2, pytest.approx(1 / 3))
    assert (large["full"], large["difference"], large["low"], large["high"]) == (1, -0.5, -0.5, -0.5)
    assert (large["kv_gpu_bytes"], large["kv_dense_bytes"], large["seconds_to_read"]) == (200, 2000, None)


def test_without_full_there_is_no_comparison() -> None:
    (cell,) = summarise([row("codes", 512, "a", 0.25), row("codes", 512, "b", 0.75)])
    assert cell["score"] == 0.5
    assert [cell[name] for name in ("full", "difference", "low", "high")] == [None] * 4


def test_cells_come_in_the_order_of_the_rows() -> None:
    rows = [
        row(policy, budget, "a", 1, task=task, length=length)
        for task in ("vt", "cwe")
        for length in (8192, 4096)
        for policy, budget in (("window", 512), ("window", 256), ("full", None))
    ]
    found = [(c["task"], c["length"], c["policy"], c["budget_tokens"]) for c in summarise(rows)]
    kinds = [("window", 256), ("window", 512), ("full", None)]
    expected = [(t, n, *kind) for t in ("vt", "cwe", "average") for n in (4096, 8192) for kind in kinds]
    assert found == expected


def test_in_an_average_every_task_weighs_the_same() -> None:
    rows = [row("full", None, str(i), 1.0, task="many") for i in range(8)]
    rows += [row("codes", 512, str(i), 0.5, task="many") for i in range(8)]
    rows += [row("full", None, str(i), 1.0, task="few") for i in range(2)]
    rows += [row("codes", 512, str(i), 0.0, task="few") for i in range(2)]
    cells = summarise(rows)
    average = find(cells, "average", "codes")
    assert (average["score"], average["full"], average["tasks"], average["count"]) == (0.25, 1, 2, 10)
    # Examples are drawn within tasks: neither task has any spread, so the average has none.
    assert (average["difference"], average["low"], average["high"]) == (-0.75, -0.75, -0.75)
    assert (find(cells, "many", "codes")["score"], find(cells, "few", "codes")["score"]) == (0.5, 0)
    assert "tasks" not in find(cells, "few", "codes")


def test_the_interval_of_an_average_is_that_of_independent_tasks() -> None:
    rng = np.random.default_rng(4)
    spread = {"a": 0.3, "b": 0.1}
    differences = {task: rng.uniform(-width, width, size=100) for task, width in spread.items()}
    rows = [row("full", None, str(i), 0.5, task=task) for task in spread for i in range(100)]
    rows += [row("codes", 512, str(i), 0.5 + d, task=t) for t, ds in differences.items() for i, d in enumerate(ds)]
    average = find(summarise(rows), "average", "codes")
    error = math.sqrt(sum(ds.var() / 100 for ds in differences.values())) / 2
    assert average["high"] - average["low"] == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_an_average_over_fewer_tasks_is_none() -> None:
    rows = [row(p, b, i, 1.0, task=t) for p, b in (("full", None), ("codes", 512)) for t in "xy" for i in "ab"]
    rows = [
        {**r, "status": "out_of_memory", "score": None} if (r["policy"], r["task"]) == ("full", "y") else r
        for r in rows
    ]
    cells = summarise(rows)
    full, codes = find(cells, "average", "full"), find(cells, "average", "codes")
    assert (full["score"], full["tasks"], full["failed"]) == (None, 1, {"out_of_memory": 2})
    assert (codes["score"], codes["tasks"]) == (1, 2)
    assert (codes["full"], codes["difference"], codes["low"]) == (None, None, None)


def test_perplexity_is_of_all_tokens_and_its_ratio_of_paired_segments() -> None:
    rows = [
        segment("full", None, "a", -20.0, 10),
        segment("full", None, "b", -90.0, 30),
        segment("codes", 512, "a", -21.0, 10),
        segment("codes", 512, "b", -93.0, 30),
        segment("codes", 512, "c", -10.0, 10),
    ]
    full, codes = summarise(rows)
    assert (full["perplexity"], full["tokens"]) == (pytest.approx(math.exp(110 / 40)), 40)
    assert (full["ratio"], full["low"], full["high"]) == (1, 1, 1)
    assert (codes["perplexity"], codes["tokens"]) == (pytest.approx(math.exp(124 / 50)), 50)
    assert codes["full_perplexity"] == pytest.approx(math.exp(110 / 40))
    # Both segments lose a tenth of a nat per token.
    assert (codes["ratio"], codes["low"], codes["high"]) == tuple(pytest.approx(math.exp(0.1)) for _ in range(3))
    assert "score" not in codes


def test_perplexity_over_books_counts_tokens_and_draws_segments() -> None:
    rows = [segment(p, b, "0", -100.0, 50, task=book) for p, b in (("full", None), ("mean", 256)) for book in "xyz"]
    rows[3:] = [segment("mean", 256, "0", -nats, 50, task=b) for b, nats in (("x", 100), ("y", 105), ("z", 110))]
    cells = summarise(rows)
    assert find(cells, "y", "mean")["ratio"] == pytest.approx(math.exp(0.1))
    assert find(cells, "y", "mean")["low"] is None
    average = find(cells, "average", "mean")
    assert (average["perplexity"], average["tokens"]) == (pytest.approx(math.exp(315 / 150)), 150)
    assert average["ratio"] == pytest.approx(math.exp(15 / 150))
    assert (average["low"], average["high"]) == (pytest.approx(1), pytest.approx(math.exp(0.2)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("codes", 512, "a", 1), row("codes", 512, "a", 0)], "t 'a' at 4096 was asked twice under codes"),
        ([row("codes", 512, "a", 92.0)], "t 'a' under codes: score must be a number from 0 to 1 .* got 92.0"),
        ([row("codes", 512, "a", None)], "score must be a number from 0 to 1 .* got None"),
        ([segment("codes", 512, "a", -1.0, 0)], "tokens must be 1 or more .* got 0"),
        ([segment("codes", 512, "a", -1.0, 1), row("codes", 512, "a", 1)], "cannot be averaged"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summarise(rows)


def test_no_rows_make_no_cells() -> None:
    assert summarise([]) == []
