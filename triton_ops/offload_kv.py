"""Closed sentences of all layers from the GPU to host memory."""

import triton
import triton.language as tl
from torch import Tensor

from triton_ops.lanes import PLACE_LENGTH, PLACE_ROW, PLACE_SLAB, element_type


def offload_kv_ref(
    kv_DNTH: Tensor, slabs_of: list[list[Tensor]], slab_of_D: Tensor, place_P4: Tensor, longest: int
) -> None:
    """Copy closed sentences of all layers to host memory.

    Args:
        kv_DNTH: `[D, N, T, 2, H]` on the device: KV of D layers, the sentences one after another from the first row on.
        slabs_of: for each of the D layers, its slabs `[N, capacity, 2, H]` in host memory.
        slab_of_D: int64 `[D, number of slabs, 2]` on the device: addresses and capacities of the same slabs.
        place_P4: int32 `[P, 4]` on the device: tokens, slab, first row and an unused number of each sentence.
        longest: at least as many tokens as any of them has.
    """
    for depth, slabs in enumerate(slabs_of):
        start = 0
        for length, slab, row, _ in place_P4.tolist():
            slabs[slab][:, row : row + length] = kv_DNTH[depth, :, start : start + length]
            start += length


@triton.jit
def _offload_kv_kernel(
    kv_ptr,
    slab_ptr,
    place_ptr,
    stride_depth,
    stride_head,
    num_slabs,
    NUM_KV_HEADS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    p, n, depth = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.zeros((), tl.int64)
    for before in range(p):
        start += tl.load(place_ptr + before * 4 + PLACE_LENGTH)
    length = tl.load(place_ptr + p * 4 + PLACE_LENGTH)
    slab_ptr += (depth * num_slabs + tl.load(place_ptr + p * 4 + PLACE_SLAB)) * 2
    row = n * tl.load(slab_ptr + 1) + tl.load(place_ptr + p * 4 + PLACE_ROW)
    target_ptr = tl.multiple_of(tl.load(slab_ptr).to(tl.pointer_type(DTYPE)), 16) + row * ROW
    source_ptr = kv_ptr + depth.to(tl.int64) * stride_depth + n.to(tl.int64) * stride_head + start * ROW
    i = tl.arange(0, BLOCK)
    mask = i < length * ROW
    tl.store(target_ptr + i, tl.load(source_ptr + i, mask=mask), mask=mask)


def offload_kv_triton(
    kv_DNTH: Tensor, slabs_of: list[list[Tensor]], slab_of_D: Tensor, place_P4: Tensor, longest: int
) -> None:
    """Copy closed sentences to host memory by one launch for all layers; the GPU writes over the bus."""
    depth, num_kv_heads, _, _, head_dim = kv_DNTH.shape
    assert kv_DNTH.stride()[2:] == (2 * head_dim, head_dim, 1)
    _offload_kv_kernel[(place_P4.shape[0], num_kv_heads, depth)](
        kv_DNTH,
        slab_of_D,
        place_P4,
        kv_DNTH.stride(0),
        kv_DNTH.stride(1),
        slab_of_D.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        ROW=2 * head_dim,
        BLOCK=triton.next_power_of_2(longest * 2 * head_dim),
        DTYPE=element_type(kv_DNTH.dtype),
        num_warps=8,
    )


def offload_kv(
    kv_DNTH: Tensor, slabs_of: list[list[Tensor]], slab_of_D: Tensor, place_P4: Tensor, longest: int
) -> None:
    """Copy closed sentences of all layers to host memory; see `offload_kv_ref`."""
    op = offload_kv_triton if kv_DNTH.is_cuda else offload_kv_ref
    op(kv_DNTH, slabs_of, slab_of_D, place_P4, longest)
