"""What a user names: a file, standard input or a directory as one text, and a file to save to.

Knows files and encodings; nothing of tokens, models or terminals.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

STANDARD_INPUT = "-"

SAVED_HEADER = b'{"__metadata__": {"sentencekv": '
"""How the header of a saved document begins, after its length in 8 bytes."""

_SNIFFED_BYTES = 8192


class TextError(ValueError):
    """What was named cannot be read as text; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file's share of a text."""

    name: str
    """The file's path, relative to the directory that was named."""
    start: int
    """First character of its content in the whole text."""


@dataclasses.dataclass(frozen=True)
class LoadedText:
    """A text and where its parts come from."""

    name: str
    text: str
    parts: tuple[Part, ...]
    skipped: tuple[str, ...] = ()
    """Files of a directory that were left out because they are not UTF-8 text or could not be read."""

    def place(self, char: int) -> tuple[str | None, int]:
        """The file (None if there is only one) and the line, counted from 1, that a character is in."""
        part = self.parts[max(bisect.bisect_right([part.start for part in self.parts], char) - 1, 0)]
        line = self.text.count("\n", part.start, max(char, part.start)) + 1
        return (part.name if len(self.parts) > 1 else None), line


def is_saved_document(name: str) -> bool:
    """Whether this is a file that `Document.save` wrote, by its first bytes."""
    path = Path(name).expanduser()
    if name == STANDARD_INPUT or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(64)[8:].startswith(SAVED_HEADER)
    except OSError:
        return False


def check_can_save(name: str | os.PathLike[str]) -> Path:
    """Where a file of that name would be, links followed. Raises OSError, in one sentence, if it cannot be written."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise cannot_save(name, errno.EISDIR, "it is a directory; name a file in it")
    if not path.parent.is_dir():
        raise cannot_save(name, errno.ENOENT, f"there is no directory {str(path.parent)!r}; create it first")
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise cannot_save(name, errno.EINVAL, "it is a device or a pipe, not a file")
    if not os.access(target.parent, os.W_OK):
        raise cannot_save(name, errno.EACCES, f"nothing may be written to {str(target.parent)!r}")
    return target


def cannot_save(name: str | os.PathLike[str], number: int | None, reason: str) -> OSError:
    """The subclass of OSError that goes with the number, which its message leaves out."""
    error = type(OSError(number, reason))(f"cannot save to {str(name)!r}: {reason}")
    error.errno = number
    return error


def load_text(name: str) -> LoadedText:
    """Read a file, standard input (`-`) or a directory as UTF-8 text.

    A directory is read recursively in the order of its paths; each file follows a heading line with its relative
    path. Hidden files and folders are left out, and so are files that are not text, which `skipped` lists.

    Raises TextError if there is nothing to read, or what there is is not text; FileNotFoundError, PermissionError.
    """
    if name == STANDARD_INPUT:
        content = _decode(sys.stdin.buffer.read(), "standard input")
        return LoadedText("standard input", _not_blank(content, "standard input"), (Part("standard input", 0),))
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_directory(name, path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or directory {name!r}; check the path, or use '-' for standard input"
        )
    try:
        content = _decode(path.read_bytes(), repr(name))
    except PermissionError:
        raise PermissionError(f"{name!r} may not be read; change its permissions, or copy it") from None
    return LoadedText(name, _not_blank(content, repr(name)), (Part(name, 0),))


def _load_directory(name: str, root: Path) -> LoadedText:
    pieces: list[str] = []
    parts: list[Part] = []
    skipped: list[str] = []
    length = 0
    for path in _visible_files(root):
        relative = path.relative_to(root).as_posix()
        try:
            content = _decode(_read_if_text(path), relative)
        except (TextError, OSError):
            skipped.append(relative)
            continue
        if not content.strip():
            continue
        heading = f"# {relative}\n\n"
        parts.append(Part(relative, length + len(heading)))
        piece = f"{heading}{content.rstrip()}\n\n"
        pieces.append(piece)
        length += len(piece)
    if not parts:
        left_out = f" ({len(skipped)} of its files are not UTF-8 text)" if skipped else ""
        raise TextError(f"the directory {name!r} holds no text{left_out}; name one with .txt or .md files")
    return LoadedText(name, "".join(pieces), tuple(parts), tuple(skipped))


def _visible_files(root: Path) -> Iterator[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(folder, each) for each in files if not each.startswith(".")]
    # is_file: a named pipe or a device would never end.
    yield from sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _read_if_text(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES)
        if b"\0" in head:
            raise TextError(f"{path.name} is not text")
        return head + file.read()


def _decode(content: bytes, name: str) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise TextError(f"{name} is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    if b"\0" in content:
        raise TextError(
            f"{name} is not text: it holds a NUL byte at position {content.index(0):,}; give a text or Markdown file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{name} is not UTF-8 text: byte 0x{content[error.start]:02x} at position {error.start:,}; convert it "
            "first, for example: iconv -f LATIN1 -t UTF-8"
        ) from None


def _not_blank(content: str, name: str) -> str:
    if not content.strip():
        raise TextError(f"{name} is empty; give a text with at least one word")
    return content
