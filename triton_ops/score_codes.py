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
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, *, scale: float, bits: int
) -> Tensor:
    """Logits `[N, G, S]` float32: log of the sum over a sentence's tokens of exp(scale * q . decoded key).

    Args:
        q_NGH: `[N, G, H]` post-RoPE queries.
        box_SN2H: `[S, N, 2, H]` minimum and maximum of each sentence's keys.
        code_TNW: uint8 codes as `encode_keys` packs them, the tokens of the sentences in order.
        length_S: int64 `[S]`, tokens in each sentence, summing to T.
    """
    num_tokens, num_sentences = code_TNW.shape[0], length_S.numel()
    sentence_of_token = torch.repeat_interleave(
        torch.arange(num_sentences, device=code_TNW.device), length_S, output_size=num_tokens
    )
    key_TNH = decode_keys_ref(code_TNW, box_SN2H[sentence_of_token], bits=bits)
    logit_NGT = torch.matmul(q_NGH.float() * scale, key_TNH.permute(1, 2, 0))
    shape = (*logit_NGT.shape[:2], num_sentences)
    index = sentence_of_token.expand_as(logit_NGT)
    largest = logit_NGT.new_full(shape, -torch.inf).scatter_reduce_(2, index, logit_NGT, "amax")
    mass = torch.exp(logit_NGT - largest.gather(2, index))
    return largest + torch.log(torch.zeros_like(largest).scatter_add_(2, index, mass))


def score_codes(
    q_NGH: Tensor, box_SN2H: Tensor, code_TNW: Tensor, length_S: Tensor, *, scale: float, bits: int
) -> Tensor:
    """Logits of sentences from coded keys; see `score_codes_ref`."""
    return score_codes_ref(q_NGH, box_SN2H, code_TNW, length_S, scale=scale, bits=bits)
