"""A read prompt in host memory, from which other sessions go on.

Rows of closed sentences stay where they are, shared with whoever has them. What a session holds on the device is
copied: summaries, sink and recent tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sentencekv.memory import HostMemory
from sentencekv.reuse.rows import Table, gather
from sentencekv.session import State
from sentencekv.slabs import Slab
from sentencekv.store import Extent, Places

_ALIGNED_BYTES = 64


@dataclasses.dataclass(frozen=True)
class KeptExtent:
    """As an `Extent`, of a prompt's sentences alone; in the end its summaries and sums of values are in host memory."""

    slabs: Sequence[Slab]
    place_of: Tensor
    tables_of_layer: Mapping[int, Sequence[Tensor]]
    value_sum_of_layer: Mapping[int, Tensor]
    row_bytes: int


class StateRows:
    """Rows of the first tokens of a session's state, as `Rows`. Closed sentences must be in the model's own
    precision."""

    def __init__(self, state: State, extents: Sequence[Extent | KeptExtent], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._state = state
        self._place_of = [extent.place_of.numpy() for extent in extents]
        self._slabs = [list(extent.slabs) for extent in extents]

    @property
    def layers(self) -> list[int]:
        """As of `Rows`."""
        return sorted(self._state.recent)

    def tensors(self, layer: int) -> list[Tensor]:
        """As of `Rows`."""
        slabs = [slab.rows(layer) for slabs in self._slabs for slab in slabs]
        return [self._state.sink[layer], *slabs, self._state.recent[layer]]

    def table(self, layer: int) -> Table:
        """As of `Rows`."""
        return self._table

    @functools.cached_property
    def _table(self) -> Table:
        num_sink, num_recent = (next(iter(kv.values())).shape[1] for kv in (self._state.sink, self._state.recent))
        parts = [np.stack([np.zeros(num_sink, np.int64), np.arange(num_sink)], axis=1)]
        first_slab = 1
        for place_of, slabs in zip(self._place_of, self._slabs, strict=True):
            _, length_S, slab_S, row_S = place_of.T
            within_T = np.arange(length_S.sum()) - np.repeat(length_S.cumsum() - length_S, length_S)
            parts.append(np.stack([np.repeat(slab_S + first_slab, length_S), np.repeat(row_S, length_S) + within_T], 1))
            first_slab += len(slabs)
        parts.append(np.stack([np.full(num_recent, first_slab), np.arange(num_recent)], axis=1))
        return np.pad(np.concatenate(parts)[: self.num_tokens], ((0, 0), (0, 1)))


class Kept:
    """The first tokens of what a session has read; nothing of it is on the device."""

    def __init__(self, state: State, num_tokens: int, memory: HostMemory) -> None:
        """Copies what is on the device, and waits for it. The state may have gone on since it had `num_tokens`: of what
        came then nothing is kept but the end of a sentence that began before."""
        assert not state.local, "rows of sliding-window layers are not kept"
        for extent in state.extents:
            extent.flush()
        layers = sorted(state.recent)
        num_recent = max(num_tokens - state.closed_end, 0)
        state = dataclasses.replace(
            state, recent={layer: kv[:, :num_recent].contiguous() for layer, kv in state.recent.items()}
        )
        on_device = [_first_sentences(state, extent, num_tokens, layers) for extent in state.extents]
        on_device = [extent for extent in on_device if len(extent.place_of)]
        self.memory = memory
        self.num_tokens = num_tokens
        self._copies, copies = _copied(
            [
                *(kv for tier in (state.sink, state.recent) for kv in tier.values()),
                *(table for extent in on_device for layer in layers for table in extent.tables_of_layer[layer]),
                *(extent.value_sum_of_layer[layer] for extent in on_device for layer in layers),
            ],
            memory,
        )
        sink, recent = ({layer: next(copies) for layer in layer_of} for layer_of in (state.sink, state.recent))
        tables = [
            {layer: [next(copies) for _ in extent.tables_of_layer[layer]] for layer in layers} for extent in on_device
        ]
        sums = [{layer: next(copies) for layer in layers} for _ in on_device]
        self.extents = [
            dataclasses.replace(extent, tables_of_layer=tables_of_layer, value_sum_of_layer=sum_of_layer)
            for extent, tables_of_layer, sum_of_layer in zip(on_device, tables, sums, strict=True)
        ]
        self.state = dataclasses.replace(state, extents=[], sink=sink, recent=recent)
        self.rows = StateRows(self.state, self.extents, num_tokens)

    @property
    def slabs(self) -> list[Slab]:
        """Those that hold its rows; others may share them."""
        return [slab for extent in self.extents for slab in extent.slabs]

    @property
    def copied_bytes(self) -> int:
        """Host memory for what sessions have on the device."""
        return self._copies.nbytes

    def reach(self, num_tokens: int, window_tokens: int) -> int:
        """How many of its first `num_tokens` a session can share, with their summaries: whole sentences outside the
        window."""
        ends = (int(end) for extent in self.extents for end in extent.place_of[:, :2].sum(1))
        return max((end for end in ends if end <= num_tokens - window_tokens), default=0)

    def upto(self, num_tokens: int, device: torch.device) -> State:
        """The state of a session that has read as many tokens as `reach` gave; on a device."""
        extents = [self._extent(extent, num_tokens, device) for extent in self.extents]
        sink = {layer: kv.to(device, non_blocking=True) for layer, kv in self.state.sink.items()}
        return dataclasses.replace(
            self.state,
            num_tokens=num_tokens,
            closed_end=num_tokens,
            ends=[],
            last_expected_end=num_tokens,
            sink=sink,
            recent={layer: kv.new_empty((kv.shape[0], 0, *kv.shape[2:])) for layer, kv in sink.items()},
            extents=[extent for extent in extents if extent.num_sentences],
        )

    def _extent(self, kept: KeptExtent, num_tokens: int, device: torch.device) -> Extent:
        start, length, slab, row = kept.place_of.unbind(1)
        num_sentences = int((start + length <= num_tokens).sum())
        used = torch.zeros(len(kept.slabs), dtype=torch.int64)
        used.scatter_reduce_(0, slab[:num_sentences], (row + length)[:num_sentences], "amax")
        slabs = [each.upto(count) for each, count in zip(kept.slabs, used.tolist(), strict=True) if count]
        tables_of_layer = {}
        for layer, tables in kept.tables_of_layer.items():
            shortened = _first_rows(tables, length, num_sentences)
            tables_of_layer[layer] = [table.to(device, non_blocking=True) for table in shortened]
        extent = Extent(self.memory, device, slabs, kept.place_of[:num_sentences], tables_of_layer, kept.row_bytes)
        if num_sentences == len(length):
            sums = {layer: each.to(device, non_blocking=True) for layer, each in kept.value_sum_of_layer.items()}
        else:
            sums = self._value_sums(kept, extent, device)
        for layer, each in sums.items():
            extent.set_value_sum(layer, each)
        return extent

    def _value_sums(self, kept: KeptExtent, extent: Extent, device: torch.device) -> dict[int, Tensor]:
        """Of the values of an extent's first sentences, float32 `[N, H]` for each layer: read from their rows, or all
        of them less those of the others, if these are fewer."""
        if not extent.num_sentences:
            return {}
        first, stop = int(kept.place_of[extent.num_sentences, 0]), int(kept.place_of[-1, :2].sum())
        if stop - first < extent.num_tokens:
            everything = StateRows(self.state, self.extents, stop)
            others = np.arange(first, stop)
            return {
                layer: whole.to(device) - gather(everything, layer, others, device)[:, :, 1].sum(1, dtype=torch.float32)
                for layer, whole in kept.value_sum_of_layer.items()
            }
        places = Places([extent], device)
        sums = {}
        for layer in kept.value_sum_of_layer:
            layout = extent.slabs[0].layout(layer)
            shape = (layout.num_heads, places.num_tokens, 2, layout.head_dim)
            kv_NTH = torch.empty(shape, dtype=layout.dtype, device=device)
            places.read(layer, kv_NTH)
            sums[layer] = kv_NTH[:, :, 1].sum(1, dtype=torch.float32)
        return sums


def _first_sentences(state: State, extent: Extent, num_tokens: int, layers: Sequence[int]) -> KeptExtent:
    """Those of an extent that begin among a prompt's tokens."""
    start, length, slab, _ = extent.place_of.unbind(1)
    count = int((start < num_tokens).sum())
    summaries = {layer: extent.summaries(layer) for layer in layers} if count else {}
    sums = {layer: extent.value_sum(layer) for layer in layers} if count else {}
    if count in (0, len(start)):
        return KeptExtent(extent.slabs, extent.place_of[:count], summaries, sums, extent.row_bytes)
    stop = int(start[-1] + length[-1])
    rows, others = StateRows(state, state.extents, stop), np.arange(int(start[count]), stop)
    return KeptExtent(
        extent.slabs[: int(slab[:count].max()) + 1],
        extent.place_of[:count],
        {layer: _first_rows(tables, length, count) for layer, tables in summaries.items()},
        {
            layer: whole - gather(rows, layer, others, whole.device)[:, :, 1].sum(1, dtype=torch.float32)
            for layer, whole in sums.items()
        },
        extent.row_bytes,
    )


def _first_rows(tables: Sequence[Tensor], length: Tensor, num_sentences: int) -> list[Tensor]:
    """Of tables whose rows are sentences or tokens, what belongs to the first sentences."""
    num_tokens = int(length[:num_sentences].sum())
    return [table[: num_sentences if len(table) == len(length) else num_tokens].contiguous() for table in tables]


def _copied(tensors: Sequence[Tensor], memory: HostMemory) -> tuple[Tensor, Iterator[Tensor]]:
    """Copies in host memory, in one allocation: pinning memory takes long, however little it is."""
    sizes = [-(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for tensor in tensors]
    whole = memory.allocate((sum(sizes),), torch.uint8)
    copies = []
    for tensor, part in zip(tensors, whole.split(sizes), strict=True):
        copies.append(part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        copies[-1].copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return whole, iter(copies)
