"""Missing sentences from host memory into their hot-set slots."""

import torch
from torch import Tensor


def gather_kv_ref(
    host_kv: Tensor,
    head_P: Tensor,
    start_P: Tensor,
    length_P: Tensor,
    slot_P: Tensor,
    hot_kv: Tensor,
) -> int:
    """Copy P sentences of one layer from host memory into slots; returns the number of tokens copied.

    Args:
        host_kv: `[N, capacity, 2, H]` in host memory (pinned where there is a GPU); K and V of a token are adjacent.
        head_P, start_P, length_P, slot_P: int64 `[P]` on the host: KV head, first row, rows and destination slot.
        hot_kv: `[N, C, M, 2, H]` on the device; mutated: rows `[0, length)` of each slot, the rest is left as it was.
    """
    if head_P.numel() == 0:
        return 0
    slot_tokens = hot_kv.shape[2]
    longest = int(length_P.max())
    assert longest <= slot_tokens
    step = torch.arange(longest)
    # Rows past a sentence's end repeat its last one: one rectangular gather, and never a row outside the store.
    row_PM = start_P[:, None] + torch.minimum(step, length_P[:, None] - 1)
    staged = host_kv[head_P[:, None], row_PM]
    if hot_kv.is_cuda:
        staged = staged.pin_memory().to(hot_kv.device, non_blocking=True)
        head_P, slot_P = head_P.to(hot_kv.device), slot_P.to(hot_kv.device)
    hot_kv[head_P, slot_P, :longest] = staged
    return int(length_P.sum())


def gather_kv(
    host_kv: Tensor,
    head_P: Tensor,
    start_P: Tensor,
    length_P: Tensor,
    slot_P: Tensor,
    hot_kv: Tensor,
) -> int:
    """Copy sentences from host memory into hot-set slots; see `gather_kv_ref`."""
    return gather_kv_ref(host_kv, head_P, start_P, length_P, slot_P, hot_kv)
