"""Per-sentence moments of keys: segment reductions over CSR sentences."""

from typing import NamedTuple

import torch
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


def summarize(key_TNH: Tensor, offsets: Tensor) -> Moments:
    """Moments of each sentence's keys; see `summarize_ref`."""
    return summarize_ref(key_TNH, offsets)
