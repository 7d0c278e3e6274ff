"""Which selected sentences are on the GPU already, and which slots the others get."""

from typing import NamedTuple

import torch
from torch import Tensor


class HotSetState(NamedTuple):
    """Who sits where, for one layer; mutated in place by `resolve_hot_set`.

    `sentence_of_slot`: int64 `[N, C]`, -1 for a free slot. `last_used`: int64 `[N, C]`, the step of last use, -1 if
    never. `slot_of_sentence`: int64 `[N, capacity]`, -1 for a sentence that is not on the GPU; `capacity` >= S.
    """

    sentence_of_slot: Tensor
    last_used: Tensor
    slot_of_sentence: Tensor


class Resolved(NamedTuple):
    """Where the selection sits. `slot_NK`: int64, -1 where nothing is selected. `miss_NK`: bool, must be fetched."""

    slot_NK: Tensor
    miss_NK: Tensor


def resolve_hot_set_ref(selected_NK: Tensor, state: HotSetState, step: int) -> Resolved:
    """Give every selected sentence a slot: its own if it has one, else that of the least recently used sentence.

    Slots of this step's selection are never taken. Needs `C >= K`. Ties among slots are broken by slot number, among
    misses by rank, so the result is deterministic. `state` is updated; no host synchronisation.

    Args:
        selected_NK: int64 `[N, K]`, distinct ids per head, padded with -1.
        step: rises by one from call to call.
    """
    sentence_of_slot, last_used, slot_of_sentence = state
    num_heads, num_slots = sentence_of_slot.shape
    assert selected_NK.shape[-1] <= num_slots, "a step selects more sentences than the hot set has slots"
    wanted = selected_NK >= 0
    found_NK = torch.where(wanted, slot_of_sentence.gather(1, selected_NK.clamp(min=0)), -1)
    hit = found_NK >= 0
    miss = wanted & ~hit

    # One slot more than there are takes the writes of entries that have none to make.
    dump = num_slots
    pinned = torch.zeros(num_heads, num_slots + 1, dtype=torch.bool, device=selected_NK.device)
    pinned.scatter_(1, torch.where(hit, found_NK, dump), True)
    age = last_used.masked_fill(pinned[:, :num_slots], torch.iinfo(torch.int64).max)
    oldest_first = torch.sort(age, dim=-1, stable=True).indices
    rank_among_misses = (miss.long().cumsum(dim=-1) - 1).clamp(min=0)
    slot_NK = torch.where(miss, oldest_first.gather(1, rank_among_misses), found_NK)

    padded = torch.cat([sentence_of_slot, sentence_of_slot.new_full((num_heads, 1), -1)], dim=1)
    evicted = torch.where(miss, padded.gather(1, torch.where(miss, slot_NK, dump)), -1)
    table = torch.cat([slot_of_sentence, slot_of_sentence.new_full((num_heads, 1), -1)], dim=1)
    last = table.shape[1] - 1
    table.scatter_(1, torch.where(evicted >= 0, evicted, last), -1)
    table.scatter_(1, torch.where(miss, selected_NK, last), slot_NK)
    slot_of_sentence.copy_(table[:, :last])
    padded.scatter_(1, torch.where(miss, slot_NK, dump), selected_NK)
    sentence_of_slot.copy_(padded[:, :num_slots])
    used = torch.zeros_like(pinned).scatter_(1, torch.where(wanted, slot_NK, dump), True)
    last_used.masked_fill_(used[:, :num_slots], step)
    return Resolved(slot_NK, miss)


def resolve_hot_set(selected_NK: Tensor, state: HotSetState, step: int) -> Resolved:
    """Give every selected sentence a slot; see `resolve_hot_set_ref`."""
    return resolve_hot_set_ref(selected_NK, state, step)
