"""Closed KV on its way to the device: while attention uses one block, the next is copied.

A GPU gets blocks of bounded size through two buffers, by a stream of its own. On a machine without one, blocks are the
slabs themselves, and nothing is copied. Knows where closed sentences are; nothing of attention, sessions or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sentencekv.slabs import Slab
from sentencekv.store import Places

BLOCK_TOKENS = 16384
"""Tokens of a block on a GPU, all but the last one: enough that attention to it outlasts the copy of the next one and
that merging its result costs little; two of them take 134 MB with 8 KV heads of 128 dimensions in 16 bits."""

Group = list[tuple[Slab, int, int]]
"""Slabs whose rows follow one another, with the first and one-past-last of those that belong to the group."""


class Stream:
    """All closed tokens of a session, for the layers of one pass, as of its beginning."""

    def __init__(self, places: Places, layers: Sequence[int], device: torch.device) -> None:
        """
        Args:
            layers: those that will be asked for, in that order; only the order of copies depends on it.
        """
        self._places = places
        self._buffers = _Buffers(places, layers, device) if device.type == "cuda" else None

    def blocks(self, layer: int) -> Iterator[Tensor]:
        """Closed tokens of one layer, `[N, any, 2, H]` each, in order; each is valid until the next is asked for."""
        if self._buffers is not None:
            yield from self._buffers.blocks(layer)
            return
        for slab, used_tokens in self._places.filled():
            yield slab.layout(layer).unpacked([part[:, :used_tokens] for part in slab.parts(layer)])


class _Buffers:
    """Two buffers that are filled in turns. Copies run ahead by one block, into the next layer's as well."""

    def __init__(self, places: Places, layers: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._groups = _grouped(places.filled(), BLOCK_TOKENS)
        self._order = [(layer, group) for layer in layers for group in range(len(self._groups))]
        self._next_copied = 0
        """Of `_order`, the first entry that is not on its way."""
        self._stream = torch.cuda.Stream(device)
        self._tensors: list[list[Tensor]] = []
        """Of each buffer, as `Layout.parts`."""
        self._filled = [torch.cuda.Event(), torch.cuda.Event()]
        self._used = [torch.cuda.Event(), torch.cuda.Event()]
        for extent in places.extents:
            extent.order_after_writes(self._stream)

    def blocks(self, layer: int) -> Iterator[Tensor]:
        if not self._groups:
            return
        first = self._order.index((layer, 0))
        if not first <= self._next_copied <= first + 2:
            self._next_copied = first  # not the layer that was expected
        compute = torch.cuda.current_stream(self._device)
        for entry in range(first, first + len(self._groups)):
            self._copy_up_to(entry + 1)
            compute.wait_event(self._filled[entry % 2])
            num_tokens = sum(stop - start for _, start, stop in self._groups[entry - first])
            layout = self._groups[entry - first][0][0].layout(layer)
            yield layout.unpacked([part[:, :num_tokens] for part in self._tensors[entry % 2]])
            self._used[entry % 2].record(compute)

    def _copy_up_to(self, last: int) -> None:
        while self._next_copied <= min(last, len(self._order) - 1):
            entry = self._next_copied
            layer, group = self._order[entry]
            slabs = self._groups[group]
            if not self._tensors:
                self._allocate(slabs[0][0].parts(layer))
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._used[entry % 2])
                at = 0
                for slab, start, stop in slabs:
                    rows = slice(at, at + stop - start)
                    for target, part in zip(self._tensors[entry % 2], slab.parts(layer), strict=True):
                        # One head at a time: both sides are then contiguous, which an asynchronous copy needs.
                        for head in range(part.shape[0]):
                            target[head, rows].copy_(part[head, start:stop], non_blocking=True)
                    at = rows.stop
                self._filled[entry % 2].record(self._stream)
            self._next_copied += 1

    def _allocate(self, like: Sequence[Tensor]) -> None:
        num_tokens = max(sum(stop - start for _, start, stop in group) for group in self._groups)
        compute = torch.cuda.current_stream(self._device)
        for used in self._used:
            buffer = [
                torch.empty((part.shape[0], num_tokens, *part.shape[2:]), dtype=part.dtype, device=self._device)
                for part in like
            ]
            for tensor in buffer:
                tensor.record_stream(self._stream)
            used.record(compute)  # the memory may have been another tensor's a moment ago
            self._tensors.append(buffer)


def _grouped(filled: Sequence[tuple[Slab, int]], block_tokens: int) -> list[Group]:
    """Slabs and their filled rows, in order, in groups of so many tokens; the last one may have fewer."""
    groups: list[Group] = []
    room = 0
    for slab, used in filled:
        start = 0
        while start < used:
            if not room:
                groups.append([])
                room = block_tokens
            stop = min(start + room, used)
            groups[-1].append((slab, start, stop))
            room -= stop - start
            start = stop
    return groups
