"""What a decoding session holds on the device: rows that move in and out, rings, slots that grow."""

import dataclasses

import pytest
import torch

from sentencekv import policies
from sentencekv.batch import LaneBatch
from sentencekv.lane import SessionLane
from sentencekv.memory import HostMemory
from sentencekv.store import Extent, Places
from tests.lanes import seat
from tests.sequences import CONFIG, DIM, HEADS, Tokens, closed_kv, new_session, run, sentence_ends, step
from triton_ops.gather_kv import gather_kv_ref
from triton_ops.resolve_hot_set import resolve_hot_set_ref


def new_lane(
    device: torch.device,
    recent: dict[int, torch.Tensor],
    local: dict[int, torch.Tensor] | None = None,
    window_of: dict[int, int] | None = None,
    *,
    num_tokens: int,
    places: Places | None = None,
    selects: bool = False,
) -> SessionLane:
    return SessionLane(
        CONFIG,
        places or Places([], device),
        recent,
        local or {},
        window_of or {},
        num_tokens=num_tokens,
        selects=selects,
        share_S=torch.zeros(0, dtype=torch.int64, device=device),
        traffic=torch.zeros(3, dtype=torch.int64, device=device),
    )


def random_kv(num_tokens: int, device: torch.device, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(heads, num_tokens, 2, DIM, generator=torch.Generator().manual_seed(num_tokens)).to(device)


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
def test_what_goes_in_comes_out(num_tokens: int, device: torch.device) -> None:
    recent = {layer: random_kv(num_tokens, device) + layer for layer in (0, 3)}
    lane = new_lane(device, recent, num_tokens=num_tokens)
    assert lane.num_resident == lane.position == num_tokens
    back, local = lane.contents()
    assert local == {}
    for layer, kv in recent.items():
        assert torch.equal(back[layer], kv)
        assert lane.resident_kv[layer].shape[1] >= num_tokens + 1, "room for the next token"
        assert back[layer].data_ptr() != lane.resident_kv[layer].data_ptr(), "copies"


@pytest.mark.parametrize("num_tokens", [0, 3, 19, 20, 21, 57])
def test_rings(num_tokens: int, device: torch.device) -> None:
    """The last `window - 1` tokens go in, each to its row; as many come out again, in order, steps later too."""
    window = 20
    kv = random_kv(num_tokens + 50, device)
    first = max(num_tokens - (window - 1), 0)
    lane = new_lane(device, {}, {1: kv[:, first:num_tokens]}, {1: window}, num_tokens=num_tokens)
    for position in range(num_tokens, num_tokens + 45):
        _, local = lane.contents()
        assert torch.equal(local[1], kv[:, max(position - (window - 1), 0) : position])
        lane.resident_kv[1][:, position % window] = kv[:, position]
        lane.advance()


def test_closing_takes_out_the_first_tokens_after_the_sink(device: torch.device) -> None:
    recent = {layer: random_kv(60, device) + layer for layer in (0, 3)}
    lane = new_lane(device, recent, num_tokens=60)
    version = lane.version
    taken = lane.take_out(22).clone()
    lane.shift(22)
    back, _ = lane.contents()
    for i, layer in enumerate((0, 3)):
        assert torch.equal(taken[i], recent[layer][:, 5:27])
        assert torch.equal(back[layer], torch.cat([recent[layer][:, :5], recent[layer][:, 27:]], dim=1))
    assert lane.num_resident == 38
    assert lane.position == 60
    assert lane.version == version, "no address changed"


def test_resident_rows_grow(device: torch.device) -> None:
    recent = {0: random_kv(10, device)}
    lane = new_lane(device, recent, num_tokens=10)
    versions = set()
    for _ in range(200):
        lane.resident_kv[0][:, lane.num_resident] = lane.num_resident
        lane.advance()
        versions.add(lane.version)
        assert lane.resident_kv[0].shape[1] > lane.num_resident
    assert 1 < len(versions) < 6
    back = lane.contents()[0][0]
    assert torch.equal(back[:, :10], recent[0])
    assert torch.equal(back[0, 10:, 0, 0].cpu(), torch.arange(10.0, 210.0))


def test_layers_of_different_shapes_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="different shapes"):
        new_lane(device, {0: random_kv(4, device), 1: random_kv(4, device, heads=1)}, num_tokens=4)


def test_a_hot_set_that_grows_keeps_what_it_has(device: torch.device) -> None:
    """Sentences that close later get slots of their own, and those fetched before are still hits."""
    memory = HostMemory(None, pinned=device.type == "cuda")
    kv = random_kv(800, device)
    extent = Extent(memory, device)

    def close_sentences(start: int, count: int) -> Places:
        extent.write(0, extent.place(8 * start, [8] * count), kv[:, 8 * start : 8 * (start + count)])
        extent.flush()
        extent.add_values([0], kv[None, :, 8 * start : 8 * (start + count), 1])
        extent.add_summaries(0, [torch.zeros(count, HEADS, 1, DIM, device=device)])
        return Places([extent], device)

    lane = new_lane(device, {0: random_kv(20, device)}, num_tokens=60, places=close_sentences(0, 5), selects=True)
    selected = torch.tensor([[[0, 1, 4], [0, 2, 3]]], dtype=torch.int32, device=device)
    slots, widths = [lane.num_slots], [lane.slot_of_sentence[0].shape[1]]
    for i, count in enumerate((0, 5, 25, 65)):
        if count:
            lane.set_places(close_sentences(lane.num_sentences, count))
            slots.append(lane.num_slots)
            widths.append(lane.slot_of_sentence[0].shape[1])
        batch = seat([lane], device, spare=0, most_selected=max(lane.max_selected, 3))
        resolved = resolve_hot_set_ref(selected, batch, 0)
        assert int(resolved.miss_BNK.sum()) == (6 if i == 0 else 0)
        gather_kv_ref(selected, resolved.slot_BNK, resolved.miss_BNK, batch, 0)
        for n in range(HEADS):
            for s, slot in zip(selected[0, n].tolist(), resolved.slot_BNK[0, n].tolist(), strict=True):
                assert torch.equal(lane.hot_kv[0][n, slot], kv[n, 8 * s : 8 * s + 8])
        lane.advance()
    assert slots[0] < slots[-1]
    assert widths[0] < widths[-1] >= 100
    assert lane.share_S.shape[0] >= 100


def test_bytes_are_all_counted(device: torch.device) -> None:
    """A short context pays for few slots; closing the lane gives them back."""
    tokens = Tokens.random(130, device)
    session = new_session(device, policies.load("moments"), dataclasses.replace(CONFIG, hot_tokens=4096))
    session.expect(sentence_ends(130))
    run(session, tokens, 100, exact=True)
    before = session.device_bytes
    step(LaneBatch(session.policy), [session], [tokens])
    lane = session.lane()
    slots = 2 * HEADS * lane.num_slots * CONFIG.max_sentence_tokens * 2 * DIM * 4
    assert lane.num_slots <= session.num_sentences
    assert lane.device_bytes > slots
    assert session.device_bytes >= before + slots
    run(session, tokens, 120, exact=True)
    assert session.device_bytes < before + 2 * (session.summary_bytes + 20 * HEADS * 2 * DIM * 4 * 2)
    assert torch.equal(closed_kv(session, 0), tokens.kv(0, 5, session.sentence_spans()[-1][1]))
