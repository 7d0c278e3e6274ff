"""Queries against coded keys: the attention mass that each sentence would get, from a few bits per number."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import NUM_PARTS, PARTS, PLACE, PLACE_FIRST, PLACE_LENGTH, Lanes
from triton_ops.pack_box import LARGEST_EXTENT, MIDDLES, SCALE_BYTES, WORD_BITS, packed_dim, unpack_box
from triton_ops.score_sentences import Scores, scores_of, store_extents

_BLOCK = tl.constexpr(16)
"""Sentences that a program has in turn."""
_PROGRAMS = 2640
"""Programs of one warp at most: 20 for each multiprocessor of a large GPU, what its registers have room for."""
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_MANTISSA = 10
"""Bits of a half-precision number below its exponent."""
_QUERY_EXPONENT = tl.constexpr(12)
"""Of the largest number of a head's queries, as the kernel scales them."""


def decode_keys_ref(code_TNW: Tensor, box_TN2H: Tensor, *, bits: int) -> Tensor:
    """Keys `[T, N, H]` float32 at the centres of their cells; `box_TN2H` is each token's sentence's box."""
    low, high = box_TN2H.float().unbind(dim=2)
    return low + (_levels_ref(code_TNW, bits)[..., : low.shape[-1]] + 0.5) * ((high - low) / 2**bits)


def _levels_ref(code_W: Tensor, bits: int) -> Tensor:
    """Levels `[..., P]` float32 of words `[..., W]`."""
    return torch.cat([(code_W >> (bits * i)) & (2**bits - 1) for i in range(WORD_BITS.value // bits)], dim=-1).float()


def _score_part_ref(
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, scale: float, bits: int, longest: int
) -> Tensor:
    """Logits `[N, G, S]` of one part.

    A decoded number is the middle of its box's lowest cell plus a step for each level, so the box enters once per
    sentence, into the query, and tokens meet it as bare levels.
    """
    x_NGH = q_NGH.float() * scale
    low_SNH, high_SNH = box_SN2H.float().unbind(dim=2)
    step_SNH = (high_SNH - low_SNH) / 2**bits
    base_SNG = torch.einsum("ngh,snh->sng", x_NGH, low_SNH + 0.5 * step_SNH)
    weight_SNGH = x_NGH * step_SNH[:, :, None]
    place = torch.arange(longest, device=code_TNW.device)
    start_S = length_S.cumsum(0) - length_S
    # Rows past a sentence's end repeat its last one and are left out of the sum.
    code_SMNW = code_TNW[start_S[:, None] + torch.minimum(place, length_S[:, None] - 1)]
    level_SMNH = _levels_ref(code_SMNW, bits)[..., : q_NGH.shape[2]]
    logit_SNMG = torch.matmul(level_SMNH.transpose(1, 2), weight_SNGH.transpose(2, 3))
    logit_SNMG.masked_fill_((place >= length_S[:, None])[:, None, :, None], -torch.inf)
    return (torch.logsumexp(logit_SNMG, dim=2) + base_SNG).permute(1, 2, 0)


def score_codes_ref(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, bits: int, sentence_BNS: Tensor | None = None
) -> Scores:
    """Scores with the logits log of the sum over a sentence's tokens of exp(scale * q . decoded key).

    Columns of sentences that a lane does not have are -inf.

    Args:
        q_BAH: `[B, A, H]` post-RoPE queries of the A = N * G query heads, those of one KV head adjacent.
        lanes: each lane's tables of this layer are the boxes `[S, N, P + 4]` of its sentences, around
            their keys, as `pack_box` packs them, and the codes `[T, N, W]` of their tokens, in order, as `encode_keys`
            packs them.
        sentence_BNS: int32, the sentences to score, rising, padded with -1, a column for each; None: all.
    """
    num_kv_heads = lanes.num_kv_heads
    logit = q_BAH.new_full(
        (q_BAH.shape[0], num_kv_heads, q_BAH.shape[1] // num_kv_heads, lanes.capacity), -torch.inf, dtype=torch.float32
    )
    for b, lane in enumerate(lanes.lanes):
        q_NGH = q_BAH[b].view(num_kv_heads, -1, q_BAH.shape[2])
        for part in lane.parts:
            packed_SNW, code_TNW = part.tables[layer]
            sentences = slice(part.first, part.first + part.num_sentences)
            length_S = lane.place_S4[sentences, 0].long()
            box_SN2H = unpack_box(packed_SNW[: part.num_sentences], q_BAH.shape[2])
            logit[b, :, :, sentences] = _score_part_ref(
                q_NGH, box_SN2H, code_TNW, length_S, scale, bits, lanes.slot_tokens
            )
    if sentence_BNS is not None:
        index = sentence_BNS.long()[:, :, None].expand(-1, -1, logit.shape[2], -1)
        logit = torch.where(index >= 0, logit.gather(3, index.clamp(min=0)), -torch.inf)
    return scores_of(logit, lanes, sentence_BNS)


@triton.jit
def _bits(word, DOWN: tl.constexpr, MASK: tl.constexpr, IN_PAIRS: tl.constexpr):
    """`(word >> DOWN) & MASK` of 16-bit words; a negative DOWN is up.

    Two at a time, which the compiler does not find: what crosses from one to the other is masked away.
    """
    if IN_PAIRS:
        if DOWN > 0:
            word = tl.inline_asm_elementwise(
                f"shr.b32 $0, $1, {DOWN};", "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2
            )
        elif DOWN < 0:
            word = tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {-DOWN};", "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2
            )
        word = tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {MASK * 65537};", "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2
        )
    elif DOWN >= 0:
        word = (word >> DOWN) & MASK
    else:
        word = (word << -DOWN) & MASK
    return word.to(tl.float16, bitcast=True)


@triton.jit
def _load_queries(
    q_ptr,
    q_stride_a,
    i,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """The group's queries in dimensions `[i * WIDTH, (i + 1) * WIDTH)`, float32 `[WIDTH_BLOCK, GROUP_BLOCK]`."""
    g, w = tl.arange(0, GROUP_BLOCK), tl.arange(0, WIDTH_BLOCK)
    h = i * WIDTH + w
    mask = ((w < WIDTH) & (h < HEAD_DIM))[:, None] & (g < GROUP)[None, :]
    return tl.load(q_ptr + h[:, None] + g[None, :] * q_stride_a, mask=mask, other=0.0).to(tl.float32)


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
    FIELDS: tl.constexpr,
    ROOM: tl.constexpr,
    LONGEST: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Blocks of sentences: what their boxes alone give, then the codes of one after another.

    Nothing is converted: an integer of ten bits, read as a half-precision number, is a subnormal one, 2**24 times too
    small, and stays proportional to its field wherever that is. A word of codes holds dimensions WIDTH apart, so each
    of its fields is a run of dimensions; ROOM of them fit a mantissa, the others are moved down to its start. Logits
    are in base 2 until they are stored.
    """
    n, pid, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pid, programs = pid.to(tl.int64), tl.num_programs(1)
    address_ptr += b * num_address
    count_ptr += b * num_count
    place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32))
    head = (b * NUM_KV_HEADS + n).to(tl.int64)
    q_ptr += b.to(tl.int64) * q_stride_b + n * GROUP * q_stride_a
    logit_ptr += head * GROUP * capacity
    sentence_ptr += head * capacity
    g = tl.arange(0, GROUP_BLOCK)
    w = tl.arange(0, WIDTH_BLOCK)
    token = tl.arange(0, LONGEST)
    in_block = tl.arange(0, _BLOCK)
    HALF_FIELDS: tl.constexpr = FIELDS // 2
    HIGHEST: tl.constexpr = (ROOM - 1) * BITS
    LEVELS: tl.constexpr = 1 << BITS
    HALF_DIM: tl.constexpr = WIDTH * HALF_FIELDS
    BOX_WORDS: tl.constexpr = HALF_DIM + SCALE_BYTES // 2
    # Masks cost registers and instructions that the usual shapes have no need of.
    MASKED: tl.constexpr = SOME or WIDTH != WIDTH_BLOCK
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    wait_for_inputs(EARLY)
    queries = ()
    largest_query = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(FIELDS):
        query = _load_queries(q_ptr, q_stride_a, i, GROUP, GROUP_BLOCK, HEAD_DIM, WIDTH, WIDTH_BLOCK)
        largest_query = tl.maximum(largest_query, tl.max(tl.abs(query)))
        queries = queries + (query,)  # type: ignore[assignment] # noqa: RUF005 Triton's tuples
    # The power of two that brings the largest to where half precision has room on either side.
    exponent = (largest_query.to(tl.int32, bitcast=True) >> 23) & 255
    factor = tl.minimum(tl.maximum(-exponent + (254 + _QUERY_EXPONENT), 1), 254)
    factor = (factor << 23).to(tl.float32, bitcast=True)
    scaled = ()
    query_sum = tl.zeros((GROUP_BLOCK,), tl.float32)
    for i in tl.static_range(FIELDS):
        query = (queries[i] * factor).to(tl.float16)
        scaled = scaled + (query,)  # type: ignore[assignment] # noqa: RUF005 Triton's tuples
        query_sum += tl.sum(query.to(tl.float32), axis=0)
    # What undoes the scales of queries, of extents and middles in units, and of bits read as numbers.
    of_query = scale * _LOG2_E / factor
    of_middles = of_query * 2.0**24
    of_extents = of_query * (2.0**14 / LARGEST_EXTENT * (LEVELS - 1) / LEVELS)
    of_levels = of_query * (2.0**14 / LARGEST_EXTENT * 2 / LEVELS * 2.0**24 / (1 << HIGHEST))
    num_parts = tl.load(count_ptr + NUM_PARTS)
    for part in range(num_parts):
        first = tl.load(address_ptr + PARTS + 4 * part)
        count = tl.load(address_ptr + PARTS + 4 * part + 1)
        box_address = tl.load(address_ptr + PARTS + 4 * part + 2)
        box_ptr = tl.multiple_of(box_address.to(tl.pointer_type(tl.int16)), 4)
        scale_ptr = tl.multiple_of(box_address.to(tl.pointer_type(tl.float16)), 4) + HALF_DIM
        code_ptr = tl.multiple_of(tl.load(address_ptr + PARTS + 4 * part + 3).to(tl.pointer_type(tl.int16)), 16)
        num_columns = count
        if SOME:
            num_columns = count * 0 + capacity
        # Columns a grid apart, so that all programs have as many, to within one.
        num_mine = tl.cdiv(num_columns - pid, programs)
        for start in range(0, num_mine, _BLOCK):
            c = pid + (start + in_block) * programs
            s = c
            if SOME:
                # Sentences of other parts have their turn with those.
                s = tl.load(sentence_ptr + c, mask=c < capacity, other=-1).to(tl.int64) - first
            here = (s >= 0) & (s < count)
            box_row = (s * NUM_KV_HEADS + n) * BOX_WORDS
            middle_step = tl.load(scale_ptr + box_row, mask=here, other=0.0).to(tl.float32)
            largest = tl.load(scale_ptr + box_row + 1, mask=here, other=0.0).to(tl.float32)
            middles = tl.zeros((_BLOCK, GROUP_BLOCK), tl.float32)
            extents = tl.zeros((_BLOCK, GROUP_BLOCK), tl.float32)
            for i in tl.static_range(FIELDS):
                boxes_ptr = box_ptr + box_row[:, None] + (i % HALF_FIELDS * WIDTH + w)[None, :]
                boxes = tl.load(boxes_ptr, mask=here[:, None] & (w < WIDTH)[None, :], other=0)
                middles = tl.dot(_bits(boxes, i // HALF_FIELDS * 8, 15, IN_PAIRS), scaled[i], middles)
                extents = tl.dot(_bits(boxes, i // HALF_FIELDS * 8 - 5, 0x1E00, IN_PAIRS), scaled[i], extents)
            middles = middles * of_middles - (query_sum * (of_query * (MIDDLES + 1.0)))[None, :]
            base = middle_step[:, None] * middles - (largest * of_extents)[:, None] * extents
            highs = tl.zeros((_BLOCK, GROUP_BLOCK), tl.float32)
            sums = tl.full((_BLOCK, GROUP_BLOCK), 1.0, tl.float32)
            for j in range(tl.minimum(num_mine - start, _BLOCK)):
                sentence = pid + (start + j) * programs
                if SOME:
                    sentence = tl.load(sentence_ptr + sentence).to(tl.int64) - first
                known = (sentence >= 0) & (sentence < count)
                here_ptr = place_ptr + (first + sentence) * 4
                if SOME:
                    length = tl.load(here_ptr + PLACE_LENGTH, mask=known, other=0)
                    row = tl.load(here_ptr + PLACE_FIRST, mask=known, other=0)
                else:
                    length = tl.load(here_ptr + PLACE_LENGTH)
                    row = tl.load(here_ptr + PLACE_FIRST)
                valid = (token < length)[:, None]
                code_rows = ((row.to(tl.int64) + token) * NUM_KV_HEADS + n) * WIDTH
                mask = valid
                if MASKED:
                    mask &= (w < WIDTH)[None, :]
                code = tl.load(code_ptr + code_rows[:, None] + w[None, :], mask=mask, other=0)
                sentence_box = (sentence * NUM_KV_HEADS + n) * BOX_WORDS
                if SOME:
                    unit = tl.load(scale_ptr + sentence_box + 1, mask=known, other=0.0)
                else:
                    unit = tl.load(scale_ptr + sentence_box + 1)
                logit = tl.zeros((LONGEST, GROUP_BLOCK), tl.float32)
                for i in tl.static_range(FIELDS):
                    row_ptr = box_ptr + sentence_box + (i % HALF_FIELDS * WIDTH + w)
                    box = tl.load(row_ptr, mask=known & (w < WIDTH), other=0) if MASKED else tl.load(row_ptr)
                    weight = scaled[i] * _bits(box, i // HALF_FIELDS * 8 - 5, 0x1E00, IN_PAIRS)[:, None]
                    if i % ROOM != ROOM - 1:
                        weight *= 2.0 ** (HIGHEST - i % ROOM * BITS)
                    level = _bits(code, i // ROOM * ROOM * BITS, (LEVELS - 1) << (i % ROOM * BITS), IN_PAIRS)
                    logit = tl.dot(level, weight, logit)
                logit = tl.where(valid, logit * (unit.to(tl.float32) * of_levels), float("-inf"))
                high = tl.max(logit, axis=0)
                if SOME:
                    high = tl.where(known, high, 0.0)
                # Logarithms are for all of a block at once.
                this = (in_block == j)[:, None]
                highs = tl.where(this, high[None, :], highs)
                sums = tl.where(this, tl.sum(tl.exp2(logit - high[None, :]), axis=0)[None, :], sums)
            logit = base + highs + tl.log2(sums)
            column = c
            if not SOME:
                column += first
            stored = (g < GROUP)[None, :] & here[:, None]
            tl.store(logit_ptr + g[None, :] * capacity + column[:, None], logit * _LN_2, mask=stored)
            logit = tl.where(here[:, None], logit, float("-inf"))
            now = tl.maximum(top, tl.max(logit, axis=0))
            safe = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(logit - safe[None, :]), axis=0)
            top = now
    store_extents(extent_ptr, top * _LN_2, total, head, pid, programs, GROUP, GROUP_BLOCK)


def score_codes_triton(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, bits: int, sentence_BNS: Tensor | None = None
) -> Scores:
    """Logits of sentences from coded keys, by one kernel; columns past a lane's sentences hold anything."""
    num_kv_heads = lanes.num_kv_heads
    batch, num_heads, head_dim = q_BAH.shape
    group = num_heads // num_kv_heads
    assert q_BAH.stride(2) == 1
    assert sentence_BNS is None or (sentence_BNS.is_contiguous() and sentence_BNS.dtype == torch.int32)
    capacity = lanes.capacity if sentence_BNS is None else sentence_BNS.shape[2]
    logit = torch.empty((batch, num_kv_heads, group, capacity), dtype=torch.float32, device=q_BAH.device)
    address_rows = lanes.address_rows(layer)
    width = packed_dim(head_dim) * bits // WORD_BITS.value
    programs = min(capacity, max(1, _PROGRAMS // (num_kv_heads * batch)))
    extent = torch.empty((*logit.shape[:3], programs, 2), dtype=torch.float32, device=q_BAH.device)
    early = starts_early(q_BAH)
    _score_codes_kernel[(num_kv_heads, programs, batch)](
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
        FIELDS=WORD_BITS.value // bits,
        ROOM=_MANTISSA // bits,
        LONGEST=max(16, triton.next_power_of_2(lanes.slot_tokens)),
        IN_PAIRS=not triton.knobs.runtime.interpret,
        EARLY=early,
        num_warps=1,
        num_stages=1,
        **launch_options(early),
    )
    return Scores(logit, extent, sentence_BNS)


def score_codes(
    q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, bits: int, sentence_BNS: Tensor | None = None
) -> Scores:
    """Logits of sentences from coded keys; see `score_codes_ref`."""
    op = score_codes_triton if q_BAH.is_cuda else score_codes_ref
    return op(q_BAH, lanes, layer, scale=scale, bits=bits, sentence_BNS=sentence_BNS)
