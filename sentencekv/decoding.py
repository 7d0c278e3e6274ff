"""The decode loop: one token for every unfinished sequence of a batch at each step.

Knows sessions, models and samplers; nothing of documents or of how results are reported.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sentencekv.graph import Stepper
from sentencekv.prompts import tail_ends
from sentencekv.sampling import Sampler, SamplingOptions, TextStream, draw_together
from sentencekv.session import Session

FinishReason = Literal["stop", "length"]


class Decoding:
    """One sequence being generated: its session, what was drawn so far, and why it ended."""

    def __init__(
        self,
        session: Session,
        context_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        stop_ids: Collection[int],
    ) -> None:
        self.session = session
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_at = self.last_token_at = 0.0
        self.stream = TextStream(tokenizer, options.stop_strings, context_ids)
        self._tokenizer = tokenizer
        self._options = options
        self._stop_ids = stop_ids
        self.sampler = Sampler(options, context_ids, session.device)
        self._first_position = session.num_tokens

    @property
    def ends_by_length(self) -> bool:
        """Whether the next token is the last one allowed."""
        return len(self.token_ids) + 1 >= self._options.max_new_tokens

    def take(self, drawn: Sequence[float]) -> str:
        """Add the token that the sampler drew; returns the text that it makes certain."""
        token, logprob = self.sampler.take(drawn)
        self.last_token_at = time.perf_counter()
        if not self.token_ids:
            self.first_token_at = self.last_token_at
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self.stream.finish()
        piece = self.stream.add(token)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._options.max_new_tokens:
            self.finish_reason = "length"
            piece += self.stream.finish()
        return piece

    @property
    def drew_stop_id(self) -> bool:
        """Whether the last token drawn was one that ends a text."""
        return bool(self.token_ids) and self.token_ids[-1] in self._stop_ids

    def close_sentences(self) -> None:
        """Find sentence ends in a tail that outgrew one sentence, so that the session can close and offload them."""
        session = self.session
        if session.num_tokens - session.last_expected_end > session.config.max_sentence_tokens:
            session.expect(self._tail_ends())

    def end_sentence(self) -> None:
        """What was generated is over: its last sentence ends with it, however little it holds."""
        session = self.session
        if session.num_tokens > session.last_expected_end:
            session.expect([*self._tail_ends(), session.num_tokens])

    def _tail_ends(self) -> list[int]:
        session = self.session
        start = session.last_expected_end
        tail = self.token_ids[start - self._first_position : session.num_tokens - self._first_position]
        return [start + end for end in tail_ends(self._tokenizer, tail, session.config)]


@torch.inference_mode()
def decode(stepper: Stepper, decodings: Sequence[Decoding], first_logits_BV: Tensor) -> Iterator[tuple[int, str]]:
    """Generate until every sequence has ended; yields `(index, text)` whenever text becomes certain.

    `first_logits_BV` are those of each sequence's last context token. A sequence that ends leaves the batch.

    Where the stepper runs ahead, the next step starts while the host still has to see what was drawn for it; if that
    ends a sequence, its part of the step is given up. Not before the first tokens are out: what a session does before
    its first step would keep them waiting.
    """
    active = list(range(len(decodings)))
    drawn_B3 = draw_together([decodings[i].sampler for i in active], first_logits_BV)
    on_host = _HostCopy(drawn_B3)
    while active:
        on_host.start(drawn_B3)
        ahead: list[int] = []
        if stepper.runs_ahead and all(decodings[i].token_ids for i in active):
            rows = [row for row, i in enumerate(active) if not decodings[i].ends_by_length]
            ahead = [active[row] for row in rows]
            if ahead:
                tokens_B = drawn_B3[:, 0].long()
                tokens_B = tokens_B if len(rows) == len(active) else tokens_B[rows]
                logits_BV = stepper.launch([decodings[i].session for i in ahead], tokens_B)
                # Drawn before anyone else may use the stepper, whose next step overwrites these logits.
                drawn_B3 = draw_together([decodings[i].sampler for i in ahead], logits_BV)
        open_passes = set(ahead)
        try:
            for i, drawn in zip(active, on_host.wait(), strict=True):
                piece = decodings[i].take(drawn)
                if piece:
                    yield i, piece
            active = [i for i in active if decodings[i].finish_reason is None]
            for i in active:
                decodings[i].close_sentences()
            open_passes -= set(active)
        finally:
            # Also if nobody asks for more text, or a token cannot be drawn.
            for i in open_passes:
                decodings[i].session.cancel()
            if open_passes and drawn_B3.is_cuda:
                # The step may still read host memory that its session is about to give back.
                torch.cuda.current_stream(drawn_B3.device).synchronize()
        if ahead:
            for i in active:
                decodings[i].session.end()
            if active != ahead:
                drawn_B3 = drawn_B3[[ahead.index(i) for i in active]]
        elif active:
            sessions = [decodings[i].session for i in active]
            logits_BV = stepper.step(sessions, [decodings[i].token_ids[-1] for i in active])
            drawn_B3 = draw_together([decodings[i].sampler for i in active], logits_BV)


class _HostCopy:
    """Brings a small tensor to the host while the device goes on; one at a time, in memory that is kept."""

    def __init__(self, like: Tensor) -> None:
        self._on_host = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._copied = torch.cuda.Event() if like.is_cuda else None
        self._rows = 0

    def start(self, tensor: Tensor) -> None:
        """At most as many rows as the first one had."""
        self._rows = tensor.shape[0]
        self._on_host[: self._rows].copy_(tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> list[list[float]]:
        if self._copied is not None:
            self._copied.synchronize()
        return cast(list[list[float]], self._on_host[: self._rows].tolist())
