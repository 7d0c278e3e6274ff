"""Host memory for KV: counted, bounded, and given up by those who did not use theirs for longest.

Knows bytes and who holds them; nothing of what is in them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sentencekv.units import format_bytes

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05
"""For which what the system said of its free memory holds, less what was taken since."""
_NAMED = 3
"""Holders of memory that an error message names."""


def power_of_two(at_least: int) -> int:
    """The smallest that is not less."""
    return 1 << max(at_least - 1, 0).bit_length()


def available_host_bytes() -> int:
    """Memory that this process can still get without swapping, in bytes: the machine's, or its control group's."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
            available = min(available, int(limit) - used)
    except OSError:
        pass  # not Linux, or no control groups
    return max(available, 0)


_REGISTER_THREADS = 8


@functools.cache
def _pin_faster() -> None:
    """Have torch pin memory by registering pages that several threads have touched, unless the user has said how.

    The driver's own way takes 0.5 s per GiB instead of 0.1, and nobody launches kernels meanwhile. Holds for all pinned
    memory of the process. Speed is all that is lost where torch does not know the settings.
    """
    apply = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    current = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    given = current() if current is not None else ""
    given = given or os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "pinned" in given or apply is None:
        return
    # Settings replace one another, so the user's own are among them.
    ours = f"pinned_use_cuda_host_register:True,pinned_num_register_threads:{_REGISTER_THREADS}"
    try:
        apply(f"{given},{ours}" if given else ours)
    except (RuntimeError, ValueError) as error:
        _LOG.info("host memory is pinned the slow way: %s", error)


class Holder(Protocol):
    """Something that holds host memory and can give it up for a file."""

    last_used_at: float
    """By `time.monotonic`."""

    @property
    def name(self) -> str:
        """What an error message calls it."""
        ...

    @property
    def kv_host_bytes(self) -> int:
        """Host memory that it holds."""
        ...

    @property
    def can_move(self) -> bool:
        """Whether it can give up what it holds: not while it is used, nor while it is coming back."""
        ...

    def move_to_disk(self, folder: Path) -> None:
        """Keep its KV in a file there; it comes back to host memory when it is needed."""
        ...


class HostMemory:
    """Host memory for KV, counted and bounded; shared by the sessions of one LongContextLM.

    When it is exhausted, those who hold it and were not used for longest move to files in `spill_folder`. Without one,
    or if that does not help, a MemoryError says what is needed, what is free, and who holds the rest.
    """

    def __init__(self, limit_bytes: int | None, *, pinned: bool, spill_folder: str | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.pinned = pinned
        self.spill_folder = spill_folder
        self.in_use_bytes = 0
        self._available_bytes = 0
        self._looked_at = -math.inf
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._caches: list[weakref.WeakMethod[Callable[[int], int]]] = []
        if pinned:
            _pin_faster()
        self._background: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()  # a tensor may be released while the same thread counts another

    def register(self, holder: Holder) -> None:
        """Name it in error messages, and move it to disk when memory is short; it is not kept alive by this."""
        self._holders.add(holder)

    def on_shortage(self, release: Callable[[int], int]) -> None:
        """Call this with a number of bytes before anything else is done about a shortage; it returns how many it gave
        up, and is called again while there are any. A method, whose object is not kept alive; called by the thread that
        asks for memory, but by none in the background."""
        self._caches = [cache for cache in self._caches if cache() is not None]
        self._caches.append(weakref.WeakMethod(release))

    @property
    def room_bytes(self) -> int:
        """Bytes that can still be allocated."""
        return max(self._free_bytes(0), 0)

    def check(self, needed_bytes: int) -> None:
        """Make room for so many bytes more, by moving others to disk if need be; raise MemoryError if there is none."""
        if needed_bytes <= self._free_bytes(needed_bytes):
            return
        self._empty_caches(needed_bytes)
        if needed_bytes <= self._free_bytes(needed_bytes):
            return
        failure: OSError | None = None
        if self.spill_folder is not None:
            idle = [holder for holder in self._holders if holder.kv_host_bytes and holder.can_move]
            for holder in sorted(idle, key=lambda holder: holder.last_used_at):
                try:
                    holder.move_to_disk(Path(self.spill_folder))
                except OSError as error:
                    _LOG.warning("host memory is short, and %s cannot move to disk: %s", holder.name, error)
                    failure = error
                if needed_bytes <= self._free_bytes(needed_bytes):
                    return
        self._require(needed_bytes, failure)

    def _empty_caches(self, needed_bytes: int) -> None:
        """Have caches give up what they can until there is room. What they give up may be somebody else's, too."""
        for cache in self._caches:
            release = cache()
            while release is not None and needed_bytes > self._free_bytes(needed_bytes):
                if not release(needed_bytes - self._free_bytes(needed_bytes)):
                    break

    def _require(self, needed_bytes: int, failure: OSError | None = None) -> None:
        left = max(self._free_bytes(needed_bytes), 0)
        if needed_bytes <= left:
            return
        bound = "" if self.limit_bytes is None else f" (host_memory_bytes is {format_bytes(self.limit_bytes)})"
        raise MemoryError(
            f"the context needs {format_bytes(needed_bytes)} of host memory and {format_bytes(left)} is free{bound}; "
            f"{self._held()}: close documents, raise the bound, or read a shorter text"
        ) from failure

    def taken_bytes(self, num_bytes: int) -> int:
        """What an allocation of so many bytes takes: torch rounds pinned memory up to a power of two."""
        return power_of_two(num_bytes) if self.pinned and num_bytes else num_bytes

    def _free_bytes(self, needed_bytes: int) -> int:
        # Asking the system takes as long as a small allocation, and a layer makes several.
        free = self._look(0 if needed_bytes > self._available_bytes else _LOOK_SECONDS)
        if self.pinned and needed_bytes > free:
            # torch keeps pinned memory that was freed, for reuse: ours to take, though the machine counts it as used.
            release = getattr(torch._C, "_host_emptyCache", None)
            if release is not None:
                release()
                free = self._look(0)
        return free if self.limit_bytes is None else min(free, self.limit_bytes - self.in_use_bytes)

    def _look(self, seconds: float) -> int:
        """Memory that the process can get, as of so many seconds ago at most."""
        if time.monotonic() - self._looked_at > seconds:
            self._available_bytes, self._looked_at = available_host_bytes(), time.monotonic()
        return self._available_bytes

    def _held(self) -> str:
        held = sorted(((h.kv_host_bytes, h) for h in self._holders if h.kv_host_bytes), key=lambda each: -each[0])
        text = f"KV of open documents and cached prompts holds {format_bytes(self.in_use_bytes)}"
        if held:
            text += f" ({', '.join(f'{holder.name} {format_bytes(count)}' for count, holder in held[:_NAMED])}"
            text += f" and {len(held) - _NAMED} more)" if len(held) > _NAMED else ")"
        return text

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory; counted until the returned tensor is gone. Caches give up theirs for it, but
        nobody moves to disk: that takes a `check` beforehand."""
        return self._allocate(shape, dtype, from_caches=True)

    def allocate_checked(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `allocate`, by any thread, of what a `check` made room for: nobody gives up anything."""
        return self._allocate(shape, dtype, from_caches=False)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, *, from_caches: bool) -> Tensor:
        num_bytes = dtype.itemsize
        for extent in shape:
            num_bytes *= extent
        num_bytes = self.taken_bytes(num_bytes)
        if from_caches:
            self._empty_caches(num_bytes)  # without the lock: what they give up may be read by other threads first
        with self._lock:
            self._require(num_bytes)
            self.in_use_bytes += num_bytes
            self._available_bytes -= num_bytes
        try:
            tensor = self._new(shape, dtype)
        except BaseException:
            self._release(num_bytes)
            raise
        weakref.finalize(tensor, self._release, num_bytes)
        return tensor

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)

    def allocate_in_background(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Future[Tensor]:
        """As `allocate`, by another thread, one after the other; pinned for that device."""
        with self._lock:
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="sentencekv-memory")

        def allocate() -> Tensor:
            # A thread starts out on the first device, which may not be ours.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return self._allocate(shape, dtype, from_caches=False)

        return self._background.submit(allocate)

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self.in_use_bytes -= num_bytes


class Spares:
    """Host memory that is got ready before it is asked for, by several users, each of whom takes what it ordered.

    What was ordered and not taken goes with `clear`, or with this object. Not thread-safe.
    """

    def __init__(self, memory: HostMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self._ordered: dict[int, tuple[tuple[int, ...], torch.dtype, Future[Tensor]]] = {}

    def order(self, user: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Have such a tensor got ready for a user, if getting it takes any time."""
        if self._memory.pinned:
            made = self._memory.allocate_in_background(shape, dtype, self._device)
            self._ordered[user] = (tuple(shape), dtype, made)

    def take(self, user: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the user ordered, as soon as it is ready; else a new tensor, as `HostMemory.allocate`."""
        *ordered, made = self._ordered.pop(user, (None, None, None))
        if made is not None and ordered == [tuple(shape), dtype]:
            # Whatever went wrong in the background: what follows goes wrong likewise, with the proper error.
            with contextlib.suppress(Exception):
                return made.result()
        elif made is not None:
            made.cancel()
        try:
            return self._memory.allocate(shape, dtype)
        except MemoryError:
            if not self._ordered:
                raise
        self.clear(wait=True)  # what is asked for comes before what will be
        return self._memory.allocate(shape, dtype)

    def clear(self, *, wait: bool = False) -> None:
        """Give up what nobody took. `wait`: until none of it is being allocated any more."""
        given_up = [made for _, _, made in self._ordered.values()]
        self._ordered.clear()
        begun = [made for made in given_up if not made.cancel()]
        if wait:
            concurrent.futures.wait(begun)
