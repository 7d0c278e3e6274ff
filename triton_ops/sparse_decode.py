"""Attention of one query token over hot-set slots and the tokens that are always read."""

from typing import NamedTuple

import torch
from torch import Tensor


class SparseDecoded(NamedTuple):
    """`output_NGH` in the query's dtype; `share_NGK` float32: attention weight of each selected sentence."""

    output_NGH: Tensor
    share_NGK: Tensor


def sparse_decode_ref(
    q_NGH: Tensor,
    hot_kv: Tensor,
    slot_NK: Tensor,
    length_NK: Tensor,
    resident_kv: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> SparseDecoded:
    """softmax(q k^T) v over the selected sentences and the resident tokens, as one softmax.

    Args:
        q_NGH: `[N, G, H]`, post-RoPE queries of the G query heads that share a KV head.
        hot_kv: `[N, C, M, 2, H]`, the slots.
        slot_NK, length_NK: int64 `[N, K]`: slot (-1: none) and tokens of each selected sentence.
        resident_kv: `[N, R, 2, H]`: sink, window and tail.
        scale: multiplies the logits; softcap: `softcap * tanh(logit / softcap)` after it (Gemma 2).
    """
    num_heads, num_groups, head_dim = q_NGH.shape
    num_selected, slot_tokens = slot_NK.shape[1], hot_kv.shape[2]
    head_N1 = torch.arange(num_heads, device=q_NGH.device)[:, None]
    picked = hot_kv[head_N1, slot_NK.clamp(min=0)]  # [N, K, M, 2, H]
    in_sentence = torch.arange(slot_tokens, device=q_NGH.device) < length_NK[:, :, None]
    valid_NKM = in_sentence & (slot_NK >= 0)[:, :, None]
    # Rows that nobody wrote may hold anything, and 0 * NaN is NaN: values are zeroed, logits set to -inf.
    picked = picked.masked_fill(~valid_NKM[..., None, None], 0)
    kv = torch.cat([picked.reshape(num_heads, num_selected * slot_tokens, 2, head_dim), resident_kv], dim=1)
    logit = torch.matmul(q_NGH, kv[:, :, 0].transpose(1, 2)).float() * scale
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    logit[:, :, : num_selected * slot_tokens].masked_fill_(~valid_NKM.reshape(num_heads, 1, -1), -torch.inf)
    weight = torch.softmax(logit, dim=-1)
    output = torch.matmul(weight.to(kv.dtype), kv[:, :, 1])
    share = weight[:, :, : num_selected * slot_tokens].view(num_heads, num_groups, num_selected, slot_tokens).sum(-1)
    return SparseDecoded(output, share)


def sparse_decode(
    q_NGH: Tensor,
    hot_kv: Tensor,
    slot_NK: Tensor,
    length_NK: Tensor,
    resident_kv: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> SparseDecoded:
    """Attention over slots and resident tokens; see `sparse_decode_ref`."""
    return sparse_decode_ref(q_NGH, hot_kv, slot_NK, length_NK, resident_kv, scale=scale, softcap=softcap)
