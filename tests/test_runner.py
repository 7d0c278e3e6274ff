"""Runs of evaluations: rows that can be added up, a folder that goes on, commands that say what is wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
import typer

from eval import needle, pg19, runner
from eval.arguments import (
    as_config,
    asked_of,
    load_model,
    names,
    settings_of,
    template_tokens,
    whole_numbers,
    with_data,
)
from eval.examples import Example
from eval.infinitebench.__main__ import main as infinitebench
from eval.longbench.__main__ import main as longbench
from eval.report import expected_rows
from eval.ruler.__main__ import main as ruler
from eval.run_folder import RunFolder
from eval.runner import METRICS, asked_text, default_folder, run
from sentencekv import LongContextLM

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def lm() -> LongContextLM:
    return LongContextLM.from_pretrained("pocket", **CPU)


def example_of(name: str, context: str, **changes: object) -> Example:
    fields = {"task": "t", "id": name, "length": 0, "context": context, "question": "What is the name of the boat?"}
    fields |= {"answers": ("Marigold",), "metric": "fact", "max_new_tokens": 12}
    return Example(**(fields | changes))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_and_summary(lm: LongContextLM, prose: str, tmp_path: Path) -> None:
    context = "The name of the boat is Marigold. " + prose
    asked = asked_of(lm, "full,codes,window,snapkv", "128,4000")
    examples = [example_of("0", context), example_of("1", context, question="How old is the bridge?", answers=("9",))]
    settings = settings_of("trial", "pocket", asked, seed=0)
    done = run(lm, asked, examples, tmp_path, settings)
    rows = rows_of(tmp_path)
    assert rows == done.rows
    assert len(rows) == 2 * (1 + 3 * 2) == expected_rows(json.loads((tmp_path / "config.json").read_text()))
    by = {(row["policy"], row["budget_tokens"], row["id"]): row for row in rows}
    full = by["full", None, "0"]
    with lm.with_config(policy="full").read(context) as document:
        assert full["prediction"] == document.ask(examples[0].question, max_new_tokens=12).text
    assert (full["status"], full["score"]) == ("ok", 1.0)
    assert by["codes", 4000, "0"]["prediction"] == full["prediction"]
    assert by["snapkv", 4000, "0"]["prediction"] == full["prediction"]
    assert by["full", None, "1"]["score"] == 0.0
    assert by["codes", 128, "0"]["kv_dense_bytes"] > 0 < by["codes", 128, "0"]["seconds_to_read"]
    cells = json.loads((tmp_path / "summary.json").read_text())
    assert {(cell["policy"], cell["budget_tokens"]): cell["score"] for cell in cells}["full", None] == 0.5


def test_a_run_goes_on(lm: LongContextLM, prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of(lm, "full,codes", "128")
    examples = [example_of(str(i), prose[i:]) for i in range(2)]
    settings = settings_of("trial", "pocket", asked)
    run(lm, asked, examples, tmp_path, settings)
    whole = rows_of(tmp_path)
    # The last row but one is missing, and the last was cut short.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:2]) + lines[3][:40])
    read = []
    monkeypatch.setattr(
        LongContextLM,
        "read",
        lambda self, text, original=LongContextLM.read, **more: (
            read.append(text),
            original(self, text, **more),
        )[1],
    )
    run(lm, asked, examples, tmp_path, settings)
    assert read == [examples[1].context], "one text is read again, and only that"
    again = rows_of(tmp_path)
    assert [(row["id"], row["policy"], row["prediction"]) for row in again] == [
        (row["id"], row["policy"], row["prediction"]) for row in whole
    ]
    with pytest.raises(typer.BadParameter, match="other settings \\(budgets"):
        RunFolder(tmp_path, settings | {"budgets": [7]}, {})
    with pytest.raises(typer.BadParameter, match="other settings \\(contents"):
        run(lm, asked, [example_of("0", prose + "Another.")], tmp_path, settings)
    (tmp_path / "rows.jsonl").write_text("{nonsense\n")
    with pytest.raises(typer.BadParameter, match="damaged"):
        RunFolder(tmp_path, settings, {})


def test_the_same_command_finds_its_folder() -> None:
    assert default_folder({"suite": "a", "b": 1}) == default_folder({"b": 1, "suite": "a"})
    assert default_folder({"suite": "a", "b": 1}) != default_folder({"suite": "a", "b": 2})


def test_what_fails_is_a_row(
    lm: LongContextLM,
    prose: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = asked_of(lm, "full,codes", "128")
    answered = runner._answered

    def fails(example: Example, each: runner.Asked, document: object) -> dict:
        if each.policy == "codes" and example.id == "2":
            raise torch.OutOfMemoryError("too little")
        return answered(example, each, document)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_answered", fails)
    long = example_of("1", "word " * 41_000)
    examples = [example_of("0", prose), example_of("2", prose), long]
    done = run(lm, asked, examples, tmp_path, settings_of("trial", "pocket", asked))
    assert len(done.rows) == 6
    status = {(row["id"], row["policy"]): row["status"] for row in done.rows}
    assert status == {
        ("0", "full"): "ok",
        ("0", "codes"): "ok",
        ("2", "full"): "ok",
        ("2", "codes"): "out_of_memory",
        ("1", "full"): "too_long",
        ("1", "codes"): "too_long",
    }
    assert all(row["score"] is None for row in done.rows if row["status"] != "ok")
    runner.show(done)
    assert re.search(r"mean[^\n]*\*[^\n]*\*", capsys.readouterr().out), "not all were answered, and it says so"
    monkeypatch.setattr(runner, "_answered", answered)
    again = run(lm, asked, examples, tmp_path, settings_of("trial", "pocket", asked))
    assert {row["status"] for row in again.rows if row["id"] != "1"} == {"ok"}, "memory may be there by now"
    assert len(rows_of(tmp_path)) == 6


def test_what_follows_the_context(lm: LongContextLM) -> None:
    example = example_of("0", "x", prefix="It is")
    frame_text = asked_text(lm, example)
    assert example.question in frame_text
    assert frame_text.endswith("It is")
    assert asked_text(lm, example_of("0", "x", chat=False, prefix=" It")) == example.question + " It"
    assert template_tokens(lm) > 8


def test_arguments(lm: LongContextLM) -> None:
    asked = asked_of(lm, "full,codes:bits=1,window,h2o", "256,512")
    assert [str(each) for each in asked] == [
        "full",
        *["codes:bits=1 256", "codes:bits=1 512", "window 256", "window 512", "h2o 256", "h2o 512"],
    ]
    assert as_config("codes:attention_mass=0.9") == {"policy": "codes", "policy_options": {"attention_mass": 0.9}}
    window = asked[3].lm.config
    assert window.sink_tokens + window.window_tokens + window.max_sentence_tokens == 256
    for wrong in ("codes:bits=3", "nothing", "codes:bits"):
        with pytest.raises(typer.BadParameter):
            asked_of(lm, wrong, "256")
    with pytest.raises(typer.BadParameter, match="of a, b"):
        names("a,c", "tasks", ["a", "b"])
    with pytest.raises(typer.BadParameter, match="whole numbers"):
        whole_numbers("1,x", "budgets")
    with pytest.raises(typer.BadParameter, match="at least 1"):
        whole_numbers("0,5", "budgets")
    assert whole_numbers("5,7,5", "budgets") == [5, 7]
    with pytest.raises(typer.BadParameter, match="no options"):
        asked_of(lm, "snapkv:x=1", "256")
    assert [each.policy for each in asked_of(lm, "codes, mean,", "256")] == ["codes", "mean"]
    with pytest.raises(typer.BadParameter, match="nothing/here"):
        load_model("nothing/here", "cpu", "float32")


def test_one_fact_at_each_depth(lm: LongContextLM) -> None:
    examples = needle.one_at_each_depth(lm, [], 900, 1, 3)
    assert [example.extra["depth"] for example in examples] == [0.0, 0.5, 1.0]
    places = []
    for example in examples:
        assert METRICS["fact"](f"It is {example.answers[0]}.", example) == 1
        places.append(example.context.index(example.answers[0]) / len(example.context))
        assert 600 < len(lm.tokenizer(example.context).input_ids) <= 900
    assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.9 < places[2]


@pytest.mark.parametrize("facts", [1, 4])
def test_needle(facts: int, tmp_path: Path) -> None:
    options = {"policies": "full,window", "contexts": "700", "cases": 1, "facts": facts, "depths": 3}
    needle.main(**options, out=tmp_path, **CPU)
    rows = rows_of(tmp_path)
    assert {row["extra"]["depth"] for row in rows if row["policy"] == "full"} == (
        {0.0, 0.5, 1.0} if facts == 1 else {0.125, 0.375, 0.625, 0.875}
    )
    assert sum(row["score"] for row in rows if row["policy"] == "full") >= facts - 1
    assert (tmp_path / "depths.png").read_bytes()[:4] == b"\x89PNG"


def test_ruler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"policies": "full,window", "budgets": "256", "contexts": "1000", "cases": 1}
    ruler(**options, tasks="niah_single_2,vt", out=tmp_path, **CPU)
    score = {(row["task"], row["policy"]): row["score"] for row in rows_of(tmp_path)}
    assert set(score) == {(task, policy) for task in ("niah_single_2", "vt") for policy in ("full", "window")}
    assert "niah_single_2" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="qa_1"):
        ruler(contexts="1000", tasks="qa_1", out=tmp_path / "other", **CPU)
    with pytest.raises(typer.BadParameter, match="tasks are of"):
        ruler(tasks="niah", **CPU)


def test_longbench(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data" / "longbench"
    options = {"tasks": "qasper,trec", "policies": "full", "max_tokens": 400, "cases": 1}
    longbench(data, **options, out=tmp_path, **CPU)
    assert {row["task"] for row in rows_of(tmp_path)} == {"qasper", "trec"}
    # What is missing is said before a model is looked for.
    with pytest.raises(typer.BadParameter, match="narrativeqa"):
        longbench(tmp_path, model="nowhere")
    with pytest.raises(typer.BadParameter, match=r"gov_report_e\.jsonl"):
        longbench(data, model="nowhere", tasks="trec,gov_report", extended=True)


def test_pg19(prose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text(prose * 3)
    options = {"policies": "full,codes,window", "budgets": "128,4000", "contexts": "300,64", "segments": 2, "tokens": 8}
    pg19.main(books, **options, out=tmp_path / "run", **CPU)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 * 2 * (1 + 2 * 2)
    found = {(row["id"], row["length"], row["policy"], row["budget_tokens"]): row["log_likelihood"] for row in rows}
    for (name, length, policy, budget), value in found.items():
        if budget == 4000:
            assert value == pytest.approx(found[name, length, "full", None], abs=1e-3), (name, length, policy)
    lm = LongContextLM.from_pretrained("pocket", policy="full", **CPU)
    ids = lm.tokenizer(prose * 3).input_ids[: 300 + 8]
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    want = sum(float(logits[i - 1, ids[i]]) for i in range(300, 308))
    assert found["0", 300, "full", None] == pytest.approx(want, abs=1e-2)
    assert "after 300" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match=r"no \*\.txt files in .* eval\.download pg19"):
        pg19.main(tmp_path, **CPU)
    with pytest.raises(typer.BadParameter, match=r"there is no folder .* eval\.download pg19"):
        pg19.main(tmp_path / "nowhere", **CPU)
    with pytest.raises(typer.BadParameter, match="tokens are asked for"):
        pg19.main(books, contexts="100000", out=tmp_path / "other", **CPU)
    with pytest.raises(typer.BadParameter, match="snapkv"):
        pg19.main(books, policies="snapkv", **CPU)
    with pytest.raises(typer.BadParameter, match=r"one\.txt has .* tokens, and 30008 are needed"):
        pg19.main(books, contexts="30000", tokens=8, out=tmp_path / "other", **CPU)
    assert not (tmp_path / "other").exists()


def test_short_books_are_left_out_and_named(prose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, times in (("a", 1), ("b", 2), ("c", 1), ("d", 2), ("e", 2)):
        (tmp_path / f"{name}.txt").write_text(f"{name} " + prose[: 3000 * times])
    options = {"contexts": "1200", "budgets": "128", "segments": 1, "tokens": 2, "books": 2}
    pg19.main(tmp_path, policies="full", **options, out=tmp_path / "run", **CPU)
    assert [row["task"] for row in rows_of(tmp_path / "run")] == ["b", "d"]
    assert "fewer than 1202 tokens are left out: a.txt, c.txt\n" in capsys.readouterr().err


def test_tasks_without_data(tmp_path: Path) -> None:
    """By default those that have theirs are asked; what was named must be there, before a model is looked for."""

    def find(task: str) -> Path:
        if task != "one":
            raise ValueError(f"{task} is missing")
        return tmp_path

    assert with_data(["zero", "one", "two"], find, named=False) == with_data(["one"], find, named=True) == ["one"]
    assert with_data([], find, named=True) == []
    for tasks, named in ((["zero", "one"], True), (["zero", "two"], False)):
        with pytest.raises(typer.BadParameter, match="zero is missing"):
            with_data(tasks, find, named=named)
    for main, missing in ((infinitebench, "passkey"), (ruler, "dev-v2")):
        with pytest.raises(typer.BadParameter, match=missing):
            main(model="nowhere", data=tmp_path)
