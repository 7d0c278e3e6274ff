"""The box around a sentence's keys in one byte for each dimension, in place of two 16-bit numbers.

A byte holds the middle of the box and half its extent, 4 bits each. The middle is one of 15 even steps, up to the
largest of the sentence and KV head. The half extent is a float of 3 bits of exponent and one of mantissa, in units of
the largest: some dimensions of keys are ten times as large as others, and a linear scale would leave the others with
none. Its bits are those of a half-precision number, nine places up: a kernel decodes it with a shift.
"""

import torch
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


def pack_box(low_SNH: Tensor, high_SNH: Tensor) -> Tensor:
    """Boxes that hold the given ones, uint8 `[S, N, P + 4]`, with P the `packed_dim` of H.

    Scales are in float16: of boxes that reach beyond 65,504 in a bfloat16 or float32 model, some of that is cut off.
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


def unpack_box(packed_SNW: Tensor, head_dim: int) -> Tensor:
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
