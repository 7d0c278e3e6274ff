"""LongBench and LongBench-E as examples, made from their own JSONL files; nothing is downloaded, no model is run.

The data (Bai et al., 2023, arXiv:2308.14508) are `data.zip` of the hub's data set zai-org/LongBench; `eval.download`
gets them. `data` is the folder that it was unpacked to, or the `data` folder within: it holds `narrativeqa.jsonl` and
so on, and for LongBench-E `qasper_e.jsonl` and so on. Where it, or `config` within it, also holds LongBench's
`dataset2prompt.json` or `dataset2maxlen.json`, these words and lengths are taken instead of ours, as published figures
need; `Example.extra["wording"]` says which words were used: `longbench` or `own`.
"""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from eval.examples import Example
from eval.longbench.tasks import TASK_OF, Task

TASKS: tuple[str, ...] = tuple(TASK_OF)
"""All 21, in LongBench's order."""

E_TASKS: tuple[str, ...] = tuple(name for name, task in TASK_OF.items() if task.extended)
"""The 13 of LongBench-E."""

FILES: tuple[str, ...] = (*(f"{task}.jsonl" for task in TASKS), *(f"{task}_e.jsonl" for task in E_TASKS))
"""What its archive holds, each in a folder `data`."""

SETTINGS_FILES: tuple[str, ...] = ("dataset2prompt.json", "dataset2maxlen.json")
"""Its own prompts and generation lengths, of its repository's `LongBench/config`."""

LENGTH_GROUPS: tuple[str, ...] = ("0-4k", "4-8k", "8k+")
"""What LongBench-E's scores are grouped by: words of text, `Example.extra["length_group"]`."""

_DATA_URL = "https://huggingface.co/datasets/zai-org/LongBench/resolve/main/data.zip"
_BLANK_LINE = "\n\n"


class Wording(NamedTuple):
    """How a task is put to a model."""

    template: str
    max_new_tokens: int
    source: str
    """Whose words: `longbench` or `own`."""


def find_wording(task: str, data: Path) -> Wording:
    """LongBench's own words and generation length where `data` holds them, else ours.

    Whatever a template has before the context is read together with it, were it the question. Raises ValueError where
    a file that is there lacks the task, or has a template that cannot be split.
    """
    ours = TASK_OF[task]
    prompts, lengths = SETTINGS_FILES
    template = _setting(data, prompts, task, str)
    max_new_tokens = _setting(data, lengths, task, int)
    if template is not None:
        _check_template(template, task, ours)
    return Wording(
        ours.template if template is None else template,
        ours.max_new_tokens if max_new_tokens is None else max_new_tokens,
        "own" if template is None else "longbench",
    )


def make(
    task: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    max_tokens: int | None,
    count: int | None,
    extended: bool = False,
) -> list[Example]:
    """The first `count` examples of a task, in the file's order; None: all.

    `max_tokens` cuts prompts that have more tokens in the middle (`cut_middle`), and `extra["cut"]` then says so; the
    answer and what a chat template adds come on top. None: prompts stay whole.

    `extended` takes LongBench-E's file. Its examples are of the task `<task>_e` and have their `length_group`.

    Where the prompt is a user's turn, the blank line between context and question is left to who joins them. Raises
    ValueError for a task or a number that is not allowed, for missing files, and for records that lack something.
    """
    path = find(task, data, extended=extended)
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, one for each half, got {max_tokens}; None cuts nothing")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}; None takes all")
    wording = find_wording(task, data)
    records = itertools.islice(_records(path, task, extended), count)
    times_seen: Counter[str] = Counter()
    examples = []
    for record in records:
        # Nothing says that the file's ids are its own; a run that goes on needs them to be.
        times_seen[record["_id"]] += 1
        times = times_seen[record["_id"]]
        example_id = record["_id"] if times == 1 else f"{record['_id']}-{times}"
        examples.append(
            _example(record, path.stem, example_id, TASK_OF[task], wording, tokenizer, max_tokens, extended)
        )
    return examples


def find(task: str, data: Path, *, extended: bool = False) -> Path:
    """The file of a task. Raises ValueError for an unknown task, and where there is no file, saying where to get it."""
    known = E_TASKS if extended else TASKS
    if task not in known:
        raise ValueError(f"task must be one of {', '.join(known)}{' in LongBench-E' * extended}, got {task!r}")
    name = f"{task}_e.jsonl" if extended else f"{task}.jsonl"
    path = _find(data, name, "data")
    if path is None:
        raise ValueError(
            f"{name} must be in {data} or in {data / 'data'}, and is not; get it by python -m eval.download longbench "
            f"--to {data}, or unpack {_DATA_URL} there"
        )
    return path


def cut_middle(
    context: str, question: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str] | None:
    """Context and question without the middle of the prompt that they make up; None where it has no more tokens.

    As LongBench does it: the whole prompt is tokenised, special tokens included, and the first and the last
    `max_tokens // 2` tokens stay. Both halves are cut out of the text itself; LongBench decodes their tokens, which
    differs where a tokenizer does not give back the text, as for a character of which only some bytes are kept. The cut
    may fall into the question: then what is left of its end, and of its beginning, is the question still.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; cutting prompts needs character offsets")
    prompt = context + question
    spans = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)["offset_mapping"]
    if len(spans) <= max_tokens:
        return None
    half = max_tokens // 2
    # Special tokens have empty spans.
    stop = max((last for first, last in spans[:half] if first < last), default=0)
    start = min((first for first, last in spans[-half:] if first < last), default=len(prompt))
    start = max(start, stop)
    split = len(context)
    return (
        prompt[: min(stop, split)] + prompt[start : max(start, split)],
        prompt[split : max(stop, split)] + prompt[max(start, split) :],
    )


def length_group(num_words: int) -> str:
    """The group of LongBench-E for a record's `length`."""
    return LENGTH_GROUPS[(num_words >= 4000) + (num_words >= 8000)]


def _example(
    record: dict[str, Any],
    name: str,
    example_id: str,
    task: Task,
    wording: Wording,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    extended: bool,
) -> Example:
    before, _, after = wording.template.partition("{context}")
    context, question = before.format(**record) + record["context"], after.format(**record)
    extra = {"wording": wording.source}
    if extended:
        extra["length_group"] = length_group(record["length"])
    cut = None if max_tokens is None else cut_middle(context, question, max_tokens, tokenizer)
    if cut is not None:
        context, question = cut
        extra["cut"] = "middle"
    return Example(
        task=name,
        id=example_id,
        length=0,
        context=context,
        question=question.removeprefix(_BLANK_LINE) if task.chat else question,
        answers=tuple(map(str, record["answers"])),
        metric=task.metric,
        max_new_tokens=wording.max_new_tokens,
        chat=task.chat,
        stop=task.stop,
        classes=tuple(record["all_classes"]) if task.metric == "classification" else (),
        extra=extra,
    )


def _find(data: Path, name: str, folder: str) -> Path | None:
    return next((path for path in (data / name, data / folder / name) if path.is_file()), None)


def _records(path: Path, task: str, extended: bool) -> Iterator[dict[str, Any]]:
    kinds: dict[str, type] = {"_id": str, "context": str, "input": str, "answers": list}
    if extended:
        kinds["length"] = int
    if TASK_OF[task].metric == "classification":
        kinds["all_classes"] = list
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}; unpack {_DATA_URL} again") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} of {path} must be a JSON object, got {record!r:.80}")
            for field, kind in kinds.items():
                if not isinstance(record.get(field), kind):
                    raise ValueError(
                        f"line {number} of {path} must have {field!r} of type {kind.__name__}, got "
                        f"{record.get(field)!r:.80}; the files of {_DATA_URL} do"
                    )
            yield record


def _setting(data: Path, name: str, task: str, kind: type) -> Any:
    """What one of LongBench's own settings files says of a task; None where there is no such file."""
    path = _find(data, name, "config")
    if path is None:
        return None
    setting = json.loads(path.read_text(encoding="utf-8")).get(task)
    if not isinstance(setting, kind):
        raise ValueError(
            f"{path} must give {task!r} of type {kind.__name__}, got {setting!r:.80}; take the file from "
            "https://github.com/THUDM/LongBench (LongBench/config), or remove it to use ours"
        )
    return setting


def _check_template(template: str, task: str, ours: Task) -> None:
    fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    _, found, after = template.partition("{context}")
    if not found or not fields <= {"context", "input"}:
        raise ValueError(f"the template of {task!r} must hold {{context}} and may hold {{input}}, got {template!r:.80}")
    if ours.chat and not after.startswith(_BLANK_LINE):
        raise ValueError(
            f"the template of {task!r}, a user's turn, must have a blank line behind {{context}}, got {after!r:.40}"
        )
