"""The demonstration: facts hidden in a long text, questions about them, and whether the answers are right.

Builds, asks and judges; knows nothing of terminals.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from sentencekv import Document, Generation, LongContextLM, Source
from sentencekv.needles import KINDS, Fact, hide, is_right, make_facts, sentence_ends
from sentencekv.prose import generate_prose

ANSWER_TOKENS = 48
"""The most tokens of one answer."""

DEMO_KINDS = tuple(kind for kind in KINDS if kind != "uuid")
"""UUIDs are left out: copying 36 characters without a slip says more about a small model than about reading."""

_QUESTION_TOKENS = 128
"""Room left for a question and its frame when a text is checked against the model's positions."""

_CHARS_PER_TOKEN = 8
"""A prefix of so many characters per token asked for nearly always suffices; if not, it is doubled."""

_SEARCHED_CHARS = 2000
"""How far past the last wanted token a sentence end is looked for."""


@dataclasses.dataclass(frozen=True)
class DemoText:
    """A text with facts hidden in it."""

    text: str
    facts: tuple[Fact, ...]
    spans: tuple[tuple[int, int], ...]
    """Character span of each fact's sentence in `text`."""
    num_tokens: int
    cut_at: float | None
    """The part of the user's text that was used, between 0 and 1; None: all of it, or a generated text."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One fact, the answer to its question, and how good it is."""

    fact: Fact
    span: tuple[int, int]
    generation: Generation
    right: bool

    def is_the_fact(self, source: Source) -> bool:
        """Whether a source is the sentence that holds the fact, or a part of it."""
        return source.start < self.span[1] and source.end > self.span[0]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What all answers of a demonstration come to."""

    num_right: int
    num_facts: int
    seconds_to_first_token: float
    """Median over the answers."""
    seconds_per_token: float | None
    """Median over the answers that had more than one token."""
    kv_gpu_bytes: int
    """Of the largest answer, as are the other bytes."""
    kv_host_bytes: int
    kv_dense_bytes: int
    hot_hit_rate: float | None
    """Mean over the answers that selected anything."""


def build_text(
    lm: LongContextLM, *, tokens: int, num_facts: int, seed: int, user_text: str | None = None, name: str = "the model"
) -> DemoText:
    """At least `tokens` tokens of prose, or the first `tokens` tokens of the user's text, with facts hidden in it.

    A cut is made at the end of a sentence; a shorter text of the user's is used whole. The facts come on top.

    Raises ValueError if the numbers make no sense or the text would not fit in the model's positions.
    """
    for option, value in (("--tokens", tokens), ("--facts", num_facts)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    _check_positions(lm, tokens, tokens, name)
    # A word is at least one token, so that many words are enough.
    source = generate_prose(tokens, seed) if user_text is None else user_text
    end = _end_of_tokens(lm.tokenizer, source, tokens)
    rng = Random(seed)
    facts = tuple(make_facts(rng, num_facts, DEMO_KINDS))
    hidden = hide(source[:end], facts, rng)
    num_tokens = len(lm.tokenizer(hidden.text, verbose=False)["input_ids"])
    _check_positions(lm, num_tokens, tokens, name)
    cut_at = end / len(source) if user_text is not None and end < len(source.rstrip()) else None
    return DemoText(hidden.text, facts, hidden.spans, num_tokens, cut_at)


def ask_all(document: Document, demo: DemoText) -> Iterator[Verdict]:
    """Ask for every fact in turn; greedy, so that a run can be repeated."""
    for fact, span in zip(demo.facts, demo.spans, strict=True):
        generation = document.ask(fact.question, max_new_tokens=ANSWER_TOKENS)
        yield Verdict(fact, span, generation, is_right(generation.text, fact))


def summarize(verdicts: Sequence[Verdict]) -> Summary:
    """What at least one verdict comes to."""
    stats = [verdict.generation.stats for verdict in verdicts]
    paces = [each.seconds_per_token for each in stats if each.seconds_per_token is not None]
    rates = [each.hot_hit_rate for each in stats if each.hot_hit_rate is not None]
    return Summary(
        num_right=sum(verdict.right for verdict in verdicts),
        num_facts=len(verdicts),
        seconds_to_first_token=statistics.median(each.seconds_to_first_token for each in stats),
        seconds_per_token=statistics.median(paces) if paces else None,
        kv_gpu_bytes=max(each.kv_gpu_bytes for each in stats),
        kv_host_bytes=max(each.kv_host_bytes for each in stats),
        kv_dense_bytes=max(each.kv_dense_bytes for each in stats),
        hot_hit_rate=statistics.fmean(rates) if rates else None,
    )


def _check_positions(lm: LongContextLM, num_tokens: int, asked_tokens: int, name: str) -> None:
    room = _QUESTION_TOKENS + ANSWER_TOKENS
    if lm.max_positions is None or num_tokens + room <= lm.max_positions:
        return
    over = num_tokens + room - lm.max_positions
    fitting = asked_tokens - over
    remedy = f"--tokens {fitting}" if fitting > 0 else "fewer --facts"
    raise ValueError(
        f"a text of {num_tokens:,} tokens leaves no room for a question and its answer ({room} tokens): {name!r} has "
        f"positions for {lm.max_positions:,} tokens; use {remedy}, or a model with more positions"
    )


def _end_of_tokens(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> int:
    """The first sentence end with at least so many tokens before it, or the end of the text."""
    num_chars = tokens * _CHARS_PER_TOKEN
    while True:
        prefix = text[:num_chars]
        spans = tokenizer(prefix, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(spans) > tokens or len(prefix) == len(text):
            break
        num_chars *= 2
    if len(spans) <= tokens:
        return len(text)
    cut = int(spans[tokens][0])
    ends = sentence_ends(text[cut : cut + _SEARCHED_CHARS])
    return cut + ends[0] if ends else cut
