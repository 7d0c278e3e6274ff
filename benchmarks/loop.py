"""The engine's own decode loop, sampling and all: what the host does between two steps counts, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sentencekv.decoding import Decoding, decode
from sentencekv.graph import Stepper
from sentencekv.sampling import SamplingOptions
from sentencekv.session import Session


class _NoText:
    """A tokenizer for random weights: their tokens mean nothing."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return ""


class _TimedDecoding(Decoding):
    def __init__(
        self, session: Session, num_warmup: int, num_timed: int, on_token: Callable[[int], object] = lambda _: None
    ) -> None:
        options = SamplingOptions(max_new_tokens=num_warmup + num_timed + 1)
        super().__init__(session, [], _NoText(), options, ())  # type: ignore[arg-type]
        self.taken_at: list[float] = []
        self._num_warmup = num_warmup
        self._on_token = on_token

    def take(self, drawn: Sequence[float]) -> str:
        piece = super().take(drawn)
        self.taken_at.append(self.last_token_at)
        if len(self.taken_at) == self._num_warmup:
            self.session.traffic.reset()
        self._on_token(len(self.taken_at))
        return piece

    def close_sentences(self) -> None:
        """Ends of random sentences are known beforehand."""


@torch.inference_mode()
def time_loop(
    stepper: Stepper,
    sessions: Sequence[Session],
    tokens: Sequence[int],
    num_warmup: int,
    num_timed: int,
    on_token: Callable[[int], object] = lambda _: None,
) -> tuple[list[float], list[list[int]]]:
    """Generate greedily after one token for each session: milliseconds between tokens, and the tokens drawn. The
    sessions' traffic is counted from the end of the warm-up on.

    `on_token`: called with the number of tokens that the first session has drawn by then, at every one of them.
    """
    logits_BV = stepper.step(sessions, tokens).clone()
    decodings = [_TimedDecoding(session, num_warmup, num_timed) for session in sessions[1:]]
    decodings.insert(0, _TimedDecoding(sessions[0], num_warmup, num_timed, on_token))
    for _ in decode(stepper, decodings, logits_BV):
        pass
    taken_at = decodings[-1].taken_at
    between = [(after - before) * 1e3 for before, after in itertools.pairwise(taken_at)]
    return between[num_warmup:], [decoding.token_ids for decoding in decodings]
