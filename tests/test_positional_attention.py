"""Attention of rows that stand anywhere in a text against a dense masked softmax in float64."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv.exact import partial_attention_ref
from tests.lanes import DTYPES, assert_as_good
from triton_ops import merge_attention
from triton_ops.positional_attention import (
    MAX_HEAD_DIM,
    Tiles,
    positional_attention,
    positional_attention_ref,
    positional_attention_triton,
)

Op = Callable[..., tuple[Tensor, Tensor]]
MODULE = importlib.import_module("triton_ops.positional_attention")
SMALL_TILES = Tiles(rows=16, keys=16, num_warps=4, num_stages=2)
CPU = torch.device("cpu")


class Case(NamedTuple):
    """Arguments of the op, and what it must give in float64; logs are -inf where a row sees nothing."""

    arguments: tuple[Tensor, Tensor, Tensor]
    options: dict
    output: Tensor
    log: Tensor


def random_case(
    positions: list[int],
    num_keys: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    group: int = 2,
    dim: int = 16,
    softcap: float | None = None,
    seed: int = 0,
) -> Case:
    """NaN behind the last position, and wherever strides leave gaps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    # Queries as a projection to q, k and v leaves them; KV with rows before and behind, and other things between.
    qkv = torch.full((len(positions), heads * (group + 2), dim), torch.nan, dtype=dtype, device=device)
    q_ALH = qkv[:, : heads * group].copy_(2 * draw(len(positions), heads * group, dim)).transpose(0, 1)
    room = torch.full((heads, num_keys + 5, 2, 3, dim), torch.nan, dtype=dtype, device=device)
    kv_NTH = room[:, 3 : num_keys + 3, :, 1]
    seen = min(max([*positions, -1]) + 1, num_keys)
    kv_NTH[:, :seen] = draw(heads, seen, 2, dim)
    position_L = torch.tensor(positions, dtype=torch.int32, device=device)
    options = {"scale": dim**-0.5, "softcap": softcap}
    return Case((q_ALH, kv_NTH, position_L), options, *truth(q_ALH, kv_NTH[:, :seen], position_L, **options))


def truth(
    q_ALH: Tensor, kv_NTH: Tensor, position_L: Tensor, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    key, value = kv_NTH.double().repeat_interleave(q_ALH.shape[0] // kv_NTH.shape[0], dim=0).unbind(2)
    logit = scale * q_ALH.double() @ key.transpose(1, 2)
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    seen = torch.arange(key.shape[1], device=key.device) <= position_L[:, None]
    logit = logit.masked_fill(~seen, -torch.inf)
    return logit.softmax(-1).nan_to_num() @ value, logit.logsumexp(-1)


ULPS = 4
"""On top of twice the reference's error: a GPU's exponentials are within 2 of them, and each block of keys rescales."""


def check(op: Op, case: Case) -> None:
    """An op's output and logs, as good as the reference's in the same dtype."""
    output, log = op(*case.arguments, **case.options)
    want, want_log = positional_attention_ref(*case.arguments, **case.options)
    assert_as_good(output, want, case.output, ulps=ULPS)
    blind = case.arguments[2] < 0
    assert log.is_contiguous()
    assert (log[:, blind] == -torch.inf).all()
    assert (output[:, blind] == 0).all()
    if not blind.all():
        assert_as_good(log[:, ~blind], want_log[:, ~blind], case.log[:, ~blind], ulps=ULPS)


@pytest.fixture(params=[positional_attention, positional_attention_triton], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Op:
    """The op, and its kernel only where that runs."""
    if request.param is positional_attention_triton:
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few tokens make several of them."""
    monkeypatch.setattr(MODULE, "_tiles", lambda q_ALH, head_block: SMALL_TILES)
    monkeypatch.setattr(MODULE, "_LOGITS_AT_ONCE", 1000)


SCATTERED = [0, 1, 2, 9, 31, 32, *range(60, 75), 90, 127, 128, *range(140, 171), 199]
"""First and last of blocks, runs and single tokens."""


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_reference_is_a_masked_softmax(data: st.DataObject) -> None:
    num_keys = data.draw(st.integers(1, 40))
    positions = sorted(data.draw(st.sets(st.integers(-3, num_keys + 3), min_size=1)))
    group, heads, dim = (data.draw(st.integers(1, most)) for most in (3, 2, 5))
    softcap = data.draw(st.sampled_from([None, 2.0]))
    case = random_case(positions, num_keys, CPU, heads=heads, group=group, dim=dim, softcap=softcap)
    before = MODULE._LOGITS_AT_ONCE
    MODULE._LOGITS_AT_ONCE = data.draw(st.sampled_from([1, 200, before]))
    try:
        output, log = positional_attention_ref(*case.arguments, **case.options)
    finally:
        MODULE._LOGITS_AT_ONCE = before
    torch.testing.assert_close(output.double(), case.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log.double(), case.log, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_all_rows_are_causal_attention(softcap: float | None, op: Op, device: torch.device) -> None:
    case = random_case(list(range(150)), 150, device, heads=1, group=2, dim=32, softcap=softcap)
    output, log = op(*case.arguments, **case.options)
    q_ALH, kv_NTH, _ = case.arguments
    want, want_log = partial_attention_ref(q_ALH, kv_NTH, scale=32**-0.5, softcap=softcap, causal=True)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log, want_log, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "softcap"),
    [
        (2, 1, 16, None),
        (1, 3, 20, None),
        (2, 4, 64, None),
        (1, 4, 80, 2.0),
        (1, 2, 96, None),
        (1, 7, 128, None),
        (1, 2, 256, 5.0),
    ],
)
def test_kernel(
    heads: int, group: int, dim: int, softcap: float | None, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    shape = {"heads": heads, "group": group, "dim": dim, "softcap": softcap}
    check(positional_attention_triton, random_case(SCATTERED, 205, kernel_device, dtype, **shape))


@pytest.mark.usefixtures("poison", "small")
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("positions", "num_keys"),
    [
        (SCATTERED, 200),
        ([0], 1),
        ([0], 40),
        ([15], 16),
        ([16], 40),
        ([199], 200),
        (list(range(65)), 65),
        (list(range(3, 200, 13)), 230),
        ([*range(7), *range(190, 200)], 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_in_many_blocks(
    positions: list[int], num_keys: int, group: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    check(positional_attention_triton, random_case(positions, num_keys, kernel_device, dtype, heads=1, group=group))


@pytest.mark.usefixtures("poison", "small")
@pytest.mark.parametrize("positions", [[170], [5, 40, 199], [-1, 0, 1, 180], [*range(20), 199]], ids=str)
@pytest.mark.parametrize("split_keys", [1, 16, 64])
def test_programs_that_share_keys(
    positions: list[int], split_keys: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More programs than blocks of keys, one block each, several; some rows end before most shares begin."""
    monkeypatch.setattr(MODULE, "_SPLIT_KEYS", split_keys)
    monkeypatch.setattr(MODULE, "_PROGRAMS", 20)
    for heads, group, dim in ((1, 1, 16), (2, 3, 20)):
        check(
            positional_attention_triton, random_case(positions, 200, kernel_device, heads=heads, group=group, dim=dim)
        )


def test_the_number_of_shares(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on it, beyond rounding."""
    case = random_case([3, 70, 199], 200, kernel_device)
    results = []
    for split_keys in (300, 100, 16):
        monkeypatch.setattr(MODULE, "_SPLIT_KEYS", split_keys)
        results.append(positional_attention_triton(*case.arguments, **case.options))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(64,), (1, 150), (0, 100, 199), (200,)])
def test_parts_make_the_whole(cuts: tuple[int, ...], dtype: torch.dtype, op: Op, device: torch.device) -> None:
    """Rows before a part see nothing of it and rows behind it everything."""
    case = random_case(SCATTERED, 200, device, dtype, group=3)
    q_ALH, kv_NTH, position_L = case.arguments
    total, log = torch.zeros_like(case.output, dtype=torch.float32), torch.full_like(case.log, -torch.inf).float()
    for first, end in zip((0, *cuts), (*cuts, 200), strict=True):
        part = op(q_ALH, kv_NTH[:, first:end], position_L - first, **case.options)
        merge_attention(total, log, *part)
    whole, whole_log = positional_attention_ref(*case.arguments, **case.options)
    # Each part is rounded to the dtype once.
    assert_as_good(total.to(dtype), whole, case.output, ulps=4)
    assert_as_good(log, whole_log, case.log, ulps=4)


@pytest.mark.usefixtures("poison")
def test_nothing_to_see(op: Op, device: torch.device) -> None:
    for positions, num_keys in (([-9, -1], 30), ([0, 7], 0), ([], 30)):
        output, log = op(*(case := random_case(positions, num_keys, device)).arguments, **case.options)
        assert output.shape == case.output.shape
        assert log.shape == case.log.shape
        assert (output == 0).all()
        assert (log == -torch.inf).all()


def test_output_is_token_by_token(op: Op, device: torch.device) -> None:
    """So that the next layer's view of it is none but that."""
    case = random_case([1, 5, 6], 8, device)
    output, _ = op(*case.arguments, **case.options)
    assert output.transpose(0, 1).is_contiguous()


def test_positions_must_not_fall() -> None:
    q_ALH, kv_NTH, position_L = random_case([0, 2, 5], 6, CPU).arguments
    with pytest.raises(AssertionError, match="positions fall"):
        positional_attention(q_ALH, kv_NTH, position_L.flip(0), scale=1.0)


def test_wide_heads_are_refused(kernel_device: torch.device) -> None:
    case = random_case([0, 2], 3, kernel_device, dim=MAX_HEAD_DIM + 1)
    with pytest.raises(ValueError, match=r"head_dim must be at most 256 .* got 257"):
        positional_attention_triton(*case.arguments, **case.options)
