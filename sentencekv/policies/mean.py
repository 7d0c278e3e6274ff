"""The mean key of a sentence, as in the SentenceKV paper."""

import dataclasses

from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import Lanes, Scores, score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Policy):
    """Score `q . mean(k)`: the published SentenceKV (Zhu et al., 2025, arXiv:2504.00970)."""

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return (summarize(key_TNH, offsets).mean[:, :, None],)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_sentences(q_BAH, lanes, layer, scale=scale, spread=None, log_length=False)
