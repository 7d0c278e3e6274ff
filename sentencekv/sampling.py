"""From logits to tokens, and from tokens to text: sampling, stop strings, streamed detokenisation.

Knows one sequence's logits and ids; nothing of sessions or batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from triton_ops import draw_greedy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn and when generation stops. Raises ValueError or TypeError naming a bad value."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = None
    """Generation ends before the first of these strings; it is not part of the text."""
    seed: int | None = None
    """Seed of the draws; each sequence of a batch has its own generator with it. None: not repeatable."""
    logprobs: bool = False
    """Also return the log-probability of each token under the model's own distribution."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            optional = value is None and name != "max_new_tokens"
            if not optional and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and (
                value is not None or name in ("temperature", "repetition_penalty")
            ):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.001, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.stop is not None and not isinstance(self.stop, (str, list, tuple)):
            raise TypeError(f"stop must be a string or a list of strings, got {self.stop!r}")
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise ValueError(f"stop must be a non-empty string or a list of them, got {self.stop!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def make_options(given: Mapping[str, Any]) -> SamplingOptions:
    """Options from keywords. Raises TypeError with the list of names for an unknown one."""
    known = [field.name for field in dataclasses.fields(SamplingOptions)]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; there are: {', '.join(known)}")
    return SamplingOptions(**given)


_LONGEST_CHARACTER = 4
"""Tokens that one UTF-8 character may take; what is unfinished after that never will be."""

_CONTEXT_TOKENS = 6

_NAN_LOGITS = (
    "the model's logits are NaN; its weights or its precision are broken: try dtype='float32', "
    "and check the model folder"
)


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, options: SamplingOptions, prompt_ids: Sequence[int], device: torch.device) -> None:
        self._greedy = options.temperature == 0
        self._logprobs = options.logprobs
        self._processors = LogitsProcessorList()
        if options.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_k is not None:
                self._processors.append(TopKLogitsWarper(options.top_k))
            if options.top_p is not None and options.top_p < 1:
                self._processors.append(TopPLogitsWarper(options.top_p))
            if options.min_p is not None:
                self._processors.append(MinPLogitsWarper(options.min_p))
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        # Only the penalty looks at what came before.
        self._counts_ids = options.repetition_penalty != 1.0
        seen = list(prompt_ids) if self._counts_ids else []
        self._ids = torch.tensor(seen, dtype=torch.int64, device=device)

    @property
    def takes_the_highest(self) -> bool:
        """Whether it draws the token with the highest logit, whatever came before."""
        return self._greedy and not self._processors

    def draw(self, logits_V: Tensor) -> Tensor:
        """Draw the next token; float32 `[3]` on the logits' device for `take`. Does not wait for the device.

        That is the token, its log-probability under the model itself (if asked for), and whether logits are NaN.
        """
        if self.takes_the_highest:
            return draw_greedy(logits_V[None])[0]
        is_nan = torch.isnan(logits_V).any()
        ids = cast(torch.LongTensor, self._ids[None])
        # From NaN a device draws nothing more, ever.
        scores = torch.where(is_nan, 0.0, logits_V)
        if self._processors:
            scores = self._processors(ids, cast(torch.FloatTensor, scores[None]))[0]
        if self._greedy:
            token = scores.argmax()
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)[0]
        if self._counts_ids:
            self._ids = torch.cat([self._ids, token[None]])
        logprob = logits_V.log_softmax(dim=-1).gather(0, token[None])[0] if self._logprobs else is_nan
        return torch.stack([token.float(), logprob.float(), is_nan.float()])

    def take(self, drawn: Sequence[float]) -> tuple[int, float | None]:
        """What `draw` gave, once it is here: the token and its log-probability. Raises FloatingPointError on NaN."""
        token, logprob, is_nan = drawn
        if is_nan:
            raise FloatingPointError(_NAN_LOGITS)
        return int(token), logprob if self._logprobs else None


def draw_together(samplers: Sequence[Sampler], logits_BV: Tensor) -> Tensor:
    """`Sampler.draw` of each row, float32 `[B, 3]`; in two kernels where all take the highest."""
    if all(sampler.takes_the_highest for sampler in samplers):
        return draw_greedy(logits_BV)
    return torch.stack([sampler.draw(logits_V) for sampler, logits_V in zip(samplers, logits_BV, strict=True)])


class TextStream:
    """Turns tokens into text as they come: never half a character, never part of a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], context_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # The end of the context, since some tokenizers drop the space before the first token that they decode.
        self._ids = list(context_ids[-_CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._ids)
        self._pending = ""
        self.text = ""
        """What was given out so far."""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; empty while a character or a stop string may be unfinished."""
        self._ids.append(token)
        # Decoding starts a few tokens back, since a tokenizer may join a token to the one before it.
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if now.endswith("\ufffd") and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return self._release(now[len(before) :], final=True)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _release(self, piece: str, *, final: bool) -> str:
        self._pending += piece
        cuts = [at for at in map(self._pending.find, self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            ready, self._pending = self._pending[: min(cuts)], ""
        else:
            held = 0 if final else max((_overlap(self._pending, stop) for stop in self._stop), default=0)
            ready = self._pending[: len(self._pending) - held]
            self._pending = self._pending[len(self._pending) - held :]
        self.text += ready
        return ready


def refuse_nan(logits: Tensor) -> None:
    """Raise FloatingPointError if a model gave NaN logits: nothing drawn from them would mean anything."""
    if torch.isnan(logits).any():
        raise FloatingPointError(_NAN_LOGITS)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string could begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
