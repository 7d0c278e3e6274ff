"""The mean key of a sentence, as in the SentenceKV paper."""

import dataclasses

from torch import Tensor

from sentencekv.policies import Policy
from triton_ops import summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean(Policy):
    """Score `q . mean(k)`: the published SentenceKV (Zhu et al., 2025, arXiv:2504.00970)."""

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tensor:
        return summarize(key_TNH, offsets).mean[:, :, None]
