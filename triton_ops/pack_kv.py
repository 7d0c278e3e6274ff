"""KV in fewer bits: what host memory and files may hold in place of the model's own precision."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Format = Literal["fp8", "int8", "int4"]

GROUP = 32
"""Dimensions that share a step and a minimum in `int4`."""
_LARGEST_FP8 = 448.0
_SMALLEST_HALF = 2.0**-24


class Packed(NamedTuple):
    """Rows of keys and values in codes.

    `code`: uint8 `[..., 2, W]`. `scale`: float16 `[..., 2, P]`: what codes are multiplied with (`fp8`, `int8`; P = 1),
    or step and minimum of each group of 32 dimensions (`int4`; two numbers a group).
    """

    code: Tensor
    scale: Tensor


def code_width(head_dim: int, kv_format: Format) -> int:
    """Bytes of one key's or value's codes."""
    return head_dim // 2 if kv_format == "int4" else head_dim


def scale_width(head_dim: int, kv_format: Format) -> int:
    """Numbers that go with the codes of one key or value."""
    return 2 * triton.cdiv(head_dim, GROUP) if kv_format == "int4" else 1


def row_bytes(head_dim: int, kv_format: Format) -> int:
    """Bytes of one token's key and value of one head."""
    return 2 * (code_width(head_dim, kv_format) + 2 * scale_width(head_dim, kv_format))


def packed_slab(rows_NB: Tensor, capacity: int, head_dim: int, kv_format: Format) -> Packed:
    """Views of a slab, uint8 `[N, capacity * row_bytes]`: of each head first the codes of all rows, then the scales."""
    num_heads = rows_NB.shape[0]
    width, numbers = code_width(head_dim, kv_format), scale_width(head_dim, kv_format)
    codes, scales = rows_NB.split([capacity * 2 * width, capacity * 4 * numbers], dim=1)
    return Packed(
        codes.view(num_heads, capacity, 2, width), scales.view(torch.float16).view(num_heads, capacity, 2, numbers)
    )


def pack_kv(kv: Tensor, kv_format: Format) -> Packed:
    """Keys and values `[..., 2, H]` in codes; the codes' error is that of rounding to the nearest.

    `fp8` is e4m3, as large as the largest number of a key or value; `int8` is symmetric; `int4` divides the range of
    each group of 32 dimensions into 15 steps, the code of dimension j in the lower half of byte j, that of j + H / 2 in
    its upper half.
    """
    x = kv.float()
    if kv_format == "int4":
        groups = _grouped(x)
        low = _half(groups.amin(-1))
        step = _half((groups.amax(-1) - low.float()) / 15)
        divisor = torch.where(step > 0, step, 1).float()
        code = ((groups - low.float()[..., None]) / divisor[..., None]).round().clamp(0, 15).to(torch.uint8)
        code = code.flatten(-2)[..., : x.shape[-1]]
        lower, upper = code.chunk(2, dim=-1)
        return Packed(lower | (upper << 4), torch.stack([step, low], dim=-1).flatten(-2))
    largest = _LARGEST_FP8 if kv_format == "fp8" else 127.0
    wanted = x.abs().amax(-1, keepdim=True) / largest
    # One that is too small for float16 would make zeros of all numbers.
    scale = _half(torch.where(wanted > 0, wanted.clamp(min=_SMALLEST_HALF), 0.0))
    x = (x / torch.where(scale > 0, scale, 1).float()).clamp(-largest, largest)
    code = x.to(torch.float8_e4m3fn) if kv_format == "fp8" else x.round().to(torch.int8)
    return Packed(code.view(torch.uint8), scale)


def unpack_kv(packed: Packed, head_dim: int, dtype: torch.dtype, kv_format: Format) -> Tensor:
    """Keys and values `[..., 2, H]` from their codes."""
    code, scale = packed
    if kv_format == "int4":
        both = torch.cat([code & 15, code >> 4], dim=-1)
        step, low = scale.float().unflatten(-1, (-1, 2)).unbind(-1)
        return (_grouped(both.float()) * step[..., None] + low[..., None]).flatten(-2)[..., :head_dim].to(dtype)
    numbers = code.view(torch.float8_e4m3fn if kv_format == "fp8" else torch.int8).float()
    return (numbers * scale.float()).to(dtype)


def _half(x: Tensor) -> Tensor:
    """In float16, which ends at 65,504."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half()


def _grouped(x: Tensor) -> Tensor:
    """`[..., groups, 32]`; the last group is filled up with its last number."""
    missing = -x.shape[-1] % GROUP
    if missing:
        x = F.pad(x.flatten(0, -2), (0, missing), mode="replicate").view(*x.shape[:-1], -1)
    return x.unflatten(-1, (-1, GROUP))


@triton.jit
def number_of_code(code, FP8: tl.constexpr):
    """float32 from a byte of `int8` or `fp8`."""
    if FP8:
        # The exponent of e4m3 within that of float16 is 8 too low, for all numbers that are not NaN.
        bits = ((code & 0x80).to(tl.int16) << 8) | ((code & 0x7F).to(tl.int16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        number = code.to(tl.int8, bitcast=True).to(tl.float32)
    return number
