"""The benchmarks of reading, opening and long replies run on a CPU, and report what they should."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import long_generation, opening, prefill, workload

CPU = torch.device("cpu")

SMALL_PREFILL = {
    "shape": "tiny",
    "contexts": "500,1500",
    "policy": "moments",
    "kv_dtype": "auto",
    "chunk": 200,
    "repeats": 1,
    "dense_up_to": 500,
    "generate": 0,
    "profile": False,
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
    "source_commit": "abc",
    "save": None,
}


def test_prefill_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefill.main(**{**SMALL_PREFILL, "save": tmp_path / "prefill"})
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert json.loads((tmp_path / "prefill.json").read_text()) == result
    seen = [(row["variant"], row["context_tokens"]) for row in result["rows"]]
    ours = [
        ("sentencekv, cold", 500),
        ("sentencekv, warm", 500),
        ("sentencekv, cold", 1500),
        ("sentencekv, warm", 1500),
    ]
    assert seen == [("transformers", 500), *ours]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        if row["variant"] != "transformers":
            assert (row["error"] is None) == (row["context_tokens"] > 500)
            assert (row["error"] or 0) < 1e-3
            # All but sink and recent tokens: 2 layers, 2 heads of 16 dimensions, K and V in float32.
            assert row["kv_host_bytes"] > (row["context_tokens"] - 200) * 2 * 2 * 2 * 16 * 4
    check = result["check"]
    assert check["relative_error"] < 1e-5 < 2 * check["tolerance"] < check["control_relative_error"]
    assert lines[0].startswith("tiny, float32, policy moments, ")
    assert lines[1].startswith("check at 6144 tokens, 2 layers: ")
    assert lines[3].startswith("| read by")
    assert (tmp_path / "prefill.md").read_text().splitlines() == lines[:-1]


def test_prefill_goes_on_from_what_it_read(capsys: pytest.CaptureFixture[str]) -> None:
    prefill.main(**{**SMALL_PREFILL, "contexts": "500", "repeats": 0, "generate": 5})
    _, ours = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert ours["variant"] == "sentencekv, cold"
    assert ours["generated_tokens"] == 5
    assert ours["ms_per_generated_token"] > 0


def test_operations_are_those_of_the_products() -> None:
    """Counted by torch, on attention written out: it computes the half that causal attention leaves out as well."""
    model = workload.make_model("tiny", CPU, torch.float32, 100, 0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 64, dtype=torch.long), logits_to_keep=1)
    attention = 4 * 64 * 64 * 4 * 16 * 2
    assert prefill.operations(model, 64) == counter.get_total_flops() - attention + 2 * 64 * 65 * 4 * 16 * 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"contexts": "abc"}, "whole numbers"),
        ({"contexts": "0"}, "at least 256"),
        ({"kv_dtype": "int5"}, "kv_dtype must be"),
        ({"policy": "nope"}, "available"),
        ({"chunk": 0}, "prefill_chunk_tokens"),
        ({"profile": True}, "needs --device cuda"),
    ],
)
def test_prefill_refuses_what_it_cannot_read(bad: dict, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        prefill.main(**{**SMALL_PREFILL, **bad})


def test_reading_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefill, "dense", lambda model, prompt: torch.ones(1, model.config.vocab_size))
    with pytest.raises(typer.Exit):
        prefill.main(**SMALL_PREFILL)
    lines = capsys.readouterr()
    assert lines.out == ""
    assert "not timed" in lines.err


SMALL_OPENING: dict[str, Any] = {
    "shape": "tiny",
    "context": 700,
    "policy": "codes",
    "kv_dtype": "auto",
    "folder": None,
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
    "source_commit": "abc",
    "out": None,
}


def test_opening_is_checked_and_leaves_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    opening.main(**{**SMALL_OPENING, "folder": tmp_path, "out": tmp_path / "opening"})
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert json.loads((tmp_path / "opening.json").read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opening.json", "opening.md"]
    assert len(result["reading_seconds"]) == 2
    assert [row["equal"] for row in result["rows"]] == [True] * 3
    for row in result["rows"]:
        assert row["times_faster"] == pytest.approx(result["reading_seconds"][1] / row["open_seconds"])
    # All but sink and recent tokens: 2 layers, 2 heads of 16 dimensions, K and V in float32.
    assert result["file_bytes"] > 500 * 2 * 2 * 2 * 16 * 4


def test_opening_that_gives_other_logits_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    first_logits = opening.first_logits
    monkeypatch.setattr(opening, "first_logits", lambda *given: first_logits(*given) + max(next(count) - 1, 0))
    with pytest.raises(typer.Exit):
        opening.main(**SMALL_OPENING)
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": "nope"}, "known: "),
        ({"device": "gpu"}, "device must be cuda or cpu"),
        ({"device": "meta"}, "device must be cuda or cpu"),
        ({"folder": Path("/nowhere")}, "there is no folder"),
        ({"policy": "nope"}, "available"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_opening_refuses(bad: dict, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        opening.main(**{**SMALL_OPENING, **bad})


def test_a_long_reply_is_followed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    long_generation.main(
        shape="tiny",
        context=300,
        new_tokens=199,
        policy="moments",
        budget=256,
        rows=2,
        device="cpu",
        dtype="float32",
        seed=0,
        source_commit="abc",
        save=tmp_path / "long",
    )
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert json.loads((tmp_path / "long.json").read_text()) == result
    first, middle, last = result["rows"]
    assert [row["generated_tokens"] for row in result["rows"]] == [1, 100, 199]
    # 2 layers, 2 heads of 16 dimensions, K and V in float32.
    assert last["kv_dense_bytes"] - first["kv_dense_bytes"] == 198 * 2 * 2 * 2 * 16 * 4
    assert last["kv_host_bytes"] > first["kv_host_bytes"]
    assert first["sentences"] < middle["sentences"] < last["sentences"]
    assert all(row["tpot_ms_median"] > 0 for row in result["rows"])
