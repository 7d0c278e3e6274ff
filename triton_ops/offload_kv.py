"""Closed sentences of all layers from the GPU to host memory."""

import triton
import triton.language as tl
from torch import Tensor

from triton_ops.lanes import PLACE_LENGTH, PLACE_ROW, PLACE_SLAB, element_type


def offload_kv_ref(
    kv_DNTH: Tensor,
    slabs_of: list[list[Tensor]],
    slab_of_D: Tensor,
    place_P4: Tensor,
    longest: int,
    *,
    pitch: int | None = None,
    skip: int = 0,
) -> None:
    """Copy closed sentences of all layers to host memory.

    Args:
        kv_DNTH: `[D, N, T, 2, H]` on the device: KV of D layers, the sentences one after another from the first row on;
            or codes or scales (`pack_kv`), whose last dimension is another.
        slabs_of: for each of the D layers, its slabs in host memory, `[N, capacity, 2, H]`, or as `packed_slab` has it.
        slab_of_D: int64 `[D, number of slabs, 2]` on the device: addresses and capacities of the same slabs.
        place_P4: int32 `[P, 4]` on the device: tokens, slab, first row and an unused number of each sentence.
        longest: at least as many tokens as any of them has.
        pitch, skip: numbers of the given type that a slab has for each row, None: those of `kv_DNTH`; and how many of
            them stand before these, for all rows of a head.
    """
    rows_DNTW = kv_DNTH.flatten(3)
    num_heads, width = rows_DNTW.shape[1], rows_DNTW.shape[3]
    for depth, slabs in enumerate(slabs_of):
        heads_of = [slab.view(num_heads, -1).view(rows_DNTW.dtype) for slab in slabs]
        start = 0
        for length, slab, row, _ in place_P4.tolist():
            first = heads_of[slab].shape[1] // (pitch or width) * skip + row * width
            heads_of[slab][:, first : first + length * width] = rows_DNTW[depth, :, start : start + length].flatten(1)
            start += length


@triton.jit
def _offload_kv_kernel(
    kv_ptr,
    slab_ptr,
    place_ptr,
    stride_depth,
    stride_head,
    num_slabs,
    ROW: tl.constexpr,
    PITCH: tl.constexpr,
    SKIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    p, n, depth = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.zeros((), tl.int64)
    for before in range(p):
        start += tl.load(place_ptr + before * 4 + PLACE_LENGTH)
    length = tl.load(place_ptr + p * 4 + PLACE_LENGTH)
    slab_ptr += (depth * num_slabs + tl.load(place_ptr + p * 4 + PLACE_SLAB)) * 2
    capacity = tl.load(slab_ptr + 1)
    row = tl.load(place_ptr + p * 4 + PLACE_ROW).to(tl.int64)
    target_ptr = tl.load(slab_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
    target_ptr += capacity * (n * PITCH + SKIP) + row * ROW
    source_ptr = kv_ptr + depth.to(tl.int64) * stride_depth + n.to(tl.int64) * stride_head + start * ROW
    i = tl.arange(0, BLOCK)
    mask = i < length * ROW
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=mask), mask=mask)


def offload_kv_triton(
    kv_DNTH: Tensor,
    slabs_of: list[list[Tensor]],
    slab_of_D: Tensor,
    place_P4: Tensor,
    longest: int,
    *,
    pitch: int | None = None,
    skip: int = 0,
) -> None:
    """Copy closed sentences to host memory by one launch for all layers; the GPU writes over the bus."""
    depth, num_kv_heads, _, planes, numbers = kv_DNTH.shape
    row = planes * numbers
    assert kv_DNTH.stride()[2:] == (row, numbers, 1)
    _offload_kv_kernel[(place_P4.shape[0], num_kv_heads, depth)](
        kv_DNTH,
        slab_of_D,
        place_P4,
        kv_DNTH.stride(0),
        kv_DNTH.stride(1),
        slab_of_D.shape[1],
        ROW=row,
        PITCH=pitch or row,
        SKIP=skip,
        ALIGNED=row * kv_DNTH.element_size() % 16 == 0,
        BLOCK=triton.next_power_of_2(longest * row),
        DTYPE=element_type(kv_DNTH.dtype),
        num_warps=8,
    )


def offload_kv(
    kv_DNTH: Tensor,
    slabs_of: list[list[Tensor]],
    slab_of_D: Tensor,
    place_P4: Tensor,
    longest: int,
    *,
    pitch: int | None = None,
    skip: int = 0,
) -> None:
    """Copy closed sentences of all layers to host memory; see `offload_kv_ref`."""
    op = offload_kv_triton if kv_DNTH.is_cuda else offload_kv_ref
    op(kv_DNTH, slabs_of, slab_of_D, place_P4, longest, pitch=pitch, skip=skip)
