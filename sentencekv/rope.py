"""How a model turns keys with their position, so that cached keys can be moved to another one.

Rotations by a position compose: a key that was turned for position p is turned by the difference to stand at q,
whatever scale the model put on it (YaRN's attention factor stays as it is). Frequencies come from the model's rotary
modules, and which of them a layer uses, on which dimensions and in which pairs, is found by trying: keys of the same
hidden states at two positions must be those that the rotation says. A model whose keys no candidate explains is
refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv.attention import UnsupportedModelError, run_model

_SHIFTS = (1, 37, 1000)
"""Distances that a candidate must explain; the last within the model's positions."""
_LIMIT = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest error of moved keys, as a share of their norm: some roundings of each number."""
_NUM_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Of one layer's keys: pairs of dimensions are turned by position times frequency."""

    frequency_R: tuple[float, ...]
    """In radians per token, one for each pair; empty: keys do not depend on their position."""
    interleaved: bool
    """Pairs are dimensions (2i, 2i + 1); else (i, i + R), with R pairs."""

    def tables(self, shifts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 `[number of shifts, R]`, of turning by so many tokens; computed in float64, since an
        angle of 100,000 tokens has no exact place in 32 bits."""
        frequency_R = torch.tensor(self.frequency_R, dtype=torch.float64)
        angle_SR = torch.tensor(shifts, dtype=torch.float64)[:, None] * frequency_R
        return angle_SR.cos().float().to(device), angle_SR.sin().float().to(device)


class _OwnToken:
    """Stands in for a session: every token attends to itself alone, so hidden states do not depend on positions."""

    def __init__(self) -> None:
        self.key_of_layer: dict[int, Tensor] = {}

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
        self.key_of_layer[layer] = k_NLH.float()
        return v_NLH.repeat_interleave(q_ALH.shape[0] // k_NLH.shape[0], dim=0)


@torch.inference_mode()
def rotations(model: PreTrainedModel) -> dict[int, Rotation]:
    """How each layer's keys turn, by layer number; checked against keys that the model itself computes.

    Raises UnsupportedModelError if some layer's keys cannot be explained.
    """
    candidates = [Rotation((), False)]
    for frequency_R in _frequencies(model):
        candidates += [Rotation(frequency_R, False), Rotation(frequency_R, True)]
    here = _keys(model, 0)
    limit = _LIMIT.get(model.dtype, _LIMIT[torch.bfloat16])
    farthest = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048, 2048)
    shifts = [shift for shift in _SHIFTS if shift + _NUM_TOKENS < farthest]
    there = {shift: _keys(model, shift) for shift in shifts}
    found = {}
    for layer, key_NLH in here.items():
        fitting = [each for each in candidates if _error(each, key_NLH, {s: there[s][layer] for s in shifts}) <= limit]
        if not fitting:
            raise UnsupportedModelError(
                f"{type(model).__name__}: keys of layer {layer} do not turn with their position as its rotary modules "
                "say, so cached ones cannot be moved; use reuse='exact', which needs no moving"
            )
        found[layer] = fitting[0]
    return found


def _frequencies(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """The distinct tables of frequencies that the model holds, in radians per token."""
    buffers = [
        buffer.double().flatten().tolist()
        for name, buffer in model.named_buffers()
        if "inv_freq" in name and "original" not in name
    ]
    return list(dict.fromkeys(tuple(each) for each in buffers))


def _keys(model: PreTrainedModel, first: int) -> dict[int, Tensor]:
    """Keys `[N, L, H]` of each layer of the same few tokens, the first of which stands at a position."""
    watched = _OwnToken()
    embedding: Any = model.get_input_embeddings()
    vocabulary: int = embedding.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (_NUM_TOKENS,), generator=generator).to(model.device)
    positions = torch.arange(first, first + _NUM_TOKENS, device=model.device)
    run_model(model, ids, positions, watched, keep=1)
    return watched.key_of_layer


def _error(rotation: Rotation, key_NLH: Tensor, moved: dict[int, Tensor]) -> float:
    if 2 * len(rotation.frequency_R) > key_NLH.shape[-1]:
        return float("inf")
    worst = 0.0
    for shift, truth_NLH in moved.items():
        for ours_NLH, wanted in (
            (rotate(key_NLH, rotation, shift), truth_NLH),
            (rotate(truth_NLH, rotation, -shift), key_NLH),
        ):
            worst = max(worst, float((ours_NLH - wanted).norm() / wanted.norm()))
    return worst


def rotate(key_NLH: Tensor, rotation: Rotation, shift: int) -> Tensor:
    """Keys as they are at positions `shift` tokens further on; in float32. The specification of moving."""
    num_pairs = len(rotation.frequency_R)
    if not num_pairs:
        return key_NLH.float()
    cos_R, sin_R = (table[0] for table in rotation.tables([shift], key_NLH.device))
    turned, rest = key_NLH.float().split([2 * num_pairs, key_NLH.shape[-1] - 2 * num_pairs], dim=-1)
    if rotation.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :num_pairs], turned[..., num_pairs:]
    new = (first * cos_R - second * sin_R, second * cos_R + first * sin_R)
    joined = torch.stack(new, dim=-1).flatten(-2) if rotation.interleaved else torch.cat(new, dim=-1)
    return torch.cat([joined, rest], dim=-1)
