"""The evaluation of precision runs on a CPU, compares what it should, and reports it."""

import json

import pytest

from eval import precision


def test_rows_are_compared_with_full_precision(capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(
        model="pocket",
        policies="full",
        kv_dtypes="int8,int4",
        budget=256,
        contexts="350",
        cases=1,
        facts=1,
        text=None,
        device="cpu",
        dtype="float32",
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    exact, int8, int4 = result["rows"]
    assert [row["kv_dtype"] for row in result["rows"]] == ["auto", "int8", "int4"]
    assert (exact["perplexity_ratio"], exact["mean_kl"], exact["largest_kl"]) == (1.0, 0.0, 0.0)
    for row in result["rows"]:
        assert (row["right"], row["of"]) == (1, 1)
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / exact["perplexity"])
        assert row["perplexity_ratio"] == pytest.approx(1, abs=0.03)
    assert 0 < int8["mean_kl"] < int4["mean_kl"] < int4["largest_kl"]
    assert int4["host_bytes_per_token"] < int8["host_bytes_per_token"] < 0.5 * exact["host_bytes_per_token"]
