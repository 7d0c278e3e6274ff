"""Attention of one new token over hot-set slots and the tokens that are always read."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.gather_kv import gather_kv_ref
from triton_ops.lanes import (
    HOT,
    MEAN_VALUE,
    NUM_RESIDENT,
    NUM_SENTENCES,
    NUM_SLOTS,
    PLACE,
    PLACE_ROW,
    PLACE_SLAB,
    POSITION,
    RESIDENT,
    RESIDENT_ROWS,
    SHARE,
    SHARE_UNITS,
    SLABS,
    Lanes,
    element_type,
)
from triton_ops.resolve_hot_set import Resolved
from triton_ops.score_sentences import Scores

_ROWS = 128
_ROWS_FETCHED = 64
"""Tokens that one program reads at a time, in slots or resident, and where some come from host memory (addresses of
their own take registers); and no more than so many bytes:"""
_MOST_BYTES = 128 << 10
_PROGRAMS = 528
"""Programs to aim at: a step's latency is what counts, so few of them should have more than one block to read."""
SIMILAR = tl.constexpr(0.2)
"""Of the mass that is not selected, the share whose values are taken to be like those of what is: heads that look for
something find more of it. Chosen by the error of attention outputs (docs/policies.md)."""
_LEAST = tl.constexpr(2.0**-18)
"""Of the mass of all sentences: what is left beside the selected ones, if it is less, is what rounding leaves."""
_NO_WEIGHT = tl.constexpr(-1e30)
"""Log of a weight that is none, and finite."""
_MERGED_NUMBERS = 512
"""Numbers that each warp of the merging program adds up at a time."""


def sparse_decode_ref(
    q_BAH: Tensor,
    k_BNH: Tensor,
    v_BNH: Tensor,
    lanes: Lanes,
    layer: int,
    selected_BNK: Tensor | None,
    resolved: Resolved | None,
    *,
    scale: float,
    sliding: bool = False,
    softcap: float | None = None,
    fetch: bool = False,
    rest: Scores | None = None,
) -> Tensor:
    """softmax(q k^T) v over the selected sentences, the resident tokens and the new one, as one softmax: `[B, A, H]`.

    The new token's KV is written behind the lane's resident tokens (in a sliding-window layer, to its place in the
    ring); the attention that each selected sentence got, averaged over all query heads, is added to the lane's
    `share_S`.

    Args:
        q_BAH: post-RoPE queries of the A = N * G query heads, those of one KV head adjacent.
        k_BNH, v_BNH: key and value of each lane's new token.
        selected_BNK, resolved: int32 ids of the selected sentences, and where they are; None: none are.
        sliding: whether this is a sliding-window layer, whose resident tokens are a ring.
        scale: multiplies the logits; softcap: `softcap * tanh(logit / softcap)` after it (Gemma 2).
        fetch: misses are not in their slots yet; they are read from host memory, and written there (`gather_kv`).
        rest: scores, logs of mass, of all sentences: those not selected are one more token in the softmax, with the sum
            of their masses, if that is more than rounding leaves (2^-18 of all). Its value is the lane's `mean_value`,
            moved by a fifth towards that of what is selected.
    """
    if fetch and selected_BNK is not None and resolved is not None:
        gather_kv_ref(selected_BNK, resolved.slot_BNK, resolved.miss_BNK, lanes, layer)
    output = torch.zeros_like(q_BAH)
    num_kv_heads, head_dim = k_BNH.shape[1:]
    for b, lane in enumerate(lanes.lanes):
        resident = lane.resident_kv[layer]
        if sliding:
            row, count = lane.position % resident.shape[1], min(lane.position + 1, resident.shape[1])
        else:
            row, count = lane.num_resident, lane.num_resident + 1
        resident[:, row, 0], resident[:, row, 1] = k_BNH[b], v_BNH[b]
        q_NGH = q_BAH[b].view(num_kv_heads, -1, head_dim)
        if resolved is None or selected_BNK is None:
            output[b] = _attend(q_NGH, resident[:, :count], scale, softcap)[0].flatten(0, 1)
            continue
        hot_kv = lane.hot_kv[layer]
        slot_NK, selected_NK = resolved.slot_BNK[b].long(), selected_BNK[b].long()
        num_selected, slot_tokens = slot_NK.shape[1], hot_kv.shape[2]
        head_N1 = torch.arange(num_kv_heads, device=q_BAH.device)[:, None]
        picked = hot_kv[head_N1, slot_NK.clamp(min=0)]  # [N, K, M, 2, H]
        valid_NKM = torch.arange(slot_tokens, device=q_BAH.device) < resolved.length_BNK[b][:, :, None]
        # Rows that nobody wrote may hold anything, and 0 * NaN is NaN: values are zeroed, logits set to -inf.
        picked = picked.masked_fill(~valid_NKM[..., None, None], 0)
        kv = torch.cat([picked.flatten(1, 2), resident[:, :count]], dim=1)
        unread = None
        if rest is not None and layer in lane.mean_value:
            unread_NGS = rest.logit_BNGS[b, :, :, : lane.num_sentences].clone()
            for n, ids in enumerate(selected_NK):
                unread_NGS[n, :, ids[ids >= 0]] = -torch.inf
            log_rest = unread_NGS.logsumexp(-1)
            log_all = rest.logit_BNGS[b, :, :, : lane.num_sentences].logsumexp(-1)
            log_rest = log_rest.masked_fill(log_rest - log_all <= math.log(_LEAST.value), -torch.inf)
            unread = log_rest, lane.mean_value[layer]
        result, weight = _attend(q_NGH, kv, scale, softcap, valid_NKM.flatten(1), unread)
        output[b] = result.flatten(0, 1)
        share_NK = weight[:, :, : num_selected * slot_tokens].unflatten(2, (num_selected, slot_tokens)).sum(-1).mean(1)
        share_NK = share_NK / num_kv_heads
        units_NK = (torch.where(slot_NK >= 0, share_NK, 0) * SHARE_UNITS.value).long()
        lane.share_S.index_add_(0, selected_NK.clamp(min=0).flatten(), units_NK.flatten())
    return output


def _attend(
    q_NGH: Tensor,
    kv_NTH: Tensor,
    scale: float,
    softcap: float | None,
    valid_NT: Tensor | None = None,
    unread: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[N, G, H]` and float32 weights `[N, G, T]`; `valid_NT` says which of the first tokens count. `unread`:
    logit `[N, G]` and mean value `[N, H]` of one more token, the last."""
    logit = torch.matmul(q_NGH, kv_NTH[:, :, 0].transpose(1, 2)).float() * scale
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    if valid_NT is not None:
        logit[:, :, : valid_NT.shape[1]].masked_fill_(~valid_NT[:, None], -torch.inf)
    value = kv_NTH[:, :, 1]
    if unread is None or valid_NT is None:
        weight = torch.softmax(logit, dim=-1)
        return torch.matmul(weight.to(value.dtype), value), weight
    log_rest, mean_value = unread
    weight = torch.softmax(torch.cat([logit, log_rest[..., None]], dim=-1), dim=-1)
    used, of_rest = weight[..., :-1].clone(), weight[..., -1:]
    num_selected = valid_NT.shape[1]
    of_selected = used[..., :num_selected].sum(-1, keepdim=True)
    similar = torch.where(of_selected > 0, SIMILAR.value, 0.0)
    used[..., :num_selected] *= 1 + similar * of_rest / of_selected.clamp(min=1e-37)
    output = torch.matmul(used.to(value.dtype), value)
    return output + ((1 - similar) * of_rest * mean_value[:, None]).to(value.dtype), weight


@triton.jit
def _logits(q, key, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    logit = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh by exp: softcap * (1 - 2 / (exp(2x) + 1))
        logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))
    return logit


@triton.jit
def _log_unread(
    logit_ptr,
    extent_ptr,
    selected_ptr,
    number,
    capacity,
    num_extents,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    FEWER: tl.constexpr,
    EXTENT_BLOCK: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
):
    """For each query head of a group, the log of the mass of all sentences less that of the selected ones.

    A difference: the less is left, the fewer of its digits are right, down to one in sixteen at `_LEAST`.
    """
    m = tl.arange(0, FEWER)
    in_group = m < GROUP
    x = tl.arange(0, EXTENT_BLOCK)
    pair_ptr = extent_ptr + m[:, None] * (2 * num_extents) + 2 * x[None, :]
    there = in_group[:, None] & (x < num_extents)[None, :]
    top_GX = tl.load(pair_ptr, mask=there, other=float("-inf"))
    sum_GX = tl.load(pair_ptr + 1, mask=there, other=0.0)
    k = tl.arange(0, SELECTED_BLOCK)
    sentence = tl.load(selected_ptr + k, mask=k < number, other=0)
    logit_GK = tl.load(
        logit_ptr + m[:, None].to(tl.int64) * capacity + sentence[None, :],
        mask=in_group[:, None] & (k < number)[None, :],
        other=float("-inf"),
    )
    top = tl.max(top_GX, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    everything = tl.sum(sum_GX * tl.exp(top_GX - top[:, None]), axis=1)
    unread = everything - tl.sum(tl.exp(logit_GK - top[:, None]), axis=1)
    log_unread = tl.where(unread > everything * _LEAST, top + tl.log(tl.maximum(unread, 1e-37)), _NO_WEIGHT)
    g = tl.arange(0, GROUP_BLOCK)
    return tl.sum(tl.where(g[:, None] == m[None, :], log_unread[None, :], 0.0), axis=1)


@triton.jit
def _sparse_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    address_ptr,
    count_ptr,
    selected_ptr,
    slot_ptr,
    length_ptr,
    miss_ptr,
    number_ptr,
    output_ptr,
    partial_ptr,
    extent_ptr,
    sentence_ptr,
    arrived_ptr,
    rest_logit_ptr,
    rest_extent_ptr,
    scale,
    softcap,
    rest_columns,
    rest_extents,
    most_selected,
    q_stride_b,
    q_stride_a,
    k_stride_b,
    k_stride_n,
    v_stride_b,
    v_stride_n,
    num_address,
    num_count,
    ring_rows,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SLOT_TOKENS: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOT_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    MERGED_GROUP: tl.constexpr,
    MERGED_COLUMNS: tl.constexpr,
    SELECTED_BLOCK: tl.constexpr,
    EXTENT_BLOCK: tl.constexpr,
    RING: tl.constexpr,
    FETCH: tl.constexpr,
    REST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs below SLOT_SPLITS read slots, the others resident tokens; the last of a head to arrive merges all.

    With the rest there is one partial result more than there are programs.
    """
    ENTRIES: tl.constexpr = SPLITS + 1 if REST else SPLITS
    split, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = (b * NUM_KV_HEADS + n).to(tl.int64)
    address_ptr += b * num_address
    count_ptr += b * num_count
    resident = tl.load(address_ptr + RESIDENT)
    g = tl.arange(0, GROUP_BLOCK)
    h = tl.arange(0, HEAD_BLOCK)
    in_group, in_head = g < GROUP, h < HEAD_DIM
    ROW: tl.constexpr = 2 * HEAD_DIM
    q_ptr += b.to(tl.int64) * q_stride_b + n * GROUP * q_stride_a
    wait_for_inputs(EARLY)
    q = tl.load(q_ptr + g[:, None] * q_stride_a + h[None, :], mask=in_group[:, None] & in_head[None, :], other=0.0)
    highest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    value_sum = tl.zeros((GROUP_BLOCK, HEAD_BLOCK), tl.float32)
    sentence_ptr += head * most_selected * GROUP
    slot_ptr += head * most_selected
    length_ptr += head * most_selected

    if split < SLOT_SPLITS:
        hot_ptr = tl.multiple_of(tl.load(address_ptr + HOT).to(tl.pointer_type(DTYPE)), 16)
        hot_ptr += n.to(tl.int64) * tl.load(count_ptr + NUM_SLOTS) * (SLOT_TOKENS * ROW)
        if FETCH:
            miss_ptr += head * most_selected
            place_ptr = tl.load(address_ptr + PLACE).to(tl.pointer_type(tl.int32))
            slabs_ptr = tl.load(address_ptr + SLABS).to(tl.pointer_type(tl.int64))
        row = tl.arange(0, SLOTS * SLOT_BLOCK)
        token = row % SLOT_BLOCK
        number = tl.load(number_ptr + head)
        for first in range(split * SLOTS, number, SLOT_SPLITS * SLOTS):
            k = first + row // SLOT_BLOCK
            slot = tl.load(slot_ptr + k, mask=k < number, other=0)
            length = tl.load(length_ptr + k, mask=k < number, other=0)
            valid = token < length
            row_ptr = hot_ptr + (slot.to(tl.int64) * SLOT_TOKENS + token) * ROW
            mask = valid[:, None] & in_head[None, :]
            slot_kv_ptr = row_ptr[:, None] + h[None, :]
            missed = tl.zeros((SLOTS * SLOT_BLOCK,), tl.int1)
            if FETCH:
                missed = tl.load(miss_ptr + k, mask=k < number, other=0) != 0
                sentence = tl.load(selected_ptr + head * most_selected + k, mask=missed, other=0).to(tl.int64)
                slab = tl.load(place_ptr + sentence * 4 + PLACE_SLAB, mask=missed, other=0)
                first_row = tl.load(place_ptr + sentence * 4 + PLACE_ROW, mask=missed, other=0)
                capacity = tl.load(slabs_ptr + slab * 2 + 1, mask=missed, other=0)
                slab_ptr = tl.load(slabs_ptr + slab * 2, mask=missed, other=0).to(tl.pointer_type(DTYPE))
                row_ptr = tl.where(missed, slab_ptr + (n * capacity + first_row + token) * ROW, row_ptr)
                row_ptr = tl.multiple_of(row_ptr, 16)
            kv_ptr = row_ptr[:, None] + h[None, :]
            key = tl.load(kv_ptr, mask=mask, other=0.0)
            value = tl.load(kv_ptr + HEAD_DIM, mask=mask, other=0.0)
            if FETCH:
                fetched = mask & missed[:, None]
                tl.store(slot_kv_ptr, key, mask=fetched)
                tl.store(slot_kv_ptr + HEAD_DIM, value, mask=fetched)
            logit = _logits(q, key, scale, softcap, SOFTCAP, PRECISION)
            logit = tl.where(valid[None, :], logit, float("-inf"))
            now = tl.maximum(highest, tl.max(logit, axis=1))
            weight = tl.exp(logit - now[:, None])
            factor = tl.exp(highest - now)
            total = total * factor + tl.sum(weight, axis=1)
            value_sum = value_sum * factor[:, None] + tl.dot(weight.to(DTYPE), value, input_precision=PRECISION)
            highest = now
            # For each sentence, the log of the sum of its weights.
            of_slot = tl.sum(tl.reshape(weight, (GROUP_BLOCK, SLOTS, SLOT_BLOCK)), axis=2)
            k_of = first + tl.arange(0, SLOTS)
            tl.store(
                sentence_ptr + g[:, None] * most_selected + k_of[None, :],
                tl.log(of_slot) + now[:, None],
                mask=in_group[:, None] & (k_of < number)[None, :],
            )
    elif resident != 0:
        if RING:
            position = tl.load(count_ptr + POSITION)
            num_rows = ring_rows
            new_row = position % ring_rows
            count = tl.minimum(position + 1, ring_rows)
        else:
            num_rows = tl.load(count_ptr + RESIDENT_ROWS)
            new_row = tl.load(count_ptr + NUM_RESIDENT)
            count = new_row + 1
        resident_ptr = tl.multiple_of(resident.to(tl.pointer_type(DTYPE)), 16) + n.to(tl.int64) * num_rows * ROW
        new_key = tl.load(k_ptr + b.to(tl.int64) * k_stride_b + n * k_stride_n + h, mask=in_head, other=0.0)
        new_value = tl.load(v_ptr + b.to(tl.int64) * v_stride_b + n * v_stride_n + h, mask=in_head, other=0.0)
        for start in range((split - SLOT_SPLITS) * ROWS, count, (SPLITS - SLOT_SPLITS) * ROWS):
            row = start + tl.arange(0, ROWS)
            valid = row < count
            kv_ptr = resident_ptr + (row.to(tl.int64) * ROW)[:, None] + h[None, :]
            mask = (valid & (row != new_row))[:, None] & in_head[None, :]
            is_new = (row == new_row)[:, None]
            key = tl.where(is_new, new_key[None, :], tl.load(kv_ptr, mask=mask, other=0.0))
            value = tl.where(is_new, new_value[None, :], tl.load(kv_ptr + HEAD_DIM, mask=mask, other=0.0))
            tl.store(kv_ptr, key, mask=is_new & in_head[None, :])
            tl.store(kv_ptr + HEAD_DIM, value, mask=is_new & in_head[None, :])
            logit = _logits(q, key, scale, softcap, SOFTCAP, PRECISION)
            logit = tl.where(valid[None, :], logit, float("-inf"))
            now = tl.maximum(highest, tl.max(logit, axis=1))
            weight = tl.exp(logit - now[:, None])
            factor = tl.exp(highest - now)
            total = total * factor + tl.sum(weight, axis=1)
            value_sum = value_sum * factor[:, None] + tl.dot(weight.to(DTYPE), value, input_precision=PRECISION)
            highest = now

    partial_ptr += head * ENTRIES * GROUP * HEAD_DIM
    extent_ptr += head * ENTRIES * GROUP * 2
    entry = split * GROUP + g
    tl.store(extent_ptr + entry * 2, highest, mask=in_group)
    tl.store(extent_ptr + entry * 2 + 1, total, mask=in_group)
    tl.store(partial_ptr + entry[:, None] * HEAD_DIM + h[None, :], value_sum, mask=in_group[:, None] & in_head[None, :])
    if REST:  # noqa: SIM102 known when this is compiled
        # One program has what is not selected as well.
        if split == SLOT_SPLITS:
            mean_address = tl.load(address_ptr + MEAN_VALUE)
            log_rest = tl.full((GROUP_BLOCK,), _NO_WEIGHT, tl.float32)
            mean_value = tl.zeros((HEAD_BLOCK,), tl.float32)
            if (mean_address != 0) & (tl.load(number_ptr + head) < tl.load(count_ptr + NUM_SENTENCES)):
                log_rest = _log_unread(
                    rest_logit_ptr + head * GROUP * rest_columns,
                    rest_extent_ptr + head * GROUP * (2 * rest_extents),
                    selected_ptr + head * most_selected,
                    tl.load(number_ptr + head),
                    rest_columns,
                    rest_extents,
                    GROUP,
                    GROUP_BLOCK,
                    MERGED_GROUP,
                    EXTENT_BLOCK,
                    SELECTED_BLOCK,
                )
                mean_ptr = mean_address.to(tl.pointer_type(tl.float32)) + n * HEAD_DIM
                mean_value = tl.load(mean_ptr + h, mask=in_head, other=0.0)
            rest_entry = SPLITS * GROUP + g
            tl.store(extent_ptr + rest_entry * 2, log_rest, mask=in_group)
            tl.store(extent_ptr + rest_entry * 2 + 1, tl.where(log_rest > _NO_WEIGHT, 1.0, 0.0), mask=in_group)
            tl.store(
                partial_ptr + rest_entry[:, None] * HEAD_DIM + h[None, :],
                tl.zeros((GROUP_BLOCK, HEAD_BLOCK), tl.float32) + mean_value[None, :],
                mask=in_group[:, None] & in_head[None, :],
            )
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(arrived_ptr + head, 0)
        m = tl.arange(0, MERGED_GROUP)
        in_merged = m < GROUP
        p = tl.arange(0, SPLIT_BLOCK)
        entry_PG = extent_ptr + (p[:, None] * GROUP + m[None, :]) * 2
        there = (p < ENTRIES)[:, None] & in_merged[None, :]
        top_PG = tl.load(entry_PG, mask=there, other=float("-inf"))
        sum_PG = tl.load(entry_PG + 1, mask=there, other=0.0)
        top = tl.max(top_PG, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        # A lane without a sequence has nothing to attend to: its sums are 0.
        weight_PG = tl.exp(top_PG - top[None, :])
        sum_of = tl.maximum(tl.sum(weight_PG * sum_PG, axis=0), 1e-37)
        if REST:
            is_slot, is_rest = (p < SLOT_SPLITS)[:, None], (p == SPLITS)[:, None]
            of_selected = tl.sum(tl.where(is_slot, weight_PG * sum_PG, 0.0), axis=0)
            of_rest = tl.sum(tl.where(is_rest, weight_PG * sum_PG, 0.0), axis=0)
            similar = tl.where(of_selected > 0, SIMILAR, 0.0)
            more = 1.0 + similar * of_rest / tl.maximum(of_selected, 1e-37)
            weight_PG *= tl.where(is_slot, more[None, :], tl.where(is_rest, (1.0 - similar)[None, :], 1.0))
        # Weights go through memory, so that nothing in the loop waits for anything but its loads. They overwrite what
        # other warps may not have read yet.
        tl.debug_barrier()
        tl.store(entry_PG, weight_PG / sum_of[None, :], mask=there)
        tl.debug_barrier()
        c = tl.arange(0, MERGED_COLUMNS)
        in_columns = c < GROUP * HEAD_DIM
        merged_PC = tl.zeros((MERGED, MERGED_COLUMNS), tl.float32)
        for first in tl.range(0, ENTRIES, MERGED, loop_unroll_factor=4):
            some = first + tl.arange(0, MERGED)
            mask_PC = (some < ENTRIES)[:, None] & in_columns[None, :]
            weight_ptr = extent_ptr + (some[:, None] * GROUP + (c // HEAD_DIM)[None, :]) * 2
            partial_PC = tl.load(partial_ptr + some[:, None] * (GROUP * HEAD_DIM) + c[None, :], mask=mask_PC, other=0.0)
            merged_PC += partial_PC * tl.load(weight_ptr, mask=mask_PC, other=0.0)
        merged = tl.sum(merged_PC, axis=0)
        tl.store(output_ptr + head * GROUP * HEAD_DIM + c, merged.to(DTYPE), mask=in_columns)
        if SLOT_SPLITS > 0:
            number = tl.load(number_ptr + head)
            if number > 0:
                share_ptr = tl.load(address_ptr + SHARE).to(tl.pointer_type(tl.int64))
                k = tl.arange(0, SELECTED_BLOCK)
                log_total = tl.where(in_merged, top + tl.log(sum_of), 0.0)
                log_weight = tl.load(
                    sentence_ptr + m[:, None] * most_selected + k[None, :],
                    mask=in_merged[:, None] & (k < number)[None, :],
                    other=float("-inf"),
                )
                share = tl.sum(tl.exp(log_weight - log_total[:, None]), axis=0) / (GROUP * NUM_KV_HEADS)
                sentence = tl.load(selected_ptr + head * most_selected + k, mask=k < number, other=0)
                units = (share * SHARE_UNITS).to(tl.int64)
                tl.atomic_add(share_ptr + sentence, units, mask=k < number, sem="relaxed")


def _even_splits(blocks: int, programs: int) -> int:
    """As few programs as need not read more blocks, one after another, than `programs` would."""
    return triton.cdiv(blocks, max(1, triton.cdiv(blocks, programs))) if blocks else 0


def sparse_decode_triton(
    q_BAH: Tensor,
    k_BNH: Tensor,
    v_BNH: Tensor,
    lanes: Lanes,
    layer: int,
    selected_BNK: Tensor | None,
    resolved: Resolved | None,
    *,
    scale: float,
    sliding: bool = False,
    softcap: float | None = None,
    fetch: bool = False,
    rest: Scores | None = None,
) -> Tensor:
    """Attention over slots and resident tokens, by one kernel: partial results, merged by the last program to end."""
    batch, num_heads, head_dim = q_BAH.shape
    num_kv_heads = k_BNH.shape[1]
    fetch = fetch and resolved is not None
    group = num_heads // num_kv_heads
    device, dtype = q_BAH.device, q_BAH.dtype
    assert q_BAH.stride(2) == k_BNH.stride(2) == v_BNH.stride(2) == 1
    resident = [lane.resident_kv[layer] for lane in lanes.lanes]
    most_rows = max(kv.shape[1] for kv in resident)
    most_selected = 0 if resolved is None else resolved.slot_BNK.shape[2]
    slot_block = triton.next_power_of_2(lanes.slot_tokens)
    head_block = max(16, triton.next_power_of_2(head_dim))
    rows = min(_ROWS_FETCHED if fetch else _ROWS, max(16, _MOST_BYTES // (2 * head_block * dtype.itemsize)))
    slots = max(1, rows // slot_block)
    programs = max(1, _PROGRAMS // (num_kv_heads * batch))
    slot_splits = _even_splits(triton.cdiv(most_selected, slots), programs)
    splits = slot_splits + _even_splits(triton.cdiv(most_rows, rows), programs)
    merged_group = triton.next_power_of_2(group)
    columns = triton.next_power_of_2(group * head_dim)
    num_warps = 4 if fetch and head_block <= 128 else 8
    most_merged = max(1, _MERGED_NUMBERS * num_warps // columns)
    never_read = lanes.count_of
    where = (
        (never_read, never_read, never_read, never_read)
        if resolved is None
        else (resolved.slot_BNK, resolved.length_BNK, resolved.miss_BNK, resolved.count_BN)
    )
    assert not fetch or lanes.kv_format is None, "host memory holds codes: gather_kv unpacks them"
    assert not fetch or 2 * head_dim * dtype.itemsize % 16 == 0, "rows of host memory are read 16 bytes at a time"
    rest = rest if resolved is not None else None
    assert rest is None or (rest.sentence_BNS is None and rest.logit_BNGS.is_contiguous())
    output = torch.empty((batch, num_heads, head_dim), dtype=dtype, device=device)
    entries = splits + (rest is not None)
    partial = torch.empty((batch * num_heads * entries * head_dim,), dtype=torch.float32, device=device)
    extent = torch.empty((batch * num_heads * entries * 2,), dtype=torch.float32, device=device)
    of_sentence = torch.empty((batch * num_heads * most_selected,), dtype=torch.float32, device=device)
    address_rows = lanes.address_rows(layer)
    early = starts_early(q_BAH)
    _sparse_decode_kernel[(splits, num_kv_heads, batch)](
        q_BAH,
        k_BNH,
        v_BNH,
        address_rows,
        lanes.count_of,
        never_read if selected_BNK is None else selected_BNK,
        *where,
        output,
        partial,
        extent,
        of_sentence,
        lanes.scratch("sparse_decode", (lanes.num_lanes, num_kv_heads), torch.int32),
        never_read if rest is None else rest.logit_BNGS,
        never_read if rest is None else rest.extent_BNGX2,
        scale,
        softcap or 1.0,
        0 if rest is None else rest.logit_BNGS.shape[3],
        0 if rest is None else rest.extent_BNGX2.shape[3],
        most_selected,
        q_BAH.stride(0),
        q_BAH.stride(1),
        k_BNH.stride(0),
        k_BNH.stride(1),
        v_BNH.stride(0),
        v_BNH.stride(1),
        address_rows.stride(0),
        lanes.count_of.stride(0),
        most_rows,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block,
        SLOT_TOKENS=lanes.slot_tokens,
        SLOT_BLOCK=slot_block,
        SLOTS=slots,
        ROWS=rows,
        SLOT_SPLITS=slot_splits,
        SPLITS=splits,
        SPLIT_BLOCK=triton.next_power_of_2(entries),
        MERGED=min(most_merged, triton.next_power_of_2(entries)),
        MERGED_GROUP=merged_group,
        MERGED_COLUMNS=columns,
        SELECTED_BLOCK=triton.next_power_of_2(max(most_selected, 1)),
        EXTENT_BLOCK=1 if rest is None else triton.next_power_of_2(rest.extent_BNGX2.shape[3]),
        RING=sliding,
        FETCH=fetch,
        REST=rest is not None,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        DTYPE=element_type(dtype),
        EARLY=early,
        num_warps=num_warps,
        num_stages=1,
        maxnreg=(168 if fetch else 128) if head_block <= 128 else None,
        **launch_options(early),
    )
    return output


def sparse_decode(
    q_BAH: Tensor,
    k_BNH: Tensor,
    v_BNH: Tensor,
    lanes: Lanes,
    layer: int,
    selected_BNK: Tensor | None,
    resolved: Resolved | None,
    *,
    scale: float,
    sliding: bool = False,
    softcap: float | None = None,
    fetch: bool = False,
    rest: Scores | None = None,
) -> Tensor:
    """Attention of one new token over slots and resident tokens; see `sparse_decode_ref`."""
    op = sparse_decode_triton if q_BAH.is_cuda else sparse_decode_ref
    given = (q_BAH, k_BNH, v_BNH, lanes, layer, selected_BNK, resolved)
    return op(*given, scale=scale, sliding=sliding, softcap=softcap, fetch=fetch, rest=rest)
