"""InfiniteBench's retrieval tasks: its files are read, made ones are of the same kind, and scores are its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval import infinitebench
from eval.examples import Example
from eval.infinitebench import METRICS, TASKS
from eval.ruler.haystacks import NOISE
from sentencekv import pocket

FILES = {"retrieve_passkey": "passkey", "retrieve_number": "number_string", "retrieve_kv": "kv_retrieval"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.path())


def make(tokenizer: PreTrainedTokenizerBase, task: str, length: int = 2048, count: int = 1, **options) -> list[Example]:
    return infinitebench.make(task, tokenizer=tokenizer, length=length, count=count, **options)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 4096])
def test_length_is_kept_and_filled(tokenizer: PreTrainedTokenizerBase, task: str, length: int) -> None:
    for example in make(tokenizer, task, length, 2):
        texts = (example.context, "\n\n" + example.question, example.prefix)
        used = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        assert 0.93 * length <= used + example.max_new_tokens <= length
        assert (example.task, example.length) == (task, length)


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_index_and_seed_alone(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    three = make(tokenizer, task, 1024, 3)
    assert make(tokenizer, task, 1024, 2) == three[:2]
    assert len({example.id for example in three}) == len({example.answers for example in three}) == 3
    assert make(tokenizer, task, 1024, seed=1)[0].answers != three[0].answers


@pytest.mark.parametrize(("task", "what", "digits"), [(TASKS[0], "pass key", 5), (TASKS[1], "sequence of digits", 10)])
def test_hidden_lines(tokenizer: PreTrainedTokenizerBase, task: str, what: str, digits: int) -> None:
    for example in make(tokenizer, task, count=3):
        lines = example.context.split("\n")[2:]
        [line] = [line for line in lines if line != NOISE]
        [answer] = example.answers
        assert re.fullmatch(rf"\d{{{digits}}}", answer)
        assert line == f"The {what} is {answer}. Do not forget: {answer} is the {what}."
        assert example.extra["depth"] == pytest.approx(lines.index(line) / len(lines), abs=0.03)
        assert what in example.question
        assert answer not in example.question + example.prefix


def test_numbers_repeat_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in make(tokenizer, "retrieve_number", 512, 8):
        runs = [match[0] for match in re.finditer(r"(\d)\1*", example.answers[0])]
        assert len(runs) <= 5  # five digits, of which some were doubled five times


def test_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in make(tokenizer, "retrieve_kv", count=3):
        pairs = json.loads(example.context[example.context.index("{") :])
        key = re.search(r'Key: "(\S+)"', example.question)[1]
        assert example.answers == (pairs[key],)
        assert len(pairs) > 20
        assert len({*pairs, *pairs.values()}) == 2 * len(pairs)
        assert example.extra["depth"] == pytest.approx(list(pairs).index(key) / len(pairs), abs=0.1)


def test_too_short(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"retrieve_kv at 100 tokens: needs room for \d+ tokens, got 50"):
        make(tokenizer, "retrieve_kv", 100)


def rows_of(task: str) -> list[dict]:
    context = {"retrieve_kv": 'JSON data:\n{"k": "v-1"}'}.get(task, f"{NOISE}\nThe pass key is 05412.\n{NOISE}\n")
    asked = {"retrieve_kv": 'Key: "k"\nThe value associated with the specified key is: '}.get(task, "What is it?")
    answer = "v-1" if task == "retrieve_kv" else "05412"
    row = {"id": 3, "context": context, "input": asked, "answer": [answer], "options": []}
    return [row, {**row, "id": 4, "answer": answer}]


@pytest.mark.parametrize(("task", "max_new_tokens"), [*zip(TASKS, (6, 12, 50), strict=True)])
def test_files(tmp_path: Path, task: str, max_new_tokens: int) -> None:
    rows = rows_of(task)
    (tmp_path / f"{FILES[task]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = infinitebench.read(task, data=tmp_path)
    assert first.context.endswith(f"\n\n{rows[0]['context']}")
    assert first.question == rows[0]["input"]
    assert first.answers == second.answers == ("v-1" if task == "retrieve_kv" else "05412",)
    assert ([first.id, second.id], first.length, first.max_new_tokens) == (["3", "4"], 0, max_new_tokens)
    assert infinitebench.read(task, data=tmp_path, count=1) == [first]
    assert METRICS[first.metric](f" {first.answers[0]}.", first) == 1


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"number_string\.jsonl, .* eval\.download infinitebench --to .* from https"):
        infinitebench.read("retrieve_number", data=tmp_path)
    with pytest.raises(ValueError, match=r"task must be one of retrieve_passkey, .*got 'passkey'"):
        infinitebench.read("passkey", data=tmp_path)
    path = tmp_path / "passkey.jsonl"
    path.write_text(json.dumps(rows_of(TASKS[0])[0]) + '\n{"context": "a", "input": "b", "answer": []}\n')
    with pytest.raises(ValueError, match=r"passkey\.jsonl:2 has no answer; get the file again"):
        infinitebench.read(TASKS[0], data=tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"passkey\.jsonl:1 is not JSON"):
        infinitebench.read(TASKS[0], data=tmp_path)


@pytest.mark.parametrize(
    ("metric", "answer", "prediction", "score"),
    [
        ("first_number", "05412", " 05412. Remember it.", 1),
        ("first_number", "05412", "It is 05412, not 11111", 1),
        ("first_number", "05412", "11111 or 05412", 0),
        ("first_number", "05412", "5412", 0),
        ("first_number", "05412", "054123", 0),
        ("first_number", "05412", "05,412", 0),
        ("first_number", "05412", "٠5412", 0),
        ("first_number", "05412", "", 0),
        ("answer_among_words", "ab-1", '{"k": "ab-1"}', 1),
        ("answer_among_words", "ab-1", "The value is:ab-1.", 1),
        ("answer_among_words", "ab-1", "not ab-12", 0),
        ("answer_among_words", "ab-1", "AB-1", 0),
        ("answer_among_words", "ab-1", "(ab-1)", 0),
        ("answer_among_words", "ab-1", "", 0),
    ],
)
def test_scores_are_the_benchmarks(metric: str, answer: str, prediction: str, score: float) -> None:
    example = Example(
        task="t", id="0", length=0, context="", question="", answers=(answer,), metric=metric, max_new_tokens=1
    )
    assert METRICS[metric](prediction, example) == score
