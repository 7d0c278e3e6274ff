"""Ways to read a prompt with the help of cached ones: this library's, those that others published, and controls.

All are the same code under other options, so that figures differ by what a method does, not by how it was written. So
the published ones are what their papers choose to compute, not the papers' systems: see `METHODS`.
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

MIN_SIMILARITY = 0.998
"""Least cosine of two prompts' embeddings at which the answer cache gives one the other's answer.

Embeddings are means of the model's input embeddings, by which unrelated texts are much alike, and the more so the
longer they are. By those of the pocket model, parts of 8 books and generated prose, of 30 to 5,000 tokens, had a cosine
of at most 0.996, with the vocabulary's mean subtracted even more; texts with 95% of their tokens in common had 0.97 at
30 tokens and 0.999 at 5,000."""

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

    @property
    def takes_kv(self) -> bool:
        """Whether it reads with the help of cached prompts."""
        return self.reuse != "off"

    def settings(self) -> dict[str, Any]:
        """All that it is, defaults of the library included: a run that goes on goes on with the same."""
        if self.stores_answers:
            return {"min_similarity": MIN_SIMILARITY}
        if not self.takes_kv:
            return {"reuse": self.reuse}
        options = make_reuse_options(self.options)
        found = {"reuse": self.reuse, "like": self.like, **dataclasses.asdict(options)}
        if options.matching is not None:
            found["fuzzy_options"] = dataclasses.asdict(options.matching)
        return found


_NO_FALLBACK = {"min_gain": 0.0}
_NOTHING_MORE = {"first_tokens": 0, "after_new": 0, "last_tokens": 0}
_PUBLISHED = {**_NOTHING_MORE, **_NO_FALLBACK}
_SHARE = {**_PUBLISHED, "ratio": 0.15}
_FUZZY = {"fuzzy": True, "retention": 0.1}


def _first(count: int) -> Method:
    return Method(name=f"first-{count}", options={**_PUBLISHED, "first_tokens": count, "after_new": count})


_METHODS = (
    Method(name=FULL, reuse="off"),
    Method(name="prefix", reuse="exact", options=_NO_FALLBACK),
    Method(name="naive", options={**_PUBLISHED, "rotate": False}),
    Method(name="rotation", options=_PUBLISHED),
    _first(4),
    _first(16),
    Method(name="value", options={"score": "value_deviation", **_SHARE}),
    Method(name="key", options={"score": "key_deviation", **_SHARE}),
    Method(name="attention", options={"score": "attention_deviation", **_SHARE}),
    Method(name="query", options={"score": "query_attention", **_SHARE}),
    Method(name="fuzzy", options={**_PUBLISHED, **_FUZZY}),
    Method(name="fuzzy-or-full", options={**_NOTHING_MORE, **_FUZZY}),
    Method(
        name="semshare",
        options={
            **_PUBLISHED,
            **_FUZZY,
            "monotone": False,
            "score": "query_attention",
            "attention_recovery": 0.55,
        },
    ),
    Method(name=DEFAULT),
    Method(name="random", options={**_PUBLISHED, "score": "random"}, like=DEFAULT),
    Method(name="random-as-value", options={**_PUBLISHED, "score": "random"}, like="value"),
    Method(name=ANSWER_CACHE, reuse="off"),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""By name:

    full             the whole prompt is computed; what all are compared with
    prefix           the beginning that is cached, and nothing else (`reuse="exact"`)
    naive            equal runs as they are, keys not turned
    rotation         equal runs with keys turned to their new positions, none of their tokens computed
    first-4, -16     and the first tokens of each run computed (EPIC: Hu et al., 2024, arXiv:2410.15332)
    value            and 15% of the reused tokens behind the prefix, by value deviation at layer 1; all of them are
                     computed at the first two layers (CacheBlend: Yao et al., 2024, arXiv:2405.16444)
    key, attention, query    the same number by other scores (`sentencekv.reuse.recompute.Recompute.score`)
    fuzzy            ours: KV of similar tokens where there are no equal ones, in order, a tenth of them computed at the
                     last layer
    fuzzy-or-full    the same, if it saves enough
    semshare         after SemShareKV (Zhao and Mastorakis, 2025, arXiv:2509.24832): what has no equal run takes the
                     nearest token anywhere, if that is near enough; computed are those that get 55% of the attention
                     together, and fewer with depth
    default          `reuse="similar"` as it is, fallback included
    random           as many tokens as `default` computes, all layers together, drawn at random
    random-as-value  as many as `value`
    answer-cache     the stored answer to the nearest cached prompt (as GPTCache: Bang, 2023), found by the mean of the
                     model's embeddings, not by a model made for that: `MIN_SIMILARITY`

`first-*` and `value` are not EPIC and CacheBlend in this: their caches hold chunks of text that were computed alone,
and here a donor's KV has seen all of the donor before it, which may help a run behind the same text, and mislead one
behind another. And of a model of 8 layers, such as `pocket`, the two that `value` computes in full are a quarter.
"""


def method_of(given: str) -> Method:
    """A method by its name, or `similar:option=value:...` with any options of `ReuseOptions` and no fallback.

    Raises ValueError or TypeError naming what is unknown.
    """
    name, options = parse(given)
    if name == _SIMILAR and options:
        merged: dict[str, Any] = {**_NO_FALLBACK, **options}
        for switch in ("rotate", "fuzzy", "monotone"):
            if switch in merged:
                merged[switch] = bool(merged[switch])
        make_reuse_options(merged)
        return Method(name=given, options=merged)
    if name not in METHODS or options:
        raise ValueError(f"methods are {', '.join(METHODS)} and similar:option=value, got {given!r}")
    return METHODS[name]


def methods_of(given: str) -> list[Method]:
    """Methods separated by commas, each once, `full` first, and each behind the one that it is to be `like`.

    Raises as `method_of`, and ValueError for no name at all, or one whose model is missing.
    """
    if not _split(given):
        raise ValueError(f"methods are names separated by commas, got {given!r}")
    found = {method.name: method for method in (METHODS[FULL], *map(method_of, _split(given)))}
    for method in found.values():
        if method.like is not None and method.like not in found:
            raise ValueError(f"{method.name} computes as much as {method.like}; ask for that one, too")
    return sorted(found.values(), key=lambda method: (method.name != FULL, method.like is not None))


def _split(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]
