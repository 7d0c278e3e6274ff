"""Prefill: prompts into sessions, chunk by chunk, with exact attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv.attention import forward
from sentencekv.prompts import Prompt
from sentencekv.session import Session

Progress = Callable[[int, int], None]
"""Called with tokens read so far and tokens in all, after each chunk."""


def read(
    model: PreTrainedModel,
    sessions: Sequence[Session],
    prompts: Sequence[Prompt],
    *,
    chunk_tokens: int,
    progress: Progress | None = None,
) -> Tensor:
    """Append each prompt to its session, exactly; returns the logits `[B, vocabulary]` of each prompt's last token.

    A prompt comes in chunks of `chunk_tokens`, the first of which is shorter if they do not divide it: there is little
    to attend to yet, and what comes later then has the one shape that attention is fastest for. First chunks of several
    prompts share a forward pass of at most `chunk_tokens`. Prompts must not be empty.
    """
    total = sum(len(prompt.token_ids) for prompt in prompts)
    for session, prompt in zip(sessions, prompts, strict=True):
        session.expect([session.num_tokens + end for end in prompt.ends])
    done = [0] * len(prompts)
    last_logits: dict[int, Tensor] = {}
    while len(last_logits) < len(prompts):
        room = chunk_tokens
        members: list[int] = []
        chunks: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            left = len(prompt.token_ids) - done[i]
            wanted = left % chunk_tokens or chunk_tokens
            if left and wanted <= room:
                chunk = prompt.token_ids[done[i] : done[i] + wanted]
                room -= wanted
                members.append(i)
                chunks.append(chunk)
        logits = forward(
            model,
            chunks,
            [sessions[i] for i in members],
            exact=True,
            expected_tokens=[len(prompts[i].token_ids) - done[i] for i in members],
        )
        for row, (i, chunk) in enumerate(zip(members, chunks, strict=True)):
            done[i] += len(chunk)
            if done[i] == len(prompts[i].token_ids):
                last_logits[i] = logits[row]
        if progress is not None:
            progress(sum(done), total)
    for session in sessions:
        session.end_reading()
    return torch.stack([last_logits[i] for i in range(len(prompts))])
