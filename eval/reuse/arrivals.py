"""Prompts as they come, unfiltered: chat questions, summaries of stories, sentences to translate.

Nothing is chosen for what it has in common with others. From a folder of the data sets' own files, as they are or
gzipped:

    mt_bench_question.jsonl   MT-Bench (Zheng et al., 2023, arXiv:2306.05685): questions of two turns
    squality*.jsonl           SQuALITY (Wang et al., 2022, arXiv:2205.11465): questions about stories, four answers each
    wmt22_en-de.jsonl         WMT 2022 (Kocmi et al.), English to German: `src`, `ref_A`, `ref_B`
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.reuse.pairs import Prompted
from sentencekv.prompts import Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one user says, turn by turn; between turns stands what full reading answered."""

    task: str
    id: str
    turns: tuple[str, ...]
    text: str
    """As of `Pair`: what prompts have in common in all tasks of a file, one story or one conversation."""
    references: tuple[str, ...] = ()
    """Right answers to the last turn; none where nobody wrote one."""
    metric: str = "rouge_l"
    """Of `eval.reuse.measures.METRICS`."""


def arrivals(task: str, data: Path, count: int | None = None) -> list[Arrival]:
    """The first so many of a task, in the file's order. Raises ValueError where the file is missing or damaged."""
    path = find(task, data)
    found: list[Arrival] = []
    try:
        for number, row in enumerate(_rows(path)):
            found += _TASKS[task][1](number, row)
            if count is not None and len(found) >= count:
                break
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not as {task} has it ({error!r}); download it again") from error
    return found[:count]


def find(task: str, data: Path) -> Path:
    """A task's file. Raises ValueError where there is none."""
    pattern = _TASKS[task][0]
    paths = [path for end in ("", ".gz") for path in sorted(data.glob(pattern + end))]
    if not paths:
        raise ValueError(f"{task} needs {pattern} or {pattern}.gz in {str(data)!r}, and there is none")
    return paths[0]


def prompt_of(turns: Sequence[str], answers: Sequence[str], *, chat: bool) -> Prompted:
    """The next turn after so many answers: as chat messages, or as plain text that is to be continued."""
    said = [text for pair in zip(turns, answers, strict=False) for text in pair] + [turns[len(answers)]]
    if not chat:
        return "\n\n".join(said) + "\n\n"
    messages: list[Message] = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text} for number, text in enumerate(said)
    ]
    return tuple(messages)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    content = path.read_bytes()
    for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines():
        yield json.loads(line)


def _chat(number: int, row: dict[str, Any]) -> list[Arrival]:
    name = str(row["question_id"])
    return [Arrival(task="chat", id=name, text=f"chat {name}", turns=tuple(row["turns"]))]


def _story(number: int, row: dict[str, Any], *, question_first: bool) -> list[Arrival]:
    found = []
    for question in row["questions"]:
        asked = f"Answer this question about the story in a few sentences: {question['question_text']}"
        parts = (asked, row["document"]) if question_first else (row["document"], asked)
        found.append(
            Arrival(
                task="question_and_story" if question_first else "story",
                id=f"{number}-{question['question_number']}",
                turns=("\n\n".join(parts),),
                text=f"story {number}",
                references=tuple(response["response_text"] for response in question["responses"]),
            )
        )
    return found


def _translation(number: int, row: dict[str, Any]) -> list[Arrival]:
    asked = f"Translate this text from English into German.\n\n{row['src']}"
    line, references = str(row["line"]), (row["ref_A"], row["ref_B"])
    text = f"line {line}"
    return [Arrival(task="translation", id=line, text=text, turns=(asked,), references=references, metric="chrf")]


_TASKS: dict[str, tuple[str, Callable[[int, dict[str, Any]], list[Arrival]]]] = {
    "chat": ("mt_bench_question.jsonl", _chat),
    "story": ("squality*dev*.jsonl", lambda number, row: _story(number, row, question_first=False)),
    "question_and_story": ("squality*dev*.jsonl", lambda number, row: _story(number, row, question_first=True)),
    "translation": ("wmt22_en-de.jsonl", _translation),
}
"""File and what is made of one of its lines."""

TASKS = tuple(_TASKS)
"""`question_and_story` asks before the story, so that only `similar` has something to take from the story's last
reading."""
