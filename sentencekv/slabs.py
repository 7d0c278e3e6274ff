"""Slabs: pieces of host memory for the KV of closed sentences, how their rows look, and how large they are.

Knows tensors and bytes; nothing of sentences, models or policies. On a machine without a GPU the same code runs with
ordinary memory in place of pinned memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sentencekv.memory import HostMemory, Spares, power_of_two
from triton_ops import Format, Packed, pack_kv, packed_slab, unpack_kv
from triton_ops.pack_kv import code_width, row_bytes, scale_width

LARGE_SLAB_TOKENS = 16384
SMALL_SLAB_TOKENS = 256


def host_slabs(context_tokens: int, more_tokens: int, longest: int, row_bytes: int = 1) -> list[int]:
    """Rows of the slabs that a context takes at most, and `more_tokens` closed after it bit by bit.

    A slab may end with rows too few for the next sentence, of up to `longest` tokens; its last rows then stay empty.
    `row_bytes`: as of an `Extent`.
    """
    slabs, rest = [], context_tokens
    while rest > 0:
        slabs.append(slab_tokens(rest, longest, row_bytes))
        rest -= max(slabs[-1] - longest + 1, 1)
    if more_tokens:
        slab = slab_tokens(0, longest, row_bytes)
        slabs += [slab] * -(-more_tokens // max(slab - longest + 1, 1))
    return slabs


def slab_tokens(expected_tokens: int, at_least: int, row_bytes: int) -> int:
    """The largest slab that is filled; a small one for tails."""
    tokens = SMALL_SLAB_TOKENS
    while _capacity(tokens, row_bytes) < at_least:
        tokens *= 2
    while tokens < LARGE_SLAB_TOKENS and _capacity(2 * tokens, row_bytes) <= expected_tokens:
        tokens *= 2
    return _capacity(tokens, row_bytes)


def _capacity(tokens: int, row_bytes: int) -> int:
    """So many rows, a power of two, or fewer: of one head they take hardly less than a power of two of bytes, since
    pinned allocations are rounded up to one. A multiple of 16, as kernels expect."""
    return tokens * (power_of_two(row_bytes + 1) // 2) // row_bytes // 16 * 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one layer's rows look: KV heads, head dimension, the model's dtype, and the format in host memory."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_format: Format | None = None
    """None: the dtype."""

    @property
    def row_bytes(self) -> int:
        """Of one token's key and value of one head, in host memory."""
        if self.kv_format is None:
            return 2 * self.head_dim * self.dtype.itemsize
        return row_bytes(self.head_dim, self.kv_format)

    def num_bytes(self, capacity: int) -> int:
        """Of so many rows of all heads."""
        return self.num_heads * capacity * self.row_bytes

    def slab_shape(self, capacity: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor that holds so many rows of all heads."""
        if self.kv_format is None:
            return (self.num_heads, capacity, 2, self.head_dim), self.dtype
        return (self.num_heads, capacity * self.row_bytes), torch.uint8

    def shapes(self, num_rows: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Types and shapes of `parts` with so many rows."""
        before = (self.num_heads, num_rows, 2)
        if self.kv_format is None:
            return [(self.dtype, (*before, self.head_dim))]
        return [
            (torch.uint8, (*before, code_width(self.head_dim, self.kv_format))),
            (torch.float16, (*before, scale_width(self.head_dim, self.kv_format))),
        ]

    def parts(self, rows: Tensor, capacity: int) -> tuple[Tensor, ...]:
        """What a slab's tensor holds, `[N, capacity, 2, any]` each: KV, or codes and scales."""
        if self.kv_format is None:
            return (rows,)
        return tuple(packed_slab(rows, capacity, self.head_dim, self.kv_format))

    def packed(self, kv_NTH: Tensor) -> tuple[Tensor, ...]:
        """KV as `parts` holds it."""
        return (kv_NTH,) if self.kv_format is None else tuple(pack_kv(kv_NTH, self.kv_format))

    def unpacked(self, parts: Sequence[Tensor]) -> Tensor:
        """KV from what `parts` holds."""
        if self.kv_format is None:
            return parts[0]
        return unpack_kv(Packed(*parts), self.head_dim, self.dtype, self.kv_format)


class Slab:
    """A fixed run of token rows in host memory, one tensor per layer, made when first written.

    A layer's tensor is `[N, capacity, 2, H]`, or as `packed_slab` has it. `load`: where the rows of a layer come from
    when they are first asked for, and `layout_of`: how they look; None: they were written here.
    """

    def __init__(
        self,
        capacity_tokens: int,
        used_tokens: int = 0,
        load: Callable[[int], Tensor] | None = None,
        layout_of: Mapping[int, Layout] | None = None,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.used_tokens = used_tokens
        self.num_uses = 0
        """Answers and appends under way that read it."""
        self._load = load
        self._source: Slab | None = None
        """Whose rows these are."""
        self._rows_of_layer: dict[int, Tensor] = {}
        self._layout_of_layer: dict[int, Layout] = dict(layout_of or {})

    def rows(self, layer: int) -> Tensor:
        """The tensor of one layer; raises whatever loading it raises."""
        if layer not in self._rows_of_layer and self._load is not None:
            self._rows_of_layer[layer] = self._load(layer)
            if len(self._rows_of_layer) == len(self._layout_of_layer):
                self._load = self._source = None
        return self._rows_of_layer[layer]

    def parts(self, layer: int) -> tuple[Tensor, ...]:
        """The rows of one layer, `[N, capacity, 2, any]`: KV, or codes and scales. As `rows`."""
        return self._layout_of_layer[layer].parts(self.rows(layer), self.capacity_tokens)

    def layout(self, layer: int) -> Layout:
        """How the rows of one layer look."""
        return self._layout_of_layer[layer]

    def upto(self, used_tokens: int) -> Slab:
        """Its first rows as a slab of their own, for others to go on from; they are shared, not copied."""
        assert used_tokens <= self.used_tokens
        first = Slab(self.capacity_tokens, used_tokens, None, self._layout_of_layer)
        first._rows_of_layer = dict(self._rows_of_layer)
        if first._missing_layers():
            first._load, first._source = self.rows, self
        return first

    def unload(self, load: Callable[[int], Tensor]) -> None:
        """Let go of all rows: `load` brings back what they are. Whoever reads them now keeps what it reads."""
        self._load, self._source = load, None
        self._rows_of_layer.clear()

    @property
    def is_loaded(self) -> bool:
        """Whether all its rows are in host memory."""
        return self._load is None

    def unloaded_bytes(self, memory: HostMemory) -> int:
        """Host memory that its rows will take when they are asked for."""
        return sum(
            memory.taken_bytes(self._layout_of_layer[layer].num_bytes(self.capacity_tokens))
            for layer in self._missing_layers()
        )

    def _missing_layers(self) -> set[int]:
        """Layers whose rows are not in host memory, nor in that of the slab whose rows they are."""
        missing = self._layout_of_layer.keys() - self._rows_of_layer.keys()
        return missing if self._source is None else missing & self._source._missing_layers()

    def allocate(self, layer: int, spares: Spares, layout: Layout) -> bool:
        """Host memory for one layer, if it has none yet; whether it had none."""
        if layer in self._rows_of_layer:
            return False
        self._rows_of_layer[layer] = spares.take(layer, *layout.slab_shape(self.capacity_tokens))
        self._layout_of_layer[layer] = layout
        return True

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.used_tokens

    @property
    def layers(self) -> list[int]:
        """Layers whose rows are in host memory."""
        return sorted(self._rows_of_layer)

    @property
    def known_layers(self) -> list[int]:
        """Layers that have rows, in host memory or in a file."""
        return sorted(self._layout_of_layer)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(rows.nbytes for rows in self._rows_of_layer.values())
