"""Exact causal attention of new tokens over all earlier ones: what reading a context and the `full` policy use.

Knows tensors only. `exact_attention` picks the fastest kernel that torch has for the case; `exact_attention_ref` is
its slow twin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

_QUERY_BLOCK = 1024
"""Rows of an explicit mask or logit block: bounds the temporary memory, and skips the keys that no row may see."""


def visible(num_new: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `num_new` tokens may see: bool `[num_new, num_keys]`, itself included."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_new, num_keys, device=device)[:, None]
    mask = key <= query
    if sliding_window is not None:
        mask &= key > query - sliding_window
    return mask


def _has_fused_kernel(q_ALH: Tensor, num_keys: int) -> bool:
    """Whether torch attends causally from the last tokens without writing out a mask or logits."""
    if q_ALH.is_cuda:
        return q_ALH.dtype != torch.float32 and q_ALH.shape[2] <= 256
    return q_ALH.shape[1] in (1, num_keys)


def exact_attention_ref(
    q_ALH: Tensor,
    kv_NTH: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T) v with explicit weights; arguments as in `exact_attention`, memory of order A * L * T."""
    num_new, num_keys = q_ALH.shape[1], kv_NTH.shape[1]
    groups = q_ALH.shape[0] // kv_NTH.shape[0]
    key, value = (kv_NTH[:, :, i].repeat_interleave(groups, dim=0) for i in (0, 1))
    logit = torch.matmul(q_ALH, key.transpose(1, 2)).float() * scale
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    logit.masked_fill_(~visible(num_new, num_keys, sliding_window, q_ALH.device), -torch.inf)
    return torch.matmul(torch.softmax(logit, dim=-1).to(value.dtype), value)


def exact_attention(
    q_ALH: Tensor,
    kv_NTH: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention output `[A, L, H]` of the last L of T tokens, causal, over all T.

    Args:
        q_ALH: `[A, L, H]` post-RoPE queries of the A = N * G query heads, those of one KV head adjacent.
        kv_NTH: `[N, T, 2, H]`: keys and values of all T tokens, the new ones last.
        sliding_window: a token sees the last so many tokens, itself included; None: all.
        softcap: logits become `softcap * tanh(logit / softcap)` (Gemma 2).
    """
    num_new, num_keys = q_ALH.shape[1], kv_NTH.shape[1]
    if sliding_window is not None and sliding_window >= num_keys:
        sliding_window = None
    if softcap is None and sliding_window is None and _has_fused_kernel(q_ALH, num_keys):
        key, value = kv_NTH[:, :, 0][None], kv_NTH[:, :, 1][None]
        if num_new == 1:
            output = F.scaled_dot_product_attention(q_ALH[None], key, value, scale=scale, enable_gqa=True)
        else:
            bias = causal_lower_right(num_new, num_keys)
            output = F.scaled_dot_product_attention(q_ALH[None], key, value, bias, scale=scale, enable_gqa=True)
        return output[0]

    output = torch.empty_like(q_ALH)
    first = num_keys - num_new
    for start in range(0, num_new, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, num_new)
        low = 0 if sliding_window is None else max(0, first + start - sliding_window + 1)
        block = kv_NTH[:, low : first + stop]
        q = q_ALH[:, start:stop]
        if softcap is not None:
            output[:, start:stop] = exact_attention_ref(
                q, block, scale=scale, sliding_window=sliding_window, softcap=softcap
            )
            continue
        mask = visible(stop - start, block.shape[1], sliding_window, q.device)
        if q.is_cuda:
            # With a mask, torch's fused CUDA kernels do not group heads; unfused attention would cost far more memory.
            block = block.repeat_interleave(q.shape[0] // block.shape[0], dim=0)
        output[:, start:stop] = F.scaled_dot_product_attention(
            q[None], block[None, :, :, 0], block[None, :, :, 1], mask, scale=scale, enable_gqa=not q.is_cuda
        )[0]
    return output
