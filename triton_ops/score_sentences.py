"""Queries against sentence summaries: how much each query head wants each sentence."""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import NUM_PARTS, NUM_SENTENCES, PARTS, PLACE, PLACE_LENGTH, Lanes, element_type
from triton_ops.pack_box import LARGEST_EXTENT, MIDDLES, SCALE_BYTES, packed_dim, unpack_box

Spread = Literal["square", "abs", "range"]

VARIANCE_OF_RANGE = 1 / 14
"""Variance of about twenty Gaussian numbers, as a share of their squared range: a range of 3.74 standard deviations."""


class Scores(NamedTuple):
    """How much each query head wants each sentence, as a log of mass, up to a constant of the head.

    `logit_BNGS`: float32, S the capacity of the lanes. `extent_BNGX2`: float32, for each of X shares of a lane's
    sentences, the highest logit and the sum of `exp(logit - highest)`: together the normalisers of a softmax.
    `sentence_BNS`: int32, the sentences that the columns are, rising, then -1, where not all were scored; None: column
    s is sentence s.
    """

    logit_BNGS: Tensor
    extent_BNGX2: Tensor
    sentence_BNS: Tensor | None = None


def scores_of(logit_BNGS: Tensor, lanes: Lanes, sentence_BNS: Tensor | None = None) -> Scores:
    """Scores from logits alone."""
    if sentence_BNS is not None:
        masked = logit_BNGS.masked_fill((sentence_BNS < 0)[:, :, None], -torch.inf)
        return Scores(logit_BNGS, _extents(masked), sentence_BNS)
    masked = logit_BNGS.masked_fill(
        torch.arange(lanes.capacity, device=logit_BNGS.device)
        >= lanes.count_of[:, NUM_SENTENCES.value, None, None, None],
        -torch.inf,
    )
    return Scores(logit_BNGS, _extents(masked))


def _extents(masked_BNGS: Tensor) -> Tensor:
    top = masked_BNGS.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    return torch.stack([top, (masked_BNGS - top).exp().sum(-1, keepdim=True)], dim=-1)


_BLOCK = 64
"""Sentences that a program scores at a time; twice as many where that is all it has to do, and still leaves two
programs for each multiprocessor."""
_PROGRAMS = 528
"""Programs to aim at: four for each multiprocessor of a large GPU."""


def score_sentences_ref(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, spread: Spread | None, log_length: bool
) -> Scores:
    """Scores with the logits `x . plane0 + f(x) . plane1 + log(tokens)`, with `x = scale * q`.

    Columns of sentences that a lane does not have are -inf.

    Args:
        q_BAH: `[B, A, H]` post-RoPE queries of the A = N * G query heads, those of one KV head adjacent.
        lanes: each lane's first table of this layer is `[S, N, P, H]`, with P planes.
        spread: `f`, the element-wise `square` or absolute value (`abs`); None: there is one plane. `range`: the table
            is of boxes `[S, N, P + 4]`, as `pack_box` packs them; the logit is `x . mean + 1/2 x^2 . variance`, with
            the middle for the mean, and for the variance that of Gaussian numbers of such a range.
        log_length: whether the last term is there.
    """
    num_kv_heads = lanes.num_kv_heads
    logit = q_BAH.new_full(
        (q_BAH.shape[0], num_kv_heads, q_BAH.shape[1] // num_kv_heads, lanes.capacity), -torch.inf, dtype=torch.float32
    )
    for b, lane in enumerate(lanes.lanes):
        x_NGH = q_BAH[b].float().view(num_kv_heads, -1, q_BAH.shape[2]) * scale
        for part in lane.parts:
            planes = part.tables[layer][0][: part.num_sentences]
            if spread == "range":
                low, high = unpack_box(planes, q_BAH.shape[2]).unbind(dim=2)
                planes = torch.stack([(low + high) / 2, (high - low).square() * (VARIANCE_OF_RANGE / 2)], dim=2)
            planes = planes.float()
            part_NGS = torch.einsum("ngh,snh->ngs", x_NGH, planes[:, :, 0])
            if spread is not None:
                spread_NGH = x_NGH.abs() if spread == "abs" else x_NGH.square()
                part_NGS += torch.einsum("ngh,snh->ngs", spread_NGH, planes[:, :, 1])
            sentences = slice(part.first, part.first + part.num_sentences)
            if log_length:
                part_NGS += lane.place_S4[sentences, 0].float().log()
            logit[b, :, :, sentences] = part_NGS
    return scores_of(logit, lanes)


HALF_VARIANCE = tl.constexpr(VARIANCE_OF_RANGE / 2 * (2 / LARGEST_EXTENT.value) ** 2)
"""Of a range of one unit of half extents on either side, for a largest one of 1."""


@triton.jit
def store_extents(extent_ptr, top, total, head, share, num_shares, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """A program's share of `Scores.extent_BNGX2`."""
    g = tl.arange(0, GROUP_BLOCK)
    extent_ptr += ((head * GROUP + g) * num_shares + share) * 2
    tl.store(extent_ptr, top, mask=g < GROUP)
    tl.store(extent_ptr + 1, total, mask=g < GROUP)


@triton.jit
def _score_sentences_kernel(
    q_ptr,
    address_ptr,
    count_ptr,
    logit_ptr,
    extent_ptr,
    scale,
    capacity,
    q_stride_b,
    q_stride_a,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BOX_DIM: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SQUARE: tl.constexpr,
    RANGE: tl.constexpr,
    LOG_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Products of tables and queries are exact: both are as they came. The square of a scaled query is no number of the
    tables' precision; it goes in two parts, its rounding and the rest. Middles and extents of packed boxes are small
    integers until their products are scaled."""
    pid, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    address_ptr += b * num_address
    count_ptr += b * num_count
    place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32))
    num_parts = tl.load(count_ptr + NUM_PARTS)
    q_ptr += b.to(tl.int64) * q_stride_b + n * GROUP * q_stride_a
    logit_ptr += (b * NUM_KV_HEADS + n).to(tl.int64) * GROUP * capacity
    h = tl.arange(0, HEAD_BLOCK)
    in_head = h < HEAD_DIM
    g = tl.arange(0, GROUP_BLOCK)
    in_group = g < GROUP
    wait_for_inputs(EARLY)
    q = tl.load(q_ptr + g[None, :] * q_stride_a + h[:, None], mask=in_group[None, :] & in_head[:, None], other=0.0)
    if SQUARE:
        x = q.to(tl.float32) * scale
        square = tl.minimum(x * x, 65504.0)
        spread = square.to(DTYPE)
        rest = (square - spread.to(tl.float32)).to(DTYPE)
    else:
        spread = tl.abs(q)
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    for part in range(num_parts):
        first = tl.load(address_ptr + PARTS + 4 * part)
        count = tl.load(address_ptr + PARTS + 4 * part + 1)
        address = tl.load(address_ptr + PARTS + 4 * part + 2)
        table_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        box_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 4)
        for block in range(pid.to(tl.int64), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            s = block * BLOCK + tl.arange(0, BLOCK)
            there = s < count
            mask = there[:, None] & in_head[None, :]
            if RANGE:
                row = (s * NUM_KV_HEADS + n) * (BOX_DIM + SCALE_BYTES)
                pair = 2 * (h % (BOX_DIM // 2)) + h // (BOX_DIM // 2)
                box = tl.load(box_ptr + row[:, None] + pair[None, :], mask=mask, other=0)
                scale_ptr = (box_ptr + row + BOX_DIM).to(tl.pointer_type(tl.float16))
                step = tl.load(scale_ptr, mask=there, other=0.0).to(tl.float32)
                largest = tl.load(scale_ptr + 1, mask=there, other=0.0).to(tl.float32)
                plane0 = ((box & 15).to(tl.int32) - (MIDDLES + 1)).to(tl.float32).to(DTYPE)
                extent = ((box >> 4).to(tl.int16) << 9).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**14
                plane1 = (extent * extent).to(DTYPE)
            else:
                rows = table_ptr + ((s * NUM_KV_HEADS + n) * (NUM_PLANES * HEAD_DIM))[:, None] + h[None, :]
                plane0 = tl.load(rows, mask=mask, other=0.0)
                if NUM_PLANES == 2:
                    plane1 = tl.load(rows + HEAD_DIM, mask=mask, other=0.0)
            logit = tl.dot(plane0, q, input_precision=PRECISION) * scale
            if RANGE:
                logit *= step[:, None]
            if NUM_PLANES == 2:
                if SQUARE:
                    second = tl.dot(plane1, rest, input_precision=PRECISION)
                    second = tl.dot(plane1, spread, second, input_precision=PRECISION)
                    if RANGE:
                        second *= (largest * largest * HALF_VARIANCE)[:, None]
                    logit += second
                else:
                    logit += tl.dot(plane1, spread, input_precision=PRECISION) * scale
            if LOG_LENGTH:
                tokens = tl.load(place_ptr + (first + s) * 4 + PLACE_LENGTH, mask=there, other=1)
                logit += tl.log(tokens.to(tl.float32))[:, None]
            tl.store(
                logit_ptr + g[None, :] * capacity + (first + s)[:, None], logit, mask=there[:, None] & in_group[None, :]
            )
            logit = tl.where(there[:, None], logit, float("-inf"))
            now = tl.maximum(top, tl.max(logit, axis=0))
            total = total * tl.exp(top - now) + tl.sum(tl.exp(logit - now[None, :]), axis=0)
            top = now
    head = (b * NUM_KV_HEADS + n).to(tl.int64)
    store_extents(extent_ptr, top, total, head, pid, tl.num_programs(0), GROUP, GROUP_BLOCK)


def score_sentences_triton(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, spread: Spread | None, log_length: bool
) -> Scores:
    """Logits of sentences from their summaries, by one kernel; columns past a lane's sentences hold anything."""
    num_kv_heads = lanes.num_kv_heads
    batch, num_heads, head_dim = q_BAH.shape
    assert q_BAH.stride(2) == 1
    logit = torch.empty(
        (batch, num_kv_heads, num_heads // num_kv_heads, lanes.capacity), dtype=torch.float32, device=q_BAH.device
    )
    address_rows = lanes.address_rows(layer)
    block = _BLOCK
    if _PROGRAMS // 2 <= triton.cdiv(lanes.capacity, 2 * _BLOCK) * num_kv_heads * batch <= _PROGRAMS:
        block = 2 * _BLOCK
    programs = min(triton.cdiv(lanes.capacity, block), max(1, _PROGRAMS // (num_kv_heads * batch)))
    extent = torch.empty((*logit.shape[:3], programs, 2), dtype=torch.float32, device=q_BAH.device)
    early = starts_early(q_BAH)
    _score_sentences_kernel[(programs, num_kv_heads, batch)](
        q_BAH,
        address_rows,
        lanes.count_of,
        logit,
        extent,
        scale,
        lanes.capacity,
        q_BAH.stride(0),
        q_BAH.stride(1),
        address_rows.stride(0),
        lanes.count_of.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        GROUP_BLOCK=max(8, triton.next_power_of_2(num_heads // num_kv_heads)),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BOX_DIM=packed_dim(head_dim),
        NUM_PLANES=1 if spread is None else 2,
        SQUARE=spread in ("square", "range"),
        RANGE=spread == "range",
        LOG_LENGTH=log_length,
        BLOCK=block,
        PRECISION="ieee" if q_BAH.dtype == torch.float32 else "tf32",
        DTYPE=element_type(q_BAH.dtype),
        EARLY=early,
        num_warps=4,
        num_stages=1,
        **launch_options(early),
    )
    return Scores(logit, extent)


def score_sentences(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, spread: Spread | None, log_length: bool
) -> Scores:
    """Logits of sentences from their summaries; see `score_sentences_ref`."""
    op = score_sentences_triton if q_BAH.is_cuda else score_sentences_ref
    return op(q_BAH, lanes, layer, scale=scale, spread=spread, log_length=log_length)
