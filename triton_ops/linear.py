"""A linear layer on the few rows of a decoding step, with the normalisation before it and the residual after it.

What takes the time is reading the weights, once. All else hides behind that: programs start on their weights before the
kernel in front has ended, and with one or two rows each one gathers the sum of squares of the rows while it multiplies,
so that the normalisation needs neither a kernel nor a pass of its own:

    y = (x * weight_norm) @ weight.T / rms(x)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.rms_norm import rms_norm, rms_norm_ref

MAX_ROWS = 32
"""Rows of x that the kernels take."""
FEW_ROWS = 2
"""Up to this many, products are summed without the matrix units, and the norm is part of the same kernel."""


class Tiles(NamedTuple):
    """How a launch is cut."""

    block_o: int
    """Rows of the weights for each program."""
    block_i: int
    """Columns that it multiplies at a time."""
    num_warps: int
    num_stages: int


FLOAT32_TILES = Tiles(16, 32, 4, 2)
"""Exact products of float32 do not run on the matrix units: small, or they take minutes to compile."""


def linear_ref(
    x_BI: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] = (),
    *,
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    residual_BO: Tensor | None = None,
) -> Tensor:
    """`rms_norm(x) @ concatenate(weights).T + concatenate(biases) + residual`, `[B, O]` in x's dtype.

    Args:
        x_BI: `[B, I]`, B at most `MAX_ROWS`.
        weights: one to three matrices `[O_j, I]`, contiguous, of x's dtype; O is the sum of the O_j.
        biases: none, or one `[O_j]` for each matrix.
        norm_weight_I, norm_eps, norm_offset: as in `rms_norm`; without the weight, x is taken as it is.
        residual_BO: `[B, O]`, or None.
    """
    if norm_weight_I is not None:
        x_BI = rms_norm_ref(x_BI, norm_weight_I, eps=norm_eps, offset=norm_offset)
    bias = biases or (None,) * len(weights)
    y = torch.cat([torch.nn.functional.linear(x_BI, w, b) for w, b in zip(weights, bias, strict=True)], -1)
    return y if residual_BO is None else y + residual_BO


@triton.jit
def pick(pid, a, b, c, rows_a, rows_b, rows_c, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """The matrix that a program works on: pointer, rows, first column of its output, block within it."""
    matrix = a
    rows = rows_a
    first = 0
    block = pid
    if COUNT > 1:
        blocks_a = tl.cdiv(rows_a, BLOCK)
        if pid >= blocks_a:
            matrix = b
            rows = rows_b
            first = rows_a
            block = pid - blocks_a
        if COUNT > 2:
            blocks_b = tl.cdiv(rows_b, BLOCK)
            if pid >= blocks_a + blocks_b:
                matrix = c
                rows = rows_c
                first = rows_a + rows_b
                block = pid - blocks_a - blocks_b
    return matrix, rows, first, block


@triton.jit
def load_weights(ptrs, i, num_in, WHOLE: tl.constexpr):
    """A tile of weights, read once and never again."""
    if WHOLE:
        return tl.load(ptrs, eviction_policy="evict_first")
    return tl.load(ptrs, mask=(i < num_in)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def load_row(x_ptr, norm_ptr, i, num_in, offset, square, NORM: tl.constexpr, WHOLE: tl.constexpr):
    """A piece of one row in float32, times the norm's weight, and the running squares of the row itself."""
    x = tl.load(x_ptr + i).to(tl.float32) if WHOLE else tl.load(x_ptr + i, mask=i < num_in, other=0.0).to(tl.float32)
    if NORM:
        square += x * x
        if WHOLE:
            x *= tl.load(norm_ptr + i).to(tl.float32) + offset
        else:
            x *= tl.load(norm_ptr + i, mask=i < num_in, other=0.0).to(tl.float32) + offset
    return x, square


@triton.jit
def zeros_for(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of float32 blocks, one for each row of x."""
    blocks = ()
    for _ in tl.static_range(ROWS):
        blocks += (tl.zeros(SHAPE, tl.float32),)  # type: ignore[assignment]
    return blocks


@triton.jit
def load_rows(
    x_ptr, x_stride, norm_ptr, i, num_in, offset, squares, ROWS: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr
):
    """`load_row` of every row of x."""
    x_rows = ()
    added = ()
    for row in tl.static_range(ROWS):
        x, square = load_row(x_ptr + row * x_stride, norm_ptr, i, num_in, offset, squares[row], NORM, WHOLE)
        x_rows += (x,)  # type: ignore[assignment]
        added += (square,)  # type: ignore[assignment]
    return x_rows, added


@triton.jit
def multiply_rows(totals, w, x_rows, ROWS: tl.constexpr):
    """The running products of a tile of weights with every row of x, not yet summed over columns."""
    w = w.to(tl.float32)
    added = ()
    for row in tl.static_range(ROWS):
        added += (totals[row] + w * x_rows[row][None, :],)  # type: ignore[assignment]
    return added


@triton.jit
def _linear_rows_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    bias_a_ptr,
    bias_b_ptr,
    bias_c_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    rows_a,
    rows_b,
    rows_c,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    offset,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NUM_IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    WHOLE: tl.constexpr = NUM_IN % BLOCK_I == 0
    pid = tl.program_id(0)
    w_ptr, rows, first, block = pick(pid, a_ptr, b_ptr, c_ptr, rows_a, rows_b, rows_c, BLOCK_O, COUNT)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < rows
    i = tl.arange(0, BLOCK_I)
    # Rows past the end repeat the last one: no mask on the loads.
    w_ptrs = tl.multiple_of(w_ptr, 16) + (tl.minimum(o, rows - 1).to(tl.int64) * NUM_IN)[:, None] + i[None, :]
    w = load_weights(w_ptrs, i, NUM_IN, WHOLE)
    wait_for_inputs(EARLY)
    totals = zeros_for(ROWS, (BLOCK_O, BLOCK_I))
    squares = zeros_for(ROWS, (BLOCK_I,))
    # The next weights are on their way while these are multiplied.
    for start in range(0, NUM_IN - BLOCK_I, BLOCK_I):
        w_next = load_weights(w_ptrs + start + BLOCK_I, i + start + BLOCK_I, NUM_IN, WHOLE)
        x_rows, squares = load_rows(x_ptr, x_stride, norm_ptr, i + start, NUM_IN, offset, squares, ROWS, NORM, True)
        totals = multiply_rows(totals, w, x_rows, ROWS)
        w = w_next
    last = (NUM_IN - 1) // BLOCK_I * BLOCK_I
    x_rows, squares = load_rows(x_ptr, x_stride, norm_ptr, i + last, NUM_IN, offset, squares, ROWS, NORM, WHOLE)
    totals = multiply_rows(totals, w, x_rows, ROWS)
    column = first + o
    for row in tl.static_range(ROWS):
        y = tl.sum(totals[row], 1)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares[row], 0) / NUM_IN + eps)
        if BIAS:
            bias_ptr, _, _, _ = pick(pid, bias_a_ptr, bias_b_ptr, bias_c_ptr, rows_a, rows_b, rows_c, BLOCK_O, COUNT)
            y += tl.load(bias_ptr + o, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            # The sum is rounded before the residual enters, as where it is a tensor of its own.
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            y += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * y_stride + column, y, mask=inside)


@triton.jit
def load_batch(ptrs, b, i, batch, num_in, WHOLE: tl.constexpr):
    """A tile of x; rows that are not there are not read: programs would crowd around one and the same line."""
    mask = (b < batch)[:, None] if WHOLE else (b < batch)[:, None] & (i < num_in)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _linear_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    bias_a_ptr,
    bias_b_ptr,
    bias_c_ptr,
    residual_ptr,
    y_ptr,
    batch,
    rows_a,
    rows_b,
    rows_c,
    x_stride,
    residual_stride,
    y_stride,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NUM_IN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    EARLY: tl.constexpr,
):
    WHOLE: tl.constexpr = NUM_IN % BLOCK_I == 0
    pid = tl.program_id(0)
    w_ptr, rows, first, block = pick(pid, a_ptr, b_ptr, c_ptr, rows_a, rows_b, rows_c, BLOCK_O, COUNT)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    b = tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_I)
    w_ptrs = tl.multiple_of(w_ptr, 16) + (tl.minimum(o, rows - 1).to(tl.int64) * NUM_IN)[:, None] + i[None, :]
    x_ptrs = x_ptr + (b.to(tl.int64) * x_stride)[:, None] + i[None, :]
    wait_for_inputs(EARLY)
    total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for start in range(0, NUM_IN, BLOCK_I):
        w = load_weights(w_ptrs + start, i + start, NUM_IN, WHOLE)
        x = load_batch(x_ptrs + start, b, i + start, batch, NUM_IN, WHOLE)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    inside = o < rows
    there = (b < batch)[:, None] & inside[None, :]
    if BIAS:
        bias_ptr, _, _, _ = pick(pid, bias_a_ptr, bias_b_ptr, bias_c_ptr, rows_a, rows_b, rows_c, BLOCK_O, COUNT)
        total += tl.load(bias_ptr + o, mask=inside, other=0.0).to(tl.float32)[None, :]
    column = (first + o)[None, :]
    b_wide = b.to(tl.int64)[:, None]
    if RESIDUAL:
        total = total.to(y_ptr.dtype.element_ty).to(tl.float32)
        total += tl.load(residual_ptr + b_wide * residual_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + b_wide * y_stride + column, total, mask=there)


def _tiles(batch: int, num_in: int, num_out: int, dtype: torch.dtype) -> Tiles:
    """What measured best on an H100, in bfloat16, for the shapes of models of four and eight billion weights."""
    if batch == 1:
        whole = next((block for block in (2048, 1024, 512) if num_in % block == 0), 512)
        if whole == 2048 and num_out <= 4096:
            tiles = Tiles(1 if num_in > 8192 else 2 if num_out <= 3072 else 4, 2048, 8, 1)
        elif whole >= 1024:
            tiles = Tiles(2, 1024, 4, 1)
        else:
            tiles = Tiles(4, 512, 4 if num_in <= 4096 else 8, 1)
    elif batch <= FEW_ROWS:
        tiles = Tiles(4, 512, 2, 1)
    elif dtype == torch.float32:
        tiles = FLOAT32_TILES
    else:
        tiles = Tiles(32, 256, 4, 6) if num_out <= 4096 else Tiles(64, 256, 8, 4)
    return tiles._replace(block_i=min(tiles.block_i, max(16, triton.next_power_of_2(num_in))))


def linear_triton(
    x_BI: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] = (),
    *,
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    residual_BO: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`linear_ref` as one kernel (two where more than `FEW_ROWS` rows are normalised)."""
    batch, num_in = x_BI.shape
    rows = [weight.shape[0] for weight in weights]
    assert 1 <= batch <= MAX_ROWS, batch
    assert 1 <= len(weights) <= 3
    assert len(biases) in (0, len(weights))
    assert x_BI.stride(1) == 1
    for weight in weights:
        assert weight.shape[1] == num_in
        assert weight.is_contiguous()
        assert weight.dtype == x_BI.dtype
        assert weight.data_ptr() % 16 == 0
    for bias, count in zip(biases, rows, strict=False):
        assert bias.shape == (count,)
        assert bias.is_contiguous()
    few = batch <= FEW_ROWS
    if norm_weight_I is not None:
        assert norm_weight_I.shape == (num_in,)
        assert norm_weight_I.is_contiguous()
        if not few:
            x_BI, norm_weight_I = rms_norm(x_BI, norm_weight_I, eps=norm_eps, offset=norm_offset), None
    num_out = sum(rows)
    if residual_BO is not None:
        assert residual_BO.shape == (batch, num_out)
        assert residual_BO.stride(1) == 1
    y = torch.empty((batch, num_out), dtype=x_BI.dtype, device=x_BI.device)
    tiles = tiles or _tiles(batch, num_in, num_out, x_BI.dtype)
    early = starts_early(x_BI)
    padded = [*weights, *[weights[0]] * (3 - len(weights))]
    padded_biases = [*biases, *[biases[0] if biases else y] * (3 - len(biases))]
    padded_rows = [*rows, *[0] * (3 - len(rows))]
    residual = y if residual_BO is None else residual_BO
    strides = (x_BI.stride(0), residual.stride(0), y.stride(0))
    options = {
        "COUNT": len(weights),
        "BIAS": bool(biases),
        "RESIDUAL": residual_BO is not None,
        "BLOCK_O": tiles.block_o,
        "NUM_IN": num_in,
        "BLOCK_I": tiles.block_i,
        "EARLY": early,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **launch_options(early),
    }
    grid = (sum(triton.cdiv(count, tiles.block_o) for count in rows),)
    if few:
        _linear_rows_kernel[grid](
            x_BI,
            *padded,
            *padded_biases,
            x_BI if norm_weight_I is None else norm_weight_I,
            residual,
            y,
            *padded_rows,
            *strides,
            norm_eps,
            norm_offset,
            NORM=norm_weight_I is not None,
            ROWS=batch,
            **options,
        )
    else:
        _linear_kernel[grid](
            x_BI,
            *padded,
            *padded_biases,
            residual,
            y,
            batch,
            *padded_rows,
            *strides,
            BLOCK_B=16 if batch <= 16 else 32,
            **options,
        )
    return y


def linear(
    x_BI: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] = (),
    *,
    norm_weight_I: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    residual_BO: Tensor | None = None,
) -> Tensor:
    """Normalise, multiply, add bias and residual; see `linear_ref`."""
    op = linear_triton if x_BI.is_cuda else linear_ref
    return op(
        x_BI,
        weights,
        biases,
        norm_weight_I=norm_weight_I,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        residual_BO=residual_BO,
    )
