"""Closed sentences of all layers to host memory, byte for byte, and no other row changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.lanes import DTYPES, random_lengths
from triton_ops.offload_kv import offload_kv, offload_kv_ref, offload_kv_triton


@pytest.fixture(params=[offload_kv_ref, offload_kv_triton, offload_kv], ids=lambda op: op.__name__)
def op(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """All three, and the kernel only where it runs."""
    if request.param is offload_kv_triton:
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "lengths"), [(16, [5]), (80, random_lengths(5, 8)), (128, [32, 17, 1]), (256, [3, 8])])
def test_rows_arrive(
    op: Callable[..., None], dim: int, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Two slabs of different size, the last rows of both; the source is a view of longer buffers."""
    depth, heads = 3, 2
    generator = torch.Generator().manual_seed(0)
    resident = torch.randn(depth, heads, 90, 2, dim, generator=generator).to(dtype).to(device)
    kv_DNTH = resident[:, :, 7 : 7 + sum(lengths)]
    capacities = [40, 70]
    ends = list(capacities)
    place = []
    for i, length in enumerate(lengths):
        ends[i % 2] -= length
        place.append([length, i % 2, ends[i % 2], 2**31 - 1])
    slabs_of = [[host_slab(heads, capacity, dim, dtype, device) for capacity in capacities] for _ in range(depth)]
    addresses = [[[slab.data_ptr(), slab.shape[1]] for slab in slabs] for slabs in slabs_of]
    expected = [[slab.clone() for slab in slabs] for slabs in slabs_of]
    start = 0
    for length, slab, row, _ in place:
        for d in range(depth):
            expected[d][slab][:, row : row + length] = kv_DNTH[d, :, start : start + length].cpu()
        start += length
    op(
        kv_DNTH,
        slabs_of,
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.tensor(place, dtype=torch.int32, device=device),
        max(lengths),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    for slabs, wants in zip(slabs_of, expected, strict=True):
        for slab, want in zip(slabs, wants, strict=True):
            torch.testing.assert_close(slab, want, rtol=0, atol=0, equal_nan=True)


def host_slab(heads: int, capacity: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory in which nothing was written yet."""
    pinned = device.type == "cuda"
    return torch.full((heads, capacity, 2, dim), torch.nan, dtype=dtype, pin_memory=pinned)
