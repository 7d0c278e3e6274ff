"""Closed tokens come block by block, in order, and no buffer is written to while it is read."""

import contextlib

import pytest
import torch
from torch import Tensor

from sentencekv import slabs, streaming
from sentencekv.memory import HostMemory
from sentencekv.slabs import Slab
from sentencekv.store import Extent, Places
from sentencekv.streaming import Stream

LENGTHS = [7, 30, 1, 25, 32, 9, 16, 31, 20, 29] * 3
LAYERS = [0, 2, 3]


def filled(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> tuple[Places, dict[int, Tensor]]:
    """Two extents of several slabs, three layers, and what is in them."""
    monkeypatch.setattr(slabs, "LARGE_SLAB_TOKENS", 128)
    monkeypatch.setattr(slabs, "SMALL_SLAB_TOKENS", 32)
    memory = HostMemory(None, pinned=device.type == "cuda")
    extents = []
    kv = {layer: torch.randn(2, sum(LENGTHS), 2, 8, device=device) for layer in LAYERS}
    at = 0
    for lengths in (LENGTHS[:18], LENGTHS[18:]):
        extent = Extent(memory, device)
        runs = extent.place(at, lengths, sum(lengths))
        for layer in LAYERS:
            extent.write(layer, runs, kv[layer][:, at : at + sum(lengths)])
        extents.append(extent)
        at += sum(lengths)
    return Places(extents, device), kv


@pytest.mark.parametrize("block_tokens", [1, 100, 200, 10_000])
def test_blocks_are_all_tokens_in_order(
    block_tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_TOKENS", block_tokens)
    places, kv = filled(device, monkeypatch)
    stream = Stream(places, LAYERS, device)
    for layer in LAYERS:
        blocks = [block.clone() for block in stream.blocks(layer)]
        assert len(blocks) > 1 or block_tokens == 10_000
        assert torch.equal(torch.cat(blocks, dim=1), kv[layer])


def test_nothing_closed(device: torch.device) -> None:
    assert list(Stream(Places([], device), LAYERS, device).blocks(0)) == []


def test_groups() -> None:
    first, second, third = slabs = [Slab(64), Slab(64), Slab(64)]
    groups = streaming._grouped([(first, 50), (second, 20), (third, 64)], 60)
    assert groups == [[(first, 0, 50), (second, 0, 10)], [(second, 10, 20), (third, 0, 50)], [(third, 50, 64)]]
    assert streaming._grouped([(slab, 5) for slab in slabs], 15) == [[(slab, 0, 5) for slab in slabs]]
    assert [group[0][1:] for group in streaming._grouped([(first, 5)], 2)] == [(0, 2), (2, 4), (4, 5)]
    assert streaming._grouped([], 70) == []


class FakeEvent:
    """An event that knows what was enqueued before it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def record(self, stream: "FakeStream") -> None:
        self.seen = set(stream.done)


class FakeStream:
    """Work of a stream, and all that it waits for; everything happens at once."""

    current: "FakeStream"

    def __init__(self, _device: object = None) -> None:
        self.done: set[str] = set()

    def wait_event(self, event: FakeEvent) -> None:
        self.done |= event.seen

    def wait_stream(self, stream: "FakeStream") -> None:
        self.done |= stream.done


@pytest.mark.parametrize("block_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("order", [LAYERS, [2, 3, 0], [0, 3, 2]])
def test_buffers_wait_for_one_another(block_tokens: int, order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of a GPU on a machine without one: what is copied, and what every use and copy waits for."""
    cpu = torch.device("cpu")
    places, kv = filled(cpu, monkeypatch)
    compute = FakeStream()
    current = [compute]

    @contextlib.contextmanager
    def within(stream: FakeStream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current[-1])
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None, raising=False)
    monkeypatch.setattr(streaming, "BLOCK_TOKENS", block_tokens)
    copies: list[str] = []
    real = Tensor.copy_

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert current[-1] is not compute
        copies.append(f"copy {len(copies)}")
        # The buffer's last use must have been waited for: every use that ended before it was given up.
        assert pending_use(target) <= current[-1].done
        current[-1].done.add(copies[-1])
        latest_copy[target.data_ptr()] = copies[-1]
        return real(target, source)

    uses: dict[int, set[str]] = {}
    latest_copy: dict[int, str] = {}

    def pending_use(target: Tensor) -> set[str]:
        return uses.get(target.untyped_storage().data_ptr(), set())

    buffers = streaming._Buffers(places, LAYERS, cpu)
    monkeypatch.setattr(Tensor, "copy_", copy_)
    number = 0
    for layer in order:
        got = []
        for block in buffers.blocks(layer):
            number += 1
            use = f"use {number}"
            assert latest_copy[block.data_ptr()] in compute.done, "used before it was there"
            compute.done.add(use)
            uses.setdefault(block.untyped_storage().data_ptr(), set()).add(use)
            got.append(block + 0)
        assert torch.equal(torch.cat(got, dim=1), kv[layer])
    monkeypatch.undo()
    assert max(part.shape[1] for buffer in buffers._tensors for part in buffer) <= block_tokens
    if order == LAYERS:
        assert len(copies) == 2 * len(LAYERS) * sum(map(len, buffers._groups)), "something was copied twice"
