"""Everything, exactly: equals dense attention at any budget."""

import dataclasses

from sentencekv.policies import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Reads all context tokens at every step, streamed from the host: the reference for quality."""

    reads = "everything"
