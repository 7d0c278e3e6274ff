"""A hit rate of one's choosing: random weights say nothing about how selections overlap from one token to the next."""

from __future__ import annotations

import dataclasses
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentencekv.lane import most_selected
from sentencekv.policies import Policy, Selection, Tables
from sentencekv.session import Session
from triton_ops.early_start import launch_options, starts_early, wait_for_inputs
from triton_ops.lanes import NUM_SENTENCES, STEP, Lanes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """A fixed order of sentences, and what a window that moves through it selects.

    The hit rate is in device memory, so that one recorded graph serves them all.
    """

    window_SW: Tensor
    """int32: the sentences that fill the budget from the s-th in the order on, rising ids, then -1."""

    first_of_token: Tensor
    """int32: for each token of the order, the first sentence in the order that starts there or later."""

    room_tokens: int
    moved: Tensor
    """int32, one number: tokens by which the window moves at each step."""

    @property
    def num_tokens(self) -> int:
        return self.first_of_token.numel()

    @property
    def spacing(self) -> int:
        """Tokens between one lane's window and the next one's, whatever the number of lanes: a golden section."""
        return int(0.618 * self.num_tokens)

    @classmethod
    def of(cls, session: Session, seed: int = 0) -> Schedule:
        """Through the sentences that the session has by now; those closed later are not selected."""
        length_S = torch.tensor([stop - start for start, stop in session.sentence_spans()])
        room_tokens, num_sentences, num_tokens = session.config.room_tokens, length_S.numel(), int(length_S.sum())
        order = torch.randperm(num_sentences, generator=torch.Generator().manual_seed(seed))
        stop_S = length_S[order].cumsum(0)
        start_S = stop_S - length_S[order]
        # The order goes round: windows near its end take sentences from its beginning.
        stop_2S = torch.cat([stop_S, stop_S + num_tokens])
        room = min(room_tokens, num_tokens)
        count_S = torch.searchsorted(stop_2S, start_S + room, right=True) - torch.arange(num_sentences)
        count_S = count_S.clamp(max=most_selected(session.config, num_sentences, num_tokens))
        step = torch.arange(int(count_S.max()))
        window_SW = order[(torch.arange(num_sentences)[:, None] + step) % num_sentences]
        window_SW = window_SW.masked_fill(step >= count_S[:, None], num_sentences).sort(dim=1).values
        window_SW = window_SW.masked_fill(window_SW == num_sentences, -1)
        first_of_token = torch.searchsorted(start_S, torch.arange(num_tokens)) % num_sentences
        return cls(
            window_SW=window_SW.to(session.device, torch.int32),
            first_of_token=first_of_token.to(session.device, torch.int32),
            room_tokens=room_tokens,
            moved=torch.zeros(1, dtype=torch.int32, device=session.device),
        )

    def set_hit_rate(self, hit_rate: float) -> None:
        """For the steps from now on."""
        self.moved.fill_(round(self.room_tokens * (1 - hit_rate)))


def force_ref(selected_BNK: Tensor, lanes: Lanes, schedule: Schedule) -> None:
    """Write the selection that is scheduled for each lane's step; all heads select the same."""
    width = schedule.window_SW.shape[1]
    for b, lane in enumerate(lanes.lanes):
        place = (lane.step * int(schedule.moved) + b * schedule.spacing) % schedule.num_tokens
        selected_BNK[b] = -1
        if lane.num_sentences:
            selected_BNK[b, :, :width] = schedule.window_SW[int(schedule.first_of_token[place])]


@triton.jit
def _force_kernel(  # type: ignore[no-untyped-def]
    selected_ptr,
    count_ptr,
    window_ptr,
    first_ptr,
    moved_ptr,
    num_count,
    most_selected,
    width,
    num_tokens,
    spacing,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    n, b = tl.program_id(0), tl.program_id(1)
    num_sentences = tl.load(count_ptr + b * num_count + NUM_SENTENCES)
    step = tl.load(count_ptr + b * num_count + STEP).to(tl.int64)
    place = (step * tl.load(moved_ptr) + b.to(tl.int64) * spacing) % num_tokens
    first = tl.load(first_ptr + place).to(tl.int64)
    k = tl.arange(0, BLOCK)
    sentence = tl.load(window_ptr + first * width + k, mask=(k < width) & (num_sentences > 0), other=-1)
    wait_for_inputs(EARLY)
    row = (b * NUM_KV_HEADS + n).to(tl.int64) * most_selected
    tl.store(selected_ptr + row + k, sentence, mask=k < most_selected)


def force_triton(selected_BNK: Tensor, lanes: Lanes, schedule: Schedule) -> None:
    """Write the scheduled selection, by one small kernel; see `force_ref`."""
    batch, num_kv_heads, most_selected = selected_BNK.shape
    assert selected_BNK.is_contiguous()
    early = starts_early(selected_BNK)
    _force_kernel[(num_kv_heads, batch)](
        selected_BNK,
        lanes.count_of,
        schedule.window_SW,
        schedule.first_of_token,
        schedule.moved,
        lanes.count_of.stride(0),
        most_selected,
        schedule.window_SW.shape[1],
        schedule.num_tokens,
        schedule.spacing,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK=triton.next_power_of_2(most_selected),
        EARLY=early,
        **launch_options(early),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forced(Policy):
    """Scores and selects as `policy` does, all its work done, then takes the schedule's selection in its place.

    So `1 - hit_rate` of the budget is new at each step. A context that is hardly longer than the hot set has hits even
    if none are asked for. All layers select the same, so the schedule is read once for each step, in its first layer:
    a kernel more in every layer would be time that the engine does not take.
    """

    policy: Policy
    schedule: Schedule
    _scheduled_of: WeakKeyDictionary[Lanes, Tensor] = dataclasses.field(default_factory=WeakKeyDictionary)

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return self.policy.summarize(key_TNH, offsets)

    def select(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, room_tokens: int) -> Selection:
        selected_BNK, rest = self.policy.select(q_BAH, lanes, layer, scale=scale, room_tokens=room_tokens)
        assert self.schedule.window_SW.shape[1] <= selected_BNK.shape[2]
        if layer == min(lanes.lanes[0].hot_kv):  # not a sliding-window layer: those select nothing
            self._scheduled_of[lanes] = torch.empty_like(selected_BNK)
            force = force_triton if selected_BNK.is_cuda else force_ref
            force(self._scheduled_of[lanes], lanes, self.schedule)
        return Selection(self._scheduled_of[lanes], rest)
