"""Exact causal attention of new tokens over all earlier ones: what reading a context and the `full` policy use.

Knows tensors only. `exact_attention` picks the fastest kernel that torch has for the case; `exact_attention_ref` is
its slow twin. `attention_in_parts` is the same where earlier tokens come part by part, and need not be there at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from triton_ops import merge_attention

_QUERY_BLOCK = 1024
"""Rows of an explicit mask or logit block: bounds the temporary memory, and skips the keys that no row may see."""
GRAIN_TOKENS = 2048
"""cuDNN attends twice as fast on Hopper as FlashAttention 2 (675 against 337 TFLOP/s; docs/design.md, section 7),
but spends 45 ms on planning each new shape. So it gets numbers of tokens that are multiples of this."""
_LOGITS_AT_ONCE = 1 << 26
"""Numbers of an explicit logit block of `partial_attention_ref`."""


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


def _suits_cudnn(q_ALH: Tensor, kv_NTH: Tensor) -> bool:
    """Whether cuDNN takes it, is faster, and will see more of that shape."""
    return (
        q_ALH.is_cuda
        and q_ALH.shape[1] % GRAIN_TOKENS == 0
        and kv_NTH.shape[1] % GRAIN_TOKENS == 0
        and q_ALH.dtype != torch.float32
        and q_ALH.shape[2] <= 128
        and q_ALH.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(q_ALH.device) >= (9, 0)
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


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
        if num_new == num_keys and _suits_cudnn(q_ALH, kv_NTH):
            return partial_attention(q_ALH, kv_NTH, scale=scale, softcap=None, causal=True)[0]
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


def attention_in_parts(
    q_ALH: Tensor, new_NLH: Tensor, earlier: Iterable[Tensor], *, scale: float, softcap: float | None = None
) -> Tensor:
    """As `exact_attention` with `kv_NTH` being the earlier tokens and then the new ones: `[A, L, H]`.

    Args:
        new_NLH: `[N, L, 2, H]`, of the L tokens themselves.
        earlier: `[N, any, 2, H]`, of tokens before them, in any order and any number of parts; each is used up before
            the next is asked for.
    """
    output, log_AL = partial_attention(q_ALH, new_NLH, scale=scale, softcap=softcap, causal=True)
    return attention_after(output, log_AL, q_ALH, earlier, scale=scale, softcap=softcap)


def attention_after(
    output: Tensor,
    log_AL: Tensor,
    q_ALH: Tensor,
    earlier: Iterable[Tensor],
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention `output`, `[A, L, H]`, over some keys, with that over earlier ones added; written to and returned.

    Args:
        log_AL: float32, the log of the sum of the exponents in `output`.
        earlier: as of `attention_in_parts`; the queries see all of them.
    """
    total, log_AL = output.float().contiguous(), log_AL.contiguous()

    def add(kv_NTH: Tensor) -> None:
        merge_attention(total, log_AL, *partial_attention(q_ALH, kv_NTH, scale=scale, softcap=softcap, causal=False))

    odd: list[Tensor] = []
    for kv_NTH in earlier:
        num_even = kv_NTH.shape[1] // GRAIN_TOKENS * GRAIN_TOKENS
        if num_even:
            add(kv_NTH[:, :num_even])
        if num_even < kv_NTH.shape[1]:
            odd.append(kv_NTH[:, num_even:].clone())
    if odd:
        add(torch.cat(odd, dim=1))
    return output.copy_(total)  # in the layout that the kernel chose, which the model's own layout is


def partial_attention_ref(
    q_ALH: Tensor, kv_NTH: Tensor, *, scale: float, softcap: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """`partial_attention` with explicit weights, some rows at a time."""
    num_heads, num_new, _ = q_ALH.shape
    num_keys = kv_NTH.shape[1]
    key, value = (kv_NTH[:, :, i].repeat_interleave(num_heads // kv_NTH.shape[0], dim=0) for i in (0, 1))
    output, log = torch.empty_like(q_ALH), torch.empty((num_heads, num_new), device=q_ALH.device)
    rows = max(_LOGITS_AT_ONCE // (num_heads * max(num_keys, 1)), 16)
    for start in range(0, num_new, rows):
        stop = min(start + rows, num_new)
        logit = torch.matmul(q_ALH[:, start:stop], key.transpose(1, 2)).float() * scale
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        if causal:
            logit.masked_fill_(~visible(num_new, num_keys, None, q_ALH.device)[start:stop], -torch.inf)
        log[:, start:stop] = logit.logsumexp(dim=-1)
        weight = torch.softmax(logit, dim=-1).to(value.dtype)
        output[:, start:stop] = torch.matmul(weight, value)
    return output, log


def partial_attention(
    q_ALH: Tensor, kv_NTH: Tensor, *, scale: float, softcap: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, `[A, L, H]`, and the log of the sum of its exponents, float32 `[A, L]`.

    Args:
        causal: there are as many keys as queries, and each query sees those up to its own; else all see all.
    """
    head_dim = q_ALH.shape[2]
    if softcap is not None or (q_ALH.is_cuda and (q_ALH.dtype == torch.float32 or head_dim > 256 or head_dim % 8)):
        return partial_attention_ref(q_ALH, kv_NTH, scale=scale, softcap=softcap, causal=causal)
    q, key, value = q_ALH[None], kv_NTH[None, :, :, 0], kv_NTH[None, :, :, 1]
    # What scaled_dot_product_attention takes as well; called by name, since it keeps the sums to itself.
    if _suits_cudnn(q_ALH, kv_NTH):
        output, log = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, key, value, None, True, 0.0, causal, scale=scale
        )[:2]
        log = log.reshape(1, *q_ALH.shape[:2])  # with or without a last dimension of 1, by version
    elif q.is_cuda:
        output, log = torch.ops.aten._scaled_dot_product_flash_attention(q, key, value, 0.0, causal, scale=scale)[:2]
    else:
        output, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, key, value, 0.0, causal, scale=scale
        )
    return output[0], log[0, :, : q_ALH.shape[1]]  # some kernels round the number of rows up
