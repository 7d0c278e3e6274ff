"""Partial prefill: a prompt's KV from a cached prompt's rows, with some tokens computed anew, layer by layer.

What is computed: tokens that the cached prompt does not have, the first tokens of each run that comes after something
else than before (EPIC: Hu et al., 2024, arXiv:2410.15332), the last token, and, if asked for, a share of the others
that a score chooses at an early layer (CacheBlend: Yao et al., 2024, arXiv:2405.16444). Computed tokens attend to all
tokens before them by position, whatever is computed of these. Sets are nested: what is dropped at one layer is not
computed at later ones.

Knows the model, sessions and rows; nothing of how a cached prompt was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv.attention import dropping_rows, run_model
from sentencekv.fused import FusedLayers
from sentencekv.reuse.match import Alignment
from sentencekv.reuse.rows import Mover, Rows
from sentencekv.rope import Rotation
from sentencekv.session import Session
from sentencekv.transfer import to_device

Score = Literal["value_deviation", "key_deviation", "attention_deviation", "query_attention", "random"]
SCORES: tuple[Score, ...] = (
    "value_deviation",
    "key_deviation",
    "attention_deviation",
    "query_attention",
    "random",
)
_ASKING_TOKENS = 32
"""Last tokens of a prompt, or of a chunk of it, whose attention says which tokens matter."""
_LOOKED_AT = 4
"""Layers at which the error of what is reused is estimated, about."""
_CHUNK_TOKENS = 65536
"""Tokens whose KV is on the device together, one layer at a time."""
_LATER_BYTES = 1 << 30
"""KV of all layers up to which a prompt is appended to its session after its logits are known: launching that takes
longer than computing the few tokens that are computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which of the tokens that a cached prompt has are computed anew. Raises ValueError on a bad value."""

    first_tokens: int = 4
    """Of each run that comes after another one: what they attend to is what changed most."""

    after_new: int = 16
    """Of each run that comes after tokens which the cached prompt does not have, or at least `first_tokens`: they take
    in what is new, and later tokens find it through them."""

    last_tokens: int = 128
    """Of the prompt, unless they are part of the beginning that both prompts share: what is said next depends on them
    most, and they have seen what changed."""

    ratio: float = 0.0
    """Share of the other reused tokens that is computed as well, chosen by `score`."""

    target_error: float | None = None
    """In place of a ratio: as many as bring the mean relative error of the others, at `check_layer`, below this."""

    attention_recovery: float | None = None
    """In place of a ratio: as many of the tokens with most `query_attention` as get this share of it together (the hot
    tokens of SemShareKV)."""

    score: Score = "value_deviation"
    """`value_deviation`, `key_deviation`: how far a token's value or key is from the cached one (CacheBlend's choice is
    the first); `attention_deviation`: that of values times the attention which the prompt's last tokens pay it;
    `query_attention`: that attention alone; `random`: a control. Tokens are chosen within each chunk of
    `Config.prefill_chunk_tokens` computed ones, whose last tokens are then the prompt's."""

    check_layer: int = 1
    """Where deviations are measured, from tokens that are all computed up to there. Those of layer 0 know nothing of
    what stands before a token, so the first that can differ is 1."""

    retention: float = 1.0
    """Share of the tokens chosen by score, and of fuzzy matches, that is still computed at the last layer; it shrinks
    exponentially with depth (SemShareKV: Zhao and Mastorakis, 2025, arXiv:2509.24832). 1: all."""

    rotate: bool = True
    """Turn keys to their new positions; False is a control: what splicing caches naively does."""

    seed: int = 0
    """Of `random`."""

    def __post_init__(self) -> None:
        for name in ("first_tokens", "after_new", "last_tokens", "check_layer", "seed"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name in ("ratio", "retention", "target_error", "attention_recovery"):
            value = getattr(self, name)
            optional = name in ("target_error", "attention_recovery")
            if (not isinstance(value, int | float) or isinstance(value, bool)) and not (optional and value is None):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.rotate, bool):
            raise TypeError(f"rotate must be True or False, got {self.rotate!r}")
        for name in ("first_tokens", "after_new", "last_tokens", "check_layer", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ratio <= 1 or not 0 < self.retention <= 1:
            raise ValueError(
                f"ratio must be from 0 to 1 and retention above 0 and at most 1, got {self.ratio} and {self.retention}"
            )
        if self.target_error is not None and not self.target_error > 0:
            raise ValueError(f"target_error must be positive, got {self.target_error}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        if self.target_error is not None and self.score not in ("value_deviation", "key_deviation"):
            raise ValueError("target_error needs a score that measures an error: value_deviation or key_deviation")
        if self.attention_recovery is not None:
            if not 0 < self.attention_recovery < 1:
                raise ValueError(f"attention_recovery must be between 0 and 1, got {self.attention_recovery}")
            if self.score != "query_attention" or self.target_error is not None:
                raise ValueError("attention_recovery needs score='query_attention', and no target_error")

    @property
    def chooses(self) -> bool:
        """Whether tokens are chosen by what is computed of them."""
        counts = (self.ratio > 0, self.target_error is not None, self.attention_recovery is not None)
        return self.score != "random" and any(counts)


class Rebuilt(NamedTuple):
    """What a partial prefill gave, beside the session."""

    logits_V: Tensor | None
    """Float32, of the last token; None if it was not computed."""
    computed_of_layer: dict[int, Tensor]
    """Positions of the tokens that were computed at each layer, int64 on the device, rising."""
    error: Tensor | None
    """Float32 scalar on the device: relative error of cached KV at tokens that were computed anew, over the layers
    where it was looked at, the first left out; None if there was none of these."""


class Plan(NamedTuple):
    """What is to be computed of a prompt, as masks over its tokens."""

    source_T: np.ndarray
    """Each token's token in the cached prompt; -1: none."""
    computed_T: np.ndarray
    """Computed at every layer."""
    optional_T: np.ndarray
    """May be computed, as scores say: reused, and not at the beginning that both prompts share."""
    fuzzy_T: np.ndarray
    """Have rows of other, similar tokens: computed at early layers, and at fewer and fewer of the later ones."""

    def starts_T(self, options: Recompute) -> np.ndarray:  # noqa: N802 it returns a tensor of shape T
        """Those that are computed at the first layer."""
        started_T = self.computed_T | self.fuzzy_T
        return started_T | self.optional_T if options.chooses else started_T

    def cost(self, options: Recompute, num_layers: int) -> float:
        """About how many tokens would cost as much if they were computed at every layer."""
        shrinking = options.retention
        mean = 1.0 if shrinking == 1.0 else (shrinking - 1) / math.log(shrinking)
        early = min((options.check_layer + 1) / num_layers, 1.0)
        unknown = options.target_error is not None or options.attention_recovery is not None
        chosen = 0.5 if unknown else options.ratio
        cost = float(self.computed_T.sum()) + float(self.fuzzy_T.sum()) * (early + (1 - early) * mean)
        if options.chooses:
            cost += float(self.optional_T.sum()) * (early + (1 - early) * mean * chosen)
        return cost


def plan(alignment: Alignment, options: Recompute) -> Plan:
    """What an alignment leaves to compute."""
    source_T = alignment.source_T()
    computed_T = source_T < 0
    optional_T, fuzzy_T = np.zeros_like(computed_T), np.zeros_like(computed_T)
    for match in alignment.matches:
        rows = slice(match.start, match.start + match.length)
        if match.kind == "fuzzy":
            fuzzy_T[rows] = True
        elif match.kind == "exact":
            optional_T[rows] = True
            after_new = match.start > 0 and source_T[match.start - 1] < 0
            count = max(options.first_tokens, options.after_new if after_new else 0)
            computed_T[rows][:count] = True
    at_end = slice(max(len(computed_T) - options.last_tokens, 0), None)
    computed_T[at_end] |= (optional_T | fuzzy_T)[at_end]
    computed_T[-1] = True
    optional_T &= ~computed_T
    fuzzy_T &= ~computed_T
    if options.score == "random" and options.ratio:
        choices = np.flatnonzero(optional_T)
        count = round(options.ratio * len(choices))
        computed_T[np.random.default_rng(options.seed).choice(choices, count, replace=False)] = True
        optional_T &= ~computed_T
    return Plan(source_T, computed_T, optional_T, fuzzy_T)


@torch.inference_mode()
def rebuild(
    model: PreTrainedModel,
    layers: FusedLayers,
    session: Session,
    token_ids: Sequence[int],
    ends: Sequence[int],
    planned: Plan,
    rows: Rows,
    rotations: Mapping[int, Rotation] | None,
    options: Recompute,
    *,
    chunk_tokens: int,
) -> Rebuilt:
    """Append to a session the rest of a prompt that it has read the beginning of.

    Args:
        token_ids, ends: of the whole prompt; the session has `session.num_tokens` of them.
        rows: of the cached prompt that `planned` refers to.
        rotations: how keys turn; None: no token of the rest stands elsewhere than in the cached prompt.
        chunk_tokens: computed tokens of one forward pass, about.
    """
    first, total = session.num_tokens, len(token_ids)
    session.expect([end for end in ends if end > session.last_expected_end])
    starts_T = planned.starts_T(options)
    drops = bool((starts_T & ~planned.computed_T).any())
    computed: dict[int, list[Tensor]] = {layer: [] for layer in rows.layers}
    compared: list[Tensor] = []
    logits_V: Tensor | None = None
    turning = rotations if options.rotate else None
    for start, stop in _chunks(starts_T, first, chunk_tokens):
        mover = Mover(rows, planned.source_T[start:stop], start, turning, session.device)
        later = stop - start == total - first and mover.num_bytes <= _LATER_BYTES
        part = _Part(session, planned, starts_T, start, stop, mover, options, rows.layers, later=later)
        session.begin(stop - start, exact=True, expected_tokens=total - start)
        if len(part.started):
            ids_L = to_device([token_ids[at] for at in part.started.tolist()], session.device)
            dropping = dropping_rows(model, part.kept_by) if drops else contextlib.nullcontext()
            with layers.active(), dropping:
                position_L = to_device(part.started, session.device)
                logits_V = run_model(model, ids_L, position_L, part, keep=1)[-1]
        else:
            part.append_all()
        session.end()
        for layer, position_L in part.computed_of_layer.items():
            computed[layer].append(position_L)
        compared += part.compared
        part.wait()
    session.end_reading()
    error = None
    if compared:
        square, norm = torch.stack(compared).sum(0).unbind()
        error = (square / norm.clamp_min(1e-30)).sqrt()
    return Rebuilt(logits_V, {layer: torch.cat(parts) for layer, parts in computed.items()}, error)


def _chunks(starts_T: np.ndarray, first: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Ranges from `first` on, each with about so many tokens to start with."""
    total = len(starts_T)
    chunks, start = [], first
    while start < total:
        stop = min(start + _CHUNK_TOKENS, total)
        at = np.flatnonzero(starts_T[start:stop])
        if len(at) > chunk_tokens:
            stop = start + int(at[chunk_tokens])
        chunks.append((start, stop))
        start = stop
    return chunks


class _Part:
    """Some of a prompt's tokens that follow one another, on their way through the layers: what the model's attention
    function hands queries, keys and values of the computed ones to."""

    def __init__(
        self,
        session: Session,
        planned: Plan,
        starts_T: np.ndarray,
        start: int,
        stop: int,
        mover: Mover,
        options: Recompute,
        layers: Sequence[int],
        *,
        later: bool,
    ) -> None:
        device = session.device
        self.started = torch.from_numpy(np.flatnonzero(starts_T[start:stop]) + start)
        """Positions of the tokens that are computed at the first layer, int64."""
        self.computed_of_layer: dict[int, Tensor] = {}
        self.compared: list[Tensor] = []
        """Of each layer that was looked at: squares of what cached rows are off by, and of the computed ones; `[2]`."""
        self._session, self._mover, self._options = session, mover, options
        self._start, self._num_rows = start, stop - start
        self._layers = list(layers)
        at = self.started.numpy()
        self._compute(to_device(self.started - start, device))
        # Tokens that must be computed come out on top of any choice among all.
        self._must_L = to_device(torch.from_numpy(planned.computed_T[at]), device, torch.bool)
        reused_L = planned.source_T[at] >= 0
        self._reused_L = to_device(torch.from_numpy(reused_L), device, torch.bool) if reused_L.any() else None
        self._num_must = int(planned.computed_T[at].sum())
        num_fuzzy = int(planned.fuzzy_T[at].sum())
        self._num_optional = len(at) - self._num_must - num_fuzzy
        self._num_chosen = round(options.ratio * self._num_optional) + num_fuzzy
        self._drops = len(at) > self._num_must
        every = max(len(self._layers) // _LOOKED_AT, 1)
        self._looked_at = set(self._layers[1::every])
        """Layers at which cached rows are compared with computed ones, where nothing is chosen by that."""
        self._kept_L: Tensor | None = None
        """Of the rows of the layer that ran last, those that go on."""
        self._later = later
        num_buffers = len(self._layers) if later else 2
        self._ahead = _Ahead(mover, self._layers, num_buffers, device) if device.type == "cuda" else None

    def _compute(self, row_L: Tensor) -> None:
        """Have these of the part's tokens computed from here on."""
        self._row_L, self._position_L, self._computed_L = row_L, row_L.to(torch.int32), row_L + self._start

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output `[A, L, H]` of the computed tokens; the session gets the KV of all."""
        assert sliding_window is None, "rows of sliding-window layers are not kept"
        new_NLH = torch.stack([k_NLH, v_NLH], dim=2)
        kv_NTH = self._moved(layer)
        looks = self._reused_L is not None and (self._drops or layer in self._looked_at)
        cached_NLH = kv_NTH[:, self._row_L] if looks else None
        kv_NTH.index_copy_(1, self._row_L, new_NLH)
        output_ALH = self._session.attend_some(
            layer, q_ALH, kv_NTH, self._position_L, scale=scale, softcap=softcap, later=self._later
        )
        self.computed_of_layer[layer] = self._computed_L
        if cached_NLH is not None:
            self._look_at(layer, q_ALH, new_NLH, cached_NLH, kv_NTH, scale)
        if self._ahead is not None:
            self._ahead.done(layer)
        return output_ALH

    def append_all(self) -> None:
        """Give the session the KV of all tokens, none of which is computed."""
        for layer in self._layers:
            kv_NTH = self._moved(layer)
            self._session.append_context(layer, kv_NTH, later=self._later)
            self.computed_of_layer[layer] = self._row_L
            if self._ahead is not None:
                self._ahead.done(layer)

    def wait(self) -> None:
        """Until no more is read of the cached rows: whoever holds them may let go then."""
        if self._ahead is not None:
            self._ahead.wait()

    def _moved(self, layer: int) -> Tensor:
        """Rows of one layer, `[N, T, 2, H]`; those without a source are not written."""
        if self._ahead is not None:
            return self._ahead.take(layer)
        kv_NTH = self._mover.new(layer)
        self._mover.into(layer, kv_NTH)
        return kv_NTH

    def kept_by(self, layer: int) -> Tensor | None:
        """As `dropping_rows` asks: the rows that go on to this layer."""
        kept_L, self._kept_L = self._kept_L, None
        return kept_L

    def _look_at(
        self, layer: int, q_ALH: Tensor, new_NLH: Tensor, cached_NLH: Tensor, kv_NTH: Tensor, scale: float
    ) -> None:
        """Measure how far cached rows are from computed ones, and choose who goes on."""
        difference_NLH = (new_NLH - cached_NLH).float()
        assert self._reused_L is not None
        squares_L2 = difference_NLH.square().sum((0, 3))
        norms_L2 = new_NLH.float().square().sum((0, 3))
        # Rows that have no source hold anything.
        squares_L2, norms_L2 = (each.where(self._reused_L[:, None], 0.0) for each in (squares_L2, norms_L2))
        if layer != self._layers[0]:
            self.compared.append(torch.stack([squares_L2.sum(), norms_L2.sum()]))
        at = self._layers.index(layer)
        if layer != self._layers[-1] and at >= self._options.check_layer and len(self._must_L) > self._num_must:
            self._drop(at, q_ALH, squares_L2, norms_L2, kv_NTH, scale)

    def _drop(self, at: int, q_ALH: Tensor, squares_L2: Tensor, norms_L2: Tensor, kv_NTH: Tensor, scale: float) -> None:
        options = self._options
        score_L = self._scores(q_ALH, squares_L2, kv_NTH, scale).masked_fill(self._must_L, torch.inf)
        if at == options.check_layer and options.target_error is not None:
            self._num_chosen = self._enough(score_L, squares_L2, norms_L2)
        if at == options.check_layer and options.attention_recovery is not None:
            self._num_chosen = self._hot(score_L, options.attention_recovery)
        depth = (at - options.check_layer) / max(len(self._layers) - 2 - options.check_layer, 1)
        # Layers need a token, also where a part of the prompt has none that must be computed.
        count = max(self._num_must + round(self._num_chosen * options.retention**depth), 1)
        if count >= len(score_L):
            return
        kept_L = score_L.topk(count, sorted=False).indices.sort().values
        self._kept_L = kept_L
        self._compute(self._row_L[kept_L])
        self._must_L = self._must_L[kept_L]
        assert self._reused_L is not None
        self._reused_L = self._reused_L[kept_L]

    def _scores(self, q_ALH: Tensor, squares_L2: Tensor, kv_NTH: Tensor, scale: float) -> Tensor:
        score = self._options.score
        if score == "key_deviation":
            return squares_L2[:, 0]
        if score in ("value_deviation", "random"):
            return squares_L2[:, 1]
        attention_L = self._asked(q_ALH, kv_NTH, scale)
        return attention_L if score == "query_attention" else attention_L * squares_L2[:, 1].sqrt()

    def _asked(self, q_ALH: Tensor, kv_NTH: Tensor, scale: float) -> Tensor:
        """Attention `[L]` that the last computed tokens pay each of the computed ones, within the part."""
        num_asking = min(_ASKING_TOKENS, q_ALH.shape[1])
        group = q_ALH.shape[0] // kv_NTH.shape[0]
        key_ATH = kv_NTH[:, :, 0].repeat_interleave(group, dim=0).float()
        logit_ALT = q_ALH[:, -num_asking:].float() @ key_ATH.transpose(1, 2) * scale
        seen_LT = torch.arange(self._num_rows, device=q_ALH.device) <= self._row_L[-num_asking:, None]
        weight_T = logit_ALT.masked_fill(~seen_LT, -torch.inf).softmax(-1).sum((0, 1))
        return weight_T[self._row_L]

    def _hot(self, score_L: Tensor, share: float) -> int:
        """How many of the tokens with the highest scores have this share of all, those that must be computed apart."""
        falling_L = score_L.sort(descending=True).values[self._num_must :]
        missing_L = falling_L.cumsum(0) < share * falling_L.sum()
        return min(int(missing_L.sum()) + 1, len(falling_L))

    def _enough(self, score_L: Tensor, squares_L2: Tensor, norms_L2: Tensor) -> int:
        """How many of the optional tokens to compute, so that those left have a mean error below the target."""
        side = 0 if self._options.score == "key_deviation" else 1
        error_L = (squares_L2[:, side] / norms_L2[:, side].clamp_min(1e-30)).sqrt()
        assert self._options.target_error is not None
        num_choices = len(score_L) - self._num_must
        order_L = score_L.argsort()[:num_choices]  # the least first, those that must be computed left out
        count_L = torch.arange(1, num_choices + 1, device=order_L.device)
        below_L = error_L[order_L].cumsum(0) / count_L < self._options.target_error
        # The mean need not rise with the score, so the longest beginning counts.
        return num_choices - int((below_L * count_L).max())


class _Ahead:
    """Rows of the next layer come from host memory, on a stream of their own, while one layer is computed."""

    def __init__(self, mover: Mover, layers: Sequence[int], num_buffers: int, device: torch.device) -> None:
        """`num_buffers`: layers whose rows are there at the same time; as many as there are layers, and they stay."""
        self._mover, self._layers, self._device = mover, list(layers), device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor] = []
        self._filled = [torch.cuda.Event() for _ in range(num_buffers)]
        self._used = [torch.cuda.Event() for _ in range(num_buffers)]
        self._next = 0

    def take(self, layer: int) -> Tensor:
        """The rows of a layer, `[N, T, 2, H]`; valid until `done`, or for good. Layers are taken in order."""
        compute = torch.cuda.current_stream(self._device)
        at = self._layers.index(layer)
        if not self._buffers:
            self._buffers = [self._mover.new(layer) for _ in self._used]
            for buffer in self._buffers:
                buffer.record_stream(self._stream)
            self._stream.wait_stream(compute)  # the memory may have been another tensor's a moment ago
        self._move_up_to(at)
        compute.wait_event(self._filled[at % len(self._buffers)])
        return self._buffers[at % len(self._buffers)]

    def done(self, layer: int) -> None:
        """What reads the rows of a layer is launched."""
        at = self._layers.index(layer)
        self._used[at % len(self._buffers)].record(torch.cuda.current_stream(self._device))
        self._move_up_to(at + 1)

    def wait(self) -> None:
        """Until all that was taken has left host memory. Logits come later than that: nobody waits longer for it."""
        self._stream.synchronize()

    def _move_up_to(self, last: int) -> None:
        while self._next <= min(last, len(self._layers) - 1):
            at = self._next % len(self._buffers)
            with torch.cuda.stream(self._stream):
                if self._next >= len(self._buffers):
                    self._stream.wait_event(self._used[at])
                self._mover.into(self._layers[self._next], self._buffers[at])
                self._filled[at].record()
            self._next += 1
