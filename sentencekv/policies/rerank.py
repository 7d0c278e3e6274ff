"""Two stages: boxes pick several budgets of sentences, keys in four bits decide among those."""

import dataclasses

from torch import Tensor

from sentencekv.policies import Policy, Selection, Tables
from sentencekv.policies.codes import Codes
from triton_ops import Lanes, Scores, score_codes, score_sentences, select_sentences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerank(Policy):
    """Rank all sentences by their keys' bounding boxes, and the best of them again by keys kept in 4 bits.

    The first rank is the attention mass that Gaussian keys of such ranges would get. Reads less than `codes` in long
    contexts, and misses what boxes miss (`docs/policies.md`).
    """

    only_reading = Policy.only_reading | {"shortlist"}

    bits: int = 4
    """Bits per dimension: 1, 2 or 4."""

    shortlist: int = 4
    """Budgets of sentences that the boxes pick."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Codes(bits=self.bits)  # raises on bits that there are not
        if not isinstance(self.shortlist, int) or self.shortlist < 2:
            raise ValueError(f"policy option shortlist must be at least 2, got {self.shortlist!r}")

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        return Codes(bits=self.bits).summarize(key_TNH, offsets)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits)

    def select(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, room_tokens: int) -> Selection:
        by_box = score_sentences(q_BAH, lanes, layer, scale=scale, spread="range", log_length=True)
        listed = select_sentences(by_box, lanes, group=self.group, room_tokens=room_tokens, budgets=self.shortlist)
        by_codes = score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits, sentence_BNS=listed)
        return Selection(select_sentences(by_codes, lanes, group=self.group, room_tokens=room_tokens))
