"""Signatures against their definition in float64: each bit is the side on which a rotated embedding lies."""

import math

import pytest
import torch
from torch import Tensor

from triton_ops.token_signatures import token_signatures, token_signatures_ref, token_signatures_triton

OPS = [token_signatures, token_signatures_ref, token_signatures_triton]


def case(
    num_tokens: int, num_dims: int, num_bits: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, a table of them, positions, planes."""
    generator = torch.Generator().manual_seed(num_tokens + num_dims + num_bits)
    token = torch.randint(0, 23, (num_tokens,), generator=generator)
    embedding = torch.randn((23, num_dims), generator=generator).to(dtype)
    position = torch.randint(0, 200_000, (num_tokens,), generator=generator)
    plane = torch.randn((num_dims, num_bits), generator=generator)
    return token.to(device), embedding.to(device), position.to(device), plane.to(device)


def bits_of(signature: Tensor) -> Tensor:
    """Bit b of each token, from word `b // 32`, bit `b % 32`."""
    words = [signature[:, i].cpu().long() & 0xFFFFFFFF for i in range(signature.shape[1])]
    return torch.stack([(word >> i) & 1 for word in words for i in range(32)], dim=1).bool()


def products(
    token: Tensor, embedding: Tensor, position: Tensor, plane: Tensor, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """The dot products in float64, dimension by dimension, and the sum of the magnitudes in each."""
    num_dims, num_bits = plane.shape
    x, plane = embedding.cpu().double()[token.cpu()], plane.cpu().double()
    product = torch.zeros((len(x), num_bits), dtype=torch.float64)
    magnitude = product.clone()
    for d in range(num_dims // 2):
        # The step is rounded by definition: at far positions by more than all that follows.
        step = round(base ** (-2 * d / num_dims) / math.tau * 2**32)
        angle = position.cpu().double() * (step * math.tau / 2**32)
        first, second = x[:, d], x[:, d + num_dims // 2]
        turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
        for value, i in zip(turned, (d, d + num_dims // 2), strict=True):
            product += value[:, None] * plane[i]
            magnitude += (first.abs() + second.abs())[:, None] * plane[i].abs()
    return product, magnitude


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_dims", "num_bits"), [(1, 2, 32), (33, 70, 96), (70, 130, 128), (5, 64, 160)]
)
def test_bits_are_sides_of_planes(
    op, dtype: torch.dtype, num_tokens: int, num_dims: int, num_bits: int, kernel_device: torch.device, poison: None
) -> None:
    """But where the product is zero within the rounding of a float32 sum, which is hardly anywhere."""
    tensors = case(num_tokens, num_dims, num_bits, kernel_device, dtype)
    signature = op(*tensors)
    assert signature.dtype == torch.int32
    assert signature.shape == (num_tokens, num_bits // 32)
    product, magnitude = products(*tensors)
    # A sum of E terms, each of two products with a sine and a cosine that are right to 2e-7.
    decided = product.abs() > (num_dims + 8) * torch.finfo(torch.float32).eps * magnitude
    assert decided.double().mean() > 0.995
    assert torch.equal(bits_of(signature)[decided], (product > 0)[decided])


@pytest.mark.parametrize("op", OPS)
def test_base_of_the_rotation(op, kernel_device: torch.device) -> None:
    tensors = case(40, 32, 64, kernel_device)
    product, magnitude = products(*tensors, base=500.0)
    decided = product.abs() > 40 * torch.finfo(torch.float32).eps * magnitude
    assert torch.equal(bits_of(op(*tensors, base=500.0))[decided], (product > 0)[decided])
    assert not torch.equal(op(*tensors, base=500.0), op(*tensors))


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op, kernel_device: torch.device) -> None:
    token, embedding, position, plane = case(4, 8, 64, kernel_device)
    assert op(token[:0], embedding, position[:0], plane).shape == (0, 2)


@pytest.mark.parametrize("op", OPS)
def test_a_table_with_strided_rows(op, kernel_device: torch.device) -> None:
    token, embedding, position, plane = case(9, 16, 32, kernel_device)
    wide = torch.cat([embedding, torch.full_like(embedding, torch.nan)], dim=1)[:, :16]
    assert torch.equal(op(token, wide, position, plane), op(token, embedding, position, plane))


@pytest.mark.parametrize("op", OPS)
def test_a_row_of_zeros_has_no_bits(op, kernel_device: torch.device) -> None:
    token, embedding, position, plane = case(9, 16, 64, kernel_device)
    assert not op(token, torch.zeros_like(embedding), position, plane).any()


def test_distance_estimates_the_angle(device: torch.device) -> None:
    """Of two embeddings at one place, whatever the place: bits differ in a share of angle / pi."""
    num_bits = 4096
    _, embedding, _, plane = case(1, 48, num_bits, device)
    same_place = torch.full((23,), 77, device=device)
    bits = bits_of(token_signatures(torch.arange(23, device=device), embedding, same_place, plane))
    share = (bits[:, None] ^ bits[None, :]).double().mean(2)
    cosine = torch.nn.functional.cosine_similarity(embedding[:, None], embedding[None, :], dim=2).cpu().double()
    # Four standard deviations of a mean of so many coins and a half for 253 pairs.
    assert ((share - cosine.clamp(-1, 1).acos() / math.pi).abs() < 4.5 * 0.5 / num_bits**0.5).all()
