"""Which tokens of a new prompt were read before: its alignment with a cached prompt, the donor.

First the common prefix, then runs of equal tokens wherever they stand (`runs.py`), and what is between them by
likeness, if that is asked for (`fuzzy.py`). Knows token ids, sentence ends and an embedding table; nothing of models,
sessions or caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from sentencekv.reuse.fuzzy import FuzzyOptions, fuzzy_sources
from sentencekv.reuse.runs import equal_runs

__all__ = ["Alignment", "FuzzyOptions", "Kind", "Match", "align"]

Kind = Literal["prefix", "exact", "fuzzy"]


class Match(NamedTuple):
    """Tokens `[start, start + length)` of the prompt, matched with the donor's from `donor_start` on."""

    donor_start: int
    start: int
    length: int
    kind: Kind

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def donor_stop(self) -> int:
        return self.donor_start + self.length

    @property
    def shift(self) -> int:
        """How far the tokens moved; positive is to the right."""
        return self.start - self.donor_start


@dataclass(frozen=True)
class Alignment:
    """What of a prompt is in the donor, and where.

    Attributes:
        donor_tokens, num_tokens: lengths of the donor and of the prompt.
        matches: sorted by start, disjoint in the prompt. Disjoint in the donor too, but for fuzzy matches made without
            `monotone`.
    """

    donor_tokens: int
    num_tokens: int
    matches: tuple[Match, ...]

    @property
    def num_prefix(self) -> int:
        """Tokens of the common prefix: all before them is equal too."""
        return sum(match.length for match in self.matches if match.kind == "prefix")

    @property
    def num_kept(self) -> int:
        """Equal tokens after the prefix that did not move."""
        return sum(match.length for match in self.matches if match.kind == "exact" and match.shift == 0)

    @property
    def num_moved(self) -> int:
        """Equal tokens that moved."""
        return sum(match.length for match in self.matches if match.kind == "exact" and match.shift != 0)

    @property
    def num_fuzzy(self) -> int:
        """Tokens matched by likeness; some may be equal."""
        return sum(match.length for match in self.matches if match.kind == "fuzzy")

    @property
    def num_new(self) -> int:
        """Tokens without a match."""
        return self.num_tokens - sum(match.length for match in self.matches)

    def source_T(self) -> np.ndarray:  # noqa: N802 it returns a tensor of shape T
        """The donor position of each token of the prompt, or -1; int64 `[num_tokens]`."""
        source_T = np.full(self.num_tokens, -1, np.int64)
        for match in self.matches:
            source_T[match.start : match.stop] = np.arange(match.donor_start, match.donor_stop)
        return source_T


def align(
    donor_ids: Sequence[int] | np.ndarray,
    ids: Sequence[int] | np.ndarray,
    *,
    donor_ends: Sequence[int] | np.ndarray,
    ends: Sequence[int] | np.ndarray,
    min_run_tokens: int = 16,
    fuzzy: FuzzyOptions | None = None,
    embedding_VE: Tensor | None = None,
) -> Alignment:
    """The prompt `ids` in terms of the donor: prefix, equal runs, and fuzzy matches if asked for.

    Prefix and equal runs are one to one and maximal, and nothing that long is left out: see `equal_runs`. Of runs that
    hold a whole sentence of both, and then of all others, the longest is taken first. Tokens of fuzzy matches may be
    equal or not; those that are in order and one to one leave the donor tokens of other matches alone.

    Args:
        donor_ids, ids: token ids of the cached and of the new prompt; either may be empty.
        donor_ends, ends: positions at which sentences end, rising, the last one the number of tokens. They only say
            what is looked for first; texts that were cut in different ways match all the same.
        min_run_tokens: shorter runs are not reported, except the prefix.
        fuzzy: how tokens between the runs are matched by likeness; None: not at all.
        embedding_VE: the model's input embeddings `[V, E]`, E even, for `fuzzy`; on any device.

    Raises:
        ValueError: for ends that are not those of the tokens, or `fuzzy` without embeddings of all ids.
    """
    if min_run_tokens < 1:
        raise ValueError(f"min_run_tokens must be at least 1, got {min_run_tokens}; the default is 16")
    donor, prompt = _row("donor_ids", donor_ids), _row("ids", ids)
    num_prefix = _common_prefix(donor, prompt)
    runs = equal_runs(
        donor,
        prompt,
        donor_ends=_ends("donor_ends", donor_ends, len(donor)),
        ends=_ends("ends", ends, len(prompt)),
        num_prefix=num_prefix,
        min_run_tokens=min_run_tokens,
    )
    matches = [Match(*run, "prefix" if run.start < num_prefix else "exact") for run in runs]
    if fuzzy is not None:
        if embedding_VE is None:
            raise ValueError(
                "fuzzy matching compares embeddings, got embedding_VE=None; pass the model's input embeddings"
            )
        matches += _fuzzy_matches(fuzzy_sources(donor, prompt, runs, fuzzy, embedding_VE))
        matches.sort(key=lambda match: match.start)
    return Alignment(len(donor), len(prompt), tuple(matches))


def _row(name: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    row = np.asarray(numbers, dtype=np.int64)
    if row.ndim != 1:
        raise ValueError(f"{name} must be one row of numbers, got shape {list(row.shape)}; align one prompt at a time")
    return row


def _ends(name: str, ends: Sequence[int] | np.ndarray, num_tokens: int) -> np.ndarray:
    row = _row(name, ends)
    last = int(row[-1]) if len(row) else 0
    if last != num_tokens or (np.diff(row, prepend=0) < 0).any():
        raise ValueError(
            f"{name} must rise from 0 or more to the number of tokens ({num_tokens}), got {len(row)} numbers that end "
            f"with {last}; pass the sentence ends of these very tokens"
        )
    return row


def _common_prefix(donor_ids: np.ndarray, ids: np.ndarray) -> int:
    num_common = min(len(donor_ids), len(ids))
    differs = donor_ids[:num_common] != ids[:num_common]
    return int(differs.argmax()) if differs.any() else num_common


def _fuzzy_matches(source_T: np.ndarray) -> list[Match]:
    """Neighbours that come from neighbours are one match."""
    start = np.flatnonzero(source_T >= 0)
    source = source_T[start]
    first = np.flatnonzero((np.diff(start, prepend=-2) != 1) | (np.diff(source, prepend=-2) != 1))
    length = np.diff(first, append=len(start))
    columns = zip(source[first].tolist(), start[first].tolist(), length.tolist(), strict=True)
    return [Match(*column, "fuzzy") for column in columns]
