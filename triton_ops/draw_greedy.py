"""The most probable token of each row of logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits of a program of the first pass."""
_MOST_BLOCKS = 1024
"""Blocks of a row that one program of the second pass joins."""


def draw_greedy_ref(logits_BV: Tensor) -> Tensor:
    """Float32 `[B, 3]`: the token with the highest logit (the first of several), its log-probability, and 1 if any
    logit of the row is NaN, else 0. Of a row with NaN the token is some token and the log-probability means nothing.

    Args:
        logits_BV: at most 2^24 columns, so that a token is a float32 number.
    """
    is_nan_B = logits_BV.isnan().any(dim=1)
    logits_BV = logits_BV.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    token_B = logits_BV.argmax(dim=1)
    highest_B = logits_BV.gather(1, token_B[:, None])[:, 0]
    logprob_B = highest_B - logits_BV.logsumexp(dim=1)
    return torch.stack([token_B.float(), logprob_B, is_nan_B.float()], dim=1)


@triton.jit
def _first_pass_kernel(logits_ptr, stride, part_ptr, num_columns, BLOCK: tl.constexpr, MOST_BLOCKS: tl.constexpr):
    """Of each block of a row: highest logit, its column, the sum of exponents above it, whether any is NaN."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    v = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + v, mask=v < num_columns, other=float("-inf")).to(tl.float32)
    is_nan = logits != logits
    logits = tl.where(is_nan, float("-inf"), logits)
    highest, column = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    top = tl.where(highest == float("-inf"), 0.0, highest)
    part_ptr += row * 4 * MOST_BLOCKS + block
    tl.store(part_ptr, highest)
    tl.store(part_ptr + MOST_BLOCKS, (block * BLOCK + column).to(tl.float32))
    tl.store(part_ptr + 2 * MOST_BLOCKS, tl.sum(tl.exp(logits - top), 0))
    tl.store(part_ptr + 3 * MOST_BLOCKS, tl.max(is_nan.to(tl.float32), 0))


@triton.jit
def _second_pass_kernel(part_ptr, drawn_ptr, num_blocks, BLOCKS: tl.constexpr, MOST_BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    there = b < num_blocks
    part_ptr += row * 4 * MOST_BLOCKS + b
    highest = tl.load(part_ptr, mask=there, other=float("-inf"))
    column = tl.load(part_ptr + MOST_BLOCKS, mask=there, other=0.0)
    total = tl.load(part_ptr + 2 * MOST_BLOCKS, mask=there, other=0.0)
    is_nan = tl.load(part_ptr + 3 * MOST_BLOCKS, mask=there, other=0.0)
    top = tl.max(highest, 0)
    # Blocks are in the order of their columns, so the least column is that of the first block.
    token = tl.min(tl.where(highest == top, column, 16777216.0), 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log(tl.sum(tl.where(there, total * tl.exp(highest - finite), 0.0), 0))
    tl.store(drawn_ptr + row * 3, token)
    tl.store(drawn_ptr + row * 3 + 1, top - finite - log_total)
    tl.store(drawn_ptr + row * 3 + 2, tl.max(is_nan, 0))


def draw_greedy_triton(logits_BV: Tensor) -> Tensor:
    """`draw_greedy_ref` in two kernels: over blocks of columns, and over the blocks of a row."""
    num_rows, num_columns = logits_BV.shape
    num_blocks = triton.cdiv(num_columns, _BLOCK)
    assert logits_BV.stride(1) == 1
    assert 0 < num_blocks <= _MOST_BLOCKS
    part = torch.empty((num_rows, 4, _MOST_BLOCKS), dtype=torch.float32, device=logits_BV.device)
    drawn_B3 = torch.empty((num_rows, 3), dtype=torch.float32, device=logits_BV.device)
    _first_pass_kernel[(num_blocks, num_rows)](
        logits_BV, logits_BV.stride(0), part, num_columns, BLOCK=_BLOCK, MOST_BLOCKS=_MOST_BLOCKS
    )
    _second_pass_kernel[(num_rows,)](
        part, drawn_B3, num_blocks, BLOCKS=triton.next_power_of_2(num_blocks), MOST_BLOCKS=_MOST_BLOCKS
    )
    return drawn_B3


def draw_greedy(logits_BV: Tensor) -> Tensor:
    """Tokens, log-probabilities and whether there is NaN; see `draw_greedy_ref`."""
    op = draw_greedy_triton if logits_BV.is_cuda else draw_greedy_ref
    return op(logits_BV)
