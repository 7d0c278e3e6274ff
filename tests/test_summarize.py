"""Moments of sentences against float64, sentence by sentence."""

import pytest
import torch

from tests.lanes import random_lengths
from triton_ops.summarize import summarize, summarize_ref, summarize_triton

OPS = [summarize, summarize_ref, summarize_triton]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", [[1], [5, 1, 32, 7], [1] * 9, random_lengths(40, 32)], ids=len)
@pytest.mark.parametrize(("heads", "dim"), [(1, 10), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moments_are_those_of_each_sentence(
    op, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    # Far from zero, so that a variance by the difference of squares would cancel.
    key = (torch.randn(sum(lengths), heads, dim) * 3 + 100).to(dtype).to(device)
    moments = op(key, torch.tensor([0, *lengths], device=device).cumsum(0))
    for s, part in enumerate(key.double().split(lengths)):
        torch.testing.assert_close(moments.mean[s].double(), part.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.variance[s].double(), part.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.minimum[s].double(), part.amin(0), rtol=0, atol=0)
        torch.testing.assert_close(moments.maximum[s].double(), part.amax(0), rtol=0, atol=0)
    assert all(table.dtype == torch.float32 for table in moments)


@pytest.mark.parametrize("op", OPS)
def test_no_sentences(op, device: torch.device) -> None:
    moments = op(torch.empty(0, 2, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    assert all(table.shape == (0, 2, 8) for table in moments)
