"""Reads prompts in the order in which they come, each method with all that came before in its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eval.arguments import progress_bar
from eval.reuse.arrivals import Arrival, prompt_of
from eval.reuse.measures import rouge_l
from eval.reuse.methods import Method
from eval.reuse.reader import Answer, Full, Reader, TooLongError
from eval.reuse.rows import Row, Stored, answered_figures, failed, full_figures, read_figures, row
from eval.run_folder import RunFolder
from eval.statistics import FULL
from sentencekv.prompts import Prompt


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

    A task has a cache of its own for each method. One that stopped half-way is read again from its beginning, so that
    what comes later finds the caches as they were; only rows that are not there are added.
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

    def read(self, arrival: Arrival, turn: int, answers: Sequence[str]) -> str:
        """Read a prompt by every method and add its rows; full reading's answer, empty where there is none."""
        prompt = self._reader.encode(prompt_of(arrival.turns, answers, chat=self._chat))
        last = turn == len(arrival.turns) - 1
        place: dict[str, Any] = {
            "task": self._task,
            "id": _name(arrival, turn),
            "length": 0,
            "metric": "rouge_l",
            "answers": list(arrival.references) if last else [],
            "extra": {"turn": turn + 1},
        }
        left = list(self._methods)
        added: list[Row] = []
        answer = Answer([], "")
        try:
            self._reader.check_length(prompt, self._max_new_tokens)
            full = self._reader.full(prompt, self._max_new_tokens)
            answer = full.answer
            while left:
                figures = self._figures(left[0], prompt, full)
                added.append(row(place, left[0].name, {**figures, **_scores(figures, full, place["answers"])}))
                del left[0]
            if any(method.stores_answers for method in self._methods):
                self._stored.append(Stored(self._reader.embedding(prompt), full.answer))
        except (TooLongError, MemoryError, torch.OutOfMemoryError) as error:
            added += [failed(place, method.name, error) for method in left]
        for each, key in zip(added, self.keys(arrival, turn), strict=True):
            if not self._out.has(key):
                self._out.add(each)
        return answer.text

    def clear(self) -> None:
        """Let go of all that is cached."""
        for method in self._methods:
            self._reader.clear(self._namespace(method))

    def _namespace(self, method: Method) -> str:
        return f"{self._task}: {method.name}"

    def _figures(self, method: Method, prompt: Prompt, full: Full) -> Row:
        if method.name == FULL:
            return full_figures(full, prompt)
        if method.stores_answers:
            return answered_figures(self._reader, full, prompt, self._stored)
        namespace = self._namespace(method)
        read = self._reader.read(prompt, namespace, method, full, max_new_tokens=self._max_new_tokens)
        costs = {"caching_seconds": read.seconds_to_cache, "cached_bytes": self._reader.cached_bytes(namespace)}
        return {**read_figures(read, full), **costs}


def _name(arrival: Arrival, turn: int) -> str:
    return arrival.id if len(arrival.turns) == 1 else f"{arrival.id}-{turn + 1}"


def _scores(figures: Row, full: Full, references: Sequence[str]) -> Row:
    """ROUGE-L to what full reading answers, and to what people wrote."""
    said = figures["prediction"]
    return {
        "score": rouge_l(said, [full.answer.text]),
        "full_prediction": full.answer.text,
        "reference_score": rouge_l(said, references) if references else None,
    }
