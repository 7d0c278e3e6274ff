"""Runs of equal tokens in two texts, wherever they stand: greedy string tiling with rolling hashes.

After the common prefix, runs that hold a whole sentence come before others and longer ones before shorter ones, and no
token is used twice (Wise 1993, "String similarity via greedy string tiling and running Karp-Rabin matching"). Hashes
only propose: every run that is returned was compared token by token. Array code throughout; what is done one by one is
done for runs, never for tokens. Knows token ids and sentence ends, and nothing else.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_FACTOR = 0xD1342543DE82EF95
"""Of the polynomial; odd, so that it has an inverse modulo 2**64."""
_EXTRA_PAIRS = 1 << 13
"""Pairs of equal places that are looked at in one go, beside one for each place of the prompt."""


class Run(NamedTuple):
    """`length` tokens of the prompt from `start` on, the same as the donor's from `donor_start` on."""

    donor_start: int
    start: int
    length: int


def equal_runs(
    donor_ids: np.ndarray,
    ids: np.ndarray,
    *,
    donor_ends: np.ndarray,
    ends: np.ndarray,
    num_prefix: int,
    min_run_tokens: int,
) -> list[Run]:
    """Runs of equal tokens, one to one, in the prompt's order: the prefix, and others of `min_run_tokens` or more.

    They are maximal: a run could only be longer by a token that is in another one. Nothing is left out: no
    `min_run_tokens` equal tokens in a row are in no run in either text. Of equally long runs, the one is taken first
    whose shift is most like that of a run next to it.

    Text that repeats itself may have more pairs of equal places than anybody can look at. Where there are over 8,192
    more than the prompt has places, only some are compared: a run may then be taken before a longer one. And if unequal
    tokens had equal hashes, which is improbable, a run might be missed or cut short; none is ever wrong.

    Args:
        donor_ids, ids: int64, of the donor and of the prompt.
        donor_ends, ends: int64, at which sentences end, rising to the number of tokens.
        num_prefix: tokens of the common prefix.
        min_run_tokens: at least 1.
    """
    tiling = _Tiling(_Text(donor_ids), _Text(ids), min_run_tokens)
    if num_prefix:
        tiling.take(Run(0, 0, num_prefix))
    tiling.match_sentences(donor_ends, ends)
    tiling.match_tokens()
    return tiling.runs


_Heap = list[tuple[int, int, int]]
"""Runs to be looked at: minus their length, start, donor_start."""


class _Runs(NamedTuple):
    """Runs that are equal in both texts as far as hashes tell, one for each row; int64."""

    donor_start: np.ndarray
    start: np.ndarray
    length: np.ndarray


class _Text:
    """Token ids, the hash of any run of them, and which of them are matched: `[starts[i], stops[i])`, in order."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        self.starts: list[int] = []
        self.stops: list[int] = []
        power, self._inverse_power = (_powers(factor, len(ids)) for factor in (_FACTOR, pow(_FACTOR, -1, 1 << 64)))
        self._sum = np.zeros(len(ids) + 1, np.uint64)
        # The first token of a run counts once times the factor, not as it is: its bits have to reach the upper ones.
        np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * power[1:], out=self._sum[1:])

    def hash(self, start: np.ndarray, length: np.ndarray | int) -> np.ndarray:
        """A polynomial in each run's ids modulo 2**64: the same for equal runs, wherever they stand."""
        return (self._sum[start + length] - self._sum[start]) * self._inverse_power[start]

    def take(self, start: int, length: int) -> int:
        """Marks a run as matched; its number among those that are."""
        i = bisect_left(self.starts, start)
        self.starts.insert(i, start)
        self.stops.insert(i, start + length)
        return i

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of what is not matched; some may be empty."""
        return np.array([0, *self.stops]), np.array([*self.starts, len(self.ids)])

    def room(self, runs_start: np.ndarray, runs_stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unmatched tokens directly before and directly after runs that are unmatched themselves."""
        starts, stops = self.gaps()
        gap = np.searchsorted(starts, runs_start, side="right") - 1
        return runs_start - starts[gap], stops[gap] - runs_stop

    def trimmed(self, start: int, stop: int) -> tuple[int, int]:
        """What is left of a run that is no longer than any that was matched since it was found.

        Those can only overlap with its ends: one within it would be shorter.
        """
        i = bisect_right(self.starts, start) - 1
        if i >= 0:
            start = max(start, self.stops[i])
        i = bisect_left(self.starts, stop) - 1
        if i >= 0 and self.starts[i] >= start:
            stop = self.starts[i]
        return start, stop


class _Tiling:
    """Which runs of the prompt are matched with which of the donor; runs are added, none is ever taken back."""

    def __init__(self, donor: _Text, prompt: _Text, min_run_tokens: int) -> None:
        self._donor, self._prompt, self._min_run_tokens = donor, prompt, min_run_tokens
        self._shifts: list[int] = []

    @property
    def runs(self) -> list[Run]:
        """What is matched, in the prompt's order."""
        columns = zip(self._prompt.starts, self._prompt.stops, self._shifts, strict=True)
        return [Run(start - shift, start, stop - start) for start, stop, shift in columns]

    def take(self, run: Run) -> None:
        i = self._prompt.take(run.start, run.length)
        self._shifts.insert(i, run.start - run.donor_start)
        self._donor.take(run.donor_start, run.length)

    def match_sentences(self, donor_ends: np.ndarray, ends: np.ndarray) -> None:
        """Takes runs around whole sentences; the prefix is all that may be matched before."""
        donor_start, donor_length, of_donor = _sentence_hashes(self._donor, donor_ends)
        start, length, of_prompt = _sentence_hashes(self._prompt, ends)
        s, t, _ = _equal_pairs(of_donor, of_prompt)
        # Hashes of sentences that are not equally long may agree by accident.
        self._take_longest(_Runs(donor_start[s], start[t], np.minimum(donor_length[s], length[t])))

    def match_tokens(self) -> None:
        """Takes all runs that are left."""
        is_all, took_any = False, True
        while took_any and not is_all:
            donor_start, of_donor = self._unmatched_hashes(self._donor)
            start, of_prompt = self._unmatched_hashes(self._prompt)
            s, t, is_all = _equal_pairs(of_donor, of_prompt)
            took_any = self._take_longest(_Runs(donor_start[s], start[t], np.full(len(s), self._min_run_tokens)))

    def _unmatched_hashes(self, text: _Text) -> tuple[np.ndarray, np.ndarray]:
        """Where `min_run_tokens` in a row are unmatched, and their hashes."""
        start, stop = text.gaps()
        stop = np.maximum(stop - self._min_run_tokens + 1, start)
        at = np.repeat(start, stop - start) + _counts(stop - start)
        return at, text.hash(at, self._min_run_tokens)

    def _take_longest(self, seeds: _Runs) -> bool:
        """Extends the seeds and takes what fits, longest first; whether anything did."""
        runs = _joined(self._extended(_joined(seeds)))
        is_long = runs.length >= self._min_run_tokens
        columns = (-runs.length[is_long], runs.start[is_long], runs.donor_start[is_long])
        heap: _Heap = sorted(zip(*(column.tolist() for column in columns), strict=True))
        took_any = False
        while heap:
            longest = heap[0][0]
            equally_long: list[Run] = []
            while heap and heap[0][0] == longest:
                _, start, donor_start = heapq.heappop(heap)
                run = Run(donor_start, start, -longest)
                if self._is_free(run, heap):
                    equally_long.append(run)
            for run in self._in_turn(equally_long):
                if self._is_free(run, heap) and self._is_equal(run, heap):
                    self.take(run)
                    took_any = True
        return took_any

    def _extended(self, runs: _Runs) -> _Runs:
        """The same runs, as far as they go to the left and to the right without a token that is matched."""
        donor_before, donor_after = self._donor.room(runs.donor_start, runs.donor_start + runs.length)
        before, after = self._prompt.room(runs.start, runs.start + runs.length)
        left = self._reach(runs.donor_start, runs.start, np.minimum(donor_before, before), backwards=True)
        right = self._reach(
            runs.donor_start + runs.length, runs.start + runs.length, np.minimum(donor_after, after), backwards=False
        )
        return _Runs(runs.donor_start - left, runs.start - left, left + runs.length + right)

    def _reach(self, donor_at: np.ndarray, at: np.ndarray, most: np.ndarray, *, backwards: bool) -> np.ndarray:
        """How many tokens from these places on (or before them) are equal, by bisection."""
        reached = np.zeros_like(at)
        step = 1 << int(most.max(initial=0)).bit_length()
        while step := step >> 1:
            i = np.flatnonzero(reached + step <= most)
            offset = -reached[i] - step if backwards else reached[i]
            equal = self._donor.hash(donor_at[i] + offset, step) == self._prompt.hash(at[i] + offset, step)
            reached[i[equal]] += step
        return reached

    def _is_free(self, run: Run, heap: _Heap) -> bool:
        """Whether none of its tokens is matched; else what is left of it goes back to the heap."""
        shift = run.start - run.donor_start
        start, stop = self._prompt.trimmed(run.start, run.start + run.length)
        donor_start, donor_stop = self._donor.trimmed(run.donor_start, run.donor_start + run.length)
        start, stop = max(start, donor_start + shift), min(stop, donor_stop + shift)
        if stop - start == run.length:
            return True
        if stop - start >= self._min_run_tokens:
            heapq.heappush(heap, (start - stop, start, start - shift))
        return False

    def _is_equal(self, run: Run, heap: _Heap) -> bool:
        """Whether all its tokens are; else its equal parts go back to the heap."""
        donor_ids = self._donor.ids[run.donor_start : run.donor_start + run.length]
        differs = np.flatnonzero(donor_ids != self._prompt.ids[run.start : run.start + run.length])
        if not len(differs):
            return True
        starts, stops = np.append(0, differs + 1), np.append(differs, run.length)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if stop - start >= self._min_run_tokens:
                heapq.heappush(heap, (start - stop, run.start + start, run.donor_start + start))
        return False

    def _in_turn(self, equally_long: list[Run]) -> Iterator[Run]:
        """Those without a rival first: the others are ranked when these, their neighbours, have been taken."""
        if len(equally_long) == 1:
            yield equally_long[0]
            return
        places = Counter(run.start for run in equally_long)
        donor_places = Counter(run.donor_start for run in equally_long)
        rivals: list[Run] = []
        for run in equally_long:
            if places[run.start] == donor_places[run.donor_start] == 1:
                yield run
            else:
                rivals.append(run)
        yield from sorted(rivals, key=lambda run: (self._strangeness(run), run.start, run.donor_start))

    def _strangeness(self, run: Run) -> int:
        """How much its shift differs from that of the run before or after it, whichever is nearer to it."""
        i = bisect_left(self._prompt.starts, run.start)
        neighbours = self._shifts[max(i - 1, 0) : i + 1] or [0]
        return min(abs(run.start - run.donor_start - shift) for shift in neighbours)


def _powers(factor: int, most: int) -> np.ndarray:
    """Up to the most-th, modulo 2**64, uint64."""
    powers = np.full(most + 1, factor, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _counts(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... up to each of the lengths, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)


def _sentence_hashes(text: _Text, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, lengths and hashes of the sentences after what is matched."""
    starts = np.append(0, ends)[:-1]
    lengths = ends - starts
    is_new = (starts >= max(text.stops, default=0)) & (lengths > 0)
    starts, lengths = starts[is_new], lengths[is_new]
    return starts, lengths, text.hash(starts, lengths)


def _equal_pairs(donor_hash: np.ndarray, prompt_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Indexes of equal hashes of the donor and of the prompt, and whether these are all.

    Where there are too many, each of the prompt's gets a few partners only: the r-th of those that are equal the
    donor's r-th and those that follow, so that text which repeats itself keeps its order.
    """
    side = max(len(donor_hash), len(prompt_hash)).bit_length()
    of_hash = np.uint64((1 << 64) - (2 << side))
    # One sort of plain numbers brings equal hashes together: the donor's before the prompt's, and each in order.
    donor_key = (donor_hash & of_hash) | np.arange(len(donor_hash), dtype=np.uint64)
    prompt_key = (prompt_hash & of_hash) | np.arange(len(prompt_hash), dtype=np.uint64) | np.uint64(1 << side)
    key = np.sort(np.concatenate([donor_key, prompt_key]))
    number, key = (key & ~of_hash).astype(np.int64), key & of_hash
    is_first = np.ones(len(key), bool)
    is_first[1:] = key[1:] != key[:-1]
    first = np.flatnonzero(is_first)
    size = np.diff(first, append=len(key))
    # The prompt's are numbered from 1 << side on.
    num_prompt = np.diff(np.append(0, (number >> side).cumsum())[np.append(first, len(key))])
    is_common = (num_prompt > 0) & (num_prompt < size)
    first, num_prompt, num_donor = first[is_common], num_prompt[is_common], (size - num_prompt)[is_common]
    partners = num_donor
    while (num_prompt * partners).sum() > len(prompt_hash) + _EXTRA_PAIRS and partners.max() > 1:
        partners = np.minimum(partners, (partners.max() + 1) // 2)
    # From groups to the prompt's members of each, and from those to their partners.
    group = np.repeat(np.arange(len(first)), num_prompt)
    member = np.repeat(np.arange(len(group)), partners[group])
    rank, turn = _counts(num_prompt)[member], _counts(partners[group])
    group = group[member]
    of_donor = number[first[group] + (rank + turn) % num_donor[group]]
    of_prompt = number[first[group] + num_donor[group] + rank] - (1 << side)
    return of_donor, of_prompt, bool((partners == num_donor).all())


def _joined(runs: _Runs) -> _Runs:
    """Runs of equal shift that touch or overlap are one; sorted by shift."""
    shift = runs.start - runs.donor_start
    order = np.lexsort((runs.start, shift))
    shift, start, stop = shift[order], runs.start[order], (runs.start + runs.length)[order]
    is_first = np.ones(len(start), bool)
    is_first[1:] = (shift[1:] != shift[:-1]) | (start[1:] > stop[:-1])
    first = np.flatnonzero(is_first)
    last = np.append(first, len(start))[1:] - 1
    start, shift = start[first], shift[first]
    return _Runs(start - shift, start, stop[last] - start)
