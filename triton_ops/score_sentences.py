"""Queries against sentence summaries, and the group's one score per sentence."""

from typing import Literal

import torch
from torch import Tensor

Spread = Literal["square", "abs"]
Group = Literal["max", "mean"]


def score_sentences_ref(
    q_NGH: Tensor, summary_SNPH: Tensor, *, scale: float, spread: Spread, bias_S: Tensor | None
) -> Tensor:
    """Logits `[N, G, S]` float32: `x . plane0 + f(x) . plane1 + bias`, with `x = scale * q`.

    Args:
        q_NGH: `[N, G, H]` post-RoPE queries.
        summary_SNPH: `[S, N, P, H]`; with `P` 1, only the first term.
        spread: `f`, the element-wise `square` or absolute value (`abs`).
        bias_S: `[S]` float32, added to every head's logit.
    """
    x_NGH = q_NGH.float() * scale
    planes = summary_SNPH.float()
    logit_NGS = torch.einsum("ngh,snh->ngs", x_NGH, planes[:, :, 0])
    if planes.shape[2] == 2:
        spread_NGH = x_NGH.square() if spread == "square" else x_NGH.abs()
        logit_NGS = logit_NGS + torch.einsum("ngh,snh->ngs", spread_NGH, planes[:, :, 1])
    return logit_NGS if bias_S is None else logit_NGS + bias_S


def score_sentences(
    q_NGH: Tensor, summary_SNPH: Tensor, *, scale: float, spread: Spread, bias_S: Tensor | None
) -> Tensor:
    """Logits of sentences from their summaries; see `score_sentences_ref`."""
    return score_sentences_ref(q_NGH, summary_SNPH, scale=scale, spread=spread, bias_S=bias_S)


def group_scores(logit_NGS: Tensor, *, group: Group) -> Tensor:
    """One score per KV head and sentence, `[N, S]` float32, from the logits of the query heads that share it.

    Logits become shares by a softmax over all sentences for each query head, then the group takes their maximum (or
    mean): were the raw maximum taken, one head with large logits would decide for all.
    """
    share_NGS = torch.softmax(logit_NGS.float(), dim=-1)
    return share_NGS.amax(dim=1) if group == "max" else share_NGS.mean(dim=1)
