"""Attention merged from parts against attention over everything."""

from collections.abc import Callable

import pytest
import torch

from tests.lanes import assert_as_good
from triton_ops.merge_attention import merge_attention, merge_attention_ref, merge_attention_triton

Op = Callable[..., None]
OPS = [merge_attention, merge_attention_ref, merge_attention_triton]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logit = q @ k.transpose(1, 2)
    return torch.softmax(logit, -1) @ v, logit.logsumexp(-1)


@pytest.fixture(params=OPS, ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Op:
    """All three, and the kernel only where it runs."""
    if request.param is merge_attention_triton:
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.mark.parametrize(("heads", "rows", "dim"), [(1, 1, 16), (3, 37, 20), (2, 16, 64), (1, 5, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_make_the_whole(
    op: Op, heads: int, rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Three parts, one of them with far larger logits; parts are strided as attention kernels leave them."""
    torch.manual_seed(0)
    q = 3 * torch.randn(heads, rows, dim, dtype=torch.float64, device=device)
    k = torch.randn(heads, 60, dim, dtype=torch.float64, device=device)
    k[:, 20:40] *= 20
    v = torch.randn(heads, 60, dim, dtype=torch.float64, device=device)
    truth, _ = attend(q, k, v)
    results = {}
    for each in (op, merge_attention_ref):
        total = torch.full((heads, rows, dim), 7.0, device=device)
        log = torch.full((heads, rows), -torch.inf, device=device)
        for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
            output, of_part = attend(q, k[:, part], v[:, part])
            strided = output.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
            each(total, log, strided, of_part.float())
        results[each] = total
        torch.testing.assert_close(log.double(), (q @ k.transpose(1, 2)).logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert_as_good(results[op], results[merge_attention_ref], truth, ulps=4)


def test_a_part_without_keys_changes_nothing(op: Op, device: torch.device) -> None:
    total = torch.randn(2, 3, 16, device=device)
    log = torch.randn(2, 3, device=device)
    before, log_before = total.clone(), log.clone()
    nothing = torch.full((2, 3), -torch.inf, device=device)
    op(total, log, torch.zeros(2, 3, 16, device=device), nothing)
    torch.testing.assert_close(total, before)
    torch.testing.assert_close(log, log_before)
    op(total, nothing, torch.zeros(2, 3, 16, device=device), nothing.clone())
    assert (nothing == -torch.inf).all()
    assert total.isfinite().all()
