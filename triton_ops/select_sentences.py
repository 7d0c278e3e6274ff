"""The best sentences within a token budget."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.lanes import MAX_SELECTED, NUM_SENTENCES, PLACE, PLACE_LENGTH, Lanes

Group = Literal["max", "mean"]

_ONE_BLOCK = 16384
"""Up to so many sentences, a program keeps all scores in registers."""
_BLOCK = 8192
"""Beyond, it goes over them in blocks of so many."""


def group_scores(logit_NGS: Tensor, *, group: Group) -> Tensor:
    """One score per KV head and sentence, `[N, S]` float32, from the logits of the query heads that share it.

    Logits become shares by a softmax over all sentences for each query head, then the group takes their maximum (or
    mean): were the raw maximum taken, one head with large logits would decide for all. Scores are logs of shares.
    """
    share_NGS = torch.log_softmax(logit_NGS.float(), dim=-1)
    return share_NGS.amax(dim=1) if group == "max" else share_NGS.exp().mean(dim=1).log()


def best_that_fit(score_NS: Tensor, length_S: Tensor, *, room_tokens: int, max_selected: int) -> Tensor:
    """Bool `[N, S]`: the longest run of best-scored sentences, at most `max_selected`, that fits `room_tokens`.

    Sentences are ranked by falling score, ties by rising id. They are taken in that order until the next would exceed
    the budget: a worse sentence never gets in because it is short. A score of -inf is never selected.
    """
    score, rank = torch.sort(score_NS, dim=-1, descending=True, stable=True)
    fits = (length_S[rank].cumsum(dim=-1) <= room_tokens) & (score > -torch.inf)
    fits[:, max_selected:] = False
    return torch.zeros_like(fits).scatter_(1, rank, fits)


def select_sentences_ref(logit_BNGS: Tensor, lanes: Lanes, *, group: Group, room_tokens: int) -> Tensor:
    """Ids of the chosen sentences, int32 `[B, N, K]`, rising, padded with -1; see `best_that_fit`.

    K is the lanes' `most_selected`; no lane selects more than its own `max_selected`.

    Args:
        logit_BNGS: float32, no NaN; columns that are no sentence of a lane are not looked at.
    """
    batch, num_kv_heads = logit_BNGS.shape[:2]
    selected = torch.full((batch, num_kv_heads, lanes.most_selected), -1, dtype=torch.int32, device=logit_BNGS.device)
    for b, lane in enumerate(lanes.lanes):
        if lane.num_sentences == 0:
            continue
        score_NS = group_scores(logit_BNGS[b, :, :, : lane.num_sentences], group=group)
        length_S = lane.place_S4[: lane.num_sentences, 0].long()
        chosen = best_that_fit(score_NS, length_S, room_tokens=room_tokens, max_selected=lane.max_selected)
        head, sentence = chosen.nonzero(as_tuple=True)
        place = chosen.long().cumsum(dim=1)[head, sentence] - 1
        selected[b, head, place] = sentence.int()
    return selected


@triton.jit
def _sum_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _score_key(logit_ptr, capacity, s, there, norm, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, MAX: tl.constexpr):
    """Integers in the order of the group's scores; the smallest for what is no sentence or has score -inf."""
    g_of = tl.arange(0, GROUP_BLOCK)
    score = tl.full(s.shape, float("-inf"), tl.float32)
    if not MAX:
        score = tl.zeros(s.shape, tl.float32)
    for g in tl.static_range(GROUP):
        norm_g = tl.sum(tl.where(g_of == g, norm, 0.0))
        share = tl.load(logit_ptr + g * capacity + s, mask=there, other=float("-inf")) - norm_g
        if MAX:
            score = tl.maximum(score, share)
        else:
            score += tl.exp(share)
    # -0.0 and 0.0 are one score.
    bits = (score + 0.0).to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    nothing = score == float("-inf") if MAX else score == 0.0
    return tl.where(there & (nothing == 0), key, -0x80000000)


@triton.jit
def _normalisers(
    logit_ptr, capacity, num_sentences, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """Log of the sum of exponentials of each query head's logits, `[GROUP_BLOCK]`."""
    g_of = tl.arange(0, GROUP_BLOCK)
    norm = tl.zeros((GROUP_BLOCK,), tl.float32)
    for g in tl.static_range(GROUP):
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, num_sentences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            logit = tl.load(logit_ptr + g * capacity + s, mask=s < num_sentences, other=float("-inf"))
            now = tl.maximum(highest, tl.max(logit, axis=0))
            now = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp(highest - now) + tl.sum(tl.exp(logit - now), axis=0)
            highest = now
        norm = tl.where(g_of == g, highest + tl.log(tl.maximum(total, 1e-38)), norm)
    return norm


@triton.jit
def _measure(key_ptr, place_ptr, threshold, num_sentences, key0, length0, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens and number of sentences with keys from the threshold on."""
    if ONE_BLOCK:
        taken = key0 >= threshold
        tokens, count = tl.reduce((tl.where(taken, length0, 0), taken.to(tl.int32)), 0, _sum_pairs)
    else:
        tokens = tl.zeros((), tl.int32)
        count = tl.zeros((), tl.int32)
        for start in range(0, num_sentences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            there = s < num_sentences
            key = tl.load(key_ptr + s, mask=there, other=-0x80000000)
            length = tl.load(place_ptr + s * 4 + PLACE_LENGTH, mask=there, other=0)
            taken = there & (key >= threshold)
            more_tokens, more = tl.reduce((tl.where(taken, length, 0), taken.to(tl.int32)), 0, _sum_pairs)
            tokens += more_tokens
            count += more
    return tokens, count


@triton.jit
def select_for_head(
    logit_ptr,
    key_ptr,
    place_ptr,
    selected_ptr,
    capacity,
    num_sentences,
    room_tokens,
    max_selected,
    most_selected,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MAX: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
):
    """One KV head's selection, by halving an interval of scores until it holds just the first sentence too many.

    `key_ptr`: scratch for the keys, used when they do not fit one block.
    """
    norm = _normalisers(logit_ptr, capacity, num_sentences, GROUP, GROUP_BLOCK, BLOCK)
    s = tl.arange(0, BLOCK)
    there = s < num_sentences
    key0 = _score_key(logit_ptr, capacity, s, there, norm, GROUP, GROUP_BLOCK, MAX)
    length0 = tl.load(place_ptr + s * 4 + PLACE_LENGTH, mask=there, other=0)
    highest = tl.max(key0, axis=0)
    if not ONE_BLOCK:
        for start in range(0, num_sentences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            there = s < num_sentences
            key = _score_key(logit_ptr, capacity, s, there, norm, GROUP, GROUP_BLOCK, MAX)
            tl.store(key_ptr + s, key, mask=there)
            highest = tl.maximum(highest, tl.max(key, axis=0))
        tl.debug_barrier()

    # Keys from `high` on fit; those from `low` on do not, unless all do. In between, nothing is known yet.
    low = tl.full((), -0x7FFFFFFF, tl.int32)
    high = highest + 1
    low_tokens, low_count = _measure(key_ptr, place_ptr, low, num_sentences, key0, length0, ONE_BLOCK, BLOCK)
    high_tokens = tl.zeros((), tl.int32)
    high_count = tl.zeros((), tl.int32)
    if (low_tokens <= room_tokens) & (low_count <= max_selected):
        # Everything fits: an empty interval.
        high, high_tokens, high_count = low, low_tokens, low_count
    middle = (low & high) + ((low ^ high) >> 1)
    while (middle != low) & (low_count - high_count > 1):
        tokens, count = _measure(key_ptr, place_ptr, middle, num_sentences, key0, length0, ONE_BLOCK, BLOCK)
        if (tokens <= room_tokens) & (count <= max_selected):
            high, high_tokens, high_count = middle, tokens, count
        else:
            low, low_count = middle, count
        middle = (low & high) + ((low ^ high) >> 1)

    # Keys in [low, high) are one sentence that does not fit, or all equal: of those, the first ones that fit.
    num_taken = tl.zeros((), tl.int32)
    tied_tokens = tl.zeros((), tl.int32)
    tied_count = tl.zeros((), tl.int32)
    for start in range(0, num_sentences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        there = s < num_sentences
        if ONE_BLOCK:
            key, length = key0, length0
        else:
            key = tl.load(key_ptr + s, mask=there, other=-0x80000000)
            length = tl.load(place_ptr + s * 4 + PLACE_LENGTH, mask=there, other=0)
        taken = there & (key >= high)
        tied = there & (key >= low) & (key < high)
        num_tied = tl.sum(tied.to(tl.int32), axis=0)
        if num_tied > 0:
            before = tied_tokens + tl.cumsum(tl.where(tied, length, 0), axis=0)
            rank = tied_count + tl.cumsum(tied.to(tl.int32), axis=0)
            fits = (high_tokens + before <= room_tokens) & (high_count + rank <= max_selected)
            taken = taken | (tied & fits)
            tied_tokens += tl.sum(tl.where(tied, length, 0), axis=0)
            tied_count += num_tied
        place = num_taken + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(selected_ptr + place, s, mask=taken)
        num_taken += tl.sum(taken.to(tl.int32), axis=0)
    k = tl.arange(0, SELECTED_BLOCK)
    tl.store(selected_ptr + k, -1, mask=(k >= num_taken) & (k < most_selected))


@triton.jit
def _select_sentences_kernel(
    logit_ptr,
    key_ptr,
    address_ptr,
    count_ptr,
    selected_ptr,
    capacity,
    room_tokens,
    most_selected,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    MAX: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
):
    n, b = tl.program_id(0), tl.program_id(1)
    place_ptr = tl.load(address_ptr + b * num_address + PLACE).to(tl.pointer_type(tl.int32))
    place_ptr = tl.multiple_of(place_ptr, 16)
    head = (b * NUM_KV_HEADS + n).to(tl.int64)
    select_for_head(
        logit_ptr + head * GROUP * capacity,
        key_ptr + head * capacity,
        place_ptr,
        selected_ptr + head * most_selected,
        capacity,
        tl.load(count_ptr + b * num_count + NUM_SENTENCES),
        room_tokens,
        tl.load(count_ptr + b * num_count + MAX_SELECTED),
        most_selected,
        GROUP,
        GROUP_BLOCK,
        MAX,
        ONE_BLOCK,
        BLOCK,
        SELECTED_BLOCK,
    )


def select_blocks(capacity: int) -> tuple[bool, int, int]:
    """Whether all scores fit one block, the block's size, and the warps that share it."""
    one_block = capacity <= _ONE_BLOCK
    block = triton.next_power_of_2(capacity) if one_block else _BLOCK
    return one_block, block, min(32, max(4, block // 256))


def select_sentences_triton(logit_BNGS: Tensor, lanes: Lanes, *, group: Group, room_tokens: int) -> Tensor:
    """Ids of the chosen sentences, by one program for each KV head and lane."""
    batch, num_kv_heads, num_groups, capacity = logit_BNGS.shape
    assert logit_BNGS.is_contiguous()
    device = logit_BNGS.device
    selected = torch.empty((batch, num_kv_heads, lanes.most_selected), dtype=torch.int32, device=device)
    one_block, block, num_warps = select_blocks(capacity)
    key = torch.empty((1 if one_block else batch * num_kv_heads * capacity,), dtype=torch.int32, device=device)
    address_rows = lanes.address_of[0]
    _select_sentences_kernel[(num_kv_heads, batch)](
        logit_BNGS,
        key,
        address_rows,
        lanes.count_of,
        selected,
        capacity,
        room_tokens,
        lanes.most_selected,
        address_rows.stride(0),
        lanes.count_of.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_groups,
        GROUP_BLOCK=triton.next_power_of_2(num_groups),
        MAX=group == "max",
        ONE_BLOCK=one_block,
        BLOCK=block,
        SELECTED_BLOCK=triton.next_power_of_2(lanes.most_selected),
        num_warps=num_warps,
    )
    return selected


def select_sentences(logit_BNGS: Tensor, lanes: Lanes, *, group: Group, room_tokens: int) -> Tensor:
    """The best sentences within a token budget; see `select_sentences_ref`."""
    op = select_sentences_triton if logit_BNGS.is_cuda else select_sentences_ref
    return op(logit_BNGS, lanes, group=group, room_tokens=room_tokens)
