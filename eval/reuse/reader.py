"""Prompts read in full and by every method, from one set of cached prompts, and what the model then says.

Distributions are of exact passes: whatever was reused, later tokens attend to all KV before them, so that what a
figure shows is what reuse did to the KV, and nothing of what sentence retrieval leaves out.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.reuse.methods import Method
from eval.reuse.pairs import Prompted
from sentencekv import LongContextLM
from sentencekv.attention import forward
from sentencekv.prompts import Prompt
from sentencekv.reuse.decide import make_reuse_options
from sentencekv.reuse.prompt_cache import PromptCache
from sentencekv.reuse.report import Reuse
from sentencekv.session import Session

_WARMUP_NAMESPACE = "warming up"


class Answer(NamedTuple):
    """How a model goes on, greedily."""

    token_ids: list[int]
    """The token that ends it included."""
    text: str


class Added(NamedTuple):
    """A prompt that was cached."""

    seconds: float
    """What caching it took, beside reading it."""
    answer: Answer | None
    """If it was asked for."""


class Full(NamedTuple):
    """A prompt that was read in full."""

    seconds: float
    """Until the first token was known."""
    answer: Answer
    logits_LV: Tensor
    """Before each of the answer's tokens; float32."""


class Read(NamedTuple):
    """A prompt that was read with the help of cached ones."""

    seconds: float
    """Until the first token was known; looking for a cached prompt is part of it."""
    logits_LV: Tensor
    """Before each token of full reading's answer; float32."""
    answer: Answer | None
    """None if it differs from full reading's and was not asked for."""
    reuse: Reuse
    seconds_to_cache: float
    """What caching it took, after the answer."""


class TooLongError(Exception):
    """A prompt that the model has too few positions for."""


TOO_MUCH = (TooLongError, MemoryError, torch.OutOfMemoryError)
"""What a reading may fail with, and others need not."""


class Reader:
    """One model, and the prompts that are cached of it, which all methods take from. `close` lets go of them."""

    def __init__(self, lm: LongContextLM) -> None:
        """Raises ImportError without faiss; UnsupportedModelError for a model whose prompts cannot be cached."""
        self._lm = lm.with_config(reuse="similar", reuse_options={})
        self._engine = self._lm._engine
        cache = self._engine.prompt_cache
        assert cache is not None
        self._cache = cache

    def warm_up(self, text: str, methods: Sequence[Method]) -> None:
        """Read a text and the same with its halves exchanged by every method, so that no figure of prompts as long has
        the compiling of kernels in it, or the first touch of memory."""
        middle = len(text) // 2
        donor, prompt = self.encode(text), self.encode(text[middle:] + text[:middle])
        with contextlib.suppress(*TOO_MUCH):  # a row will say so
            self.check_length(prompt, 2)
            full = self.full(prompt, 2)
            self.add(donor, _WARMUP_NAMESPACE)
            for method in methods:
                if method.takes_kv:
                    with contextlib.suppress(*TOO_MUCH):
                        self.read(prompt, _WARMUP_NAMESPACE, method, full)
                        self.forget(prompt, _WARMUP_NAMESPACE)
        self.clear(_WARMUP_NAMESPACE)

    def encode(self, prompt: Prompted) -> Prompt:
        """As `LongContextLM.generate` does."""
        return self._lm._encode(prompt if isinstance(prompt, str) else list(prompt))

    def check_length(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raises TooLongError unless the model has positions for a prompt and so many tokens after it."""
        needed, most = len(prompt.token_ids) + max_new_tokens, self._lm.max_positions
        if most is not None and needed > most:
            raise TooLongError(f"{needed} tokens, and the model has {most} positions")

    def full(self, prompt: Prompt, max_new_tokens: int) -> Full:
        """Read with no help. Raises MemoryError for a prompt that does not fit."""
        self._engine.check_fits([prompt], max_new_tokens)
        seconds, session, logits_V = self._in_full(prompt)
        answer = self._continued(session.fork(), logits_V, max_new_tokens)
        return Full(seconds, answer, self._before_each(session, logits_V, answer.token_ids))

    def seconds_in_full(self, prompt: Prompt) -> float:
        """Read once more with no help, for the time alone."""
        return self._in_full(prompt)[0]

    def _in_full(self, prompt: Prompt) -> tuple[float, Session, Tensor]:
        started_at = time.perf_counter()
        session = self._engine.session()
        logits_V = self._engine.read([session], [prompt])[0]
        int(logits_V.argmax())
        return time.perf_counter() - started_at, session, logits_V

    def add(self, prompt: Prompt, namespace: str, max_new_tokens: int | None = None) -> Added:
        """Read a prompt, in full if nothing like it is cached, and cache it. Raises as `full`."""
        self._engine.check_fits([prompt], max_new_tokens or 1)
        reading = self._cache.read(prompt, namespace)
        int(reading.logits_V.argmax())
        answer = None
        if max_new_tokens is not None:
            answer = self._continued(reading.session.fork(), reading.logits_V, max_new_tokens)
        started_at = time.perf_counter()
        reading.finish(0.0)
        return Added(time.perf_counter() - started_at, answer)

    def read(
        self,
        prompt: Prompt,
        namespace: str,
        method: Method,
        full: Full,
        *,
        ratio: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Read:
        """Read by a method, and cache as it does.

        Args:
            full: of the same prompt.
            ratio: in place of the method's own.
            max_new_tokens: as of `full`, if the answer is wanted where it differs.
        """
        cache = self._under(method, ratio)
        started_at = time.perf_counter()
        reading = cache.read(prompt, namespace)
        int(reading.logits_V.argmax())
        seconds = time.perf_counter() - started_at
        logits_LV = self._before_each(reading.session.fork(), reading.logits_V, full.answer.token_ids)
        answer = None
        if logits_LV.argmax(-1).tolist() == full.answer.token_ids:
            answer = full.answer
        elif max_new_tokens is not None:
            answer = self._continued(reading.session, reading.logits_V, max_new_tokens)
        started_at = time.perf_counter()
        reuse = reading.finish(seconds)
        return Read(seconds, logits_LV, answer, reuse, time.perf_counter() - started_at)

    def embedding(self, prompt: Prompt) -> np.ndarray:
        """That by which similar prompts are found, scaled to length 1."""
        found = self._cache._embedding(prompt)
        return found / np.linalg.norm(found)

    def forget(self, prompt: Prompt, namespace: str) -> None:
        """Let go of what is cached of just this prompt."""
        catalog = self._cache.catalog
        for approximate in (False, True):
            record = catalog.entry(namespace, prompt.token_ids, approximate=approximate)
            if record is not None:
                catalog.remove(record)

    def clear(self, namespace: str) -> None:
        """Let go of all prompts of a namespace."""
        self._cache.catalog.clear(namespace)

    def has(self, prompt: Prompt, namespace: str) -> bool:
        """Whether just this prompt is cached."""
        entry = self._cache.catalog.entry
        return any(entry(namespace, prompt.token_ids, approximate=each) is not None for each in (False, True))

    def num_cached(self, namespace: str) -> int:
        """Prompts of a namespace."""
        return self._cache.catalog.statistics(namespace).entries

    def cached_bytes(self, namespace: str) -> int:
        """Host memory of a namespace's prompts."""
        return self._cache.catalog.statistics(namespace).host_bytes

    def close(self) -> None:
        """Let go of all cached prompts."""
        self._lm.close()

    def _under(self, method: Method, ratio: float | None) -> PromptCache:
        """The same cached prompts, read by a method: what is cached of a prompt that was read exactly does not depend
        on how others are read."""
        options = {**method.options, **({} if ratio is None else {"ratio": ratio})}
        view = copy.copy(self._cache)
        view._config = dataclasses.replace(self._lm.config, reuse=method.reuse, reuse_options=options)
        view.options = make_reuse_options(options)
        view._rotations = self._cache._rotations if method.reuse == "similar" else None
        return view

    def _continued(self, session: Session, logits_V: Tensor, max_new_tokens: int) -> Answer:
        """Greedily, up to a token that ends texts."""
        token_ids = [int(logits_V.argmax())]
        with self._engine.layers.active():
            while len(token_ids) < max_new_tokens and token_ids[-1] not in self._engine._stop_ids:
                logits_BV = forward(self._engine.model, [token_ids[-1:]], [session], exact=True)
                token_ids.append(int(logits_BV[0].argmax()))
        text = self._lm.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(token_ids, text)

    def _before_each(self, session: Session, logits_V: Tensor, token_ids: Sequence[int]) -> Tensor:
        """Logits before each of some tokens that follow what a session has read; the session goes on."""
        if len(token_ids) == 1:
            return logits_V[None]
        with self._engine.layers.active():
            later_LV = forward(self._engine.model, [token_ids[:-1]], [session], exact=True, all_logits=True)
        return torch.cat([logits_V[None], later_LV])
