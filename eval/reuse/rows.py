"""What a row says of one reading: figures beside full reading's, of the same prompt in the same run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.reuse.measures import compare, same_tokens
from eval.reuse.methods import MIN_SIMILARITY
from eval.reuse.reader import Answer, Full, Read, Reader, TooLongError
from eval.statistics import FULL
from sentencekv.prompts import Prompt

Row = dict[str, Any]


class Stored(NamedTuple):
    """What the answer cache holds of a prompt."""

    embedding: np.ndarray
    answer: Answer


def full_figures(full: Full, prompt: Prompt) -> Row:
    """Of reading in full."""
    return {
        "prediction": full.answer.text,
        "context_tokens": len(prompt.token_ids),
        "generated_tokens": len(full.answer.token_ids),
        "seconds_to_first_token": full.seconds,
        "kl": [0.0] * len(full.answer.token_ids),
        "agreement": 1.0,
        "first_divergence": len(full.answer.token_ids),
        "kind": "none",
        "reason": "",
        "found_share": 0.0,
        "reused_share": 0.0,
        "computed_share": 1.0,
    }


def read_figures(read: Read, full: Full) -> Row:
    """Of reading by a method."""
    reuse = read.reuse
    kl, agreement, first_divergence = compare(full.logits_LV, read.logits_LV, full.answer.token_ids)
    computed = sum(reuse.computed_by_layer) / len(reuse.computed_by_layer)
    return {
        "prediction": None if read.answer is None else read.answer.text,
        "context_tokens": reuse.prompt_tokens,
        "generated_tokens": len(full.answer.token_ids),
        "seconds_to_first_token": read.seconds,
        "kl": kl,
        "agreement": agreement,
        "first_divergence": first_divergence,
        "kind": reuse.kind,
        "reason": reuse.reason,
        "found_share": 1 - reuse.new_tokens / reuse.prompt_tokens,
        "reused_share": reuse.reused_tokens / reuse.prompt_tokens,
        "computed_share": computed / reuse.prompt_tokens,
        "computed_by_layer": list(reuse.computed_by_layer),
        "prefix_tokens": reuse.prefix_tokens,
        "kept_tokens": reuse.kept_tokens,
        "moved_tokens": reuse.moved_tokens,
        "fuzzy_tokens": reuse.fuzzy_tokens,
        "recomputed_tokens": reuse.recomputed_tokens,
        "new_tokens": reuse.new_tokens,
        "seconds_to_find": reuse.seconds_to_find,
        "estimated_error": reuse.estimated_error,
    }


def answered_figures(reader: Reader, full: Full, prompt: Prompt, stored: Sequence[Stored], asked: Prompt) -> Row:
    """Of the answer cache: the nearest prompt's answer, or full reading where none is near. A stored answer has no
    distributions, so no KL and no agreement: only how many tokens it has in common with the answer from its beginning.

    `asked`: of what the embedding is."""
    started_at = time.perf_counter()
    embedding = reader.embedding(asked)
    nearest = max(stored, key=lambda each: float(each.embedding @ embedding), default=None)
    similarity = float(nearest.embedding @ embedding) if nearest is not None else 0.0
    seconds = time.perf_counter() - started_at
    figures = full_figures(full, prompt)
    if nearest is None or similarity < MIN_SIMILARITY:
        return {**figures, "seconds_to_first_token": full.seconds + seconds, "reason": "nothing like it was answered"}
    return {
        **figures,
        "prediction": nearest.answer.text,
        "seconds_to_first_token": seconds,
        "kl": None,
        "agreement": None,
        "first_divergence": same_tokens(full.answer.token_ids, nearest.answer.token_ids),
        "kind": "answer",
        "found_share": 1.0,
        "reused_share": 1.0,
        "computed_share": 0.0,
    }


def row(place: Mapping[str, Any], method: str, figures: Mapping[str, Any]) -> Row:
    """A whole row as evaluations have it; what was not measured is null. `place`: its task, id, length, text, metric,
    answers and what tables group by."""
    measured = ("prediction", "context_tokens", "generated_tokens", "seconds_to_read", "seconds_to_first_token")
    others = ("seconds_per_token", "kv_gpu_bytes", "kv_dense_bytes")
    return {
        **place,
        "policy": method,
        "budget_tokens": None,
        "score": None,
        **dict.fromkeys((*measured, *others)),
        "status": "ok",
        **figures,
    }


def failed(place: Mapping[str, Any], method: str, error: Exception) -> Row:
    """A row of a prompt that does not fit."""
    status = "too_long" if isinstance(error, TooLongError) else "out_of_memory"
    return row(place, method, {"status": status, "error": str(error)})


def timed(rows: Sequence[Row], before: float, after: float | None) -> list[Row]:
    """Rows of one prompt with the time of full reading: the mean of one before the methods and one after them, so that
    what a machine does meanwhile shows. `after`: None if it failed."""
    seconds = before if after is None else (before + after) / 2
    return [
        {**each, "full_seconds": seconds, **({"seconds_again": after} if each["policy"] == FULL else {})}
        for each in rows
    ]


def ratio_like(model: Mapping[str, Any]) -> float:
    """Share of the tokens that could be reused which a method computed, all layers together, by its row."""
    reusable = model["kept_tokens"] + model["moved_tokens"]
    if not reusable:
        return 1.0
    computed = model["computed_share"] * model["context_tokens"]
    least = model["context_tokens"] - model["prefix_tokens"] - reusable
    return float(np.clip((computed - least) / reusable, 0.0, 1.0))
