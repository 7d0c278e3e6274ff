"""Nothing but sink and window: the control that every retrieval policy must beat."""

import dataclasses

from sentencekv.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """Reads sink, window and tail only (StreamingLLM: Xiao et al., 2023, arXiv:2309.17453)."""

    reads = "recent"
