"""Queries against coded keys: the attention mass that each sentence would get, from a few bits per number."""

import torch
from torch import Tensor


def decode_keys_ref(code_TNW: Tensor, box_TN2H: Tensor, *, bits: int) -> Tensor:
    """Keys `[T, N, H]` float32 at the centres of their cells; `box_TN2H` is each token's sentence's box."""
    head_dim = box_TN2H.shape[-1]
    parts = [(code_TNW >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    cell = torch.cat(parts, dim=-1)[..., :head_dim].float() + 0.5
    low, high = box_TN2H.float().unbind(dim=2)
    return low + cell * ((high - low) / 2**bits)


def score_codes_ref(
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, *, scale: float, bits: int, longest: int
) -> Tensor:
    """Logits `[N, G, S]` float32: log of the sum over a sentence's tokens of exp(scale * q . decoded key).

    A decoded number is the middle of its box's lowest cell plus a step for each level, so the box enters once per
    sentence, into the query, and tokens meet it as bare levels.

    Args:
        q_NGH: `[N, G, H]` post-RoPE queries.
        box_SN2H: `[S, N, 2, H]` minimum and maximum of each sentence's keys.
        code_TNW: uint8 codes as `encode_keys` packs them, the tokens of the sentences in order.
        length_S: int64 `[S]`, tokens in each sentence, summing to T.
        longest: at least as many tokens as any sentence has.
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


def score_codes(
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, *, scale: float, bits: int, longest: int
) -> Tensor:
    """Logits of sentences from coded keys; see `score_codes_ref`."""
    return score_codes_ref(q_NGH, box_SN2H, code_TNW, length_S, scale=scale, bits=bits, longest=longest)
