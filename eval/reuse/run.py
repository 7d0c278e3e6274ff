"""Reads pairs by every method: one reading of each donor, a row for each prompt and method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from eval.arguments import progress_bar
from eval.reuse.methods import Method
from eval.reuse.pairs import Pair
from eval.reuse.reader import Full, Reader, TooLongError
from eval.reuse.rows import Row, Stored, answered_figures, failed, full_figures, ratio_like, read_figures, row
from eval.run_folder import RunFolder
from eval.statistics import FULL
from sentencekv.needles import gives
from sentencekv.prompts import Prompt

_NAMESPACE = "pair"


def run(reader: Reader, methods: Sequence[Method], pairs: Sequence[Pair], out: RunFolder) -> None:
    """Add the rows that are not there; `full` is the first of the methods.

    Each donor is cached alone, and of what is read after it nothing stays.
    """
    with progress_bar() as bar:
        task = bar.add_task("", total=len(pairs) * len(methods))
        for _, group in itertools.groupby(pairs, key=lambda pair: pair.donor):
            same = list(group)
            missing = [(pair, [m for m in methods if not out.has(_key(pair, m))]) for pair in same]
            missing = [(pair, some) for pair, some in missing if some]
            bar.advance(task, len(same) * len(methods) - sum(len(some) for _, some in missing))
            if not missing:
                continue
            bar.update(task, description=f"{missing[0][0].task} {missing[0][0].id}: caching")
            for added in _rows_of(reader, missing, out):
                out.add(added)
                bar.update(task, advance=1, description=f"{added['task']} {added['id']}: {added['policy']}")
        reader.clear(_NAMESPACE)


def _key(pair: Pair, method: Method) -> tuple[str, str, int, str, None]:
    return pair.task, pair.id, pair.length, method.name, None


class _Donor:
    """A cached prompt, and what caching it cost."""

    def __init__(self, reader: Reader, prompt: Prompt, max_new_tokens: int | None) -> None:
        """`max_new_tokens`: of its answer, if that is stored."""
        self.prompt = prompt
        reader.clear(_NAMESPACE)
        added = reader.add(prompt, _NAMESPACE, max_new_tokens)
        self.stored = [] if added.answer is None else [Stored(reader.embedding(prompt), added.answer)]
        self.cached_bytes = reader.cached_bytes(_NAMESPACE)
        self.costs = {"caching_seconds": added.seconds, "cached_bytes": self.cached_bytes}


def _rows_of(reader: Reader, missing: Sequence[tuple[Pair, list[Method]]], out: RunFolder) -> Iterator[Row]:
    """Rows of pairs with one donor, of the methods that have none yet."""
    donor_prompt = reader.encode(missing[0][0].donor)
    # Pairs that differ in this have different donors, too.
    new_tokens = missing[0][0].max_new_tokens
    stores = any(method.stores_answers for _, methods in missing for method in methods)
    donor: _Donor | None = None
    for pair, methods in missing:
        prompt = reader.encode(pair.prompt)
        left = list(methods)
        try:
            for each in (donor_prompt, prompt):
                reader.check_length(each, pair.max_new_tokens)
            donor = donor or _Donor(reader, donor_prompt, new_tokens if stores else None)
            full = reader.full(prompt, pair.max_new_tokens)
            while left:
                figures = _figures(reader, left[0], pair, prompt, full, donor, out)
                scored = row(_place(pair), left[0].name, {**figures, **donor.costs, **_scores(pair, figures)})
                del left[0]
                yield scored
        except (TooLongError, MemoryError, torch.OutOfMemoryError) as error:
            for method in left:
                yield failed(_place(pair), method.name, error)


def _place(pair: Pair) -> dict[str, Any]:
    return {
        "task": pair.task,
        "id": pair.id,
        "length": pair.length,
        "metric": "fact" if pair.answers else "agreement",
        "answers": list(pair.answers),
        "extra": dict(pair.extra),
    }


def _figures(
    reader: Reader, method: Method, pair: Pair, prompt: Prompt, full: Full, donor: _Donor, out: RunFolder
) -> Row:
    """Of one prompt read by one method."""
    if method.name == FULL:
        return full_figures(full, prompt)
    if method.stores_answers:
        return answered_figures(reader, full, prompt, donor.stored)
    ratio = None
    if method.like is not None:
        place = (pair.task, pair.id, pair.length, method.like)
        (model,) = (r for r in out.rows if (r["task"], r["id"], r["length"], r["policy"]) == place)
        ratio = ratio_like(model)
    wanted = pair.max_new_tokens if pair.answers else None
    read = reader.read(prompt, _NAMESPACE, method, full, ratio=ratio, max_new_tokens=wanted)
    edit_bytes = reader.cached_bytes(_NAMESPACE) - donor.cached_bytes
    if prompt.token_ids != donor.prompt.token_ids:
        reader.forget(prompt, _NAMESPACE)
    return {**read_figures(read, full), "edit_bytes": edit_bytes, "ratio": ratio}


def _scores(pair: Pair, figures: Row) -> Row:
    """The score of an answer, and whether it is the donor's; else that of going on as full reading does."""
    if not pair.answers:
        return {"score": figures["agreement"]}
    said = figures["prediction"]
    return {
        "score": float(any(gives(said, answer) for answer in pair.answers)),
        "donor_answer": any(gives(said, answer) for answer in pair.donor_answers),
    }
