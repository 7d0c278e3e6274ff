"""The study of selection: figures that can be checked against what they mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from eval import selection, watching
from eval.needle import make_cases
from sentencekv import LongContextLM

SMALL: dict[str, Any] = {
    "model": "pocket",
    "policies": "codes,codes:bits=4,mean,pages,rerank",
    "budgets": "128,4000",
    "contexts": "700",
    "cases": 1,
    "facts": 2,
    "text": None,
    "trace": None,
    "save_plot": None,
    "device": "cpu",
    "dtype": "float32",
}


def test_the_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    selection.main(**{**SMALL, "trace": tmp_path / "trace.jsonl", "save_plot": tmp_path / "study.png"})
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["policy"], row["budget_tokens"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6 * 2
    for (_, budget), row in rows.items():
        assert row["needed_heads"] > 10
        assert row["mass"] == pytest.approx(sum(row["mass_by_layer"]) / 8)
        # A budget that holds everything chooses everything.
        if budget == 4000:
            assert (row["mass"], row["mass_of_sentences"], row["needed"]) == pytest.approx((1, 1, 1), abs=1e-5)
            assert row["output_error"] == pytest.approx(0, abs=1e-5)
            assert row["right"] in (None, 2)
        else:
            assert 0 < row["output_error"] < 1
            assert row["mass_of_sentences"] < row["mass"] < 1
    oracle, codes, fine, mean = (rows[name, 128] for name in ("oracle", "codes", "codes:bits=4", "mean"))
    assert min(oracle["needed"], fine["needed"]) > 0.95 > mean["needed"]
    # The group takes a head's largest share, which is not what makes the mean mass largest: bits can gain a little.
    assert fine["mass_of_sentences"] == pytest.approx(oracle["mass_of_sentences"], abs=0.01)
    assert min(oracle["mass_of_sentences"], fine["mass_of_sentences"]) > codes["mass_of_sentences"] > 0
    assert mean["needed_rank_median"] >= oracle["needed_rank_median"] == 1
    assert oracle["summary_bytes_per_token"] == 0 < mean["summary_share_of_kv"] < codes["summary_share_of_kv"]
    assert fine["calibration"] == pytest.approx(1, abs=0.05)
    assert len(codes["calibration_by_layer"]) == len(codes["output_error_by_layer"]) == 8
    assert mean["calibration"] is None
    # Two and four bits of 64 dimensions, 2 heads, 8 layers.
    more = fine["summary_bytes_per_token"] - codes["summary_bytes_per_token"]
    assert more == pytest.approx(2 / 8 * 64 * 2 * 8, rel=0.2)
    assert 0 < rows["pages", 128]["needed"] < oracle["needed"]
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    sentences = [line["sentences"] for line in lines if "sentences" in line]
    assert len(sentences) == 2, "one reading in sentences, one in pages"
    chosen = [line for line in lines if line.get("policy") == "codes" and line["budget"] == 128]
    assert {line["layer"] for line in chosen} == set(range(8))
    for line in chosen:
        assert len(line["chosen"]) == 2
        assert all(0 <= s < len(sentences[0]) for ids in line["chosen"] for s in ids)
    asked = [line for line in chosen if line["number"] == 1]
    key = asked[0]["question"].rstrip("?").split()[-1]
    read = {
        sentences[0][s]
        for line in asked
        if line["question"] == asked[0]["question"]
        for ids in line["chosen"]
        for s in ids
    }
    assert any(key in sentence for sentence in read), "the fact's sentence was read by some layer"
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_rest_lowers_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    selection.main(**{**SMALL, "policies": "codes,codes:rest=0", "budgets": "128"})
    with_rest, without, _ = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert with_rest["mass"] == without["mass"]
    assert with_rest["output_error"] < 0.9 * without["output_error"]


def test_watching_changes_nothing(prose: str) -> None:
    """Dense attention answers as `full` does, and the fact's sentence is where it was hidden."""
    lm = LongContextLM.from_pretrained("pocket", device="cpu", policy="full")
    engines = {("mean", 256): lm.with_config(policy="mean", budget_tokens=256)}
    (case,) = make_cases(lm, [prose * 3], 600, 1, 2)
    seen: list[int] = []

    class Taking(watching.Watch):
        def attend(self, layer: int, *given: Any, **keywords: Any) -> torch.Tensor:
            if layer == 0 and self.counts:
                seen.append(1)
            return super().attend(layer, *given, **keywords)

    with lm.read(case.hidden.text) as document:
        text = watching.Text(document, watching.choosers_of(document, engines))
        for fact, (start, stop) in zip(case.facts, case.hidden.spans, strict=True):
            sentences = text.sentences_of(start, stop)
            first, last = text.spans[sentences[0]][0], text.spans[sentences[-1]][1]
            spans = document._contents.prompt.spans[first:last] - len(document._contents.frame.before)
            assert fact.sentence in case.hidden.text[spans[0, 0] : spans[-1, 1]]
            figures = {key: watching.Figures() for key in engines}
            seen.clear()
            watching.watch_answer(text, fact, Taking(text, sentences, figures))
            answer = document.ask(fact.question, max_new_tokens=watching._ANSWER_TOKENS)
            assert len(seen) == len(answer.token_ids) - 1
            assert figures["mean", 256].count == 8 * len(seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": "codes,window"}, "'window' selects no sentences"),
        ({"policies": "codes:bits"}, "option=value"),
        ({"policies": "best"}, "available"),
        ({"budgets": "many"}, "budgets must be whole numbers"),
        ({"contexts": "4k"}, "contexts must be whole numbers"),
        ({"budgets": "10"}, "must exceed"),
        ({"trace": Path("nowhere/trace.jsonl")}, "no folder 'nowhere' to write trace.jsonl to"),
        ({"save_plot": Path("nowhere/plot.png")}, "no folder 'nowhere' to write plot.png to"),
        ({"text": [Path("nowhere.txt")]}, "no file or directory 'nowhere.txt'"),
    ],
)
def test_bad_options(changes: dict[str, str], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        selection.main(**{**SMALL, **changes})
