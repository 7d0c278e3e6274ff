"""Every key in two bits per dimension: the best choice of sentences for its bytes, measured."""

import dataclasses

import torch
from torch import Tensor

from sentencekv.policies import Policy, Tables
from triton_ops import (
    Lanes,
    Scores,
    encode_keys,
    pack_box,
    score_codes,
    score_sentences,
    select_sentences,
    summarize,
    unpack_box,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(Policy):
    """Score the attention mass of keys kept in 2 bits per dimension, within their sentence's bounding box.

    A sentence's keys lie close together, so its box (minimum and maximum, exact in the keys' own precision) is a good
    range for a coarse code. The score is log sum exp(q . decoded key), the log of the attention mass. Costs 2 bits per
    key dimension and two vectors per sentence.
    """

    bits: int = 2
    """Bits per dimension: 1, 2 or 4."""

    box_bits: int = 16
    """Bits per dimension of each vector of the box: 16 as in keys, or 4 for its middle and its extent each, which takes
    the summaries from 11% of the KV to 7.5% (`docs/policies.md`)."""

    shortlist: int = 0
    """Budgets of sentences that the boxes alone pick, by the mass that Gaussian keys of such ranges would get; codes
    decide among those, which is faster in long contexts and misses what boxes miss. 0: codes of all are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (1, 2, 4):
            raise ValueError(f"policy option bits must be 1, 2 or 4, got {self.bits!r}")
        if not isinstance(self.shortlist, int) or not (self.shortlist == 0 or self.shortlist >= 2):
            raise ValueError(f"policy option shortlist must be 0 or at least 2, got {self.shortlist!r}")

        if self.box_bits not in (4, 16):
            raise ValueError(f"policy option box_bits must be 4 or 16, got {self.box_bits!r}")
        if self.shortlist and self.box_bits != 16:
            raise ValueError("policy option shortlist ranks by the boxes alone, which takes box_bits=16")

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> Tables:
        moments = summarize(key_TNH, offsets)
        if self.box_bits == 16:
            box = box_SN2H = torch.stack([moments.minimum, moments.maximum], dim=2)
        else:
            box = pack_box(moments.minimum, moments.maximum)
            box_SN2H = unpack_box(box)
        return box, encode_keys(key_TNH, box_SN2H, offsets, bits=self.bits)

    def score(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float) -> Scores:
        return score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits, packed_box=self.box_bits != 16)

    def select(self, q_BAH: Tensor, lanes: Lanes, layer: int, *, scale: float, room_tokens: int) -> Tensor:
        if not self.shortlist:
            return super().select(q_BAH, lanes, layer, scale=scale, room_tokens=room_tokens)
        by_box = score_sentences(q_BAH, lanes, layer, scale=scale, spread="range", log_length=True)
        listed = select_sentences(by_box, lanes, group=self.group, room_tokens=room_tokens, budgets=self.shortlist)
        by_codes = score_codes(q_BAH, lanes, layer, scale=scale, bits=self.bits, sentence_BNS=listed)
        return select_sentences(by_codes, lanes, group=self.group, room_tokens=room_tokens)
