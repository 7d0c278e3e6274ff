"""Several sessions in one forward pass: what a model's attention function hands its queries, keys and values to.

`SessionBatch` is for passes in which some session attends exactly; `LaneBatch` is for sparse decoding, one token for
each session, all lanes in each launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sentencekv.policies import Policy
from sentencekv.session import Session
from triton_ops import Lanes, gather_kv, resolve_hot_set, sparse_decode


class LaneBatch:
    """Sessions that decode side by side; new tokens are packed into one row, one for each, in order.

    Holds tables on the device that stay where they are while sessions come, go and grow, so that what `attend` launches
    can be replayed.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._lanes: Lanes | None = None
        self._seated: list[tuple[int, int]] = []
        self._room_tokens = 0

    def seat(self, sessions: Sequence[Session], num_lanes: int | None = None) -> bool:
        """Make these sessions the ones that decode. True if launches changed: what was recorded before is void.

        `num_lanes`: how many there is room for, at least; None: as many as there are sessions.
        """
        lanes = [session.lane() for session in sessions]
        self._room_tokens = sessions[0].config.room_tokens
        num_lanes = max(num_lanes or 0, len(lanes))
        changed = self._lanes is None or self._lanes.num_lanes != num_lanes or not self._lanes.fits(lanes)
        if changed:
            some = sessions[0]
            layer = next(iter(lanes[0].resident_kv))
            self._lanes = Lanes(
                num_lanes,
                sorted(lanes[0].resident_kv),
                some.device,
                num_kv_heads=lanes[0].resident_kv[layer].shape[0],
                # A quarter more than there are, so that a reply of many sentences is not recorded anew.
                capacity=_room(max(lane.num_sentences for lane in lanes) * 5 // 4 + 64, 128),
                most_selected=-(-max(lane.max_selected for lane in lanes) // 32) * 32,
                most_slots=_room(max(lane.num_slots for lane in lanes), 1),
                max_parts=_room(max(len(lane.parts) for lane in lanes), 2),
                slot_tokens=some.config.max_sentence_tokens,
                kv_format=some.config.kv_format,
            )
        assert self._lanes is not None
        seated = [(lane.serial, lane.version) for lane in lanes]
        before = [] if changed else self._seated
        moved = [i for i, mark in enumerate(seated) if i >= len(before) or before[i] != mark]
        left = len(before) > len(seated)
        self._lanes.seat(lanes, None if changed or left else moved)
        self._seated = seated
        return changed

    def forget(self) -> None:
        """Let go of the sessions: what was launched goes on, and a session that ends meanwhile gives its memory back.

        The next launch needs `seat`, which does nothing twice if nothing changed.
        """
        if self._lanes is not None:
            self._lanes.forget()

    def vacate(self) -> None:
        """Take all sessions out: until `seat`, launches read and write nothing of any session."""
        assert self._lanes is not None
        self._lanes.clear()
        self._seated = []

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output `[A, L, H]` of one new token for each of the L lanes; appends their KV."""
        assert self._lanes is not None
        lanes = self._lanes
        q_BAH, k_BNH, v_BNH = (tensor.transpose(0, 1) for tensor in (q_ALH, k_NLH, v_NLH))
        selected = resolved = rest = None
        # Attention reads misses from host memory itself; codes are unpacked by a launch of their own before it.
        fetches = lanes.kv_format is None
        if sliding_window is None and self.policy.reads == "selected" and lanes.most_selected:
            selected, rest = self.policy.select(q_BAH, lanes, layer, scale=scale, room_tokens=self._room_tokens)
            resolved = resolve_hot_set(selected, lanes, layer)
            if not fetches:
                gather_kv(selected, resolved.slot_BNK, resolved.miss_BNK, lanes, layer)
        output_BAH = sparse_decode(
            q_BAH,
            k_BNH,
            v_BNH,
            lanes,
            layer,
            selected,
            resolved,
            scale=scale,
            sliding=sliding_window is not None,
            softcap=softcap,
            fetch=fetches,
            # Scores know nothing of a cap on logits.
            rest=rest if softcap is None else None,
        )
        return output_BAH.transpose(0, 1)


def _room(needed: int, least: int) -> int:
    """A power of two, so that growth rarely changes it."""
    return 1 << (max(needed, least) - 1).bit_length()


class SessionBatch:
    """Several sessions whose new tokens are packed into one row, one after another, without padding.

    Packing is exact because only attention looks across tokens; it is what lets sequences of any lengths, some reading
    and some decoding, share one forward pass.
    """

    def __init__(self, sessions: Sequence[Session], lengths: Sequence[int]) -> None:
        assert len(sessions) == len(lengths) > 0
        self.sessions = list(sessions)
        self.lengths = list(lengths)
        self._lanes: list[LaneBatch | None] = []
        for session in sessions:
            lane = LaneBatch(session.policy) if session.is_sparse else None
            if lane is not None:
                lane.seat([session])
            self._lanes.append(lane)

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Each session's attention over its own tokens; shapes as in `Session.attend`, L summed over the sessions."""
        outputs = []
        start = 0
        for session, length, lane in zip(self.sessions, self.lengths, self._lanes, strict=True):
            rows = slice(start, start + length)
            outputs.append(
                (lane or session).attend(
                    layer,
                    q_ALH[:, rows],
                    k_NLH[:, rows],
                    v_NLH[:, rows],
                    scale=scale,
                    sliding_window=sliding_window,
                    softcap=softcap,
                )
            )
            start += length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
