"""Keys as codes of a few bits per dimension, within the bounding box of their sentence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.pack_box import WORD_BITS, packed_dim


def encode_keys_ref(key_TNH: Tensor, box_SN2H: Tensor, offsets: Tensor, *, bits: int) -> Tensor:
    """Packed codes, int16 `[T, N, P * bits / 16]`: in which of `2**bits` equal cells of the box each number lies.

    Dimension h of a key is in word `h % W` at bit `bits * (h // W)`, with `W` the number of words: a word holds
    dimensions that are `W` apart, so that unpacking gives contiguous runs. P is the `packed_dim` of H; codes of
    dimensions beyond H are 0.

    Args:
        key_TNH: `[T, N, H]` keys of whole sentences.
        box_SN2H: `[S, N, 2, H]` lowest and highest numbers of a box around each sentence's keys.
        offsets: int64 `[S + 1]`, CSR over the T tokens.
        bits: 1, 2 or 4.
    """
    assert bits in (1, 2, 4)
    num_tokens, num_heads, head_dim = key_TNH.shape
    lengths = offsets[1:] - offsets[:-1]
    sentence_of_token = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=key_TNH.device), lengths, output_size=num_tokens
    )
    low, high = box_SN2H.float()[sentence_of_token].unbind(dim=2)
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    code = ((key_TNH.float() - low) / width * 2**bits).floor().clamp(0, 2**bits - 1).int()
    dim = packed_dim(head_dim)
    width = dim * bits // WORD_BITS.value
    packed = torch.zeros((num_tokens, num_heads, width), dtype=torch.int32, device=code.device)
    for i, part in enumerate(torch.nn.functional.pad(code, (0, dim - head_dim)).split(width, dim=-1)):
        packed |= part << (bits * i)
    return packed.to(torch.int16)


@triton.jit
def _encode_keys_kernel(
    key_ptr,
    box_ptr,
    offset_ptr,
    code_ptr,
    stride_t,
    stride_n,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sentence and KV head."""
    s, n = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    start = tl.load(offset_ptr + s)
    stop = tl.load(offset_ptr + s + 1)
    w = tl.arange(0, WIDTH_BLOCK)
    LEVELS: tl.constexpr = 1 << BITS
    key_ptr += n.to(tl.int64) * stride_n
    box_ptr += (s.to(tl.int64) * num_heads + n) * (2 * HEAD_DIM)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        packed = tl.zeros((BLOCK, WIDTH_BLOCK), tl.int32)
        for i in tl.static_range(WORD_BITS // BITS):
            h = i * WIDTH + w
            in_head = (w < WIDTH) & (h < HEAD_DIM)
            low = tl.load(box_ptr + h, mask=in_head, other=0.0).to(tl.float32)
            high = tl.load(box_ptr + HEAD_DIM + h, mask=in_head, other=0.0).to(tl.float32)
            mask = (t < stop)[:, None] & in_head[None, :]
            key = tl.load(key_ptr + t[:, None] * stride_t + h[None, :], mask=mask, other=0.0).to(tl.float32)
            width = tl.maximum(high - low, 1.1754943508222875e-38)
            level = tl.floor(tl.div_rn(key - low[None, :], tl.broadcast_to(width[None, :], key.shape)) * LEVELS)
            level = tl.minimum(tl.maximum(level, 0.0), LEVELS - 1.0)
            packed |= tl.where(mask, level, 0.0).to(tl.int32) << (BITS * i)
        row = (t.to(tl.int64) * num_heads + n) * WIDTH
        tl.store(
            code_ptr + row[:, None] + w[None, :],
            packed.to(tl.int16),
            mask=(t < stop)[:, None] & (w < WIDTH)[None, :],
        )


def encode_keys_triton(key_TNH: Tensor, box_SN2H: Tensor, offsets: Tensor, *, bits: int) -> Tensor:
    """Packed codes by one kernel, a program for each sentence and KV head."""
    assert bits in (1, 2, 4)
    num_tokens, num_heads, head_dim = key_TNH.shape
    num_sentences = offsets.numel() - 1
    assert key_TNH.stride(2) == 1
    assert box_SN2H.is_contiguous()
    assert offsets.is_contiguous()
    width = packed_dim(head_dim) * bits // WORD_BITS.value
    code = torch.empty((num_tokens, num_heads, width), dtype=torch.int16, device=key_TNH.device)
    if num_sentences:
        _encode_keys_kernel[(num_sentences, num_heads)](
            key_TNH,
            box_SN2H,
            offsets,
            code,
            key_TNH.stride(0),
            key_TNH.stride(1),
            HEAD_DIM=head_dim,
            WIDTH=width,
            WIDTH_BLOCK=triton.next_power_of_2(width),
            BITS=bits,
            BLOCK=32,
            num_warps=4,
        )
    return code


def encode_keys(key_TNH: Tensor, box_SN2H: Tensor, offsets: Tensor, *, bits: int) -> Tensor:
    """Packed codes of keys; see `encode_keys_ref`."""
    op = encode_keys_triton if key_TNH.is_cuda else encode_keys_ref
    return op(key_TNH, box_SN2H, offsets, bits=bits)
