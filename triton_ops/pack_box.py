"""The box around a sentence's keys in one byte for each dimension, in place of two 16-bit numbers.

A byte holds the middle of the box and half its extent, 4 bits each. The middle is one of 15 even steps, up to the
largest of the sentence and KV head. The half extent is a float of 3 bits of exponent and one of mantissa, in units of
the largest: some dimensions of keys are ten times as large as others, and a linear scale would leave the others with
none. Its bits are those of a half-precision number, nine places up: a kernel decodes it with a shift.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SCALE_BYTES = tl.constexpr(4)
"""Of each sentence and KV head, after its dimensions: the step of middles and the largest half extent, in float16."""
MIDDLES = tl.constexpr(7)
"""The middle's number counts from minus this to this; what is kept is it plus this plus one."""
LARGEST_EXTENT = tl.constexpr(96)
"""The largest half extent in its units: 2**6 * 1.5."""


WORD_BITS = tl.constexpr(16)
"""Of a word of boxes or codes."""


def packed_dim(head_dim: int) -> int:
    """Dimensions that boxes and codes are kept of: as many more as fill words of codes of any number of bits."""
    return -(-head_dim // WORD_BITS.value) * WORD_BITS.value


def _extents(device: torch.device) -> Tensor:
    """What the 16 half extents are, in units: 0, 0.5, 1, 1.5, 2, 3, 4, 6, ..., 64, 96. A copy to a GPU would wait."""
    return (torch.arange(16, dtype=torch.int16, device=device) << 9).view(torch.float16).float() * 2.0**14


def pack_box_ref(low_SNH: Tensor, high_SNH: Tensor) -> Tensor:
    """Boxes that hold the given ones, uint8 `[S, N, P + 4]`, with P the `packed_dim` of H.

    Bounds are float32. Scales are in float16: of boxes that reach beyond 65,504 in a bfloat16 or float32 model, some of
    that is cut off.
    Bytes 2j and 2j + 1 are of dimensions j and j + P/2, the middle in the lower half of each.
    """
    padding = (0, packed_dim(low_SNH.shape[-1]) - low_SNH.shape[-1])
    low, high = (torch.nn.functional.pad(bound.float(), padding) for bound in (low_SNH, high_SNH))
    middle = (low + high) / 2
    # Scales are rounded first, and what follows counts from what they are then.
    step = _up((middle.abs().amax(-1, keepdim=True)) / MIDDLES.value)
    number = (middle / step.float().clamp(min=torch.finfo(torch.float16).smallest_normal * 2**-10)).round()
    number = number.clamp(-MIDDLES.value, MIDDLES.value)
    middle = number * step.float()
    half = torch.maximum(high - middle, middle - low).clamp(min=0)
    largest = _up(half.amax(-1, keepdim=True))
    unit = largest.float() / LARGEST_EXTENT.value
    level = torch.searchsorted(_extents(half.device), half / unit.clamp(min=torch.finfo(torch.float32).tiny)).clamp(
        max=15
    )
    byte_SNH = ((number.int() + MIDDLES.value + 1) | (level.int() << 4)).to(torch.uint8)
    paired = byte_SNH.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    scales = torch.cat([step, largest], dim=-1).contiguous().view(torch.uint8)
    return torch.cat([paired, scales], dim=-1)


def unpack_box_ref(packed_SNW: Tensor, head_dim: int) -> Tensor:
    """Boxes float32 `[S, N, 2, H]`: lowest and highest, as `pack_box` packed them."""
    dim = packed_SNW.shape[-1] - SCALE_BYTES.value
    step, largest = packed_SNW[..., dim:].contiguous().view(torch.float16).float().split(1, dim=-1)
    byte_SNH = packed_SNW[..., :dim].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).int()
    middle = ((byte_SNH & 15) - (MIDDLES.value + 1)).float() * step
    half = _extents(step.device)[byte_SNH >> 4] * (largest / LARGEST_EXTENT.value)
    return torch.stack([middle - half, middle + half], dim=2)[..., :head_dim].contiguous()


def _up(scale: Tensor) -> Tensor:
    """In float16, not less than it was."""
    rounded = scale.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, up, rounded).clamp(max=torch.finfo(torch.float16).max)


@triton.jit
def _up_kernel(scale):
    """As `_up`, of one number that is not negative."""
    clamped = tl.minimum(scale, 65504.0)
    rounded = clamped.to(tl.float16)
    above = (rounded.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    up = tl.where(rounded.to(tl.float32) < scale, above.to(tl.float32), rounded.to(tl.float32))
    return tl.minimum(up, 65504.0).to(tl.float16)


@triton.jit
def _pack_box_kernel(
    low_ptr,
    high_ptr,
    packed_ptr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, DIM_BLOCK)
    low = tl.load(low_ptr + row * HEAD_DIM + h, mask=h < HEAD_DIM, other=0.0)
    high = tl.load(high_ptr + row * HEAD_DIM + h, mask=h < HEAD_DIM, other=0.0)
    middle = (low + high) * 0.5
    step = _up_kernel(tl.div_rn(tl.max(tl.abs(middle), axis=0), MIDDLES * 1.0))
    # Dimensions are divided by the same number, which is none less than float16 has.
    divisor = tl.maximum(step.to(tl.float32), 5.960464477539063e-08)
    quotient = tl.div_rn(middle, tl.broadcast_to(divisor, middle.shape))
    number = tl.floor(quotient + 0.5)
    # Halves go to the even number, as they do in the reference.
    odd = number - 2.0 * tl.floor(number * 0.5)
    number = tl.where(number - quotient == 0.5, number - odd, number)
    number = tl.minimum(tl.maximum(number, -1.0 * MIDDLES), 1.0 * MIDDLES)
    middle = number * step.to(tl.float32)
    half = tl.maximum(tl.maximum(high - middle, middle - low), 0.0)
    largest = _up_kernel(tl.max(half, axis=0))
    unit = tl.maximum(tl.div_rn(largest.to(tl.float32), LARGEST_EXTENT * 1.0), 1.1754943508222875e-38)
    ratio = tl.div_rn(half, tl.broadcast_to(unit, half.shape))
    i = tl.arange(0, 16)
    extent = (i << 9).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    # How many of the half extents are too small; the last one never is.
    too_small = (ratio[:, None] > extent[None, :]) & (i < 15)[None, :]
    level = tl.sum(too_small.to(tl.int32), axis=1)
    byte = (number.to(tl.int32) + (MIDDLES + 1)) | (level << 4)
    packed_ptr += row * (DIM + SCALE_BYTES)
    tl.store(packed_ptr + (h % (DIM // 2)) * 2 + h // (DIM // 2), byte.to(tl.uint8), mask=h < DIM)
    scale_ptr = (packed_ptr + DIM).to(tl.pointer_type(tl.float16))
    tl.store(scale_ptr, step)
    tl.store(scale_ptr + 1, largest)


def pack_box_triton(low_SNH: Tensor, high_SNH: Tensor) -> Tensor:
    """`pack_box_ref` as one kernel, a program for each sentence and KV head; the same bytes."""
    num_sentences, num_heads, head_dim = low_SNH.shape
    assert low_SNH.dtype == high_SNH.dtype == torch.float32
    assert low_SNH.is_contiguous()
    assert high_SNH.is_contiguous()
    dim = packed_dim(head_dim)
    shape = (num_sentences, num_heads, dim + SCALE_BYTES.value)
    packed_SNW = torch.empty(shape, dtype=torch.uint8, device=low_SNH.device)
    if num_sentences:
        _pack_box_kernel[(num_sentences * num_heads,)](
            low_SNH,
            high_SNH,
            packed_SNW,
            HEAD_DIM=head_dim,
            DIM=dim,
            DIM_BLOCK=triton.next_power_of_2(dim),
            num_warps=1,
        )
    return packed_SNW


def pack_box(low_SNH: Tensor, high_SNH: Tensor) -> Tensor:
    """Boxes that hold the given ones, in a byte a dimension; see `pack_box_ref`."""
    op = pack_box_triton if low_SNH.is_cuda else pack_box_ref
    return op(low_SNH, high_SNH)


@triton.jit
def _unpack_box_kernel(
    packed_ptr,
    box_ptr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, DIM_BLOCK)
    mask = h < HEAD_DIM
    packed_ptr += row * (DIM + SCALE_BYTES)
    byte = tl.load(packed_ptr + (h % (DIM // 2)) * 2 + h // (DIM // 2), mask=mask, other=0).to(tl.int32)
    scale_ptr = (packed_ptr + DIM).to(tl.pointer_type(tl.float16))
    step, largest = tl.load(scale_ptr).to(tl.float32), tl.load(scale_ptr + 1).to(tl.float32)
    middle = ((byte & 15) - (MIDDLES + 1)).to(tl.float32) * step
    extent = ((byte >> 4) << 9).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    half = extent * tl.div_rn(largest, LARGEST_EXTENT * 1.0)
    box_ptr += row * (2 * HEAD_DIM) + h
    tl.store(box_ptr, middle - half, mask=mask)
    tl.store(box_ptr + HEAD_DIM, middle + half, mask=mask)


def unpack_box_triton(packed_SNW: Tensor, head_dim: int) -> Tensor:
    """`unpack_box_ref` as one kernel; rounded once where that rounds twice."""
    num_sentences, num_heads, width = packed_SNW.shape
    assert packed_SNW.is_contiguous()
    dim = width - SCALE_BYTES.value
    box_SN2H = torch.empty((num_sentences, num_heads, 2, head_dim), device=packed_SNW.device)
    if num_sentences:
        _unpack_box_kernel[(num_sentences * num_heads,)](
            packed_SNW,
            box_SN2H,
            HEAD_DIM=head_dim,
            DIM=dim,
            DIM_BLOCK=triton.next_power_of_2(dim),
            num_warps=1,
        )
    return box_SN2H


def unpack_box(packed_SNW: Tensor, head_dim: int) -> Tensor:
    """Boxes float32 `[S, N, 2, H]`: lowest and highest, as `pack_box` packed them."""
    op = unpack_box_triton if packed_SNW.is_cuda else unpack_box_ref
    return op(packed_SNW, head_dim)
