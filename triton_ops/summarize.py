"""Per-sentence moments of keys: segment reductions over CSR sentences."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Moments(NamedTuple):
    """Segment statistics; each `[S, N, H]` float32."""

    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor


def summarize_ref(key_TNH: Tensor, offsets: Tensor) -> Moments:
    """Mean, variance, minimum and maximum of each sentence's keys, per KV head and dimension.

    Args:
        key_TNH: `[T, N, H]`, any float dtype; reduced in float32.
        offsets: int64 `[S + 1]`, increasing by at least one, `offsets[0] == 0`, `offsets[-1] == T`.

    The variance is the population variance (a one-token sentence has 0), taken about the mean in a second pass, so
    that it does not cancel for keys with a large common offset.
    """
    num_tokens, num_heads, head_dim = key_TNH.shape
    num_sentences = offsets.numel() - 1
    assert num_tokens == 0 or num_sentences > 0
    key = key_TNH.float()
    lengths = offsets[1:] - offsets[:-1]
    sentence_of_token = torch.repeat_interleave(
        torch.arange(num_sentences, device=key.device), lengths, output_size=num_tokens
    )
    shape = (num_sentences, num_heads, head_dim)
    index = sentence_of_token[:, None, None].expand(-1, num_heads, head_dim)
    count = lengths.to(torch.float32)[:, None, None]
    mean = key.new_zeros(shape).index_add_(0, sentence_of_token, key) / count
    deviation = key - mean[sentence_of_token]
    variance = key.new_zeros(shape).index_add_(0, sentence_of_token, deviation * deviation) / count
    minimum = key.new_full(shape, torch.inf).scatter_reduce_(0, index, key, "amin")
    maximum = key.new_full(shape, -torch.inf).scatter_reduce_(0, index, key, "amax")
    return Moments(mean, variance, minimum, maximum)


@triton.jit
def _summarize_kernel(
    key_ptr,
    offset_ptr,
    mean_ptr,
    variance_ptr,
    minimum_ptr,
    maximum_ptr,
    stride_t,
    stride_n,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sentence and KV head; keys are read where they are, twice if they do not fit one block."""
    s, n = tl.program_id(0), tl.program_id(1)
    start = tl.load(offset_ptr + s)
    stop = tl.load(offset_ptr + s + 1)
    length = (stop - start).to(tl.float32)
    h = tl.arange(0, HEAD_BLOCK)
    in_head = h < HEAD_DIM
    key_ptr += n.to(tl.int64) * stride_n
    total = tl.zeros((HEAD_BLOCK,), tl.float32)
    minimum = tl.full((HEAD_BLOCK,), float("inf"), tl.float32)
    maximum = tl.full((HEAD_BLOCK,), float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        mask = (t < stop)[:, None] & in_head[None, :]
        key = tl.load(key_ptr + t[:, None] * stride_t + h[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(key, axis=0)
        minimum = tl.minimum(minimum, tl.min(tl.where(mask, key, float("inf")), axis=0))
        maximum = tl.maximum(maximum, tl.max(tl.where(mask, key, float("-inf")), axis=0))
    mean = total / length
    squares = tl.zeros((HEAD_BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        mask = (t < stop)[:, None] & in_head[None, :]
        key = tl.load(key_ptr + t[:, None] * stride_t + h[None, :], mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, key - mean[None, :], 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    row = (s.to(tl.int64) * tl.num_programs(1) + n) * HEAD_DIM + h
    tl.store(mean_ptr + row, mean, mask=in_head)
    tl.store(variance_ptr + row, squares / length, mask=in_head)
    tl.store(minimum_ptr + row, minimum, mask=in_head)
    tl.store(maximum_ptr + row, maximum, mask=in_head)


def summarize_triton(key_TNH: Tensor, offsets: Tensor) -> Moments:
    """Moments by one kernel, a program for each sentence and KV head; keys may be any view with whole last rows."""
    _, num_heads, head_dim = key_TNH.shape
    num_sentences = offsets.numel() - 1
    assert key_TNH.stride(2) == 1
    assert offsets.is_contiguous()
    shape = (num_sentences, num_heads, head_dim)
    moments = Moments(*(torch.empty(shape, dtype=torch.float32, device=key_TNH.device) for _ in range(4)))
    if num_sentences:
        _summarize_kernel[(num_sentences, num_heads)](
            key_TNH,
            offsets,
            *moments,
            key_TNH.stride(0),
            key_TNH.stride(1),
            HEAD_DIM=head_dim,
            HEAD_BLOCK=triton.next_power_of_2(head_dim),
            BLOCK=32,
            num_warps=4,
        )
    return moments


def summarize(key_TNH: Tensor, offsets: Tensor) -> Moments:
    """Moments of each sentence's keys; see `summarize_ref`."""
    op = summarize_triton if key_TNH.is_cuda else summarize_ref
    return op(key_TNH, offsets)
