"""A hit rate of one's choosing: random weights say nothing about how selections overlap from one token to the next."""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from sentencekv.policies import Policy, Tables, load
from triton_ops.lanes import NUM_SENTENCES, STEP, Lanes
from triton_ops.score_sentences import Scores

_STRIDE = tl.constexpr(7919)
"""A prime: neighbours in the forced order lie far apart in memory."""


@triton.jit
def _forced_kernel(
    logit_ptr,
    extent_ptr,
    count_ptr,
    capacity,
    num_extents,
    num_count,
    moved,
    count,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_sentences = tl.load(count_ptr + b * num_count + NUM_SENTENCES)
    step = tl.load(count_ptr + b * num_count + STEP)
    s = block * BLOCK + tl.arange(0, BLOCK)
    rank = s * _STRIDE % count - (step * moved).to(tl.int32) % count
    # Sentences closed since the beginning come last, so that the others keep their order.
    rank = tl.where(s < count, tl.where(rank < 0, rank + count, rank), s)
    row = (b * GROUPS + group).to(tl.int64) * capacity
    tl.store(logit_ptr + row + s, -0.25 * rank.to(tl.float32), mask=s < num_sentences)
    if block == 0:
        x = tl.arange(0, BLOCK)
        pair_ptr = extent_ptr + (b * GROUPS + group).to(tl.int64) * num_extents * 2 + x * 2
        tl.store(pair_ptr, tl.where(x == 0, 0.0, float("-inf")), mask=x < num_extents)
        tl.store(pair_ptr + 1, tl.where(x == 0, 4.5208, 0.0), mask=x < num_extents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced(Policy):
    """Scores as `policy` does, all its work done, then selects by schedule: `1 - hit_rate` new sentences each step."""

    policy: str = "moments"
    hit_rate: float = 0.85
    selected: int = 94
    """Sentences that one step selects, about."""

    sentences: int = 1
    """Sentences of the context."""

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return load(self.policy).summarize(key_TNH, offsets)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        scores = load(self.policy).score(q_BAH, lanes, layer, scale=scale)
        logit_BNGS, extent_BNGX2 = scores
        batch, num_heads, num_groups, capacity = logit_BNGS.shape
        _forced_kernel[(triton.cdiv(capacity, 1024), num_heads * num_groups, batch)](
            logit_BNGS,
            extent_BNGX2,
            lanes.count_of,
            capacity,
            extent_BNGX2.shape[3],
            lanes.count_of.stride(0),
            self.selected * (1 - self.hit_rate),
            self.sentences,
            GROUPS=num_heads * num_groups,
            BLOCK=1024,
        )
        return scores
