"""Where the KV of a cached prompt's tokens is, and how it gets to the device, moved to other positions.

`PackedRows` stand in tensors of their own, `DerivedRows` are another prompt's, but for some; those of a session's state
are in `kept.py`. Knows tensors and token positions; nothing of models but how their keys turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sentencekv.memory import HostMemory
from sentencekv.rope import Rotation
from sentencekv.transfer import to_device
from triton_ops.move_kv import move_kv

Table = np.ndarray
"""int64 `[T, 3]`, of each token: a tensor's number, a row in it, and how many tokens further on than where that row was
computed the token stands."""


class Rows(Protocol):
    """KV of all tokens of a prompt."""

    @property
    def layers(self) -> list[int]:
        """Layers that have rows."""
        ...

    def tensors(self, layer: int) -> list[Tensor]:
        """Contiguous tensors `[N, any, 2, H]`, in host memory or on the device."""
        ...

    def table(self, layer: int) -> Table:
        """Where each token is in them."""
        ...


class PackedRows:
    """Rows that stand one after another in one tensor for each layer."""

    def __init__(self, kv_of_layer: Mapping[int, Tensor]) -> None:
        """`kv_of_layer`: `[N, T, 2, H]`, contiguous; not necessarily of as many tokens in each layer."""
        self.kv_of_layer = dict(kv_of_layer)
        self._tables: dict[int, Table] = {}
        """By their number of rows."""

    @property
    def num_tokens(self) -> int:
        return next(iter(self.kv_of_layer.values())).shape[1]

    @property
    def layers(self) -> list[int]:
        return sorted(self.kv_of_layer)

    @property
    def host_bytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv_of_layer.values())

    def tensors(self, layer: int) -> list[Tensor]:
        return [self.kv_of_layer[layer]]

    def table(self, layer: int) -> Table:
        num_rows = self.kv_of_layer[layer].shape[1]
        if num_rows not in self._tables:
            self._tables[num_rows] = np.pad(np.arange(num_rows)[:, None], ((0, 0), (1, 1)))
        return self._tables[num_rows]


class DerivedRows:
    """A parent's rows, moved, where `source_T` says so; the rest are its own."""

    def __init__(self, parent: Rows, source_of_layer: Mapping[int, np.ndarray], own: PackedRows) -> None:
        """
        Args:
            source_of_layer: int64 `[T]`: the parent's token, or -1 for a row of its own.
            own: rows of the tokens that have none, in order, layer by layer.
        """
        self.parent, self.source_of_layer, self.own = parent, dict(source_of_layer), own
        self._tables: dict[tuple[int, int], tuple[Table, Table]] = {}

    @property
    def num_tokens(self) -> int:
        return len(next(iter(self.source_of_layer.values())))

    @property
    def layers(self) -> list[int]:
        return sorted(self.source_of_layer)

    @property
    def host_bytes(self) -> int:
        return self.own.host_bytes

    def tensors(self, layer: int) -> list[Tensor]:
        return [self.own.kv_of_layer[layer], *self.parent.tensors(layer)]

    def table(self, layer: int) -> Table:
        source_T, theirs = self.source_of_layer[layer], self.parent.table(layer)
        known = self._tables.get((id(source_T), id(theirs)))
        if known is not None and known[1] is theirs:
            return known[0]
        table = np.zeros((len(source_T), 3), np.int64)
        moved = source_T >= 0
        table[moved] = theirs[source_T[moved]] + [1, 0, 0]
        table[moved, 2] += np.flatnonzero(moved) - source_T[moved]
        table[~moved, 1] = np.arange(np.count_nonzero(~moved))
        self._tables[id(source_T), id(theirs)] = (table, theirs)
        return table


class Mover:
    """Brings rows of a cached prompt to the device, to where a new prompt has them, layer by layer."""

    def __init__(
        self,
        rows: Rows,
        source_T: np.ndarray,
        first: int,
        rotations: Mapping[int, Rotation] | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            source_T: of each of T wanted tokens that follow one another, its token in `rows`, or -1.
            first: position of the first of them.
            rotations: how keys turn, by layer; None: they are left as they are, wherever they go.
        """
        self._rows, self._source_T, self._first = rows, source_T, first
        self._rotations, self._device = rotations, device
        layers = rows.layers
        # Kept: what the device reads must not be given up meanwhile.
        self._tensors = {layer: rows.tensors(layer) for layer in layers}
        addresses = [[[each.data_ptr(), each.shape[1]] for each in self._tensors[layer]] for layer in layers]
        self._source_of_layer = dict(zip(layers, to_device(torch.tensor(addresses), device).unbind(0), strict=True))
        self._places: dict[int, tuple[Table, Tensor, list[int]]] = {}
        self._turns: dict[tuple[Rotation, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        for layer in layers:  # small copies, made before the device is busy
            self._turn(layer, self._place(layer)[1])

    @property
    def num_bytes(self) -> int:
        """Of the wanted tokens' rows, over all layers."""
        some = (tensors[0] for tensors in self._tensors.values())
        return sum(len(self._source_T) * 2 * kv.shape[0] * kv.shape[3] * kv.element_size() for kv in some)

    def new(self, layer: int) -> Tensor:
        """Room for the rows of a layer, `[N, T, 2, H]` on the device, not written."""
        some = self._tensors[layer][0]
        shape = (some.shape[0], len(self._source_T), 2, some.shape[3])
        return torch.empty(shape, dtype=some.dtype, device=self._device)

    def into(self, layer: int, kv_NTH: Tensor) -> None:
        """Write the rows that have a source into `[N, T, 2, H]` on the device, whose others stay as they are."""
        place_T3, shifts = self._place(layer)
        cos_SR, sin_SR = self._turn(layer, shifts)
        move_kv(
            kv_NTH,
            self._tensors[layer],
            self._source_of_layer[layer],
            place_T3,
            cos_SR,
            sin_SR,
            interleaved=self._rotations is not None and self._rotations[layer].interleaved,
        )

    def _place(self, layer: int) -> tuple[Tensor, list[int]]:
        table = self._rows.table(layer)
        if id(table) not in self._places:
            place_T3 = np.full((len(self._source_T), 3), -1, np.int64)
            wanted = self._source_T >= 0
            place_T3[wanted] = table[self._source_T[wanted]]
            shift = place_T3[wanted, 2] + self._first + np.flatnonzero(wanted) - self._source_T[wanted]
            shifts, turn = np.unique(shift, return_inverse=True)
            place_T3[wanted, 2] = turn
            place = to_device(torch.from_numpy(place_T3), self._device, torch.int32)
            self._places[id(table)] = (table, place, shifts.tolist() or [0])
        return self._places[id(table)][1:]

    def _turn(self, layer: int, shifts: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self._rotations is None:
            empty = torch.empty((1, 0), device=self._device)
            return empty, empty
        key = (self._rotations[layer], tuple(shifts))
        if key not in self._turns:
            self._turns[key] = self._rotations[layer].tables(shifts, self._device)
        return self._turns[key]


def gather(rows: Rows, layer: int, token_L: np.ndarray, device: torch.device) -> Tensor:
    """Some tokens' rows as they are in the cached prompt, `[N, L, 2, H]` on the device; keys of derived rows must not
    have been moved."""
    some = rows.tensors(layer)[0]
    kv_NLH = torch.empty((some.shape[0], len(token_L), 2, some.shape[3]), dtype=some.dtype, device=device)
    table = rows.table(layer)[token_L]
    assert not table[:, 2].any()
    tensors = rows.tensors(layer)
    table[:, 2] = 0
    source_S2 = to_device(torch.tensor([[each.data_ptr(), each.shape[1]] for each in tensors]), device)
    place_T3 = to_device(torch.from_numpy(table), device, torch.int32)
    empty = torch.empty((1, 0), device=device)
    move_kv(kv_NLH, tensors, source_S2, place_T3, empty, empty, interleaved=False)
    return kv_NLH


def take(rows: Rows, layer: int, token_L: np.ndarray, into_NLH: Tensor | None = None) -> Tensor:
    """Some tokens' rows, `[N, L, 2, H]` in host memory; keys of derived rows must not have been moved."""
    tensors, table = rows.tensors(layer), rows.table(layer)[token_L]
    assert not table[:, 2].any()
    if into_NLH is None:
        shape = (tensors[0].shape[0], len(token_L), 2, tensors[0].shape[3])
        into_NLH = torch.empty(shape, dtype=tensors[0].dtype)
    for number in np.unique(table[:, 0]).tolist():
        at = np.flatnonzero(table[:, 0] == number)
        source = tensors[number]
        row_L = torch.from_numpy(table[at, 1]).to(source.device)
        into_NLH[:, torch.from_numpy(at)] = source.index_select(1, row_L).to(into_NLH.device)
    return into_NLH


def pack(rows: Rows, tokens_of_layer: Mapping[int, np.ndarray], memory: HostMemory) -> PackedRows:
    """Copies of some tokens' rows in host memory, as `take` gives them."""
    packed = {}
    for layer in rows.layers:
        some, token_L = rows.tensors(layer)[0], tokens_of_layer[layer]
        kv_NLH = memory.allocate((some.shape[0], len(token_L), 2, some.shape[3]), some.dtype)
        packed[layer] = take(rows, layer, token_L, kv_NLH)
    return PackedRows(packed)
