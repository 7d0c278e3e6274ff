"""The bounding box of a sentence's keys, as in Quest."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box(Policy):
    """Score the upper bound of `q . k` over the keys' bounding box (Quest: Tang et al., 2024, arXiv:2406.10774).

    sum(max(q min, q max)) = q . centre + |q| . half range, so the box is kept as centre and half range.
    """

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        centre = 0.5 * (moments.maximum + moments.minimum)
        return (torch.stack([centre, moments.maximum - centre], dim=2),)

    def logits(self, q_NGH: Tensor, tables: Tables, length_S: Tensor, *, scale: float, longest: int) -> Tensor:
        return score_sentences(q_NGH, tables[0], scale=scale, spread="abs", bias_S=None)
