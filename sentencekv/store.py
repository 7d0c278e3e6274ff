"""Where the KV of closed sentences lives: their rows in slabs of host memory, and summaries that stay on the device.

Knows tensors, devices and bytes; nothing of models, policies or text. On a machine without a GPU the same code runs
with ordinary memory in place of pinned memory.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sentencekv.memory import HostMemory, Spares
from sentencekv.slabs import Layout, Slab, slab_tokens
from sentencekv.transfer import to_device
from triton_ops import Format

_WRITES_AHEAD = 4
"""Layers whose KV may be on its way to host memory at a time. They hold device memory until they are there, so the host
must not run further ahead of the device; being ahead by one is enough for the device never to wait."""
_TABLE_ROOM = 64
"""Rows that a growing summary table makes room for at once, or a 64th of it: were it doubled, the first sentence that a
reply closes would double the summaries of the whole context."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Tokens `[start, stop)` of one closing, and the rows `[row, row + stop - start)` of a slab that take them."""

    slab: Slab
    row: int
    start: int
    stop: int


class Extent:
    """An append-only run of closed sentences: their place and rows in host memory, their summaries on the device.

    Sessions that fork from one document share its extents; a shared extent is never appended to. A sentence never
    straddles two slabs, so the rows of one KV head are one run of bytes.
    """

    def __init__(
        self,
        memory: HostMemory,
        device: torch.device,
        slabs: Sequence[Slab] = (),
        place_of: Tensor | None = None,
        tables_of_layer: Mapping[int, Sequence[Tensor]] | None = None,
        row_bytes: int = 1,
        value_sum_of_layer: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Empty, or of sentences that another extent held: its slabs, places, summaries and sums of values.

        `row_bytes`: what a token takes of one layer and head, if known, for slabs that waste no pinned memory.
        """
        self.memory = memory
        self.device = device
        self.row_bytes = row_bytes
        self.slabs = list(slabs)
        self.place_of = torch.empty((0, 4), dtype=torch.int64) if place_of is None else place_of
        """Of each sentence: first token's context position, tokens, slab (number within the extent), first row."""
        self.num_tokens = int(self.place_of[:, 1].sum())
        self._tables_of_layer: dict[int, list[GrowingTable]] = {}
        for layer, tables in (tables_of_layer or {}).items():
            self.add_summaries(layer, tables)
        self._value_sum_of_layer = dict(value_sum_of_layer or {})
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spares = Spares(memory, device)
        self._next_capacity = 0
        """Rows of the slab that will be needed after the last one; 0: none is expected."""
        self._writes: deque[torch.cuda.Event] = deque()
        """The latest ones, oldest first; on a GPU."""

    @classmethod
    def joined(cls, extents: Sequence[Extent]) -> Extent:
        """Extents that follow one another as one, with copies of their summaries. It shares their rows, unless most of
        the memory for them is empty: then it has copies of these as well."""
        slabs: list[Slab] = []
        places = []
        for extent in extents:
            extent.flush()
            places.append(extent.place_of + torch.tensor([0, 0, len(slabs), 0]))
            slabs += extent.slabs
        tables = {
            layer: [torch.cat(rows) for rows in zip(*(extent.summaries(layer) for extent in extents), strict=True)]
            for layer in extents[0]._tables_of_layer
        }
        first = extents[0]
        sums = {
            layer: torch.stack([extent._value_sum_of_layer[layer] for extent in extents]).sum(0)
            for layer in first._value_sum_of_layer
        }
        whole = cls(first.memory, first.device, slabs, torch.cat(places), tables, first.row_bytes, sums)
        held, used = sum(slab.capacity_tokens for slab in slabs), sum(slab.used_tokens for slab in slabs)
        if held >= 2 * max(used, slab_tokens(0, 1, first.row_bytes)) and all(slab.is_loaded for slab in slabs):
            whole._pack()
        return whole

    def summarized_by(self, summarize: Callable[[Tensor, Tensor], Sequence[Tensor]] | None) -> Extent:
        """The same rows, shared, under other summaries; those in files come to host memory.

        `summarize`: keys `[T, N, H]` on the device and CSR offsets `[S + 1]` to the tables of one layer; None: none.
        """
        made = Extent(
            self.memory,
            self.device,
            self.slabs,
            self.place_of,
            row_bytes=self.row_bytes,
            value_sum_of_layer=self._value_sum_of_layer,
        )
        if summarize is None:
            return made
        places = Places([self], self.device)
        offsets = to_device([0, *self.place_of[:, 1].cumsum(0).tolist()], self.device)
        for layer in self.slabs[0].known_layers if self.slabs else ():
            layout = self.slabs[0].layout(layer)
            shape = (layout.num_heads, self.num_tokens, 2, layout.head_dim)
            kv_NTH = torch.empty(shape, dtype=layout.dtype, device=self.device)
            places.read(layer, kv_NTH)
            made.add_summaries(layer, summarize(kv_NTH[:, :, 0].transpose(0, 1), offsets))
        return made

    def _pack(self) -> None:
        """Copy all rows to as few slabs as hold them."""
        start, length = self.place_of[:, 0], self.place_of[:, 1]
        assert torch.equal(start[1:], (start + length)[:-1]), "sentences follow one another"
        packed = Extent(self.memory, self.device, row_bytes=self.row_bytes)
        packed.place(int(start[0]), length.tolist(), self.num_tokens)
        for layer in self.slabs[0].layers:
            for slab in packed.slabs:
                slab.allocate(layer, self._spares, self.slabs[0].layout(layer))
            parts_of = [[slab.parts(layer) for slab in each.slabs] for each in (self, packed)]
            for (_, count, slab, row), (_, _, new_slab, new_row) in zip(
                self.place_of.tolist(), packed.place_of.tolist(), strict=True
            ):
                for part, new_part in zip(parts_of[0][slab], parts_of[1][new_slab], strict=True):
                    new_part[:, new_row : new_row + count] = part[:, row : row + count]
        self.slabs, self.place_of = packed.slabs, packed.place_of

    @property
    def num_sentences(self) -> int:
        return self.place_of.shape[0]

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held, unused rows included."""
        return sum(slab.nbytes for slab in self.slabs)

    @property
    def summary_bytes(self) -> int:
        """Bytes of summaries on the device, growth room included."""
        return sum(table.nbytes for tables in self._tables_of_layer.values() for table in tables)

    def place(self, start: int, lengths: Sequence[int], expected_tokens: int = 0) -> list[Run]:
        """Give rows to sentences that close next to each other; the runs say what to copy where.

        Args:
            start: context position of the first token.
            lengths: tokens of each sentence.
            expected_tokens: how many more tokens this extent will hold; sizes the next slab.
        """
        runs: list[Run] = []
        placed: list[tuple[int, int, int, int]] = []
        offset = run_start = 0
        remaining = sum(lengths)
        run_row = self.slabs[-1].used_tokens if self.slabs else 0
        for length in lengths:
            if not self.slabs or self.slabs[-1].free_tokens < length:
                if offset > run_start:
                    runs.append(Run(self.slabs[-1], run_row, run_start, offset))
                self.slabs.append(Slab(slab_tokens(max(expected_tokens, remaining), length, self.row_bytes)))
                run_start, run_row = offset, 0
            slab = self.slabs[-1]
            placed.append((start + offset, length, len(self.slabs) - 1, slab.used_tokens))
            slab.used_tokens += length
            offset += length
            remaining -= length
            expected_tokens -= length
        if offset > run_start:
            runs.append(Run(self.slabs[-1], run_row, run_start, offset))
        self.num_tokens += offset
        later_tokens = expected_tokens - self.slabs[-1].free_tokens if self.slabs else 0
        self._next_capacity = slab_tokens(later_tokens, max(lengths), self.row_bytes) if later_tokens > 0 else 0
        self.place_of = torch.cat([self.place_of, torch.tensor(placed, dtype=torch.int64).reshape(-1, 4)])
        return runs

    def allocate(self, layer: int, runs: Sequence[Run], layout: Layout) -> None:
        """Host memory of one layer for the slabs of these runs, where they have none yet. With the last slab's, that of
        the slab after it is ordered, if one is expected."""
        for run in runs:
            is_new = run.slab.allocate(layer, self._spares, layout)
            if is_new and self._next_capacity and run.slab is self.slabs[-1]:
                self._spares.order(layer, *layout.slab_shape(self._next_capacity))

    def write(self, layer: int, runs: Sequence[Run], kv_NTH: Tensor, kv_format: Format | None = None) -> None:
        """Copy closed tokens `[N, T, 2, H]` of one layer to host memory, in a format of fewer bits if one is given;
        asynchronous on a GPU until `flush`, except that the host waits for earlier ones where many are under way."""
        layout = Layout(kv_NTH.shape[0], kv_NTH.shape[3], kv_NTH.dtype, kv_format)
        self.allocate(layer, runs, layout)
        sources = layout.packed(kv_NTH)
        if self._copy_stream is None:
            for run in runs:
                rows = slice(run.row, run.row + run.stop - run.start)
                for target, source in zip(run.slab.parts(layer), sources, strict=True):
                    target[:, rows] = source[:, run.start : run.stop]
            return
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copy_stream):
            for source in sources:
                source.record_stream(self._copy_stream)
            # One head at a time: both sides are then contiguous, which an asynchronous copy needs.
            heads: tuple[list[Tensor], list[Tensor]] = ([], [])
            for run in runs:
                for target, source in zip(run.slab.parts(layer), sources, strict=True):
                    heads[0].extend(target.narrow(1, run.row, run.stop - run.start).unbind(0))
                    heads[1].extend(source.narrow(1, run.start, run.stop - run.start).unbind(0))
            torch._foreach_copy_(*heads, non_blocking=True)
            self._writes.append(torch.cuda.Event())
            self._writes[-1].record()
        if len(self._writes) > _WRITES_AHEAD:
            self._writes.popleft().synchronize()

    def expect_nothing(self) -> None:
        """Give up what was got ready for more tokens."""
        self._next_capacity = 0
        self._spares.clear()

    def flush(self) -> None:
        """Wait until all rows written so far are in host memory."""
        if self._copy_stream is not None:
            self._copy_stream.synchronize()

    def order_after_writes(self, stream: torch.cuda.Stream | None = None) -> None:
        """Make what a stream of the device (None: the current one) does next wait for the writes so far."""
        if self._copy_stream is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_stream(self._copy_stream)

    def add_summaries(self, layer: int, tables: Sequence[Tensor]) -> None:
        """Append to a layer's tables the summaries of the sentences placed last."""
        kept = self._tables_of_layer.setdefault(layer, [GrowingTable() for _ in tables])
        for table, rows in zip(kept, tables, strict=True):
            table.append(rows)

    def add_values(self, layers: Sequence[int], value_DNTH: Tensor) -> Tensor:
        """Count the values `[D, N, T, H]` of the tokens placed last into the sums of these layers. Returns theirs."""
        new = value_DNTH.sum(2, dtype=torch.float32)
        fresh = [layer for layer in layers if layer not in self._value_sum_of_layer]
        for layer in fresh:
            self._value_sum_of_layer[layer] = torch.zeros_like(new[0])
        # Not in place: sessions that fork share the sums of an extent that is not added to any more.
        sums = [self._value_sum_of_layer[layer] for layer in layers]
        self._value_sum_of_layer.update(zip(layers, torch._foreach_add(sums, list(new.unbind(0))), strict=True))
        return new

    def set_value_sum(self, layer: int, value_sum_NH: Tensor) -> None:
        """Say what the values of a layer's tokens sum up to, float32 `[N, H]`, where they were not added one by one."""
        self._value_sum_of_layer[layer] = value_sum_NH

    def value_sum(self, layer: int) -> Tensor:
        """Sum of the values of all tokens of a layer, float32 `[N, H]` on the device."""
        return self._value_sum_of_layer[layer]

    def summaries(self, layer: int) -> tuple[Tensor, ...]:
        """The summary tables of one layer, none if it keeps none; views, valid until the next `add_summaries`."""
        return tuple(table.rows for table in self._tables_of_layer.get(layer, ()))


class GrowingTable:
    """Rows that are appended now and then, kept contiguous."""

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._used = 0

    def append(self, rows: Tensor) -> None:
        needed = self._used + rows.shape[0]
        if self._table is None or self._table.shape[0] < needed:
            # The first closing of a document is most of it: take just that, and later a fixed room at a time.
            room = max(_TABLE_ROOM, self._used // 64)
            capacity = needed if self._table is None else max(needed, self._used + min(self._used, room))
            grown = rows.new_empty((capacity, *rows.shape[1:]))
            grown[: self._used] = self.rows if self._table is not None else 0
            self._table = grown
        self._table[self._used : needed] = rows
        self._used = needed

    @property
    def rows(self) -> Tensor:
        """The rows appended so far; a view, valid until the next `append`."""
        assert self._table is not None
        return self._table[: self._used]

    @property
    def nbytes(self) -> int:
        """Bytes held, growth room included."""
        return 0 if self._table is None else self._table.nbytes


class Places:
    """Where every closed sentence of a session is, over all its extents, as of one moment.

    What is placed later does not show: a pass reads what was closed before it, while its own closings get their rows.
    """

    def __init__(self, extents: Sequence[Extent], device: torch.device) -> None:
        self.extents = list(extents)
        self.slabs = [slab for extent in self.extents for slab in extent.slabs]
        self._used_tokens = [slab.used_tokens for slab in self.slabs]
        self._device = device
        tables = [torch.empty((0, 5), dtype=torch.int64)]
        first_slab = 0
        for extent in self.extents:
            first_row = extent.place_of[:, 1:2].cumsum(0) - extent.place_of[:, 1:2]
            tables.append(torch.cat([extent.place_of + torch.tensor([0, 0, first_slab, 0]), first_row], dim=1))
            first_slab += len(extent.slabs)
        place_of = torch.cat(tables)
        self.start_of, self.length_of = place_of[:, 0], place_of[:, 1]
        self.place_S4 = to_device(place_of[:, 1:], device, torch.int32)
        """int32 `[S, 4]` on the device: tokens, slab (an index into `slabs`), first row there, first row in the
        extent's tables of tokens."""
        self.num_tokens = int(self.length_of.sum())

    @property
    def num_sentences(self) -> int:
        return self.length_of.numel()

    def filled(self) -> list[tuple[Slab, int]]:
        """The slabs in order, and how many of their rows are filled."""
        return list(zip(self.slabs, self._used_tokens, strict=True))

    def slab_addresses(self, layers: Sequence[int]) -> Tensor:
        """int64 `[D, number of slabs, 2]` on the device: address and capacity of each slab, for each of D layers."""
        rows = [[[slab.rows(layer).data_ptr(), slab.capacity_tokens] for slab in self.slabs] for layer in layers]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1, 2).to(self._device)

    def read(self, layer: int, into_NTH: Tensor) -> None:
        """Copy all closed tokens of one layer, in order, into a device tensor `[N, num_tokens, 2, H]`."""
        for extent in self.extents:
            extent.order_after_writes()
        start = 0
        for slab, used_tokens in self.filled():
            parts = slab.parts(layer)
            stop = start + used_tokens
            if self._device.type == "cpu":
                into_NTH[:, start:stop] = slab.layout(layer).unpacked([part[:, :used_tokens] for part in parts])
                start = stop
                continue
            layout = slab.layout(layer)
            targets = [into_NTH[:, start:stop]]
            if layout.kv_format is not None:
                targets = [torch.empty_like(part[:, :used_tokens], device=self._device) for part in parts]
            for target, part in zip(targets, parts, strict=True):
                # One head at a time: both sides are then contiguous, which an asynchronous copy needs.
                for head in range(part.shape[0]):
                    target[head].copy_(part[head, :used_tokens], non_blocking=True)
            if layout.kv_format is not None:
                into_NTH[:, start:stop] = layout.unpacked(targets)
            start = stop
