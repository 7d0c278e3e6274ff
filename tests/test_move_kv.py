"""Rows where a new prompt has them: keys as the specification of moving turns them, all else bit by bit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv.rope import Rotation, rotate
from tests.lanes import DTYPES, assert_as_good
from triton_ops.move_kv import move_kv, move_kv_ref, move_kv_triton

Op = Callable[..., None]
CPU = torch.device("cpu")
SHIFTS = [0, 1, -1, 37, -5000, 123_456]


@pytest.fixture(params=[move_kv_ref, move_kv_triton, move_kv], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Op:
    """All three, and the kernel only where it runs."""
    if request.param is move_kv_triton:
        request.getfixturevalue("kernel_device")
    return request.param


class Case(NamedTuple):
    """Arguments of the op; what it must give where a row has a source, in float64, and which rows have."""

    arguments: tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]
    truth: Tensor
    source_T: Tensor
    shift_T: Tensor

    def run(self, op: Op, *, interleaved: bool) -> Tensor:
        into, *others = self.arguments
        into = into.clone()
        op(into, *others, interleaved=interleaved)
        return into


def random_case(
    num_tokens: int,
    capacities: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    dim: int = 16,
    pairs: int = 8,
    interleaved: bool = False,
    shifts: Sequence[int] = SHIFTS,
    seed: int = 0,
) -> Case:
    """Rows from anywhere in several sources, by turns on the device and in host memory; a third of them from nowhere.
    NaN in the source rows that nobody wants."""
    generator = torch.Generator().manual_seed(seed)

    def integers(stop: int) -> Tensor:
        return torch.randint(stop, (num_tokens,), generator=generator)

    source_T, row_T, turn_T = integers(len(capacities)), integers(1 << 30), integers(len(shifts))
    row_T %= torch.tensor(capacities)[source_T]
    source_T[integers(3) == 0] = -1
    sources = []
    for number, capacity in enumerate(capacities):
        source = torch.full((heads, capacity, 2, dim), torch.nan, dtype=dtype)
        wanted = row_T[source_T == number]
        source[:, wanted] = torch.randn((heads, len(wanted), 2, dim), generator=generator).to(dtype)
        host = source.pin_memory() if device.type == "cuda" else source
        sources.append(source.to(device) if number % 2 else host)
    rotation = Rotation(tuple(10000 ** (-i / max(pairs, 1)) for i in range(pairs)), interleaved)
    truth = torch.full((heads, num_tokens, 2, dim), torch.nan, dtype=torch.float64)
    for number, source in enumerate(sources):
        here = source_T == number
        truth[:, here] = source[:, row_T[here]].cpu().double()
    shift_T = torch.tensor(shifts)[turn_T]
    truth[:, :, 0] = turned(truth[:, :, 0].transpose(0, 1), rotation, shift_T).transpose(0, 1)
    # What has no source looks as if it had one, but for its number.
    place_T3 = torch.stack([source_T, row_T, turn_T], dim=1).to(torch.int32).to(device)
    addresses = [[source.data_ptr(), source.shape[1]] for source in sources]
    source_S2 = torch.tensor(addresses, dtype=torch.int64, device=device).reshape(-1, 2)
    # Rows of a larger tensor: the stride between heads is another one.
    into = torch.full((heads, num_tokens + 3, 2, dim), torch.nan, dtype=dtype, device=device)[:, :num_tokens]
    tables = rotation.tables(shifts, device)
    return Case((into, sources, source_S2, place_T3, *tables), truth, source_T, shift_T)


def turned(key_TNH: Tensor, rotation: Rotation, shift_T: Tensor) -> Tensor:
    """In float64."""
    num_pairs = len(rotation.frequency_R)
    first = torch.arange(num_pairs) * (2 if rotation.interleaved else 1)
    second = first + (1 if rotation.interleaved else num_pairs)
    angle_T1R = torch.outer(shift_T.double(), torch.tensor(rotation.frequency_R, dtype=torch.float64))[:, None]
    turned_TNH = key_TNH.clone()
    turned_TNH[..., first] = key_TNH[..., first] * angle_T1R.cos() - key_TNH[..., second] * angle_T1R.sin()
    turned_TNH[..., second] = key_TNH[..., second] * angle_T1R.cos() + key_TNH[..., first] * angle_T1R.sin()
    return turned_TNH


SHAPES = [
    # heads, dim, pairs, interleaved: all dimensions, a part of them, none; dimensions that are no power of two.
    (2, 16, 8, False),
    (1, 20, 10, True),
    (3, 16, 4, False),
    (1, 80, 16, True),
    (2, 12, 2, True),
    (2, 16, 0, False),
    (1, 96, 48, False),
    (1, 256, 128, True),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "pairs", "interleaved"), SHAPES)
def test_rows_are_moved(
    heads: int, dim: int, pairs: int, interleaved: bool, dtype: torch.dtype, op: Op, device: torch.device
) -> None:
    """Values bit by bit; keys as good as the reference's; rows without a source as they were."""
    shape = {"heads": heads, "dim": dim, "pairs": pairs, "interleaved": interleaved}
    case = random_case(39, [7, 23, 5], device, dtype, **shape)
    got = case.run(op, interleaved=interleaved).cpu()
    want = case.run(move_kv_ref, interleaved=interleaved).cpu()
    moved = case.source_T >= 0
    assert 0 < moved.sum() < len(moved)
    assert got[:, ~moved].isnan().all()
    assert torch.equal(got[:, moved, 1].double(), case.truth[:, moved, 1])
    assert torch.equal(got[:, moved, 0, 2 * pairs :].double(), case.truth[:, moved, 0, 2 * pairs :])
    assert_as_good(got[:, moved, 0], want[:, moved, 0], case.truth[:, moved, 0])
    still = moved & (case.shift_T == 0)
    assert still.any()
    assert torch.equal(got[:, still].double(), case.truth[:, still])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_is_the_rotation(interleaved: bool, device: torch.device) -> None:
    """Rounded once: to the dtype, from what `rotate` gives in float32."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = random_case(30, [11], device, dtype, dim=20, pairs=7, interleaved=interleaved)
        got = case.run(move_kv_ref, interleaved=interleaved)
        rotation = Rotation(tuple(10000 ** (-i / 7) for i in range(7)), interleaved)
        _, (source,), _, place_T3, *_ = case.arguments
        for t in (case.source_T >= 0).nonzero()[:, 0].tolist():
            key_NH = source[:, int(place_T3[t, 1]), 0]
            want_NH = rotate(key_NH.to(device), rotation, int(case.shift_T[t])).to(dtype)
            torch.testing.assert_close(got[:, t, 0], want_NH, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poison")
def test_programs_take_many_blocks(op: Op, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks of rows than programs, heads that end within one, and the last row of all."""
    monkeypatch.setattr("triton_ops.move_kv._PROGRAMS", 2)
    for num_tokens in (1, 15, 16, 17, 67):
        case = random_case(num_tokens, [40, 3], device, heads=3, dim=12, pairs=3, seed=num_tokens)
        case.arguments[3][-1] = torch.tensor([0, 39, 1])
        case.arguments[1][0][:, 39] = 1.5
        got = case.run(op, interleaved=False)
        assert torch.equal(got[:, -1, 1].cpu(), torch.full((3, 12), 1.5))
        want = case.run(move_kv_ref, interleaved=False)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_nothing_to_move(op: Op, device: torch.device) -> None:
    """No rows; rows all of which are from nowhere, be there a source, an empty one, or none."""
    into, sources, source_S2, place_T3, *tables = random_case(20, [4], device).arguments
    op(into[:, :0], sources, source_S2, place_T3[:0], *tables, interleaved=False)
    place_T3[:, 0] = -1
    op(into, sources, source_S2, place_T3, *tables, interleaved=False)
    op(into, [sources[0][:, :0]], source_S2, place_T3, *tables, interleaved=False)
    op(into, [], source_S2[:0], place_T3, *tables, interleaved=False)
    assert into.isnan().all()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_moving_on_is_moving_there_at_once(data: st.DataObject) -> None:
    """And back: what was moved is the source of the next."""
    interleaved = data.draw(st.booleans())
    first, second = (data.draw(st.integers(-100_000, 100_000)) for _ in range(2))
    case = random_case(12, [5], CPU, pairs=data.draw(st.integers(0, 8)), interleaved=interleaved, shifts=[first])
    rotation = Rotation(tuple(10000 ** (-i / 8) for i in range(case.arguments[4].shape[1])), interleaved)

    def moved(kv_NTH: Tensor, shift: int) -> Tensor:
        into = torch.full_like(kv_NTH, torch.nan)
        place = torch.tensor([[0, row, 0] for row in range(kv_NTH.shape[1])], dtype=torch.int32)
        where = torch.tensor([[kv_NTH.data_ptr(), kv_NTH.shape[1]]])
        move_kv_ref(into, [kv_NTH], where, place, *rotation.tables([shift], CPU), interleaved=interleaved)
        return into

    kv_NTH = torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(1))
    there = moved(kv_NTH, first)
    torch.testing.assert_close(moved(there, second), moved(kv_NTH, first + second), rtol=0, atol=2e-6)
    torch.testing.assert_close(moved(there, -first), kv_NTH, rtol=0, atol=2e-6)
