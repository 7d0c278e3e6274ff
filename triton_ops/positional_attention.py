"""Exact attention of some of a text's tokens over keys and values that are already there.

Where a prompt's KV was reused, a few rows are computed anew. They stand anywhere in the text, so what a row may see is
said by its position, not by its place among the rows.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import starts_early

MAX_HEAD_DIM = 256
_LOGITS_AT_ONCE = 1 << 20
"""Numbers of a logit block of the reference: bounds its memory, and skips the keys that no row of the block may see."""
_PROGRAMS = 264
"""Programs to aim at, two for each multiprocessor of an H100: where rows are few, several share a block's keys."""
_SPLIT_KEYS = 1024
"""Keys that a program should have at least, or merging costs more than it saves."""
_MERGED_ROWS = 16
"""Rows of one query head that a program merges."""
_LOG2_E, _LN_2 = math.log2(math.e), tl.constexpr(math.log(2.0))
_LOWEST = tl.constexpr(-1e30)
"""Where running maxima begin: below all logits, and finite, so that a row that sees no key gets zeros and no NaN."""


class Tiles(NamedTuple):
    """How a launch is cut."""

    rows: int
    """Rows of queries for each program: of so many tokens, times the query heads that share their keys."""
    keys: int
    """Keys that it attends to at a time."""
    num_warps: int
    num_stages: int


_HOPPER_TILES = {
    16: Tiles(128, 64, 4, 3),
    32: Tiles(128, 64, 4, 3),
    64: Tiles(128, 64, 8, 3),
    128: Tiles(128, 64, 8, 3),
    256: Tiles(128, 64, 8, 2),
}
"""By head dimension, rounded up to a power of two."""
_EARLIER_TILES = {
    16: Tiles(128, 64, 4, 3),
    32: Tiles(128, 64, 4, 3),
    64: Tiles(128, 64, 4, 3),
    128: Tiles(128, 32, 8, 3),
    256: Tiles(64, 32, 8, 2),
}
"""Before Hopper: less shared memory, and matrix units that multiply what is in registers."""
_FLOAT32_TILES = Tiles(16, 32, 8, 1)
"""Exact products of float32 do not run on the matrix units: small, or they take minutes to compile."""


def positional_attention_ref(
    q_ALH: Tensor, kv_NTH: Tensor, position_L: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v of tokens at given positions, and the log of the sum of exponents, over the keys up to each.

    Parts of a text can be attended to one by one and joined with `merge_attention`: for the part from token `first`,
    pass `position_L - first`. A row before the part has a negative position, sees nothing, and gets zeros and -inf; one
    behind the part sees all of it.

    Args:
        q_ALH: `[A, L, H]` post-RoPE queries of the A = N * G query heads, those of one KV head adjacent; any strides
            but for the last dimension, which is contiguous.
        kv_NTH: `[N, T, 2, H]`: keys and values of T tokens in order, in q's dtype; strides as above. Rows behind the
            last position are not read; those up to it must be finite, also where a query does not see them.
        position_L: int32 `[L]`, never falling: query i sees keys 0 to `position_L[i]`. The kernel cannot check it
            without waiting for the device; this does.
        scale: multiplies the logits, positive; softcap: `softcap * tanh(logit / softcap)` after it (Gemma 2).

    Returns:
        The output `[A, L, H]` in q's dtype (token by token in memory, as the model's next layer reads it) and float32
        natural logs `[A, L]`, contiguous.
    """
    _check_shapes(q_ALH, kv_NTH, position_L, scale)
    assert (position_L.diff() >= 0).all(), "positions fall"
    num_heads, num_rows, head_dim = q_ALH.shape
    num_kv_heads, num_keys = kv_NTH.shape[:2]
    output_ALH, log_AL = _results(q_ALH)
    blind = int((position_L < 0).sum()) if num_keys else num_rows
    output_ALH[:, :blind] = 0
    log_AL[:, :blind] = -torch.inf
    step = max(_LOGITS_AT_ONCE // (num_heads * max(num_keys, 1)), 1)
    for start in range(blind, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        position = position_L[rows]
        # Keys up to the first position are seen by all of these rows, those behind the last one by none.
        shared, end = (min(int(position[i]) + 1, num_keys) for i in (0, -1))
        key, value = kv_NTH[:, :end, 0], kv_NTH[:, :end, 1]
        q = q_ALH[:, rows].reshape(num_kv_heads, -1, head_dim)
        logit = torch.matmul(q, key.transpose(1, 2)).float().mul_(scale)
        if softcap is not None:
            logit = torch.tanh(logit.div_(softcap)).mul_(softcap)
        unseen = torch.arange(shared, end, device=position.device) > position[:, None]
        logit.view(num_heads, -1, end)[:, :, shared:].masked_fill_(unseen, -torch.inf)
        weight = torch.softmax(logit, -1)
        # The largest weight is exp(its logit - log).
        log_AL[:, rows] = (logit.amax(-1) - weight.amax(-1).log()).view(num_heads, -1)
        output_ALH[:, rows] = torch.matmul(weight.to(value.dtype), value).view(num_heads, -1, head_dim)
    return output_ALH, log_AL


def _check_shapes(q_ALH: Tensor, kv_NTH: Tensor, position_L: Tensor, scale: float) -> None:
    assert q_ALH.shape[0] % kv_NTH.shape[0] == 0
    assert kv_NTH.shape[2:] == (2, q_ALH.shape[2])
    assert kv_NTH.dtype == q_ALH.dtype
    assert position_L.shape == q_ALH.shape[1:2]
    assert position_L.dtype == torch.int32
    assert position_L.is_contiguous()
    assert q_ALH.stride(2) == kv_NTH.stride(3) == 1
    assert scale > 0


def _results(q_ALH: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output and its logs."""
    num_heads, num_rows, head_dim = q_ALH.shape
    output_LAH = torch.empty((num_rows, num_heads, head_dim), dtype=q_ALH.dtype, device=q_ALH.device)
    return output_LAH.transpose(0, 1), torch.empty((num_heads, num_rows), device=q_ALH.device)


@triton.jit
def _attend(
    q,
    kv_ptr,
    position,
    last,
    first_block,
    end_block,
    highest,
    total,
    value_sum,
    inner,
    outer,
    KV_STRIDE_T: tl.constexpr,
    KV_STRIDE_2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks of keys added to a running softmax in base 2 (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Not `MASKED`: all rows see all of these keys. `inner`: of what tanh takes, twice, in base 2; `outer`: of the logits
    then. Strides of keys are constants, so that the compiler makes them part of the loads and not of the registers.
    """
    h = tl.arange(0, HEAD_BLOCK)
    for block in range(first_block, end_block):
        token = block * KEYS + tl.arange(0, KEYS)
        # Tokens behind the last one repeat it: no mask on the loads, and nothing is read that may not be there.
        loaded = tl.minimum(token, last) if MASKED else token
        key_ptr = kv_ptr + loaded.to(tl.int64)[:, None] * KV_STRIDE_T + h[None, :]
        if HEAD_DIM < HEAD_BLOCK:
            key = tl.load(key_ptr, mask=(h < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(key_ptr + KV_STRIDE_2, mask=(h < HEAD_DIM)[None, :], other=0.0)
        else:
            key = tl.load(key_ptr)
            value = tl.load(key_ptr + KV_STRIDE_2)
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if SOFTCAP:
            # tanh by exp: 1 - 2 / (exp(2x) + 1)
            logit = 1.0 - 2.0 / (tl.exp2(logit * inner) + 1.0)
        if MASKED:
            logit = tl.where(token[None, :] <= position[:, None], logit, float("-inf"))
        now = tl.maximum(highest, tl.max(logit, axis=1) * outer)
        weight = tl.exp2(logit * outer - now[:, None])
        factor = tl.exp2(highest - now)
        total = total * factor + tl.sum(weight, axis=1)
        value_sum = tl.dot(weight.to(value.dtype), value, value_sum * factor[:, None], input_precision=PRECISION)
        highest = now
    return highest, total, value_sum


@triton.jit
def _positional_attention_kernel(
    q_ptr,
    kv_ptr,
    position_ptr,
    output_ptr,
    log_ptr,
    num_tokens,
    num_keys,
    inner,
    outer,
    q_stride_a,
    q_stride_l,
    kv_stride_n,
    output_stride_s,
    output_stride_a,
    output_stride_l,
    KV_STRIDE_T: tl.constexpr,
    KV_STRIDE_2: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of rows and a share of its keys. Rows are tokens times the query heads of one KV head.

    So keys are read once for a whole group, and a block's positions lie closer together: less of it needs a mask.
    """
    # The last tokens see most keys: their blocks, of all heads, come first, and short ones fill up at the end.
    n = tl.program_id(0) % NUM_KV_HEADS
    block = tl.num_programs(0) // NUM_KV_HEADS - 1 - tl.program_id(0) // NUM_KV_HEADS
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    row = block * ROWS + tl.arange(0, ROWS)
    there = row < num_tokens * GROUP
    token = row // GROUP
    a = (n * GROUP + row % GROUP).to(tl.int64)
    position = tl.minimum(tl.load(position_ptr + token, mask=there, other=-1), num_keys - 1)
    first = tl.load(position_ptr + block * ROWS // GROUP)
    last = tl.load(position_ptr + tl.minimum((block * ROWS + ROWS - 1) // GROUP, num_tokens - 1))
    last = tl.minimum(last, num_keys - 1)

    num_blocks = tl.cdiv(tl.maximum(last + 1, 0), KEYS)
    share = tl.cdiv(num_blocks, num_splits)
    first_block = tl.minimum(split * share, num_blocks)
    end_block = tl.minimum(first_block + share, num_blocks)
    seen_by_all = (tl.minimum(first, last) + 1) // KEYS
    first_masked = tl.minimum(tl.maximum(seen_by_all, first_block), end_block)

    h = tl.arange(0, HEAD_BLOCK)
    inside = there[:, None] & (h < HEAD_DIM)[None, :]
    q_ptr += a * q_stride_a + token.to(tl.int64) * q_stride_l
    q = tl.load(q_ptr[:, None] + h[None, :], mask=inside, other=0.0)
    kv_ptr += n.to(tl.int64) * kv_stride_n
    highest = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    value_sum = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    for masked in tl.static_range(2):
        highest, total, value_sum = _attend(
            q,
            kv_ptr,
            position,
            last,
            first_masked if masked else first_block,
            end_block if masked else first_masked,
            highest,
            total,
            value_sum,
            inner,
            outer,
            KV_STRIDE_T,
            KV_STRIDE_2,
            HEAD_DIM,
            HEAD_BLOCK,
            KEYS,
            masked == 1,
            SOFTCAP,
            PRECISION,
        )
    output = value_sum / tl.where(total == 0.0, 1.0, total)[:, None]
    output_ptr += split.to(tl.int64) * output_stride_s + a * output_stride_a + token.to(tl.int64) * output_stride_l
    tl.store(output_ptr[:, None] + h[None, :], output.to(output_ptr.dtype.element_ty), mask=inside)
    log_ptr += (split.to(tl.int64) * NUM_KV_HEADS * GROUP + a) * num_tokens + token
    tl.store(log_ptr, (highest + tl.log2(total)) * _LN_2, mask=there)


@triton.jit
def _merge_splits_kernel(
    partial_ptr,
    partial_log_ptr,
    output_ptr,
    log_ptr,
    num_tokens,
    num_splits,
    output_stride_a,
    output_stride_l,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Results over shares of the keys as one result, for some rows of one query head."""
    a, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < num_tokens
    h = tl.arange(0, HEAD_BLOCK)
    inside = there[:, None] & (h < HEAD_DIM)[None, :]
    highest = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)
    for split in range(num_splits):
        partial_row = (split * num_heads + a) * num_tokens + row
        log = tl.load(partial_log_ptr + partial_row, mask=there, other=0.0)
        partial = tl.load(partial_ptr + partial_row[:, None] * HEAD_DIM + h[None, :], mask=inside, other=0.0)
        now = tl.maximum(highest, log)
        weight, factor = tl.exp(log - now), tl.exp(highest - now)
        total = total * factor + weight
        merged = merged * factor[:, None] + partial * weight[:, None]
        highest = now
    output = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    output_ptr += a * output_stride_a + row.to(tl.int64)[:, None] * output_stride_l + h[None, :]
    tl.store(output_ptr, output.to(output_ptr.dtype.element_ty), mask=inside)
    tl.store(log_ptr + a * num_tokens + row, highest + tl.log(total), mask=there)


def _tiles(q_ALH: Tensor, head_block: int) -> Tiles:
    if q_ALH.dtype == torch.float32:
        return _FLOAT32_TILES
    # What may start early is a Hopper or later.
    return (_HOPPER_TILES if starts_early(q_ALH) else _EARLIER_TILES)[head_block]


def positional_attention_triton(
    q_ALH: Tensor, kv_NTH: Tensor, position_L: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`positional_attention_ref` as flash attention; where rows are few, keys are shared out and results merged.

    Raises:
        ValueError: heads have more than `MAX_HEAD_DIM` dimensions.
    """
    num_heads, num_tokens, head_dim = q_ALH.shape
    num_kv_heads, num_keys = kv_NTH.shape[:2]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM} for attention by position, got {head_dim}; "
            "read this model's prompts without reuse"
        )
    _check_shapes(q_ALH, kv_NTH, position_L, scale)
    group = num_heads // num_kv_heads
    head_block = max(16, triton.next_power_of_2(head_dim))
    tiles = _tiles(q_ALH, head_block)
    blocks = triton.cdiv(num_tokens * group, tiles.rows) * num_kv_heads
    splits = max(1, min(_PROGRAMS // max(blocks, 1), triton.cdiv(num_keys, _SPLIT_KEYS)))
    output_ALH, log_AL = _results(q_ALH)
    partial_SALH, partial_log_SAL = output_ALH[None], log_AL[None]
    if splits > 1:
        partial_SALH = torch.empty((splits, *q_ALH.shape), device=q_ALH.device)
        partial_log_SAL = torch.empty((splits, num_heads, num_tokens), device=q_ALH.device)
    _positional_attention_kernel[(blocks, splits)](
        q_ALH,
        kv_NTH,
        position_L,
        partial_SALH,
        partial_log_SAL,
        num_tokens,
        num_keys,
        2 * _LOG2_E * scale / (softcap or 1.0),
        _LOG2_E * (softcap or scale),
        q_ALH.stride(0),
        q_ALH.stride(1),
        kv_NTH.stride(0),
        partial_SALH.stride(0),
        partial_SALH.stride(1),
        partial_SALH.stride(2),
        KV_STRIDE_T=kv_NTH.stride(1),
        KV_STRIDE_2=kv_NTH.stride(2),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if q_ALH.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        _merge_splits_kernel[(triton.cdiv(num_tokens, _MERGED_ROWS), num_heads)](
            partial_SALH,
            partial_log_SAL,
            output_ALH,
            log_AL,
            num_tokens,
            splits,
            output_ALH.stride(0),
            output_ALH.stride(1),
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            ROWS=_MERGED_ROWS,
            num_warps=4,
        )
    return output_ALH, log_AL


def positional_attention(
    q_ALH: Tensor, kv_NTH: Tensor, position_L: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of tokens at given positions over the keys up to each; see `positional_attention_ref`."""
    op = positional_attention_triton if q_ALH.is_cuda else positional_attention_ref
    return op(q_ALH, kv_NTH, position_L, scale=scale, softcap=softcap)
