"""Questions about paragraphs among other paragraphs: SQuAD (`qa_1`) and HotpotQA (`qa_2`), from their own files."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from eval.ruler.drafts import Draft, Plan


@dataclasses.dataclass(frozen=True)
class _Question:
    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    """Paragraphs that hold the answer."""
    near: tuple[int, ...]
    """Paragraphs on the same matter, which distract most."""


class _Set(NamedTuple):
    questions: tuple[_Question, ...]
    paragraphs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    name: str
    files: tuple[str, ...]
    """Names that the file may have, the first found is read."""
    address: str
    parse: Callable[[Any], _Set]


def plan(task: str, key: str, index: int, seed: int, data: Path | None) -> Plan:
    """The `index`-th question of a set, in an order that `seed` shuffles: the same one at every length.

    Distractors are first the paragraphs that belong to the question (of the same article in SQuAD, the set's own in
    HotpotQA), then any others.

    Raises ValueError where the set's file is missing or has no such question.
    """
    source = SOURCES[task]
    path = find(task, data)
    questions, paragraphs = _load(path, source.parse)
    if index >= len(questions):
        raise ValueError(f"{path} has {len(questions)} questions, got index {index}; ask for fewer examples")
    question = questions[_order(len(questions), seed)[index]]
    rng = Random(key)
    others = set(range(len(paragraphs))).difference(question.needed, question.near)
    distractors = rng.sample(question.near, len(question.near)) + rng.sample(sorted(others), len(others))
    chosen = [*question.needed, *distractors]

    def draft(num_paragraphs: int) -> Draft:
        order = Random(f"{key}/order").sample(chosen[:num_paragraphs], num_paragraphs)
        text = "\n\n".join(f"Document {number}:\n{paragraphs[at].strip()}" for number, at in enumerate(order, 1))
        instruction = "Reply with the answer alone, without any other words."
        return Draft(
            context=f"Below are documents, and after them there is a question about them. {instruction}\n\n{text}",
            question=f"Answer this question from the documents above. {instruction}\n\nQuestion: {question.text}",
            prefix="Answer:",
            answers=question.answers,
            extra={"source": path.name},
        )

    return Plan(
        draft=draft,
        fewest=len(question.needed),
        most=len(chosen),
        shortage=f"{path.name} has no further paragraphs; leave {task} out at this length",
    )


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int) -> list[int]:
    return Random(f"questions/{seed}").sample(range(count), count)


def find(task: str, data: Path | None) -> Path:
    """The file of a task's questions. Raises ValueError where there is none, saying where to get it."""
    source = SOURCES[task]
    if data is not None:
        for path in (data / name for name in source.files):
            if path.is_file():
                return path
    place = "no folder was given by --data" if data is None else f"{data} has none of them"
    raise ValueError(
        f"{task} asks questions of {source.name} ({', '.join(source.files)}), but {place}; get {source.files[0]} by "
        f"python -m eval.download ruler --to {'DATA' if data is None else data}, or put it there from {source.address}"
    )


@functools.lru_cache(maxsize=2)
def _load(path: Path, parse: Callable[[Any], _Set]) -> _Set:
    read = gzip.open if path.suffix == ".gz" else open
    try:
        with read(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.suffixes:
                loaded: Any = {"data": [json.loads(line) for line in file if line.strip()]}
            else:
                loaded = json.load(file)
        parsed = parse(loaded)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what its name says ({error!r}); get it again") from error
    if not parsed.questions:
        raise ValueError(f"{path} has no question with an answer; get it again")
    return parsed


def _parse_squad(loaded: Any) -> _Set:
    """Articles of paragraphs with questions; those of SQuAD 2.0 that have no answer are left out."""
    at: dict[str, int] = {}
    for article in loaded["data"]:
        for paragraph in article["paragraphs"]:
            at.setdefault(paragraph["context"], len(at))
    questions = []
    for article in loaded["data"]:
        inside = {at[paragraph["context"]]: None for paragraph in article["paragraphs"]}
        for paragraph in article["paragraphs"]:
            needed = at[paragraph["context"]]
            near = tuple(other for other in inside if other != needed)
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible"):
                    answers = _distinct([answer["text"] for answer in asked["answers"]])
                    questions.append(_Question(asked["question"].strip(), answers, (needed,), near))
    return _Set(tuple(questions), tuple(at))


def _parse_hotpotqa(loaded: Any) -> _Set:
    """Questions with 10 titled paragraphs each, two of which hold what the answer needs."""
    at: dict[str, int] = {}
    questions = []
    for asked in loaded:
        titles: dict[str, int] = {}
        for title, sentences in asked["context"]:
            titles[title] = at.setdefault(f"{title}\n{''.join(sentences)}", len(at))
        supporting = _distinct([title for title, _ in asked["supporting_facts"]])
        needed = tuple(titles[title] for title in supporting)
        near = tuple(place for place in titles.values() if place not in needed)
        questions.append(_Question(asked["question"].strip(), (asked["answer"],), needed, near))
    return _Set(tuple(questions), tuple(at))


def _distinct(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


SOURCES: dict[str, _Source] = {
    "qa_1": _Source(
        name="SQuAD",
        files=("dev-v2.0.json", "squad.json", "dev-v1.1.json", "xquad.en.json", "xquad_en.jsonl", "xquad_en.jsonl.gz"),
        address="https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
        parse=_parse_squad,
    ),
    "qa_2": _Source(
        name="HotpotQA",
        files=("hotpot_dev_distractor_v1.json", "hotpotqa.json"),
        address="https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/main/hotpot_dev_distractor_v1.json",
        parse=_parse_hotpotqa,
    ),
}
"""Where each task's questions come from; XQuAD's English part is 240 paragraphs of SQuAD 1.1."""
