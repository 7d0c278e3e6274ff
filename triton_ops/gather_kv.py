"""Missing sentences from host memory into their hot-set slots."""

import math

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
from triton_ops.pack_kv import (
    GROUP,
    Packed,
    code_width,
    number_of_code,
    packed_slab,
    row_bytes,
    scale_width,
    unpack_kv,
)


def gather_kv_ref(selected_BNK: Tensor, slot_BNK: Tensor, miss_BNK: Tensor, lanes: Lanes, layer: int) -> None:
    """Copy the missed sentences of one layer from host memory into their slots; mutates the lanes' `hot_kv`.

    Args:
        selected_BNK: int32 ids of sentences.
        slot_BNK, miss_BNK: as `resolve_hot_set` gives them; entries without a miss are not looked at.
    """
    kv_format = lanes.kv_format
    for b, lane in enumerate(lanes.lanes):
        hot_kv = lane.hot_kv[layer]
        head_dim = hot_kv.shape[4]
        head_P, rank_P = miss_BNK[b].nonzero(as_tuple=True)
        places = lane.place_S4[selected_BNK[b, head_P, rank_P].long()].tolist()
        slots = slot_BNK[b, head_P, rank_P].tolist()
        for head, slot, (length, slab, row, _) in zip(head_P.tolist(), slots, places, strict=True):
            rows = lane.slabs[layer][slab]
            if kv_format is None:
                hot_kv[head, slot, :length] = rows[head, row : row + length]
                continue
            capacity = rows.shape[1] // row_bytes(head_dim, kv_format)
            packed = packed_slab(rows, capacity, head_dim, kv_format)
            picked = Packed(*(part[head, row : row + length] for part in packed))
            hot_kv[head, slot, :length] = unpack_kv(picked, head_dim, hot_kv.dtype, kv_format)


@triton.jit
def _miss(selected_ptr, slot_ptr, entry, address_ptr, count_ptr):
    """Of a missed sentence: its tokens, its slab's entry in the table of slabs, its first row there, its slot; and how
    many slots a head has."""
    sentence = tl.load(selected_ptr + entry).to(tl.int64)
    place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32)) + sentence * 4
    slab_ptr = tl.load(address_ptr + SLABS).to(tl.pointer_type(tl.int64)) + tl.load(place_ptr + PLACE_SLAB) * 2
    length, row = tl.load(place_ptr + PLACE_LENGTH), tl.load(place_ptr + PLACE_ROW)
    slot, num_slots = tl.load(slot_ptr + entry).to(tl.int64), tl.load(count_ptr + NUM_SLOTS)
    return length, slab_ptr, row, slot, num_slots


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
        length, slab_ptr, row, slot, num_slots = _miss(
            selected_ptr, slot_ptr, entry, address_ptr, count_ptr + b * num_count
        )
        capacity = tl.load(slab_ptr + 1)
        source_ptr = tl.multiple_of(tl.load(slab_ptr).to(tl.pointer_type(DTYPE)), 16) + (n * capacity + row) * ROW
        hot_ptr = tl.multiple_of(tl.load(address_ptr + HOT).to(tl.pointer_type(DTYPE)), 16)
        target_ptr = hot_ptr + (n.to(tl.int64) * num_slots + slot) * (SLOT_TOKENS * ROW)
        # One run of bytes on both sides; all loads are issued before the first store.
        i = tl.arange(0, BLOCK)
        mask = i < length * ROW
        tl.store(target_ptr + i, tl.load(source_ptr + i, mask=mask), mask=mask)


@triton.jit
def _gather_packed_kv_kernel(
    selected_ptr,
    slot_ptr,
    miss_ptr,
    address_ptr,
    count_ptr,
    most_selected,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INT4: tl.constexpr,
    FP8: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `_gather_kv_kernel`, from codes and scales of each head's rows to numbers in the slot.

    CHUNK: bytes whose lower halves are of one group of dimensions, and their upper halves of one.
    """
    k, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(EARLY)
    entry = (b * NUM_KV_HEADS + n).to(tl.int64) * most_selected + k
    if tl.load(miss_ptr + entry) != 0:
        address_ptr += b * num_address
        length, slab_ptr, row, slot, num_slots = _miss(
            selected_ptr, slot_ptr, entry, address_ptr, count_ptr + b * num_count
        )
        capacity = tl.multiple_of(tl.load(slab_ptr + 1), 16)
        head_ptr = tl.multiple_of(tl.load(slab_ptr).to(tl.pointer_type(tl.uint8)), 16) + n * capacity * ROW_BYTES
        code_ptr = head_ptr + row.to(tl.int64) * (2 * WIDTH)
        scale_ptr = (head_ptr + capacity * (2 * WIDTH) + row.to(tl.int64) * (4 * NUMBERS)).to(
            tl.pointer_type(tl.float16)
        )
        hot_ptr = tl.multiple_of(tl.load(address_ptr + HOT).to(tl.pointer_type(DTYPE)), 16)
        hot_ptr += (n.to(tl.int64) * num_slots + slot) * (SLOT_TOKENS * 2 * HEAD_DIM)
        # A row is a key or a value: two for each token. Scales are loaded once for all numbers that share them.
        m = tl.arange(0, 2 * SLOT_BLOCK)
        in_rows = m < 2 * length
        if INT4:
            c = tl.arange(0, CHUNKS)
            w = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            in_chunks = in_rows[:, None] & (c * CHUNK < WIDTH)[None, :]
            mask = in_rows[:, None, None] & (w < WIDTH)[None, :, :]
            code = tl.load(code_ptr + m[:, None, None] * WIDTH + w[None, :, :], mask=mask, other=0)
            target_ptr = hot_ptr + m[:, None, None] * HEAD_DIM + w[None, :, :]
            lower_ptr = scale_ptr + m[:, None] * NUMBERS + (2 * (c * CHUNK // GROUP))[None, :]
            upper_ptr = scale_ptr + m[:, None] * NUMBERS + (2 * ((c * CHUNK + WIDTH) // GROUP))[None, :]
            step = tl.load(lower_ptr, mask=in_chunks, other=0.0).to(tl.float32)[:, :, None]
            low = tl.load(lower_ptr + 1, mask=in_chunks, other=0.0).to(tl.float32)[:, :, None]
            lower = (code & 15).to(tl.float32) * step + low
            tl.store(target_ptr, lower.to(DTYPE), mask=mask)
            step = tl.load(upper_ptr, mask=in_chunks, other=0.0).to(tl.float32)[:, :, None]
            low = tl.load(upper_ptr + 1, mask=in_chunks, other=0.0).to(tl.float32)[:, :, None]
            upper = (code >> 4).to(tl.float32) * step + low
            tl.store(target_ptr + WIDTH, upper.to(DTYPE), mask=mask)
        else:
            w = tl.arange(0, WIDTH_BLOCK)
            mask = in_rows[:, None] & (w < WIDTH)[None, :]
            code = tl.load(code_ptr + m[:, None] * WIDTH + w[None, :], mask=mask, other=0)
            scale = tl.load(scale_ptr + m, mask=in_rows, other=0.0).to(tl.float32)
            number = number_of_code(code, FP8) * scale[:, None]
            tl.store(hot_ptr + m[:, None] * HEAD_DIM + w[None, :], number.to(DTYPE), mask=mask)


def gather_kv_triton(selected_BNK: Tensor, slot_BNK: Tensor, miss_BNK: Tensor, lanes: Lanes, layer: int) -> None:
    """Copy misses into their slots: one program for each reads host memory in place, over the bus."""
    batch, num_kv_heads, most_selected = selected_BNK.shape
    hot_kv = next(lane.hot_kv[layer] for lane in lanes.lanes)
    head_dim = hot_kv.shape[4]
    address_rows = lanes.address_rows(layer)
    early = starts_early(selected_BNK)
    grid = (most_selected, num_kv_heads, batch)
    given = (
        selected_BNK,
        slot_BNK,
        miss_BNK,
        address_rows,
        lanes.count_of,
        most_selected,
        address_rows.stride(0),
        lanes.count_of.stride(0),
    )
    if lanes.kv_format is not None:
        width = code_width(head_dim, lanes.kv_format)
        chunk = math.gcd(width, GROUP)
        _gather_packed_kv_kernel[grid](
            *given,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            SLOT_TOKENS=lanes.slot_tokens,
            SLOT_BLOCK=triton.next_power_of_2(lanes.slot_tokens),
            WIDTH=width,
            WIDTH_BLOCK=triton.next_power_of_2(width),
            NUMBERS=scale_width(head_dim, lanes.kv_format),
            ROW_BYTES=row_bytes(head_dim, lanes.kv_format),
            GROUP=GROUP,
            CHUNK=chunk,
            CHUNKS=triton.next_power_of_2(triton.cdiv(width, chunk)),
            INT4=lanes.kv_format == "int4",
            FP8=lanes.kv_format == "fp8",
            DTYPE=element_type(hot_kv.dtype),
            EARLY=early,
            num_warps=8,
            **launch_options(early),
        )
        return
    _gather_kv_kernel[grid](
        *given,
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
