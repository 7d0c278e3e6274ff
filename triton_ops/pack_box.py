"""The box around a sentence's keys in one byte for each dimension, in place of two 16-bit numbers.

A byte holds the middle of the box and half its extent, 4 bits each. The middle is one of 15 even steps, up to the
largest of the sentence and KV head; the half extent is the largest, halved for every two levels: some dimensions
of keys are ten times as large as others, and a linear scale would leave the others with none.
"""

import torch
import triton.language as tl
from torch import Tensor

SCALE_BYTES = tl.constexpr(4)
"""Of each sentence and KV head, after its dimensions: the step of middles and the largest half extent, in float16."""

_MIDDLES = 7
_LEVELS = 15


def pack_box(low_SNH: Tensor, high_SNH: Tensor) -> Tensor:
    """Boxes that hold the given ones, uint8 `[S, N, H + 4]`; H even. Dimension h is in byte h, its middle below."""
    assert low_SNH.shape[-1] % 2 == 0, "the scales must lie at even addresses"
    low, high = low_SNH.float(), high_SNH.float()
    middle = (low + high) / 2
    # Scales are rounded first, and what follows counts from what they are then.
    step = _up((middle.abs().amax(-1, keepdim=True)) / _MIDDLES)
    number = (middle / step.float().clamp(min=torch.finfo(torch.float16).tiny)).round().clamp(-_MIDDLES, _MIDDLES)
    middle = number * step.float()
    half = torch.maximum(high - middle, middle - low).clamp(min=0)
    largest = _up(half.amax(-1, keepdim=True))
    times = largest.float() / half.clamp(min=torch.finfo(torch.float16).smallest_normal * 2**-10)
    level = (2 * times.clamp(min=1).log2()).floor().clamp(0, _LEVELS)
    # Where rounding made the box a hair too small, the next larger one.
    level = torch.where((largest.float() * torch.exp2(-0.5 * level) < half) & (level > 0), level - 1, level)
    packed = ((number.int() + _MIDDLES + 1) | (level.int() << 4)).to(torch.uint8)
    scales = torch.cat([step, largest], dim=-1).contiguous().view(torch.uint8)
    return torch.cat([packed, scales], dim=-1)


def unpack_box(packed_SNW: Tensor) -> Tensor:
    """Boxes float32 `[S, N, 2, H]`: lowest and highest, as `pack_box` packed them."""
    head_dim = packed_SNW.shape[-1] - SCALE_BYTES.value
    step, largest = packed_SNW[..., head_dim:].contiguous().view(torch.float16).float().split(1, dim=-1)
    byte = packed_SNW[..., :head_dim].int()
    middle = ((byte & 15) - (_MIDDLES + 1)).float() * step
    half = largest * torch.exp2(-0.5 * (byte >> 4).float())
    return torch.stack([middle - half, middle + half], dim=2)


def _up(scale: Tensor) -> Tensor:
    """In float16, not less than it was."""
    rounded = scale.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, up, rounded).clamp(max=torch.finfo(torch.float16).max)
