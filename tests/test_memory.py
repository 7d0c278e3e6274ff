"""Host memory: what is counted, refused before it is too late, and given up by whoever did not use it for longest."""

import gc
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sentencekv import memory as memory_module
from sentencekv.memory import HostMemory, Spares
from tests.sequences import CPU, PinnedForNobody


def test_it_is_bounded_and_counted() -> None:
    memory = HostMemory(1000, pinned=False)
    held = memory.allocate((10, 10), torch.float32)
    assert memory.in_use_bytes == held.nbytes == 400
    with pytest.raises(MemoryError, match=r"needs 800 B of host memory .*host_memory_bytes .*close documents"):
        memory.allocate((200,), torch.float32)
    del held
    gc.collect()
    assert memory.in_use_bytes == 0
    memory.allocate((200,), torch.float32)
    with pytest.raises(MemoryError, match=r"GiB is free; "):
        HostMemory(None, pinned=False).check(1 << 60)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    pinned, ordinary = HostMemory(None, pinned=True), HostMemory(None, pinned=False)
    assert [pinned.taken_bytes(count) for count in (0, 1, 5, 64, 65)] == [0, 1, 8, 64, 128]
    assert ordinary.taken_bytes(65) == 65


class Held:
    """A holder of memory that can lose it, or cannot."""

    def __init__(self, memory: HostMemory, name: str, used_at: float, *, can_move: bool = True, fails: bool = False):
        self.tensor = memory.allocate((100,), torch.uint8)
        self.name, self.last_used_at, self.can_move, self.fails = name, used_at, can_move, fails
        memory.register(self)

    @property
    def kv_host_bytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.nbytes

    def move_to_disk(self, folder: Path) -> None:
        if self.fails:
            raise OSError("the disk is broken")
        self.tensor = None


def moved(*holders: Held) -> str:
    return "".join(holder.name for holder in holders if holder.tensor is None)


def test_those_not_used_for_longest_move_first(tmp_path: Path) -> None:
    memory = HostMemory(420, pinned=False, spill_folder=str(tmp_path))
    holders = [Held(memory, name, at) for name, at in (("a", 3.0), ("b", 1.0), ("c", 4.0), ("d", 2.0))]
    memory.check(20)
    assert moved(*holders) == ""
    memory.check(100)
    assert moved(*holders) == "b"
    memory.check(220)
    assert moved(*holders) == "bd"
    memory.check(420)
    assert moved(*holders) == "abcd"


def test_who_cannot_move_stays_and_is_named(tmp_path: Path) -> None:
    """One is in use, one's disk is broken; the third moves, and that is not enough."""
    memory = HostMemory(320, pinned=False, spill_folder=str(tmp_path))
    held = [Held(memory, "a", 1.0, can_move=False), Held(memory, "b", 2.0, fails=True), Held(memory, "c", 3.0)]
    memory.check(120)
    assert moved(*held) == "c"
    with pytest.raises(MemoryError, match=r"120 B is free .* holds 200 B \(. 100 B, . 100 B\): close") as caught:
        memory.check(121)
    assert str(caught.value.__cause__) == "the disk is broken"


def test_without_a_folder_nobody_moves() -> None:
    memory = HostMemory(150, pinned=False)
    held = Held(memory, "a", 1.0)
    with pytest.raises(MemoryError, match="a 100 B"):
        memory.check(60)
    assert held.tensor is not None
    del held
    gc.collect()
    memory.check(150)


def test_spares_come_from_the_background() -> None:
    memory = PinnedForNobody(None)
    spares = Spares(memory, CPU)
    for user in (0, 1):
        spares.order(user, (5, 4), torch.float32)
    memory.wait()
    assert memory.threads == ["sentencekv-memory"] * 2
    taken = [spares.take(user, (5, 4), torch.float32) for user in (0, 1, 0, 2)]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in taken] == [((5, 4), torch.float32)] * 4
    # What a user has not ordered is allocated at once.
    assert memory.threads[2:] == ["MainThread"] * 2


def test_spares_that_nobody_takes_are_given_up() -> None:
    memory = PinnedForNobody(None)
    for give_up in (Spares.clear, lambda spares: None):
        spares = Spares(memory, CPU)
        spares.order(0, (100,), torch.uint8)
        spares.order(1, (100,), torch.uint8)
        give_up(spares)
        del spares
        memory.wait()
        gc.collect()
        assert memory.in_use_bytes == 0


def test_spares_are_not_in_the_way() -> None:
    """What is asked for gets the memory that spares hold; if that is not enough, the error is the usual one."""
    memory = PinnedForNobody(300)
    spares = Spares(memory, CPU)
    for user in (1, 2):
        spares.order(user, (128,), torch.uint8)
    memory.wait()
    assert memory.in_use_bytes == 256
    kept = spares.take(0, (200,), torch.uint8)
    assert memory.in_use_bytes == memory.taken_bytes(kept.nbytes) == 256
    with pytest.raises(MemoryError, match="close documents"):
        spares.take(0, (200,), torch.uint8)


def test_a_spare_of_the_wrong_size_is_given_up() -> None:
    memory = PinnedForNobody(None)
    spares = Spares(memory, CPU)
    spares.order(0, (128,), torch.uint8)
    memory.wait()
    kept = spares.take(0, (64,), torch.uint8)
    gc.collect()
    assert memory.in_use_bytes == kept.nbytes


def test_a_spare_that_fails_is_asked_for_again() -> None:
    """Whatever its error: the second one is the one that counts."""

    class Failing(PinnedForNobody):
        fails = True

        def _new(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            if self.fails:
                raise RuntimeError("set changed size during iteration")
            return super()._new(shape, dtype)

    memory = Failing(None)
    spares = Spares(memory, CPU)
    spares.order(0, (128,), torch.uint8)
    memory.wait()
    memory.fails = False
    assert spares.take(0, (128,), torch.uint8).nbytes == memory.in_use_bytes == 128


def test_what_is_not_begun_is_not_allocated_once_given_up() -> None:
    memory = PinnedForNobody(None)
    begin = threading.Event()
    assert memory._background is None
    memory.allocate_in_background((1,), torch.uint8, CPU).result()
    memory._background.submit(begin.wait)
    spares = Spares(memory, CPU)
    spares.order(0, (128,), torch.uint8)
    spares.clear()
    begin.set()
    memory.wait()
    assert len(memory.threads) == 1


def test_ordinary_memory_is_not_got_ready() -> None:
    memory = HostMemory(None, pinned=False)
    Spares(memory, CPU).order(0, (100,), torch.uint8)
    assert memory.in_use_bytes == 0
    assert memory._background is None


def test_pinning_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own come first, and win where they say how to pin."""
    applied: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", applied.append, raising=False)
    in_code = ""
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: in_code, raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    ours = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    for given, want in (
        (None, [ours]),
        ("expandable_segments:True", [f"expandable_segments:True,{ours}"]),
        ("pinned_use_background_threads:True", []),
    ):
        applied.clear()
        if given is not None:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
        memory_module._pin_faster.__wrapped__()
        assert applied == want
    applied.clear()
    in_code = "garbage_collection_threshold:0.5"
    memory_module._pin_faster.__wrapped__()
    assert applied == [f"garbage_collection_threshold:0.5,{ours}"]
