"""From the packed output of the query, key and value projections to what attention takes."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.rms_norm import rms_norm_ref

_FEW_ROWS = 32
"""Up to this many, there are few programs even with one for each head."""
_HEADS = 8
"""Heads of a program otherwise."""


class Heads(NamedTuple):
    """Queries `[B, A, H]`, keys and values `[B, N, H]`, each contiguous."""

    q_BAH: Tensor
    k_BNH: Tensor
    v_BNH: Tensor


def _rotate_ref(x_BAH: Tensor, cos_BR: Tensor, sin_BR: Tensor) -> Tensor:
    num_rotary = cos_BR.shape[1]
    x, rest = x_BAH[..., :num_rotary], x_BAH[..., num_rotary:]
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.cat([x * cos_BR[:, None] + turned * sin_BR[:, None], rest], -1).to(x_BAH.dtype)


def rotary_ref(
    qkv_BO: Tensor,
    cos_BR: Tensor | None,
    sin_BR: Tensor | None,
    *,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> Heads:
    """Normalised and rotated heads; half-split rotation (Su et al. 2021, arXiv:2104.09864, in the layout of Llama).

    Args:
        qkv_BO: `[B, (A + 2 * N) * H]`, the query heads first, then keys, then values.
        cos_BR, sin_BR: `[B, R]`, R even and at most H: the first R dimensions turn, in pairs (d, d + R / 2). Both None:
            nothing turns.
        q_norm_H, k_norm_H: weights `[H]` of an RMSNorm over each head, before the rotation.
        norm_eps, norm_offset: as in `rms_norm`.
    """
    batch = qkv_BO.shape[0]
    heads = qkv_BO.view(batch, -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_H is not None:
        q = rms_norm_ref(q, q_norm_H, eps=norm_eps, offset=norm_offset)
    if k_norm_H is not None:
        k = rms_norm_ref(k, k_norm_H, eps=norm_eps, offset=norm_offset)
    if cos_BR is not None and sin_BR is not None:
        q, k = _rotate_ref(q, cos_BR, sin_BR), _rotate_ref(k, cos_BR, sin_BR)
    return Heads(q.contiguous(), k.contiguous(), v.contiguous())


@triton.jit
def _normed(x, square_mean, weight, eps, offset, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Rounded where tensors would be."""
    x *= tl.rsqrt(square_mean + eps)
    if OFFSET:
        return (x * (weight + offset)).to(dtype).to(tl.float32)
    return (x.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _rotary_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_stride,
    cos_stride,
    sin_stride,
    num_heads,
    num_kv_heads,
    eps,
    offset,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_ROTARY: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`HEADS` heads of one row."""
    # One dimension: the others of a grid end at 65,535, which a chunk of a text may pass.
    all_heads = num_heads + 2 * num_kv_heads
    blocks = tl.cdiv(all_heads, HEADS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    head = ((tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS))[:, None]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    h = tl.arange(0, HEAD_BLOCK)[None, :]
    inside = (h < HEAD_DIM) & (head < all_heads)
    turns = h < NUM_ROTARY
    # The dimension that each one is turned with, and the sign with which that one enters.
    partner = tl.where(turns, tl.where(h < NUM_ROTARY // 2, h + NUM_ROTARY // 2, h - NUM_ROTARY // 2), h)
    sign = tl.where(h < NUM_ROTARY // 2, -1.0, 1.0)
    is_q = head < num_heads
    is_k = (head >= num_heads) & (head < num_heads + num_kv_heads)
    wait_for_inputs(EARLY)
    x_ptr = qkv_ptr + b * qkv_stride + head * HEAD_DIM
    x = tl.load(x_ptr + h, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    if Q_NORM or K_NORM:
        square_mean = tl.sum(x * x, 1)[:, None] / HEAD_DIM
        if Q_NORM:
            weight = tl.load(q_norm_ptr + h, mask=h < HEAD_DIM, other=0.0).to(tl.float32)
            weight_y = tl.load(q_norm_ptr + partner, mask=h < HEAD_DIM, other=0.0).to(tl.float32)
            x = tl.where(is_q, _normed(x, square_mean, weight, eps, offset, OFFSET, dtype), x)
            y = tl.where(is_q, _normed(y, square_mean, weight_y, eps, offset, OFFSET, dtype), y)
        if K_NORM:
            weight = tl.load(k_norm_ptr + h, mask=h < HEAD_DIM, other=0.0).to(tl.float32)
            weight_y = tl.load(k_norm_ptr + partner, mask=h < HEAD_DIM, other=0.0).to(tl.float32)
            x = tl.where(is_k, _normed(x, square_mean, weight, eps, offset, OFFSET, dtype), x)
            y = tl.where(is_k, _normed(y, square_mean, weight_y, eps, offset, OFFSET, dtype), y)
    if NUM_ROTARY > 0:
        cos = tl.load(cos_ptr + b * cos_stride + h, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * sin_stride + h, mask=turns, other=0.0).to(tl.float32)
        # The two products are rounded, as they are where they are tensors of their own.
        turned = (x * cos).to(dtype).to(tl.float32) + (sign * y * sin).to(dtype).to(tl.float32)
        x = tl.where(turns & (is_q | is_k), turned, x)
    k_head = head - num_heads
    v_head = k_head - num_kv_heads
    tl.store(q_ptr + (b * num_heads + head) * HEAD_DIM + h, x, mask=inside & is_q)
    tl.store(k_ptr + (b * num_kv_heads + k_head) * HEAD_DIM + h, x, mask=inside & is_k)
    tl.store(v_ptr + (b * num_kv_heads + v_head) * HEAD_DIM + h, x, mask=inside & (v_head >= 0))


def rotary_triton(
    qkv_BO: Tensor,
    cos_BR: Tensor | None,
    sin_BR: Tensor | None,
    *,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> Heads:
    """`rotary_ref` as one kernel, a program for each head of each row; for several heads where there are many rows."""
    batch, num_out = qkv_BO.shape
    num_heads = num_out // head_dim - 2 * num_kv_heads
    assert num_heads > 0
    assert (num_heads + 2 * num_kv_heads) * head_dim == num_out
    assert qkv_BO.stride(1) == 1
    num_rotary = 0
    if cos_BR is not None:
        assert sin_BR is not None
        assert cos_BR.shape == sin_BR.shape
        assert cos_BR.shape[0] == batch
        assert cos_BR.stride(1) == sin_BR.stride(1) == 1
        num_rotary = cos_BR.shape[1]
        assert num_rotary % 2 == 0
        assert num_rotary <= head_dim
    for weight in (q_norm_H, k_norm_H):
        assert weight is None or (weight.shape == (head_dim,) and weight.is_contiguous())

    def empty(heads: int) -> Tensor:
        return torch.empty((batch, heads, head_dim), dtype=qkv_BO.dtype, device=qkv_BO.device)

    out = Heads(empty(num_heads), empty(num_kv_heads), empty(num_kv_heads))
    early = starts_early(qkv_BO)
    any_norm = q_norm_H if q_norm_H is not None else k_norm_H if k_norm_H is not None else qkv_BO
    heads = 1 if batch <= _FEW_ROWS else _HEADS
    _rotary_kernel[(triton.cdiv(num_heads + 2 * num_kv_heads, heads) * batch,)](
        qkv_BO,
        qkv_BO if cos_BR is None else cos_BR,
        qkv_BO if sin_BR is None else sin_BR,
        any_norm if q_norm_H is None else q_norm_H,
        any_norm if k_norm_H is None else k_norm_H,
        *out,
        qkv_BO.stride(0),
        0 if cos_BR is None else cos_BR.stride(0),
        0 if sin_BR is None else sin_BR.stride(0),
        num_heads,
        num_kv_heads,
        norm_eps,
        norm_offset,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        HEADS=heads,
        NUM_ROTARY=num_rotary,
        Q_NORM=q_norm_H is not None,
        K_NORM=k_norm_H is not None,
        OFFSET=norm_offset != 0,
        EARLY=early,
        num_warps=1 if heads == 1 else 4,
        **launch_options(early),
    )
    return out


def rotary(
    qkv_BO: Tensor,
    cos_BR: Tensor | None,
    sin_BR: Tensor | None,
    *,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> Heads:
    """Queries, keys and values of one layer, ready for attention; see `rotary_ref`."""
    op = rotary_triton if qkv_BO.is_cuda else rotary_ref
    return op(
        qkv_BO,
        cos_BR,
        sin_BR,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_norm_H=q_norm_H,
        k_norm_H=k_norm_H,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )
