"""Hit rates on a record of selections: a least-recently-used set, the engine's own count, and bad input."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.locality import hit_rate, main, overlap
from sentencekv.prose import generate_prose


def run(*arguments: str):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_least_recently_used_leaves() -> None:
    steps = [[0, 1], [1, 2], [0, 3], [1, 2]]
    assert hit_rate({(0, 0): steps}, 4) == pytest.approx(4 / 8)
    # Three slots: 2 takes the free one; 3 takes that of 1 or 2, equally old, so the first, which 1 is in.
    assert hit_rate({(0, 0): steps}, 3) == pytest.approx(3 / 8)
    assert hit_rate({(0, 0): steps}, 2) == pytest.approx(1 / 8)
    assert hit_rate({(0, 0): steps, (0, 1): [[5]] * 8}, 4) == pytest.approx((4 + 7) / 16)


def test_drift() -> None:
    steps = [[0, 1], [1, 2], [0, 3], [1, 2]]
    assert overlap({(0, 0): steps}, 1) == pytest.approx(1 / 6)
    assert overlap({(0, 0): steps, (1, 0): [[4]] * 4}, 2) == pytest.approx((1 + 2 + 1 + 1) / 6)
    assert overlap({(0, 0): steps}, 4) is None


def test_the_simulation_equals_the_engine(tmp_path: Path) -> None:
    """It is an error if not."""
    path = tmp_path / "text.txt"
    path.write_text(generate_prose(700, seed=3))
    options = ["--context", "600", "--steps", "6", "--budgets", "160", "--policies", "moments", "--sizes", "2,4"]
    done = run("--text", str(path), *options)
    assert done.exit_code == 0, done.output
    assert "| moments |    160 |" in done.output


def test_bad_input_is_named(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for arguments, words in (
        (["--text", str(tmp_path / "none.txt")], "none.txt"),
        (["--text", str(short), "--context", "512"], "give a longer"),
        (["--text", str(short), "--budgets", "abc"], "whole numbers"),
        (["--text", str(short), "--sizes", "two"], "numbers separated by"),
        (["--text", str(short), "--policies", "window"], "must be among"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.output
