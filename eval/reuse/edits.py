"""Controlled edits of a text: by kind, by where they are, and by how much of the text they touch.

`share` is of tokens: those of the sentences that are edited or moved, or, of insertions, the tokens inserted over the
tokens there were. A kind that finds less to edit edits all that it finds; what it came to is `edited` of each pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from eval.reuse.pairs import Pair, Source, sentences_of

PLACES = ("begin", "middle", "end", "everywhere")
"""From the first sentence on; from the middle outwards; from the last one back; drawn at random. What is inserted goes
to one place, but `everywhere`."""

_NAMES = (
    "Abelard", "Benedikta", "Caspian", "Delphine", "Evander", "Florian", "Giselle", "Hortense", "Isidore", "Jocasta",
    "Kasimir", "Leopold", "Mirabel", "Nicodemus", "Ottilie", "Perpetua", "Quillon", "Rosamund", "Severin", "Thaddeus",
)  # fmt: skip
_NUMBER_WORDS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty",
    "forty", "fifty", "hundred", "thousand",
)  # fmt: skip
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
"""A capital within a sentence."""
_NUMBER = re.compile(rf"\d+|\b(?:{'|'.join(_NUMBER_WORDS)})\b")
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|had|will|would|shall|should|can|could|may|might|must|did|does|do)\b")
_NEGATION = re.compile(r" not\b")


class _Edited(NamedTuple):
    text: str
    edited_tokens: int


def edits(
    source: Source,
    *,
    tokens: int,
    cases: int,
    shares: Sequence[float],
    places: Sequence[str] = PLACES,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[list[Pair], list[str]]:
    """Every kind of edit at every place and share, of one text for each case; and what fell short, by name: edits that
    found less to edit than was asked for, and those left out since a smaller share edits as much, or there is nothing.
    """
    pairs: list[Pair] = []
    short: list[str] = []
    for number in range(cases):
        rng = Random(f"edits/{tokens}/{seed}/{number}")
        passages, spare = source.some(number, [tokens, tokens], rng)
        donor = "\n\n".join(passages)
        for kind in kinds or KINDS:
            for place in places:
                most = 0
                for share in sorted(shares):
                    name = f"{seed}-{number}-{place}-{share:g}"
                    edited = KINDS[kind](_Text(source, passages, spare), place, share, Random(f"{name}/{kind}"))
                    if edited.text == donor or edited.edited_tokens <= most:
                        short.append(f"{kind} {name} (left out)")
                        continue
                    most = edited.edited_tokens
                    done = edited.edited_tokens / sum(source.lengths(passages))
                    if done < share:
                        short.append(f"{kind} {name} ({done:.2g})")
                    pairs.append(
                        Pair(
                            task=kind,
                            id=name,
                            length=tokens,
                            text=f"{seed}-{number}",
                            donor=donor,
                            prompt=edited.text,
                            extra={"place": place, "share": share, "edited": round(done, 4)},
                        )
                    )
    return pairs, short


class _Text:
    """A text in pieces, sentences or passages; joined they are the text."""

    def __init__(self, source: Source, passages: Sequence[str], spare: Sequence[str]) -> None:
        self._source = source
        self.passages = [passage + "\n\n" for passage in passages[:-1]] + list(passages[-1:])
        self.sentences = [sentence for passage in self.passages for sentence in sentences_of(passage)]
        self.spare = [sentence.strip() for passage in spare for sentence in sentences_of(passage)]

    def lengths(self, pieces: Sequence[str]) -> list[int]:
        return self._source.lengths(pieces)


def order(count: int, place: str, rng: Random) -> list[int]:
    """Pieces by how early their turn comes to be edited."""
    if place == "everywhere":
        return rng.sample(range(count), count)
    wanted = {"begin": 0.0, "middle": (count - 1) / 2, "end": float(count)}[place]
    return sorted(range(count), key=lambda at: abs(at - wanted))


def _some(lengths: Sequence[int], turns: Sequence[int], share: float) -> list[int]:
    """The first in turn that together have that share of the tokens, in the order of the text; one at least."""
    found: list[int] = []
    held = 0
    for at in turns:
        if found and held >= share * sum(lengths):
            break
        found.append(at)
        held += lengths[at]
    return sorted(found)


def _words(change: Callable[[str, dict[str, str], Random], str]) -> Callable[[_Text, str, float, Random], _Edited]:
    """An edit within sentences. `change` gives the sentence as it is where it has nothing to change."""

    def edit(text: _Text, place: str, share: float, rng: Random) -> _Edited:
        lengths = text.lengths(text.sentences)
        pieces = list(text.sentences)
        renamed: dict[str, str] = {}
        held = 0
        for at in order(len(pieces), place, rng):
            if held >= share * sum(lengths):
                break
            pieces[at] = change(pieces[at], renamed, rng)
            held += lengths[at] if pieces[at] != text.sentences[at] else 0
        return _Edited("".join(pieces), held)

    return edit


def _rename(sentence: str, renamed: dict[str, str], rng: Random) -> str:
    """The same name becomes the same other one all over a text."""

    def other(match: re.Match[str]) -> str:
        return renamed.setdefault(match[0], rng.choice([name for name in _NAMES if name != match[0]]))

    return _NAME.sub(other, sentence)


def _recount(sentence: str, _: dict[str, str], rng: Random) -> str:
    def other(match: re.Match[str]) -> str:
        if not match[0].isdigit():
            return rng.choice([word for word in _NUMBER_WORDS if word != match[0]])
        low = 10 ** (len(match[0]) - 1)
        return str(low + (int(match[0]) - low + rng.randrange(1, 9 * low)) % (9 * low))

    return _NUMBER.sub(other, sentence)


def _negate(sentence: str, _: dict[str, str], rng: Random) -> str:
    if _NEGATION.search(sentence):
        return _NEGATION.sub("", sentence, count=1)
    return _VERB.sub(lambda match: f"{match[0]} not", sentence, count=1)


def _insert(text: _Text, place: str, share: float, rng: Random) -> _Edited:
    """All at one place, or each at another."""
    wanted = share * sum(text.lengths(text.sentences))
    before: list[list[str]] = [[] for _ in range(len(text.sentences) + 1)]
    turns = order(len(before), place, rng)
    num_places = len(turns) if place == "everywhere" else 1
    held = 0
    for number, (sentence, length) in enumerate(zip(text.spare, text.lengths(text.spare), strict=True)):
        if held >= wanted:
            break
        before[turns[number % num_places]].append(sentence)
        held += length
    pieces = ["".join(f"{each} " for each in added) + s for added, s in zip(before, text.sentences, strict=False)]
    return _Edited("".join([*pieces, *(f" {each}" for each in before[-1])]), held)


def _reorder(text: _Text, place: str, share: float, rng: Random) -> _Edited:
    return _moved(text, text.sentences, place, share, rng)


def _move_passages(text: _Text, place: str, share: float, rng: Random) -> _Edited:
    return _moved(text, text.passages, place, share, rng)


def _moved(text: _Text, pieces: Sequence[str], place: str, share: float, rng: Random) -> _Edited:
    """Some pieces in one another's places, none in its own; white space stays where it is."""
    lengths = text.lengths(pieces)
    turns = order(len(pieces), place, rng)
    chosen = _some(lengths, turns, share)
    if len(chosen) == 1:
        chosen = sorted(turns[:2])
    shuffled = rng.sample(chosen, len(chosen))
    come_from = dict(zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True))
    placed = list(pieces)
    for at, origin in come_from.items():
        end = pieces[at][len(pieces[at].rstrip()) :]
        placed[at] = pieces[origin].rstrip() + end
    return _Edited("".join(placed), sum(lengths[at] for at in chosen))


KINDS: dict[str, Callable[[_Text, str, float, Random], _Edited]] = {
    "entity": _words(_rename),
    "number": _words(_recount),
    "negation": _words(_negate),
    "insertion": _insert,
    "reorder": _reorder,
    "moved": _move_passages,
}
"""Names for other names, numbers for others, a `not` more or less; sentences put in from elsewhere in the text;
sentences, or whole passages, in one another's places."""
