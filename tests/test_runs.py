"""Runs against brute force: equal, one to one, maximal, complete, and the longest first; few pairs of any text."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentencekv.reuse import runs as runs_module
from sentencekv.reuse.runs import Run, equal_runs


def common_prefix(donor: np.ndarray, ids: np.ndarray) -> int:
    pairs = zip(donor.tolist(), ids.tolist(), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(donor), len(ids)))


def runs_of(
    donor: np.ndarray,
    ids: np.ndarray,
    min_run_tokens: int,
    donor_ends: list[int] | None = None,
    ends: list[int] | None = None,
) -> list[Run]:
    """By default each text is one sentence."""
    return equal_runs(
        donor,
        ids,
        donor_ends=np.array([len(donor)] if donor_ends is None else donor_ends, np.int64),
        ends=np.array([len(ids)] if ends is None else ends, np.int64),
        num_prefix=common_prefix(donor, ids),
        min_run_tokens=min_run_tokens,
    )


def free(runs: list[Run], donor: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are in no run."""
    donor_free, ids_free = np.ones(len(donor), bool), np.ones(len(ids), bool)
    for run in runs:
        donor_free[run.donor_start : run.donor_start + run.length] = False
        ids_free[run.start : run.start + run.length] = False
    return donor_free, ids_free


def longest_common(donor: np.ndarray, ids: np.ndarray, donor_free: np.ndarray, ids_free: np.ndarray) -> int:
    """Tokens of the longest run that is free in both."""
    longest = 0
    row = np.zeros(len(donor) + 1, np.int64)
    for i, is_free in zip(ids, ids_free, strict=True):
        row[1:] = (row[:-1] + 1) * ((donor == i) & donor_free & is_free)
        longest = max(longest, int(row.max()))
    return longest


def check_valid(runs: list[Run], donor: np.ndarray, ids: np.ndarray, min_run_tokens: int) -> None:
    """Equal, long enough, in order, one to one; the prefix comes first."""
    num_prefix = common_prefix(donor, ids)
    assert (runs[:1] == [Run(0, 0, num_prefix)]) or not num_prefix
    for run in runs[1 if num_prefix else 0 :]:
        assert run.length >= min_run_tokens
    for run in runs:
        assert run.start >= 0
        assert run.donor_start >= 0
        equal = donor[run.donor_start : run.donor_start + run.length] == ids[run.start : run.start + run.length]
        assert len(equal) == run.length
        assert equal.all()
    for a, b in pairwise(runs):
        assert a.start + a.length <= b.start
    for a, b in pairwise(sorted(runs)):
        assert a.donor_start + a.length <= b.donor_start


def check_whole(runs: list[Run], donor: np.ndarray, ids: np.ndarray, min_run_tokens: int) -> None:
    """Maximal and complete."""
    donor_free, ids_free = free(runs, donor, ids)
    for run in runs:
        for i, j in ((run.donor_start - 1, run.start - 1), (run.donor_start + run.length, run.start + run.length)):
            if 0 <= i < len(donor) and 0 <= j < len(ids):
                assert not (donor_free[i] and ids_free[j] and donor[i] == ids[j])
    assert longest_common(donor, ids, donor_free, ids_free) < min_run_tokens


@st.composite
def texts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two texts of few different tokens; one is often made of pieces of the other."""
    token = st.integers(0, draw(st.sampled_from([0, 1, 3, 20])))
    donor = draw(st.lists(token, max_size=40))
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(donor)))
        ids += donor[start : start + draw(st.integers(0, 15))] + draw(st.lists(token, max_size=4))
    return np.array(donor, np.int64), np.array(ids, np.int64)


def ends_of(draw: st.DrawFn, num_tokens: int) -> list[int]:
    """Some sentence ends, now and then of an empty sentence."""
    return [*sorted(draw(st.lists(st.integers(0, num_tokens), max_size=8))), num_tokens]


@settings(max_examples=150, deadline=None)
@given(texts(), st.integers(1, 6))
def test_the_longest_run_is_taken_first(both: tuple[np.ndarray, np.ndarray], min_run_tokens: int) -> None:
    """Each run is as long as any was that was still free when it was taken."""
    donor, ids = both
    runs = runs_of(donor, ids, min_run_tokens)
    check_valid(runs, donor, ids, min_run_tokens)
    check_whole(runs, donor, ids, min_run_tokens)
    has_prefix = common_prefix(donor, ids) > 0
    taken = runs[:1] if has_prefix else []
    for run in sorted(runs[1:] if has_prefix else runs, key=lambda run: -run.length):
        assert run.length == longest_common(donor, ids, *free(taken, donor, ids))
        taken.append(run)


@settings(max_examples=100, deadline=None)
@given(st.data(), texts(), st.integers(1, 6), st.sampled_from([0, 2, 1 << 13]))
def test_sentences_and_repeated_text(
    data: st.DataObject, both: tuple[np.ndarray, np.ndarray], min_run_tokens: int, extra_pairs: int
) -> None:
    """However the texts are cut, and however few pairs are looked at in one go."""
    donor, ids = both
    donor_ends, ends = (ends_of(data.draw, len(text)) for text in both)
    with mock.patch.object(runs_module, "_EXTRA_PAIRS", extra_pairs):
        runs = runs_of(donor, ids, min_run_tokens, donor_ends, ends)
    check_valid(runs, donor, ids, min_run_tokens)
    check_whole(runs, donor, ids, min_run_tokens)
    assert runs == sorted(runs, key=lambda run: run.start)


@settings(max_examples=100, deadline=None)
@given(st.data(), texts(), st.integers(1, 6))
def test_equal_hashes_never_make_a_wrong_run(
    data: st.DataObject, both: tuple[np.ndarray, np.ndarray], min_run_tokens: int
) -> None:
    """With the factor 1, all orders of the same tokens collide."""
    donor, ids = both
    donor_ends, ends = (ends_of(data.draw, len(text)) for text in both)
    with mock.patch.object(runs_module, "_FACTOR", 1):
        runs = runs_of(donor, ids, min_run_tokens, donor_ends, ends)
    check_valid(runs, donor, ids, min_run_tokens)


@pytest.mark.parametrize("min_run_tokens", [1, 2, 5, 16])
def test_long_texts(min_run_tokens: int) -> None:
    """Longer ones than those above, with more pairs than are looked at in one go and hashes that lose some bits."""
    generator = np.random.default_rng(min_run_tokens)
    donor = generator.integers(0, 120, 4_000)
    pieces = np.split(donor, np.sort(generator.choice(4_000, 60, replace=False)))
    ids = np.concatenate(
        [generator.permutation(piece)[:7] if i % 5 == 0 else piece for i, piece in enumerate(pieces[::-1])]
    )
    runs = runs_of(donor, ids, min_run_tokens)
    check_valid(runs, donor, ids, min_run_tokens)
    check_whole(runs, donor, ids, min_run_tokens)


def test_a_whole_sentence_comes_before_a_longer_run_without_one() -> None:
    before, sentence = np.arange(20), np.arange(100, 120)
    ids = np.concatenate([before, sentence])
    # The sentence itself, and elsewhere, in the middle of another one, 25 tokens that overlap with it.
    donor = np.concatenate([np.arange(200, 230), sentence, np.arange(300, 310), ids[10:35], np.arange(400, 410)])
    assert runs_of(donor, ids, 16) == [Run(60, 10, 25)]
    assert runs_of(donor, ids, 16, [30, 50, len(donor)], [20, 40]) == [Run(30, 20, 20)]


def test_a_run_goes_on_beyond_its_sentence() -> None:
    """By a few tokens on either side, too few to be found on their own."""
    donor, ids = np.arange(100), np.concatenate([np.arange(200, 210), np.arange(30, 60), np.arange(300, 310)])
    assert runs_of(donor, ids, 16, [35, 55, 100], [15, 35, 50]) == [Run(30, 10, 30)]


def test_equal_candidates_follow_their_neighbours() -> None:
    """A paragraph that stands twice in the donor is taken from where the run before it came from."""
    paragraph, first, second = np.arange(30), np.arange(100, 150), np.arange(200, 250)
    donor = np.concatenate([[9999], first, paragraph, [7777], second, paragraph, [8888]])
    ids = np.concatenate([second[20:], [5555], paragraph, [6666]])
    runs = runs_of(donor, ids, 16)
    assert runs == [Run(102, 0, 30), Run(132, 31, 30)]
    ids = np.concatenate([first[20:], [5555], paragraph, [6666]])
    runs = runs_of(donor, ids, 16)
    assert runs == [Run(21, 0, 30), Run(51, 31, 30)]


@pytest.mark.parametrize("shift", [0, 5])
def test_repeated_text_keeps_its_order(shift: int) -> None:
    """A hundred times the same paragraph, with separators of its own in each text: each is matched in its place."""
    paragraph = np.arange(60)
    donor = np.concatenate([[10_000 + i, *paragraph] for i in range(100)])
    ids = np.concatenate([np.full(shift, 5), *([20_000 + i, *paragraph] for i in range(100))])
    runs = runs_of(donor, ids, 16)
    assert len(runs) == 100
    assert {run.start - run.donor_start for run in runs} == {shift}


def repeated(text: np.ndarray, times: int) -> np.ndarray:
    return np.tile(text, times)


PARAGRAPH = np.random.default_rng(0).integers(0, 50_000, 300)
PHRASES = np.random.default_rng(1).integers(0, 50_000, (10, 16))
REPETITIVE = {
    "one token": (np.zeros(30_000, np.int64), np.append(1, np.zeros(25_000, np.int64))),
    "one token among others": (np.resize(np.append(np.zeros(30, np.int64), 1), 9_000), np.zeros(9_000, np.int64)),
    "a paragraph": (repeated(PARAGRAPH, 100), np.append([7, 8, 9], repeated(PARAGRAPH, 90))),
    "shuffled phrases": tuple(PHRASES[np.random.default_rng(i).integers(0, 10, 1_000)].reshape(-1) for i in (2, 3)),
}


@pytest.mark.parametrize("name", REPETITIVE)
def test_repetitive_text_takes_little_work(name: str) -> None:
    """Pairs of equal places, of which there may be hundreds of millions, are looked at a few times for each token."""
    donor, ids = REPETITIVE[name]
    num_pairs, num_looks = [], 0
    equal_pairs, is_free = runs_module._equal_pairs, runs_module._Tiling._is_free

    def count_pairs(*hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        pairs = equal_pairs(*hashes)
        num_pairs.append(len(pairs[0]))
        return pairs

    def count_looks(*arguments: object) -> bool:
        nonlocal num_looks
        num_looks += 1
        return is_free(*arguments)

    with (
        mock.patch.object(runs_module, "_equal_pairs", count_pairs),
        mock.patch.object(runs_module._Tiling, "_is_free", count_looks),
    ):
        runs = runs_of(donor, ids, 16, [*range(20, len(donor), 20), len(donor)], [*range(20, len(ids), 20), len(ids)])
    check_valid(runs, donor, ids, 16)
    assert max(num_pairs) <= len(ids) + (1 << 13)
    assert len(num_pairs) <= 12
    assert num_looks <= 3 * len(ids)
    assert sum(run.length for run in runs) >= 0.8 * len(ids)


def test_texts_that_share_nothing_are_seen_once() -> None:
    """A wrong donor costs a sort of its hashes, and no round more."""
    donor, ids = np.arange(5_000), np.arange(5_000, 10_000)
    with mock.patch.object(runs_module, "_equal_pairs", wraps=runs_module._equal_pairs) as equal_pairs:
        assert runs_of(donor, ids, 16) == []
    assert equal_pairs.call_count == 2
