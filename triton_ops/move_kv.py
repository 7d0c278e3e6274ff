"""Rows of KV from wherever they are, host memory included, to where a new prompt has them, keys turned on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.lanes import element_type

_ROWS = 16
"""Rows of one head that a program moves at a time."""
_PROGRAMS = 32
"""Programs of a launch, each of which moves many rows: enough loads are then under way to keep the bus busy, and most
of the GPU is left to the layer that is computed meanwhile."""


def move_kv_ref(
    into_NTH: Tensor,
    sources: Sequence[Tensor],
    source_S2: Tensor,
    place_T3: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Write the rows that have a source; the others of `into_NTH` stay as they are.

    Keys are turned in float32 and rounded once; values, and keys whose turn is by zero, are copied bit by bit.

    Args:
        into_NTH: `[N, T, 2, H]` on the device.
        sources: tensors `[N, any, 2, H]` of the same dtype, contiguous, on the device or in pinned host memory.
        source_S2: int64 `[number of sources, 2]` on the device: their addresses and numbers of rows.
        place_T3: int32 `[T, 3]` on the device: of each row its source (-1: none), the row there, and the row of the
            tables by which its key is turned.
        cos_SR, sin_SR: float32 `[any, R]` on the device, `2 * R <= H`; the remaining dimensions are not turned.
        interleaved: pairs are dimensions (2i, 2i + 1); else (i, i + R).
    """
    num_pairs = cos_SR.shape[1]
    source_T, row_T, turn_T = place_T3.long().unbind(1)
    for number, source in enumerate(sources):
        at = (source_T == number).nonzero()[:, 0]
        if not len(at):
            continue
        rows = source[:, row_T[at].to(source.device)].to(into_NTH.device)
        cos, sin = cos_SR[turn_T[at]], sin_SR[turn_T[at]]
        if num_pairs:
            turned = rows[:, :, 0, : 2 * num_pairs].float()
            if interleaved:
                first, second = turned[..., 0::2], turned[..., 1::2]
            else:
                first, second = turned.chunk(2, dim=-1)
            new = (first * cos - second * sin, second * cos + first * sin)
            joined = torch.stack(new, dim=-1).flatten(-2) if interleaved else torch.cat(new, dim=-1)
            rows[:, :, 0, : 2 * num_pairs] = joined.to(rows.dtype)
        into_NTH[:, at] = rows


@triton.jit
def _move_kv_kernel(
    into_ptr,
    source_ptr,
    place_ptr,
    cos_ptr,
    sin_ptr,
    num_rows,
    num_blocks,
    into_stride_n,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    h = tl.arange(0, HEAD_BLOCK)
    i = tl.arange(0, PAIR_BLOCK)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else PAIRS
    blocks_of_head = tl.cdiv(num_rows, ROWS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        n = (block // blocks_of_head).to(tl.int64)
        t = (block % blocks_of_head) * ROWS + tl.arange(0, ROWS)
        source = tl.load(place_ptr + t * 3, mask=t < num_rows, other=-1)
        there = source >= 0
        row = tl.load(place_ptr + t * 3 + 1, mask=there, other=0).to(tl.int64)
        turn = tl.load(place_ptr + t * 3 + 2, mask=there, other=0)
        address = tl.load(source_ptr + source * 2, mask=there, other=0)
        capacity = tl.load(source_ptr + source * 2 + 1, mask=there, other=0)
        from_ptr = address.to(tl.pointer_type(DTYPE)) + (capacity * n + row) * (2 * HEAD_DIM)
        to_ptr = into_ptr + n * into_stride_n + t.to(tl.int64) * (2 * HEAD_DIM)
        mask = there[:, None] & (h < HEAD_DIM)[None, :]
        value = tl.load(from_ptr[:, None] + HEAD_DIM + h[None, :], mask=mask)
        if PAIRS > 0:
            pair = there[:, None] & (i < PAIRS)[None, :]
            first = tl.load(from_ptr[:, None] + i[None, :] * step, mask=pair).to(tl.float32)
            second = tl.load(from_ptr[:, None] + i[None, :] * step + gap, mask=pair).to(tl.float32)
            cos = tl.load(cos_ptr + turn[:, None] * PAIRS + i[None, :], mask=pair, other=1.0)
            sin = tl.load(sin_ptr + turn[:, None] * PAIRS + i[None, :], mask=pair, other=0.0)
            tl.store(to_ptr[:, None] + i[None, :] * step, (first * cos - second * sin).to(DTYPE), mask=pair)
            tl.store(to_ptr[:, None] + i[None, :] * step + gap, (second * cos + first * sin).to(DTYPE), mask=pair)
        if 2 * PAIRS < HEAD_DIM:
            rest = mask & (h >= 2 * PAIRS)[None, :]
            tl.store(to_ptr[:, None] + h[None, :], tl.load(from_ptr[:, None] + h[None, :], mask=rest), mask=rest)
        tl.store(to_ptr[:, None] + HEAD_DIM + h[None, :], value, mask=mask)


def move_kv_triton(
    into_NTH: Tensor,
    sources: Sequence[Tensor],
    source_S2: Tensor,
    place_T3: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    interleaved: bool,
) -> None:
    """`move_kv_ref` as one launch; the GPU reads host memory over the bus, and each row once."""
    num_heads, num_rows, _, head_dim = into_NTH.shape
    assert into_NTH.stride()[1:] == (2 * head_dim, head_dim, 1)
    assert all(source.is_contiguous() and source.dtype == into_NTH.dtype for source in sources)
    assert place_T3.shape == (num_rows, 3)
    assert place_T3.is_contiguous()
    assert 2 * cos_SR.shape[1] <= head_dim
    num_pairs = cos_SR.shape[1]
    num_blocks = triton.cdiv(num_rows, _ROWS) * num_heads
    if not num_blocks:
        return
    _move_kv_kernel[(min(num_blocks, _PROGRAMS),)](
        into_NTH,
        source_S2,
        place_T3,
        cos_SR,
        sin_SR,
        num_rows,
        num_blocks,
        into_NTH.stride(0),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        PAIRS=num_pairs,
        PAIR_BLOCK=triton.next_power_of_2(max(num_pairs, 1)),
        INTERLEAVED=interleaved,
        ROWS=_ROWS,
        DTYPE=element_type(into_NTH.dtype),
        num_warps=4,
    )


def move_kv(
    into_NTH: Tensor,
    sources: Sequence[Tensor],
    source_S2: Tensor,
    place_T3: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    interleaved: bool,
) -> None:
    """Rows of KV to where a new prompt has them, keys turned on the way; see `move_kv_ref`."""
    op = move_kv_triton if into_NTH.is_cuda else move_kv_ref
    op(into_NTH, sources, source_S2, place_T3, cos_SR, sin_SR, interleaved=interleaved)
