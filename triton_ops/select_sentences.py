"""The best sentences within a token budget."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.lanes import MAX_SELECTED, NUM_SENTENCES, PLACE, PLACE_LENGTH, Lanes

Group = Literal["max", "mean"]

_MOST_LOGITS = 32768
"""Logits of a group that a program keeps in registers; beyond, it goes over them in blocks of so many."""


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
def _sum_sixes(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _load_logits(logit_ptr, capacity, s, num_sentences, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """Logits `[GROUP_BLOCK, BLOCK]`, -inf where there is no sentence or head."""
    g = tl.arange(0, GROUP_BLOCK)
    there = (g < GROUP)[:, None] & (s < num_sentences)[None, :]
    return tl.load(logit_ptr + g[:, None] * capacity + s[None, :], mask=there, other=float("-inf"))


@triton.jit
def _score_key(logit, norm, s, num_sentences, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, MAX: tl.constexpr):
    """Integers in the order of the group's scores; the smallest for what is no sentence or has score -inf."""
    in_group = (tl.arange(0, GROUP_BLOCK) < GROUP)[:, None]
    share = tl.where(in_group, logit - norm[:, None], float("-inf"))
    if MAX:
        score = tl.max(share, axis=0)
        nothing = score == float("-inf")
    else:
        score = tl.sum(tl.exp(share), axis=0)
        nothing = score == 0.0
    # -0.0 and 0.0 are one score.
    bits = (score + 0.0).to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where((s < num_sentences) & (nothing == 0), key, -0x80000000)


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
def _measure_three(
    key_ptr, place_ptr, t1, t2, t3, num_sentences, key0, length0, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """As `_measure`, for three thresholds at once: a reduction costs far more than what it adds up."""
    if ONE_BLOCK:
        in1, in2, in3 = key0 >= t1, key0 >= t2, key0 >= t3
        tokens1, count1, tokens2, count2, tokens3, count3 = tl.reduce(
            (
                tl.where(in1, length0, 0),
                in1.to(tl.int32),
                tl.where(in2, length0, 0),
                in2.to(tl.int32),
                tl.where(in3, length0, 0),
                in3.to(tl.int32),
            ),
            0,
            _sum_sixes,
        )
    else:
        tokens1, count1 = _measure(key_ptr, place_ptr, t1, num_sentences, key0, length0, ONE_BLOCK, BLOCK)
        tokens2, count2 = _measure(key_ptr, place_ptr, t2, num_sentences, key0, length0, ONE_BLOCK, BLOCK)
        tokens3, count3 = _measure(key_ptr, place_ptr, t3, num_sentences, key0, length0, ONE_BLOCK, BLOCK)
    return tokens1, count1, tokens2, count2, tokens3, count3


@triton.jit
def _middle(low, high):
    """The lower mean of two integers, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


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
    """One KV head's selection, by quartering an interval of scores until it holds just the first sentence too many.

    `key_ptr`: scratch for the keys, used when they do not fit one block.
    """
    s = tl.arange(0, BLOCK)
    logit = _load_logits(logit_ptr, capacity, s, num_sentences, GROUP, GROUP_BLOCK)
    length0 = tl.load(place_ptr + s * 4 + PLACE_LENGTH, mask=s < num_sentences, other=0)
    top = tl.max(logit, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(logit - top[:, None]), axis=1)
    if not ONE_BLOCK:
        for start in range(BLOCK, num_sentences, BLOCK):
            more = _load_logits(logit_ptr, capacity, start + s, num_sentences, GROUP, GROUP_BLOCK)
            now = tl.maximum(top, tl.max(more, axis=1))
            total = total * tl.exp(top - now) + tl.sum(tl.exp(more - now[:, None]), axis=1)
            top = now
    norm = top + tl.log(tl.maximum(total, 1e-38))
    key0 = _score_key(logit, norm, s, num_sentences, GROUP, GROUP_BLOCK, MAX)
    highest = tl.max(key0, axis=0)
    if not ONE_BLOCK:
        tl.store(key_ptr + s, key0, mask=s < num_sentences)
        for start in range(BLOCK, num_sentences, BLOCK):
            more = _load_logits(logit_ptr, capacity, start + s, num_sentences, GROUP, GROUP_BLOCK)
            key = _score_key(more, norm, start + s, num_sentences, GROUP, GROUP_BLOCK, MAX)
            tl.store(key_ptr + start + s, key, mask=start + s < num_sentences)
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
    t2 = _middle(low, high)
    while (t2 != low) & (low_count - high_count > 1):
        t1, t3 = _middle(low, t2), _middle(t2, high)
        tokens1, count1, tokens2, count2, tokens3, count3 = _measure_three(
            key_ptr, place_ptr, t1, t2, t3, num_sentences, key0, length0, ONE_BLOCK, BLOCK
        )
        fits1 = (tokens1 <= room_tokens) & (count1 <= max_selected)
        fits2 = (tokens2 <= room_tokens) & (count2 <= max_selected)
        fits3 = (tokens3 <= room_tokens) & (count3 <= max_selected)
        # The lowest threshold that fits is the new upper end, the highest that does not the new lower one.
        new_high = tl.where(fits1, t1, tl.where(fits2, t2, tl.where(fits3, t3, high)))
        high_tokens = tl.where(fits1, tokens1, tl.where(fits2, tokens2, tl.where(fits3, tokens3, high_tokens)))
        high_count = tl.where(fits1, count1, tl.where(fits2, count2, tl.where(fits3, count3, high_count)))
        low = tl.where(fits1, low, tl.where(fits2, t1, tl.where(fits3, t2, t3)))
        low_count = tl.where(fits1, low_count, tl.where(fits2, count1, tl.where(fits3, count2, count3)))
        high = new_high
        t2 = _middle(low, high)

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
        if low_count - high_count > 1:
            tied = there & (key >= low) & (key < high)
            before = tied_tokens + tl.cumsum(tl.where(tied, length, 0), axis=0)
            rank = tied_count + tl.cumsum(tied.to(tl.int32), axis=0)
            fits = (high_tokens + before <= room_tokens) & (high_count + rank <= max_selected)
            taken = taken | (tied & fits)
            tied_tokens += tl.sum(tl.where(tied, length, 0), axis=0)
            tied_count += tl.sum(tied.to(tl.int32), axis=0)
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


def _blocks(capacity: int, group_block: int) -> tuple[bool, int, int]:
    """Whether all scores fit one block, the block's size, and the warps that share it."""
    block = min(triton.next_power_of_2(capacity), max(16, _MOST_LOGITS // group_block))
    return capacity <= block, block, min(32, max(4, block * group_block // 1024))


def select_sentences_triton(logit_BNGS: Tensor, lanes: Lanes, *, group: Group, room_tokens: int) -> Tensor:
    """Ids of the chosen sentences, by one program for each KV head and lane."""
    batch, num_kv_heads, num_groups, capacity = logit_BNGS.shape
    assert logit_BNGS.is_contiguous()
    device = logit_BNGS.device
    selected = torch.empty((batch, num_kv_heads, lanes.most_selected), dtype=torch.int32, device=device)
    group_block = triton.next_power_of_2(num_groups)
    one_block, block, num_warps = _blocks(capacity, group_block)
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
        GROUP_BLOCK=group_block,
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
