"""Prompts made of passages of one text: most of them cached in another order, or, for control, none of them."""

from __future__ import annotations

from random import Random

from eval.reuse.pairs import Pair, Source

TASKS = ("moved", "random_donor", "wrong_donor")


def moved(source: Source, *, tokens: int, share: float, cases: int, seed: int = 0) -> list[Pair]:
    """Prompts with a share of their tokens in passages that the donor has too, both in an order of their own.

    The other passages are from further on in the same text, so that they are about the same people and things. Raises
    ValueError where there is just one passage to put in another order.
    """
    return [_pair(source, number, tokens, share, seed) for number in range(cases)]


def random_donor(source: Source, *, tokens: int, share: float, cases: int, seed: int = 0) -> list[Pair]:
    """The prompts of `moved`, each after the donor of another case: of the same text only by chance, and then of
    another place in it."""
    pairs = moved(source, tokens=tokens, share=share, cases=max(cases, 2), seed=seed)
    return [
        Pair(
            task="random_donor",
            id=pair.id,
            length=tokens,
            text=pair.text,
            donor=pairs[(number + 1) % len(pairs)].donor,
            prompt=pair.prompt,
        )
        for number, pair in enumerate(pairs[:cases])
    ]


def wrong_donor(source: Source, other: Source, *, tokens: int, share: float, cases: int, seed: int = 0) -> list[Pair]:
    """The prompts of `moved`, each after a donor from `other`: texts that have nothing to do with it."""
    pairs = []
    for number, pair in enumerate(moved(source, tokens=tokens, share=share, cases=cases, seed=seed)):
        (passages,) = other.some(number, [tokens], Random(f"wrong/{seed}/{number}"))
        pairs.append(
            Pair(
                task="wrong_donor",
                id=pair.id,
                length=tokens,
                text=pair.text,
                donor="\n\n".join(passages),
                prompt=pair.prompt,
            )
        )
    return pairs


def _pair(source: Source, number: int, tokens: int, share: float, seed: int) -> Pair:
    rng = Random(f"moved/{tokens}/{share}/{seed}/{number}")
    num_shared = round(share * tokens)
    shared, old, new = source.some(number, [num_shared, tokens - num_shared, tokens - num_shared], rng)
    donor, prompt = [*shared, *old], [*shared, *new]
    rng.shuffle(donor)
    rng.shuffle(prompt)
    if donor == prompt and len(set(prompt)) < 2:
        raise ValueError(
            f"with {tokens:,} tokens and a share of {share:g} a prompt is one passage, which has no other order; ask "
            "for more tokens, or a lower share"
        )
    while donor == prompt:
        rng.shuffle(prompt)
    return Pair(
        task="moved",
        id=f"{seed}-{number}",
        length=tokens,
        text=f"{seed}-{number}",
        donor="\n\n".join(donor),
        prompt="\n\n".join(prompt),
        extra={"share": share, "ends": "new" if prompt[-1] in new else "moved"},
    )
