"""Root-mean-square normalisation of a few rows; formula: Zhang and Sennrich 2019, arXiv:1910.07467.

Also says which launches may start early: every kernel of the model's own layers begins with `wait_for_inputs`.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

_HOPPER = (9, 0)


def starts_early(tensor: Tensor) -> bool:
    """Whether a kernel may be launched before the one in front of it ends (programmatic dependent launch).

    Such a kernel reads what no kernel writes (weights) at once, and all else after `wait_for_inputs`.
    """
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= _HOPPER


def launch_options(early: bool) -> dict[str, bool]:
    """Keywords of a launch that `starts_early`; other devices do not know them."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernels in front have ended and what they wrote is visible; then let the next one begin."""
    if EARLY:
        tl_cuda.gdc_wait()
        # After the wait, not before it: so the next kernel reads its weights after everything two kernels back.
        tl_cuda.gdc_launch_dependents()


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
