"""The decode loop: one token for every unfinished sequence of a batch at each step.

Knows sessions, models and samplers; nothing of documents or of how results are reported.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sentencekv.graph import Stepper
from sentencekv.prompts import tail_ends
from sentencekv.sampling import Sampler, SamplingOptions, TextStream
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
        self._sampler = Sampler(options, context_ids, session.device)
        self._first_position = session.num_tokens

    def take(self, logits_V: Tensor) -> str:
        """Draw the next token; returns the text that it makes certain."""
        token, logprob = self._sampler.draw(logits_V)
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


def decode(stepper: Stepper, decodings: Sequence[Decoding], first_logits_BV: Tensor) -> Iterator[tuple[int, str]]:
    """Generate until every sequence has ended; yields `(index, text)` whenever text becomes certain.

    `first_logits_BV` are those of each sequence's last context token. A sequence that ends leaves the batch.
    """
    logits_BV = first_logits_BV
    active = list(range(len(decodings)))
    while active:
        for row, i in enumerate(active):
            piece = decodings[i].take(logits_BV[row])
            if piece:
                yield i, piece
        active = [i for i in active if decodings[i].finish_reason is None]
        if not active:
            return
        for i in active:
            decodings[i].close_sentences()
        logits_BV = stepper.step([decodings[i].session for i in active], [decodings[i].token_ids[-1] for i in active])
