"""Queries against sentence summaries, and the group's one score per sentence."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["square", "abs"]
Group = Literal["max", "mean"]


def score_sentences_ref(
    q_NGH: Tensor,
    summaries: Sequence[Tensor],
    *,
    scale: float,
    spread: Spread = "square",
    bias_S: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """One score per KV head and sentence, `[N, S]` float32, each query head's scores summing to one.

    The logit of a sentence is `x . summary[0] + f(x) . summary[1] + bias`, with `x = scale * q` and `f` the
    element-wise square or absolute value; with one plane, only the first term. Logits become shares by a softmax over
    sentences for each query head, then the group takes their maximum (or mean): were the raw maximum taken, one head
    with large logits would decide for all.

    Args:
        q_NGH: `[N, G, H]` post-RoPE queries.
        summaries: tables `[S_i, N, P, H]` with `P` 1 or 2, the sentences in order; `S = sum(S_i)`, at least 1.
        bias_S: `[S]` float32, added to every head's logit.
    """
    x_NGH = q_NGH.float() * scale
    spread_NGH = x_NGH.square() if spread == "square" else x_NGH.abs()
    parts = []
    for summary_SNPH in summaries:
        planes = summary_SNPH.float()
        logit = torch.einsum("ngh,snh->ngs", x_NGH, planes[:, :, 0])
        if planes.shape[2] == 2:
            logit = logit + torch.einsum("ngh,snh->ngs", spread_NGH, planes[:, :, 1])
        parts.append(logit)
    logit_NGS = torch.cat(parts, dim=-1)
    if bias_S is not None:
        logit_NGS = logit_NGS + bias_S
    share_NGS = torch.softmax(logit_NGS, dim=-1)
    return share_NGS.amax(dim=1) if group == "max" else share_NGS.mean(dim=1)


def score_sentences(
    q_NGH: Tensor,
    summaries: Sequence[Tensor],
    *,
    scale: float,
    spread: Spread = "square",
    bias_S: Tensor | None = None,
    group: Group = "max",
) -> Tensor:
    """One score per KV head and sentence; see `score_sentences_ref`."""
    return score_sentences_ref(q_NGH, summaries, scale=scale, spread=spread, bias_S=bias_S, group=group)
