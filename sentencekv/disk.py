"""Files of tensors that are whole or not there: the disk tier's container.

A file is in the safetensors format, with a description in JSON and a checksum of every tensor. It is written beside its
name and renamed when it is safely on disk, so that under its name there is the old file or the new one, whatever
happens meanwhile. Tensors are read one at a time, when they are asked for, into memory of the caller's; a checksum that
differs is an error. Files are read, not mapped: a mapped file that somebody truncates would end the process.

Knows bytes and tensors; nothing of sessions, documents or models.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sentencekv.files import cannot_save, check_can_save
from sentencekv.units import format_bytes

_PARTIAL = ".partial"
_PIECE_BYTES = 4 << 20
"""Bytes that are read or written at a time: enough for a disk, few enough to be in a cache for their checksum."""
_ALIGNMENT = 64
_STALE_SECONDS = 60
_MOST_HEADER_BYTES = 100 << 20
"""What readers of safetensors accept."""

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int16: "I16",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class SavedFileError(ValueError):
    """The file is not what it was written as, or not for this model and configuration; the message says why."""


class Pieces(NamedTuple):
    """A tensor to be written: its type and shape, and contiguous tensors that follow one another in it.

    `parts` is called when they are written, and may give tensors on any device.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count

    @classmethod
    def of(cls, tensor: Tensor) -> Pieces:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


Written = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


def write_file(
    path: str | os.PathLike[str],
    description: Mapping[str, Any],
    tensors: Mapping[str, Pieces],
    progress: Written | None = None,
) -> int:
    """Write tensors and a description to a file, which replaces one of that name once it is whole.

    Returns its bytes. Raises OSError if it cannot be written, in one sentence; what was there before then still is.
    """
    target = check_can_save(path)
    checksums = dict.fromkeys(tensors, 0)
    total = sum(pieces.num_bytes for pieces in tensors.values())
    size = total + len(_header(description, tensors, checksums))
    _remove_stale(target)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        needs = f"{format_bytes(size)} are needed and {format_bytes(free)} are free"
        raise cannot_save(path, errno.ENOSPC, needs)
    try:
        with _partial(target) as file:
            first = offset = file.write(_header(description, tensors, checksums), 0)
            for name, pieces in tensors.items():
                before = offset
                for piece in _bytes_of(pieces.parts()):
                    checksums[name] = zlib.crc32(piece, checksums[name])
                    offset = file.write(piece, offset)
                    if progress is not None:
                        progress(offset - first, total)
                assert offset - before == pieces.num_bytes, f"{name} is not what was announced"
            # The same header with the checksums, which have a fixed width.
            assert file.write(_header(description, tensors, checksums), 0) == first
            os.fsync(file.descriptor)
            os.replace(file.name, target)
            _sync_directory(target.parent)
    except OSError as error:
        raise cannot_save(path, error.errno, error.strerror or str(error)) from error
    return size


def _header(description: Mapping[str, Any], tensors: Mapping[str, Pieces], checksums: Mapping[str, int]) -> bytes:
    entries: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    start = 0
    for name, pieces in tensors.items():
        stop = start + pieces.num_bytes
        entry = {"dtype": _NAMES[pieces.dtype], "shape": list(pieces.shape), "data_offsets": [start, stop]}
        entries[name] = entry
        layout[name] = [entry["dtype"], entry["shape"], start, f"{checksums[name]:08x}"]
        start = stop
    content = json.dumps({**description, "tensors": layout}, sort_keys=True)
    metadata = {"sentencekv": content, "crc32": f"{zlib.crc32(content.encode()):08x}"}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    if len(header) > _MOST_HEADER_BYTES:
        raise ValueError(
            f"the description has {format_bytes(len(header))}; a file's header holds {format_bytes(_MOST_HEADER_BYTES)}"
        )
    return struct.pack("<Q", len(header)) + header


def _bytes_of(parts: Iterable[Tensor]) -> Iterator[memoryview]:
    for part in parts:
        view = _view(part.cpu())
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[_Partial]:
    """A new file beside the target, locked while it is open; gone afterwards if it was not renamed."""
    name = target.parent / f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}"
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if target.exists():
            os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        yield _Partial(descriptor, name)
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


class _Partial(NamedTuple):
    """A file that is being written."""

    descriptor: int
    name: Path

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write all of it; returns where it ends."""
        rest = memoryview(data)
        while len(rest):
            count = os.pwrite(self.descriptor, rest, offset)
            rest, offset = rest[count:], offset + count
        return offset


def _remove_stale(target: Path) -> None:
    """Partial files of writers that are gone: the lock of a living one is held, but for a moment after its start."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _sync_directory(folder: Path) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SavedFile:
    """A file that `write_file` wrote, open for reading; what it is renamed to or replaced by makes no difference.

    Raises SavedFileError for what is no such file or was damaged, FileNotFoundError and PermissionError.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str | None = None, version: int | None = None) -> None:
        """`kind`, `version`: what `description` must have under these names; None: anything."""
        self.name = str(path)
        self._kind, self._version = kind, version
        target = Path(path).expanduser()
        if target.is_dir():
            raise IsADirectoryError(f"{self.name!r} is a directory, not a saved document")
        try:
            self._descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {self.name!r}; check the path") from None
        except PermissionError:
            raise PermissionError(f"{self.name!r} may not be read; change its permissions, or copy it") from None
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Let go of the file; reading afterwards is an error. Happens by itself with the last reference."""
        self.num_bytes = os.fstat(self._descriptor).st_size
        self.description = self._read_header()

    def _read_header(self) -> dict[str, Any]:
        foreign = SavedFileError(f"{self.name!r} is not a document that sentencekv saved")
        if self.num_bytes < 8:
            raise foreign
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > min(_MOST_HEADER_BYTES, self.num_bytes - 8):
            raise foreign
        try:
            metadata = json.loads(os.pread(self._descriptor, length, 8))["__metadata__"]
            content, checksum = str(metadata["sentencekv"]), metadata["crc32"]
        except (ValueError, KeyError, TypeError):
            raise foreign from None
        if f"{zlib.crc32(content.encode()):08x}" != checksum:
            raise self._damaged("its description does not match its checksum")
        description = json.loads(content)
        if self._kind is not None and description.get("kind") != self._kind:
            raise foreign
        if self._version is not None and description.get("version") != self._version:
            raise SavedFileError(
                f"{self.name!r} has version {description.get('version')} of its format, and this release reads version "
                f"{self._version}; read the document again and save it"
            )
        self._layout: dict[str, list[Any]] = description.pop("tensors")
        self._first = 8 + length
        expected = self._first + sum(self.num_bytes_of(name) for name in self._layout)
        if self.num_bytes != expected:
            raise self._damaged(f"it has {self.num_bytes:,} bytes and should have {expected:,}; was the copy cut off?")
        return description

    def _damaged(self, reason: str) -> SavedFileError:
        return SavedFileError(f"{self.name!r} is damaged: {reason}; read the document again and save it")

    def num_bytes_of(self, name: str) -> int:
        """A tensor's bytes."""
        dtype, shape, _, _ = self._layout[name]
        count = _DTYPES[dtype].itemsize
        for extent in shape:
            count *= extent
        return int(count)

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._layout)

    def __contains__(self, name: str) -> bool:
        return name in self._layout

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._layout[name][1])

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type."""
        return _DTYPES[self._layout[name][0]]

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU. Raises SavedFileError if it is not what was written."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, [tensor])
        return tensor

    def read_into(self, name: str, parts: Sequence[Tensor]) -> None:
        """Fill contiguous CPU tensors that follow one another in a saved one; as `read`. Any thread may call it."""
        offset, checksum = self._first + self._layout[name][2], 0
        expected = offset + self.num_bytes_of(name)
        for part in parts:
            view = _view(part)
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                self._fill(piece, offset)
                checksum = zlib.crc32(piece, checksum)
                offset += len(piece)
        assert offset == expected, f"{name} has another shape"
        if f"{checksum:08x}" != self._layout[name][3]:
            raise self._damaged(f"{name} does not match its checksum")

    def _fill(self, piece: memoryview, offset: int) -> None:
        while len(piece):
            count = os.preadv(self._descriptor, [piece], offset)
            if not count:
                raise self._damaged("it became shorter while it was read")
            piece, offset = piece[count:], offset + count
