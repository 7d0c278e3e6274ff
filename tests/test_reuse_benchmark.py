"""The benchmark of reuse runs on a CPU, checks before it times, and reports what it should."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import reuse, workload
from sentencekv.config import Config
from sentencekv.memory import HostMemory
from sentencekv.reuse.decide import make_reuse_options
from sentencekv.reuse.match import align

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "shape": "tiny",
    "tokens": "750",
    "share": 0.8,
    "paragraph": 50,
    "repeats": 1,
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
    "source_commit": "abc",
    "save": None,
}


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "CHECK_TOKENS", 600)


def test_it_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reuse.main(**{**SMALL, "save": tmp_path / "made" / "reuse"})
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert json.loads((tmp_path / "made" / "reuse.json").read_text()) == result
    assert (tmp_path / "made" / "reuse.md").read_text().splitlines() == lines[:-1]
    assert (result["benchmark"], result["shape"], result["share"], result["seed"]) == ("reuse", "tiny", 0.8, 0)
    assert result["commit"] == "abc"
    assert result["versions"]["torch"]
    assert result["hardware"]["device"] == "cpu"

    checked = result["check"]
    assert checked["passed"]
    assert checked["errors"]["all computed"] < 1e-5 < 2 * checked["tolerance"] < checked["errors"]["keys not turned"]
    assert checked["errors"]["all computed"] < checked["errors"]["by default"]

    rows = {row["variant"]: row for row in result["rows"]}
    first, *others = reuse.VARIANTS
    always = ["in full", "transformers, dense"]
    assert list(rows) == [*always, first, "the same prompt again", "a prompt that has nothing in common", *others]
    for row in result["rows"]:
        assert row["tokens"] == 750
        assert 0 < row["least_seconds"] <= row["seconds"] <= row["most_seconds"] <= row["settled_seconds"]
        assert row["times_faster"] == pytest.approx(rows["in full"]["seconds"] / row["seconds"])
    assert rows["in full"]["times_faster"] == 1
    for name, options in reuse.VARIANTS.items():
        row = rows[name]
        assert row["seconds_to_find"] < row["seconds"]
        assert row["caching_seconds"] > 0
        assert row["reused_tokens"] == 750 - row["computed_by_layer"][0]
        # Tokens that are chosen by what the second layer computes are all computed in both, so that is not worth it.
        assert row["kind"] == ("none" if "ratio" in options else "similar")
        if row["kind"] == "similar":
            # A fifth of the tokens is new; of each run, of which there are at most twelve, the first are computed.
            made = make_reuse_options(options)
            most = 150 + 12 * max(made.first_tokens, made.after_new) + max(made.last_tokens, 1)
            assert all(150 <= count <= most for count in row["computed_by_layer"])
    assert rows[first]["kind"] == "similar"
    table = [line for line in lines if line.startswith("|")]
    header, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    kinds = {line[0]: line[header.index("kind")] for line in cells}
    assert kinds == {name: row.get("kind", "-") for name, row in rows.items()}
    caching = {line[0]: line[header.index("ms to cache")] for line in cells}
    assert caching[first] == f"{1e3 * rows[first]['caching_seconds']:.1f}"
    assert caching["in full"] == "-"
    assert len(table) == 2 + len(rows)
    assert len({len(line) for line in table}) == 1, "the table is not aligned"


def test_an_even_number_of_repeats_has_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the slower of two."""
    times = itertools.cycle([(1.0, 3.0, torch.zeros(1)), (2.0, 5.0, torch.zeros(1))])
    monkeypatch.setattr(reuse, "timed", lambda run, device: next(times))
    monkeypatch.setattr(reuse, "VARIANTS", {})
    model = workload.make_model("tiny", CPU, torch.float32, 100, 0)
    reader = reuse.Reader(model, Config(), HostMemory(None, pinned=False))
    for row in reuse.rows_of(reader, 96, 0.5, 16, repeats=2, seed=0):
        assert (row["least_seconds"], row["seconds"], row["most_seconds"], row["settled_seconds"]) == (
            1.0,
            1.5,
            2.0,
            4.0,
        )


def test_what_is_not_worth_it_is_not_called_moved(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing is shared, nothing is reused, and the table says so."""
    reuse.main(**{**SMALL, "tokens": "512", "share": 0.0})
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    (line,) = (line for line in table if line.startswith("| similar, by default"))
    assert line.split("|")[2].strip() == "none"
    assert not any("moved" in line for line in table)
    assert any("(neighbours made for it)" in line for line in table)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_prompts_share_what_they_say(share: float) -> None:
    """Whole paragraphs, moved; the others are as long and have nothing of the cached one."""
    old, mixed, strange = reuse.make_prompts(32000, 2000, share, 100, seed=3)
    for prompt in (old, mixed, strange):
        assert len(prompt.token_ids) == prompt.ends[-1] == 2000
        assert prompt.ends == sorted(set(prompt.ends))

    def shared(prompt: Any) -> int:
        return align(old.token_ids, prompt.token_ids, donor_ends=old.ends, ends=prompt.ends).num_new

    assert shared(strange) == 2000
    assert shared(mixed) == round((1 - share) * 2000)
    paragraphs = [tuple(old.token_ids[start : start + 100]) for start in range(0, 2000, 100)]
    theirs = Counter(tuple(mixed.token_ids[start : start + 100]) for start in range(0, 2000, 100))
    assert sum(theirs[each] for each in paragraphs) == round(share * 20)
    if share == 0.8:
        assert align(old.token_ids, mixed.token_ids, donor_ends=old.ends, ends=mixed.ends).num_moved > 1000


def test_new_words_are_near_the_old_ones() -> None:
    """So that there is something to find by likeness."""
    model = workload.make_model("tiny", CPU, torch.float32, 100, 0)
    reuse.pair_embeddings(model, 0)
    table = model.get_input_embeddings().weight
    likeness = torch.nn.functional.cosine_similarity(table[0::2], table[1::2])
    assert likeness.min() > 0.9
    assert torch.nn.functional.cosine_similarity(table[0::2], table[1::2].roll(1, 0)).mean().abs() < 0.1


def test_variants_are_options() -> None:
    for options in reuse.VARIANTS.values():
        made = dataclasses.asdict(make_reuse_options(options))
        assert {name: made[name] for name in options} == options


def test_reading_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reuse, "dense", lambda model, prompt: torch.ones(1, model.config.vocab_size))
    with pytest.raises(typer.Exit):
        reuse.main(**SMALL)
    lines = capsys.readouterr()
    assert lines.out == ""
    assert "not timed" in lines.err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": "nope"}, "known: "),
        ({"tokens": "abc"}, "whole numbers"),
        ({"tokens": "100"}, "at least 512"),
        ({"device": "gpu"}, "device must be cuda or cpu"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_it_refuses(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        reuse.main(**{**SMALL, **bad})
