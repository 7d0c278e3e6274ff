"""Tables of more than 2**31 numbers: addresses must not be computed in 32 bits. Needs about 14 GB on a GPU."""

import fcntl
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.lanes import assert_as_good, random_batch, random_heads, random_selection
from tests.test_positional_attention import truth
from tests.test_sparse_decode import random_step, shares
from triton_ops import Lanes, Part, Resolved, Scores, pack_box
from triton_ops.gather_kv import gather_kv_triton
from triton_ops.offload_kv import offload_kv_ref, offload_kv_triton
from triton_ops.positional_attention import positional_attention_ref, positional_attention_triton
from triton_ops.score_codes import score_codes_ref, score_codes_triton
from triton_ops.score_sentences import score_sentences_ref, score_sentences_triton
from triton_ops.select_sentences import select_sentences_ref, select_sentences_triton
from triton_ops.sparse_decode import sparse_decode_ref, sparse_decode_triton

pytestmark = pytest.mark.gpu

LARGE = 2**31
NEEDED_BYTES = 14 << 30
HALF = torch.float16


@pytest.fixture
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """One test at a time, whatever the number of workers: several would take the memory that all others need."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "large-offsets").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
            pytest.skip(f"less than {NEEDED_BYTES >> 30} GiB of GPU memory is free")
        yield torch.device("cuda")
        torch.cuda.empty_cache()


def reseat(lanes: Lanes) -> None:
    """Addresses and counts again, after tensors were replaced."""
    lanes.seat(lanes.lanes)


def test_slots(gpu: torch.device) -> None:
    """The last slot of the last head, filled from host memory and read."""
    heads, dim, slot_tokens = 4, 128, 32
    num_slots = LARGE // (heads * slot_tokens * 2 * dim) + 100
    lanes = random_batch([[[32, 1, 7, 20]]], gpu, heads=heads, dim=dim, dtype=HALF, slots=8, slot_tokens=32, spare=0)
    lane = lanes.lanes[0]
    lane.hot_kv[0] = torch.full((heads, num_slots, slot_tokens, 2, dim), torch.nan, dtype=HALF, device=gpu)
    assert lane.hot_kv[0].numel() > LARGE
    lane.num_slots = num_slots
    lanes.most_slots = num_slots
    reseat(lanes)
    step = random_step(lanes, 4, HALF, None)
    selected = random_selection(lanes, [[4] * heads])
    slot = torch.where(selected >= 0, num_slots - 1 - selected, -1)
    length = torch.where(selected >= 0, lane.place_S4[:, 0][selected.clamp(min=0).long()], 0).int()
    miss = (selected >= 0).to(torch.int8)
    resolved = Resolved(slot, length, miss, (selected >= 0).sum(-1, dtype=torch.int32))
    gather_kv_triton(selected, slot, miss, lanes, 0)
    for s, (tokens, slab, row, _) in enumerate(lane.place_S4.tolist()):
        want = lane.slabs[0][slab][:, row : row + tokens]
        assert torch.equal(lane.hot_kv[0][:, num_slots - 1 - s, :tokens].cpu(), want)
    arguments = (*step.arguments[:5], selected, resolved)
    want = sparse_decode_ref(*arguments, **step.options)
    share = shares(lanes).clone()
    got = sparse_decode_triton(*arguments, **step.options)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(shares(lanes), 2 * share, rtol=1e-2, atol=1e-3)


def test_resident_tokens(gpu: torch.device) -> None:
    """Rows of the last head begin far behind the first's."""
    heads, dim = 8, 128
    rows = LARGE // ((heads - 1) * 2 * dim) + 100
    lanes = random_batch([[[4]]], gpu, residents=[90], heads=heads, dim=dim, dtype=HALF, spare=0)
    lane = lanes.lanes[0]
    few = lane.resident_kv[0]
    lane.resident_kv[0] = torch.empty((heads, rows, 2, dim), dtype=HALF, device=gpu)
    lane.resident_kv[0][:, : few.shape[1]] = few
    reseat(lanes)
    step = random_step(lanes, 4, HALF, None)
    got = sparse_decode_triton(*step.arguments, **step.options)
    want = sparse_decode_ref(*step.arguments, **step.options)
    assert_as_good(got, want, step.output)


def test_summaries(gpu: torch.device) -> None:
    heads, dim = 4, 128
    count = LARGE // (heads * 2 * dim) + 100
    lanes = random_batch([[[4] * 3]], gpu, heads=heads, dim=dim, dtype=HALF, spare=0)
    q = random_heads(lanes, heads, dim, HALF)
    table = torch.zeros((count, heads, 2, dim), dtype=HALF, device=gpu)
    table[-50:] = torch.randn(50, heads, 2, dim, device=gpu)
    seat_sentences(lanes, (table,), count, 4)
    options = {"scale": 0.1, "spread": "square", "log_length": True}
    got = score_sentences_triton(q, lanes, 0, **options).logit_BNGS[..., count - 50 : count]
    seat_sentences(lanes, (table,), 50, 4)
    want = score_sentences_ref(q, lanes, 0, **options).logit_BNGS[..., :50]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_codes(gpu: torch.device) -> None:
    heads, dim, length = 4, 128, 32
    width = dim // 8
    count = LARGE // (heads * width * length) + 100
    lanes = random_batch([[[4] * 3]], gpu, heads=heads, dim=dim, dtype=HALF, slot_tokens=length, spare=0)
    q = random_heads(lanes, heads, dim, HALF)
    box = torch.zeros((count, heads, dim + 4), dtype=torch.uint8, device=gpu)
    box[-50:] = pack_box(*torch.randn(2, 50, heads, dim, device=gpu).sort(dim=0).values)
    code = torch.zeros((count * length, heads, width), dtype=torch.int16, device=gpu)
    assert code.numel() > LARGE
    code[-50 * length :] = torch.randint(-(2**15), 2**15, (50 * length, heads, width), device=gpu, dtype=torch.int16)
    seat_sentences(lanes, (box, code), count, length)
    got = score_codes_triton(q, lanes, 0, scale=0.1, bits=2).logit_BNGS[..., count - 50 : count]
    seat_sentences(lanes, (box, code), 50, length)
    want = score_codes_ref(q, lanes, 0, scale=0.1, bits=2).logit_BNGS[..., :50]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def seat_sentences(lanes: Lanes, tables: tuple[Tensor, ...], count: int, length: int) -> None:
    """Seats the lane with sentences of equal length, whose summaries are the tables' last rows."""
    place = torch.zeros((count, 4), dtype=torch.int32, device=lanes.device)
    place[:, 0] = length
    place[:, 3] = torch.arange(count, device=lanes.device) * length
    rows = (count, count * length)
    (lane,) = lanes.lanes
    lane.parts = [Part(0, count, {0: tuple(table[-n:] for table, n in zip(tables, rows, strict=False))})]
    lane.place_S4, lane.num_sentences = place, count
    lanes.capacity = count + 1
    lanes.seat([lane])


def test_logits(gpu: torch.device) -> None:
    """A row of logits for each lane and query head, wide enough for the last rows to begin far behind."""
    num_lanes, heads, group = 4, 8, 8
    lanes = random_batch([[[5, 3, 8] * 9]] * num_lanes, gpu, heads=heads, slots=6, spare=0)
    lanes.capacity = LARGE // (num_lanes * heads * group - 1) + 100
    logit = torch.zeros((num_lanes, heads, group, lanes.capacity), device=gpu)
    assert logit.stride(0) * num_lanes > LARGE
    logit[..., :27] = 4 * torch.randn(num_lanes, heads, group, 27, device=gpu)
    top = logit[..., :27].amax(-1, keepdim=True)
    extent = torch.stack([top, (logit[..., :27] - top).exp().sum(-1, keepdim=True)], dim=-1)
    scores = Scores(logit, extent)
    got = select_sentences_triton(scores, lanes, group="max", room_tokens=30)
    assert torch.equal(got, select_sentences_ref(scores, lanes, group="max", room_tokens=30))


def test_offload(gpu: torch.device) -> None:
    """The source is a view of buffers whose later layers and heads begin far behind."""
    depth, heads, dim = 2, 5, 128
    rows = LARGE // ((heads - 1) * 2 * dim) + 100
    resident = torch.empty((depth, heads, rows, 2, dim), dtype=HALF, device=gpu)
    resident[:, :, :40] = torch.randn(depth, heads, 40, 2, dim, device=gpu)
    slabs_of = [[torch.zeros(heads, 64, 2, dim, dtype=HALF, pin_memory=True)] for _ in range(depth)]
    wants_of = [[torch.zeros_like(slab) for slab in slabs] for slabs in slabs_of]
    addresses = torch.tensor([[[slab.data_ptr(), 64] for slab in slabs] for slabs in slabs_of], device=gpu)
    place = torch.tensor([[20, 0, 7, 0], [1, 0, 27, 20]], dtype=torch.int32, device=gpu)
    kv = resident[:, :, 10:31]
    offload_kv_triton(kv, slabs_of, addresses, place, 20)
    offload_kv_ref(kv, wants_of, addresses, place, 20)
    torch.cuda.synchronize()
    for slabs, wants in zip(slabs_of, wants_of, strict=True):
        assert torch.equal(slabs[0], wants[0])


@pytest.mark.parametrize("far", ["heads", "tokens"])
def test_attention_by_position(far: str, gpu: torch.device) -> None:
    """Keys of the last head, or of the last tokens, begin far behind the first."""
    heads, group, tokens, dim = 3, 4, 200, 64
    kept = (heads, tokens, 2, dim) if far == "heads" else (tokens, heads, 2, dim)
    room = torch.empty((kept[0], LARGE // (kept[0] - 1) + 100), dtype=HALF, device=gpu)
    kv = room[:, : kept[1] * 2 * dim].unflatten(1, kept[1:])
    kv.copy_(torch.randn(kept, device=gpu))
    kv_NTH = kv if far == "heads" else kv.transpose(0, 1)
    q = torch.randn(heads * group, 6, dim, dtype=HALF, device=gpu)
    position = torch.tensor([0, 50, 99, 100, 198, 199], dtype=torch.int32, device=gpu)
    got, log = positional_attention_triton(q, kv_NTH, position, scale=dim**-0.5)
    output, output_log = truth(q, kv_NTH.contiguous(), position, scale=dim**-0.5, softcap=None)
    want, want_log = positional_attention_ref(q, kv_NTH.contiguous(), position, scale=dim**-0.5)
    assert_as_good(got, want, output)
    assert_as_good(log, want_log, output_log)
