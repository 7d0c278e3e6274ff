"""A hit rate of one's choosing: random weights say nothing about how selections overlap from one token to the next."""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from sentencekv.policies import Policy, Tables, load
from triton_ops.lanes import NUM_SENTENCES, STEP, Lanes

_STRIDE = tl.constexpr(7919)
"""A prime: neighbours in the forced order lie far apart in memory."""


@triton.jit
def _forced_kernel(logit_ptr, count_ptr, capacity, num_count, moved, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_sentences = tl.load(count_ptr + b * num_count + NUM_SENTENCES)
    step = tl.load(count_ptr + b * num_count + STEP)
    s = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.maximum(num_sentences, 1)
    rank = s * _STRIDE % count - (step * moved).to(tl.int32) % count
    rank = tl.where(rank < 0, rank + count, rank)
    row = (b * GROUPS + group).to(tl.int64) * capacity
    tl.store(logit_ptr + row + s, -rank.to(tl.float32), mask=s < num_sentences)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced(Policy):
    """Scores as `policy` does, all its work done, then selects by schedule: `1 - hit_rate` new sentences each step."""

    policy: str = "moments"
    hit_rate: float = 0.85
    selected: int = 94
    """Sentences that one step selects, about."""

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return load(self.policy).summarize(key_TNH, offsets)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Tensor:
        logit_BNGS = load(self.policy).score(q_BAH, lanes, layer, scale=scale)
        batch, num_heads, num_groups, capacity = logit_BNGS.shape
        _forced_kernel[(triton.cdiv(capacity, 1024), num_heads * num_groups, batch)](
            logit_BNGS,
            lanes.count_of,
            capacity,
            lanes.count_of.stride(0),
            self.selected * (1 - self.hit_rate),
            GROUPS=num_heads * num_groups,
            BLOCK=1024,
        )
        return logit_BNGS
