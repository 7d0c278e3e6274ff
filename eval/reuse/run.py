"""Reads pairs by every method: one reading of each donor, a row for each prompt and method."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

from eval.arguments import progress_bar
from eval.reuse.methods import Method
from eval.reuse.pairs import Pair
from eval.reuse.reader import TOO_MUCH, Full, Reader
from eval.reuse.rows import Row, Stored, answered_figures, failed, full_figures, ratio_like, read_figures, row, timed
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
        warm = False
        for _, group in itertools.groupby(pairs, key=lambda pair: pair.donor):
            same = list(group)
            missing = [(pair, [m for m in methods if not out.has(_key(pair, m))]) for pair in same]
            missing = [(pair, some) for pair, some in missing if some]
            bar.advance(task, len(same) * len(methods) - sum(len(some) for _, some in missing))
            if not missing:
                continue
            if not warm:
                bar.update(task, description="warming up")
                reader.warm_up(reader.encode(missing[0][0].prompt).text, methods)
                warm = True
            stores = any(method.stores_answers for _, some in missing for method in some)
            donor = _Donor(reader, missing[0][0], stores)
            for pair, some in missing:
                bar.update(task, description=f"{pair.task} {pair.id}")
                for added in _rows_of(reader, pair, some, donor, out):
                    out.add(added)
                bar.advance(task, len(some))
        reader.clear(_NAMESPACE)


def _key(pair: Pair, method: Method) -> tuple[str, str, int, str, None]:
    return pair.task, pair.id, pair.length, method.name, None


class _Donor:
    """A prompt that others take from, and what caching it cost."""

    def __init__(self, reader: Reader, pair: Pair, stores: bool) -> None:
        """`stores`: its answer as well."""
        self.prompt = reader.encode(pair.donor)
        # Pairs that differ in this have different donors, too.
        self._max_new_tokens = pair.max_new_tokens if stores else None
        self._reader = reader
        self.stored: list[Stored] = []
        self.costs: dict[str, float] = {}
        reader.clear(_NAMESPACE)

    def cache(self) -> None:
        """Have it in the cache, alone. Raises MemoryError if there is no room: a method would find nothing, and look as
        good as full reading."""
        if self._reader.has(self.prompt, _NAMESPACE):
            return
        self._reader.clear(_NAMESPACE)
        added = self._reader.add(self.prompt, _NAMESPACE, self._max_new_tokens)
        if not self._reader.has(self.prompt, _NAMESPACE):
            raise MemoryError("there is no room to cache the donor")
        if added.answer is not None:
            self.stored = [Stored(self._reader.embedding(self.prompt), added.answer)]
        cached_bytes = self._reader.cached_bytes(_NAMESPACE)
        self.costs = {"donor_caching_seconds": added.seconds, "cached_bytes": cached_bytes}


def _rows_of(reader: Reader, pair: Pair, methods: Sequence[Method], donor: _Donor, out: RunFolder) -> list[Row]:
    """Of one pair, each method tried on its own."""
    place, prompt = _place(pair), reader.encode(pair.prompt)
    try:
        for each in (donor.prompt, prompt):
            reader.check_length(each, pair.max_new_tokens)
        full = reader.full(prompt, pair.max_new_tokens)
    except TOO_MUCH as error:
        return [failed(place, method.name, error) for method in methods]
    rows: list[Row] = []
    for method in methods:
        try:
            figures = _figures(reader, method, pair, prompt, full, donor, [*out.rows, *rows])
            rows.append(row(place, method.name, {**figures, **_scores(pair, figures)}))
        except TOO_MUCH as error:
            rows.append(failed(place, method.name, error))
    seconds_after = None
    with contextlib.suppress(*TOO_MUCH):
        seconds_after = reader.seconds_in_full(prompt)
    return timed(rows, full.seconds, seconds_after)


def _place(pair: Pair) -> dict[str, Any]:
    return {
        "task": pair.task,
        "id": pair.id,
        "length": pair.length,
        "text": pair.text,
        "metric": "fact" if pair.answers else "agreement",
        "answers": list(pair.answers),
        "extra": dict(pair.extra),
    }


def _figures(
    reader: Reader, method: Method, pair: Pair, prompt: Prompt, full: Full, donor: _Donor, rows: Sequence[Row]
) -> Row:
    """Of one prompt read by one method; `rows`: where those are that it is to be like."""
    if method.name == FULL:
        return full_figures(full, prompt)
    donor.cache()
    if method.stores_answers:
        return answered_figures(reader, full, prompt, donor.stored, asked=prompt)
    ratio = None
    if method.like is not None:
        place = (pair.task, pair.id, pair.length, method.like)
        (model,) = (r for r in rows if (r["task"], r["id"], r["length"], r["policy"]) == place)
        if model["status"] != "ok":
            raise MemoryError(f"{method.like}, which it is to be like, has no figures here: {model['error']}")
        ratio = ratio_like(model)
    wanted = pair.max_new_tokens if pair.answers else None
    read = reader.read(prompt, _NAMESPACE, method, full, ratio=ratio, max_new_tokens=wanted)
    edit_bytes = reader.cached_bytes(_NAMESPACE) - donor.costs["cached_bytes"]
    if prompt.token_ids != donor.prompt.token_ids:
        reader.forget(prompt, _NAMESPACE)
    costs = {**donor.costs, "caching_seconds": read.seconds_to_cache, "edit_bytes": edit_bytes}
    return {**read_figures(read, full), **costs, "ratio": ratio}


def _scores(pair: Pair, figures: Row) -> Row:
    """The score of an answer, and whether it is the donor's; else that of going on as full reading does."""
    if not pair.answers:
        begins_alike = figures["first_divergence"] / figures["generated_tokens"]
        return {"score": begins_alike if figures["agreement"] is None else figures["agreement"]}
    said = figures["prediction"]
    return {
        "score": float(any(gives(said, answer) for answer in pair.answers)),
        "donor_answer": any(gives(said, answer) for answer in pair.donor_answers),
    }
