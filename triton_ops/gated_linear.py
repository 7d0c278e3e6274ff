"""The gated half of a feed-forward layer on the few rows of a decoding step (Shazeer 2020, arXiv:2002.05202)."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.gated_product import Activation, activate
from triton_ops.linear import FLOAT32_TILES, MAX_ROWS, Tiles, load_batch, load_row, load_weights
from triton_ops.rms_norm import rms_norm, rms_norm_ref


def gated_linear_ref(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    gate_bias_O: Tensor | None = None,
    up_bias_O: Tensor | None = None,
    *,
    activation: Activation = "silu",
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> Tensor:
    """`activation(n @ gate.T + gate_bias) * (n @ up.T + up_bias)` with `n = rms_norm(x)`, `[B, O]` in x's dtype.

    Args:
        x_BI: `[B, I]`, B at most `MAX_ROWS`.
        gate_OI, up_OI: `[O, I]`, contiguous, of x's dtype.
        gate_bias_O, up_bias_O: `[O]`, both or neither.
        activation: `x * sigmoid(x)`, or the Gaussian error linear unit in its tanh form.
        norm_weight_I, norm_eps, norm_offset: as in `rms_norm`; without the weight, x is taken as it is.
    """
    if norm_weight_I is not None:
        x_BI = rms_norm_ref(x_BI, norm_weight_I, eps=norm_eps, offset=norm_offset)
    gate = F.linear(x_BI, gate_OI, gate_bias_O)
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return gate * F.linear(x_BI, up_OI, up_bias_O)


@triton.jit
def _gated(
    gate, up, gate_bias_ptr, up_bias_ptr, o, num_out, SILU: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr
):
    """Biases, activation and product of float32 blocks whose last dimension is `o`; rounded where tensors would be."""
    if BIAS:
        gate += tl.load(gate_bias_ptr + o, mask=o < num_out, other=0.0).to(tl.float32)
        up += tl.load(up_bias_ptr + o, mask=o < num_out, other=0.0).to(tl.float32)
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    return activate(gate, SILU).to(dtype).to(tl.float32) * up


@triton.jit
def _gated_linear_row_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    norm_ptr,
    y_ptr,
    num_out,
    eps,
    offset,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NUM_IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    WHOLE: tl.constexpr = NUM_IN % BLOCK_I == 0
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    w_offsets = (tl.minimum(o, num_out - 1).to(tl.int64) * NUM_IN)[:, None] + i[None, :]
    gate_ptrs = gate_ptr + w_offsets
    up_ptrs = up_ptr + w_offsets
    gate = load_weights(gate_ptrs, i, NUM_IN, WHOLE)
    up = load_weights(up_ptrs, i, NUM_IN, WHOLE)
    wait_for_inputs(EARLY)
    gate_total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    up_total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, NUM_IN - BLOCK_I, BLOCK_I):
        ahead = start + BLOCK_I
        gate_next = load_weights(gate_ptrs + ahead, i + ahead, NUM_IN, WHOLE)
        up_next = load_weights(up_ptrs + ahead, i + ahead, NUM_IN, WHOLE)
        x, square = load_row(x_ptr, norm_ptr, i + start, NUM_IN, offset, square, NORM, True)
        gate_total += gate.to(tl.float32) * x[None, :]
        up_total += up.to(tl.float32) * x[None, :]
        gate = gate_next
        up = up_next
    last = (NUM_IN - 1) // BLOCK_I * BLOCK_I
    x, square = load_row(x_ptr, norm_ptr, i + last, NUM_IN, offset, square, NORM, WHOLE)
    gate_out = tl.sum(gate_total + gate.to(tl.float32) * x[None, :], 1)
    up_out = tl.sum(up_total + up.to(tl.float32) * x[None, :], 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / NUM_IN + eps)
        gate_out *= scale
        up_out *= scale
    y = _gated(gate_out, up_out, gate_bias_ptr, up_bias_ptr, o, num_out, SILU, BIAS, y_ptr.dtype.element_ty)
    tl.store(y_ptr + o, y, mask=o < num_out)


@triton.jit
def _gated_linear_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    y_ptr,
    batch,
    num_out,
    x_stride,
    y_stride,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NUM_IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    WHOLE: tl.constexpr = NUM_IN % BLOCK_I == 0
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_I)
    w_offsets = (tl.minimum(o, num_out - 1).to(tl.int64) * NUM_IN)[:, None] + i[None, :]
    gate_ptrs = gate_ptr + w_offsets
    up_ptrs = up_ptr + w_offsets
    x_ptrs = x_ptr + (b.to(tl.int64) * x_stride)[:, None] + i[None, :]
    wait_for_inputs(EARLY)
    gate_total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    up_total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for start in range(0, NUM_IN, BLOCK_I):
        gate = load_weights(gate_ptrs + start, i + start, NUM_IN, WHOLE)
        up = load_weights(up_ptrs + start, i + start, NUM_IN, WHOLE)
        x = load_batch(x_ptrs + start, b, i + start, batch, NUM_IN, WHOLE)
        gate_total = tl.dot(x, tl.trans(gate), gate_total, input_precision="ieee")
        up_total = tl.dot(x, tl.trans(up), up_total, input_precision="ieee")
    y = _gated(
        gate_total, up_total, gate_bias_ptr, up_bias_ptr, o[None, :], num_out, SILU, BIAS, y_ptr.dtype.element_ty
    )
    there = (b < batch)[:, None] & (o < num_out)[None, :]
    tl.store(y_ptr + b.to(tl.int64)[:, None] * y_stride + o[None, :], y, mask=there)


def _tiles(batch: int, num_in: int, num_out: int, dtype: torch.dtype) -> Tiles:
    """What measured best on an H100, in bfloat16, for the shapes of models of four and eight billion weights."""
    if batch == 1:
        tiles = Tiles(1, 4096, 8, 1) if num_in % 4096 == 0 else Tiles(2, 2048, 8, 1)
    elif dtype == torch.float32:
        tiles = FLOAT32_TILES
    else:
        tiles = Tiles(32, 128, 4, 8) if batch <= 16 and num_out < 12288 else Tiles(64, 128, 4, 5)
    return tiles._replace(block_i=min(tiles.block_i, max(16, triton.next_power_of_2(num_in))))


def gated_linear_triton(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    gate_bias_O: Tensor | None = None,
    up_bias_O: Tensor | None = None,
    *,
    activation: Activation = "silu",
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    tiles: Tiles | None = None,
) -> Tensor:
    """`gated_linear_ref` as one kernel (two where more than one row is normalised)."""
    batch, num_in = x_BI.shape
    num_out = gate_OI.shape[0]
    assert 1 <= batch <= MAX_ROWS, batch
    assert x_BI.stride(1) == 1
    for weight in (gate_OI, up_OI):
        assert weight.shape == (num_out, num_in)
        assert weight.is_contiguous()
        assert weight.dtype == x_BI.dtype
    assert (gate_bias_O is None) == (up_bias_O is None)
    for bias in (gate_bias_O, up_bias_O):
        assert bias is None or (bias.shape == (num_out,) and bias.is_contiguous())
    if norm_weight_I is not None:
        assert norm_weight_I.shape == (num_in,)
        assert norm_weight_I.is_contiguous()
        if batch > 1:
            x_BI, norm_weight_I = rms_norm(x_BI, norm_weight_I, eps=norm_eps, offset=norm_offset), None
    y = torch.empty((batch, num_out), dtype=x_BI.dtype, device=x_BI.device)
    tiles = tiles or _tiles(batch, num_in, num_out, x_BI.dtype)
    early = starts_early(x_BI)
    arguments = (
        x_BI,
        gate_OI,
        up_OI,
        y if gate_bias_O is None else gate_bias_O,
        y if up_bias_O is None else up_bias_O,
    )
    options = {
        "SILU": activation == "silu",
        "BIAS": gate_bias_O is not None,
        "BLOCK_O": tiles.block_o,
        "NUM_IN": num_in,
        "BLOCK_I": tiles.block_i,
        "EARLY": early,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **launch_options(early),
    }
    grid = (triton.cdiv(num_out, tiles.block_o),)
    if batch == 1:
        _gated_linear_row_kernel[grid](
            *arguments,
            x_BI if norm_weight_I is None else norm_weight_I,
            y,
            num_out,
            norm_eps,
            norm_offset,
            NORM=norm_weight_I is not None,
            **options,
        )
    else:
        _gated_linear_kernel[grid](
            *arguments,
            y,
            batch,
            num_out,
            x_BI.stride(0),
            y.stride(0),
            BLOCK_B=16 if batch <= 16 else 32,
            **options,
        )
    return y


def gated_linear(
    x_BI: Tensor,
    gate_OI: Tensor,
    up_OI: Tensor,
    gate_bias_O: Tensor | None = None,
    up_bias_O: Tensor | None = None,
    *,
    activation: Activation = "silu",
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> Tensor:
    """The gated product of two linear layers; see `gated_linear_ref`."""
    op = gated_linear_triton if x_BI.is_cuda else gated_linear_ref
    return op(
        x_BI,
        gate_OI,
        up_OI,
        gate_bias_O,
        up_bias_O,
        activation=activation,
        norm_weight_I=norm_weight_I,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )
