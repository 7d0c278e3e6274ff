"""Quest: pages of 16 tokens instead of sentences."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sentencekv.policies.box import Box
from sentencekv.sentences import no_ends

_PAGE_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages(Box):
    """Score the upper bound of `q . k` over pages of 16 tokens, wherever sentences end (Quest's: arXiv:2406.10774).

    Unlike there, all layers select, the first two included, and the query heads that share a KV head choose together.
    """

    settings: ClassVar[Mapping[str, Any]] = {
        "splitter": no_ends,
        "max_sentence_tokens": _PAGE_TOKENS,
        "min_sentence_tokens": _PAGE_TOKENS,
    }
