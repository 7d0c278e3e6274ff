"""Every engine default, in one frozen dataclass.

Knows nothing of models, devices or policies: only that numbers make sense together. Policy names and their options
are checked where policies are loaded, device and dtype where the model is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from sentencekv.sentences import Splitter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a context is cut into sentences, kept and read back. Raises ValueError or TypeError on a bad value."""

    policy: str = "codes"
    """How summaries are made and sentences chosen: a file name in `sentencekv/policies/`."""

    policy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword options of the policy, e.g. `{"group": "mean"}`; an unknown one is refused by name."""

    budget_tokens: int = 1024
    """Context tokens that one KV head may read at one step, sink and window included. While the context is not longer
    than this, every policy that selects equals dense attention."""

    sink_tokens: int = 16
    """First context tokens, always read (attention sinks: Xiao et al., 2023, arXiv:2309.17453)."""

    window_tokens: int = 64
    """Last tokens, always read. The unfinished sentence after them, fewer than `max_sentence_tokens` tokens, is read
    as well: it has no summary yet."""

    max_sentence_tokens: int = 16
    """Longer sentences are split, at marks where there are some; also the size of one hot-set slot. 32 costs a tenth
    less of summaries and of time in long contexts, and finds a little less (`docs/policies.md`)."""

    min_sentence_tokens: int = 8
    """Shorter sentences join their neighbour where the maximum allows."""

    splitter: Splitter | None = None
    """Text to character offsets at which sentences end; None: NLTK's Punkt with the parameters that we ship."""

    hot_tokens: int | None = None
    """GPU tokens per layer and KV head for sentences fetched earlier, in slots of `max_sentence_tokens`, however short
    the sentence in it; None: twice what selection fills of the budget. Never more slots than the context has sentences,
    never fewer than one step selects."""

    prefill_chunk_tokens: int | None = None
    """Tokens per forward pass while reading; bounds the activations, never changes the result. None: 8192 on a GPU,
    1024 on a CPU."""

    kv_dtype: Literal["auto", "fp8", "int8", "int4"] = "auto"
    """Precision of closed sentences in host memory and in files. `auto` is the model's own; `fp8` and `int8` take half
    of 16 bits and `int4` 31%, scales included, and what they round off is lost to every later token. On the GPU KV is
    in the model's precision, and so is what summaries are made from."""

    host_memory_bytes: int | None = None
    """Upper bound for KV kept in host memory by one LongContextLM; None: what the machine has free."""

    spill_folder: str | None = None
    """Where documents that were not used for longest go when host memory is exhausted, as files without a name that
    vanish with them; they come back when they are asked. None: a MemoryError instead."""

    reuse: Literal["off", "exact", "similar"] = "off"
    """Whether prompts are cached, and what a new one takes from them: `exact`, the beginning that it shares with one,
    which changes nothing but time; `similar`, runs of tokens that moved as well, which is an approximation
    (`Generation.reuse` says of what). Only within a namespace; needs `pip install "sentencekv[reuse]"`."""

    reuse_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword options of `similar`, without effect on the other modes, e.g. `{"ratio": 0.15}`: see
    `sentencekv.reuse.decide.ReuseOptions`."""

    reuse_folder: str | None = None
    """Where cached prompts go that have to leave host memory, and where they are when the process ends; the next one
    finds them there. None: they are forgotten."""

    reuse_bytes: int | None = None
    """Upper bound for cached prompts in host memory; None: half of what is free when the first is cached."""

    reuse_disk_bytes: int | None = None
    """Upper bound for the files in `reuse_folder`; None: what the disk has room for."""

    reuse_namespace_bytes: int | None = None
    """Upper bound for each namespace's cached prompts in host memory, and as much in files; None: only the bounds for
    all together."""

    reuse_embedding: Callable[[str], Sequence[float]] | None = None
    """A text to the numbers by which prompts of similar meaning are found where `fuzzy` matches are on, e.g. a
    sentence-embedding model's; always as many. It is asked before a prompt is read. None: the mean of the model's own
    embeddings of its tokens."""

    def __post_init__(self) -> None:
        for field in ("budget_tokens", "window_tokens", "max_sentence_tokens", "min_sentence_tokens"):
            _check_count(field, getattr(self, field), least=1)
        _check_count("sink_tokens", self.sink_tokens, least=0)
        if self.prefill_chunk_tokens is not None:
            _check_count("prefill_chunk_tokens", self.prefill_chunk_tokens, least=16)
        if self.hot_tokens is not None:
            _check_count("hot_tokens", self.hot_tokens, least=1)
        if self.host_memory_bytes is not None:
            _check_count("host_memory_bytes", self.host_memory_bytes, least=1)
        if not isinstance(self.policy, str):
            raise TypeError(f"policy must be a name such as 'moments', got {type(self.policy).__name__}")
        if not isinstance(self.policy_options, Mapping):
            raise TypeError(f"policy_options must be a mapping, got {type(self.policy_options).__name__}")
        object.__setattr__(self, "policy_options", dict(self.policy_options))  # the caller's may change later
        if self.splitter is not None and not callable(self.splitter):
            raise TypeError(f"splitter must be callable or None, got {type(self.splitter).__name__}")
        if self.kv_dtype not in ("auto", "fp8", "int8", "int4"):
            raise ValueError(f"kv_dtype must be 'auto', 'fp8', 'int8' or 'int4', got {self.kv_dtype!r}")
        self._check_reuse()
        if self.spill_folder is not None and not os.path.isdir(self.spill_folder):
            raise ValueError(
                f"spill_folder must be a directory that exists, got {self.spill_folder!r}; create it first"
            )
        always_read = self.sink_tokens + self.window_tokens
        if self.budget_tokens <= always_read:
            raise ValueError(
                f"budget_tokens must exceed sink_tokens + window_tokens ({always_read}), got {self.budget_tokens}; "
                "raise the budget or shrink the window"
            )
        if self.room_tokens < self.max_sentence_tokens:
            raise ValueError(
                f"budget_tokens ({self.budget_tokens}) leaves room for {self.room_tokens} tokens beside sink and "
                f"window, and a sentence may have {self.max_sentence_tokens}; raise the budget to at least "
                f"{always_read + self.max_sentence_tokens}, or lower max_sentence_tokens"
            )
        if self.min_sentence_tokens > self.max_sentence_tokens:
            raise ValueError(
                f"min_sentence_tokens ({self.min_sentence_tokens}) must not exceed "
                f"max_sentence_tokens ({self.max_sentence_tokens})"
            )
        if self.hot_tokens is not None and self.hot_tokens < self.budget_tokens:
            raise ValueError(
                f"hot_tokens ({self.hot_tokens}) must be at least budget_tokens ({self.budget_tokens}): what is "
                "selected for a step must fit in the hot set"
            )

    def _check_reuse(self) -> None:
        if self.reuse not in ("off", "exact", "similar"):
            raise ValueError(f"reuse must be 'off', 'exact' or 'similar', got {self.reuse!r}")
        if not isinstance(self.reuse_options, Mapping):
            raise TypeError(f"reuse_options must be a mapping, got {type(self.reuse_options).__name__}")
        object.__setattr__(self, "reuse_options", dict(self.reuse_options))
        for name in ("reuse_bytes", "reuse_disk_bytes", "reuse_namespace_bytes"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=1)
        if self.reuse_folder is not None:
            if not isinstance(self.reuse_folder, str | os.PathLike):
                raise TypeError(f"reuse_folder must be a path or None, got {type(self.reuse_folder).__name__}")
            object.__setattr__(self, "reuse_folder", os.fspath(self.reuse_folder))
            if os.path.exists(self.reuse_folder) and not os.path.isdir(self.reuse_folder):
                raise ValueError(f"reuse_folder must be a directory, and {self.reuse_folder!r} is not: name another")
        if self.reuse_embedding is not None and not callable(self.reuse_embedding):
            raise TypeError(f"reuse_embedding must be callable or None, got {type(self.reuse_embedding).__name__}")
        if self.reuse != "off" and self.kv_dtype != "auto":
            raise ValueError(
                f"reuse={self.reuse!r} needs kv_dtype='auto', got {self.kv_dtype!r}: rows of fewer bits would be "
                "rounded again each time they are reused"
            )

    @property
    def room_tokens(self) -> int:
        """The part of the budget that selection fills: `budget_tokens - sink_tokens - window_tokens`."""
        return self.budget_tokens - self.sink_tokens - self.window_tokens

    @property
    def max_selected(self) -> int:
        """The most sentences that can be selected at one step, from the shortest regular sentence."""
        return -(-self.room_tokens // self.min_sentence_tokens)

    @property
    def kv_format(self) -> Literal["fp8", "int8", "int4"] | None:
        """Of closed sentences off the GPU; None: the model's precision."""
        return None if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def num_slots(self) -> int:
        """Hot-set slots per layer and KV head."""
        wanted = self.hot_tokens if self.hot_tokens is not None else 2 * self.room_tokens
        return -(-wanted // self.max_sentence_tokens)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
