"""What one session holds on the device while it decodes, in tensors that stay where they are.

Reading appends thousands of tokens at once and replaces tensors; decoding adds one token to each layer, and a CUDA
graph needs fixed addresses. So a session that starts to decode moves its sink and recent tokens into buffers with room,
and gets a hot set; `SessionLane` is both, of all layers, and does between two steps what cannot be part of a graph: it
closes sentences. Knows tensors, extents and configuration; nothing of policies' scores or of batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sentencekv.config import Config
from sentencekv.slabs import Layout
from sentencekv.store import Extent, Places, Run
from triton_ops import Lane, Part, offload_kv

_SERIALS = itertools.count()

_ROOM = 64
"""Entries by which tables of sentences grow."""


class SessionLane(Lane):
    """A lane made of a session's tensors. Layers that retrieve share one shape and are stacked; `version` rises
    whenever an address changes."""

    def __init__(
        self,
        config: Config,
        places: Places,
        recent: Mapping[int, Tensor],
        local: Mapping[int, Tensor],
        window_of: Mapping[int, int],
        *,
        num_tokens: int,
        selects: bool,
        share_S: Tensor,
        traffic: Tensor,
    ) -> None:
        """
        Args:
            recent: per layer that retrieves, `[N, R, 2, H]` of sink and recent tokens, in order.
            local: per sliding-window layer, `[N, at most window - 1, 2, H]` of its last tokens, in order.
            window_of: per sliding-window layer, its window.
            selects: whether sentences are selected at all.
        """
        self._config, self._selects = config, selects
        self.layers = sorted(recent)
        self.serial = next(_SERIALS)
        """Of this lane alone, also after it is gone."""
        self.version = 0
        shapes = {(kv.shape[0], *kv.shape[2:]) for kv in recent.values()}
        if len(shapes) > 1:
            raise ValueError(f"layers that retrieve have KV of different shapes: {sorted(shapes)}; not supported")
        some = next(iter((recent or local).values()))
        self._device = some.device
        num_resident = next(iter(recent.values())).shape[1] if recent else 0
        super().__init__(
            resident_kv={},
            hot_kv={},
            sentence_of_slot={},
            last_used={},
            slot_of_sentence={},
            place_S4=places.place_S4,
            slabs={},
            slab_of={},
            parts=[],
            share_S=share_S,
            traffic=traffic,
            num_resident=num_resident,
            position=num_tokens,
        )
        rows = config.sink_tokens + config.window_tokens + 3 * config.max_sentence_tokens
        self._make_resident(recent, max(rows, num_resident + config.max_sentence_tokens))
        for layer, kv in local.items():
            ring = kv.new_zeros((kv.shape[0], window_of[layer], *kv.shape[2:]))
            kept = torch.arange(num_tokens - kv.shape[1], num_tokens, device=kv.device) % window_of[layer]
            ring[:, kept] = kv
            self.resident_kv[layer] = ring
        self._stacked: dict[str, Tensor] = {}
        if selects and self.layers:
            self._make_value_sums(places)
        self.set_places(places)

    def contents(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Copies of `recent` and `local`, as the constructor takes them."""
        recent = {layer: self.resident_kv[layer][:, : self.num_resident].clone() for layer in self.layers}
        local = {}
        for layer, ring in self.resident_kv.items():
            if layer not in recent:
                window = ring.shape[1]
                first = max(self.position - (window - 1), 0)
                local[layer] = ring[:, torch.arange(first, self.position, device=ring.device) % window]
        return recent, local

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: resident tokens, hot set and its tables."""
        tensors = [self.place_S4, self.share_S, *self._stacked.values(), *self.resident_kv.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def advance(self) -> None:
        """One step was made: its token is among the resident ones."""
        self.num_resident += 1
        self.position += 1
        self.step += 1
        if self.layers and self.num_resident == self._resident.shape[2]:
            recent, _ = self.contents()
            self._make_resident(recent, self.num_resident + max(self.num_resident // 2, _ROOM))

    def take_out(self, num_tokens: int) -> Tensor:
        """The first tokens after the sink, `[D, N, num_tokens, 2, H]`, a view; gone with the next `shift`."""
        first = self._config.sink_tokens
        return self._resident[:, :, first : first + num_tokens]

    def shift(self, num_tokens: int) -> None:
        """Close the gap that the tokens given out by `take_out` leave."""
        first = self._config.sink_tokens
        rest = self._resident[:, :, first + num_tokens : self.num_resident].clone()
        self._resident[:, :, first : first + rest.shape[2]] = rest
        self.num_resident -= num_tokens

    def offload(self, extent: Extent, runs: Sequence[Run], places: Places, lengths: Sequence[int]) -> None:
        """Copy tokens about to be closed to host memory, all layers at once. `places` ends with their sentences."""
        kv_DNTH = self.take_out(sum(lengths))
        layout = Layout(kv_DNTH.shape[1], kv_DNTH.shape[4], kv_DNTH.dtype, self._config.kv_format)
        for layer in self.layers:
            extent.allocate(layer, runs, layout)
        slabs_of = [[slab.rows(layer) for slab in places.slabs] for layer in self.layers]
        place_P4 = places.place_S4[places.num_sentences - len(lengths) :]
        addresses = places.slab_addresses(self.layers)
        skipped_bytes = 0
        for part in layout.packed(kv_DNTH):
            offload_kv(
                part,
                slabs_of,
                addresses,
                place_P4,
                max(lengths),
                pitch=layout.row_bytes // part.itemsize,
                skip=skipped_bytes // part.itemsize,
            )
            skipped_bytes += part[0, 0, 0].nbytes

    def add_values(self, value_sum_DNH: Tensor) -> None:
        """Count sums of the values of tokens about to be closed."""
        if self.mean_value:
            self._stacked["value_sum"] += value_sum_DNH

    def forget_summaries(self) -> None:
        """Let go of summaries that are about to be replaced by longer tables, until `set_places`."""
        self.parts = []

    def set_places(self, places: Places) -> None:
        """Make sentences that were closed meanwhile selectable."""
        self.version += 1
        self.place_S4 = places.place_S4
        self.num_sentences = places.num_sentences
        if self.share_S.shape[0] <= places.num_sentences:
            self.share_S = _extended(self.share_S, places.num_sentences + _ROOM, 0)
        if not self._selects or not self.layers:
            return
        self.parts = []
        first = 0
        for extent in places.extents:
            count = extent.num_sentences
            if count:
                self.parts.append(Part(first, count, {layer: extent.summaries(layer) for layer in self.layers}))
            first += count
        torch.div(self._stacked["value_sum"], max(places.num_tokens, 1), out=self._stacked["mean_value"])
        slab_of = places.slab_addresses(self.layers)
        self.slabs = {layer: [slab.rows(layer) for slab in places.slabs] for layer in self.layers}
        self.slab_of = dict(zip(self.layers, slab_of.unbind(0), strict=True))
        self.max_selected = most_selected(self._config, places.num_sentences, places.num_tokens)
        self._make_hot_set(places.num_sentences)

    def _make_resident(self, recent: Mapping[int, Tensor], rows: int) -> None:
        """Buffers of so many rows, with `recent` in the first."""
        self.version += 1
        if not recent:
            return
        some = recent[self.layers[0]]
        rows = -(-rows // 16) * 16
        shape = (len(self.layers), some.shape[0], rows, *some.shape[2:])
        self._resident = some.new_zeros(shape)
        for i, layer in enumerate(self.layers):
            self._resident[i, :, : some.shape[1]] = recent[layer]
            self.resident_kv[layer] = self._resident[i]

    def _make_value_sums(self, places: Places) -> None:
        """Sums and means of the values of closed tokens, from the extents' own."""
        num_heads, head_dim = self._resident.shape[1], self._resident.shape[4]
        total = torch.zeros((len(self.layers), num_heads, head_dim), dtype=torch.float32, device=self._device)
        for extent in places.extents:
            if extent.num_sentences:
                total += torch.stack([extent.value_sum(layer) for layer in self.layers])
        self._stacked["value_sum"], self._stacked["mean_value"] = total, torch.zeros_like(total)
        self.mean_value = dict(zip(self.layers, self._stacked["mean_value"].unbind(0), strict=True))

    def _make_hot_set(self, num_sentences: int) -> None:
        """Slots and tables for so many sentences; what they held is kept.

        No more slots than there are sentences, so that a short context does not pay for a long one's.
        """
        wanted = max(self.max_selected, min(self._config.num_slots, num_sentences))
        if wanted > self.num_slots:
            if self.num_slots:
                wanted = max(wanted, min(self._config.num_slots, 2 * self.num_slots))
            _, num_heads, _, _, head_dim = self._resident.shape
            depth = len(self.layers)
            shape = (depth, num_heads, wanted, self._config.max_sentence_tokens, 2, head_dim)
            hot_kv = self._resident.new_zeros(shape)
            held = torch.full((2, depth, num_heads, wanted), -1, dtype=torch.int32, device=self._device)
            if self.num_slots:
                hot_kv[:, :, : self.num_slots] = self._stacked["hot_kv"]
                held[:, :, :, : self.num_slots] = self._stacked["held"]
            self._stacked["hot_kv"], self._stacked["held"] = hot_kv, held
            self.num_slots = wanted
            self.hot_kv = dict(zip(self.layers, hot_kv.unbind(0), strict=True))
            self.sentence_of_slot = dict(zip(self.layers, held[0].unbind(0), strict=True))
            self.last_used = dict(zip(self.layers, held[1].unbind(0), strict=True))
        table = self._stacked.get("slot_of_sentence")
        if table is None or table.shape[2] < num_sentences:
            _, num_heads = self._resident.shape[:2]
            if table is None:
                table = torch.empty((len(self.layers), num_heads, 0), dtype=torch.int32, device=self._device)
            table = _extended(table, -(-(num_sentences + _ROOM) // 4) * 4, -1)
            self._stacked["slot_of_sentence"] = table
            self.slot_of_sentence = dict(zip(self.layers, table.unbind(0), strict=True))


def most_selected(config: Config, num_sentences: int, num_tokens: int) -> int:
    """Sentences that one step may select of so many, with so many tokens: half as many again as the budget holds of
    average ones, but not more than the hot set is meant to hold.

    Between that and the shortest possible ones lies mostly empty space in the slots.
    """
    if num_tokens <= config.room_tokens:
        return max(num_sentences, 1)
    expected = config.room_tokens * num_sentences / num_tokens
    most = max(config.num_slots, math.ceil(expected))
    return min(config.max_selected, most, math.ceil(1.5 * expected))


def _extended(table: Tensor, width: int, value: int) -> Tensor:
    """The table with a longer last dimension, filled up with a value."""
    longer = table.new_full((*table.shape[:-1], width), value)
    longer[..., : table.shape[-1]] = table
    return longer
