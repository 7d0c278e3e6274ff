"""Reads prompts in the order in which they come, each method with all that came before in its cache."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from eval.arguments import progress_bar
from eval.reuse.arrivals import Arrival, prompt_of
from eval.reuse.measures import METRICS
from eval.reuse.methods import ANSWER_CACHE, Method
from eval.reuse.reader import TOO_MUCH, Full, Reader
from eval.reuse.rows import Row, Stored, answered_figures, failed, full_figures, read_figures, row, timed
from eval.run_folder import RunFolder
from eval.statistics import FULL
from sentencekv.prompts import Prompt
from sentencekv.reuse.decide import LEAST_SHARED_TOKENS


def run(
    reader: Reader,
    methods: Sequence[Method],
    arrivals: Sequence[Arrival],
    out: RunFolder,
    *,
    max_new_tokens: int,
    chat: bool,
) -> None:
    """Add the rows that are not there; `full` is the first of the methods. `chat`: in the model's chat template.

    A task has a cache of its own for each method, and a prompt that one of them fails on is in none of them. A task
    that stopped half-way is read again from its beginning, so that what comes later finds the caches as they were; only
    rows that are not there are added.
    """
    turns = sum(len(each.turns) for each in arrivals)
    with progress_bar() as bar:
        progress = bar.add_task("", total=turns * len(methods))
        for task in dict.fromkeys(each.task for each in arrivals):
            same = [each for each in arrivals if each.task == task]
            stream = _Stream(reader, methods, task, out, max_new_tokens=max_new_tokens, chat=chat)
            if all(out.has(key) for each in same for turn in range(len(each.turns)) for key in stream.keys(each, turn)):
                bar.advance(progress, sum(len(each.turns) for each in same) * len(methods))
                continue
            bar.update(progress, description=f"{task}: warming up")
            stream.warm_up(same[0])
            for each in same:
                answers: list[str] = []
                for turn in range(len(each.turns)):
                    bar.update(progress, description=f"{task} {each.id}")
                    answers.append(stream.read(each, turn, answers))
                    bar.advance(progress, len(methods))
            stream.clear()


class _Stream:
    """The caches of one task, one for each method."""

    def __init__(
        self,
        reader: Reader,
        methods: Sequence[Method],
        task: str,
        out: RunFolder,
        *,
        max_new_tokens: int,
        chat: bool,
    ) -> None:
        self._reader, self._methods, self._task, self._out = reader, methods, task, out
        self._max_new_tokens, self._chat = max_new_tokens, chat
        self._stored: list[Stored] = []
        self.clear()

    def keys(self, arrival: Arrival, turn: int) -> list[tuple[str, str, int, str, None]]:
        """Of the rows of one prompt."""
        return [(self._task, _name(arrival, turn), 0, method.name, None) for method in self._methods]

    def warm_up(self, arrival: Arrival) -> None:
        """As `Reader.warm_up`, with a prompt as long as the first one."""
        self._reader.warm_up(self._encode(arrival, 0, []).text, self._methods)

    def _encode(self, arrival: Arrival, turn: int, answers: Sequence[str]) -> Prompt:
        return self._reader.encode(prompt_of(arrival.turns[: turn + 1], answers, chat=self._chat))

    def read(self, arrival: Arrival, turn: int, answers: Sequence[str]) -> str:
        """Read a prompt by every method and add its rows; full reading's answer, empty where there is none."""
        prompt = self._encode(arrival, turn, answers)
        last = turn == len(arrival.turns) - 1
        place: dict[str, Any] = {
            "task": self._task,
            "id": _name(arrival, turn),
            "length": 0,
            "text": arrival.text,
            "metric": arrival.metric,
            "answers": list(arrival.references) if last else [],
            "extra": {"turn": turn + 1},
        }
        # Of a chat, what the answer cache looks for is what is asked now: most of a later turn is the earlier ones.
        asked = self._reader.encode(arrival.turns[turn])
        answer = ""
        try:
            self._reader.check_length(prompt, self._max_new_tokens)
            full = self._reader.full(prompt, self._max_new_tokens)
        except TOO_MUCH as error:
            rows = [failed(place, method.name, error) for method in self._methods]
        else:
            answer = full.answer.text
            rows = self._rows(place, prompt, asked, full)
        for each, key in zip(rows, self.keys(arrival, turn), strict=True):
            if not self._out.has(key):
                self._out.add(each)
        return answer

    def _rows(self, place: Mapping[str, Any], prompt: Prompt, asked: Prompt, full: Full) -> list[Row]:
        """Of one prompt, each method tried on its own."""
        rows: list[Row] = []
        for method in self._methods:
            try:
                figures = self._figures(method, prompt, asked, full)
                rows.append(row(place, method.name, {**figures, **_scores(place, figures, full)}))
            except TOO_MUCH as error:
                rows.append(failed(place, method.name, error))
        if any(each["status"] != "ok" for each in rows):
            for method in self._methods:
                self._reader.forget(prompt, self._namespace(method))
        elif any(each["policy"] == ANSWER_CACHE and each["kind"] != "answer" for each in rows):
            self._stored.append(Stored(self._reader.embedding(asked), full.answer))
        seconds_after = None
        with contextlib.suppress(*TOO_MUCH):
            seconds_after = self._reader.seconds_in_full(prompt)
        return timed(rows, full.seconds, seconds_after)

    def clear(self) -> None:
        """Let go of all that is cached."""
        for method in self._methods:
            self._reader.clear(self._namespace(method))

    def _namespace(self, method: Method) -> str:
        return f"{self._task}: {method.name}"

    def _figures(self, method: Method, prompt: Prompt, asked: Prompt, full: Full) -> Row:
        if method.name == FULL:
            return full_figures(full, prompt)
        if method.stores_answers:
            return answered_figures(self._reader, full, prompt, self._stored, asked)
        namespace = self._namespace(method)
        num_cached = self._reader.num_cached(namespace)
        if len(prompt.token_ids) >= LEAST_SHARED_TOKENS and not self._reader.has(prompt, namespace):
            num_cached += 1
        read = self._reader.read(prompt, namespace, method, full, max_new_tokens=self._max_new_tokens)
        return {
            **read_figures(read, full),
            "caching_seconds": read.seconds_to_cache,
            "cached_bytes": self._reader.cached_bytes(namespace),
            "evicted": max(num_cached - self._reader.num_cached(namespace), 0),
        }


def _name(arrival: Arrival, turn: int) -> str:
    return arrival.id if len(arrival.turns) == 1 else f"{arrival.id}-{turn + 1}"


def _scores(place: Mapping[str, Any], figures: Row, full: Full) -> Row:
    """By the metric of the task: likeness to what full reading answers, and to what people wrote."""
    said, references, measure = figures["prediction"], place["answers"], METRICS[place["metric"]]
    return {
        "score": measure(said, [full.answer.text]),
        "full_prediction": full.answer.text,
        "reference_score": measure(said, references) if references else None,
    }
