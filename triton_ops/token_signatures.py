"""Bits that agree where two tokens' embeddings and positions are alike: on which sides of random planes they lie.

Angles are whole numbers of 2**-32 turns, of which 32-bit arithmetic keeps just the part within a turn: they are as good
at position 100,000 as at 1, where a float32 of radians has lost half its digits. And sines of such angles need no
division by pi, for which the compiler's own have code in doubles.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD_BITS = tl.constexpr(32)
"""Of a word of signatures."""
_BITS_OF_A_PROGRAM = 128
"""At most, so that a block of products stays in registers."""


def _steps(num_dims: int, base: float, device: torch.device) -> Tensor:
    """How far each pair of dimensions turns from one position to the next, in 2**-32 turns; int32 `[E / 2]`."""
    exponent = torch.arange(0, num_dims, 2, dtype=torch.float64, device=device) / -num_dims
    return (base**exponent * (2**32 / math.tau)).round().to(torch.int32)


def token_signatures_ref(
    token_T: Tensor, embedding_VE: Tensor, position_T: Tensor, plane_EB: Tensor, *, base: float = 10_000.0
) -> Tensor:
    """Signs of `rotated embedding @ plane`, packed: int32 `[T, B / 32]`.

    The embedding turns by its position as a query does, half-split, over all its dimensions: d and d + E / 2 by the
    angle `position * base ** (-2 d / E)` (Su et al. 2021, arXiv:2104.09864). Two signatures then differ in a share of
    about angle / pi of their bits (Charikar 2002), the angle being the one between the rotated embeddings: Hamming
    distance measures likeness of tokens and of places. The angle from one position to the next is rounded to 2**-32
    turns; what follows is float32, and dot products that are zero within its rounding may get either bit.

    Args:
        token_T: int64 `[T]`, rows of the table.
        embedding_VE: `[V, E]`, E even, of any floating dtype.
        position_T: `[T]`, integers.
        plane_EB: float32 `[E, B]`, B a multiple of 32. Plane b is bit `b % 32` of word `b // 32`; the bit is set where
            the product is positive.
        base: of the rotation's frequencies.
    """
    num_dims, num_bits = plane_EB.shape
    assert num_dims % 2 == 0
    assert num_bits % WORD_BITS.value == 0
    phase = (position_T.long()[:, None] * _steps(num_dims, base, plane_EB.device)).to(torch.int32)
    angle = phase * (math.tau / 2**32)
    cos, sin = angle.cos(), angle.sin()
    first, second = embedding_VE[token_T].float().chunk(2, dim=1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
    bit = (turned @ plane_EB > 0).int().unflatten(1, (-1, WORD_BITS.value))
    return (bit << torch.arange(WORD_BITS.value, dtype=torch.int32, device=bit.device)).sum(2, dtype=torch.int32)


@triton.jit
def _sine(phase):
    """Of int32 `phase` in 2**-32 turns, right to 2e-7: the odd polynomial of degree 11, within a quarter of a turn."""
    is_far = (phase > 1073741824) | (phase < -1073741824)
    phase = tl.where(is_far, -phase + (-2147483648), phase)
    x = phase.to(tl.float32) * 1.4629180792671596e-09
    square = x * x
    sine = square * (-1 / 39916800) + 1 / 362880
    sine = sine * square - 1 / 5040
    sine = sine * square + 1 / 120
    sine = sine * square - 1 / 6
    return x + x * square * sine


@triton.jit
def _token_signatures_kernel(
    token_ptr,
    embedding_ptr,
    position_ptr,
    step_ptr,
    plane_ptr,
    signature_ptr,
    num_tokens,
    stride_v,
    NUM_PAIRS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`BLOCK_B` bits of `BLOCK_T` tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    token = tl.load(token_ptr + t, mask=t < num_tokens, other=0)
    position = tl.load(position_ptr + t, mask=t < num_tokens, other=0).to(tl.int32)
    product = tl.zeros((BLOCK_T, BLOCK_B), tl.float32)
    for start in range(0, NUM_PAIRS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = (t < num_tokens)[:, None] & (d < NUM_PAIRS)[None, :]
        first_ptr = embedding_ptr + token[:, None] * stride_v + d[None, :]
        first = tl.load(first_ptr, mask=there, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + NUM_PAIRS, mask=there, other=0.0).to(tl.float32)
        step = tl.load(step_ptr + d, mask=d < NUM_PAIRS, other=0)
        phase = position[:, None] * step[None, :]
        sin, cos = _sine(phase), _sine(phase + 1073741824)
        planes = plane_ptr + d[:, None] * NUM_BITS + b[None, :]
        in_table = (d < NUM_PAIRS)[:, None] & (b < NUM_BITS)[None, :]
        plane = tl.load(planes, mask=in_table, other=0.0)
        product = tl.dot(first * cos - second * sin, plane, product, input_precision="ieee")
        plane = tl.load(planes + NUM_PAIRS * NUM_BITS, mask=in_table, other=0.0)
        product = tl.dot(second * cos + first * sin, plane, product, input_precision="ieee")
    bit = tl.reshape((product > 0).to(tl.int32), (BLOCK_T, BLOCK_B // WORD_BITS, WORD_BITS))
    word = tl.sum(bit << tl.arange(0, WORD_BITS)[None, None, :], 2)
    w = tl.program_id(1) * (BLOCK_B // WORD_BITS) + tl.arange(0, BLOCK_B // WORD_BITS)
    num_words: tl.constexpr = NUM_BITS // WORD_BITS
    tl.store(
        signature_ptr + t[:, None] * num_words + w[None, :],
        word,
        mask=(t < num_tokens)[:, None] & (w < num_words)[None, :],
    )


def token_signatures_triton(
    token_T: Tensor, embedding_VE: Tensor, position_T: Tensor, plane_EB: Tensor, *, base: float = 10_000.0
) -> Tensor:
    """Signatures by one kernel, a program for 32 tokens and up to 128 bits of each; no rotated row is ever stored."""
    num_dims, num_bits = plane_EB.shape
    num_tokens = token_T.numel()
    assert num_dims % 2 == 0
    assert num_bits % WORD_BITS.value == 0
    assert embedding_VE.shape[1] == num_dims
    assert embedding_VE.stride(1) == 1
    assert plane_EB.is_contiguous()
    assert plane_EB.dtype == torch.float32
    assert token_T.is_contiguous()
    assert position_T.is_contiguous()
    assert position_T.shape == token_T.shape
    signature = torch.empty((num_tokens, num_bits // WORD_BITS.value), dtype=torch.int32, device=token_T.device)
    block_b = min(triton.next_power_of_2(num_bits), _BITS_OF_A_PROGRAM)
    if signature.numel():
        _token_signatures_kernel[(triton.cdiv(num_tokens, 32), triton.cdiv(num_bits, block_b))](
            token_T,
            embedding_VE,
            position_T,
            _steps(num_dims, base, plane_EB.device),
            plane_EB,
            signature,
            num_tokens,
            embedding_VE.stride(0),
            NUM_PAIRS=num_dims // 2,
            NUM_BITS=num_bits,
            BLOCK_T=32,
            BLOCK_D=32,
            BLOCK_B=block_b,
            num_warps=4,
        )
    return signature


def token_signatures(
    token_T: Tensor, embedding_VE: Tensor, position_T: Tensor, plane_EB: Tensor, *, base: float = 10_000.0
) -> Tensor:
    """Signatures of tokens at positions; see `token_signatures_ref`."""
    op = token_signatures_triton if embedding_VE.is_cuda else token_signatures_ref
    return op(token_T, embedding_VE, position_T, plane_EB, base=base)
