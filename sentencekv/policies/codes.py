"""Every key in two bits per dimension: the best choice of sentences for its bytes, measured."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import Lanes, Scores, encode_keys, score_codes, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(Policy):
    """Score the attention mass of keys kept in 2 bits per dimension, within their sentence's bounding box.

    A sentence's keys lie close together, so its box (minimum and maximum, exact in the keys' own precision) is a good
    range for a coarse code. The score is log sum exp(q . decoded key), the log of the attention mass. Costs 2 bits per
    key dimension and two vectors per sentence.
    """

    bits: int = 2
    """Bits per dimension: 1, 2 or 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (1, 2, 4):
            raise ValueError(f"policy option bits must be 1, 2 or 4, got {self.bits!r}")

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        box_SN2H = torch.stack([moments.minimum, moments.maximum], dim=2)
        return box_SN2H, encode_keys(key_TNH, box_SN2H, offsets, bits=self.bits)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits)
