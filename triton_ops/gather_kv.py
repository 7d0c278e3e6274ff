"""Missing sentences from host memory into their hot-set slots."""

import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import (
    HOT,
    NUM_SLOTS,
    PLACE,
    PLACE_LENGTH,
    PLACE_ROW,
    PLACE_SLAB,
    SLABS,
    Lanes,
    element_type,
)


def gather_kv_ref(selected_BNK: Tensor, slot_BNK: Tensor, miss_BNK: Tensor, lanes: Lanes, layer: int) -> None:
    """Copy the missed sentences of one layer from host memory into their slots; mutates the lanes' `hot_kv`.

    Args:
        selected_BNK: int32 ids of sentences.
        slot_BNK, miss_BNK: as `resolve_hot_set` gives them; entries without a miss are not looked at.
    """
    for b, lane in enumerate(lanes.lanes):
        hot_kv = lane.hot_kv[layer]
        head_P, rank_P = miss_BNK[b].nonzero(as_tuple=True)
        places = lane.place_S4[selected_BNK[b, head_P, rank_P].long()].tolist()
        slots = slot_BNK[b, head_P, rank_P].tolist()
        for head, slot, (length, slab, row, _) in zip(head_P.tolist(), slots, places, strict=True):
            hot_kv[head, slot, :length] = lane.slabs[layer][slab][head, row : row + length]


@triton.jit
def _gather_kv_kernel(
    selected_ptr,
    slot_ptr,
    miss_ptr,
    address_ptr,
    count_ptr,
    most_selected,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    ROW: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    k, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(EARLY)
    entry = (b * NUM_KV_HEADS + n).to(tl.int64) * most_selected + k
    if tl.load(miss_ptr + entry) != 0:
        address_ptr += b * num_address
        sentence = tl.load(selected_ptr + entry).to(tl.int64)
        slot = tl.load(slot_ptr + entry).to(tl.int64)
        place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32)) + sentence * 4
        length = tl.load(place_ptr + PLACE_LENGTH)
        slab = tl.load(place_ptr + PLACE_SLAB)
        row = tl.load(place_ptr + PLACE_ROW)
        slab_ptr = tl.load(address_ptr + SLABS).to(tl.pointer_type(tl.int64)) + slab * 2
        capacity = tl.load(slab_ptr + 1)
        source_ptr = tl.multiple_of(tl.load(slab_ptr).to(tl.pointer_type(DTYPE)), 16) + (n * capacity + row) * ROW
        num_slots = tl.load(count_ptr + b * num_count + NUM_SLOTS)
        hot_ptr = tl.multiple_of(tl.load(address_ptr + HOT).to(tl.pointer_type(DTYPE)), 16)
        target_ptr = hot_ptr + (n.to(tl.int64) * num_slots + slot) * (SLOT_TOKENS * ROW)
        # One run of bytes on both sides; all loads are issued before the first store.
        i = tl.arange(0, BLOCK)
        mask = i < length * ROW
        tl.store(target_ptr + i, tl.load(source_ptr + i, mask=mask), mask=mask)


def gather_kv_triton(selected_BNK: Tensor, slot_BNK: Tensor, miss_BNK: Tensor, lanes: Lanes, layer: int) -> None:
    """Copy misses into their slots: one program for each reads host memory in place, over the bus."""
    batch, num_kv_heads, most_selected = selected_BNK.shape
    hot_kv = next(lane.hot_kv[layer] for lane in lanes.lanes)
    head_dim = hot_kv.shape[4]
    address_rows = lanes.address_rows(layer)
    early = starts_early(selected_BNK)
    _gather_kv_kernel[(most_selected, num_kv_heads, batch)](
        selected_BNK,
        slot_BNK,
        miss_BNK,
        address_rows,
        lanes.count_of,
        most_selected,
        address_rows.stride(0),
        lanes.count_of.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        ROW=2 * head_dim,
        SLOT_TOKENS=lanes.slot_tokens,
        BLOCK=triton.next_power_of_2(lanes.slot_tokens * 2 * head_dim),
        DTYPE=element_type(hot_kv.dtype),
        EARLY=early,
        num_warps=8,
        **launch_options(early),
    )


def gather_kv(selected_BNK: Tensor, slot_BNK: Tensor, miss_BNK: Tensor, lanes: Lanes, layer: int) -> None:
    """Copy missed sentences from host memory into their slots; see `gather_kv_ref`."""
    op = gather_kv_triton if selected_BNK.is_cuda else gather_kv_ref
    op(selected_BNK, slot_BNK, miss_BNK, lanes, layer)
