"""The highest of each row of logits, its log-probability, and NaN noticed wherever it stands."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from triton_ops.draw_greedy import draw_greedy, draw_greedy_ref, draw_greedy_triton

Op = Callable[[Tensor], Tensor]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(params=[draw_greedy, draw_greedy_ref, draw_greedy_triton], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Op:
    """All three, and the kernels only where they run."""
    if request.param is draw_greedy_triton:
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows have several blocks, too."""
    monkeypatch.setattr(importlib.import_module("triton_ops.draw_greedy"), "_BLOCK", 64)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 63, 64, 65, 500, 1000])
def test_rows(op: Op, num_columns: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(num_columns)
    logits = (5 * torch.randn(3, num_columns + 7, device=device)).to(dtype)[:, 3 : 3 + num_columns]
    drawn = op(logits)
    assert drawn.dtype == torch.float32
    token = drawn[:, 0].long()
    assert torch.equal(token, logits.float().argmax(dim=1))
    want = logits.double().log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(drawn[:, 1].double(), want, rtol=1e-5, atol=1e-5)
    assert not drawn[:, 2].any()


@pytest.mark.usefixtures("short_blocks")
def test_the_first_of_equals(op: Op, device: torch.device) -> None:
    logits = torch.zeros(2, 300, device=device)
    logits[0, [70, 71, 200, 299]] = 2.5
    assert op(logits)[:, 0].tolist() == [70, 0]


@pytest.mark.usefixtures("short_blocks")
def test_masked_logits(op: Op, device: torch.device) -> None:
    """Minus infinity is a probability of zero; a row of nothing else still gives a token that exists."""
    logits = torch.full((2, 200), -torch.inf, device=device)
    logits[0, 130] = -3.0
    drawn = op(logits)
    assert drawn[0].tolist() == [130, 0, 0]
    assert drawn[1, 0] in range(200)
    assert drawn[1, 2] == 0


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("column", [0, 77, 199])
def test_nan_is_noticed(op: Op, column: int, device: torch.device) -> None:
    logits = torch.randn(3, 200, device=device)
    logits[1, column] = torch.nan
    logits[1, 40] = 9.0
    logits[2] = torch.nan
    drawn = op(logits)
    assert drawn[:, 2].tolist() == [0, 1, 1]
    assert all(token in range(200) for token in drawn[:, 0].tolist())


def test_a_vocabulary_of_a_real_model(op: Op, device: torch.device) -> None:
    logits = torch.randn(2, 262_145, device=device)
    assert torch.equal(op(logits)[:, 0].long(), logits.argmax(dim=1))
