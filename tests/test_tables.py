"""Tables say what cells do: rounded, signed, marked only where the interval excludes what full has."""

from typing import Any

import pytest

from eval.statistics import summarise
from eval.tables import Entry, by_length, by_task, costs, entry


def cell(**given: Any) -> dict[str, Any]:
    made = {"task": "t", "length": 4096, "policy": "codes", "budget_tokens": 256, "count": 50, "failed": {}}
    made |= {"paired": 50, "differing": 6}
    return {**made, "score": 0.9, "full": 1.0, "difference": -0.1, "low": -0.2, "high": -0.05, **given}


def perplexity(**given: Any) -> dict[str, Any]:
    made = {key: value for key, value in cell().items() if key not in ("score", "full", "difference")}
    return {**made, "perplexity": 12.3456, "full_perplexity": 12.0, "ratio": 1.0288, "tokens": 100, **given}


LOST = {"out_of_memory": 50}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (cell(), Entry("90.0", "−10.0", "[−20.0, −5.0]", "worse")),
        (cell(difference=0.1, low=0.004, high=0.2), Entry("90.0", "+10.0", "[+0.4, +20.0]", "better")),
        (cell(differing=5), Entry("90.0", "−10.0", "[−20.0, −5.0]")),
        (cell(high=0.01), Entry("90.0", "−10.0", "[−20.0, +1.0]")),
        (cell(difference=-0.0001, low=-0.0004, high=0.0), Entry("90.0", "0.0", "[0.0, 0.0]")),
        (cell(policy="full", difference=0.0, low=0.0, high=0.0), Entry("90.0")),
        (cell(difference=None, low=None, high=None), Entry("90.0")),
        (cell(low=None, high=None), Entry("90.0", "−10.0")),
        (cell(count=48, paired=48, failed={"too_long": 2}, difference=None), Entry("90.0", notes=("2 too long",))),
        (cell(count=0, paired=0, score=None, difference=None, failed=LOST), Entry("–", notes=("50 out of memory",))),
        (cell(count=9, paired=7, low=None, high=None), Entry("90.0", "−10.0", notes=("over 9", "compared over 7"))),
        (cell(score=None, difference=None, tasks=3), Entry("–", notes=("only 3 of the tasks",))),
        (perplexity(low=1.01, high=1.05), Entry("12.346", "+2.88%", "[+1.00, +5.00]", "worse")),
        (perplexity(ratio=0.98, low=0.97, high=0.99), Entry("12.346", "−2.00%", "[−3.00, −1.00]", "better")),
        (perplexity(low=0.99, high=1.05), Entry("12.346", "+2.88%", "[−1.00, +5.00]")),
        (None, Entry("–")),
    ],
)
def test_an_entry_says_what_its_cell_does(given: dict[str, Any] | None, expected: Entry) -> None:
    assert entry(given, 50) == expected


def row(policy: str, budget: int | None, task: str, length: int, score: float) -> dict[str, Any]:
    made = {"task": task, "id": "0", "length": length, "policy": policy, "budget_tokens": budget, "metric": "exact"}
    costs = {"kv_gpu_bytes": 3 * 2**20, "kv_dense_bytes": 12 * 2**20, "seconds_per_token": 0.0125}
    return {**made, "score": score, "status": "ok", "extra": {}, **costs}


CELLS = summarise(
    row(policy, budget, task, length, scores[task])
    for policy, budget, scores in (
        ("full", None, {"vt": 1.0, "cwe": 0.9}),
        ("codes", 1024, {"vt": 0.9, "cwe": 0.6}),
        ("codes", 256, {"vt": 0.8, "cwe": 0.5}),
    )
    for task in ("vt", "cwe")
    for length in (8192, 4096)
)


def test_policies_stand_below_each_other_and_lengths_beside() -> None:
    table = by_length([cell for cell in CELLS if cell["task"] == "average"])
    assert table.columns == ["4,096", "8,192"]
    (section,) = table.sections
    assert [(line.policy, line.label) for line in section.lines] == [("full", ""), ("codes", "256"), ("codes", "1,024")]
    assert [each.value for each in section.lines[1].entries] == ["65.0", "65.0"]


def test_tasks_stand_below_their_average() -> None:
    table = by_task(CELLS, 8192)
    assert (table.title, table.columns) == ("8,192 tokens", ["all", "256", "1,024"])
    assert [(group.policy, group.columns) for group in table.groups] == [("full", 1), ("codes", 2)]
    (section,) = table.sections
    assert [(line.label, line.strong) for line in section.lines] == [
        ("average (2)", True),
        ("vt (1)", False),
        ("cwe (1)", False),
    ]
    assert [each.value for each in section.lines[2].entries] == ["90.0", "50.0", "60.0"]


def test_texts_of_any_length_and_positions_at_the_beginning_are_not_the_same() -> None:
    natural = by_length([cell(length=0, kv_gpu_bytes=None)])
    assert (natural.columns, natural.groups) == (["texts as long as they are"], ())
    assert by_length([perplexity(length=0), perplexity(length=4096)]).columns == ["0", "4,096"]
    assert by_task([perplexity(length=0)], 0).title == "0 tokens"


def test_costs_are_in_units_that_people_read() -> None:
    short, long = costs([cell for cell in CELLS if cell["task"] == "vt"]).sections
    assert (short.title, long.title) == ("4,096 tokens", "8,192 tokens")
    assert [each.value for each in short.lines[0].entries] == ["3.0", "25.0%", "–", "–", "12.5"]
