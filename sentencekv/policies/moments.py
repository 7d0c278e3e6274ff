"""Mean and variance of a sentence's keys: an estimate of the attention mass that the sentence would get."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import EstimatingPolicy, Tables
from triton_ops import Lanes, Scores, score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments(EstimatingPolicy):
    """Score `q . mean + 1/2 sum(q^2 var) + log n`: the log of the sentence's attention mass were its keys Gaussian.

    For k ~ N(mean, diag(var)), E[exp(q . k)] = exp(q . mean + 1/2 q^2 . var), the moment-generating function, with the
    scale 1/sqrt(H) folded into q; a sentence of n tokens has n times that mass.
    """

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        return (torch.stack([moments.mean, 0.5 * moments.variance], dim=2),)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_sentences(q_BAH, lanes, layer, scale=scale, spread="square", log_length=True)
