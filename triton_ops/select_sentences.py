"""The best sentences within a token budget."""

import torch
from torch import Tensor


def select_sentences_ref(score_NS: Tensor, length_S: Tensor, *, room_tokens: int, max_selected: int) -> Tensor:
    """The longest run of best-scored sentences that fits `room_tokens`, as ids `[N, K]` int64, best first, -1 padded.

    Sentences are ranked by falling score, ties by rising id. They are taken in that order until the next would exceed
    the budget: a worse sentence never gets in because it is short. `K = min(max_selected, S)`. A score of -inf is
    never selected.

    Args:
        score_NS: `[N, S]` float32, no NaN.
        length_S: `[S]` tokens in each sentence, at least 1.
    """
    num_sentences = score_NS.shape[-1]
    num_kept = min(max_selected, num_sentences)
    score, rank = torch.sort(score_NS, dim=-1, descending=True, stable=True)
    score, rank = score[:, :num_kept], rank[:, :num_kept]
    fits = (length_S[rank].cumsum(dim=-1) <= room_tokens) & (score > -torch.inf)
    return torch.where(fits, rank, -1)


def select_sentences(score_NS: Tensor, length_S: Tensor, *, room_tokens: int, max_selected: int) -> Tensor:
    """The best sentences within a token budget; see `select_sentences_ref`."""
    return select_sentences_ref(score_NS, length_S, room_tokens=room_tokens, max_selected=max_selected)
