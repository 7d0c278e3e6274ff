"""How a prompt would be read while another one is cached: the edit that makes it from that, and what is computed.

From tokens alone, by the rules of `sentencekv.reuse`; `try_out` reads both prompts to see. Knows nothing of terminals.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sentencekv import LongContextLM
from sentencekv.attention import forward
from sentencekv.config import Config
from sentencekv.engine import Engine
from sentencekv.prompts import Prompt, encode
from sentencekv.reuse.decide import LEAST_SHARED_TOKENS, Decision, ReuseOptions, decide
from sentencekv.reuse.edit import Operation, operations
from sentencekv.reuse.match import Alignment, align
from sentencekv.reuse.recompute import Plan, plan
from sentencekv.reuse.report import Reuse
from sentencekv.session import Session

COMPARED_TOKENS = 16
"""Greedy tokens that `try_out` compares."""

Kind = Literal["prefix", "kept", "moved", "fuzzy", "again", "new", "gone"]
"""What becomes of a token. `prefix`: it is of the beginning that both prompts share. `kept`, `moved`: it is taken from
where it stands in the cached prompt too, or from elsewhere. `fuzzy`: it takes the KV of a similar token. `again`: the
cached prompt has it, and it is computed all the same. `new`: the cached prompt does not have it. `gone`: the new prompt
does not have it."""
KINDS: tuple[Kind, ...] = get_args(Kind)
_CODE = {kind: code for code, kind in enumerate(KINDS)}


class Run(NamedTuple):
    """Tokens that follow one another and share a fate: those of the new prompt, or, if `gone`, of the cached one."""

    kind: Kind
    start: int
    stop: int


class Outcome(NamedTuple):
    """What reading the new prompt comes to under one mode."""

    kind: Literal["none", "same", "prefix", "similar"]
    """As of `Reuse`."""
    computed_tokens: int
    """At the first layer."""
    cost_tokens: int
    """About so many tokens, computed at every layer, are as much work."""
    reason: str
    """Why nothing more is reused; empty if there is nothing more."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A cached prompt, the donor, and a new one in terms of it."""

    donor: Prompt
    prompt: Prompt
    alignment: Alignment
    operations: tuple[Operation, ...]
    """What makes the prompt from the donor."""
    planned: Plan
    """What is computed if all that is aligned is reused."""
    exact: Outcome
    """With `reuse="exact"`."""
    similar: Outcome
    """With `reuse="similar"`."""

    def runs(self) -> Iterator[Run]:
        """The new prompt from its beginning to its end, and what is gone where it stood, if its neighbours stayed."""
        donor_stop = 0
        for operation in self.operations:
            if operation.kind in ("delete", "replace") and operation.donor_start == donor_stop:
                yield Run("gone", operation.donor_start, operation.donor_stop)
            donor_stop = operation.donor_stop
            codes = self.code_T[operation.start : operation.stop]
            cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
            for first, stop in itertools.pairwise(cuts):
                if first < stop:
                    yield Run(KINDS[codes[first]], operation.start + first, operation.start + stop)

    @functools.cached_property
    def code_T(self) -> np.ndarray:  # noqa: N802 it returns a tensor of shape T
        """What becomes of each token of the prompt, an index of `KINDS`; int64 `[T]`."""
        code_T = np.full(self.alignment.num_tokens, _CODE["new"])
        for match in self.alignment.matches:
            code_T[match.start : match.stop] = _CODE[_fate(match.kind, match.shift)]
        again_T = self.planned.computed_T & (self.planned.source_T >= 0)
        code_T[again_T] = _CODE["again"]
        return code_T

    @functools.cached_property
    def donor_code_T(self) -> np.ndarray:  # noqa: N802
        """As `code_T`, of the donor's tokens: where they are used, what becomes of them there."""
        code_T = np.full(self.alignment.donor_tokens, _CODE["gone"])
        for match in self.alignment.matches:
            code_T[match.donor_start : match.donor_stop] = _CODE[_fate(match.kind, match.shift)]
        return code_T

    def counts(self) -> dict[Kind, int]:
        """Tokens of each kind, in the order of `KINDS`; all but `gone` add up to the prompt."""
        counts = np.bincount(self.code_T, minlength=len(KINDS)).tolist()
        counts[_CODE["gone"]] = int(np.count_nonzero(self.donor_code_T == _CODE["gone"]))
        return dict(zip(KINDS, counts, strict=True))

    def text(self, run: Run) -> str:
        """The characters of a run, with what no token has before it."""
        return text_of(self.donor if run.kind == "gone" else self.prompt, run.start, run.stop)


def _fate(kind: str, shift: int) -> Kind:
    if kind == "fuzzy":
        return "fuzzy"
    if kind == "prefix":
        return "prefix"
    return "kept" if shift == 0 else "moved"


def text_of(prompt: Prompt, start: int, stop: int) -> str:
    """The characters of tokens `[start, stop)`; those of neighbouring ranges join without a gap."""
    return prompt.text[_first_char(prompt, start) : _first_char(prompt, stop)]


def _first_char(prompt: Prompt, token: int) -> int:
    if token == len(prompt.spans):
        return len(prompt.text)
    # Special tokens have no characters: their spans are (0, 0), wherever they stand.
    return int(prompt.spans[:token, 1].max()) if token else 0


def explain_texts(
    donor: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    options: ReuseOptions,
    embedding: torch.nn.Module | None = None,
) -> Explanation:
    """As `explain`, of two texts as `LongContextLM.generate` takes them; `embedding`: the model's input embeddings.

    Raises ValueError and TypeError for what is not a text with tokens, and as `explain`.
    """
    prompts = [encode(tokenizer, each, Config(), special_tokens=True) for each in (donor, text)]
    embedding_VE = None if embedding is None else embedding.get_parameter("weight")
    num_layers = model_config.get_text_config().num_hidden_layers
    return explain(prompts[0], prompts[1], options, num_layers=num_layers, embedding_VE=embedding_VE)


def explain(
    donor: Prompt,
    prompt: Prompt,
    options: ReuseOptions,
    *,
    num_layers: int,
    embedding_VE: Tensor | None = None,
) -> Explanation:
    """What reading a prompt would reuse of a donor, if nothing else were cached.

    Args:
        num_layers: of the model; they weigh tokens that are not computed at all of them.
        embedding_VE: the model's input embeddings, for `options.fuzzy`.

    Raises ValueError for `fuzzy` without embeddings.
    """
    alignment = align(
        donor.token_ids,
        prompt.token_ids,
        donor_ends=donor.ends,
        ends=prompt.ends,
        fuzzy=options.matching,
        embedding_VE=embedding_VE,
    )
    exact, similar = _outcomes(donor, prompt, alignment, options, num_layers)
    planned = plan(alignment, options)
    if similar.kind == "same":  # not even its last token is computed
        planned = planned._replace(computed_T=np.zeros_like(planned.computed_T))
    return Explanation(donor, prompt, alignment, tuple(operations(alignment)), planned, exact, similar)


def _outcomes(
    donor: Prompt, prompt: Prompt, alignment: Alignment, options: ReuseOptions, num_layers: int
) -> tuple[Outcome, Outcome]:
    """Under `exact` and under `similar`."""
    num_tokens = alignment.num_tokens
    if alignment.donor_tokens < LEAST_SHARED_TOKENS:
        reason = f"prompts of fewer than {LEAST_SHARED_TOKENS} tokens are not cached"
        return (Outcome("none", num_tokens, num_tokens, reason),) * 2
    if donor.token_ids == prompt.token_ids:
        return (Outcome("same", 0, 0, ""),) * 2
    exact, similar = (decide([alignment], options, num_layers, moves=moves) for moves in (False, True))
    return _outcome(exact, num_tokens, options), _outcome(similar, num_tokens, options)


def _outcome(decision: Decision, num_tokens: int, options: ReuseOptions) -> Outcome:
    way = decision.way
    if way is None:
        return Outcome("none", num_tokens, num_tokens, decision.reason)
    kind: Literal["prefix", "similar"] = "similar" if way.approximate else "prefix"
    return Outcome(kind, int(way.planned.starts_T(options).sum()), way.cost, decision.reason)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What reading both prompts gave."""

    reuse: Reuse
    """Of the new prompt, with the donor cached."""
    seconds_in_full: float
    """Reading the new prompt without a cache."""
    divergence: float
    """KL(full || reuse) of the next token's distributions, in nats: after a full reading, and after this one."""
    token_ids: list[int]
    """The greedy tokens that follow, up to one that ends texts."""
    full_token_ids: list[int]
    """Those after a full reading."""

    @property
    def num_agreeing(self) -> int:
        """How many of the first greedy tokens are those of the full reading."""
        # One is longer only if the other ended before, which is a difference.
        pairs = zip(self.token_ids, self.full_token_ids, strict=False)
        return next((at for at, (ours, full) in enumerate(pairs) if ours != full), len(self.token_ids))


def try_out(lm: LongContextLM, explanation: Explanation, num_tokens: int = COMPARED_TOKENS) -> Trial:
    """Read the donor, then the new prompt with it cached, and once more in full.

    What follows is decoded exactly, so that all that differs is the reading. On a GPU everything is done twice, since
    the first time compiles kernels and pins memory.

    `lm` caches prompts, none so far; it is closed in the end, and can be used again. Raises ValueError or MemoryError
    if the prompts and `num_tokens` more do not fit the model or host memory.
    """
    engine = lm._engine
    donor, prompt = explanation.donor, explanation.prompt
    engine.check_fits([donor, prompt], num_tokens)
    try:
        if engine.model.device.type == "cuda":
            _read_both(engine, donor, prompt, "explain, to warm up", 1)
        return _read_both(engine, donor, prompt, "explain", num_tokens)
    finally:
        lm.close()


def _read_both(engine: Engine, donor: Prompt, prompt: Prompt, namespace: str, num_tokens: int) -> Trial:
    assert engine.prompt_cache is not None
    started_at = time.perf_counter()
    cached = engine.prompt_cache.read(donor, namespace)
    cached.logits_V.cpu()
    cached.finish(time.perf_counter() - started_at)
    started_at = time.perf_counter()
    reading = engine.prompt_cache.read(prompt, namespace)
    logits_V = reading.logits_V.cpu()
    seconds_to_read = time.perf_counter() - started_at
    started_at = time.perf_counter()
    session = engine.session()
    full_V = engine.read([session], [prompt])[0].cpu()
    seconds_in_full = time.perf_counter() - started_at
    log_V, full_log_V = (each.double().log_softmax(-1) for each in (logits_V, full_V))
    token_ids = _continued(engine, reading.session, logits_V, num_tokens)
    return Trial(
        reading.finish(seconds_to_read),
        seconds_in_full,
        # Rounding may leave a tiny negative number.
        max(float((full_log_V.exp() * (full_log_V - log_V)).sum()), 0.0),
        token_ids,
        _continued(engine, session, full_V, num_tokens),
    )


def _continued(engine: Engine, session: Session, logits_V: Tensor, num_tokens: int) -> list[int]:
    """The likeliest tokens, each after those before it, attending to everything; up to one that ends texts."""
    token_ids = [int(logits_V.argmax())]
    with engine.layers.active():
        while len(token_ids) < num_tokens and token_ids[-1] not in engine._stop_ids:
            logits_BV = forward(engine.model, [token_ids[-1:]], [session], exact=True)
            token_ids.append(int(logits_BV[0].argmax()))
    return token_ids


def as_dict(explanation: Explanation, trial: Trial | None = None) -> dict[str, Any]:
    """The explanation in what JSON has. Counts are those of `Reuse`, if all that is aligned is reused."""
    alignment, donor, prompt = explanation.alignment, explanation.donor, explanation.prompt
    result: dict[str, Any] = {
        "donor_tokens": alignment.donor_tokens,
        "prompt_tokens": alignment.num_tokens,
        "operations": [
            {
                **operation._asdict(),
                "donor_text": text_of(donor, operation.donor_start, operation.donor_stop),
                "text": text_of(prompt, operation.start, operation.stop),
            }
            for operation in explanation.operations
        ],
        "prefix_tokens": alignment.num_prefix,
        "kept_tokens": alignment.num_kept,
        "moved_tokens": alignment.num_moved,
        "fuzzy_tokens": alignment.num_fuzzy,
        "recomputed_tokens": explanation.counts()["again"],
        "new_tokens": alignment.num_new,
        "exact": explanation.exact._asdict(),
        "similar": explanation.similar._asdict(),
    }
    if trial is not None:
        result["run"] = {**dataclasses.asdict(trial), "num_agreeing": trial.num_agreeing}
    return result
