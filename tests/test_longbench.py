"""LongBench as examples: what stands where, what is cut, whose words, and what is said of data that are not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eval import longbench
from eval.examples import Example
from eval.longbench import E_TASKS, TASKS, cut_middle, find_wording, length_group
from eval.longbench.tasks import TASK_OF
from eval.metrics import METRICS

DATA = Path(__file__).parent / "data" / "longbench"
"""Invented records in LongBench's form: all tasks, and two of LongBench-E."""


def records(name: str, data: Path = DATA) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def make(
    task: str,
    tokenizer: PreTrainedTokenizerFast,
    data: Path = DATA,
    *,
    max_tokens: int | None = None,
    count: int | None = None,
    extended: bool = False,
) -> list[Example]:
    return longbench.make(task, tokenizer=tokenizer, data=data, max_tokens=max_tokens, count=count, extended=extended)


def prompt_of(example: Example) -> str:
    return example.context + "\n\n" * example.chat + example.question


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sample data where they can be changed."""
    return Path(shutil.copytree(DATA, tmp_path / "longbench"))


def test_tasks() -> None:
    assert len(TASKS) == len(set(TASKS)) == 21
    assert len(E_TASKS) == 13
    assert set(TASKS) - set(E_TASKS) == {
        "narrativeqa", "multifieldqa_zh", "musique", "dureader", "qmsum", "vcsum", "lsht", "passage_retrieval_zh",
    }  # fmt: skip


def test_what_longbench_says_of_each_task() -> None:
    """Generation lengths of `dataset2maxlen.json`, metrics of `eval.py`, and what `pred.py` has no template for."""
    lengths = {
        **dict.fromkeys(["gov_report", "qmsum", "multi_news", "vcsum"], 512),
        **dict.fromkeys(["narrativeqa", "qasper", "dureader", "samsum"], 128),
        **dict.fromkeys(["multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"], 64),
    }
    assert {name: task.max_new_tokens for name, task in TASK_OF.items()} == {n: lengths.get(n, 32) for n in TASKS}
    plain = {name for name, task in TASK_OF.items() if not task.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, task in TASK_OF.items() if task.stop} == {"samsum"}
    first_line = {name for name, task in TASK_OF.items() if task.metric.endswith(("first_line", "classification"))}
    assert first_line == {"trec", "triviaqa", "samsum", "lsht"}
    in_chinese = {name for name, task in TASK_OF.items() if task.metric.endswith("_zh")}
    assert in_chinese == {"multifieldqa_zh", "dureader", "vcsum", "passage_retrieval_zh"}


@pytest.mark.parametrize("task", TASKS)
def test_examples(task: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The context ends with the record's, and nothing of the question is in it; a right answer scores 1."""
    made = make(task, tokenizer)
    assert len(made) == len(records(task))
    for example, record in zip(made, records(task), strict=True):
        assert (example.task, example.id, example.length) == (task, record["_id"], 0)
        assert example.context.endswith(record["context"])
        assert len(example.context) > len(record["context"]) + 10, "no instruction before the text"
        assert record["input"] in example.question
        assert not record["input"] or record["input"] not in example.context
        assert "{" not in example.context[: -len(record["context"])]
        assert "{input}" not in example.question
        assert example.answers == tuple(record["answers"])
        assert example.extra == {"wording": "own"}
        assert example.prefix == ""
        assert example.question.startswith("\n\n") is (task in ("triviaqa", "samsum"))
        assert METRICS[example.metric](record["answers"][0], example) == pytest.approx(1.0)
        assert METRICS[example.metric]("", example) == 0.0


def test_instructions_are_in_the_language_of_the_task(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in TASKS:
        (example, *_) = make(task, tokenizer, count=1)
        chinese = records(task)[0]["language"] == "zh"
        assert any("一" <= letter <= "鿿" for letter in example.context[:20]) is chinese


def test_the_whole_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = make("multifieldqa_en", tokenizer)
    assert prompt_of(example) == (
        "Read this text; a question that has a short answer comes afterwards.\n\n"
        "Notice. The reading hall opens at nine and closes at six. On feast days it stays shut. "
        "Cards are given out at the desk on the left.\n\n"
        "Answer the question from the text. Reply with the answer and nothing else.\n\n"
        "Question: When does the hall open?\nAnswer:"
    )


def test_count_and_classes(tokenizer: PreTrainedTokenizerFast) -> None:
    (first,) = make("trec", tokenizer, count=1)
    assert first == make("trec", tokenizer)[0]
    assert first.classes == ("City", "Number of something", "Individual", "Other location", "Date")
    assert make("narrativeqa", tokenizer)[0].classes == ()


def test_repeated_ids_stay_apart(copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    line = (copy / "lcc.jsonl").read_text(encoding="utf-8")
    (copy / "lcc.jsonl").write_text(line * 3, encoding="utf-8")
    own = records("lcc")[0]["_id"]
    assert [example.id for example in make("lcc", tokenizer, copy)] == [own, f"{own}-2", f"{own}-3"]


def test_extended(tokenizer: PreTrainedTokenizerFast) -> None:
    made = make("qasper", tokenizer, extended=True)
    assert [example.extra["length_group"] for example in made] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert {example.task for example in made} == {"qasper_e"}
    assert made[0].metric == "qa_f1"
    (example,) = make("trec", tokenizer, extended=True)
    assert (example.task, example.chat, len(example.classes)) == ("trec_e", False, 5)
    assert "length_group" not in make("qasper", tokenizer)[0].extra


@pytest.mark.parametrize(("num_words", "group"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (8000, "8k+")])
def test_length_groups(num_words: int, group: str) -> None:
    assert length_group(num_words) == group


@pytest.mark.parametrize("task", TASKS)
def test_cut_prompts(task: str, copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The middle of a long context goes; the instructions before it and the question stay."""
    (record, *_) = records(task)
    record["context"] *= 8
    (copy / f"{task}.jsonl").write_text(json.dumps(record), encoding="utf-8")
    (whole,) = make(task, tokenizer, copy)
    ids = tokenizer(prompt_of(whole)).input_ids
    (cut,) = make(task, tokenizer, copy, max_tokens=len(ids) - 101)
    assert cut.extra == {"wording": "own", "cut": "middle"}
    assert cut.question == whole.question
    half = (len(ids) - 101) // 2
    if whole.context.isascii():  # else the tokens of a half may end within a character
        assert prompt_of(cut) == tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
    (same,) = make(task, tokenizer, copy, max_tokens=len(ids))
    assert same == whole


def test_cut_as_longbench_does(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """In a text that its tokenizer gives back, both halves are what their tokens decode to."""
    tokenizer_ids = tokenizer(prose + "\nQuestion: what?").input_ids
    for max_tokens in (2, 3, 40, 41, 500, len(tokenizer_ids) - 1):
        half = max_tokens // 2
        want = tokenizer.decode(tokenizer_ids[:half]) + tokenizer.decode(tokenizer_ids[-half:])
        cut = cut_middle(prose, "\nQuestion: what?", max_tokens, tokenizer)
        assert cut is not None
        assert cut[0] + cut[1] == want
    assert cut_middle(prose, "\nQuestion: what?", len(tokenizer_ids), tokenizer) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(alphabet="ab 一二é\n.", max_size=30),
    st.text(alphabet="ab 一二é\n.", max_size=30),
    st.integers(min_value=2, max_value=40),
)
@hypothesis.example("一", "", 2)  # three tokens, of one character
def test_a_cut_keeps_what_is_whose(
    tokenizer: PreTrainedTokenizerFast, context: str, question: str, max_tokens: int
) -> None:
    """What is left of the context is its beginning and its end; of the question too, and more of its end."""
    cut = cut_middle(context, question, max_tokens, tokenizer)
    num_tokens = len(tokenizer(context + question).input_ids)
    assert (cut is None) is (num_tokens <= max_tokens)
    if cut is None:
        return
    for left, was in zip(cut, (context, question), strict=True):
        assert len(left) <= len(was)
        assert any(was.startswith(left[:at]) and was.endswith(left[at:]) for at in range(len(left) + 1))
    assert cut[0] + cut[1]
    if len(cut[0]) < len(context):
        assert cut[1] == question or context.startswith(cut[0])


def test_a_cut_in_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = " ".join(f"word{i}" for i in range(60))
    assert cut_middle("short", asked, 20, tokenizer) is not None
    context, question = cut_middle("short", asked, 20, tokenizer) or ("", "")
    assert context == "short"
    assert question.endswith("word59")
    assert question.startswith("word0")
    context, question = cut_middle("abcdefgh " * 40, asked, 20, tokenizer) or ("", "")
    assert 0 < len(context) < 90
    assert question
    assert asked.endswith(question)


def test_special_tokens_count(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """As in LongBench, begin and end are among the prompt's tokens, and no text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[(each, backend.token_to_id(each)) for each in ("<begin>", "<end>")]
    )
    ids = tokenizer(prose).input_ids
    cut = cut_middle(prose, "", 8, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert cut == (tokenizer.decode(ids[:3]) + tokenizer.decode(ids[-3:]), "")


def test_longbench_words_and_lengths(copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Taken as they are, from the folder or from `config` in it; lengths without words are taken too."""
    assert find_wording("qmsum", copy).source == "own"
    (copy / "dataset2maxlen.json").write_text('{"qmsum": 7}')
    assert find_wording("qmsum", copy)[1:] == (7, "own")
    (copy / "config").mkdir()
    template = "Head {input}\n{context}\n\n Then {input}: {context}"
    (copy / "config" / "dataset2prompt.json").write_text(json.dumps({"qmsum": template}))
    (example,) = make("qmsum", tokenizer, copy)
    (record,) = records("qmsum")
    assert prompt_of(example) == template.format(**record)
    assert example.context == f"Head {record['input']}\n{record['context']}"
    assert example.question.startswith(" Then ")
    assert (example.max_new_tokens, example.extra["wording"]) == (7, "longbench")


def test_words_without_a_chat_turn_are_taken_to_the_letter(copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (copy / "dataset2prompt.json").write_text(json.dumps({"lcc": "Go on.\n{context}\n\nLine:\n"}))
    (example,) = make("lcc", tokenizer, copy)
    assert example.context + example.question == f"Go on.\n{records('lcc')[0]['context']}\n\nLine:\n"


def test_folder_as_unpacked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    assert make("lcc", tokenizer, tmp_path) == make("lcc", tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "narrative"}, "task must be one of narrativeqa, qasper, .*, got 'narrative'"),
        ({"task": "musique", "extended": True}, "task must be one of qasper, .* in LongBench-E, got 'musique'"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, one for each half, got 1"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"data": Path("nowhere")}, r"lcc\.jsonl must be in nowhere or in nowhere/data.*resolve/main/data\.zip"),
        ({"data": Path("nowhere"), "extended": True}, r"lcc_e\.jsonl .* eval\.download longbench --to nowhere"),
    ],
)
def test_what_is_asked_wrongly(change: dict, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"task": "lcc", "tokenizer": tokenizer, **change})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*trec\.jsonl is not JSON"),
        ("[]", r"line 2 of .*trec\.jsonl must be a JSON object, got \[\]"),
        ('{"_id": "1", "context": "a", "answers": []}', "line 2 .* must have 'input' of type str, got None"),
        ('{"_id": "1", "context": "a", "input": "b", "answers": "x"}', "must have 'answers' of type list, got 'x'"),
        ('{"_id": "1", "context": "a", "input": "b", "answers": []}', "must have 'all_classes' of type list, got None"),
    ],
)
def test_damaged_data(line: str, message: str, copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = (copy / "trec.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (copy / "trec.jsonl").write_text(f"{first}\n{line}\n", encoding="utf-8")
    assert len(make("trec", tokenizer, copy, count=1)) == 1
    with pytest.raises(ValueError, match=message):
        make("trec", tokenizer, copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset2prompt.json",
            "{}",
            "dataset2prompt.json must give 'qmsum' of type str, got None; take the file from",
        ),
        ("dataset2maxlen.json", '{"qmsum": "9"}', "dataset2maxlen.json must give 'qmsum' of type int, got '9'"),
        ("dataset2prompt.json", '{"qmsum": "{input}"}', r"must hold \{context\} and may hold \{input\}"),
        ("dataset2prompt.json", '{"qmsum": "{context} {x}"}', r"must hold \{context\} and may hold \{input\}"),
        ("dataset2prompt.json", '{"qmsum": "{context}\\n{input}"}', "a blank line behind"),
    ],
)
def test_wrong_settings_files(name: str, content: str, message: str, copy: Path) -> None:
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_wording("qmsum", copy)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        cut_middle("a", "b", 2, Slow())  # type: ignore[arg-type]
