"""Kernels that start before the one in front of them ends: programmatic dependent launch, on Hopper and later.

A decoding step is a chain of short kernels, and starting one costs about as much as running it. Every kernel of the
chain calls `wait_for_inputs`; what it does before that reads only what no kernel of a step writes.
"""

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


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernels in front have ended and what they wrote is visible; then let the next one begin."""
    if EARLY:
        tl_cuda.gdc_wait()
        # After the wait, not before it: so the next kernel reads its weights after everything two kernels back.
        tl_cuda.gdc_launch_dependents()
