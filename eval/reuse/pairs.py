"""What reuse is tried on: a cached prompt and one that is read with its help. Pure data and text, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from sentencekv.needles import sentence_ends
from sentencekv.prompts import Message
from sentencekv.prose import generate_prose

Prompted = str | tuple[Message, ...]
"""A text that is continued as it is, or chat messages."""

PASSAGE_TOKENS = 64
"""Shorter paragraphs join the one after them; longer ones are cut at sentence ends, at four times this or before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Pairs with the same donor stand together, and are tried on one reading of it."""

    task: str
    id: str
    """Its own within the task and length."""
    length: int
    """Tokens that were asked for."""
    text: str
    """The same for all that are made of the same passages: what is true of one may be true of all, so that intervals
    are over texts, not prompts. Texts drawn from one file may overlap, and say nothing of other files."""
    donor: Prompted
    prompt: Prompted
    max_new_tokens: int = 32
    answers: tuple[str, ...] = ()
    """What is right after `prompt`; none: only full reading's continuation is compared with."""
    donor_answers: tuple[str, ...] = ()
    """What was right after `donor`, and is wrong now."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What tables group by; numbers and strings."""


class Source:
    """Texts to make prompts of, one after the other; generated prose, another for each number, if there are none."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, *, first_seed: int = 0
    ) -> None:
        """`tokens`: how many each has to have; `first_seed`: of generated prose. Raises ValueError for a text with
        fewer."""
        self._tokenizer, self._texts, self._tokens, self._first_seed = tokenizer, texts, tokens, first_seed
        self._made: dict[int, tuple[list[str], list[int]]] = {}
        for number, text in enumerate(texts):
            found = sum(self._measured(number)[1])
            if found < tokens:
                raise ValueError(
                    f"text {number + 1} of {len(texts)} has {found:,} tokens in paragraphs ({text[:40]!r}...), and "
                    f"{tokens:,} are needed; give a longer one, or ask for fewer tokens"
                )

    def passages(self, number: int) -> list[str]:
        """All of a text, cut into passages of some paragraphs or part of one."""
        return self._measured(number)[0]

    def _measured(self, number: int) -> tuple[list[str], list[int]]:
        """With the tokens of each."""
        if self._texts:
            number %= len(self._texts)
        if number not in self._made:
            # A word is at least one token.
            text = self._texts[number] if self._texts else generate_prose(self._tokens, seed=self._first_seed + number)
            passages = passages_of(self._tokenizer, text)
            self._made[number] = passages, self.lengths(passages)
        return self._made[number]

    def lengths(self, parts: Sequence[str]) -> list[int]:
        """Tokens of each."""
        if not parts:
            return []
        return [len(ids) for ids in self._tokenizer(list(parts), add_special_tokens=False, verbose=False).input_ids]

    def some(self, number: int, counts: Sequence[int], rng: Random) -> list[list[str]]:
        """Runs of passages that follow one another, one of at least so many tokens for each count, none twice; from a
        random place of the text on, over its end to its beginning."""
        passages, lengths = self._measured(number)
        at = rng.randrange(len(passages))
        runs: list[list[str]] = []
        taken = 0
        for count in counts:
            run: list[str] = []
            held = 0
            while held < count and taken < len(passages):
                run.append(passages[at])
                held += lengths[at]
                at, taken = (at + 1) % len(passages), taken + 1
            runs.append(run)
        return runs


def passages_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """A text's paragraphs, each on one line, short ones joined and long ones cut."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    units = [unit for paragraph in paragraphs if paragraph for unit in [*_pieces_of(paragraph), "\n\n"]]
    lengths = [len(ids) for ids in tokenizer(units, add_special_tokens=False, verbose=False).input_ids] if units else []
    passages: list[str] = []
    passage, held = "", 0
    for unit, length in zip(units, lengths, strict=True):
        full = held + length > 4 * PASSAGE_TOKENS or (unit == "\n\n" and held >= PASSAGE_TOKENS)
        if full and passage:
            passages.append(passage.strip())
            passage, held = "", 0
        if passage or unit != "\n\n":
            passage, held = passage + unit, held + length
    return [*passages, passage.strip()] if passage else passages


def _pieces_of(paragraph: str) -> Iterator[str]:
    """Its sentences; those that hardly end, in pieces of some words."""
    for sentence in sentences_of(paragraph):
        words = sentence.split(" ")
        for start in range(0, len(words), PASSAGE_TOKENS):
            stop = start + PASSAGE_TOKENS
            yield " ".join(words[start:stop]) + (" " if stop < len(words) else "")


def sentences_of(text: str) -> list[str]:
    """A text cut behind its sentences and the white space that follows each; joined they are the text."""
    found: list[str] = []
    start = 0
    for end in sentence_ends(text):
        stop = next((at for at in range(end, len(text)) if not text[at].isspace()), len(text))
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]] if start < len(text) else found
