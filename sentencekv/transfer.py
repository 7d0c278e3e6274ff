"""Small tables on their way to the device, without the host waiting until the device gets to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of them on the device, in the order of its work.

    A copy from ordinary memory would make the host wait for all work of the device so far; this one comes from pinned
    memory, which torch keeps until the copy is done.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
