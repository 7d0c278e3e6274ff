"""Whole sentences into their slots, and no other byte changed."""

from collections.abc import Callable

import pytest
import torch

from tests.lanes import DTYPES, random_batch, random_lengths, random_selection
from triton_ops.gather_kv import gather_kv, gather_kv_ref, gather_kv_triton
from triton_ops.resolve_hot_set import resolve_hot_set_ref


@pytest.fixture(params=[gather_kv_ref, gather_kv_triton, gather_kv], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """All three, and the kernel only where it runs."""
    if request.param is gather_kv_triton:
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "slot_tokens"), [(16, 8), (80, 8), (128, 32), (256, 8)])
def test_misses_are_copied_and_nothing_else(
    op: Callable[..., None], dim: int, slot_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Over several slabs, the rows up to a slab's last; sentences of one token and of a whole slot; hits in between."""
    layer = 2
    lengths = [[random_lengths(9, slot_tokens), [slot_tokens] * 4, [1] * 3], [[5, 1]], []]
    lanes = random_batch(lengths, device, dim=dim, slots=6, dtype=dtype, slot_tokens=slot_tokens, layers=(0, layer))
    for step, counts in enumerate([[[6, 2], [2, 0], [0, 0]], [[5, 6], [1, 2], [0, 0]], [[0] * 2] * 3]):
        for lane in lanes.lanes:
            lane.step = step
        lanes.count()
        selected = random_selection(lanes, counts, seed=step)
        resolved = resolve_hot_set_ref(selected, lanes, layer)
        slot, miss = resolved.slot_BNK, resolved.miss_BNK
        expected = [lane.hot_kv[layer].clone() for lane in lanes.lanes]
        for b, n, k in miss.nonzero().tolist():
            lane = lanes.lanes[b]
            length, slab, row, _ = lane.place_S4[selected[b, n, k]].tolist()
            expected[b][n, slot[b, n, k], :length] = lane.slabs[layer][slab][n, row : row + length].to(device)
        # Of entries without a miss nothing is looked at.
        selected[miss == 0] = 2**31 - 1
        slot[miss == 0] = 2**31 - 1
        op(selected, slot, miss, lanes, layer)
        for lane, want in zip(lanes.lanes, expected, strict=True):
            torch.testing.assert_close(lane.hot_kv[layer], want, rtol=0, atol=0, equal_nan=True)
            assert lane.hot_kv[0].isnan().all(), "another layer's slots are not touched"
