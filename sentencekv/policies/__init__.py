"""How sentences are summarised and chosen: one file per policy, the file name is its key.

A policy knows keys, queries and lengths; it knows nothing of models, tiers or sessions. To add one, put a file here
with one subclass of `Policy`, a frozen dataclass whose fields are its options; nothing else needs to change.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from triton_ops import score_sentences, select_sentences
from triton_ops.score_sentences import Group, Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What every policy promises: a summary for each closed sentence, and a choice of sentences for each query.

    The base class scores with `score_sentences` over summaries of `num_planes` vectors per sentence and KV head; a
    policy of that form gives `summarize` (and `bias` if it has one), any other overrides `select`.
    """

    reads: ClassVar[Literal["selected", "recent", "everything"]] = "selected"
    """`recent`: sink, window and tail only. `everything`: exact attention over all tiers. Neither needs summaries."""

    num_planes: ClassVar[int] = 1
    """Vectors of the head dimension that one sentence's summary takes, per layer and KV head."""

    spread: ClassVar[Spread] = "square"
    """Element-wise function of the query that meets the second plane."""

    group: Group = "max"
    """How the query heads that share a KV head agree on one choice: `max` or `mean` of their shares."""

    def __post_init__(self) -> None:
        if self.group not in ("max", "mean"):
            raise ValueError(f"policy option group must be 'max' or 'mean', got {self.group!r}")

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tensor:
        """Summaries `[S, N, num_planes, H]` float32 of post-RoPE keys `[T, N, H]`; `offsets` is CSR, `[S + 1]`."""
        raise NotImplementedError

    def bias(self, length_S: Tensor) -> Tensor | None:
        """What a sentence's length adds to its logits, `[S]` float32; None: nothing."""
        return None

    def select(
        self,
        q_NGH: Tensor,
        summaries: Sequence[Tensor],
        length_S: Tensor,
        *,
        scale: float,
        room_tokens: int,
        max_selected: int,
    ) -> Tensor:
        """Ids of the chosen sentences, int64 `[N, K]`, best first, padded with -1; at most `room_tokens` per head."""
        score_NS = score_sentences(
            q_NGH, summaries, scale=scale, spread=self.spread, bias_S=self.bias(length_S), group=self.group
        )
        return select_sentences(score_NS, length_S, room_tokens=room_tokens, max_selected=max_selected)

    @classmethod
    def describe(cls) -> str:
        """The first line of the policy's docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


@functools.cache
def available() -> tuple[str, ...]:
    """The names of all policies, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def policy_class(name: str) -> type[Policy]:
    """The class of a policy. Raises ValueError with the list of names if there is none of that name."""
    if name not in available():
        raise ValueError(f"unknown policy {name!r}; available: {', '.join(available())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, Policy) and member.__module__ == module.__name__
    )
    return found


def load(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy with its options. Raises ValueError naming an unknown policy, option or value."""
    cls = policy_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of policy {name!r}; it has: {', '.join(known) or 'none'}")
    return cls(**(options or {}))


def log_lengths(length_S: Tensor) -> Tensor:
    """log n of each sentence: n equal keys hold n times the attention mass of one."""
    return torch.log(length_S.to(torch.float32))
