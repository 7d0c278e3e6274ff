"""Queries against coded keys: the attention mass that each sentence would get, from a few bits per number."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import NUM_PARTS, PARTS, PLACE, PLACE_FIRST, PLACE_LENGTH, Lanes, element_type
from triton_ops.pack_box import SCALE_BYTES, unpack_box
from triton_ops.score_sentences import Scores, scores_of, store_extents

_PROGRAMS = 4224
"""Programs of one warp to aim at: 32 for each multiprocessor of a large GPU."""


def decode_keys_ref(code_TNW: Tensor, box_TN2H: Tensor, *, bits: int) -> Scores:
    """Keys `[T, N, H]` float32 at the centres of their cells; `box_TN2H` is each token's sentence's box."""
    head_dim = box_TN2H.shape[-1]
    parts = [(code_TNW >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    cell = torch.cat(parts, dim=-1)[..., :head_dim].float() + 0.5
    low, high = box_TN2H.float().unbind(dim=2)
    return low + cell * ((high - low) / 2**bits)


def _score_part_ref(
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, scale: float, bits: int, longest: int
) -> Tensor:
    """Logits `[N, G, S]` of one part.

    A decoded number is the middle of its box's lowest cell plus a step for each level, so the box enters once per
    sentence, into the query, and tokens meet it as bare levels.
    """
    head_dim = q_NGH.shape[-1]
    x_NGH = q_NGH.float() * scale
    low_SNH, high_SNH = box_SN2H.float().unbind(dim=2)
    step_SNH = (high_SNH - low_SNH) / 2**bits
    base_SNG = torch.einsum("ngh,snh->sng", x_NGH, low_SNH + 0.5 * step_SNH)
    weight_SNGH = x_NGH * step_SNH[:, :, None]
    place = torch.arange(longest, device=code_TNW.device)
    start_S = length_S.cumsum(0) - length_S
    # Rows past a sentence's end repeat its last one and are left out of the sum.
    code_SMNW = code_TNW[start_S[:, None] + torch.minimum(place, length_S[:, None] - 1)]
    parts = [(code_SMNW >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    level_SMNH = torch.cat(parts, dim=-1)[..., :head_dim].float()
    logit_SNMG = torch.matmul(level_SMNH.transpose(1, 2), weight_SNGH.transpose(2, 3))
    logit_SNMG.masked_fill_((place >= length_S[:, None])[:, None, :, None], -torch.inf)
    return (torch.logsumexp(logit_SNMG, dim=2) + base_SNG).permute(1, 2, 0)


def score_codes_ref(
    q_BAH: Tensor,
    lanes: Lanes,
    layer: int,
    *,
    scale: float,
    bits: int,
    packed_box: bool = False,
    sentence_BNS: Tensor | None = None,
) -> Scores:
    """Scores with the logits log of the sum over a sentence's tokens of exp(scale * q . decoded key).

    Columns of sentences that a lane does not have are -inf.

    Args:
        q_BAH: `[B, A, H]` post-RoPE queries of the A = N * G query heads, those of one KV head adjacent.
        lanes: each lane's tables of this layer are the boxes `[S, N, 2, H]` of its sentences (minimum and maximum of
            their keys) and the codes `[T, N, W]` of their tokens, in order, as `encode_keys` packs them.
        packed_box: boxes are `[S, N, H + 4]`, as `pack_box` packs them.
        sentence_BNS: int32, the sentences to score, rising, padded with -1, a column for each; None: all.
    """
    num_kv_heads = lanes.num_kv_heads
    logit = q_BAH.new_full(
        (q_BAH.shape[0], num_kv_heads, q_BAH.shape[1] // num_kv_heads, lanes.capacity), -torch.inf, dtype=torch.float32
    )
    for b, lane in enumerate(lanes.lanes):
        q_NGH = q_BAH[b].view(num_kv_heads, -1, q_BAH.shape[2])
        for part in lane.parts:
            box, code_TNW = part.tables[layer]
            box_SN2H = unpack_box(box) if packed_box else box
            sentences = slice(part.first, part.first + part.num_sentences)
            length_S = lane.place_S4[sentences, 0].long()
            logit[b, :, :, sentences] = _score_part_ref(
                q_NGH, box_SN2H[: part.num_sentences], code_TNW, length_S, scale, bits, lanes.slot_tokens
            )
    if sentence_BNS is not None:
        index = sentence_BNS.long()[:, :, None].expand(-1, -1, logit.shape[2], -1)
        logit = torch.where(index >= 0, logit.gather(3, index.clamp(min=0)), -torch.inf)
    return scores_of(logit, lanes, sentence_BNS)


@triton.jit
def _query_run(
    q_ptr,
    q_stride_a,
    i,
    scale,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Scaled queries of the group in dimensions `[i * WIDTH, (i + 1) * WIDTH)`, `[GROUP_BLOCK, WIDTH_BLOCK]`."""
    g, w = tl.arange(0, GROUP_BLOCK), tl.arange(0, WIDTH_BLOCK)
    h = i * WIDTH + w
    mask = (g < GROUP)[:, None] & ((w < WIDTH) & (h < HEAD_DIM))[None, :]
    return tl.load(q_ptr + g[:, None] * q_stride_a + h[None, :], mask=mask, other=0.0).to(tl.float32) * scale


@triton.jit
def _score_codes_kernel(
    q_ptr,
    address_ptr,
    count_ptr,
    sentence_ptr,
    logit_ptr,
    extent_ptr,
    scale,
    capacity,
    q_stride_b,
    q_stride_a,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    SOME: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    LONGEST: tl.constexpr,
    DTYPE: tl.constexpr,
    PACKED_BOX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One sentence at a time; a byte holds dimensions WIDTH apart, so each of its fields is a run of dimensions.

    A level's bits, read as a half-precision number, are a subnormal one, 2**24 times too small: no conversion.
    """
    pid, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    address_ptr += b * num_address
    count_ptr += b * num_count
    place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32))
    q_ptr += b.to(tl.int64) * q_stride_b + n * GROUP * q_stride_a
    logit_ptr += (b * NUM_KV_HEADS + n).to(tl.int64) * GROUP * capacity
    g = tl.arange(0, GROUP_BLOCK)
    w = tl.arange(0, WIDTH_BLOCK)
    token = tl.arange(0, LONGEST)
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    wait_for_inputs(EARLY)
    # The queries' runs of dimensions, one for each field of a byte; those past the last field are never used.
    FIELDS: tl.constexpr = 8 // BITS
    x0 = _query_run(q_ptr, q_stride_a, 0, scale, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
    x1 = _query_run(q_ptr, q_stride_a, 1, scale, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
    x2 = _query_run(q_ptr, q_stride_a, 2, scale, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
    x3 = _query_run(q_ptr, q_stride_a, 3, scale, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
    sentence_ptr += (b * NUM_KV_HEADS + n).to(tl.int64) * capacity
    num_parts = tl.load(count_ptr + NUM_PARTS)
    for part in range(num_parts):
        first = tl.load(address_ptr + PARTS + 4 * part)
        count = tl.load(address_ptr + PARTS + 4 * part + 1)
        box_address = tl.load(address_ptr + PARTS + 4 * part + 2)
        box_ptr = tl.multiple_of(box_address.to(tl.pointer_type(DTYPE)), 16)
        byte_ptr = tl.multiple_of(box_address.to(tl.pointer_type(tl.uint8)), 16)
        code_ptr = tl.multiple_of(tl.load(address_ptr + PARTS + 4 * part + 3).to(tl.pointer_type(tl.uint8)), 16)
        num_columns = count
        if SOME:
            num_columns = count * 0 + capacity
        for c in range(pid.to(tl.int64), num_columns, tl.num_programs(0)):
            if SOME:
                # Sentences of other parts have their turn with those.
                column = c
                s = tl.load(sentence_ptr + c).to(tl.int64) - first
                here = (s >= 0) & (s < count)
            else:
                column = first + c
                s = c
                here = s < count
            here_ptr = place_ptr + (first + s) * 4
            length = tl.load(here_ptr + PLACE_LENGTH, mask=here, other=0)
            row = tl.load(here_ptr + PLACE_FIRST, mask=here, other=0).to(tl.int64) + token
            valid = token < length
            code = tl.load(
                code_ptr + ((row * NUM_KV_HEADS + n) * WIDTH)[:, None] + w[None, :],
                mask=valid[:, None] & (w < WIDTH)[None, :],
                other=0,
            ).to(tl.int16)
            low_ptr = box_ptr + (s * NUM_KV_HEADS + n) * (2 * HEAD_DIM)
            if PACKED_BOX:
                box_row = (s * NUM_KV_HEADS + n) * (HEAD_DIM + SCALE_BYTES)
                scales_ptr = (box_address + box_row + HEAD_DIM).to(tl.pointer_type(tl.float16))
                middle_step = tl.load(scales_ptr, mask=here, other=0.0).to(tl.float32)
                largest = tl.load(scales_ptr + 1, mask=here, other=0.0).to(tl.float32)
            base = tl.zeros((GROUP_BLOCK, WIDTH_BLOCK), tl.float32)
            logit = tl.zeros((LONGEST, GROUP_BLOCK), tl.float32)
            for i in tl.static_range(FIELDS):
                h = i * WIDTH + w
                in_head = (w < WIDTH) & (h < HEAD_DIM) & here
                if PACKED_BOX:
                    byte = tl.load(byte_ptr + box_row + h, mask=in_head, other=0).to(tl.int32)
                    half = tl.where(in_head, largest * tl.exp2(-0.5 * (byte >> 4).to(tl.float32)), 0.0)
                    low = tl.where(in_head, ((byte & 15) - 8).to(tl.float32) * middle_step - half, 0.0)
                    step = half * (2.0 / (1 << BITS))
                else:
                    low = tl.load(low_ptr + h, mask=in_head, other=0.0).to(tl.float32)
                    high = tl.load(low_ptr + HEAD_DIM + h, mask=in_head, other=0.0).to(tl.float32)
                    step = (high - low) * (1.0 / (1 << BITS))
                if i == 0:
                    x = x0
                elif i == 1:
                    x = x1
                elif i == 2:
                    x = x2
                elif i == 3:
                    x = x3
                else:
                    x = _query_run(q_ptr, q_stride_a, i, scale, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
                base += x * (low + 0.5 * step)[None, :]
                # The weights' rounding is far below the codes' own.
                weight = tl.minimum(tl.maximum(x * step[None, :], -65504.0), 65504.0).to(tl.float16)
                level = ((code >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float16, bitcast=True)
                logit = tl.dot(level, tl.trans(weight), logit)
            logit = tl.where(valid[:, None], logit * 16777216.0, float("-inf"))
            highest = tl.where(here, tl.max(logit, axis=0), 0.0)
            mass = tl.log(tl.sum(tl.exp(logit - highest[None, :]), axis=0)) + highest + tl.sum(base, axis=1)
            tl.store(logit_ptr + g * capacity + column, mass, mask=(g < GROUP) & here)
            mass = tl.where(here, mass, float("-inf"))
            now = tl.maximum(top, mass)
            safe = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp(top - safe) + tl.exp(mass - safe)
            top = now
    store_extents(extent_ptr, top, total, (b * NUM_KV_HEADS + n).to(tl.int64), GROUP, GROUP_BLOCK)


def score_codes_triton(
    q_BAH: Tensor,
    lanes: Lanes,
    layer: int,
    *,
    scale: float,
    bits: int,
    packed_box: bool = False,
    sentence_BNS: Tensor | None = None,
) -> Scores:
    """Logits of sentences from coded keys, by one kernel; columns past a lane's sentences hold anything."""
    num_kv_heads = lanes.num_kv_heads
    batch, num_heads, head_dim = q_BAH.shape
    group = num_heads // num_kv_heads
    assert q_BAH.stride(2) == 1
    capacity = lanes.capacity if sentence_BNS is None else sentence_BNS.shape[2]
    logit = torch.empty((batch, num_kv_heads, group, capacity), dtype=torch.float32, device=q_BAH.device)
    address_rows = lanes.address_rows(layer)
    width = triton.cdiv(head_dim, 8 // bits)
    programs = min(capacity, max(1, _PROGRAMS // (num_kv_heads * batch)))
    extent = torch.empty((*logit.shape[:3], programs, 2), dtype=torch.float32, device=q_BAH.device)
    early = starts_early(q_BAH)
    _score_codes_kernel[(programs, num_kv_heads, batch)](
        q_BAH,
        address_rows,
        lanes.count_of,
        lanes.count_of if sentence_BNS is None else sentence_BNS,
        logit,
        extent,
        scale,
        capacity,
        q_BAH.stride(0),
        q_BAH.stride(1),
        address_rows.stride(0),
        lanes.count_of.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        SOME=sentence_BNS is not None,
        GROUP=group,
        GROUP_BLOCK=max(8, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BITS=bits,
        WIDTH=width,
        WIDTH_BLOCK=max(16, triton.next_power_of_2(width)),
        LONGEST=max(16, triton.next_power_of_2(lanes.slot_tokens)),
        DTYPE=element_type(q_BAH.dtype),
        PACKED_BOX=packed_box,
        EARLY=early,
        num_warps=1,
        **launch_options(early),
    )
    return Scores(logit, extent, sentence_BNS)


def score_codes(
    q_BAH: Tensor,
    lanes: Lanes,
    layer: int,
    *,
    scale: float,
    bits: int,
    packed_box: bool = False,
    sentence_BNS: Tensor | None = None,
) -> Scores:
    """Logits of sentences from coded keys; see `score_codes_ref`."""
    op = score_codes_triton if q_BAH.is_cuda else score_codes_ref
    return op(q_BAH, lanes, layer, scale=scale, bits=bits, packed_box=packed_box, sentence_BNS=sentence_BNS)
