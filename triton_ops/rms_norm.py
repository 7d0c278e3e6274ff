"""Root-mean-square normalisation of a few rows; formula: Zhang and Sennrich 2019, arXiv:1910.07467."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs


def rms_norm_ref(x_BI: Tensor, weight_I: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension, `[B, I]` in x's dtype.

    The mean and the quotient are at least float32; the quotient is rounded to x's dtype before it meets the weight (as
    transformers does) unless there is an offset, in which case nothing is rounded before the end (as in Gemma).
    """
    x = x_BI.to(torch.promote_types(x_BI.dtype, torch.float32))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (x * (weight_I.to(x.dtype) + offset)).to(x_BI.dtype)
    return x.to(x_BI.dtype) * weight_I


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    num_in,
    eps,
    offset,
    OFFSET: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    inside = i < num_in
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    x = tl.load(x_ptr + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / num_in + eps)
    y = y * (weight + offset) if OFFSET else y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + row * num_in + i, y, mask=inside)


def rms_norm_triton(x_BI: Tensor, weight_I: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm_ref` as one kernel, a program for each row."""
    batch, num_in = x_BI.shape
    assert weight_I.shape == (num_in,)
    assert weight_I.is_contiguous()
    assert x_BI.stride(1) == 1
    y = torch.empty((batch, num_in), dtype=x_BI.dtype, device=x_BI.device)
    early = starts_early(x_BI)
    block = triton.next_power_of_2(num_in)
    _rms_norm_kernel[(batch,)](
        x_BI,
        weight_I,
        y,
        x_BI.stride(0),
        num_in,
        eps,
        offset,
        OFFSET=offset != 0,
        BLOCK_I=block,
        EARLY=early,
        num_warps=max(1, min(16, block // 256)),
        **launch_options(early),
    )
    return y


def rms_norm(x_BI: Tensor, weight_I: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Normalised rows; see `rms_norm_ref`."""
    op = rms_norm_triton if x_BI.is_cuda else rms_norm_ref
    return op(x_BI, weight_I, eps=eps, offset=offset)
