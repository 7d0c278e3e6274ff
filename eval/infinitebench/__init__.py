"""InfiniteBench's retrieval tasks (Zhang et al., 2024, arXiv:2402.13718): its own files, and more of the kind.

A pass key of 5 digits, or a number of 10, in a line that stands somewhere in noise; or a UUID by its key in a JSON
object. `read` takes the benchmark's files, `make` makes examples of any length. Scores and tokens to generate are the
benchmark's; the instructions before the text are ours, and answers always begin with a prefix, as its prompts for base
models have it. Published figures are of other prompts.

Scores (`METRICS`): 1 where the first number of the prediction is the answer, digit for digit, or where the answer is
one of the prediction's words, the marks `:"'.,?!{}` taken for spaces.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from eval.examples import Example
from eval.ruler.drafts import Draft, Plan, fit
from eval.ruler.haystacks import NOISE, hide_in_lines
from eval.ruler.words import draw_uuid

ADDRESS = "https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench"

_MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


class _Kind(NamedTuple):
    file: str
    instruction: str
    prefix: str
    metric: str
    max_new_tokens: int


_HIDDEN = (
    "Most of the text below is of no importance, but {what} is hidden in it. Find it: I will ask for it at the end."
)

_KINDS = {
    "retrieve_passkey": _Kind("passkey.jsonl", _HIDDEN.format(what="a pass key"), "The pass key is", "first_number", 6),
    "retrieve_number": _Kind(
        "number_string.jsonl",
        _HIDDEN.format(what="a sequence of digits"),
        "The sequence of digits is",
        "first_number",
        12,
    ),
    "retrieve_kv": _Kind(
        "kv_retrieval.jsonl",
        "Below is a JSON object. Find the value that belongs to the key that I will give at the end.",
        "",
        "answer_among_words",
        50,
    ),
}

TASKS: tuple[str, ...] = tuple(_KINDS)

FILES: tuple[str, ...] = tuple(kind.file for kind in _KINDS.values())
"""The benchmark's files of these tasks."""


def first_number(prediction: str, example: Example) -> float:
    """1 if the first run of the digits 0-9 is the answer."""
    digits = "".join(character if character in "0123456789" else " " for character in prediction).split()
    return float(bool(digits) and digits[0] == example.answers[0])


def answer_among_words(prediction: str, example: Example) -> float:
    """1 if the answer is one of the words."""
    return float(example.answers[0] in prediction.translate(_MARKS).split())


METRICS: dict[str, Callable[[str, Example], float]] = {
    "first_number": first_number,
    "answer_among_words": answer_among_words,
}
"""From prediction and example to a score; for `eval.metrics.METRICS`."""


def read(task: str, *, data: Path, count: int | None = None) -> list[Example]:
    """The first `count` examples of the benchmark's file in the folder `data`, all of them without `count`.

    Raises ValueError for an unknown task, a missing file (saying which to get, and where) or one that is something
    else, naming file and line.
    """
    kind, path = _kind(task), find(task, data)
    examples: list[Example] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(examples) == count:
                break
            if line.strip():
                row = _row(f"{path}:{number}", line)
                answer = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
                draft = _draft(kind, row["context"], row["input"], str(answer))
                examples.append(_example(task, str(row.get("id", len(examples))), 0, draft))
    return examples


def find(task: str, data: Path) -> Path:
    """The file of a task. Raises ValueError for an unknown task, and where there is no file, saying where to get it."""
    kind = _kind(task)
    path = data / kind.file
    if not path.is_file():
        raise ValueError(
            f"{task} reads {kind.file}, which is not in {data}; get it by python -m eval.download infinitebench --to "
            f"{data}, or put it there from {ADDRESS}"
        )
    return path


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); get the file again from {ADDRESS}") from error
    missing = [name for name in ("context", "input", "answer") if not isinstance(row, dict) or not row.get(name)]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; get the file again from {ADDRESS}")
    return row


def make(
    task: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
    reserved_tokens: int = 0,
) -> list[Example]:
    """`count` examples of a task; the i-th depends on task, length, seed and i alone, and on the tokenizer.

    `length` counts the tokens of context, question and prefix, those to be generated, and `reserved_tokens`, for a
    chat template. Examples stay at or below it, within one line or pair, or a thousandth. `extra["depth"]` is the share
    of the context before the line or pair asked for.

    Raises ValueError for an unknown task, or a length that it does not fit into.
    """
    kind = _kind(task)
    make_draft = _make_pairs if task == "retrieve_kv" else _make_hidden
    examples = []
    for index in range(count):
        key = f"{task}/{length}/{seed}/{index}"
        plan = Plan(draft=functools.partial(make_draft, task, key), fewest=2)
        try:
            fitted = fit(plan, tokenizer, length - kind.max_new_tokens - reserved_tokens)
        except ValueError as error:
            raise ValueError(f"{task} at {length} tokens: {error}") from error
        examples.append(_example(task, f"{length}-{seed}-{index}", length, fitted))
    return examples


def _make_hidden(task: str, key: str, num_lines: int) -> Draft:
    rng = Random(key)
    if task == "retrieve_passkey":
        what, digits = "pass key", "".join(rng.choices(string.digits, k=5))
    else:
        what, digits = "sequence of digits", "".join(rng.choices(string.digits, k=5))
        for _ in range(5):
            place = rng.randrange(len(digits))
            digits = digits[:place] + digits[place] + digits[place:]
    line = f"The {what} is {digits}. Do not forget: {digits} is the {what}."
    text = hide_in_lines([NOISE] * num_lines, [line], rng)
    return _draft(_KINDS[task], text, f"What is the {what}?", digits, found=line)


def _make_pairs(task: str, key: str, num_pairs: int) -> Draft:
    rng = Random(key)
    place = rng.random()
    pairs = {draw_uuid(rng): draw_uuid(rng) for _ in range(num_pairs)}
    asked, value = list(pairs.items())[int(place * len(pairs))]
    question = f'Key: "{asked}"\nThe value that belongs to this key is:'
    return _draft(_KINDS[task], f"JSON data:\n{json.dumps(pairs)}", question, value, found=f'"{asked}"')


def _draft(kind: _Kind, text: str, question: str, answer: str, *, found: str = "") -> Draft:
    """`found` is the part of the text that is asked for, where it is known."""
    context = f"{kind.instruction}\n\n{text}"
    extra = {"depth": round(context.index(found) / len(context), 2)} if found else {}
    return Draft(context=context, question=question, prefix=kind.prefix, answers=(answer,), extra=extra)


def _example(task: str, name: str, length: int, draft: Draft) -> Example:
    kind = _KINDS[task]
    return Example(
        task=task,
        id=name,
        length=length,
        context=draft.context,
        question=draft.question,
        prefix=draft.prefix,
        answers=draft.answers,
        metric=kind.metric,
        max_new_tokens=kind.max_new_tokens,
        extra=draft.extra,
    )


def _kind(task: str) -> _Kind:
    if task not in _KINDS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return _KINDS[task]
