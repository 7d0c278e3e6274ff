"""Payloads between host memory and files: loaded when they are used, written and dropped when room is needed.

Knows entries, bytes and the order of use; nothing of prompts or of how they are found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sentencekv.reuse.namespace import Entry, Namespace, Payload, digest, holding, leaving
from sentencekv.reuse.records import CatalogError, Record, Records, Row
from sentencekv.units import format_bytes

_LOG = logging.getLogger(__name__)
_PAYLOAD, _PARTIAL = ".payload", ".partial"

Loader = Callable[[Path, Record, Payload | None], Payload]
"""Gets a payload back from its file. The last argument: the payload of its parent, in host memory, if it has one."""


class EntryGoneError(CatalogError):
    """The entry is not in the catalog any more: it left for want of room, was removed, or its file was damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """On bytes of payloads; None: no bound."""

    host: int | None
    disk: int | None
    namespace_host: int | None
    """Of each namespace, in host memory."""
    namespace_disk: int | None
    """Of each namespace, in files."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            bound = getattr(self, field.name)
            if bound is not None and bound < 0:
                raise ValueError(f"a bound must be None or at least 0 bytes, got {bound}; 0 keeps nothing")


class Tiers:
    """The entries of all namespaces, each in host memory, in a file, or both, within bounds.

    An entry in host memory has its parent there. A parent is used whenever a child is, and after it: in the order of
    use children come first, and leave first. Not thread-safe. Methods raise OSError if the folder or the records cannot
    be read or written.
    """

    def __init__(
        self, folder: Path | None, records: Records, load: Loader | None, bounds: Bounds, embedding_size: int
    ) -> None:
        self._folder, self._records, self._load, self._bounds = folder, records, load, bounds
        self._embedding_size = embedding_size
        self._spaces: dict[str, Namespace] = {}
        self._clock = 0
        """Counts uses."""
        if folder is not None:
            self._reopen(folder)

    def space(self, name: str) -> Namespace:
        """A namespace by its name; a new one has no entries."""
        if name not in self._spaces:
            self._spaces[name] = Namespace(self._embedding_size)
        return self._spaces[name]

    def insert(
        self, space: Namespace, entry: Entry, embedding: NDArray[np.float32], ancestors: Sequence[Entry]
    ) -> bool:
        """Take a new entry in, as the last used; False if there cannot be room for it."""
        if not self._make_room(space, entry.stored_bytes, keep=ancestors):
            return False
        used = self._use([entry, *ancestors])
        key = entry.record.key
        self._records.insert(Row(entry.record, embedding, used.pop(key), entry.stored_bytes, None), used)
        space.insert([(entry, embedding)])
        return True

    def loaded(self, space: Namespace, entry: Entry) -> Payload:
        """An entry's payload, now the last used, with those of its ancestors in host memory.

        Raises EntryGoneError if a file is damaged, MemoryError if there is no room beside what is held.
        """
        lineage = space.lineage(entry)
        used = self._use(lineage)  # before room is made: what is wanted must not leave for it
        try:
            self._records.touch(used)
        except OSError as error:
            _LOG.warning("the use of a cached prompt is not noted: %s", error)
        needed = sum(each.stored_bytes for each in lineage if each.payload is None)
        if entry.payload is None and not self._make_room(space, needed, keep=lineage):
            raise MemoryError(
                f"a cached prompt needs {format_bytes(needed)} of host memory, more than the bounds leave beside what "
                "is held; hold fewer entries, or raise the bounds"
            )
        payload: Payload | None = None
        try:
            with holding(lineage):  # loading may ask for host memory, and so for room
                for each in reversed(lineage):
                    if each.payload is None:
                        assert self._load is not None
                        each.payload = self._load(self._file(each), each.record, payload)
                    payload = each.payload
        except (OSError, ValueError) as error:
            broken = next(each for each in reversed(lineage) if each.payload is None)
            self.remove(space, space.family(broken))
            raise EntryGoneError(
                f"the file of a cached prompt of {len(broken.record.token_ids):,} tokens cannot be read, so its entry "
                f"is removed: {error}"
            ) from error
        assert payload is not None
        return payload

    def remove(self, space: Namespace, entries: Sequence[Entry]) -> None:
        """Forget entries for good, children before their parents. Raises ValueError if one is held."""
        if any(entry.holds for entry in entries):
            raise ValueError("an entry that is held cannot be removed; leave the `held` block first")
        space.delete(entries)
        for entry in entries:
            entry.drop()
        # A record without its file is dropped at the next opening, and so is a file without a record.
        try:
            self._records.delete([entry.record.key for entry in entries])
            for entry in entries:
                if entry.file_bytes is not None:
                    self._file(entry).unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("%d cached prompts are forgotten, and some of their files stay: %s", len(entries), error)

    def clear(self, name: str) -> None:
        """Forget a namespace. Raises ValueError if one of its entries is held."""
        space = self.space(name)
        self.remove(space, sorted(space.entries.values(), key=lambda entry: entry.used))
        del self._spaces[name]
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it has no folder, or somebody else's file is in it
                self._folder_of(name).rmdir()

    def release(self, num_bytes: int, first: Namespace | None) -> int:
        """Let go of so many bytes of host memory, or all that is not held; returns how many."""
        here = self._here()
        chosen, _ = leaving(first, _movable(here, ()), 0, num_bytes)
        for space, entry in chosen:
            self._evict(space, entry)
        return sum(here[space][entry] for space, entry in chosen)

    def persist(self) -> None:
        """Write what has no file yet, the last used first, as far as the bounds go; nothing without a folder.

        Raises the first OSError when all others are written.
        """
        if self._folder is None:
            return
        failure: OSError | None = None
        loaded = [
            (s, entry) for s in self._spaces.values() for entry in s.entries.values() if entry.payload is not None
        ]
        for space, entry in sorted(loaded, key=lambda each: -each[1].used):
            num_tokens = len(entry.record.token_ids)
            try:
                # Asked now: one that was used later may have taken its place on the disk.
                if entry.file_bytes is None and entry.payload is not None and not self._write(space, entry):
                    _LOG.info("a cached prompt of %d tokens has no room on disk", num_tokens)
            except OSError as error:
                failure = failure or error
            except MemoryError as error:
                _LOG.warning("a cached prompt of %d tokens is lost: %s", num_tokens, error)
        if failure is not None:
            raise failure

    def drop(self) -> None:
        """Let go of all host memory, written or not."""
        entries = [entry for space in self._spaces.values() for entry in space.entries.values()]
        for entry in sorted(entries, key=lambda entry: entry.used):
            entry.drop()

    def _use(self, lineage: Sequence[Entry]) -> dict[int, int]:
        """Count a use of an entry and its ancestors, and say when each was used, by its key."""
        for entry in lineage:
            self._clock += 1
            entry.used = self._clock
        return {entry.record.key: entry.used for entry in lineage}

    def _here(self) -> dict[Namespace, dict[Entry, int]]:
        """What is in host memory, and its bytes."""
        return {
            space: {entry: entry.host_bytes for entry in space.entries.values() if entry.payload is not None}
            for space in self._spaces.values()
        }

    def _make_room(self, space: Namespace, num_bytes: int, keep: Collection[Entry]) -> bool:
        """Have so many more bytes of host memory fit; if they cannot, nothing leaves."""
        here = self._here()
        in_use = {each: sum(entries.values()) for each, entries in here.items()}
        own = _excess(in_use[space] + num_bytes, self._bounds.namespace_host)
        total = _excess(sum(in_use.values()) + num_bytes, self._bounds.host)
        chosen, enough = leaving(space, _movable(here, keep), own, total)
        if not enough:
            return False
        for each, entry in chosen:
            self._evict(each, entry)
        return True

    def _evict(self, space: Namespace, entry: Entry) -> None:
        """Out of host memory: to a file, or for good where it cannot have one."""
        if entry.payload is None:
            return  # it left while another one was written
        written = entry.file_bytes is not None
        if not written and self._folder is not None:
            try:
                written = self._write(space, entry)
            except (OSError, MemoryError) as error:
                _LOG.warning("a cached prompt of %d tokens is lost: %s", len(entry.record.token_ids), error)
        if written:
            entry.drop()
        else:
            self.remove(space, space.family(entry))

    def _write(self, space: Namespace, entry: Entry) -> bool:
        """Give an entry its file; False if no room can be made for it. Raises OSError.

        Whenever the process ends, a record names a file that is whole, or none: the file is there before the record
        says so.
        """
        assert entry.payload is not None
        path = self._file(entry)
        partial = path.with_suffix(_PARTIAL)
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            partial.touch(mode=0o600)  # what people asked is in there; who writes it keeps the mode
            # Its rows may have to come back from a document's file, for which other entries leave.
            with holding(space.lineage(entry)):
                entry.payload.write(partial)
            file_bytes = _sync(partial)
            if not self._make_disk_room(space, file_bytes, entry.used):
                return False
            os.replace(partial, path)
            _sync(path.parent)
            entry.stored_bytes = entry.payload.host_bytes
            self._records.set_file(entry.record.key, entry.stored_bytes, file_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            partial.unlink(missing_ok=True)
        entry.file_bytes = file_bytes
        return True

    def _make_disk_room(self, space: Namespace | None, num_bytes: int, used_before: int) -> bool:
        """Have so many more bytes fit on the disk, in place of files last used before; if they cannot, nothing goes."""
        in_use = {each: sum(entry.disk_bytes for entry in each.entries.values()) for each in self._spaces.values()}
        own = 0 if space is None else _excess(in_use[space] + num_bytes, self._bounds.namespace_disk)
        total = _excess(sum(in_use.values()) + num_bytes, self._bounds.disk)
        older = {
            each: {
                entry: entry.disk_bytes
                for entry in each.entries.values()
                if entry.file_bytes is not None and entry.used < used_before
            }
            for each in in_use
        }
        chosen, enough = leaving(space, older, own, total)
        if not enough:
            return False
        for each, entry in chosen:
            if entry.payload is None:
                self.remove(each, each.family(entry))
            else:
                self._records.set_file(entry.record.key, entry.stored_bytes, None)
                entry.file_bytes = None
                self._file(entry).unlink(missing_ok=True)
        return True

    def _folder_of(self, name: str) -> Path:
        assert self._folder is not None
        # Users choose names: some cannot be names of folders, and others had better not be.
        return self._folder / "namespaces" / hashlib.sha256(name.encode()).hexdigest()

    def _file(self, entry: Entry) -> Path:
        return self._folder_of(entry.record.namespace) / f"{entry.record.key}{_PAYLOAD}"

    def _reopen(self, folder: Path) -> None:
        """Take over what the last process left and is whole; delete the rest."""
        kept: dict[Namespace, list[tuple[Entry, NDArray[np.float32]]]] = {}
        whole: set[int | None] = {None}
        files: set[Path] = set()
        gone: list[int] = []
        for row in self._records.rows():  # the last used first: parents before children
            record = row.record
            entry = Entry(record, digest(record.token_ids), row.used, row.host_bytes, file_bytes=row.file_bytes)
            path = self._file(entry)
            if record.parent in whole and path.is_file() and path.stat().st_size == row.file_bytes:
                whole.add(record.key)
                files.add(path)
                kept.setdefault(self.space(record.namespace), []).append((entry, row.embedding))
            else:
                gone.append(record.key)
            self._clock = max(self._clock, row.used)
        self._records.delete(reversed(gone))
        for space, entries in kept.items():
            space.insert(entries)
        for path in _files_below(folder / "namespaces"):
            if path not in files:
                path.unlink()
        # The bounds may be tighter than they were.
        for each in (None, *self._spaces.values()):
            self._make_disk_room(each, 0, self._clock + 1)


def _movable(
    here: Mapping[Namespace, Mapping[Entry, int]], keep: Collection[Entry]
) -> dict[Namespace, dict[Entry, int]]:
    """What of it may leave. Who holds or keeps an entry, does so with its ancestors, whose children leave first."""
    return {
        space: {entry: count for entry, count in entries.items() if not entry.holds and entry not in keep}
        for space, entries in here.items()
    }


def _excess(num_bytes: int, bound: int | None) -> int:
    return 0 if bound is None else max(num_bytes - bound, 0)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files that were written here; a payload may have been writing under a name of its own."""
    return (path for path in folder.glob("*/*") if path.suffix in (_PAYLOAD, _PARTIAL))


def _sync(path: Path) -> int:
    """Have a file, or the names in a folder, outlast a power failure; returns its bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
