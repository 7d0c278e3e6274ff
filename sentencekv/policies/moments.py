"""Mean and variance of a sentence's keys: an estimate of the attention mass that the sentence would get."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments(Policy):
    """Score `q . mean + 1/2 sum(q^2 var) + log n`: the log of the sentence's attention mass were its keys Gaussian.

    For k ~ N(mean, diag(var)), E[exp(q . k)] = exp(q . mean + 1/2 q^2 . var), the moment-generating function, with the
    scale 1/sqrt(H) folded into q; a sentence of n tokens has n times that mass.
    """

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        return (torch.stack([moments.mean, 0.5 * moments.variance], dim=2),)

    def logits(self, q_NGH: Tensor, tables: Tables, length_S: Tensor, *, scale: float, longest: int) -> Tensor:
        bias_S = torch.log(length_S.to(torch.float32))
        return score_sentences(q_NGH, tables[0], scale=scale, spread="square", bias_S=bias_S)
