"""Invariants of the generated prose: deterministic, varied, free of long numbers."""

import re
import time
from collections import Counter

import pytest

from sentencekv.prose import generate_prose

_ABBREVIATION = re.compile(r"\b(Mrs?|Dr|Capt|Prof|Rev|Col|St)\.|\b([ap])\.m\.(?! [A-Z])")


def _sentences(text: str) -> list[str]:
    text = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    pieces = re.split(r'\n+|(?<=[.!?])\s+|(?<=[.!?]")\s+', text)
    return [piece.strip() for piece in pieces if re.search("[a-z]", piece)]


@pytest.mark.parametrize("seed", [0, 1, 2, 17])
def test_few_sentences_repeat(seed: int) -> None:
    sentences = _sentences(generate_prose(12_000, seed))
    repeats = sum(count - 1 for count in Counter(sentences).values())
    assert repeats < 0.03 * len(sentences)


def test_same_seed_same_text_and_other_seeds_differ() -> None:
    assert generate_prose(3_000, 5) == generate_prose(3_000, 5)
    texts = [set(_sentences(generate_prose(6_000, seed))) for seed in range(6)]
    for index, text in enumerate(texts):
        for other in texts[:index]:
            assert len(text & other) < 0.05 * len(text)


@pytest.mark.parametrize("num_words", [0, 1, 250, 12_000])
def test_length_is_at_least_what_was_asked_for_and_little_more(num_words: int) -> None:
    assert num_words <= len(generate_prose(num_words, 3).split()) <= num_words + 400 * (num_words > 0)


def test_a_longer_text_begins_with_the_shorter_one() -> None:
    assert generate_prose(4_000, 9).startswith(generate_prose(1_000, 9))


@pytest.mark.parametrize("seed", range(8))
def test_form(seed: int) -> None:
    text = generate_prose(8_000, seed)
    assert not re.search(r"\d{5}", text)
    assert not re.search(r"[{}]|\?[.,;]|(?<!\.)\.\.(?!\.)|  ", text)
    assert not re.search(r"\b[Aa] [aeio]", text)
    assert text.startswith("Chapter 1\n\n")
    lengths = [len(sentence.split()) for sentence in _sentences(text)]
    assert max(lengths) <= 45
    assert 8 < sum(lengths) / len(lengths) < 20
    assert min(lengths) <= 6
    assert sum(length >= 25 for length in lengths) > 20
    for mark in ("Mr", '"', "?", "!", ";", "My dear ", "Chapter 4"):
        assert mark in text, mark


def test_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="num_words must be at least 0, got -1"):
        generate_prose(-1)


def test_fast() -> None:
    started = time.perf_counter()
    generate_prose(20_000)
    assert time.perf_counter() - started < 1
