"""The decode benchmark runs on a CPU, checks before it times, and reports what it should."""

import json

import pytest
import typer

from benchmarks import decode, workload

SMALL = {
    "shape": "tiny",
    "context": 600,
    "budgets": "128,256",
    "policy": "moments",
    "new_tokens": 2,
    "warmup_tokens": 1,
    "full_tokens": 1,
    "device": "cpu",
    "dtype": "float32",
}


def test_decode_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(**SMALL, profile=True, source_commit="abc")
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["benchmark"] == "decode"
    assert (result["shape"], result["context_tokens"], result["seed"]) == ("tiny", 600, 0)
    assert result["commit"] == "abc"
    assert result["versions"]["torch"]
    assert result["hardware"]["device"] == "cpu"
    assert result["copy_bandwidth_bytes_per_second"] > 0
    assert result["check"]["passed"]
    assert result["check"]["relative_error"] < 1e-5 < result["check"]["control_relative_error"]

    rows = {row["variant"]: row for row in result["variants"]}
    assert list(rows) == ["transformers", "moments 128", "moments 256", "window", "full"]
    for row in rows.values():
        assert 0 < row["tpot_ms_p10"] <= row["tpot_ms_median"] <= row["tpot_ms_p90"]
        assert row["floor_ms"] > 0
        assert row["kv_gpu_bytes"] > 0
    for name in ("moments 128", "moments 256"):
        assert 0 <= rows[name]["hit_rate"] <= 1
        assert set(rows[name]["profile"]["stages"]) >= {"select", "resolve_hot_set", "sparse_decode"}
    assert rows["window"]["kv_gpu_bytes"] < rows["moments 128"]["kv_gpu_bytes"] < rows["moments 256"]["kv_gpu_bytes"]
    assert rows["moments 128"]["kv_host_bytes"] > rows["transformers"]["kv_host_bytes"] == 0
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({len(line) for line in table}) == 1, "the table is not aligned"


def test_decode_refuses_to_time_what_fails_its_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = workload.Context.cache

    def other_context(context: workload.Context) -> object:
        return right(workload.Context(context.model, context.num_tokens, context.num_new, context.seed + 1))

    monkeypatch.setattr(workload.Context, "cache", other_context)
    with pytest.raises(typer.Exit):
        decode.main(**SMALL)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not timed" in captured.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "llama-9b"}, "unknown shape"),
        ({"policy": "best"}, "one that selects.*got 'best'"),
        ({"policy": "full"}, "one that selects.*got 'full'"),
        ({"budgets": "64"}, "must exceed"),
        ({"budgets": "many"}, "whole numbers"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_decode_refuses_bad_options(changes: dict[str, str], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        decode.main(**{**SMALL, **changes})


def test_sentences_cover_the_context() -> None:
    model = workload.make_model("tiny", decode.torch.device("cpu"), decode.torch.float32, 1024, 0)
    config = decode.Config()
    ends = workload.Context(model, 900, 40, 0).sentence_ends(config)
    lengths = [stop - start for start, stop in zip([config.sink_tokens, *ends], ends, strict=False)]
    assert min(lengths) >= config.min_sentence_tokens
    assert max(lengths) <= config.max_sentence_tokens
    assert 940 - config.max_sentence_tokens < ends[-1] <= 940
