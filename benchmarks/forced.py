"""A hit rate of one's choosing: random weights say nothing about how selections overlap from one token to the next."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentencekv.policies import Policy, Tables
from sentencekv.session import Session
from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import NUM_SENTENCES, STEP, Lanes
from triton_ops.score_sentences import Scores

_NATS = 40.0
"""Range of the forced scores of what is selected; farther sentences score lower still."""


def _spacing(num_tokens: int) -> int:
    """Tokens of the order between one lane and the next, whatever the number of lanes: a golden section of it."""
    return int(0.618 * num_tokens)


def force_ref(scores: Scores, lanes: Lanes, start_S: Tensor, moved: Tensor, num_tokens: int, rate: float) -> None:
    """Write scores by which selection takes a window of a fixed order, which moves on by `moved` tokens each step.

    Lanes of a batch are at different places of the order. Sentences closed since the order was made come last, so that
    the others keep theirs.

    Args:
        start_S: int32, the first token of each sentence in the order.
        moved: int32, one number.
        num_tokens: of the order.
        rate: by how much the score falls with each token of distance.
    """
    logit_BNGS, extent_BNGX2 = scores.logit_BNGS, scores.extent_BNGX2
    for b, lane in enumerate(lanes.lanes):
        place = (lane.step * int(moved) + b * _spacing(num_tokens)) % num_tokens
        logit_BNGS[b] = -rate * num_tokens
        logit_BNGS[b, :, :, : start_S.numel()] = -rate * ((start_S - place) % num_tokens).float()
        logit_BNGS[b, :, :, lane.num_sentences :] = -torch.inf
    # Normalisers of one: the scores are taken as they are.
    extent_BNGX2[..., 0] = -torch.inf
    extent_BNGX2[..., 1] = 0.0
    extent_BNGX2[..., 0, 0] = 0.0
    extent_BNGX2[..., 0, 1] = 1.0


@triton.jit
def _force_kernel(  # type: ignore[no-untyped-def]
    logit_ptr,
    extent_ptr,
    count_ptr,
    start_ptr,
    moved_ptr,
    capacity,
    num_extents,
    num_count,
    num_ordered,
    num_tokens,
    spacing,
    rate,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    block, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_sentences = tl.load(count_ptr + b * num_count + NUM_SENTENCES)
    step = tl.load(count_ptr + b * num_count + STEP)
    moved = tl.load(moved_ptr)
    s = block * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(start_ptr + s, mask=s < num_ordered, other=0)
    place = (step.to(tl.int64) * moved + b * spacing) % num_tokens
    distance = start - place.to(tl.int32)
    distance = tl.where(distance < 0, distance + num_tokens, distance)
    distance = tl.where(s < num_ordered, distance, num_tokens)
    wait_for_inputs(EARLY)
    row = (b * GROUPS + group).to(tl.int64)
    tl.store(logit_ptr + row * capacity + s, -rate * distance.to(tl.float32), mask=s < num_sentences)
    if block == 0:
        x = tl.arange(0, BLOCK)
        pair_ptr = extent_ptr + row * num_extents * 2 + x * 2
        tl.store(pair_ptr, tl.where(x == 0, 0.0, float("-inf")), mask=x < num_extents)
        tl.store(pair_ptr + 1, tl.where(x == 0, 1.0, 0.0), mask=x < num_extents)


def force_triton(scores: Scores, lanes: Lanes, start_S: Tensor, moved: Tensor, num_tokens: int, rate: float) -> None:
    """Write scores by which selection takes a window of a fixed order, by one kernel; see `force_ref`."""
    logit_BNGS, extent_BNGX2 = scores.logit_BNGS, scores.extent_BNGX2
    batch, num_heads, num_groups, capacity = logit_BNGS.shape
    block = 1024
    assert extent_BNGX2.shape[3] <= block
    early = starts_early(logit_BNGS)
    _force_kernel[(triton.cdiv(capacity, block), num_heads * num_groups, batch)](
        logit_BNGS,
        extent_BNGX2,
        lanes.count_of,
        start_S,
        moved,
        capacity,
        extent_BNGX2.shape[3],
        lanes.count_of.stride(0),
        start_S.numel(),
        num_tokens,
        _spacing(num_tokens),
        rate,
        GROUPS=num_heads * num_groups,
        BLOCK=block,
        EARLY=early,
        **launch_options(early),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forced(Policy):
    """Scores as `policy` does, all its work done, then selects by schedule: `1 - hit_rate` of the budget is new.

    The hit rate is in device memory, so that one recorded graph serves them all. A context that is hardly longer than
    the hot set has hits even if none are asked for.
    """

    policy: Policy
    start_S: Tensor
    """int32: the first token of each sentence in the order that the schedule goes through."""

    num_tokens: int
    """Of that order."""

    room_tokens: int
    """Tokens that selection fills."""

    moved: Tensor
    """int32, one number: tokens by which the window moves at each step."""

    @classmethod
    def of(cls, session: Session, seed: int = 0) -> Forced:
        """A schedule through the sentences that the session has by now; sentences closed later are not selected."""
        length_S = torch.tensor([stop - start for start, stop in session.sentence_spans()])
        order = torch.randperm(length_S.numel(), generator=torch.Generator().manual_seed(seed))
        start_S = torch.empty_like(length_S)
        start_S[order] = length_S[order].cumsum(0) - length_S[order]
        return cls(
            policy=session.policy,
            group=session.policy.group,
            start_S=start_S.to(session.device, torch.int32),
            num_tokens=int(length_S.sum()),
            room_tokens=session.config.room_tokens,
            moved=torch.zeros(1, dtype=torch.int32, device=session.device),
        )

    def set_hit_rate(self, hit_rate: float) -> None:
        """For the steps from now on."""
        self.moved.fill_(round(self.room_tokens * (1 - hit_rate)))

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return self.policy.summarize(key_TNH, offsets)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        scored = self.policy.score(q_BAH, lanes, layer, scale=scale)
        logit_BNGS = scored.logit_BNGS
        if logit_BNGS.shape[3] != lanes.capacity:
            # The policy scored only some; selection then goes through all, which takes a little longer.
            logit_BNGS = logit_BNGS.new_empty((*logit_BNGS.shape[:3], lanes.capacity))
        scores = Scores(logit_BNGS, scored.extent_BNGX2)
        force = force_triton if logit_BNGS.is_cuda else force_ref
        force(scores, lanes, self.start_S, self.moved, self.num_tokens, _NATS / self.room_tokens)
        return scores
