"""A prompt as an edit of a cached one, and what is cached of prompts: a tree of edits.

A root has rows for all its tokens; any other entry has a parent, whose rows it moves, and rows of its own only where
the two differ (as the editor of KVShare: Yang et al., 2025, arXiv:2503.16525). Knows rows, alignments and files;
nothing of models, or of how entries are found.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentencekv.disk import Pieces, SavedFile, write_file
from sentencekv.memory import HostMemory
from sentencekv.reuse.kept import Kept
from sentencekv.reuse.match import Alignment
from sentencekv.reuse.rows import DerivedRows, PackedRows, Rows, pack, take

MAX_DEPTH = 4
"""Edits between an entry and its root; what would be deeper is stored as an edit of an entry nearer to the root."""
_KIND, _VERSION = "sentencekv cached prompt", 1


class Operation(NamedTuple):
    """One step that turns a cached prompt's tokens into a new prompt's."""

    kind: Literal["keep", "move", "fuzzy", "insert", "delete", "replace"]
    """`fuzzy`: rows of other, similar tokens are taken."""
    donor_start: int
    donor_stop: int
    start: int
    stop: int


def operations(alignment: Alignment) -> list[Operation]:
    """What turns the cached prompt into the new one, in the new one's order, and what goes at its end.

    Tokens that have no match are an insertion; if they stand where unmatched tokens of the cached prompt stood, between
    the same neighbours, they replace these. Tokens to be inserted are placeholders until they are computed.
    """
    matches = alignment.matches
    unused = _unused(alignment)
    found: list[Operation] = []
    before_stop, donor_stop = 0, 0
    for start, stop, donor_start, donor_after, kind in [
        *((m.start, m.start + m.length, m.donor_start, m.donor_start + m.length, m.kind) for m in matches),
        (alignment.num_tokens, alignment.num_tokens, alignment.donor_tokens, alignment.donor_tokens, ""),
    ]:
        gone = unused.pop((donor_stop, donor_start), None) if donor_start > donor_stop else None
        if start > before_stop:
            what: Literal["insert", "replace"] = "insert" if gone is None else "replace"
            found.append(Operation(what, donor_stop, donor_stop if gone is None else donor_start, before_stop, start))
        elif gone is not None:
            found.append(Operation("delete", donor_stop, donor_start, start, start))
        if stop > start:
            moved: Literal["keep", "move"] = "keep" if donor_start == start else "move"
            found.append(Operation("fuzzy" if kind == "fuzzy" else moved, donor_start, donor_after, start, stop))
        before_stop, donor_stop = stop, donor_after
    end = alignment.num_tokens
    return found + [Operation("delete", first, last, end, end) for first, last in sorted(unused)]


def _unused(alignment: Alignment) -> dict[tuple[int, int], bool]:
    """Ranges of the cached prompt that no match uses."""
    ranges: dict[tuple[int, int], bool] = {}
    at = 0
    for start, stop in sorted((m.donor_start, m.donor_start + m.length) for m in alignment.matches):
        if start > at:
            ranges[at, start] = True
        at = max(at, stop)
    if at < alignment.donor_tokens:
        ranges[at, alignment.donor_tokens] = True
    return ranges


class CachedPrompt:
    """The KV of a prompt, and the logits that follow it: a catalog's payload."""

    def __init__(
        self,
        rows: Rows,
        logits_V: Tensor,
        *,
        kept: Kept | None = None,
        parent: CachedPrompt | None = None,
        source_of_layer: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            logits_V: float32 on the CPU, of the last token.
            kept: what other sessions can go on from, if the rows are those of one.
            parent, source_of_layer: an entry without which the rows are not whole, and of each token the parent's token
                that it takes its row from, int64 `[T]`, or -1. None: it is a root.
        """
        self.rows, self.logits_V = rows, logits_V
        self.kept, self.parent = kept, parent
        self.source_of_layer = dict(source_of_layer or {})
        self.key: int | None = None
        """Of its record, once it has one."""

    @property
    def depth(self) -> int:
        """Edits between it and its root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def num_tokens(self) -> int:
        return len(self.rows.table(self.rows.layers[0]))

    @property
    def host_bytes(self) -> int:
        """Host memory that would be free without it: what its parent has as well is not counted."""
        if self.kept is None:
            own = self.rows.own if isinstance(self.rows, DerivedRows) else self.rows
            return own.host_bytes if isinstance(own, PackedRows) else 0
        above = self.parent.addresses() if self.parent is not None else {}
        own_bytes = sum(count for at, count in self._own_addresses().items() if at not in above)
        return self.kept.copied_bytes + own_bytes

    def addresses(self) -> dict[int, int]:
        """Of the tensors with rows of sessions that it or its parents hold: where each begins, and its bytes."""
        return (self.parent.addresses() if self.parent is not None else {}) | self._own_addresses()

    def _own_addresses(self) -> dict[int, int]:
        slabs = self.kept.slabs if self.kept is not None else []
        tensors = (slab.rows(layer) for slab in slabs for layer in slab.layers)
        return {rows.data_ptr(): rows.nbytes for rows in tensors}

    def write(self, path: Path) -> None:
        """Write what its parent does not have. Raises OSError."""
        tensors = {"logits": Pieces.of(self.logits_V)}
        everything = np.full(self.num_tokens, -1)
        for layer in self.rows.layers:
            source_T = self.source_of_layer.get(layer, everything)
            token_L = np.flatnonzero(source_T < 0)
            some = self.rows.tensors(layer)[0]
            shape = (some.shape[0], len(token_L), 2, some.shape[3])
            tensors[f"source.layer{layer}"] = Pieces.of(torch.from_numpy(source_T.astype(np.int32)))
            tensors[f"rows.layer{layer}"] = Pieces(
                some.dtype, shape, functools.partial(_packed, self.rows, layer, token_L)
            )
        write_file(path, {"kind": _KIND, "version": _VERSION, "layers": self.rows.layers}, tensors)

    @classmethod
    def load(cls, path: Path, parent: CachedPrompt | None, memory: HostMemory) -> CachedPrompt:
        """What `write` wrote. Raises SavedFileError if the file is damaged, MemoryError if it does not fit."""
        saved = SavedFile(path, kind=_KIND, version=_VERSION)
        source_of_layer, own = {}, {}
        for layer in saved.description["layers"]:
            source_of_layer[layer] = saved.read(f"source.layer{layer}").numpy().astype(np.int64)
            rows = saved.read(f"rows.layer{layer}")
            own[layer] = memory.allocate(tuple(rows.shape), rows.dtype).copy_(rows)
        logits_V, packed = saved.read("logits"), PackedRows(own)
        saved.close()
        if parent is None:
            return cls(packed, logits_V)
        derived = DerivedRows(parent.rows, source_of_layer, packed)
        return cls(derived, logits_V, parent=parent, source_of_layer=source_of_layer)

    def drop(self) -> None:
        """Let go of all memory."""
        self.rows, self.kept, self.parent = PackedRows({}), None, None


def _packed(rows: Rows, layer: int, token_L: np.ndarray) -> Iterator[Tensor]:
    """Some tokens' rows, head after head."""
    return iter(take(rows, layer, token_L))


def rebased(
    source_of_layer: Mapping[int, np.ndarray], parent: CachedPrompt
) -> tuple[dict[int, np.ndarray], CachedPrompt]:
    """An edit of an entry as an edit of one that is nearer to the root, if it is far: chains of edits stay short.

    What the entries between have of their own, the new one then has to have, too.
    """
    sources = dict(source_of_layer)
    while parent.depth >= MAX_DEPTH:
        assert parent.parent is not None
        for layer, source_T in sources.items():
            theirs = parent.source_of_layer[layer]
            sources[layer] = np.where(source_T >= 0, theirs[source_T], -1)
        parent = parent.parent
    return sources, parent


def derived(
    rows: Rows,
    source_of_layer: Mapping[int, np.ndarray],
    parent: CachedPrompt,
    logits_V: Tensor,
    memory: HostMemory,
) -> CachedPrompt:
    """An entry that keeps, of a prompt's rows, only those that an edit of a parent does not give."""
    sources, parent = rebased(source_of_layer, parent)
    own = pack(rows, {layer: np.flatnonzero(source_T < 0) for layer, source_T in sources.items()}, memory)
    return CachedPrompt(DerivedRows(parent.rows, sources, own), logits_V, parent=parent, source_of_layer=sources)
