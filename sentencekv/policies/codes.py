"""Every key in two bits per dimension: the best choice of sentences for its bytes, measured."""

import dataclasses

from torch import Tensor

from sentencekv.policies import EstimatingPolicy, Tables
from triton_ops import Lanes, Scores, encode_keys, pack_box, score_codes, summarize, unpack_box


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(EstimatingPolicy):
    """Score the attention mass of keys kept in 2 bits per dimension, within their sentence's bounding box.

    A sentence's keys lie close together, so its box is a good range for a coarse code. The box is kept in a byte for
    each dimension. The score is log sum exp(q . decoded key), the log of the attention mass. Costs 2 bits per key
    dimension and a byte per dimension and sentence.
    """

    rest: bool = True

    bits: int = 2
    """Bits per dimension: 1, 2 or 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (1, 2, 4):
            raise ValueError(f"policy option bits must be 1, 2 or 4, got {self.bits!r}")

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        box = pack_box(moments.minimum, moments.maximum)
        return box, encode_keys(key_TNH, unpack_box(box, key_TNH.shape[2]), offsets, bits=self.bits)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits)
