"""One namespace of a catalog: its entries, who needs whom, how they are found, and who leaves when bytes are short.

Knows entries and their bytes; nothing of files, bounds or the database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sentencekv.reuse.index import Prompt, PromptIndex
from sentencekv.reuse.records import Record


class Payload(Protocol):
    """What is cached for a prompt. It does not change after it was added."""

    @property
    def host_bytes(self) -> int:
        """Host memory that it holds now; asked for whenever room is made."""
        ...

    def write(self, path: Path) -> None:
        """Write all that is needed to get it back, but for its parent's rows, to a new file. Raises OSError."""
        ...

    def drop(self) -> None:
        """Let go of host memory. Called once: after it was written, or for good; never before its children's."""
        ...


@dataclasses.dataclass(eq=False)
class Entry:
    """A record and where its payload is: in host memory, in a file, or both."""

    record: Record
    digest: bytes
    """Of the prompt."""
    used: int
    stored_bytes: int
    """Host memory that the payload takes when it is loaded: what it held when it was added or written."""
    payload: Payload | None = None
    file_bytes: int | None = None
    """None: it has no file."""
    holds: int = 0
    """How many callers need it in host memory."""
    children: set[int] = dataclasses.field(default_factory=set)
    """Keys of the entries that need its rows."""

    @property
    def host_bytes(self) -> int:
        """Host memory that it holds now."""
        return 0 if self.payload is None else self.payload.host_bytes

    @property
    def disk_bytes(self) -> int:
        """What its file takes."""
        return self.file_bytes or 0

    def drop(self) -> None:
        """Let go of host memory."""
        if self.payload is not None:
            self.payload.drop()
            self.payload = None


class Namespace:
    """All that there is of one namespace. Not thread-safe."""

    def __init__(self, embedding_size: int) -> None:
        self.entries: dict[int, Entry] = {}
        self.by_prompt: dict[tuple[bytes, bool], Entry] = {}
        """By the prompt's digest, and whether the entry is approximate."""
        self.index = PromptIndex(embedding_size)
        """Of exact entries: nothing else can be found as a donor."""
        self.hits = self.misses = self.donor_hits = self.donor_misses = 0

    def insert(self, entries: Sequence[tuple[Entry, NDArray[np.float32]]]) -> None:
        """Take entries in, parents before children, with their embeddings."""
        prompts = []
        for entry, embedding in entries:
            record = entry.record
            self.entries[record.key] = entry
            self.by_prompt[entry.digest, record.approximate] = entry
            if record.parent is not None:
                self.entries[record.parent].children.add(record.key)
            if not record.approximate:
                prompts.append(Prompt(record.key, record.token_ids, embedding))
        self.index.add(prompts)

    def delete(self, entries: Sequence[Entry]) -> None:
        """Forget entries, children before parents."""
        for entry in entries:
            assert not entry.children
            record = entry.record
            del self.entries[record.key], self.by_prompt[entry.digest, record.approximate]
            if record.parent is not None:
                self.entries[record.parent].children.remove(record.key)
        self.index.remove([entry.record.key for entry in entries if not entry.record.approximate])

    def lineage(self, entry: Entry) -> list[Entry]:
        """The entry, its parent, and so on."""
        found = [entry]
        while (parent := found[-1].record.parent) is not None:
            found.append(self.entries[parent])
        return found

    def family(self, entry: Entry) -> list[Entry]:
        """All that need the entry, children before their parents, and the entry."""
        found = [entry]
        for each in found:
            found += [self.entries[key] for key in each.children]
        return found[::-1]


@contextlib.contextmanager
def holding(entries: Sequence[Entry]) -> Iterator[None]:
    """In the block, the entries stay in host memory."""
    for entry in entries:
        entry.holds += 1
    try:
        yield
    finally:
        for entry in entries:
            entry.holds -= 1


def digest(token_ids: NDArray[np.int32]) -> bytes:
    """What tells a prompt from all others."""
    return hashlib.sha256(token_ids.astype("<i4", copy=False).tobytes()).digest()


def leaving(
    first: Namespace | None, bytes_of: Mapping[Namespace, Mapping[Entry, int]], own: int, total: int
) -> tuple[list[tuple[Namespace, Entry]], bool]:
    """Who leaves, so that `own` bytes become free in the first namespace, and `total` in all of them.

    Those not used for longest: the first namespace's own, then of the one that holds most of what can leave. Returns
    them in that order, and whether they are enough: else they are all candidates.

    `bytes_of`: the candidates, and what each would free.
    """
    waiting = {space: sorted(entries, key=lambda entry: -entry.used) for space, entries in bytes_of.items()}
    left = {space: sum(entries.values()) for space, entries in bytes_of.items()}
    chosen: list[tuple[Namespace, Entry]] = []
    while own > 0 or total > 0:
        if first is not None and waiting.get(first):
            space = first
        elif any(waiting.values()):
            space = max((each for each in waiting if waiting[each]), key=lambda each: left[each])
        else:
            break
        entry = waiting[space].pop()
        chosen.append((space, entry))
        freed = bytes_of[space][entry]
        left[space] -= freed
        total -= freed
        own -= freed if space is first else 0
    return chosen, own <= 0 and total <= 0
