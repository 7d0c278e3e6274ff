"""The gated half of a feed-forward layer, after its matrix products (Shazeer 2020, arXiv:2002.05202)."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh"]

_BLOCK = 2048


def gated_product_ref(gate_LO: Tensor, up_LO: Tensor, *, activation: Activation) -> Tensor:
    """`activation(gate) * up`, `[L, O]`, written to `gate_LO`, which is returned.

    Args:
        gate_LO, up_LO: of one shape and dtype, contiguous.
        activation: `x * sigmoid(x)`, or the Gaussian error linear unit in its tanh form.
    """
    active = F.silu(gate_LO) if activation == "silu" else F.gelu(gate_LO, approximate="tanh")
    return torch.mul(active, up_LO, out=gate_LO)


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """The activation of float32 numbers."""
    if SILU:
        return gate * tl.sigmoid(gate)
    # 1 + tanh(z) = 2 * sigmoid(2 * z)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _gated_product_kernel(gate_ptr, up_ptr, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    dtype = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + i, mask=there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=there, other=0.0).to(tl.float32)
    # The activation is rounded, as where it is a tensor of its own.
    tl.store(gate_ptr + i, activate(gate, SILU).to(dtype).to(tl.float32) * up, mask=there)


def gated_product_triton(gate_LO: Tensor, up_LO: Tensor, *, activation: Activation) -> Tensor:
    """`gated_product_ref` as one kernel, which reads and writes each number once."""
    assert gate_LO.shape == up_LO.shape
    assert gate_LO.dtype == up_LO.dtype
    assert gate_LO.is_contiguous()
    assert up_LO.is_contiguous()
    _gated_product_kernel[(triton.cdiv(gate_LO.numel(), _BLOCK),)](
        gate_LO, up_LO, gate_LO.numel(), SILU=activation == "silu", BLOCK=_BLOCK, num_warps=8
    )
    return gate_LO


def gated_product(gate_LO: Tensor, up_LO: Tensor, *, activation: Activation) -> Tensor:
    """The activated gate times the rest; see `gated_product_ref`."""
    op = gated_product_triton if gate_LO.is_cuda else gated_product_ref
    return op(gate_LO, up_LO, activation=activation)
