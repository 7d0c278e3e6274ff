"""Sequences that decode side by side, as the ops see them.

A lane is the place of one sequence in a decoding batch. Kernels find everything that belongs to a sequence through the
lane's row of two tables in device memory: addresses in one, counts in the other. So a launch, and a CUDA graph made of
launches, depends on neither the sequence nor its length: rows are rewritten between steps, the graph stays.

Knows tensors and their places; nothing of policies, sessions or models.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from triton_ops.pack_kv import Format

# Columns of `Lanes.address_of`, int64, one row for each layer and lane.
RESIDENT = tl.constexpr(0)
HOT = tl.constexpr(1)
SENTENCE_OF_SLOT = tl.constexpr(2)
LAST_USED = tl.constexpr(3)
SLOT_OF_SENTENCE = tl.constexpr(4)
PLACE = tl.constexpr(5)
SLABS = tl.constexpr(6)
SHARE = tl.constexpr(7)
TRAFFIC = tl.constexpr(8)
MEAN_VALUE = tl.constexpr(9)
PARTS = tl.constexpr(10)
"""From here, four columns for each part: first sentence, number of sentences, addresses of its two tables."""

# Columns of `Lanes.count_of`, int32, one row for each lane.
NUM_RESIDENT = tl.constexpr(0)
NUM_SENTENCES = tl.constexpr(1)
NUM_PARTS = tl.constexpr(2)
MAX_SELECTED = tl.constexpr(3)
STEP = tl.constexpr(4)
POSITION = tl.constexpr(5)
NUM_SLOTS = tl.constexpr(6)
RESIDENT_ROWS = tl.constexpr(7)
SENTENCE_ROWS = tl.constexpr(8)
COUNT_FIELDS = tl.constexpr(9)

# Columns of `Lane.place_S4`, int32.
PLACE_LENGTH = tl.constexpr(0)
PLACE_SLAB = tl.constexpr(1)
PLACE_ROW = tl.constexpr(2)
PLACE_FIRST = tl.constexpr(3)

# Columns of `Lane.traffic`, int64: sums over layers, heads and steps.
TRAFFIC_SELECTED = tl.constexpr(0)
TRAFFIC_MISSED = tl.constexpr(1)
TRAFFIC_TOKENS = tl.constexpr(2)


_ELEMENT_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
}


def element_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype in which keys and values, or their codes, may be kept."""
    return _ELEMENT_TYPES[dtype]


SHARE_UNITS = tl.constexpr(2**32)
"""Of one whole share of attention: whole numbers add up to the same in whatever order programs come."""


class Part(NamedTuple):
    """A run of sentences whose summaries stand together. `tables[layer]`: one or two tensors."""

    first: int
    num_sentences: int
    tables: dict[int, tuple[Tensor, ...]]


@dataclasses.dataclass(eq=False)
class Lane:
    """What ops read and write of one sequence. Keyed by layer number; a sliding-window layer has `resident_kv` alone.

    All tensors are on the device but `slabs`, which are in host memory (pinned where there is a GPU).
    """

    resident_kv: dict[int, Tensor]
    """`[N, R, 2, H]`: the tokens that are always read, in the first rows; room for the new one behind them. In a
    sliding-window layer a ring of R rows: the token at position p is in row `p % R`."""

    hot_kv: dict[int, Tensor]
    """`[N, C, M, 2, H]`: slots of the hot set."""

    sentence_of_slot: dict[int, Tensor]
    """int32 `[N, C]`, -1 for a free slot."""

    last_used: dict[int, Tensor]
    """int32 `[N, C]`: the step of last use, -1 if never."""

    slot_of_sentence: dict[int, Tensor]
    """int32 `[N, at least S]`, -1 for a sentence that has no slot."""

    place_S4: Tensor
    """int32 `[S, 4]`: tokens of each sentence, its slab, its first row there, its first token among all closed ones of
    its part."""

    slabs: dict[int, list[Tensor]]
    """`[N, capacity, 2, H]` each; a token's K and V are adjacent. In a format of fewer bits, see `packed_slab`."""

    slab_of: dict[int, Tensor]
    """int64 `[number of slabs, 2]` on the device: address and capacity of each slab."""

    parts: list[Part]
    share_S: Tensor
    """int64 `[at least S]`: attention that each sentence got, summed over steps, layers and KV heads, in units of
    1 / `SHARE_UNITS`."""

    traffic: Tensor
    """int64 `[3]`: sentences selected, sentences missed, tokens copied."""

    mean_value: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    """float32 `[N, H]`: the mean value of all tokens of the lane's sentences; none where sentences are not selected."""

    num_resident: int = 0
    num_sentences: int = 0
    max_selected: int = 0
    num_slots: int = 0
    step: int = 0
    """Sparse steps so far; rises by one from step to step."""
    position: int = 0
    """Position of the new token: tokens before it."""

    def counts(self) -> list[int]:
        """This lane's row of `Lanes.count_of`."""
        some = next(iter(self.hot_kv), None)
        # With no hot set at all, the first layer is one that is not a ring, if any is.
        resident_rows = self.resident_kv[next(iter(self.resident_kv)) if some is None else some].shape[1]
        sentence_rows = self.slot_of_sentence[some].shape[1] if some is not None else 0
        return [
            self.num_resident,
            self.num_sentences,
            len(self.parts),
            self.max_selected,
            self.step,
            self.position,
            self.num_slots,
            resident_rows,
            sentence_rows,
        ]

    def addresses(self, layer: int, max_parts: int) -> list[int]:
        """This lane's row of `Lanes.address_of` for one layer."""
        row = [0] * (PARTS.value + 4 * max_parts)
        row[RESIDENT.value] = self.resident_kv[layer].data_ptr()
        row[PLACE.value] = self.place_S4.data_ptr()
        row[SHARE.value] = self.share_S.data_ptr()
        row[TRAFFIC.value] = self.traffic.data_ptr()
        if layer in self.hot_kv:
            row[HOT.value] = self.hot_kv[layer].data_ptr()
            row[SENTENCE_OF_SLOT.value] = self.sentence_of_slot[layer].data_ptr()
            row[LAST_USED.value] = self.last_used[layer].data_ptr()
            row[SLOT_OF_SENTENCE.value] = self.slot_of_sentence[layer].data_ptr()
            row[MEAN_VALUE.value] = self.mean_value[layer].data_ptr() if layer in self.mean_value else 0
            row[SLABS.value] = self.slab_of[layer].data_ptr()
            for i, part in enumerate(self.parts):
                tables = part.tables[layer]
                first = PARTS.value + 4 * i
                row[first : first + 4] = [part.first, part.num_sentences, tables[0].data_ptr(), tables[-1].data_ptr()]
        for column in (RESIDENT.value, HOT.value, PLACE.value):
            assert row[column] % 16 == 0, "kernels read 16 bytes at a time"
        return row


class Mirrored:
    """A small table on the device and its original in host memory; the host writes, and does not wait for the copy."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._on_host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.on_device = self._on_host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Tensor]:
        """The original, to be written to; then it is copied, in the order of the device's work."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still wait for its turn
        yield self._on_host
        self.on_device.copy_(self._on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class Lanes:
    """A batch of lanes and its tables on the device.

    `capacity`: more sentences than any lane has; `most_selected`, `most_slots`, `max_parts`: at least as many as any
    lane selects in one step, has slots, has parts; `slot_tokens`: tokens in a slot, and at most so many in a sentence;
    `kv_format`: of the rows in slabs (`pack_kv`), None: the precision of the slots.
    All are part of a launch: a change means a new graph.
    """

    def __init__(
        self,
        num_lanes: int,
        layers: Sequence[int],
        device: torch.device,
        *,
        num_kv_heads: int,
        capacity: int,
        most_selected: int,
        most_slots: int,
        max_parts: int,
        slot_tokens: int,
        kv_format: Format | None = None,
    ) -> None:
        self.lanes: list[Lane] = []
        self.num_lanes = num_lanes
        self.num_kv_heads = num_kv_heads
        self.layers = list(layers)
        self.capacity, self.max_parts = capacity, max_parts
        self.most_selected, self.most_slots = most_selected, most_slots
        self.slot_tokens = slot_tokens
        self.kv_format = kv_format
        self.device = device
        self._row_of = {layer: i for i, layer in enumerate(self.layers)}
        width = PARTS.value + 4 * max_parts
        self._addresses = Mirrored((len(self.layers), num_lanes, width), torch.int64, device)
        self._counts = Mirrored((num_lanes, COUNT_FIELDS.value), torch.int32, device)
        self.address_of, self.count_of = self._addresses.on_device, self._counts.on_device
        self._scratch_of: dict[str, Tensor] = {}

    def scratch(self, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of an op's kernels, zero at first; a kernel leaves it zero, so that no launch has to clear it."""
        if op not in self._scratch_of:
            self._scratch_of[op] = torch.zeros(shape, dtype=dtype, device=self.device)
        assert self._scratch_of[op].shape == shape
        return self._scratch_of[op]

    def address_rows(self, layer: int) -> Tensor:
        """int64 `[lanes, columns]`: the rows of one layer."""
        return self.address_of[self._row_of[layer]]

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether these lanes can be seated without larger tables."""
        return len(lanes) <= self.num_lanes and all(
            lane.num_sentences < self.capacity
            and lane.max_selected <= self.most_selected
            and lane.num_slots <= self.most_slots
            and len(lane.parts) <= self.max_parts
            for lane in lanes
        )

    def seat(self, lanes: Sequence[Lane], changed: Collection[int] | None = None) -> None:
        """Put these sequences into the first lanes: what ops read from the next launch on.

        `changed`: the lanes whose addresses are not what they were when last seated; None: all. Counts always move.
        """
        assert self.fits(lanes)
        self.lanes = list(lanes)
        if changed is None or changed:
            with self._addresses.writing() as address_of:
                address_of[:, len(lanes) :] = 0
                for i in range(len(lanes)) if changed is None else changed:
                    rows = [lanes[i].addresses(layer, self.max_parts) for layer in self.layers]
                    address_of[:, i] = torch.tensor(rows)
        with self._counts.writing() as count_of:
            count_of[len(lanes) :] = 0
            for i, lane in enumerate(lanes):
                count_of[i] = torch.tensor(lane.counts())

    def clear(self) -> None:
        """Empty all rows on the device; `lanes` go on saying what shapes to launch for."""
        self.address_of.zero_()
        self.count_of.zero_()

    def forget(self) -> None:
        """Let go of what is seated: launches so far are not affected, new ones need `seat` first."""
        self.lanes = []

    def count(self) -> None:
        """Bring the counts of all seated lanes to the device; their addresses are what they were."""
        self.seat(self.lanes, changed=())
