"""The hot set against a least-recently-used cache in plain Python."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.lanes import random_batch, random_selection
from triton_ops import Lanes
from triton_ops.resolve_hot_set import Resolved, resolve_hot_set, resolve_hot_set_ref, resolve_hot_set_triton

Op = Callable[[Tensor, Lanes, int], Resolved]


@pytest.fixture(params=[resolve_hot_set_ref, resolve_hot_set_triton, resolve_hot_set], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Op:
    """All three, and the kernel only where it runs."""
    if request.param is resolve_hot_set_triton:
        request.getfixturevalue("kernel_device")
    request.getfixturevalue("poison")
    return request.param


class PlainCache:
    """The specification in plain Python, for one head: `held[slot]` is a sentence or -1."""

    def __init__(self, num_slots: int) -> None:
        self.held = [-1] * num_slots
        self.last_used = [-1] * num_slots

    def resolve(self, wanted: list[int], step: int) -> tuple[list[int], list[int]]:
        """Slots of the sentences wanted, and 1 for each miss."""
        slot_of = {sentence: self.held.index(sentence) for sentence in wanted if sentence in self.held}
        misses = [sentence for sentence in wanted if sentence not in slot_of]
        free = sorted((used, slot) for slot, used in enumerate(self.last_used) if slot not in slot_of.values())
        taken = sorted(slot for _, slot in free[: len(misses)])
        slot_of |= dict(zip(misses, taken, strict=True))
        for sentence, slot in slot_of.items():
            self.held[slot], self.last_used[slot] = sentence, step
        return [slot_of[sentence] for sentence in wanted], [int(sentence in misses) for sentence in wanted]


def test_against_a_plain_cache(op: Op, device: torch.device) -> None:
    """60 steps of two ragged lanes: evictions, ties among the unused, steps that select nothing or all there are."""
    layer, heads, num_slots = 2, 2, 7
    lanes = random_batch(
        [[[3, 1, 8, 2, 5] * 3, [4] * 5], [[2] * 6, [], [1, 8]]], device, heads=heads, slots=num_slots, layers=(0, layer)
    )
    caches = [[PlainCache(num_slots) for _ in range(heads)] for _ in lanes.lanes]
    traffic = [[0, 0, 0] for _ in lanes.lanes]
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        for lane in lanes.lanes:
            lane.step = step
        lanes.count()
        counts = torch.randint(0, num_slots + 1, (2, heads), generator=generator).tolist()
        selected = random_selection(lanes, counts, seed=step)
        resolved = op(selected, lanes, layer)
        slot, length, miss, number = resolved
        assert [table.dtype for table in resolved] == [torch.int32, torch.int32, torch.int8, torch.int32]
        assert number.tolist() == [*counts, [0] * heads]
        for b, lane in enumerate(lanes.lanes):
            for n in range(heads):
                wanted = [s for s in selected[b, n].tolist() if s >= 0]
                cache = caches[b][n]
                expected_slots, expected_misses = cache.resolve(wanted, step)
                padding = lanes.most_selected - len(wanted)
                assert slot[b, n].tolist() == expected_slots + [-1] * padding
                assert miss[b, n].tolist() == expected_misses + [0] * padding
                assert length[b, n].tolist() == [int(lane.place_S4[s, 0]) for s in wanted] + [0] * padding
                assert lane.sentence_of_slot[layer][n].tolist() == cache.held
                assert lane.last_used[layer][n].tolist() == cache.last_used
                width = lane.slot_of_sentence[layer].shape[1]
                where = [cache.held.index(s) if s in cache.held else -1 for s in range(width)]
                assert lane.slot_of_sentence[layer][n].tolist() == where
                fetched = [lane.place_S4[s, 0].item() for s, m in zip(wanted, expected_misses, strict=True) if m]
                traffic[b][0] += len(wanted)
                traffic[b][1] += len(fetched)
                traffic[b][2] += sum(fetched)
            assert lane.traffic.tolist() == traffic[b]
            assert (lane.sentence_of_slot[0] == -1).all(), "another layer's tables are not touched"
        assert (slot[2] == -1).all()
        assert (miss[2] == 0).all()
        assert (length[2] == 0).all()


def test_lanes_at_steps_of_their_own(op: Op, device: torch.device) -> None:
    """A session that joins late, and one whose last use lies far back."""
    lanes = random_batch([[[3] * 9], [[3] * 9]], device, heads=1, slots=3, spare=0)
    caches = [PlainCache(3), PlainCache(3)]
    for steps in ((0, 1_000_000), (1, 1_000_001), (2, 2_000_000), (3, 2_000_000_000)):
        for lane, step in zip(lanes.lanes, steps, strict=True):
            lane.step = step
        lanes.count()
        selected = random_selection(lanes, [[2], [2]], seed=steps[0])
        slot = op(selected, lanes, 0).slot_BNK
        for b in range(2):
            wanted = [s for s in selected[b, 0].tolist() if s >= 0]
            assert slot[b, 0].tolist()[:2] == caches[b].resolve(wanted, steps[b])[0]


def test_nothing_selected(op: Op, device: torch.device) -> None:
    lanes = random_batch([[[4, 4]], [[]]], device)
    before = lanes.lanes[0].last_used[0].clone()
    resolved = op(random_selection(lanes, [[0, 0], [0, 0]]), lanes, 0)
    assert (resolved.slot_BNK == -1).all()
    assert (resolved.miss_BNK == 0).all()
    assert (resolved.count_BN == 0).all()
    assert torch.equal(lanes.lanes[0].last_used[0], before)
    assert lanes.lanes[0].traffic.tolist() == [0, 0, 0]


def test_all_slots_at_once(op: Op, device: torch.device) -> None:
    """As many selected as there are slots, over and over: all are replaced, then none."""
    lanes = random_batch([[[2] * 10]], device, heads=1, slots=5, spare=0)
    for step, (ids, num_missed) in enumerate([(range(5), 5), (range(5, 10), 5), (range(5, 10), 0), (range(4, 9), 1)]):
        lanes.lanes[0].step = step
        lanes.count()
        selected = torch.tensor([[list(ids)]], dtype=torch.int32, device=device)
        resolved = op(selected, lanes, 0)
        assert int(resolved.miss_BNK.sum()) == num_missed
        assert sorted(resolved.slot_BNK[0, 0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.gpu
def test_kernel_on_many_slots() -> None:
    """As many slots as a large budget has, more than one warp's worth of everything."""
    lengths = [[[3] * 1500], [[5] * 700]]
    options = {"heads": 4, "slots": 600, "most_selected": 300, "slab_tokens": 4096}
    lanes, twins = (random_batch(lengths, torch.device("cuda"), **options) for _ in range(2))
    for step in range(12):
        for batch in (lanes, twins):
            for lane in batch.lanes:
                lane.step, lane.max_selected = step, 300
            batch.count()
        selected = random_selection(lanes, [[300, 0, 17, 299], [120, 250, 1, 300]], seed=step)
        got, want = resolve_hot_set_triton(selected, lanes, 0), resolve_hot_set_ref(selected, twins, 0)
        for mine, other in zip(got, want, strict=True):
            assert torch.equal(mine, other)
        for lane, twin in zip(lanes.lanes, twins.lanes, strict=True):
            for table in ("sentence_of_slot", "last_used", "slot_of_sentence"):
                assert torch.equal(getattr(lane, table)[0], getattr(twin, table)[0])
            assert torch.equal(lane.traffic, twin.traffic)
