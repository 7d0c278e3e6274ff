"""Missing sentences from host memory into their hot-set slots."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gather_kv_ref(
    slabs: Mapping[int, Tensor],
    slab_P: Tensor,
    head_P: Tensor,
    row_P: Tensor,
    length_P: Tensor,
    slot_P: Tensor,
    hot_kv: Tensor,
) -> int:
    """Copy P sentences of one layer from host memory into slots; returns the number of tokens copied.

    Args:
        slabs: `[N, capacity, 2, H]` each, in host memory (pinned where there is a GPU); a token's K and V are adjacent.
        slab_P, head_P, row_P, length_P, slot_P: int64 `[P]` on the host: key in `slabs`, KV head, first row, rows and
            destination slot of each sentence.
        hot_kv: `[N, C, M, 2, H]` on the device; mutated: rows `[0, length)` of each slot; what stands behind them is
            overwritten too, up to the longest of the P sentences, and means nothing.

    One staging buffer and one transfer, whatever the number of sentences and slabs: each transfer costs far more than
    its bytes. On a GPU the transfer is asynchronous; the host does not wait.
    """
    if head_P.numel() == 0:
        return 0
    longest = int(length_P.max())
    assert longest <= hot_kv.shape[2]
    # Rows past a sentence's end repeat its last one: one rectangular gather, and never a row outside the slab.
    row_PM = row_P[:, None] + torch.minimum(torch.arange(longest), length_P[:, None] - 1)
    shape = (head_P.numel(), longest, *hot_kv.shape[3:])
    staged = torch.empty(shape, dtype=hot_kv.dtype, pin_memory=hot_kv.is_cuda)
    for slab in slab_P.unique().tolist():
        here = (slab_P == slab).nonzero()[:, 0]
        staged[here] = slabs[slab][head_P[here, None], row_PM[here]]
    target = torch.stack([head_P, slot_P])
    if hot_kv.is_cuda:
        target = target.pin_memory().to(hot_kv.device, non_blocking=True)
    hot_kv[target[0], target[1], :longest] = staged.to(hot_kv.device, non_blocking=True)
    return int(length_P.sum())


def gather_kv(
    slabs: Mapping[int, Tensor],
    slab_P: Tensor,
    head_P: Tensor,
    row_P: Tensor,
    length_P: Tensor,
    slot_P: Tensor,
    hot_kv: Tensor,
) -> int:
    """Copy sentences from host memory into hot-set slots; see `gather_kv_ref`."""
    return gather_kv_ref(slabs, slab_P, head_P, row_P, length_P, slot_P, hot_kv)
