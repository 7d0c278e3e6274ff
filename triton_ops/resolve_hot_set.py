"""Which selected sentences are on the GPU already, and which slots the others get."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import (
    LAST_USED,
    NUM_SLOTS,
    PLACE,
    PLACE_LENGTH,
    SENTENCE_OF_SLOT,
    SENTENCE_ROWS,
    SLOT_OF_SENTENCE,
    STEP,
    TRAFFIC,
    TRAFFIC_MISSED,
    TRAFFIC_SELECTED,
    TRAFFIC_TOKENS,
    Lane,
    Lanes,
)


class Resolved(NamedTuple):
    """Where the selection sits.

    `slot_BNK`: int32, -1 where nothing is selected. `length_BNK`: int32, tokens of each sentence, 0 where there is
    none. `miss_BNK`: int8, 1 for what must be fetched. `count_BN`: int32, sentences selected.
    """

    slot_BNK: Tensor
    length_BNK: Tensor
    miss_BNK: Tensor
    count_BN: Tensor


def resolve_hot_set_ref(selected_BNK: Tensor, lanes: Lanes, layer: int) -> Resolved:
    """Give every selected sentence a slot: its own if it has one, else that of the least recently used sentence.

    Slots of this step's selection are never taken. Of equally old slots those with the lowest numbers are taken; the
    slots taken go to the misses in rising order of both. The lanes' hot-set tables are updated, and their traffic; no
    host synchronisation.

    Args:
        selected_BNK: int32, distinct rising ids per head, then -1. No head selects more than its lane has slots.
    """
    slot_BNK = torch.full_like(selected_BNK, -1)
    length_BNK = torch.zeros_like(selected_BNK)
    miss_BNK = torch.zeros_like(selected_BNK, dtype=torch.int8)
    for b, lane in enumerate(lanes.lanes):
        slot_BNK[b], miss_NK = _resolve_ref(selected_BNK[b].long(), lane, layer)
        miss_BNK[b] = miss_NK
        if lane.num_sentences:
            length_NK = lane.place_S4[selected_BNK[b].clamp(min=0).long(), PLACE_LENGTH.value]
            length_BNK[b] = torch.where(selected_BNK[b] >= 0, length_NK, 0)
    return Resolved(slot_BNK, length_BNK, miss_BNK, (selected_BNK >= 0).sum(-1, dtype=torch.int32))


def _resolve_ref(selected_NK: Tensor, lane: Lane, layer: int) -> tuple[Tensor, Tensor]:
    tables = lane.sentence_of_slot[layer], lane.last_used[layer], lane.slot_of_sentence[layer]
    sentence_of_slot, last_used, slot_of_sentence = (table.long() for table in tables)
    num_heads, num_slots = sentence_of_slot.shape
    wanted = selected_NK >= 0
    found_NK = torch.full_like(selected_NK, -1)
    if slot_of_sentence.shape[1]:
        found_NK = torch.where(wanted, slot_of_sentence.gather(1, selected_NK.clamp(min=0)), -1)
    hit = found_NK >= 0
    miss = wanted & ~hit

    # One slot more than there are takes the writes of entries that have none to make.
    dump = num_slots
    pinned = torch.zeros(num_heads, num_slots + 1, dtype=torch.bool, device=selected_NK.device)
    pinned.scatter_(1, torch.where(hit, found_NK, dump), True)
    age = last_used.masked_fill(pinned[:, :num_slots], torch.iinfo(torch.int64).max)
    oldest_first = torch.sort(age, dim=-1, stable=True).indices
    num_missed = miss.sum(dim=1, keepdim=True)
    taken = torch.arange(num_slots, device=age.device) < num_missed
    victims = torch.where(taken, oldest_first, num_slots).sort(dim=1).values
    victims = torch.nn.functional.pad(victims, (0, 1), value=-1)
    rank_among_misses = (miss.long().cumsum(dim=-1) - 1).clamp(min=0)
    slot_NK = torch.where(miss, victims.gather(1, rank_among_misses), found_NK)

    padded = torch.cat([sentence_of_slot, sentence_of_slot.new_full((num_heads, 1), -1)], dim=1)
    evicted = torch.where(miss, padded.gather(1, torch.where(miss, slot_NK, dump)), -1)
    table = torch.cat([slot_of_sentence, slot_of_sentence.new_full((num_heads, 1), -1)], dim=1)
    last = table.shape[1] - 1
    table.scatter_(1, torch.where(evicted >= 0, evicted, last), -1)
    table.scatter_(1, torch.where(miss, selected_NK, last), slot_NK)
    lane.slot_of_sentence[layer].copy_(table[:, :last])
    padded.scatter_(1, torch.where(miss, slot_NK, dump), selected_NK)
    lane.sentence_of_slot[layer].copy_(padded[:, :num_slots])
    used = torch.zeros_like(pinned).scatter_(1, torch.where(wanted, slot_NK, dump), True)
    lane.last_used[layer].masked_fill_(used[:, :num_slots], lane.step)
    if lane.num_sentences:
        tokens_NK = lane.place_S4[selected_NK.clamp(min=0), PLACE_LENGTH.value]
        lane.traffic += torch.stack([wanted.sum(), miss.sum(), tokens_NK[miss].sum()])
    return slot_NK, miss


@triton.jit
def resolve_for_head(
    selected_ptr,
    slot_ptr,
    length_ptr,
    miss_ptr,
    number_ptr,
    victim_ptr,
    address_ptr,
    count_ptr,
    n,
    most_selected,
    SELECTED_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One KV head's slots. `victim_ptr`: scratch of `most_selected` entries."""
    num_slots = tl.load(count_ptr + NUM_SLOTS)
    sentence_rows = tl.load(count_ptr + SENTENCE_ROWS)
    place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32))
    n64 = n.to(tl.int64)
    held_ptr = tl.load(address_ptr + SENTENCE_OF_SLOT).to(tl.pointer_type(tl.int32)) + n64 * num_slots
    used_ptr = tl.load(address_ptr + LAST_USED).to(tl.pointer_type(tl.int32)) + n64 * num_slots
    slot_of_ptr = tl.load(address_ptr + SLOT_OF_SENTENCE).to(tl.pointer_type(tl.int32)) + n64 * sentence_rows

    wait_for_inputs(EARLY)
    step = tl.load(count_ptr + STEP)
    k = tl.arange(0, SELECTED_BLOCK)
    sentence = tl.load(selected_ptr + k, mask=k < most_selected, other=-1)
    wanted = sentence >= 0
    found = tl.load(slot_of_ptr + sentence, mask=wanted, other=-1)
    length = tl.load(place_ptr + sentence * 4 + PLACE_LENGTH, mask=wanted, other=0)
    hit = found >= 0
    miss = wanted & (hit == 0)
    tl.store(used_ptr + found, step, mask=hit)
    num_missed = tl.sum(miss.to(tl.int32), axis=0)
    slot = found
    if num_missed > 0:
        tl.debug_barrier()
        # Slots used in this step are out; of the others the `num_missed` oldest are taken.
        c = tl.arange(0, SLOT_BLOCK)
        age = tl.load(used_ptr + c, mask=c < num_slots, other=0x7FFFFFFF)
        age = tl.where(age == step, 0x7FFFFFFF, age)
        low = tl.min(age, axis=0) - 1
        high = step
        low_count = tl.zeros((), tl.int32)
        while (high - low > 1) & (low_count < num_missed):
            middle = low + (high - low) // 2
            count = tl.sum((age <= middle).to(tl.int32), axis=0)
            if count <= num_missed:
                low, low_count = middle, count
            else:
                high = middle
        victim = age <= low
        if low_count < num_missed:
            tied = age == high
            victim = victim | (tied & (low_count + tl.cumsum(tied.to(tl.int32), axis=0) <= num_missed))
        rank = tl.cumsum(victim.to(tl.int32), axis=0) - 1
        tl.store(victim_ptr + rank, c, mask=victim)
        held = tl.load(held_ptr + c, mask=victim, other=-1)
        tl.store(slot_of_ptr + held, -1, mask=held >= 0)
        tl.debug_barrier()
        rank_of_miss = tl.cumsum(miss.to(tl.int32), axis=0) - 1
        slot = tl.where(miss, tl.load(victim_ptr + rank_of_miss, mask=miss, other=-1), found)
        tl.store(held_ptr + slot, sentence, mask=miss)
        tl.store(used_ptr + slot, step, mask=miss)
        tl.store(slot_of_ptr + sentence, slot, mask=miss)
    tl.store(slot_ptr + k, slot, mask=k < most_selected)
    tl.store(length_ptr + k, length, mask=k < most_selected)
    tl.store(miss_ptr + k, miss.to(tl.int8), mask=k < most_selected)
    num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
    tl.store(number_ptr, num_wanted)
    if num_wanted > 0:
        traffic_ptr = tl.load(address_ptr + TRAFFIC).to(tl.pointer_type(tl.int64))
        tokens = tl.sum(tl.where(miss, length, 0), axis=0)
        tl.atomic_add(traffic_ptr + TRAFFIC_SELECTED, num_wanted.to(tl.int64), sem="relaxed")
        tl.atomic_add(traffic_ptr + TRAFFIC_MISSED, num_missed.to(tl.int64), sem="relaxed")
        tl.atomic_add(traffic_ptr + TRAFFIC_TOKENS, tokens.to(tl.int64), sem="relaxed")


@triton.jit
def _resolve_hot_set_kernel(
    selected_ptr,
    slot_ptr,
    length_ptr,
    miss_ptr,
    number_ptr,
    victim_ptr,
    address_ptr,
    count_ptr,
    most_selected,
    num_address,
    num_count,
    NUM_KV_HEADS: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    n, b = tl.program_id(0), tl.program_id(1)
    row = (b * NUM_KV_HEADS + n).to(tl.int64) * most_selected
    resolve_for_head(
        selected_ptr + row,
        slot_ptr + row,
        length_ptr + row,
        miss_ptr + row,
        number_ptr + b * NUM_KV_HEADS + n,
        victim_ptr + row,
        address_ptr + b * num_address,
        count_ptr + b * num_count,
        n,
        most_selected,
        SELECTED_BLOCK,
        SLOT_BLOCK,
        EARLY,
    )


def resolve_hot_set_triton(selected_BNK: Tensor, lanes: Lanes, layer: int) -> Resolved:
    """Slots of the selection, by one program for each KV head and lane."""
    batch, num_kv_heads, most_selected = selected_BNK.shape
    assert selected_BNK.is_contiguous()
    assert selected_BNK.dtype == torch.int32
    slot = torch.empty_like(selected_BNK)
    length = torch.empty_like(selected_BNK)
    victim = torch.empty_like(selected_BNK)
    number = selected_BNK.new_empty((batch, num_kv_heads))
    miss = torch.empty_like(selected_BNK, dtype=torch.int8)
    address_rows = lanes.address_rows(layer)
    slot_block = triton.next_power_of_2(lanes.most_slots)
    early = starts_early(selected_BNK)
    _resolve_hot_set_kernel[(num_kv_heads, batch)](
        selected_BNK,
        slot,
        length,
        miss,
        number,
        victim,
        address_rows,
        lanes.count_of,
        most_selected,
        address_rows.stride(0),
        lanes.count_of.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        SELECTED_BLOCK=triton.next_power_of_2(most_selected),
        SLOT_BLOCK=slot_block,
        EARLY=early,
        num_warps=4 if slot_block <= 512 else 8,
        **launch_options(early),
    )
    return Resolved(slot, length, miss, number)


def resolve_hot_set(selected_BNK: Tensor, lanes: Lanes, layer: int) -> Resolved:
    """Give every selected sentence a slot; see `resolve_hot_set_ref`."""
    op = resolve_hot_set_triton if selected_BNK.is_cuda else resolve_hot_set_ref
    return op(selected_BNK, lanes, layer)
