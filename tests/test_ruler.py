"""RULER's tasks: lengths hold and are near, answers are in the texts and right, and files of its generator run."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import itertools
import json
import re
import sys
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval import ruler
from eval.examples import Example
from eval.metrics import METRICS
from eval.ruler import words
from eval.ruler.drafts import Draft, Plan, fit
from eval.ruler.haystacks import NOISE, hide_in_prose
from sentencekv import pocket

NEEDLE = re.compile(r"(?:The|One of the) secret (number|UUID)s? of (\S+) is (\S+)\.")
NUMBER = re.compile(r"[1-9]\d{6}")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
COMPOUND = re.compile(r"[a-z]{3,}-[a-z]{3,}")
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.path())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQuAD's and HotpotQA's files in small: 6 articles of 4 paragraphs, 10 questions of 10 paragraphs."""
    folder = tmp_path_factory.mktemp("data")
    articles = []
    for article in range(6):
        paragraphs = []
        for number in range(4):
            text = f"Paragraph {article}.{number}. " + "It was cold in the hall. " * (8 + number)
            asked = {"question": f"Which is {article}.{number}? ", "answers": [{"text": f"p{number}"}] * 2}
            absent = {"question": "What is not there?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": text, "qas": [{**asked, "is_impossible": False}, absent]})
        articles.append({"title": f"A{article}", "paragraphs": paragraphs})
    (folder / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    rows = []
    for row in range(10):
        context = [[f"T{row}.{i}", [f"First of {row}.{i}.", " It rained all day." * 6]] for i in range(10)]
        facts = [[f"T{row}.3", 0], [f"T{row}.7", 1], [f"T{row}.3", 1]]
        rows.append({"question": f"Who is {row}?", "answer": f"a{row}", "supporting_facts": facts, "context": context})
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    return folder


def make(tokenizer: PreTrainedTokenizerBase, task: str, length: int = 2048, count: int = 1, **options) -> list[Example]:
    return ruler.make(task, tokenizer=tokenizer, length=length, count=count, **options)


def tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    texts = (example.context, "\n\n" + example.question, example.prefix)
    return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts) + example.max_new_tokens


def hidden(example: Example) -> str:
    return example.context.partition("\n\n")[2]


def test_tasks_are_rulers() -> None:
    needles = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    others = ["vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert list(ruler.TASKS) == [f"niah_{name}" for name in needles] + others


@pytest.mark.parametrize(
    ("task", "length", "filled"),
    [(task, length, 0.94) for task in ruler.TASKS[:-2] for length in (1024, 4096)]
    + [(task, length, 0.9) for task in ("qa_1", "qa_2") for length in (1024, 1500)],  # small sets, longer units
)
def test_length_is_kept_and_filled(
    tokenizer: PreTrainedTokenizerBase, data: Path, task: str, length: int, filled: float
) -> None:
    for example in make(tokenizer, task, length, count=2, data=data):
        assert filled * length <= tokens(tokenizer, example) <= length
        assert (example.task, example.length) == (task, length)
        assert example.max_new_tokens == MAX_NEW_TOKENS[task.split("_")[0]]
        assert example.chat
        assert example.context == example.context.strip()
        assert example.prefix == example.prefix.strip()


@pytest.mark.parametrize("task", ruler.TASKS)
def test_examples_depend_on_index_and_seed_alone(tokenizer: PreTrainedTokenizerBase, data: Path, task: str) -> None:
    three = make(tokenizer, task, 1024, 3, data=data)
    assert make(tokenizer, task, 1024, 2, data=data) == three[:2]
    assert len({example.id for example in three}) == 3
    assert len({example.context for example in three}) == 3
    assert make(tokenizer, task, 1024, 1, seed=1, data=data)[0].context != three[0].context


@pytest.mark.parametrize("task", ruler.TASKS)
def test_scores(tokenizer: PreTrainedTokenizerBase, data: Path, task: str) -> None:
    [example] = make(tokenizer, task, 1024, data=data)
    score = METRICS[example.metric]
    assert score(f"They are: {', '.join(example.answers).upper()}.", example) == 1
    assert score("I do not know.", example) == 0
    half = 1 if task.startswith("qa") else 0.5
    assert score("yes", dataclasses.replace(example, answers=("yes", "absent"))) == half


def test_reserved_tokens_stay_free(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = make(tokenizer, "niah_single_1", 1024, reserved_tokens=100)
    assert 900 <= tokens(tokenizer, example) <= 924


@pytest.mark.parametrize(
    ("task", "num_needles", "num_answers", "key", "value"),
    [
        ("niah_single_1", 1, 1, COMPOUND, NUMBER),
        ("niah_single_2", 1, 1, COMPOUND, NUMBER),
        ("niah_single_3", 1, 1, COMPOUND, UUID),
        ("niah_multikey_1", 4, 1, COMPOUND, NUMBER),
        ("niah_multikey_2", None, 1, COMPOUND, NUMBER),
        ("niah_multikey_3", None, 1, UUID, UUID),
        ("niah_multivalue", 4, 4, COMPOUND, NUMBER),
        ("niah_multiquery", 4, 4, COMPOUND, NUMBER),
    ],
)
def test_needles(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    num_needles: int | None,
    num_answers: int,
    key: re.Pattern,
    value: re.Pattern,
) -> None:
    for example in make(tokenizer, task, count=3):
        found = NEEDLE.findall(hidden(example))
        assert all(key.fullmatch(name) and value.fullmatch(said) for _, name, said in found)
        assert len({said for _, _, said in found}) == len(found)
        assert len({name for _, name, _ in found}) == (1 if task == "niah_multivalue" else len(found))
        assert num_needles in (None, len(found))
        names = [name for _, name, _ in found if name in example.question]
        asked = sorted(set(names), key=example.question.index)
        values = {name: [said for _, other, said in found if other == name] for name in asked}
        assert len(example.answers) == num_answers
        if task == "niah_multivalue":
            assert sorted(example.answers) == sorted(values[asked[0]])
        else:
            assert example.answers == tuple(values[name][0] for name in asked)
        assert all(name in example.prefix for name in asked)
        # The answer is asked for, not given away.
        assert not any(answer in example.question + example.prefix for answer in example.answers)


def test_haystack_of_noise(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = make(tokenizer, "niah_single_1")
    lines = hidden(example).split("\n")
    assert [line == NOISE for line in lines].count(False) == 1
    place = next(at for at, line in enumerate(lines) if line != NOISE)
    assert NEEDLE.fullmatch(lines[place])
    assert example.extra["depth"] == pytest.approx(place / len(lines), abs=0.03)


def test_haystack_of_needles(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = make(tokenizer, "niah_multikey_3")
    lines = hidden(example).split("\n")
    assert len(lines) > 20
    assert all(NEEDLE.fullmatch(line) for line in lines)


def test_haystack_of_texts(tokenizer: PreTrainedTokenizerBase, prose: str) -> None:
    # One running text of all texts, from a random sentence on and round again.
    first, second = prose[:4000], prose[4000:9000]
    whole = " ".join(f"{first} {second}".split())
    starts = set()
    for example in make(tokenizer, "niah_multivalue", 1024, 4, haystacks=[first, second]):
        text = " ".join(NEEDLE.sub("", hidden(example)).split())
        assert text in f"{whole} {whole}"
        assert whole[: whole.index(text[:40])].rstrip()[-1:] in {*".!?\"'"}  # a sentence ends before it
        starts.add(text[:40])
    assert len(starts) == 4


def test_needles_stand_between_sentences(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in make(tokenizer, "niah_single_2", count=4):
        before = hidden(example)[: NEEDLE.search(hidden(example)).start()].rstrip()
        assert not before or before[-1] in ".!?\"'"
        share = example.context.index(example.answers[0]) / len(example.context)
        assert example.extra["depth"] == pytest.approx(share, abs=0.02)


def test_needles_stand_at_40_depths() -> None:
    texts = [hide_in_prose(["S."] * 78, ["N.", "M."], Random(seed)).split() for seed in range(300)]
    assert {text.index("N.") for text in texts} | {text.index("M.") - 1 for text in texts} == set(range(0, 79, 2))
    assert all(text.index("N.") < text.index("M.") for text in texts)


def test_haystack_that_is_too_short(tokenizer: PreTrainedTokenizerBase, prose: str) -> None:
    with pytest.raises(ValueError, match=r"niah_single_2 at 4096 tokens: .*the haystack's texts end; give more"):
        make(tokenizer, "niah_single_2", 4096, haystacks=[prose[:3000]])
    with pytest.raises(ValueError, match="the haystack's texts end"):
        make(tokenizer, "niah_single_2", haystacks=[" "])


def assigned(text: str, value: str) -> list[str]:
    """Variables with a value, by running the assignments in their order."""
    values: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", text):
        values[name] = number or values[other]
    return [name for name, got in values.items() if got == value]


def test_variables(tokenizer: PreTrainedTokenizerBase) -> None:
    for example in make(tokenizer, "vt", count=3):
        *_, solved, asked = example.context.split("The text below")
        [value] = re.findall(r"\d+", example.question)
        assert len(value) == 5
        assert assigned(asked, value) == list(example.answers)
        assert len(set(example.answers)) == 5
        assert all(len(name) == 5 for name in example.answers)
        # A chain of four hops.
        hops = re.findall(r"VAR (\w+) = VAR (\w+)", asked)
        assert hops == [(name, before) for before, name in itertools.pairwise(example.answers)]
        assert "5 variables" in example.prefix
        lines = asked.strip().split("\n")[2:]
        assert sorted(set(lines) - {line for line in lines if line.startswith("VAR")}) == [NOISE]
        # The solved example is solved right, and is another one.
        other = re.search(r"given the value (\d+) are: ([A-Z ]+)", solved)
        assert assigned(solved, other[1]) == other[2].split()
        assert [len(name) for name in other[2].split()] == [3] * 5
        assert other[1] != value


def listed(text: str) -> collections.Counter:
    """Words of the numbered list that a text ends with."""
    items = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return collections.Counter(word for _, word in items)


@pytest.mark.parametrize(
    ("length", "common", "other", "example_common", "example_other", "example_words"),
    [(2048, 6, 1, 3, 1, 20), (4096, 30, 3, 10, 3, 40)],
)
def test_common_words(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    common: int,
    other: int,
    example_common: int,
    example_other: int,
    example_words: int,
) -> None:
    for example in make(tokenizer, "cwe", length, 2):
        _, first, asked = example.context.split("Here is a numbered list")
        counts = listed(asked)
        assert collections.Counter(counts.values()) == {common: 10, other: len(counts) - 10}
        assert {word for word, count in counts.items() if count == common} == set(example.answers)
        shown, answer = first.split("Which 10 words")
        counts = listed(shown)
        assert collections.Counter(counts.values()) == {example_common: 10, example_other: example_words - 10}
        assert set(listed(answer)) == {word for word, count in counts.items() if count == example_common}


def test_words_never_run_out() -> None:
    drawn = words.draw_words(Random(0), 10_000, num_apart=10)
    assert len(set(drawn)) == len(drawn) == 10_000
    compounds = [word for word in drawn if "-" in word]
    assert 1000 < len(compounds) < 2000
    assert not {part for word in compounds for part in word.split("-")} & set(drawn[:10])
    assert words.draw_words(Random(0), 20, num_apart=10)[:10] == drawn[:10]


def test_frequent_words(tokenizer: PreTrainedTokenizerBase) -> None:
    for example, length in itertools.product(range(2), (1024, 4096)):
        made = make(tokenizer, "fwe", length, 2)[example]
        counts = collections.Counter(hidden(made).split())
        (dots, most), *ranked = counts.most_common(5)
        assert dots == "..."
        assert tuple(word for word, _ in ranked[:3]) == made.answers
        rising = [count for _, count in reversed(ranked)]
        assert rising == sorted(set(rising))  # no ties
        # The share of rank k is k^-2 / zeta(2).
        assert ranked[0][1] == pytest.approx(most / 4, rel=0.1)
        assert ranked[1][1] == pytest.approx(most / 9, rel=0.2)
        assert all(len(word) == 6 for word in counts if word != dots)


def test_missing_word_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    words._list.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ImportError, match=r"pip install 'sentencekv\[eval\]'"):
        words.draw_compound(Random(0))


def test_uuids_are_valid_and_differ() -> None:
    rng = Random(0)
    drawn = [words.draw_uuid(rng) for _ in range(200)]
    assert all(UUID.fullmatch(each) for each in drawn)
    assert len(set(drawn)) == 200


def test_questions_of_squad(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    examples = make(tokenizer, "qa_1", 1024, 24, data=data)
    assert len({example.question for example in examples}) == 24
    for example in examples:
        article, number = re.search(r"Which is (\d)\.(\d)\?$", example.question).groups()
        assert example.answers == (f"p{number}",)
        found = re.findall(r"^Document (\d+):\nParagraph (\d)\.(\d)\.", example.context, re.MULTILINE)
        assert [int(at) for at, _, _ in found] == list(range(1, len(found) + 1))
        assert len({found[1:] for found in found}) == len(found)
        # The whole article is there, then others.
        assert {(article, str(other)) for other in range(4)} < {(a, n) for _, a, n in found}
        assert example.extra == {"source": "dev-v2.0.json"}
        assert example.metric == "string_match_part"
    places = {re.search(rf"Document (\d+):\nParagraph {e.question[-4:-1]}", e.context)[1] for e in examples}
    assert len(places) > 3
    # The same questions at every length.
    assert [e.question for e in make(tokenizer, "qa_1", 512, 3, data=data)] == [e.question for e in examples[:3]]


def test_questions_of_hotpotqa(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    for length in (256, 1024):
        for example in make(tokenizer, "qa_2", length, 10, data=data):
            row = re.search(r"Who is (\d)\?$", example.question)[1]
            assert example.answers == (f"a{row}",)
            # What the answer needs is there however short the text.
            for number in (3, 7):
                assert f":\nT{row}.{number}\nFirst of {row}.{number}. It rained" in example.context
            if length == 1024:
                assert example.context.count(f"\nT{row}.") == 10 < example.context.count("\nDocument ")


def test_questions_of_xquad(tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path) -> None:
    articles = json.loads((data / "dev-v2.0.json").read_text())["data"]
    with gzip.open(tmp_path / "xquad_en.jsonl.gz", "wt", encoding="utf-8") as file:
        for article in articles:
            for paragraph in article["paragraphs"]:
                del paragraph["qas"][1]
                del paragraph["qas"][0]["is_impossible"]
            file.write(json.dumps(article) + "\n")
    [example] = make(tokenizer, "qa_1", 1024, data=tmp_path)
    [same] = make(tokenizer, "qa_1", 1024, data=data)
    assert example.extra == {"source": "xquad_en.jsonl.gz"}
    assert dataclasses.replace(example, extra=same.extra) == same


def test_missing_and_damaged_data(tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dev-v2\.0\.json by python -m eval\.download ruler --to .* https://raj"):
        make(tokenizer, "qa_1", data=tmp_path)
    with pytest.raises(ValueError, match=r"no folder was given by --data; get hotpot_dev_.* --to DATA, or .* http"):
        make(tokenizer, "qa_2")
    (tmp_path / "dev-v2.0.json").write_text("{")
    with pytest.raises(ValueError, match=r"dev-v2\.0\.json is not what its name says .*get it again"):
        make(tokenizer, "qa_1", data=tmp_path)
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="is not what its name says"):
        make(tokenizer, "qa_2", data=tmp_path)
    with pytest.raises(ValueError, match="has 10 questions, got index 10; ask for fewer"):
        make(tokenizer, "qa_2", 1024, 11, data=data)
    with pytest.raises(ValueError, match=r"qa_1 at 4096 tokens: .* has no further paragraphs; leave qa_1 out"):
        make(tokenizer, "qa_1", 4096, data=data)


def test_what_cannot_be_made(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"task must be one of niah_single_1, .*got 'niah'"):
        make(tokenizer, "niah")
    with pytest.raises(ValueError, match=r"cwe at 256 tokens: needs room for \d+ tokens, got 136; ask for a greater"):
        make(tokenizer, "cwe", 256)


def test_long_texts_are_tokenised_a_few_times(tokenizer: PreTrainedTokenizerBase) -> None:
    drafted = []

    def draft(units: int) -> Draft:
        # Units cost more and more, and one alone costs next to nothing.
        drafted.append(units)
        text = " ".join(["stone"] * units + ["antidisestablishment"] * (units // 50))
        return Draft(context=text, question="Q", prefix="", answers=("A",))

    for room in (500, 30_000):
        drafted.clear()
        best = fit(Plan(draft=draft, fewest=1), tokenizer, room)
        used = len(tokenizer(best.context, add_special_tokens=False).input_ids)
        assert 0.97 * room - 10 < used <= room
        assert sum(units > max(drafted) / 10 for units in drafted) <= 4


ROWS = [
    {
        "index": 7,
        "input": "A special magic number is hidden within the following text.\nGrass.\nOne of them is: 123.\n"
        "What is the special magic number for x-y mentioned in the provided text?",
        "outputs": ["123"],
        "length": 4000,
        "length_w_model_temp": 4000,
        "answer_prefix": " The special magic number for x-y mentioned in the provided text is",
        "token_position_answer": 12,
    },
    {
        "index": 8,
        "input": "Some text.\nQuestion: Find all. Answer: they are: AB\n\nOther text.\n\n"
        "Question: Find all variables that are assigned the value 5.\nAnswer: According to it, they are:",
        "outputs": ["ABCDE", "FGHIJ"],
        "length": 4090,
    },
]


def test_files_of_rulers_generator(tmp_path: Path) -> None:
    path = tmp_path / "4096" / "data" / "niah_single_1" / "validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    first, second = ruler.read_file(path)
    for example, row in ((first, ROWS[0]), (second, ROWS[1])):
        assert example.context + example.question == row["input"]
        assert example.prefix == row.get("answer_prefix", "")
        assert example.answers == tuple(row["outputs"])
        assert (example.task, example.metric, example.max_new_tokens) == ("niah_single_1", "string_match_all", 128)
        assert (example.length, example.chat) == (4096, False)
    assert first.question.startswith("What is the special magic number for x-y")
    assert first.context.endswith("123.\n")
    # The last question counts, with the prefix that older files have behind it.
    assert second.question.startswith("Question: Find all variables")
    assert [first.id, second.id] == ["4096-7", "4096-8"]
    assert METRICS[second.metric]("fghij and more", second) == 0.5


def test_files_by_name(tmp_path: Path) -> None:
    path = tmp_path / "qa_2.jsonl"
    row = {"index": 0, "input": "Documents.\n\nQuestion: Which river?", "outputs": ["Elbe", "the Elbe"], "length": 900}
    path.write_text(json.dumps(row) + "\n\n")
    [example] = ruler.read_file(path)
    assert (example.task, example.length, example.max_new_tokens) == ("qa_2", 900, 32)
    assert (example.context, example.question) == ("Documents.\n\n", "Question: Which river?")
    assert METRICS[example.metric]("It is the elbe.", example) == 1
    [example] = ruler.read_file(path, task="vt", length=1024)
    assert (example.task, example.length, example.metric) == ("vt", 1024, "string_match_all")
    # Without a question of RULER's, the last line is it.
    path.write_text(json.dumps({**row, "input": "Text.\nMore text.\nTell me.\n"}))
    [example] = ruler.read_file(path)
    assert (example.context, example.question) == ("Text.\nMore text.\n", "Tell me.\n")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "vt.jsonl"
    path.write_text('{"index": 0, "input": "a", "outputs": []}\n{"index": 1}\n')
    with pytest.raises(ValueError, match=r"vt\.jsonl:2 has no input, outputs; give a file that RULER's"):
        ruler.read_file(path)
    path.write_text("index\n")
    with pytest.raises(ValueError, match=r"vt\.jsonl:1 is not JSON"):
        ruler.read_file(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no examples"):
        ruler.read_file(path)
    with pytest.raises(ValueError, match="must begin with one of niah, vt, cwe, fwe, qa, got 'other'"):
        ruler.read_file(tmp_path / "other.jsonl")


def test_own_examples_survive_rulers_format(tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path) -> None:
    for task in ruler.TASKS:
        [example] = make(tokenizer, task, 1024, data=data)
        row = {
            "index": 0,
            "input": f"{example.context}\n{example.question}",
            "outputs": example.answers,
            "length": tokens(tokenizer, example),
            "answer_prefix": example.prefix,
        }
        path = tmp_path / f"{task}.jsonl"
        path.write_text(json.dumps(row))
        [read] = ruler.read_file(path, length=1024)
        assert read.context + read.question == row["input"]
        assert read.question.split("\n")[-1] == example.question.split("\n")[-1]
        same = ("task", "length", "prefix", "answers", "metric", "max_new_tokens")
        assert [getattr(read, name) for name in same] == [getattr(example, name) for name in same]
