"""Ways to read a prompt with the help of cached ones: this library's, those that others published, and controls.

All are the same code under other options, so that figures differ by what a method does, not by how it was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from eval.statistics import FULL
from sentencekv.policies import parse
from sentencekv.reuse.decide import make_reuse_options

DEFAULT = "default"
"""What `reuse="similar"` does if nothing else is said; other methods are compared with it."""

ANSWER_CACHE = "answer-cache"

_SIMILAR = "similar"
"""With options, any method: `similar:first_tokens=4:ratio=0.05`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way; its fields but `name` are settings of `LongContextLM`."""

    name: str
    reuse: Literal["off", "exact", "similar"] = "similar"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: str | None = None
    """A method asked before it, as many tokens as which this one computes, drawn at random."""

    @property
    def stores_answers(self) -> bool:
        """Whether it reads nothing, but gives out the answer to the nearest cached prompt."""
        return self.name == ANSWER_CACHE


_NO_FALLBACK = {"min_gain": 0.0}
_PUBLISHED = {"last_tokens": 0, **_NO_FALLBACK}
_NOTHING_FIRST = {"first_tokens": 0, **_PUBLISHED}
_SHARE = {"ratio": 0.15, **_NOTHING_FIRST}

_METHODS = (
    Method(name=FULL, reuse="off"),
    Method(name="prefix", reuse="exact", options=_NO_FALLBACK),
    Method(name="naive", options={"rotate": False, **_NOTHING_FIRST}),
    Method(name="rotation", options=_NOTHING_FIRST),
    Method(name="first-4", options={"first_tokens": 4, **_PUBLISHED}),
    Method(name="first-16", options={"first_tokens": 16, **_PUBLISHED}),
    Method(name="value", options={"score": "value_deviation", **_SHARE}),
    Method(name="key", options={"score": "key_deviation", **_SHARE}),
    Method(name="attention", options={"score": "attention_deviation", **_SHARE}),
    Method(name="query", options={"score": "query_attention", **_SHARE}),
    Method(name="fuzzy", options={"fuzzy": True, "retention": 0.1, **_NOTHING_FIRST}),
    Method(name="fuzzy-or-full", options={"fuzzy": True, "retention": 0.1, "first_tokens": 0, "last_tokens": 0}),
    Method(name=DEFAULT),
    Method(name="random", options={"score": "random", **_NOTHING_FIRST}, like=DEFAULT),
    Method(name="random-as-value", options={"score": "random", **_NOTHING_FIRST}, like="value"),
    Method(name=ANSWER_CACHE, reuse="off"),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""By name:

    full             the whole prompt is computed; what all are compared with
    prefix           the beginning that is cached, and nothing else (`reuse="exact"`)
    naive            equal runs as they are, keys not turned
    rotation         equal runs with keys turned to their new positions, none of their tokens computed
    first-4, -16     and the first tokens of each run computed (EPIC: Hu et al., 2024, arXiv:2410.15332)
    value            and 15% of the tokens, by value deviation at layer 1 (CacheBlend: Yao et al., 2024,
                     arXiv:2405.16444)
    key, attention, query    the same number by other scores (`sentencekv.reuse.recompute.Recompute.score`)
    fuzzy            KV of similar tokens where there are no equal ones, a tenth of them computed at the last layer
                     (SemShareKV: Zhao and Mastorakis, 2025, arXiv:2509.24832)
    fuzzy-or-full    the same, if it saves enough
    default          `reuse="similar"` as it is, fallback included
    random           as many tokens as `default` computes, all layers together, drawn at random
    random-as-value  as many as `value`
    answer-cache     the stored answer to the nearest cached prompt (as GPTCache: Bang, 2023)
"""


def method_of(given: str) -> Method:
    """A method by its name, or `similar:option=value:...` with any options of `ReuseOptions` and no fallback.

    Raises ValueError or TypeError naming what is unknown.
    """
    name, options = parse(given)
    if name == _SIMILAR and options:
        merged: dict[str, Any] = {**_NO_FALLBACK, **options}
        for switch in ("rotate", "fuzzy"):
            if switch in merged:
                merged[switch] = bool(merged[switch])
        make_reuse_options(merged)
        return Method(name=given, options=merged)
    if name not in METHODS or options:
        raise ValueError(f"methods are {', '.join(METHODS)} and similar:option=value, got {given!r}")
    return METHODS[name]


def methods_of(given: str) -> list[Method]:
    """Methods separated by commas, each once, `full` first, and each behind the one that it is to be `like`.

    Raises as `method_of`, and ValueError for one whose model is missing.
    """
    found = {method.name: method for method in (METHODS[FULL], *map(method_of, _split(given)))}
    for method in found.values():
        if method.like is not None and method.like not in found:
            raise ValueError(f"{method.name} computes as much as {method.like}; ask for that one, too")
    return sorted(found.values(), key=lambda method: (method.name != FULL, method.like is not None))


def _split(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]
