"""The README's examples run as they are written, one after another."""

import re
from pathlib import Path

import pytest

from sentencekv.prose import generate_prose

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate_prose(300, seed=4) + " The number of the locker of Ada Marlowe is 4821973. " + generate_prose(300)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {"__name__": "readme"}
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
    shown = capsys.readouterr().out
    assert shown.count("4821973") >= 2
    assert "6650318" in shown
    assert "bytes of KV on the GPU" in shown
    assert "none: 0 of" in shown
    assert re.search(r"^similar: [1-9]\d* of \d+ tokens moved", shown, re.MULTILINE)
    assert list((tmp_path / "kept").rglob("*.payload"))


def test_length() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200
