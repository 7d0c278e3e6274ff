"""Fuzzy matches against brute force: in order, in the band, one to one and the best there is; or simply the nearest."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv.reuse import fuzzy as fuzzy_module
from sentencekv.reuse.fuzzy import FuzzyOptions, fuzzy_sources
from sentencekv.reuse.runs import Run
from triton_ops import token_signatures

WORDS = 100
"""Token t and token t + WORDS are synonyms."""


def embeddings(device: torch.device | None = None, noise: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((WORDS, 64), generator=generator)
    likes = embedding + noise * torch.randn(embedding.shape, generator=generator)
    return torch.cat([embedding, likes]).to(device)


def sources(
    donor: list[int], ids: list[int], options: FuzzyOptions, runs: list[Run] | None = None, table: Tensor | None = None
) -> list[int]:
    table = embeddings() if table is None else table
    source = fuzzy_sources(np.array(donor, np.int64), np.array(ids, np.int64), runs or [], options, table)
    assert source.dtype == np.int64
    assert source.shape == (len(ids),)
    return source.tolist()


def distances(donor: list[int], ids: list[int], options: FuzzyOptions) -> np.ndarray:
    """Of all pairs, each text's positions counted from its start."""
    table = embeddings()
    generator = torch.Generator().manual_seed(options.seed)
    planes = torch.randn((table.shape[1], options.num_bits), generator=generator)
    words = [
        token_signatures(torch.tensor(text), table, torch.arange(len(text)), planes, base=options.rope_base)
        for text in (ids, donor)
    ]
    bits = [np.unpackbits(word.numpy().view(np.uint8), axis=1) for word in words]
    return (bits[0][:, None] != bits[1][None, :]).sum(2)


def heaviest(weight: np.ndarray) -> int:
    """The largest total of a set of pairs in order, one to one."""
    best = np.zeros((weight.shape[0] + 1, weight.shape[1] + 1), np.int64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + weight[i, j])
    return int(best[-1, -1])


texts = st.lists(st.integers(0, 2 * WORDS - 1), min_size=1, max_size=14)


@st.composite
def likes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A text, and another that is like it in part."""
    donor = draw(texts)
    kept = [(token + WORDS * draw(st.integers(0, 1))) % (2 * WORDS) for token in donor if draw(st.integers(0, 3))]
    at = draw(st.integers(0, len(kept)))
    return donor, kept[:at] + draw(st.lists(st.integers(0, 2 * WORDS - 1), max_size=3)) + kept[at:] or [0]


@settings(max_examples=60, deadline=None)
@given(likes(), st.integers(0, 5), st.integers(20, 70), st.sampled_from([1024, 3]))
def test_the_best_alignment_in_the_band(
    both: tuple[list[int], list[int]], band_tokens: int, max_distance: int, rows: int
) -> None:
    donor, ids = both
    options = FuzzyOptions(band_tokens=band_tokens, max_distance=max_distance)
    with mock.patch.object(fuzzy_module, "_ROWS", rows):
        pairs = [(t, s) for t, s in enumerate(sources(donor, ids, options)) if s >= 0]
    distance = distances(donor, ids, options)
    for (_, a), (_, b) in pairwise(pairs):
        assert a < b
    for t, s in pairs:
        assert abs(t - s) <= band_tokens
        assert t // rows == s // rows
        assert distance[t, s] <= max_distance
    t, s = np.indices(distance.shape)
    allowed = (abs(t - s) <= band_tokens) & (t // rows == s // rows)
    weight = np.where(allowed, np.maximum(max_distance + 1 - distance, 0), 0)
    assert sum(weight[pair] for pair in pairs) == heaviest(weight)


def test_a_sentence_of_synonyms_is_matched_token_to_token(device: torch.device) -> None:
    sentence = list(range(10, 40))
    donor = [1, 2, 3, *sentence, 4, 5, 6]
    ids = [1, 2, 3, *(token + WORDS for token in sentence), 4, 5, 6]
    found = sources(donor, ids, FuzzyOptions(), [Run(0, 0, 3), Run(33, 33, 3)], embeddings(device))
    assert found == [-1] * 3 + list(range(3, 33)) + [-1] * 3


@pytest.mark.parametrize("at", [4, 12, 20])
def test_an_inserted_word_shifts_what_follows(at: int) -> None:
    donor = list(range(10, 40))
    ids = [token + WORDS for token in donor]
    ids.insert(at, 77)
    assert sources(donor, ids, FuzzyOptions()) == [*range(at), -1, *range(at, 30)]
    ids = [token + WORDS for token in donor]
    del ids[at]
    assert sources(donor, ids, FuzzyOptions()) == [t for t in range(30) if t != at]


def test_a_gap_goes_where_its_neighbours_went() -> None:
    """A moved paragraph of two runs, some words between them changed, and the same words elsewhere in the donor."""
    words = list(range(50, 58))
    donor = [*words, 1, 2, 3, 4, *words, 5, 6, 7, 8]
    ids = [90, *(1, 2, 3, 4), *(word + WORDS for word in words), *(5, 6, 7, 8), 91]
    runs = [Run(8, 1, 4), Run(20, 13, 4)]
    assert sources(donor, ids, FuzzyOptions(), runs) == [-1] * 5 + list(range(12, 20)) + [-1] * 5


def test_a_gap_between_runs_out_of_order_goes_to_what_is_most_like_it() -> None:
    one, other, third = list(range(20, 30)), list(range(40, 50)), list(range(60, 70))
    # In the donor `a` stands before `b`; in the prompt it stands after it, and twice there are words between them.
    donor = [*one, 1, 1, *other, 2, 2, *third, 3, 3]
    ids = [3, 3, *(word + WORDS for word in other), 2, 2, *(word + WORDS for word in third), 1, 1]
    runs = [Run(34, 0, 2), Run(22, 12, 2), Run(10, 24, 2)]
    expected = [-1] * 2 + list(range(12, 22)) + [-1] * 2 + list(range(24, 34)) + [-1] * 2
    assert sources(donor, ids, FuzzyOptions(), runs) == expected


def test_gaps_of_the_prompt_share_no_donor_token() -> None:
    """Both lie around the same words of the donor; the gap that has no others around it gets them."""
    one, other = list(range(20, 30)), list(range(40, 50))
    donor = [1, 1, *one, 2, 2, *other, 3, 3]
    likes = [word + WORDS for word in (*one, *other)]
    ids = [1, 1, *likes, 3, 3, 2, 2, *likes[10:]]
    runs = [Run(0, 0, 2), Run(24, 22, 2), Run(12, 24, 2)]
    found = sources(donor, ids, FuzzyOptions(), runs)
    assert found == [-1] * 2 + list(range(2, 12)) + [-1] * 14 + list(range(14, 24))


def test_nothing_is_matched_with_nothing_between_the_neighbours() -> None:
    """Words that were inserted stay new, though the donor has the same elsewhere."""
    donor = [1, 2, 3, 4, *range(50, 60)]
    ids = [1, 2, *range(50, 60), 3, 4]
    assert sources(donor, ids, FuzzyOptions(), [Run(0, 0, 2), Run(2, 12, 2)]) == [-1] * 14


@settings(max_examples=30, deadline=None)
@given(texts, texts, st.integers(0, 128), st.booleans())
def test_without_order_each_token_takes_its_nearest(
    donor: list[int], ids: list[int], max_distance: int, with_run: bool
) -> None:
    """Many to one, matched donor tokens included; of equally near ones the first; blocks of any size."""
    options = FuzzyOptions(monotone=False, max_distance=max_distance)
    runs = [Run(0, 0, 1)] if with_run else []
    with mock.patch.object(fuzzy_module, "_NEAREST_BLOCKS", (3, 5)):
        found = sources(donor, ids, options, runs)
    distance = distances(donor, ids, options)
    nearest = np.where(distance.min(1) <= max_distance, distance.argmin(1), -1)
    nearest[: len(runs)] = -1
    assert found == nearest.tolist()


@pytest.mark.parametrize("monotone", [True, False])
def test_empty_texts(monotone: bool) -> None:
    options = FuzzyOptions(monotone=monotone)
    assert sources([], [], options) == []
    assert sources([], [1, 2], options) == [-1, -1]
    assert sources([1, 2], [], options) == []
    assert sources([1, 2], [1, 2], options, [Run(0, 0, 2)]) == [-1, -1]


@pytest.mark.parametrize("num_bits", [32, 96, 160])
def test_any_number_of_words(num_bits: int) -> None:
    options = FuzzyOptions(num_bits=num_bits, max_distance=num_bits // 3)
    assert sources(list(range(9)), list(range(9)), options) == list(range(9))


def test_the_seed_decides() -> None:
    donor, ids = list(range(0, 60)), list(range(130, 190))
    loose = {"max_distance": 60, "band_tokens": 40}
    found = [sources(donor, ids, FuzzyOptions(seed=seed, **loose)) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bits", 0),
        ("num_bits", 100),
        ("band_tokens", -1),
        ("max_distance", -1),
        ("max_distance", 129),
        ("rope_base", 1),
    ],
)
def test_bad_options_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        FuzzyOptions(**{name: value})


@pytest.mark.parametrize("table", [torch.zeros(200), torch.zeros(200, 5)])
def test_tables_of_another_form_are_refused(table: Tensor) -> None:
    with pytest.raises(ValueError, match="embedding_VE must be"):
        sources([1], [2], FuzzyOptions(), table=table)


@pytest.mark.parametrize(("donor", "ids"), [([200], [1]), ([1], [-1])])
def test_ids_without_an_embedding_are_refused(donor: list[int], ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rows of embedding_VE, 0\.\.199"):
        sources(donor, ids, FuzzyOptions())
