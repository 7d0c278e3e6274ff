"""Attention over slots and resident tokens as one softmax, in float64."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.lanes import (
    DTYPES,
    assert_as_good,
    fetch,
    random_batch,
    random_heads,
    random_lengths,
    random_selection,
    scores_from,
)
from triton_ops import Lanes
from triton_ops.lanes import SHARE_UNITS
from triton_ops.resolve_hot_set import resolve_hot_set_ref
from triton_ops.score_sentences import Scores
from triton_ops.sparse_decode import sparse_decode, sparse_decode_ref, sparse_decode_triton

Op = Callable[..., Tensor]
SLIDING = 1
"""The layer that is a ring, where a test has one."""


class Step(NamedTuple):
    """What one call gets, and what it must give: the output of the seated lanes, and all their sentences' shares."""

    arguments: tuple
    options: dict
    output: Tensor
    share: Tensor


def random_step(
    lanes: Lanes,
    group: int,
    dtype: torch.dtype,
    counts: list[list[int]] | None,
    *,
    layer: int = 0,
    softcap: float | None = None,
    seed: int = 0,
    fetched: bool = False,
    rest: bool = False,
    lead: float = 0.0,
) -> Step:
    """Queries and a new token for each lane, a selection in the hot set, and the truth by brute force.

    `fetched`: its misses are still in host memory, and it is the op that brings them. `rest`: what is not selected
    counts as one token, but in the last lane, which knows no mean value; scores think so much more of what is selected,
    `lead`, a log.
    """
    heads, dim = lanes.num_kv_heads, lanes.lanes[0].resident_kv[layer].shape[3]
    q = 2 * random_heads(lanes, heads * group, dim, dtype, seed)
    k, v = (random_heads(lanes, heads, dim, dtype, seed + i) for i in (1, 2))
    scale = dim**-0.5
    selected = resolved = None
    if counts is not None:
        selected = random_selection(lanes, counts, seed)
        resolved = resolve_hot_set_ref(selected, lanes, layer) if fetched else fetch(lanes, layer, selected)
    scores = random_scores(lanes, group, layer, dim, seed, selected, lead) if rest else None
    sliding = layer == SLIDING
    outputs, shares = [], []
    for b, lane in enumerate(lanes.lanes):
        resident = lane.resident_kv[layer]
        if sliding:
            window = resident.shape[1]
            before = range(max(lane.position - (window - 1), 0), lane.position)
            kept = resident[:, [position % window for position in before]]
        else:
            kept = resident[:, : lane.num_resident]
        share_S = lane.share_S.double() / SHARE_UNITS.value
        for n in range(heads):
            ids = [] if selected is None else [s for s in selected[b, n].tolist() if s >= 0]
            sentences = []
            for s in ids:
                length, slab, row, _ = lane.place_S4[s].tolist()
                sentences.append(lane.slabs[layer][slab][n, row : row + length].to(q.device))
            new = torch.stack([k[b, n], v[b, n]])[None]
            kv = torch.cat([*sentences, kept[n], new]).double()
            logit = scale * q[b, n * group : (n + 1) * group].double() @ kv[:, 0].T
            if softcap is not None:
                logit = softcap * torch.tanh(logit / softcap)
            value = kv[:, 1]
            if scores is not None and layer in lane.mean_value:
                unread = [s for s in range(lane.num_sentences) if s not in ids]
                estimate = scores.logit_BNGS[b, n].double()
                mass = estimate[:, unread].logsumexp(-1, keepdim=True)
                everything = estimate[:, : lane.num_sentences].logsumexp(-1, keepdim=True)
                mass = mass.masked_fill((mass - everything).exp() <= 2**-18, -torch.inf)
                weight = torch.cat([logit, mass], dim=1).softmax(-1)
                read = kv.shape[0] - 1 - kept.shape[1]
                # A fifth of it has the value of what was selected, if anything was.
                mean_value = lane.mean_value[layer][n].double().expand(group, -1)
                like = weight[:, :read] @ value[:read] / weight[:, :read].sum(-1, keepdim=True) if read else mean_value
                unread_value = 0.8 * mean_value + 0.2 * like
                outputs.append(weight[:, :-1] @ value + weight[:, -1:] * unread_value)
            else:
                weight = logit.softmax(-1)
                outputs.append(weight @ value)
            lengths = [part.shape[0] for part in sentences]
            for s, of_sentence in zip(
                ids, weight.split([*lengths, weight.shape[1] - sum(lengths)], dim=-1), strict=False
            ):
                share_S[s] += of_sentence.sum() / (group * heads)
        shares.append(share_S)
    output = torch.stack(outputs).view(len(lanes.lanes), heads * group, dim)
    return Step(
        (q, k, v, lanes, layer, selected, resolved),
        {"scale": scale, "softcap": softcap, "sliding": sliding, "fetch": fetched, "rest": scores},
        output,
        torch.cat(shares),
    )


def random_scores(
    lanes: Lanes, group: int, layer: int, dim: int, seed: int, selected: Tensor | None, lead: float
) -> Scores:
    """Logits of all sentences, those selected with a lead, NaN where there are none; mean values to them."""
    generator = torch.Generator().manual_seed(seed)
    for lane in lanes.lanes[:-1]:
        device = lane.place_S4.device
        lane.mean_value[layer] = torch.randn(lanes.num_kv_heads, dim, generator=generator).to(device)
    lanes.seat(lanes.lanes)
    shape = (lanes.num_lanes, lanes.num_kv_heads, group, lanes.capacity)
    logit = 4 * torch.randn(shape, generator=generator).to(lanes.device) - 2
    for b, heads in enumerate([] if selected is None else selected.tolist()):
        for n, ids in enumerate(heads):
            logit[b, n][:, [s for s in ids if s >= 0]] += lead
    return scores_from(lanes, logit)


def shares(lanes: Lanes) -> Tensor:
    return torch.cat([lane.share_S for lane in lanes.lanes]) / SHARE_UNITS.value


def assert_new_token_is_kept(before: list[Tensor], step: Step) -> None:
    """The new token is in its row, and no other row changed: also none that was never written."""
    _, k, v, lanes, layer, *_ = step.arguments
    for b, lane in enumerate(lanes.lanes):
        want, size = before[b], before[b].shape[1]
        row = lane.position % size if step.options["sliding"] else lane.num_resident
        want[:, row] = torch.stack([k[b], v[b]], dim=1)
        torch.testing.assert_close(lane.resident_kv[layer], want, rtol=0, atol=0, equal_nan=True)


RAGGED = [[random_lengths(6, 8), [], [3] * 3], [[2, 8, 1]], [[4], random_lengths(5, 8, seed=1)]]
COUNTS = [[7, 9], [3, 0], [0, 5]]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("counts", [COUNTS, [[1, 0], [0, 0], [1, 1]], [[0] * 2] * 3, None])
def test_one_softmax(counts: list[list[int]] | None, softcap: float | None, device: torch.device) -> None:
    lanes = random_batch(RAGGED, device, layers=(0, 2))
    for seed in range(2):
        step = random_step(lanes, 3, torch.float32, counts, layer=2, softcap=softcap, seed=seed)
        before = [lane.resident_kv[2].clone() for lane in lanes.lanes]
        output = sparse_decode_ref(*step.arguments, **step.options)
        torch.testing.assert_close(output[:3].double(), step.output, rtol=1e-5, atol=1e-5)
        assert (output[3] == 0).all(), "a lane without a sequence has nothing to attend to"
        torch.testing.assert_close(shares(lanes).double(), step.share, rtol=1e-5, atol=1e-6)
        assert_new_token_is_kept(before, step)


@pytest.mark.parametrize("fetched", [False, True])
def test_the_rest_is_one_token_more(fetched: bool, device: torch.device) -> None:
    lanes = random_batch(RAGGED, device)
    step = random_step(lanes, 3, torch.float32, COUNTS, rest=True, fetched=fetched)
    output = sparse_decode_ref(*step.arguments, **step.options)
    torch.testing.assert_close(output[:3].double(), step.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shares(lanes).double(), step.share, rtol=1e-5, atol=1e-6)
    without = sparse_decode_ref(*step.arguments, **{**step.options, "rest": None})
    assert ((without - output)[:2].norm(dim=-1) > 0.01).any()
    assert torch.equal(without[2], output[2]), "a lane that knows no mean value"


def test_nothing_is_left_when_all_is_selected(device: torch.device) -> None:
    lanes = random_batch([[[3, 4, 5]], [[2]]], device)
    step = random_step(lanes, 3, torch.float32, [[3, 3], [1, 1]], rest=True)
    both = [sparse_decode(*step.arguments, **{**step.options, "rest": rest}) for rest in (step.options["rest"], None)]
    assert torch.equal(*both)


@pytest.mark.parametrize("size", [5, 9, 200])
def test_a_ring_holds_the_last_tokens(size: int, device: torch.device) -> None:
    """The ring longer and shorter than what was read; then it turns."""
    lanes = random_batch([[[3, 4]], [[2]]], device, residents=[11, 1], ring={SLIDING: size})
    for seed in range(12):
        step = random_step(lanes, 3, torch.float32, None, layer=SLIDING, seed=seed)
        before = [lane.resident_kv[SLIDING].clone() for lane in lanes.lanes]
        output = sparse_decode_ref(*step.arguments, **step.options)
        torch.testing.assert_close(output[:2].double(), step.output, rtol=1e-5, atol=1e-5)
        assert_new_token_is_kept(before, step)
        for lane in lanes.lanes:
            lane.position += 1


def check_kernel(make: Callable[[], tuple[Lanes, Step]]) -> None:
    """The kernel on one batch, the reference on its twin."""
    (lanes, step), (twins, twin_step) = make(), make()
    layer = step.arguments[4]
    before = [lane.resident_kv[layer].clone() for lane in lanes.lanes]
    got = sparse_decode_triton(*step.arguments, **step.options)
    want = sparse_decode_ref(*twin_step.arguments, **twin_step.options)
    seated = len(lanes.lanes)
    assert_as_good(got[:seated], want[:seated], step.output)
    assert (got[seated:] == 0).all()
    if step.share.numel():
        # Sums of float32 whatever the dtype of keys is.
        allowed = 2 * (shares(twins).double() - step.share).abs().max() + 1e-6
        assert (shares(lanes).double() - step.share).abs().max() <= allowed
    assert_new_token_is_kept(before, step)
    for lane, twin in zip(lanes.lanes, twins.lanes, strict=True):
        if layer in lane.hot_kv:
            torch.testing.assert_close(lane.hot_kv[layer], twin.hot_kv[layer], rtol=0, atol=0, equal_nan=True)
    assert all((table == 0).all() for table in lanes._scratch_of.values()), "ready for the next launch"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group", "heads", "slot_tokens", "softcap"),
    [
        (16, 1, 2, 8, None),
        (16, 3, 2, 8, 2.0),
        (64, 4, 1, 32, None),
        (80, 3, 1, 8, None),
        (96, 7, 1, 8, 20.0),
        (128, 8, 1, 32, None),
        (256, 1, 1, 8, None),
    ],
)
def test_kernel(
    dim: int,
    group: int,
    heads: int,
    slot_tokens: int,
    softcap: float | None,
    dtype: torch.dtype,
    kernel_device: torch.device,
) -> None:
    """Ragged lanes with an empty one behind; more resident tokens than one program reads at a time in one of them."""
    lengths = [[random_lengths(6, slot_tokens), [], [3] * 3], [[slot_tokens, 1]], []]
    counts = [[9, 2], [1, 2], [0, 0]]

    def make() -> tuple[Lanes, Step]:
        lanes = random_batch(
            lengths,
            kernel_device,
            residents=[70, 5, 0],
            heads=heads,
            dim=dim,
            dtype=dtype,
            slots=10,
            slot_tokens=slot_tokens,
        )
        return lanes, random_step(lanes, group, dtype, [row[:heads] for row in counts], softcap=softcap)

    check_kernel(make)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "slot_tokens"), [(16, 8), (80, 8), (128, 32), (256, 8)])
def test_kernel_that_fetches(
    dim: int, slot_tokens: int, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hits and misses side by side over several slabs; what was missed is in its slot afterwards, and nothing else."""
    monkeypatch.setattr(importlib.import_module("triton_ops.sparse_decode"), "_ROWS_FETCHED", 32)
    lengths = [[random_lengths(6, slot_tokens), [], [3] * 3], [[slot_tokens, 1]], []]
    options = {"heads": 2, "dim": dim, "dtype": dtype, "slots": 9, "slot_tokens": slot_tokens, "slab_tokens": 48}

    def make() -> tuple[Lanes, Step]:
        lanes = random_batch(lengths, kernel_device, residents=[70, 5, 0], **options)
        # Some of what the second step selects is there already.
        fetch(lanes, 0, random_selection(lanes, [[4, 3], [1, 0], [0, 0]], seed=5))
        for lane in lanes.lanes:
            lane.step += 1
        lanes.count()
        return lanes, random_step(lanes, 3, dtype, [[9, 2], [1, 2], [0, 0]], fetched=True)

    _, step = make()
    miss = step.arguments[6].miss_BNK
    assert 0 < miss.sum() < 14, "some are hits, some are not"
    check_kernel(make)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("programs", [1, 12, 1000])
def test_kernel_with_any_number_of_programs(
    programs: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for all slots and one for all resident tokens; several blocks each; results merged two at a time."""
    module = importlib.import_module("triton_ops.sparse_decode")
    monkeypatch.setattr(module, "_ROWS", 16)
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    monkeypatch.setattr(module, "_MERGED_NUMBERS", 8)

    def make() -> tuple[Lanes, Step]:
        lanes = random_batch([[[3] * 19], [[8]]], kernel_device, residents=[203, 16], heads=1, slots=19)
        return lanes, random_step(lanes, 2, torch.float32, [[18], [1]])

    check_kernel(make)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[[0, 0], [0, 0]], None])
def test_kernel_without_a_selection(
    counts: list[list[int]] | None, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    def make() -> tuple[Lanes, Step]:
        lanes = random_batch([[[4] * 3], [[]]], kernel_device, dtype=dtype, residents=[9, 0])
        return lanes, random_step(lanes, 3, dtype, counts)

    check_kernel(make)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 64, 100])
def test_kernel_on_a_ring(size: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Shorter than what was read in one lane, longer in the other; a first token; a ring of one block and of more."""

    def make() -> tuple[Lanes, Step]:
        options = {"residents": [80, 14, 0], "dtype": dtype, "ring": {SLIDING: size}}
        lanes = random_batch([[[8, 5]], [[3]], []], kernel_device, **options)
        return lanes, random_step(lanes, 3, dtype, None, layer=SLIDING)

    check_kernel(make)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "fetched", "lead", "counts"),
    [
        (1, False, 0, COUNTS),
        (4, True, 2, COUNTS),
        (7, True, 25, COUNTS),
        (3, False, 0, [[9, 9], [3, 3], [0, 0]]),
        (2, False, 0, [[0, 0], [0, 3], [0, 0]]),
    ],
)
def test_kernel_with_the_rest(
    group: int, fetched: bool, lead: float, counts: list[list[int]], dtype: torch.dtype, kernel_device: torch.device
) -> None:
    """Where scores see next to nothing beside what is selected, rounding must not look like more."""

    def make() -> tuple[Lanes, Step]:
        lanes = random_batch(RAGGED, kernel_device, dtype=dtype)
        return lanes, random_step(lanes, group, dtype, counts, rest=True, fetched=fetched, lead=lead)

    check_kernel(make)


@pytest.mark.usefixtures("poison")
def test_kernel_step_after_step(kernel_device: torch.device) -> None:
    """Shares add up, and what counts programs is ready for the next launch."""

    def make() -> Lanes:
        return random_batch([[[3] * 6], [[2, 8, 1]]], kernel_device, heads=1, slots=4)

    lanes, twins = make(), make()
    for seed in range(4):
        counts = [[seed], [3 - seed]]
        step, twin_step = (random_step(batch, 2, torch.float32, counts, seed=seed) for batch in (lanes, twins))
        got = sparse_decode_triton(*step.arguments, **step.options)
        sparse_decode_ref(*twin_step.arguments, **twin_step.options)
        torch.testing.assert_close(got[:2].double(), step.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shares(lanes).double(), step.share, rtol=1e-5, atol=1e-6)
        for batch in (lanes, twins):
            for lane in batch.lanes:
                lane.num_resident += 1
                lane.position += 1
                lane.step += 1
            batch.count()


def test_the_op_chooses_by_device(device: torch.device) -> None:
    lanes = random_batch(RAGGED, device)
    step = random_step(lanes, 3, torch.float32, COUNTS)
    torch.testing.assert_close(
        sparse_decode(*step.arguments, **step.options)[:3].double(), step.output, rtol=1e-4, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "group", "dim"), [(8, 4, 128), (4, 7, 128), (8, 4, 64), (8, 1, 256)])
def test_kernel_at_the_size_of_models(heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    def make() -> tuple[Lanes, Step]:
        lanes = random_batch(
            [[random_lengths(100, 32)], [random_lengths(40, 32, seed=1), [32]]],
            torch.device("cuda"),
            residents=[150, 81],
            heads=heads,
            dim=dim,
            dtype=dtype,
            slots=80,
            slot_tokens=32,
            slab_tokens=1024,
        )
        return lanes, random_step(lanes, group, dtype, [[80 - n for n in range(heads)], [3 * n for n in range(heads)]])

    check_kernel(make)
