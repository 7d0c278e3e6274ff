"""Alignments: what is found after an edit, what they count, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv.reuse.match import Alignment, FuzzyOptions, Match, align

SENTENCE = 12
PARAGRAPH = 60


def tokens(start: int, number: int = PARAGRAPH) -> list[int]:
    """Tokens of a paragraph of its own."""
    return list(range(start, start + number))


A, B, C, D = (tokens(start) for start in (1000, 2000, 3000, 4000))


def aligned(donor: list[int], ids: list[int], **options: object) -> Alignment:
    """With a sentence end after every 12 tokens; those of two texts need not agree."""
    donor_ends, ends = ([*range(SENTENCE, len(text), SENTENCE), len(text)] for text in (donor, ids))
    return align(donor, ids, donor_ends=donor_ends, ends=ends, **options)


def new_ranges(alignment: Alignment) -> list[tuple[int, int]]:
    """Runs of tokens without a match, as (start, stop), in order."""
    new_T = np.pad(alignment.source_T() < 0, 1)
    edges = np.flatnonzero(np.diff(new_T.astype(np.int64)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def test_an_identical_prompt_is_one_prefix() -> None:
    alignment = aligned(A + B, A + B)
    assert alignment.matches == (Match(0, 0, 120, "prefix"),)
    assert alignment.num_prefix == alignment.num_tokens == 120


def test_a_moved_paragraph() -> None:
    alignment = aligned(A + B + C + D, A + C + B + D)
    assert alignment.matches == (
        Match(0, 0, 60, "prefix"),
        Match(120, 60, 60, "exact"),
        Match(60, 120, 60, "exact"),
        Match(180, 180, 60, "exact"),
    )
    assert [match.shift for match in alignment.matches] == [0, -60, 60, 0]
    assert (alignment.num_prefix, alignment.num_kept, alignment.num_moved, alignment.num_new) == (60, 60, 120, 0)


@pytest.mark.parametrize("number", [1, 7, 40])
@pytest.mark.parametrize("at", [0, 1, 31, 60, 100])
def test_insertion(number: int, at: int) -> None:
    donor = A + B
    alignment = aligned(donor, donor[:at] + tokens(9000, number) + donor[at:])
    assert new_ranges(alignment) == [(at, at + number)]
    assert alignment.num_prefix == at
    assert alignment.num_moved == 120 - at


@pytest.mark.parametrize("number", [1, 7, 40])
@pytest.mark.parametrize("at", [0, 1, 31, 60])
def test_deletion(number: int, at: int) -> None:
    donor = A + B
    alignment = aligned(donor, donor[:at] + donor[at + number :])
    assert alignment.num_new == 0
    assert alignment.num_prefix == at
    assert [match.donor_start for match in alignment.matches] == ([0, at + number] if at else [number])


def test_replacement_of_equal_length_keeps_the_rest_in_place() -> None:
    alignment = aligned(A + B, A[:20] + tokens(9000, 10) + A[30:] + B)
    assert new_ranges(alignment) == [(20, 30)]
    assert (alignment.num_prefix, alignment.num_kept, alignment.num_moved) == (20, 90, 0)


def test_a_duplicated_paragraph_is_matched_once() -> None:
    alignment = aligned(A + B, A + B + B)
    assert alignment.matches == (Match(0, 0, 120, "prefix"),)
    assert new_ranges(alignment) == [(120, 180)]


def test_short_runs_are_not_reported() -> None:
    donor, ids = tokens(5000, 5) + A[:15] + tokens(6000, 5), tokens(7000, 9) + A[:15] + tokens(8000, 4)
    assert aligned(donor, ids).matches == ()
    assert aligned(donor, ids, min_run_tokens=15).matches == (Match(5, 9, 15, "exact"),)


@pytest.mark.parametrize(("donor", "ids"), [([], []), (A, []), ([], A)])
def test_empty_texts(donor: list[int], ids: list[int]) -> None:
    alignment = align(donor, ids, donor_ends=[len(donor)] if donor else [], ends=[len(ids)] if ids else [])
    assert alignment == Alignment(len(donor), len(ids), ())
    assert alignment.num_new == len(ids)
    assert alignment.source_T().tolist() == [-1] * len(ids)


def test_texts_that_were_cut_in_different_ways() -> None:
    donor, ids = A + B + C, C + A + B
    whole = align(donor, ids, donor_ends=[len(donor)], ends=[len(ids)])
    pieces = align(donor, ids, donor_ends=[*range(5, 180, 5), 180], ends=[*range(7, 180, 7), 180])
    assert whole == pieces == aligned(donor, ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_what_an_alignment_counts(donor: list[int], ids: list[int]) -> None:
    """Token by token, from where each comes."""
    alignment = aligned(donor, ids, min_run_tokens=3)
    source = alignment.source_T()
    assert source.dtype == np.int64
    assert source.shape == (len(ids),)
    kinds = {t: match for match in alignment.matches for t in range(match.start, match.stop)}
    assert sorted(kinds) == np.flatnonzero(source >= 0).tolist()
    assert all(donor[source[t]] == ids[t] for t in kinds)
    assert alignment.num_prefix == sum(match.kind == "prefix" for match in kinds.values())
    assert alignment.num_kept == sum(match.kind == "exact" and source[t] == t for t, match in kinds.items())
    assert alignment.num_moved == sum(match.kind == "exact" and source[t] != t for t, match in kinds.items())
    assert alignment.num_fuzzy == 0
    assert alignment.num_new == np.count_nonzero(source < 0)


def test_alignments_are_the_same_for_any_kind_of_row() -> None:
    donor, ids = A + B + C, B + A + [1] + C
    ends = [len(ids)]
    expected = align(donor, ids, donor_ends=[len(donor)], ends=ends)
    for kind in (np.int32, np.int64):
        rows = (np.array(donor, kind), np.array(ids, kind))
        assert align(*rows, donor_ends=np.array([len(donor)], kind), ends=np.array(ends, kind)) == expected


def test_fuzzy_matches_fill_gaps_and_change_nothing_else() -> None:
    """Between runs, a sentence of other ids whose embeddings are near."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((200, 64), generator=generator)
    embedding[100:] = embedding[:100] + 0.3 * torch.randn((100, 64), generator=generator)
    donor = [i * 7 % 90 for i in range(90)]
    ids = donor[40:70] + [99] + donor[:20] + [token + 100 for token in donor[20:30]] + donor[30:40]
    exact = aligned(donor, ids)
    assert new_ranges(exact) == [(30, 31), (51, 71)]
    alignment = aligned(donor, ids, fuzzy=FuzzyOptions(), embedding_VE=embedding)
    assert tuple(match for match in alignment.matches if match.kind != "fuzzy") == exact.matches
    assert [match.start for match in alignment.matches] == sorted(match.start for match in alignment.matches)
    # The ten tokens after them are equal, too few for a run.
    assert alignment.matches[-1] == Match(20, 51, 20, "fuzzy")
    assert alignment.num_new + alignment.num_fuzzy == exact.num_new


BAD = {
    "ends do not cover the tokens": ({"ends": [30]}, "ends must rise"),
    "ends fall": ({"ends": [40, 30, 60]}, "ends must rise"),
    "ends are negative": ({"ends": [-1, 60]}, "ends must rise"),
    "no ends": ({"donor_ends": []}, "donor_ends must rise"),
    "a batch": ({"ids": [A]}, "ids must be one row"),
    "no run is that short": ({"min_run_tokens": 0}, "min_run_tokens"),
    "no embeddings": ({"fuzzy": FuzzyOptions()}, "embedding_VE=None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused(name: str) -> None:
    changes, message = BAD[name]
    arguments = {"donor_ids": A, "ids": A, "donor_ends": [60], "ends": [60], **changes}
    with pytest.raises(ValueError, match=message):
        align(**arguments)
