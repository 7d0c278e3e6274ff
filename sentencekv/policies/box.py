"""The bounding box of a sentence's keys, as in Quest."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import Lanes, Scores, score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box(Policy):
    """Score the upper bound of `q . k` over the keys' bounding box (Quest: Tang et al., 2024, arXiv:2406.10774).

    sum(max(q min, q max)) = q . centre + |q| . half range, so the box is kept as centre and half range.
    """

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        centre = 0.5 * (moments.maximum + moments.minimum)
        return (torch.stack([centre, moments.maximum - centre], dim=2),)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_sentences(q_BAH, lanes, layer, scale=scale, spread="abs", log_length=False)
