"""What a reading reused, in numbers that explain themselves."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reuse:
    """What of a prompt came from a cached one."""

    kind: Literal["none", "same", "prefix", "similar"]
    """`none`: all was computed. `same`: the prompt was cached. `prefix`: it begins as a cached one does, and its KV is
    what reading it gives. `similar`: runs of a cached one were moved, and its KV is an approximation."""
    approximate: bool
    """Whether KV differs from what reading the prompt gives, beyond rounding."""
    reason: str
    """Why nothing more was reused, in words; empty if there was nothing more to reuse."""
    donor: int | None
    """Key of the cached prompt in the catalog."""
    prompt_tokens: int
    prefix_tokens: int
    """Tokens of the beginning that both share; of an identical prompt, all."""
    kept_tokens: int
    """Reused tokens after it that stand where they stood."""
    moved_tokens: int
    """Reused tokens that stand elsewhere, keys turned to their new position."""
    fuzzy_tokens: int
    """Tokens that took the KV of similar ones (`reuse_options={"fuzzy": True}`)."""
    recomputed_tokens: int
    """Tokens that the cached prompt has and that were computed anew, at the first layer."""
    new_tokens: int
    """Tokens that it does not have, all of them computed."""
    computed_by_layer: tuple[int, ...]
    """Tokens computed at each layer, of those that retrieve."""
    seconds_to_find: float
    """Finding a cached prompt and aligning with it."""
    seconds_to_read: float
    """All of it, up to the logits of the last token."""
    seconds_saved: float | None
    """What reading the prompt in full would have taken by the rate of earlier full readings, less `seconds_to_read`;
    None before there was one."""
    estimated_error: float | None
    """Of the values that were reused: mean relative error that cached values had where tokens were computed anew, which
    are those that change most. None if none of the reused tokens was computed anew, 0 if KV is exact."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the first layer."""
        return self.new_tokens + self.recomputed_tokens

    @property
    def reused_tokens(self) -> int:
        """Tokens whose KV was not computed."""
        return self.prompt_tokens - self.computed_tokens
