"""Codes against their definition: the cell of the box in which each number lies."""

import pytest
import torch
from torch import Tensor

from tests.lanes import random_lengths
from triton_ops import summarize
from triton_ops.encode_keys import encode_keys, encode_keys_ref, encode_keys_triton
from triton_ops.score_codes import decode_keys_ref

OPS = [encode_keys, encode_keys_ref, encode_keys_triton]
LENGTHS = [*random_lengths(9, 32), 1, 1]


def boxed(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, boxes in their dtype, offsets, and each token's box."""
    torch.manual_seed(0)
    key = (torch.randn(sum(LENGTHS), 2, dim) * 3 + 50).to(dtype).to(device)
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    moments = summarize(key, offsets)
    box = torch.stack([moments.minimum, moments.maximum], dim=2).to(dtype)
    return key, box, offsets, box.repeat_interleave(torch.tensor(LENGTHS, device=device), dim=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 20, 9, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_decode_to_within_half_a_cell(op, bits: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    key, box, offsets, box_of_token = boxed(dim, device, dtype)
    code = op(key, box, offsets, bits=bits)
    assert code.dtype == torch.int16
    assert code.shape == (sum(LENGTHS), 2, -(-dim // 16) * bits)
    decoded = decode_keys_ref(code, box_of_token, bits=bits)
    half_cell = (box_of_token[:, :, 1] - box_of_token[:, :, 0]).float() / 2**bits / 2
    assert ((decoded - key.float()).abs() <= half_cell + 1e-4).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 20])
def test_bits_are_where_they_are_promised(op, bits: int, dim: int, device: torch.device) -> None:
    """Number h in word `h % W` at bit `bits * (h // W)`; all other bits are zero."""
    key, box, offsets, box_of_token = boxed(dim, device)
    code = op(key, box, offsets, bits=bits).cpu()
    low, high = box_of_token.unbind(dim=2)
    # A sentence of one token has a box without width: its cell is 0.
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    cell = ((key - low) / width * 2**bits).floor().clamp(0, 2**bits - 1).to(torch.int64).cpu()
    num_words = code.shape[2]
    expected = torch.zeros(code.shape, dtype=torch.int64)
    for h in range(dim):
        expected[:, :, h % num_words] += cell[:, :, h] << (bits * (h // num_words))
    assert torch.equal(code.long() & 0xFFFF, expected)
