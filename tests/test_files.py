"""Files, standard input and directories as one text."""

import io
import os
import sys
from pathlib import Path

import pytest

from sentencekv.files import TextError, load_text


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne.\r\nTwo ä 字.\n".encode())
    loaded = load_text(str(path))
    assert loaded.text == "One.\r\nTwo ä 字.\n"
    assert loaded.place(loaded.text.index("Two")) == (None, 2)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello there.")))
    assert load_text("-").text == "Hello there."


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("Bee.\nBees.\n")
    (tmp_path / "sub" / "a.md").write_text("Ay.")
    (tmp_path / "c.bin").write_bytes(b"x\0y")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    os.mkfifo(tmp_path / "pipe")
    loaded = load_text(str(tmp_path))
    assert loaded.text == "# b.txt\n\nBee.\nBees.\n\n# sub/a.md\n\nAy.\n\n"
    assert loaded.skipped == ("c.bin", "d.txt")
    assert loaded.place(loaded.text.index("Bees.")) == ("b.txt", 2)
    assert loaded.place(loaded.text.index("Ay.")) == ("sub/a.md", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a text"),
        (b" \n\t", "is empty; give a text"),
        (b"ab\0c", "is not text: it holds a NUL byte at position 2"),
        (b"caf\xe9 au lait", "is not UTF-8 text: byte 0xe9 at position 3; convert it first"),
        ("hello".encode("utf-16"), "is UTF-16; convert it first"),
    ],
)
def test_not_a_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        load_text(str(path))


def test_directory_without_text(tmp_path: Path) -> None:
    (tmp_path / "c.bin").write_bytes(b"x\0y")
    with pytest.raises(TextError, match=r"holds no text \(1 of its files are not UTF-8 text\); name one"):
        load_text(str(tmp_path))


def test_missing() -> None:
    with pytest.raises(FileNotFoundError, match="no file or directory 'nowhere'; check the path"):
        load_text("nowhere")
