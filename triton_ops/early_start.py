"""Kernels that start before the one in front of them ends: programmatic dependent launch, on Hopper and later.

A decoding step is a chain of short kernels, and starting one costs about as much as running it. Every kernel of the
chain calls `wait_for_inputs`; what it does before that reads only what no kernel of a step writes.

What a later kernel will read can be brought into the L2 cache before it starts (`prefetch`), while the memory is idle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

_HOPPER = (9, 0)


def starts_early(tensor: Tensor) -> bool:
    """Whether kernels on this tensor's device may be launched before the one in front of them ends."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= _HOPPER


def launch_options(early: bool) -> dict[str, bool]:
    """Keywords of a launch that `starts_early`; other devices do not know them."""
    return {"launch_pdl": True} if early else {}


CHUNK = tl.constexpr(4096)
"""Bytes that one instruction prefetches."""
_CHUNKS_PER_PROGRAM = tl.constexpr(128)
_MOST_PREFETCHED = 3
"""Tensors."""


class Prefetched(NamedTuple):
    """What a launch prefetches, as arguments of its kernel: addresses and bytes of three runs; and its programs."""

    runs: tuple[Tensor | int, ...]
    num_programs: int


def prefetched(tensors: Sequence[Tensor], early: bool) -> Prefetched:
    """For `prefetch`: contiguous tensors, at most three, their starts aligned to 16 bytes."""
    assert len(tensors) <= _MOST_PREFETCHED
    if not early:
        tensors = ()
    runs: list[Tensor | int] = []
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        runs += [tensor.data_ptr(), tensor.nbytes // 16 * 16]
    runs += [0, 0] * (_MOST_PREFETCHED - len(tensors))
    chunks = sum(triton.cdiv(tensor.nbytes, CHUNK.value) for tensor in tensors)
    return Prefetched(tuple(runs), triton.cdiv(chunks, _CHUNKS_PER_PROGRAM.value))


@triton.jit
def prefetch_runs(address, size):
    """Runs of memory on their way into the L2 cache: int64 addresses and int32 sizes, multiples of 16 bytes, 0: none."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch(program, a, bytes_a, b, bytes_b, c, bytes_c):
    """One program's part of three runs of memory, on its way into the L2 cache; does not wait for it."""
    chunk = program.to(tl.int64) * _CHUNKS_PER_PROGRAM + tl.arange(0, _CHUNKS_PER_PROGRAM)
    chunks_a, chunks_b = tl.cdiv(bytes_a, CHUNK), tl.cdiv(bytes_b, CHUNK)
    in_a = chunk < chunks_a
    in_b = (in_a == 0) & (chunk < chunks_a + chunks_b)
    offset = CHUNK * tl.where(in_a, chunk, tl.where(in_b, chunk - chunks_a, chunk - chunks_a - chunks_b))
    address = tl.where(in_a, a, tl.where(in_b, b, c)).to(tl.int64) + offset
    left = tl.where(in_a, bytes_a, tl.where(in_b, bytes_b, bytes_c)) - offset
    prefetch_runs(address, tl.minimum(tl.maximum(left, 0), CHUNK).to(tl.int32))


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernels in front have ended and what they wrote is visible; then let the next one begin."""
    if EARLY:
        tl_cuda.gdc_wait()
        # After the wait, not before it: so the next kernel reads its weights after everything two kernels back.
        tl_cuda.gdc_launch_dependents()
