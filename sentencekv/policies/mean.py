"""The mean key of a sentence, as in the SentenceKV paper."""

import dataclasses

from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import score_sentences, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Policy):
    """Score `q . mean(k)`: the published SentenceKV (Zhu et al., 2025, arXiv:2504.00970)."""

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return (summarize(key_TNH, offsets).mean[:, :, None],)

    def logits(self, q_NGH: Tensor, tables: Tables, length_S: Tensor, *, scale: float, longest: int) -> Tensor:
        return score_sentences(q_NGH, tables[0], scale=scale, spread="square", bias_S=None)
