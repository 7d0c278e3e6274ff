"""Whether to read a prompt with the help of a cached one, and which: from tokens alone, no KV.

The least to compute wins, if that saves enough; else the prompt is read as if nothing were cached.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sentencekv.reuse.match import Alignment, FuzzyOptions
from sentencekv.reuse.recompute import Plan, Recompute, plan

LEAST_SHARED_TOKENS = 64
"""Fewer are not worth sharing; shorter prompts are not cached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseOptions(Recompute):
    """How a prompt is read with the help of a similar one. Raises ValueError on a bad value."""

    fuzzy: bool = False
    """Reuse KV of similar tokens where no equal ones are (SemShareKV). Names and numbers are near neighbours, so an
    answer may then be the cached prompt's."""

    monotone: bool = True
    """Similar tokens are matched in order, each once, near the place where they stood. False: each with the most
    similar one anywhere, as SemShareKV does."""

    min_gain: float = 0.2
    """Share of the tokens to compute that reuse has to save; else the prompt is read as if there were no cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fuzzy", "monotone"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.min_gain, int | float) or isinstance(self.min_gain, bool):
            raise TypeError(f"min_gain must be a number, got {self.min_gain!r}")
        if self.fuzzy and self.retention == 1:
            raise ValueError(
                "fuzzy matches save what is not computed of them at later layers, and retention=1 computes all; give "
                "retention below 1, such as 0.1"
            )
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain must be at least 0 and below 1, got {self.min_gain}")

    @property
    def matching(self) -> FuzzyOptions | None:
        """How similar tokens are matched; None: they are not."""
        return FuzzyOptions(monotone=self.monotone) if self.fuzzy else None


def make_reuse_options(given: Mapping[str, Any]) -> ReuseOptions:
    """Options from keywords. Raises TypeError for an unknown one, by name; ValueError for a bad value."""
    known = [field.name for field in dataclasses.fields(ReuseOptions)]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown reuse option {name!r}; there are: {', '.join(known)}")
    return ReuseOptions(**given)


def recipe_of(options: ReuseOptions) -> str:
    """What tells approximations apart: those made with other options may be worse ones."""
    what = dataclasses.asdict(options)
    del what["min_gain"]  # says whether, not how
    return json.dumps(what, sort_keys=True)


class Way(NamedTuple):
    """How a prompt can be read with the help of a cached one."""

    at: int
    """Which of the alignments that were given."""
    alignment: Alignment
    """That one, or its prefix alone."""
    planned: Plan
    cost: int
    """About so many tokens, computed at every layer, are as much work."""

    @property
    def approximate(self) -> bool:
        """Whether KV comes from behind other tokens than it is used behind."""
        return any(match.kind != "prefix" for match in self.alignment.matches)


class Decision(NamedTuple):
    """What is the best to do."""

    way: Way | None
    """None: read it as if nothing were cached."""
    reason: str
    """Why nothing more is reused; empty if there is nothing more."""


def decide(alignments: Sequence[Alignment], options: ReuseOptions, num_layers: int, *, moves: bool) -> Decision:
    """The cached prompt that leaves least to compute.

    Args:
        alignments: of the prompt with cached ones.
        num_layers: of the model; they weigh tokens that are not computed at all of them.
        moves: whether more than the prefix may be taken.
    """
    prefixes, others = [], []
    for at, alignment in enumerate(alignments):
        prefix = tuple(match for match in alignment.matches if match.kind == "prefix")
        shared = sum(match.length for match in (alignment.matches if moves else prefix))
        if shared < LEAST_SHARED_TOKENS:
            continue
        prefixes.append(_way(at, dataclasses.replace(alignment, matches=prefix), options, num_layers))
        if moves and len(alignment.matches) > len(prefix):
            others.append(_way(at, alignment, options, num_layers))
    if not prefixes:
        return Decision(None, "nothing like it is cached")
    exact, similar = (min(ways, key=lambda way: way.cost, default=None) for ways in (prefixes, others))
    assert exact is not None
    num_tokens = exact.alignment.num_tokens
    enough = 1 - options.min_gain
    if similar is not None and similar.cost <= enough * exact.cost:
        return Decision(similar, "")
    if exact.alignment.num_prefix >= LEAST_SHARED_TOKENS and exact.cost <= enough * num_tokens:
        reason = "" if similar is None else "moving runs would save too little beside the shared beginning"
        return Decision(exact, reason)
    best = exact.cost if similar is None else min(exact.cost, similar.cost)
    return Decision(
        None,
        f"{best:,} of {num_tokens:,} tokens would be computed anyway, and reuse has to save {options.min_gain:.0%} "
        "(min_gain)",
    )


def _way(at: int, alignment: Alignment, options: ReuseOptions, num_layers: int) -> Way:
    planned = plan(alignment, options)
    return Way(at, alignment, planned, round(planned.cost(options, num_layers)))
