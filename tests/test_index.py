"""Finding cached prompts: every way against a slow twin, and what each promises to find."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sentencekv.reuse import index
from sentencekv.reuse.index import Found, Prompt, PromptIndex, shared_prefix, window_buckets

SIZE = 6
WORDS = 5000


def draw_tokens(seed: int, count: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, WORDS, count).astype(np.int32)


def draw_embedding(seed: int) -> NDArray[np.float32]:
    vector = np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)
    return vector / np.linalg.norm(vector)


def make_index(*prompts: NDArray[np.int32]) -> PromptIndex:
    """Keys are 100, 101 and so on, and so are the embeddings' seeds."""
    made = PromptIndex(SIZE)
    made.add([Prompt(100 + i, ids, draw_embedding(100 + i)) for i, ids in enumerate(prompts)])
    return made


def sharing(made: PromptIndex, token_ids: NDArray[np.int32], limit: int = 8) -> list[Found]:
    """What is found by shared tokens alone."""
    return made.find(token_ids, None, limit)


class TestWindowBuckets:
    @pytest.mark.parametrize("count", [8, 9, 40, 71, 72, 300])
    def test_each_window_falls_into_the_bucket_of_its_smallest_hash(
        self, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hash of a shingle is what a prompt of it alone has: one window of one shingle."""
        ids = draw_tokens(0, count)
        buckets, weights = window_buckets(ids)
        hashes = [int(window_buckets(ids[i : i + 8])[0][0]) for i in range(count - 7)]
        window = min(64, len(hashes))
        smallest = [min(hashes[i : i + window]) for i in range(len(hashes) - window + 1)]
        assert buckets.tolist() == sorted(set(smallest))
        assert weights.tolist() == [smallest.count(bucket) for bucket in buckets.tolist()]

    def test_tokens_in_another_order_are_another_shingle(self) -> None:
        ids = draw_tokens(0, 8)
        seen = {int(window_buckets(np.roll(ids, by))[0][0]) for by in range(8)}
        swapped = ids.copy()
        swapped[[0, 4]] = swapped[[4, 0]]
        assert len(seen | {int(window_buckets(swapped)[0][0])}) == 9

    def test_short_and_repeated_texts(self) -> None:
        for count in range(8):
            assert len(window_buckets(draw_tokens(0, count))[0]) == 0
        buckets, weights = window_buckets(np.full(5000, 7, dtype=np.int32))
        assert weights.tolist() == [5000 - 7 - 63]
        assert len(buckets) == 1

    def test_about_one_bucket_for_32_tokens(self) -> None:
        buckets, weights = window_buckets(draw_tokens(3, 32_000))
        assert 900 < len(buckets) < 1100
        assert weights.sum() == 32_000 - 7 - 63


class TestPrefix:
    @given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9), st.integers(0, 900))
    def test_shared_prefix(self, first: list[int], second: list[int], common: int) -> None:
        start = draw_tokens(5, common).tolist()
        expected = 0
        for ours, theirs in zip(first, second, strict=False):
            if ours != theirs:
                break
            expected += 1
        arrays = (np.array(start + each, dtype=np.int32) for each in (first, second))
        assert shared_prefix(*arrays) == common + expected

    @settings(max_examples=60, deadline=None)
    @given(st.sets(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=12), st.text("ab", max_size=6))
    def test_the_longest_is_found_among_many(self, cached: set[str], asked: str) -> None:
        """Blocks of 20 tokens for letters, fewer than windows need, at two places at most."""
        blocks = {letter: draw_tokens(ord(letter), 20) for letter in "ab"}
        end = draw_tokens(9, 3)

        def tokens(name: str) -> NDArray[np.int32]:
            return np.concatenate([*(blocks[letter] for letter in name), end])

        made = make_index(*map(tokens, sorted(cached)))
        longest = max(shared_prefix(tokens(each), tokens(asked)) for each in cached)
        neighbours = made._neighbours(tokens(asked), 1)
        assert longest == max(shared_prefix(made._ids[key], tokens(asked)) for key in neighbours)
        if longest >= 16:
            assert sharing(made, tokens(asked), limit=1)[0].shared_tokens // 16 >= longest // 16


class TestLongestPrefix:
    def test_more_shared_elsewhere_does_not_crowd_it_out(self) -> None:
        """What moved is approximate, a prefix is exact: the longest is among whatever is found."""
        start, rest = draw_tokens(1, 300), draw_tokens(2, 900)
        asked = np.concatenate([start, rest])
        others = [np.concatenate([draw_tokens(10 + i, 40), rest, start]) for i in range(5)]
        made = make_index(*others, np.concatenate([start, draw_tokens(3, 50)]))
        for limit in (1, 3):
            found = made.find(asked, draw_embedding(0), limit)
            assert len(found) == limit
            assert (found[-1].key, found[-1].prefix_tokens) == (105, 300)
        assert made.longest_prefix(asked) == 105
        assert made.longest_prefix(draw_tokens(99, 50)) is None
        assert make_index().longest_prefix(asked) is None


class TestSharedRuns:
    SURE_RUN = 71
    """Tokens that hold a whole window of shingles, wherever they are."""

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 400), st.integers(0, 400))
    def test_a_run_anywhere_is_found(self, seed: int, donor_start: int, start: int) -> None:
        """Just as long as it has to be, at any two places, among prompts that share nothing."""
        donor, prompt = draw_tokens(seed, 500), draw_tokens(seed + 1, 500)
        prompt[start : start + self.SURE_RUN] = donor[donor_start : donor_start + self.SURE_RUN]
        made = make_index(*(draw_tokens(seed + 2 + i, 600) for i in range(5)), donor)
        assert made._buckets.most_shared(*window_buckets(prompt), 3) == [105]
        assert 105 in {each.key for each in made.find(prompt, draw_embedding(1), limit=6)}

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
    def test_shared_tokens_are_estimated(self, share: float) -> None:
        """Paragraphs of 200 tokens in another order: to within a twentieth of the prompt, and a window per border."""
        donor = draw_tokens(0, 20_000).reshape(100, 200)
        prompt = draw_tokens(1, 20_000).reshape(100, 200)
        kept = np.random.default_rng(2).permutation(100)[: int(100 * share)]
        prompt[kept] = donor[kept[::-1]]
        (found,) = sharing(make_index(donor.reshape(-1)), prompt.reshape(-1))
        assert abs(found.shared_tokens - 20_000 * share) < 1000 + 35 * len(kept)

    def test_edits_everywhere_do_not_hide_a_donor(self) -> None:
        donor = draw_tokens(0, 3000)
        prompt = donor.copy()
        prompt[::20] = WORDS
        made = make_index(*(draw_tokens(9 + i, 3000) for i in range(4)), donor)
        (found,) = sharing(made, prompt)
        assert found.key == 104
        assert found.shared_tokens > 1000

    def test_what_few_share_is_found_under_what_all_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However little is looked at: small buckets come first."""
        monkeypatch.setattr(index, "_MOST_POSTINGS", 50)
        frame = draw_tokens(0, 1000)
        prompts = [np.concatenate([draw_tokens(10 + i, 50), frame, draw_tokens(50 + i, 300)]) for i in range(40)]
        asked = np.concatenate([draw_tokens(1, 50), frame, prompts[33][1100:1250], draw_tokens(2, 100)])
        found = sharing(make_index(*prompts), asked, limit=2)
        assert found[0].key == 133
        assert found[0].shared_tokens > 1000

    def test_all_alike(self) -> None:
        """More bucket members than are looked at: some of the best are found still."""
        frame = draw_tokens(0, 2000)
        prompts = [np.concatenate([draw_tokens(10 + i, 5), frame]) for i in range(700)]
        found = sharing(make_index(*prompts), np.concatenate([draw_tokens(1, 9), frame]))
        assert len(found) == 8
        assert all(each.shared_tokens > 1950 for each in found)


class TestMeaning:
    def test_paraphrases_share_no_tokens(self) -> None:
        made = make_index(*(draw_tokens(i, 100) for i in range(20)))
        for key in range(100, 120):
            near = draw_embedding(key) + 0.01
            near /= np.linalg.norm(near)
            (first, *_) = found = made.find(draw_tokens(99, 80), near, limit=2)
            assert first.key == key
            assert first.similarity == pytest.approx(float(near @ draw_embedding(key)), abs=1e-6)
            assert [each.shared_tokens for each in found] == [0, 0]
            assert first.similarity >= found[1].similarity

    def test_what_is_neither_similar_nor_shares_anything_is_left_out(self) -> None:
        made = make_index(*(draw_tokens(i, 100) for i in range(20)))
        found = made.find(draw_tokens(99, 80), draw_embedding(107), limit=20, min_similarity=0.5)
        assert found
        assert all(each.similarity >= 0.5 for each in found)
        assert len(made.find(draw_tokens(99, 80), draw_embedding(107), limit=20)) == 20

    def test_shared_tokens_come_first_in_units_of_sixteen(self) -> None:
        ids = draw_tokens(0, 300)
        made = make_index(draw_tokens(1, 300), np.append(ids[:40], 1), np.append(ids[:33], 2), np.append(ids[:20], 3))
        found = made.find(ids, draw_embedding(102), limit=4)
        assert [each.key for each in found] == [102, 101, 103, 100]


class TestAddAndRemove:
    def test_one_by_one_and_at_once_are_the_same(self) -> None:
        prompts = [draw_tokens(i, 50 + 97 * i) for i in range(9)]
        prompts[5][:200] = prompts[8][300:500]
        together, apart = make_index(*prompts), PromptIndex(SIZE)
        for i in reversed(range(9)):
            apart.add([Prompt(100 + i, prompts[i], draw_embedding(100 + i))])
        assert_alike(together, apart, prompts)

    @pytest.mark.parametrize("many", [False, True])
    def test_what_is_removed_is_as_if_it_had_never_been(self, many: bool) -> None:
        prompts = [draw_tokens(i, 50 + 97 * i) for i in range(9)]
        made, left = make_index(*prompts), make_index(*prompts[:5])
        for keys in [[108, 105, 107, 106]] if many else [[108], [105], [107], [106]]:
            made.remove(keys)
        assert len(made) == 5
        assert_alike(made, left, prompts)
        made.remove([100 + i for i in range(5)])
        assert made.find(prompts[0], draw_embedding(0), 8) == []
        made.add([Prompt(7, prompts[8], draw_embedding(7))])
        assert sharing(made, prompts[8])[0].key == 7

    def test_nothing_is_asked_for(self) -> None:
        made = make_index(draw_tokens(0, 100))
        made.add([])
        made.remove([])
        assert made.find(draw_tokens(0, 100), draw_embedding(0), 0) == []
        assert made.find(draw_tokens(0, 3), draw_embedding(0), 4)[0].shared_tokens == 3

    def test_prompts_shorter_than_a_shingle(self) -> None:
        made = make_index(draw_tokens(0, 5), draw_tokens(0, 8))
        for count, expected in ((4, [4, 4]), (100, [8, 5])):
            shared = [each.shared_tokens for each in made.find(draw_tokens(0, count), draw_embedding(0), 4)]
            assert sorted(shared, reverse=True) == expected


def assert_alike(first: PromptIndex, second: PromptIndex, prompts: list[NDArray[np.int32]]) -> None:
    assert first._by_tokens == second._by_tokens
    pairs = [
        set(zip(each._buckets._bucket_P.tolist(), each._buckets._key_P.tolist(), strict=True))
        for each in (first, second)
    ]
    assert pairs[0] == pairs[1]
    for each in (first, second):
        assert (np.diff(each._buckets._bucket_P.astype(object)) >= 0).all()
    for prompt in prompts:
        ours, theirs = (each.find(prompt, draw_embedding(3), 20) for each in (first, second))
        assert [(each.key, each.shared_tokens) for each in ours] == [(each.key, each.shared_tokens) for each in theirs]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "sentencekv\[reuse\]"'):
        PromptIndex(SIZE)
