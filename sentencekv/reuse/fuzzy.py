"""Tokens without an equal partner, matched by likeness: signatures of their rotated embeddings, and an alignment.

A gap is a run of the prompt between matches. By default each gap is matched with one stretch of the donor, in order and
one to one, where the distances of signatures say so. Matching every token with whatever is nearest in the donor, as
SemShareKV does, is an option. Knows token ids, matched runs and an embedding table.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentencekv.reuse.runs import Run
from triton_ops import token_signatures

_WORD_BITS = 32
_ROWS = 1024
"""Longer gaps are aligned in pieces of so many tokens; alignments do not cross from one to the next."""
_NEAREST_BLOCKS = (1024, 4096)
"""Tokens of the prompt and of the donor that are compared at once without `monotone`."""


@dataclass(frozen=True, kw_only=True)
class FuzzyOptions:
    """How tokens are matched by likeness. Raises ValueError on a bad value."""

    num_bits: int = 128
    """Of a signature, a multiple of 32."""

    band_tokens: int = 32
    """In a gap and its stretch of the donor, tokens whose places differ by more than this are not compared."""

    max_distance: int = 40
    """Bits in which two signatures may differ. At random they differ in half of their bits, give or take
    `num_bits ** 0.5 / 2`. 40 of 128 are an angle of 56 degrees between embeddings; `num_bits` is no bound at all."""

    monotone: bool = True
    """In order and one to one. If not, each token takes its nearest in the whole donor, as in SemShareKV (Zhao and
    Mastorakis 2025, arXiv:2509.24832): one donor token may serve many, matched ones included, and positions count from
    the start of the texts."""

    rope_base: float = 10_000.0
    """Of the frequencies by which embeddings turn with their position."""

    seed: int = 0
    """Of the random planes."""

    def __post_init__(self) -> None:
        if self.num_bits < _WORD_BITS or self.num_bits % _WORD_BITS:
            raise ValueError(f"num_bits must be a positive multiple of {_WORD_BITS}, got {self.num_bits}; try 128")
        if self.band_tokens < 0:
            raise ValueError(f"band_tokens must not be negative, got {self.band_tokens}; 0 compares equal places only")
        if not 0 <= self.max_distance <= self.num_bits:
            raise ValueError(
                f"max_distance must lie in 0..num_bits ({self.num_bits}), got {self.max_distance}; "
                f"about a third of num_bits tells like from unlike"
            )
        if self.rope_base <= 1:
            raise ValueError(f"rope_base must exceed 1, got {self.rope_base}; models have 10000 or more")


def fuzzy_sources(
    donor_ids: np.ndarray, ids: np.ndarray, runs: Sequence[Run], options: FuzzyOptions, embedding_VE: Tensor
) -> np.ndarray:
    """The donor position that each token outside the runs is matched with, or -1; int64 `[T]`.

    Args:
        donor_ids, ids: int64, of the donor and of the prompt.
        runs: what is matched already, sorted by place in the prompt, disjoint in both texts.
        options: how.
        embedding_VE: `[V, E]`, E even; on any device, where signatures are made.

    Raises:
        ValueError: if the table is not of that form, or has no row for some id.
    """
    if embedding_VE.ndim != 2 or embedding_VE.shape[1] % 2:
        raise ValueError(
            f"embedding_VE must be [V, E] with E even, got {list(embedding_VE.shape)}; pass input embeddings"
        )
    for some_ids in (donor_ids, ids):
        if some_ids.size and not 0 <= some_ids.min() <= some_ids.max() < len(embedding_VE):
            raise ValueError(
                f"token ids must be rows of embedding_VE, 0..{len(embedding_VE) - 1}, got {some_ids.min()}.."
                f"{some_ids.max()}; pass the embeddings of the model whose tokens these are"
            )
    gaps = _unmatched([(start, start + length) for _, start, length in runs], len(ids))
    source_T = np.full(len(ids), -1, np.int64)
    if not gaps or not len(donor_ids):
        return source_T
    if options.monotone:
        pairs = _in_order(donor_ids, ids, gaps, runs, options, embedding_VE)
    else:
        pairs = _nearest(donor_ids, ids, np.concatenate([np.arange(*gap) for gap in gaps]), options, embedding_VE)
    source_T[pairs[0]] = pairs[1]
    return source_T


@lru_cache(maxsize=4)
def _planes(num_dims: int, num_bits: int, seed: int, device: torch.device) -> Tensor:
    """Random planes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_dims, num_bits), generator=generator).to(device)


def _signatures(ids: np.ndarray, positions: np.ndarray, options: FuzzyOptions, embedding_VE: Tensor) -> Tensor:
    device = embedding_VE.device
    planes = _planes(embedding_VE.shape[1], options.num_bits, options.seed, device)
    token_T, position_T = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (ids, positions))
    return token_signatures(token_T, embedding_VE, position_T, planes, base=options.rope_base)


def _signs(signature_TW: Tensor) -> Tensor:
    """Bits as numbers 1 and -1, float32 `[T, B]`; a product of two rows is `num_bits` less twice their distance."""
    bits = signature_TW[:, :, None] >> torch.arange(_WORD_BITS, dtype=torch.int32, device=signature_TW.device)
    return (bits & 1).flatten(1).float() * 2 - 1


def _nearest(
    donor_ids: np.ndarray, ids: np.ndarray, at: np.ndarray, options: FuzzyOptions, embedding_VE: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt `at` these places, and the nearest of the donor, of equally near ones the first."""
    rows, columns = _NEAREST_BLOCKS
    donor = _signatures(donor_ids, np.arange(len(donor_ids)), options, embedding_VE)
    prompt = _signatures(ids[at], at, options, embedding_VE)
    best: list[Tensor] = []
    for block in prompt.split(rows):
        sign = _signs(block)
        # Distance and place in one number: its minimum is the first of the nearest, on any device.
        nearest = torch.full((len(block),), torch.iinfo(torch.int64).max, device=block.device)
        for start in range(0, len(donor_ids), columns):
            product = sign @ _signs(donor[start : start + columns]).T
            distance = (options.num_bits - product).long() // 2
            place = torch.arange(start, start + product.shape[1], device=block.device)
            nearest = torch.minimum(nearest, (distance * len(donor_ids) + place).amin(1))
        best.append(nearest)
    distance_T, source_T = np.divmod(torch.cat(best).cpu().numpy(), len(donor_ids))
    near = distance_T <= options.max_distance
    return at[near], source_T[near]


class _Stretch(NamedTuple):
    """Tokens of a text in order, though not always next to each other: their places and their signatures."""

    at_T: np.ndarray
    signature_TW: Tensor


def _stretches(
    text: np.ndarray, places: list[np.ndarray], options: FuzzyOptions, embedding_VE: Tensor
) -> list[_Stretch]:
    """Positions count from the start of each stretch, so that equal ones agree wherever they are."""
    if not places:
        return []
    lengths = [len(at_T) for at_T in places]
    positions = np.concatenate([np.arange(length) for length in lengths])
    signature_TW = _signatures(text[np.concatenate(places)], positions, options, embedding_VE).cpu()
    return [_Stretch(*stretch) for stretch in zip(places, signature_TW.split(lengths), strict=True)]


def _in_order(
    donor_ids: np.ndarray,
    ids: np.ndarray,
    gaps: list[tuple[int, int]],
    runs: Sequence[Run],
    options: FuzzyOptions,
    embedding_VE: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt and of the donor, matched gap by gap."""
    segments = _unmatched(sorted((start, start + length) for start, _, length in runs), len(donor_ids))
    homes = _homes(gaps, runs, segments, len(donor_ids))
    prompt = _stretches(ids, [np.arange(*gap) for gap in gaps], options, embedding_VE)
    housed = [i for i, home in enumerate(homes) if home]
    homeless = [prompt[i] for i, home in enumerate(homes) if home is None]
    claimed = {segment for home in homes for segment in home or ()}
    spare = [segment for i, segment in enumerate(segments) if i not in claimed] if homeless else []
    places = [np.concatenate([np.arange(*segments[segment]) for segment in homes[i] or ()]) for i in housed]
    donor = _stretches(donor_ids, [*places, *(np.arange(*segment) for segment in spare)], options, embedding_VE)
    pairs = list(zip([prompt[i] for i in housed], donor[: len(housed)], strict=True))
    return _banded(pairs + _most_alike(homeless, donor[len(housed) :]), options)


def _homes(
    gaps: list[tuple[int, int]], runs: Sequence[Run], segments: list[tuple[int, int]], donor_tokens: int
) -> list[list[int] | None]:
    """For each gap, which of the donor's unmatched segments lie between its neighbours' runs.

    None if these are not in order there. A segment that lies between several pairs of neighbours goes to the pair that
    has the fewest.
    """
    donor_stop = {start + length: donor_start + length for donor_start, start, length in runs}
    donor_start = {start: donor_start for donor_start, start, _ in runs}
    between: list[tuple[int, int, int]] = []
    homes: list[list[int] | None] = [None] * len(gaps)
    for i, (start, stop) in enumerate(gaps):
        a, b = donor_stop.get(start, 0), donor_start.get(stop, donor_tokens)
        if a <= b:
            first, last = (bisect_left(segments, (place,)) for place in (a, b))
            between.append((last - first, i, first))
    claimed: set[int] = set()
    for number, i, first in sorted(between):
        homes[i] = [segment for segment in range(first, first + number) if segment not in claimed]
        claimed.update(homes[i] or ())
    return homes


def _most_alike(prompt: list[_Stretch], donor: list[_Stretch]) -> list[tuple[_Stretch, _Stretch]]:
    """Partners by their mean signatures, one to one, the longest of the prompt first."""
    if not prompt or not donor:
        return []
    mean_SB = torch.stack([_signs(stretch.signature_TW).mean(0) for stretch in [*prompt, *donor]])
    mean_SB = torch.nn.functional.normalize(mean_SB - mean_SB.mean(0), dim=1)
    likeness = mean_SB[: len(prompt)] @ mean_SB[len(prompt) :].T
    pairs = []
    for i in sorted(range(len(prompt)), key=lambda i: (-len(prompt[i].at_T), i))[: len(donor)]:
        partner = int(likeness[i].argmax())
        likeness[:, partner] = -torch.inf
        pairs.append((prompt[i], donor[partner]))
    return pairs


def _banded(pairs: list[tuple[_Stretch, _Stretch]], options: FuzzyOptions) -> tuple[np.ndarray, np.ndarray]:
    """The alignment of each pair with the largest total of `max_distance + 1 - distance`, within the band.

    Dynamic programming, a row for each token of a stretch of the prompt, all pairs at once. Column c of row t is the
    donor's token `t + c - band_tokens`: the one before it, for the token before, is in column c too.
    """
    pieces = [
        (_Stretch(prompt.at_T[part], prompt.signature_TW[part]), _Stretch(donor.at_T[part], donor.signature_TW[part]))
        for prompt, donor in pairs
        for part in (slice(row, row + _ROWS) for row in range(0, min(len(prompt.at_T), len(donor.at_T)), _ROWS))
    ]
    if not pieces:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pieces.sort(key=lambda piece: -len(piece[0].at_T))
    (at_T, words_TW, num_rows), (donor_at_T, donor_words_TW, donor_rows) = (
        (
            np.concatenate([piece[side].at_T for piece in pieces]),
            torch.cat([piece[side].signature_TW for piece in pieces]).numpy().view(np.uint32),
            np.array([len(piece[side].at_T) for piece in pieces]),
        )
        for side in (0, 1)
    )
    first, donor_first = num_rows.cumsum() - num_rows, donor_rows.cumsum() - donor_rows
    row_T = np.arange(len(at_T)) - np.repeat(first, num_rows)
    column = np.arange(2 * options.band_tokens + 1)
    weight = np.zeros((len(at_T), len(column)), np.int32)
    for part in (slice(start, start + _ROWS) for start in range(0, len(at_T), _ROWS)):
        donor_row = row_T[part, None] + column - options.band_tokens
        inside = (donor_row >= 0) & (donor_row < np.repeat(donor_rows, num_rows)[part, None])
        token = np.where(inside, donor_row + np.repeat(donor_first, num_rows)[part, None], 0)
        distance = _num_bits_set(words_TW[part, None] ^ donor_words_TW[token])
        weight[part] = np.where(inside, np.maximum(options.max_distance + 1 - distance, 0), 0)
    source = _heaviest_path(weight, first, num_rows)
    t = np.flatnonzero(source >= 0)
    donor_row = row_T[t] + source[t] - options.band_tokens
    return at_T[t], donor_at_T[donor_row + np.repeat(donor_first, num_rows)[t]]


def _heaviest_path(weight: np.ndarray, first: np.ndarray, num_rows: np.ndarray) -> np.ndarray:
    """For each row, the column of its match in the heaviest alignment of its piece, or -1.

    Args:
        weight: int32 `[T, C]` of a match, 0 where there can be none. Column c of one row and column c - 1 of the
            next are the same donor token.
        first, num_rows: of each piece, longest first, so that those that still have rows are always the first ones.
    """
    column = np.arange(weight.shape[1])
    total = np.zeros((len(first), len(column)), np.int32)
    # Of the best way to each place: the column at which it came to its row, and whether by a match.
    arrival = np.empty(weight.shape, np.int32)
    num_active = np.searchsorted(-num_rows, -np.arange(num_rows[0]), side="left")
    for row, active in enumerate(num_active):
        t = first[:active] + row
        skipped = np.concatenate([total[:active, 1:], total[:active, -1:]], axis=1)
        with_match = total[:active] + weight[t]
        is_match = (weight[t] > 0) & (with_match >= skipped)
        value = np.where(is_match, with_match, skipped)
        total[:active] = np.maximum.accumulate(value, axis=1)
        rises = np.ones(value.shape, bool)
        rises[:, 1:] = value[:, 1:] > total[:active, :-1]
        arrival[t] = np.maximum.accumulate(np.where(rises, 2 * column + is_match, 0), axis=1)
    source = np.full(len(weight), -1, np.int64)
    at = np.full(len(first), column[-1])
    for row, active in reversed(list(enumerate(num_active))):
        t = first[:active] + row
        arrived, is_match = np.divmod(arrival[t, at[:active]], 2)
        source[t] = np.where(is_match, arrived, -1)
        at[:active] = np.where(is_match, arrived, np.minimum(arrived + 1, column[-1]))
    return source


def _num_bits_set(words: np.ndarray) -> np.ndarray:
    """Of uint32 `[..., W]`, all words together."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).sum(axis=-1, dtype=np.int32)


def _unmatched(ranges: Sequence[tuple[int, int]], stop: int) -> list[tuple[int, int]]:
    """What of `[0, stop)` lies outside these sorted, disjoint ranges."""
    starts, stops = [a for a, _ in ranges], [b for _, b in ranges]
    return [(a, b) for a, b in zip([0, *stops], [*starts, stop], strict=True) if a < b]
