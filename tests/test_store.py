"""Host memory: what is counted, refused before it is too late, and given back."""

import gc

import pytest
import torch

from sentencekv import slabs, store
from sentencekv.memory import HostMemory
from sentencekv.slabs import Layout, host_slabs
from sentencekv.store import Extent, GrowingTable, Places
from tests.sequences import CPU, PinnedForNobody


def fill(extent: Extent, lengths: list[int], start: int, kv: torch.Tensor, expected: int = 0) -> None:
    runs = extent.place(start, lengths, expected)
    extent.write(0, runs, kv)
    extent.flush()


@pytest.mark.parametrize("large", [64, 4096])
def test_rows_come_back_in_order(large: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences over several slabs and two extents; slabs end with rows that no sentence fits."""
    monkeypatch.setattr(slabs, "LARGE_SLAB_TOKENS", large)
    monkeypatch.setattr(slabs, "SMALL_SLAB_TOKENS", 32)
    memory = HostMemory(None, pinned=device.type == "cuda")
    kv = torch.randn(2, 400, 2, 8, device=device)
    lengths = [7, 30, 1, 25, 32, 9, 16, 31, 20, 29] * 2
    first, second = Extent(memory, device), Extent(memory, device)
    fill(first, lengths[:12], 5, kv[:, :237], expected=237)
    fill(second, lengths[12:], 242, kv[:, 237:], expected=163)
    places = Places([first, second], device)
    assert places.num_tokens == 400
    assert places.length_of.tolist() == lengths
    assert places.start_of.tolist() == [5 + sum(lengths[:i]) for i in range(20)]
    back = torch.full_like(kv, torch.nan)
    places.read(0, back)
    assert torch.equal(back, kv)
    for sentence in range(20):
        length, slab, row, row_in_extent = places.place_S4[sentence].tolist()
        begin = int(places.start_of[sentence]) - 5
        assert length == lengths[sentence]
        assert row_in_extent == begin - (0 if sentence < 12 else 237)
        rows = places.slabs[slab].rows(0)[:, row : row + length]
        assert torch.equal(rows, kv[:, begin : begin + length].cpu())
    addresses = places.slab_addresses([0])
    assert addresses.device == places.place_S4.device == kv.device
    assert addresses.tolist() == [[[s.rows(0).data_ptr(), s.capacity_tokens] for s in places.slabs]]
    assert first.slabs[0].rows(0).is_pinned() == (device.type == "cuda")
    taken = sum(slab.capacity_tokens for slab in first.slabs + second.slabs)
    assert taken <= sum(host_slabs(237, 0, 32) + host_slabs(163, 0, 32))


def test_the_next_slab_is_got_ready_while_one_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, 320 tokens in slabs of 64: the first slabs are waited for, the others come from the background, and
    none is got ready that is not needed."""
    monkeypatch.setattr(slabs, "LARGE_SLAB_TOKENS", 64)
    monkeypatch.setattr(slabs, "SMALL_SLAB_TOKENS", 32)
    memory = PinnedForNobody(None)
    extent = Extent(memory, CPU)
    kv = torch.randn(2, 2, 320, 2, 8)
    for start in range(0, 320, 32):
        runs = extent.place(start, [16, 16], 320 - start)
        for layer in range(2):
            extent.write(layer, runs, kv[layer, :, start : start + 32])
        memory.wait()
    assert len(extent.slabs) == 5
    assert sorted(memory.threads) == ["MainThread"] * 2 + ["sentencekv-memory"] * 8
    assert memory.in_use_bytes == extent.host_bytes
    back = torch.empty(2, 320, 2, 8)
    for layer in range(2):
        Places([extent], CPU).read(layer, back)
        assert torch.equal(back, kv[layer])


def test_reading_that_ends_early_gives_spare_slabs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "LARGE_SLAB_TOKENS", 64)
    memory = PinnedForNobody(None)
    extent = Extent(memory, CPU)
    extent.write(0, extent.place(0, [20], 3000), torch.randn(2, 20, 2, 8))
    memory.wait()
    assert memory.in_use_bytes > extent.host_bytes
    extent.expect_nothing()
    extent.write(0, extent.place(20, [20], 2980), torch.randn(2, 20, 2, 8))
    gc.collect()
    assert memory.in_use_bytes == extent.host_bytes


@pytest.mark.gpu
def test_the_host_is_not_far_ahead_of_its_writes() -> None:
    """What is on its way holds device memory."""
    extent = Extent(HostMemory(None, pinned=True), torch.device("cuda"))
    runs = extent.place(0, [32] * 64)
    held = []
    for layer in range(12):
        extent.write(layer, runs, torch.randn(8, 2048, 2, 128, device="cuda"))
        held.append(torch.cuda.memory_allocated())
        assert len(extent._writes) <= store._WRITES_AHEAD
    extent.flush()
    assert max(held) - held[0] <= (store._WRITES_AHEAD + 2) * 8 * 2048 * 2 * 128 * 4


def test_places_without_sentences(device: torch.device) -> None:
    places = Places([], device)
    assert places.num_sentences == places.num_tokens == 0
    assert places.place_S4.shape == (0, 4)
    assert places.place_S4.dtype == torch.int32
    assert places.slab_addresses([0, 3]).shape == (2, 0, 2)


def test_places_are_as_of_one_moment(device: torch.device) -> None:
    """What is placed later does not show, and what was placed stays where it was."""
    memory = HostMemory(None, pinned=device.type == "cuda")
    kv = torch.randn(2, 40, 2, 8, device=device)
    extent = Extent(memory, device)
    fill(extent, [8, 2], 0, kv[:, :10])
    places = Places([extent], device)
    fill(extent, [5, 25], 10, kv[:, 10:])
    later = Places([extent], device)
    assert places.num_tokens == 10
    assert torch.equal(places.place_S4, later.place_S4[:2])
    back = torch.full_like(kv[:, :10], torch.nan)
    places.read(0, back)
    assert torch.equal(back, kv[:, :10])


@pytest.mark.parametrize("row_bytes", [1, 512, 260, 160, 384])
def test_host_slabs_are_enough_for_any_sentences(row_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(None, pinned=False)
    generator = torch.Generator().manual_seed(0)
    for total in (1, 200, 256, 257, 4000, 4096, 4097, 9000, 33_700, 40_000, 131_072):
        for _ in range(3):
            lengths: list[int] = []
            while sum(lengths) < total:
                length = int(torch.randint(1, 33, (), generator=generator))
                lengths.append(min(length, total - sum(lengths)))
            extent = Extent(memory, torch.device("cpu"), row_bytes=row_bytes)
            extent.place(0, lengths, total)
            assert sum(slab.capacity_tokens for slab in extent.slabs) <= sum(host_slabs(total, 0, 32, row_bytes))
            bit_by_bit = Extent(memory, torch.device("cpu"), row_bytes=row_bytes)
            for length in lengths[:300]:
                bit_by_bit.place(0, [length])
            taken = sum(slab.capacity_tokens for slab in bit_by_bit.slabs)
            assert taken <= sum(host_slabs(0, sum(lengths[:300]), 32, row_bytes))


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize(
    ("head_dim", "kv_format"), [(128, None), (96, None), (64, "fp8"), (128, "int8"), (128, "int4")]
)
def test_slabs_fill_what_pinned_memory_takes(heads: int, head_dim: int, kv_format: str | None) -> None:
    """torch rounds pinned memory up to a power of two: whole slabs leave next to nothing of it empty."""
    layout = Layout(heads, head_dim, torch.bfloat16, kv_format)
    pinned = HostMemory(None, pinned=True)
    for capacity in host_slabs(40_000, 1000, 32, layout.row_bytes):
        assert capacity % 16 == 0
        num_bytes = layout.num_bytes(capacity)
        assert num_bytes <= pinned.taken_bytes(num_bytes) <= 1.07 * num_bytes


def test_small_slabs_are_packed_when_extents_are_joined(device: torch.device) -> None:
    """Many short texts, appended one by one: their rows come to few slabs, and the old ones are let go."""
    memory = HostMemory(None, pinned=device.type == "cuda")
    kv = torch.randn(2, 300, 2, 8, device=device)
    extents, at = [], 0
    for lengths in ([9, 3], [30], [1, 1, 1], [25, 32], [17]):
        extent = Extent(memory, device)
        fill(extent, lengths, at, kv[:, at : at + sum(lengths)])
        extents.append(extent)
        at += sum(lengths)
    before = memory.in_use_bytes
    whole = Extent.joined(extents)
    del extents, extent
    assert len(whole.slabs) == 1
    assert memory.in_use_bytes <= before / 5
    assert whole.num_tokens == at
    back = torch.full_like(kv[:, :at], torch.nan)
    Places([whole], device).read(0, back)
    assert torch.equal(back, kv[:, :at])


def test_growing_table_keeps_rows_and_does_not_double() -> None:
    table = GrowingTable()
    rows = torch.randn(5000, 3)
    table.append(rows[:4000])
    for start in range(4000, 5000, 7):
        table.append(rows[start : min(start + 7, 5000)])
    assert torch.equal(table.rows, rows)
    assert table.nbytes < 1.1 * rows.nbytes
