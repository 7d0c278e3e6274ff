"""Keys as codes of a few bits per dimension, within the bounding box of their sentence."""

import torch
from torch import Tensor


def encode_keys_ref(key_TNH: Tensor, box_SN2H: Tensor, offsets: Tensor, *, bits: int) -> Tensor:
    """Packed codes, uint8 `[T, N, ceil(H * bits / 8)]`: in which of `2**bits` equal cells of the box each number lies.

    Dimension h of a key is in byte `h % W` at bit `bits * (h // W)`, with `W` the number of bytes: a byte holds
    dimensions that are `W` apart, so that unpacking gives contiguous runs.

    Args:
        key_TNH: `[T, N, H]` keys of whole sentences.
        box_SN2H: `[S, N, 2, H]` minimum and maximum of each sentence's keys.
        offsets: int64 `[S + 1]`, CSR over the T tokens.
        bits: 1, 2 or 4.
    """
    assert bits in (1, 2, 4)
    num_tokens, num_heads, head_dim = key_TNH.shape
    lengths = offsets[1:] - offsets[:-1]
    sentence_of_token = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=key_TNH.device), lengths, output_size=num_tokens
    )
    low, high = box_SN2H.float()[sentence_of_token].unbind(dim=2)
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    code = ((key_TNH.float() - low) / width * 2**bits).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    per_byte = 8 // bits
    num_bytes = -(-head_dim // per_byte)
    code = torch.nn.functional.pad(code, (0, num_bytes * per_byte - head_dim))
    packed = torch.zeros((num_tokens, num_heads, num_bytes), dtype=torch.uint8, device=key_TNH.device)
    for i, part in enumerate(code.split(num_bytes, dim=-1)):
        packed |= part << (bits * i)
    return packed


def encode_keys(key_TNH: Tensor, box_SN2H: Tensor, offsets: Tensor, *, bits: int) -> Tensor:
    """Packed codes of keys; see `encode_keys_ref`."""
    return encode_keys_ref(key_TNH, box_SN2H, offsets, bits=bits)
