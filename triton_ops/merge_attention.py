"""Attention over some keys joined with attention over others, as one softmax over all of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
"""Rows of one query head that a program merges."""


def merge_attention_ref(total_ALH: Tensor, log_AL: Tensor, part_ALH: Tensor, part_log_AL: Tensor) -> None:
    """Add a part to what was attended to so far; `total_ALH` and `log_AL` are written to.

    Two results `o1`, `o2` with log-sums of exponents `l1`, `l2` of their logits are together `w1 o1 + w2 o2` with
    `w = exp(l - logaddexp(l1, l2))` (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Args:
        total_ALH: float32 `[A, L, H]`, contiguous; log_AL: float32 `[A, L]`, contiguous, -inf where nothing was.
        part_ALH, part_log_AL: the part, in any dtype and float32.
    """
    both = torch.logaddexp(log_AL, part_log_AL)
    known = torch.where(both == -torch.inf, 0.0, both)
    total_ALH.mul_((log_AL - known).exp()[..., None])
    total_ALH.add_(part_ALH.float() * (part_log_AL - known).exp()[..., None])
    log_AL.copy_(both)


@triton.jit
def _merge_attention_kernel(
    total_ptr,
    log_ptr,
    part_ptr,
    part_log_ptr,
    num_rows,
    part_stride_a,
    part_stride_l,
    part_log_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    a = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    h = tl.arange(0, HEAD_BLOCK)
    mask = there[:, None] & (h < HEAD_DIM)[None, :]
    log = tl.load(log_ptr + a * num_rows + row, mask=there, other=0.0)
    part_log = tl.load(part_log_ptr + a * part_log_stride + row, mask=there, other=0.0)
    highest = tl.maximum(log, part_log)
    top = tl.where(highest == float("-inf"), 0.0, highest)
    share, part_share = tl.exp(log - top), tl.exp(part_log - top)
    both = share + part_share
    scale = 1.0 / tl.maximum(both, 1e-37)
    total_ptr += (a * num_rows + row)[:, None] * HEAD_DIM + h[None, :]
    total = tl.load(total_ptr, mask=mask, other=0.0)
    part = tl.load(
        part_ptr + a * part_stride_a + row.to(tl.int64)[:, None] * part_stride_l + h[None, :], mask=mask, other=0.0
    )
    total = total * (share * scale)[:, None] + part.to(tl.float32) * (part_share * scale)[:, None]
    # Warps hold copies of the logs; one must not overwrite what another has yet to read.
    tl.debug_barrier()
    tl.store(total_ptr, total, mask=mask)
    tl.store(log_ptr + a * num_rows + row, highest + tl.log(tl.maximum(both, 1e-37)), mask=there)


def merge_attention_triton(total_ALH: Tensor, log_AL: Tensor, part_ALH: Tensor, part_log_AL: Tensor) -> None:
    """`merge_attention_ref` as one kernel, which reads and writes each number once."""
    num_heads, num_rows, head_dim = total_ALH.shape
    assert total_ALH.is_contiguous()
    assert log_AL.is_contiguous()
    assert part_ALH.shape == total_ALH.shape
    assert part_log_AL.shape == log_AL.shape
    assert part_ALH.stride(2) == part_log_AL.stride(1) == 1
    _merge_attention_kernel[(triton.cdiv(num_rows, _ROWS), num_heads)](
        total_ALH,
        log_AL,
        part_ALH,
        part_log_AL,
        num_rows,
        part_ALH.stride(0),
        part_ALH.stride(1),
        part_log_AL.stride(0),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim),
        ROWS=_ROWS,
        num_warps=4,
    )


def merge_attention(total_ALH: Tensor, log_AL: Tensor, part_ALH: Tensor, part_log_AL: Tensor) -> None:
    """Add a part to what was attended to so far; see `merge_attention_ref`."""
    op = merge_attention_triton if total_ALH.is_cuda else merge_attention_ref
    op(total_ALH, log_AL, part_ALH, part_log_AL)
