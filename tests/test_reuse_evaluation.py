"""Evaluation of reuse: edits that edit what they say, figures that are what they are called, runs that go on."""

import dataclasses
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from eval.report import render, wrong_answers
from eval.reuse import arrive, measures, rows
from eval.reuse.__main__ import main
from eval.reuse.arrivals import Arrival, arrivals, find, prompt_of
from eval.reuse.edits import KINDS, PLACES, edits, order
from eval.reuse.facts import facts
from eval.reuse.measures import bleu, chrf, compare, rouge_l, same_tokens
from eval.reuse.methods import METHODS, MIN_SIMILARITY, Method, method_of, methods_of
from eval.reuse.moved import moved, random_donor, wrong_donor
from eval.reuse.pairs import PASSAGE_TOKENS, Source, passages_of, sentences_of
from eval.reuse.reader import Answer, Reader, TooLongError
from eval.reuse.run import run
from eval.reuse.summary import QUANTILES, summarise, tables
from eval.run_folder import RunFolder
from sentencekv import LongContextLM
from sentencekv.prose import generate_prose
from sentencekv.reuse.decide import ReuseOptions, make_reuse_options
from tests.conftest import make_model

CPU = {"device": "cpu", "dtype": "float32"}
TOKENS = 220


@pytest.fixture(scope="module")
def lm() -> LongContextLM:
    return LongContextLM.from_pretrained("pocket", **CPU)


@pytest.fixture(scope="module")
def source(lm: LongContextLM) -> Source:
    return Source(lm.tokenizer, [generate_prose(1500, seed=5), generate_prose(1500, seed=6)], 1000)


@pytest.fixture
def reader(lm: LongContextLM) -> Iterator[Reader]:
    made = Reader(lm)
    yield made
    made.close()


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def words(text: str) -> Counter[str]:
    return Counter(text.split())


# What is made


def test_passages_hold_the_whole_text(lm: LongContextLM) -> None:
    text = "One.\n\nTwo!  Two\nagain.\n\n\n" + "A sentence of some words that says very little. " * 60 + "\n\nThe end"
    passages = passages_of(lm.tokenizer, text)
    assert " ".join(passages).split() == text.split()
    lengths = Source(lm.tokenizer, [text], 10).lengths(passages)
    assert all(PASSAGE_TOKENS <= length <= 4 * PASSAGE_TOKENS + 2 for length in lengths[:-1])
    endless = passages_of(lm.tokenizer, "so they went on and on " * 400)
    assert " ".join(endless).split() == ("so they went on and on " * 400).split()
    assert max(Source(lm.tokenizer, [text], 10).lengths(endless)) <= 4 * PASSAGE_TOKENS + 2
    assert passages_of(lm.tokenizer, " \n\n ") == []
    for each in (text, "", "No end", " Lead. And "):
        assert "".join(sentences_of(each)) == each


def test_a_source_gives_other_passages_each_time(lm: LongContextLM, source: Source) -> None:
    runs = source.some(3, [200, 0, 150], Random(1))
    assert runs[1] == []
    assert not set(runs[0]) & set(runs[2])
    for run_of, count in zip(runs, (200, 0, 150), strict=True):
        total = sum(source.lengths(run_of))
        assert count <= total < count + 5 * PASSAGE_TOKENS
    assert set(runs[0]) <= set(source.passages(1)), "the second of two texts"
    assert Source(lm.tokenizer, [], 100).passages(0) != Source(lm.tokenizer, [], 100, first_seed=9).passages(0)
    with pytest.raises(ValueError, match=r"text 2 of 2 has [\d,]+ tokens .* 9,000 are needed"):
        Source(lm.tokenizer, [generate_prose(9000), "Short. " * 50], 9000)


@pytest.mark.parametrize("place", PLACES)
def test_turns(place: str) -> None:
    turns = order(9, place, Random(0))
    assert sorted(turns) == list(range(9))
    first = {"begin": [0, 1, 2], "end": [8, 7, 6], "middle": [4, 3, 5]}
    assert turns[:3] == first.get(place, turns[:3])
    assert order(0, place, Random(0)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_edits_touch_their_share_and_nothing_else(kind: str, source: Source) -> None:
    made, short = edits(source, tokens=500, cases=1, shares=(0.9, 0.1), kinds=(kind,), seed=3)
    left_out = [name for name in short if name.endswith("(left out)")]
    assert len(made) + len(left_out) == 2 * len(PLACES)
    assert len(made) >= 5
    assert {pair.text for pair in made} == {"3-0"}
    sentence = 40 / 500
    for pair in made:
        share, place = pair.extra["share"], pair.extra["place"]
        assert pair.task == kind
        assert pair.prompt != pair.donor
        fell_short = [name for name in short if name.startswith(f"{kind} {pair.id} (")]
        assert bool(fell_short) == (pair.extra["edited"] < share)
        # Names and numbers may be fewer than what is asked for; nothing goes further than its last piece.
        assert pair.extra["edited"] <= share + (5 * PASSAGE_TOKENS / 500 if kind == "moved" else 2 * sentence)
        if kind in ("insertion", "reorder", "moved"):
            assert pair.extra["edited"] >= share
        before, after = sentences_of(pair.donor), sentences_of(pair.prompt)
        if kind in ("reorder", "moved"):
            assert words(pair.prompt) == words(pair.donor)
        elif kind == "insertion":
            assert not words(pair.donor) - words(pair.prompt)
        else:
            changed = sum(a != b for a, b in zip(pair.donor.split(), pair.prompt.split(), strict=False))
            assert changed
            if kind != "negation":
                assert len(pair.donor.split()) == len(pair.prompt.split())
        if share == 0.1 and place in ("begin", "end"):
            # What the other half says is as it was.
            half = pair.donor[len(pair.donor) // 2 :] if place == "begin" else pair.donor[: len(pair.donor) // 2]
            kept = pair.prompt.endswith(half) if place == "begin" else pair.prompt.startswith(half)
            assert kept or kind in ("entity", "number"), (place, before, after)
    again, _ = edits(source, tokens=500, cases=1, shares=(0.1, 0.9), kinds=(kind,), seed=3)
    assert again == made


def test_edits_that_find_no_more_are_not_counted_twice(source: Source) -> None:
    """There are fewer numbers than both shares ask for, so that the larger one would edit the same sentences."""
    made, short = edits(source, tokens=500, cases=1, shares=(0.9, 0.8), kinds=("number",), places=("end",))
    (pair,) = made
    assert pair.extra["share"] == 0.8 > pair.extra["edited"]
    assert short == [f"number 0-0-end-0.8 ({pair.extra['edited']:.2g})", "number 0-0-end-0.9 (left out)"]


def test_edits_within_sentences() -> None:
    from eval.reuse.edits import _negate, _recount, _rename

    renamed: dict[str, str] = {}
    said = _rename("Then Alice met Bob, and Alice left.", renamed, Random(0))
    assert set(renamed) == {"Alice", "Bob"}
    assert said == f"Then {renamed['Alice']} met {renamed['Bob']}, and {renamed['Alice']} left."
    assert _rename("Alone I stood.", renamed, Random(0)) == "Alone I stood."
    for seed in range(20):
        said = _recount("In 1850, 7 men and two dogs.", {}, Random(seed))
        (year, seven), before = re.findall(r"\d+", said), ("1850", "7")
        assert (len(year), len(seven)) == (4, 1)
        assert year != before[0]
        assert seven != before[1]
        assert "two dogs" not in said
    assert _negate("It was cold and is.", {}, Random(0)) == "It was not cold and is."
    assert _negate("It was not cold.", {}, Random(0)) == "It was cold."
    assert _negate("Cold it seemed.", {}, Random(0)) == "Cold it seemed."


def test_moved_passages_and_donors(lm: LongContextLM, source: Source) -> None:
    asked = {"tokens": 600, "share": 0.75, "cases": 2}
    pairs = moved(source, **asked)
    for pair in pairs:
        donor, prompt = set(pair.donor.split("\n\n")), pair.prompt.split("\n\n")
        lengths = dict(zip(prompt, source.lengths(prompt), strict=True))
        shared = sum(length for passage, length in lengths.items() if passage in donor)
        assert 0.75 * 600 <= shared <= 0.75 * 600 + 5 * PASSAGE_TOKENS
        assert 600 <= sum(lengths.values()) <= 600 + 10 * PASSAGE_TOKENS
        assert pair.extra["ends"] == ("moved" if prompt[-1] in donor else "new")
    assert [moved(source, **asked) == pairs, moved(source, **asked, seed=1) == pairs] == [True, False]
    wrong = wrong_donor(source, Source(lm.tokenizer, [], 700, first_seed=77), **asked)
    drawn = random_donor(source, **asked)
    assert [pair.prompt for pair in wrong] == [pair.prompt for pair in drawn] == [pair.prompt for pair in pairs]
    for pair in (*wrong, *drawn):
        both = set(pair.donor.split("\n\n")) & set(pair.prompt.split("\n\n"))
        assert all(len(each) < 60 for each in both), "headings at most"
    assert [pair.text for pair in wrong] == [pair.text for pair in drawn] == [pair.text for pair in pairs]
    assert len({pair.text for pair in pairs}) == 2
    assert len(random_donor(source, tokens=300, share=0.5, cases=1)) == 1
    short = Source(lm.tokenizer, ["\n\n".join(f"{number} " * PASSAGE_TOKENS for number in range(9))], 10)
    for seed in range(20):  # two passages, of which every other lot makes the same prompt
        (pair,) = moved(short, tokens=short.lengths(short.passages(0))[0] + 1, share=1.0, cases=1, seed=seed)
        assert pair.donor.count("\n\n") == 1
        assert pair.donor != pair.prompt
    with pytest.raises(ValueError, match="a prompt is one passage, which has no other order"):
        moved(source, tokens=1, share=1.0, cases=1)


def test_facts_differ_in_their_values_alone(lm: LongContextLM, source: Source) -> None:
    pairs = facts(lm.tokenizer, source, tokens=400, cases=1, num_facts=3)
    assert Counter(pair.task for pair in pairs) == {"fact": 3, "all_facts": 3, "fact_after_other_question": 3}
    assert len({(pair.task, pair.id) for pair in pairs}) == 9
    assert len({pair.text for pair in pairs}) == 1
    for pair in pairs:
        ((donor,), (prompt,)) = (
            [message["content"] for message in each] for each in (pair.donor, pair.prompt) if not isinstance(each, str)
        )
        (new,), (old,) = pair.answers, pair.donor_answers
        assert new in prompt
        assert old not in prompt
        assert old in donor
        assert new not in donor
        if pair.task == "fact":
            assert prompt.replace(new, old) == donor
        asks_the_same = donor.rsplit("\n\n", 1)[1] == prompt.rsplit("\n\n", 1)[1]
        assert asks_the_same == (pair.task != "fact_after_other_question")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        facts(lm.tokenizer, source, tokens=400, cases=1, num_facts=1)


def test_arrivals_from_files(tmp_path: Path) -> None:
    chat = [{"question_id": 81, "turns": ["Hello?", "And then?"]}, {"question_id": 82, "turns": ["Why?", "How?"]}]
    (tmp_path / "mt_bench_question.jsonl").write_text("\n".join(map(json.dumps, chat)))
    responses = [{"response_text": "A ship."}, {"response_text": "A boat."}]
    questions = [{"question_text": f"What {n}?", "question_number": n, "responses": responses} for n in (1, 2)]
    with gzip.open(tmp_path / "squality_v1.3_dev.jsonl.gz", "wt") as file:
        file.write(json.dumps({"document": "A story.", "questions": questions}))
    first, second = arrivals("chat", tmp_path)
    assert (first.id, first.turns, second.references) == ("81", ("Hello?", "And then?"), ())
    assert [each.id for each in arrivals("chat", tmp_path, 1)] == ["81"]
    behind, before = (arrivals(task, tmp_path) for task in ("story", "question_and_story"))
    assert len(behind) == len(before) == 2
    assert {each.text for each in (*behind, *before)} == {"story 0"}
    assert behind[1].turns[0].startswith("A story.")
    assert before[1].turns[0].endswith("A story.")
    assert "What 2?" in behind[1].turns[0]
    assert behind[0].references == ("A ship.", "A boat.")
    with pytest.raises(ValueError, match=r"translation needs wmt22_en-de\.jsonl or wmt22_en-de\.jsonl\.gz in "):
        find("translation", tmp_path)
    (tmp_path / "wmt22_en-de.jsonl").write_text('{"line": 1, "src": "Yes"}')
    with pytest.raises(ValueError, match=r"not as translation has it \(KeyError\('ref_A'\)\)"):
        arrivals("translation", tmp_path)
    assert prompt_of(first.turns, ["Hi."], chat=True) == (
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And then?"},
    )
    assert prompt_of(first.turns, [], chat=False) == "Hello?\n\n"


def test_methods() -> None:
    found = methods_of("random, default,similar:first_tokens=4:score=random:ratio=0.05:rotate=0,default")
    assert [method.name for method in found[:2]] == ["full", "default"]
    assert found[-1].name == "random"
    assert found[2].options == {
        "min_gain": 0.0,
        "first_tokens": 4,
        "score": "random",
        "ratio": 0.05,
        "rotate": False,
    }
    for nothing in ("", " , "):
        with pytest.raises(ValueError, match="names separated by commas"):
            methods_of(nothing)
    with pytest.raises(ValueError, match="random computes as much as default; ask for that one, too"):
        methods_of("random")
    with pytest.raises(ValueError, match=r"methods are full, prefix, .* got 'first-5'"):
        method_of("first-5")
    with pytest.raises(ValueError, match=r"got 'default:ratio=0\.1'"):
        method_of("default:ratio=0.1")
    with pytest.raises(TypeError, match="unknown reuse option 'ration'"):
        method_of("similar:ration=0.1")
    assert all(name == method.name for name, method in METHODS.items())


def test_methods_say_all_that_they_are() -> None:
    """Defaults of the library included: a run that goes on after these have changed would mix two methods."""
    for name in ("default", "value", "prefix"):
        found = METHODS[name].settings()
        assert {**found, **METHODS[name].options} == found
        assert found.keys() >= {field.name for field in dataclasses.fields(ReuseOptions)}
    assert METHODS["fuzzy"].settings()["fuzzy_options"]["monotone"]
    assert not METHODS["semshare"].settings()["fuzzy_options"]["monotone"]
    assert METHODS["answer-cache"].settings() == {"min_similarity": MIN_SIMILARITY}
    assert json.loads(json.dumps(METHODS["semshare"].settings())) == METHODS["semshare"].settings()


def test_published_methods_compute_what_they_say_and_nothing_more() -> None:
    for method in METHODS.values():
        if method.reuse == "similar" and method.name != "default":
            options = make_reuse_options(method.options)
            assert options.last_tokens == 0
            assert options.after_new == options.first_tokens
    assert [make_reuse_options(METHODS[f"first-{count}"].options).first_tokens for count in (4, 16)] == [4, 16]


# Figures


def test_compare_is_kl_and_greedy_agreement() -> None:
    generator = torch.Generator().manual_seed(0)
    full_LV, other_LV = (torch.randn(5, 11, generator=generator) for _ in range(2))
    tokens = full_LV.argmax(-1).tolist()
    kl, agreement, first = compare(full_LV, other_LV, tokens)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (full_LV, other_LV))
    want = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert kl == pytest.approx(want.tolist())
    same = other_LV.argmax(-1) == torch.tensor(tokens)
    assert agreement == pytest.approx(float(same.double().mean()))
    assert first == (same.tolist().index(False) if not same.all() else 5)
    assert compare(full_LV, full_LV.clone(), tokens) == ([0.0] * 5, 1.0, 5)
    swapped_LV = full_LV.clone()
    swapped_LV[2] = -swapped_LV[2]
    assert compare(full_LV, swapped_LV, tokens)[1:] == (0.8, 2)
    # What a method is surprised by counts, not what full reading would be.
    sure_LV, unsure_LV = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert compare(unsure_LV, sure_LV, [0]).kl[0] > 3 > compare(sure_LV, unsure_LV, [0]).kl[0]
    assert same_tokens([1, 2, 3, 4], [1, 2, 9, 4, 5]) == 2
    assert same_tokens([1, 2], [1]) == 1
    assert same_tokens([1, 2], [1, 2, 3]) == 2


def test_text_measures() -> None:
    assert rouge_l("", [""]) == rouge_l("Das ist es.", ["x", "Das ist es."]) == 1.0
    assert rouge_l("", ["something"]) == 0.0
    assert rouge_l("the boat sank", ["the boat sailed", "a train"]) == pytest.approx(2 / 3)
    assert chrf("", [""]) == chrf("Das ist es.", ["x", "Das ist es."]) == 1.0
    assert chrf("x", ["something"]) == 0.0
    # What a stemmer for English takes for another word is nearly the same one.
    # What is one word more or less to words is hardly another one to letters.
    assert chrf("die H\u00e4user", ["x", "die H\u00e4usern"]) > 0.7 > rouge_l("die H\u00e4user", ["die H\u00e4usern"])
    said = ["the old boat sank in the cold sea", "nobody was there to see it"]
    assert bleu(said, [[each] for each in said]) == pytest.approx(1.0)
    assert bleu(["yes", "no"], [["yes"], ["no"]]) == pytest.approx(1.0), "fewer than four words"
    assert bleu(said, [["x", each] for each in said]) == pytest.approx(1.0)
    assert bleu(said, [["entirely other words stand here"]] * 2) < 0.1


def test_as_many_at_random() -> None:
    row = {"context_tokens": 1000, "prefix_tokens": 100, "kept_tokens": 200, "moved_tokens": 500}
    assert rows.ratio_like({**row, "computed_share": 0.2}) == 0.0
    assert rows.ratio_like({**row, "computed_share": 0.55}) == pytest.approx(0.5)
    assert rows.ratio_like({**row, "computed_share": 1.0}) == 1.0
    nothing = {**row, "kept_tokens": 0, "moved_tokens": 0}
    assert rows.ratio_like({**nothing, "computed_share": 0.9}) == 1.0


def made_row(name: str, policy: str, **changes: object) -> dict:
    """As a reading by a method leaves it."""
    place = {"task": "t", "id": name, "length": 9, "metric": "agreement", "answers": [], "extra": {"share": 0.5}}
    figures = {"kl": [0.0, 0.2], "agreement": 1.0, "first_divergence": 2, "generated_tokens": 2, "score": 1.0}
    figures |= {"kind": "similar", "reused_share": 0.5, "computed_share": 0.5, "found_share": 0.5}
    figures |= {"seconds_to_first_token": 1.0, "full_seconds": 4.0, "context_tokens": 10}
    if policy not in ("full", "answer-cache"):
        figures |= {"caching_seconds": 1.0, "donor_caching_seconds": 3.0, "cached_bytes": 8, "edit_bytes": 2}
    return rows.row({"text": name, **place}, policy, {**figures, **changes})


def cells_of(*some: dict) -> dict[str, dict]:
    """Of all rows together, by method."""
    return {cell["method"]: cell for cell in summarise(some) if cell["group"] == "all"}


def printed(cells: list[dict]) -> str:
    console = Console(file=io.StringIO(), width=400)
    for table in tables(cells):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_summary() -> None:
    nothing = {"kind": "none", "reused_share": 0.0, "found_share": 0.0, "seconds_to_first_token": 4.0}
    full = [made_row(n, "full", kl=[0.0] * 2, seconds_again=5.0, **nothing) for n in "ab"]
    default = [made_row("a", "default"), made_row("b", "default", kl=[0.4, 1.0], reused_share=0.9)]
    half = {"agreement": 0.5, "first_divergence": 1, "score": 0.5}
    naive = [made_row("a", "naive", **half), made_row("b", "naive", **half, kind="none", seconds_to_first_token=2.0)]
    naive.append(rows.failed(made_row("c", "x"), "naive", MemoryError("no")))
    cells = cells_of(*full, *default, *naive)
    cell = cells["default"]
    assert (cell["group"], cell["count"], cell["failed"], cell["texts"]) == ("all", 2, 0, 2)
    assert cell["kl_mean"] == pytest.approx(0.4)
    assert cell["kl_max"] == 1.0
    assert cell["kl_first"] == pytest.approx(0.2)
    assert cell["kl_p95"] == pytest.approx(np.quantile([0.0, 0.2, 0.4, 1.0], 0.95))
    assert cell["reused_share_quantiles"] == pytest.approx([0.5 + 0.4 * quantile for quantile in QUANTILES])
    assert cell["kinds"] == {"similar": 2}
    assert cell["times_faster"] == {"mean": 4.0, "low": 4.0, "high": 4.0}
    assert cells["full"]["times_faster"]["mean"] == pytest.approx(4 / 5), "its second reading was slower"
    other = cells["naive"]
    assert (other["count"], other["failed"], other["fired"], other["identical"]) == (2, 1, 0.5, 0.0)
    assert other["times_faster"]["mean"] == pytest.approx(8 / 3)
    assert other["times_faster"]["low"] == pytest.approx(2)
    assert other["default_better"]["agreement"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert other["default_better"]["before_divergence"]["mean"] == 0.5
    assert other["more_than_full"]["mean"] == -0.5
    grouped = summarise([*default, made_row("c", "default") | {"extra": {"share": 0.1, "edited": 0.07}}])
    assert [(cell["group"], cell["value"], cell["count"]) for cell in grouped] == [
        ("all", None, 3),
        ("share", 0.1, 1),
        ("share", 0.5, 2),
    ]
    assert len(tables(grouped)) == 3
    assert "0.1, 7% edited (1 prompt, 1 text)" in printed(grouped)
    assert summarise([naive[-1]])[0]["count"] == 0
    assert tables(summarise([naive[-1]])) == []


def test_better_has_one_sign() -> None:
    """Less KL is better, and each prompt counts alike, however long its answer is."""
    default = [made_row("a", "default", kl=[0.1]), made_row("b", "default", kl=[0.1] * 3)]
    worse = [made_row("a", "naive", kl=[0.5]), made_row("b", "naive", kl=[0.3] * 3)]
    cell = cells_of(*default, *worse)["naive"]
    assert cell["kl_mean"] == pytest.approx(0.4)
    assert cell["default_better"]["kl"]["mean"] == pytest.approx(0.3) == pytest.approx(cell["kl_mean"] - 0.1)


def test_intervals_are_over_texts() -> None:
    """A hundred prompts of one text say nothing of other texts; of two texts, as much as two prompts."""
    full = [made_row(f"{n}", "full", seconds_again=4.0, text="one") for n in range(100)]
    other = [made_row(f"{n}", "prefix", score=n % 2, text="one") for n in range(100)]
    found = cells_of(*full, *other)["prefix"]
    assert found["texts"] == 1
    assert found["more_than_full"] == {"mean": -0.5, "low": None, "high": None}
    assert found["times_faster"]["low"] is None
    for row in (*full, *other):
        row["text"] = "even" if int(row["id"]) % 2 == 0 else "odd"
    assert cells_of(*full, *other)["prefix"]["more_than_full"] == {"mean": -0.5, "low": -1.0, "high": 0.0}
    assert "-50.0 [-100.0, +0.0]" not in printed(summarise(full + other)), "agreement has no column of its score"


def test_what_a_method_does_not_have_is_not_averaged() -> None:
    """Of a stored answer there are no distributions: the KL of its other prompts is no method's."""
    full = [made_row(n, "full", kl=[0.0] * 2) for n in "ab"]
    missed = made_row("a", "answer-cache", kl=[0.0, 0.0], kind="none")
    answered = made_row("b", "answer-cache", kl=None, agreement=None, score=0.5, kind="answer")
    cell = cells_of(*full, made_row("a", "default"), made_row("b", "default"), missed, answered)["answer-cache"]
    assert cell["kl_mean"] is cell["kl_p95"] is cell["kl_max"] is cell["kl_first"] is cell["agreement"] is None
    assert cell["score"] is cell["default_better"]["kl"] is cell["default_better"]["agreement"] is None
    assert cell["before_divergence"] == 1.0
    assert cell["caching_seconds"] is cell["most_cached_bytes"] is cell["break_even_uses"] is None
    assert cells_of(*full, missed)["answer-cache"]["kl_mean"] == 0.0


def test_what_caching_costs() -> None:
    """Each use saves 3 s of reading and spends 1 s on caching the new prompt; the donor took 3 s."""
    full = [made_row("a", "full"), made_row("b", "full")]
    both = [made_row("a", "default"), made_row("b", "default")]
    cell = cells_of(*full, *both)["default"]
    assert cell["break_even_uses"] == pytest.approx(3 / 2)
    assert cell["saved_seconds"] is None
    assert cells_of(*full)["full"]["break_even_uses"] is None
    slow = [made_row("a", "default", caching_seconds=3.5), made_row("b", "default", caching_seconds=3.5)]
    assert cells_of(*full, *slow)["default"]["break_even_uses"] is None, "it never pays"
    idle = [row | {"kind": "none"} for row in both]
    assert cells_of(*full, *idle)["default"]["break_even_uses"] is None, "what was not reused saved nothing"
    arrived = [row | {"donor_caching_seconds": None} for row in both]
    arrived[0] |= {"cached_bytes": 20, "evicted": 2}
    cell = cells_of(*full, *arrived)["default"]
    assert (cell["break_even_uses"], cell["saved_seconds"]) == (None, pytest.approx(2 * (4 - 1 - 1)))
    assert (cell["most_cached_bytes"], cell["evicted"]) == (20, 2)
    assert "saved in all" in printed([cell])
    assert "pays after" not in printed([cell])


def test_full_reading_is_timed_before_and_after() -> None:
    both = [made_row("a", "full"), made_row("a", "default")]
    full, default = rows.timed(both, 2.0, 4.0)
    assert (full["full_seconds"], full["seconds_again"], default["full_seconds"]) == (3.0, 4.0, 3.0)
    assert "seconds_again" not in default
    assert [row["full_seconds"] for row in rows.timed(both, 2.0, None)] == [2.0, 2.0]


def test_tasks_measured_otherwise_are_not_averaged() -> None:
    answered = {"prediction": "so it was", "full_prediction": "so it was", "reference_score": 0.5}
    story = made_row("a", "full", **answered) | {"metric": "rouge_l", "answers": ["so it is"] * 4}
    german = made_row("b", "full", **answered) | {"metric": "chrf", "answers": ["so war es"] * 2, "task": "u"}
    cells = summarise([story, german])
    whole, *by_task = cells
    assert whole["score"] is whole["bleu"] is whole["reference_bleu"] is whole["reference_score"] is None
    assert [cell["bleu"] for cell in by_task] == [pytest.approx(1.0)] * 2
    assert all(cell["reference_bleu"] is not None for cell in by_task)
    said = printed(cells)
    assert "ROUGE-L to references" in said
    assert "chrF to references" in said


# Reading


def test_readings_of_one_prompt(reader: Reader, source: Source) -> None:
    (pair,) = moved(source, tokens=TOKENS, share=0.6, cases=1)
    donor, prompt = reader.encode(pair.donor), reader.encode(pair.prompt)
    added = reader.add(donor, "pair", 3)
    assert added.answer is not None
    assert len(added.answer.token_ids) <= 3
    full = reader.full(prompt, 8)
    assert full.logits_LV.argmax(-1).tolist() == full.answer.token_ids
    before = reader.cached_bytes("pair")
    kl = {}
    for name in ("naive", "rotation", "first-16", "similar:first_tokens=4096", "similar:first_tokens=0:ratio=1.0"):
        read = reader.read(prompt, "pair", method_of(name), full, max_new_tokens=8)
        assert read.reuse.kind == "similar"
        assert read.reuse.approximate
        found = rows.read_figures(read, full)
        kl[name] = float(np.mean(found["kl"]))
        assert (found["prediction"] == full.answer.text) or found["first_divergence"] < 8
        assert found["reused_share"] + read.reuse.computed_tokens / len(prompt.token_ids) == pytest.approx(1)
        assert reader.cached_bytes("pair") > before
        reader.forget(prompt, "pair")
        assert reader.cached_bytes("pair") == before, "what one method leaves is not there for the next"
    assert kl["naive"] > kl["rotation"] > kl["first-16"]
    assert kl["similar:first_tokens=4096"] < 1e-8
    assert kl["similar:first_tokens=0:ratio=1.0"] < 1e-8
    exact = reader.read(prompt, "pair", METHODS["prefix"], full)
    assert exact.reuse.kind in ("none", "prefix")
    assert not exact.reuse.approximate
    same = reader.read(donor, "pair", METHODS["default"], own := reader.full(donor, 8))
    assert same.reuse.kind == "same"
    assert rows.read_figures(same, own)["kl"] == [0.0] * len(own.answer.token_ids)
    reader.clear("pair")
    assert reader.cached_bytes("pair") == 0


def test_the_reader_says_what_the_library_says(lm: LongContextLM, reader: Reader, source: Source) -> None:
    """Readings under a method are those of `LongContextLM` with its settings."""
    (pair,) = moved(source, tokens=TOKENS, share=0.6, cases=1, seed=2)
    method = METHODS["first-4"]
    own = lm.with_config(policy="full", reuse="similar", reuse_options=method.options)
    own.generate(pair.donor, max_new_tokens=1)
    want = own.generate(pair.prompt, max_new_tokens=8)
    own.close()
    assert want.reuse is not None
    prompt = reader.encode(pair.prompt)
    reader.add(reader.encode(pair.donor), "pair")
    full = reader.full(prompt, 8)
    read = reader.read(prompt, "pair", method, full, max_new_tokens=8)
    assert read.answer is not None
    assert read.answer.token_ids == want.token_ids
    assert read.answer.text == want.text
    for name in ("kind", "moved_tokens", "recomputed_tokens", "new_tokens", "computed_by_layer"):
        assert getattr(read.reuse, name) == getattr(want.reuse, name)
    assert full.answer.token_ids == lm.with_config(policy="full").generate(pair.prompt, max_new_tokens=8).token_ids


def test_too_long_is_known_before(reader: Reader) -> None:
    with pytest.raises(TooLongError, match=r"\d+ tokens, and the model has 40960 positions"):
        reader.check_length(reader.encode("Hello."), 40_960)


def test_the_answer_cache(reader: Reader) -> None:
    near, other = (reader.encode(text) for text in ("The boat is old and red. " * 4, "7 7 7 7 " * 8))
    full = reader.full(near, 2)
    stored = [
        rows.Stored(reader.embedding(other), Answer([5], "wrong")),
        rows.Stored(reader.embedding(near), Answer([*full.answer.token_ids[:1], 5], "right")),
    ]
    found = rows.answered_figures(reader, full, near, stored, near)
    assert (found["prediction"], found["kind"]) == ("right", "answer")
    assert found["kl"] is found["agreement"] is None, "it has no choices of its own after others' tokens"
    assert found["first_divergence"] == 1
    assert found["seconds_to_first_token"] < full.seconds
    for known in ([], stored[:1]):
        missed = rows.answered_figures(reader, full, near, known, near)
        assert (missed["prediction"], missed["kind"]) == (full.answer.text, "none")
        assert missed["seconds_to_first_token"] > full.seconds
    # What is asked counts, not all that was said before: neither is found by the other's embedding.
    assert rows.answered_figures(reader, full, near, stored[1:], other)["kind"] == "none"


# Runs


def test_a_run_goes_on_and_has_a_page(
    reader: Reader, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = methods_of("full,rotation,default,random,answer-cache")
    pairs = [dataclasses.replace(pair, max_new_tokens=4) for pair in moved(source, tokens=200, share=0.8, cases=2)]
    settings = {"suite": "trial", "policies": [method.name for method in methods]}
    out = RunFolder(tmp_path / "run", settings, {})
    run(reader, methods, pairs, out)
    whole = rows_of(tmp_path / "run")
    assert len(whole) == 10
    by = {(row["id"], row["policy"]): row for row in whole}
    for name in ("0-0", "0-1"):
        like, drawn = by[name, "default"], by[name, "random"]
        # The last token is computed in any case, drawn or not.
        assert abs(drawn["recomputed_tokens"] - like["recomputed_tokens"]) <= 1
        assert drawn["computed_by_layer"][0] == drawn["new_tokens"] + drawn["recomputed_tokens"]
        assert by[name, "full"]["agreement"] == by[name, "full"]["score"] == 1.0
        assert by[name, "rotation"]["kind"] == "similar"
        once, again = (by[name, "full"][each] for each in ("seconds_to_first_token", "seconds_again"))
        assert {by[name, each.name]["full_seconds"] for each in methods} == {(once + again) / 2}
        assert by[name, "rotation"]["cached_bytes"] > by[name, "rotation"]["edit_bytes"] > 0
        assert 0 < by[name, "rotation"]["caching_seconds"] != by[name, "rotation"]["donor_caching_seconds"] > 0
        for free in ("full", "answer-cache"):
            assert not {"caching_seconds", "donor_caching_seconds", "cached_bytes"} & by[name, free].keys()
    # The last row of the first prompt is missing, and all of the second but the first.
    lines = (tmp_path / "run" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "rows.jsonl").write_text("".join([*lines[:4], lines[5]]) + lines[6][:30])
    read = []
    original = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, *args, **more: (read.append(args[1:3]), original(self, *args, **more))[1]
    )
    out = RunFolder(tmp_path / "run", settings, {})
    run(reader, methods, pairs, out)
    names = [method.name for namespace, method in read if namespace == "pair"]
    assert names == ["random", "rotation", "default", "random"], "only what is not there is read again"
    warm = [method.name for namespace, method in read if namespace != "pair"]
    assert warm == ["rotation", "default", "random"], "every method once"
    figures = ("id", "policy", "kl", "prediction", "computed_share")
    again = rows_of(tmp_path / "run")
    assert sorted([row[name] for name in figures[:2]] for row in again) == sorted([*key] for key in by)
    for row in again:
        was = by[row["id"], row["policy"]]
        assert [row[name] for name in figures[3:]] == [was[name] for name in figures[3:]]
    out.finish(summarise(out.rows))
    page, *_ = render(tmp_path / "run", tmp_path / "page.html")
    assert "random" in page.read_text()
    assert wrong_answers(out.rows) == [], "going on otherwise is no wrong answer"


def test_what_does_not_fit_is_a_row(
    reader: Reader, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method is tried on its own; but one that is to be like another needs that."""
    fits, long = (dataclasses.replace(pair, max_new_tokens=2) for pair in moved(source, tokens=100, share=0.6, cases=2))
    long = dataclasses.replace(long, id="long", prompt="word " * 41_000)
    original = Reader.read

    def fails(self: Reader, prompt: object, namespace: str, method: Method, *args: object, **more: object) -> object:
        if method.name == "default":
            raise MemoryError("too little")
        return original(self, prompt, namespace, method, *args, **more)

    monkeypatch.setattr(Reader, "read", fails)
    methods = methods_of("full,default,rotation,random")
    out = RunFolder(tmp_path, {}, {})
    run(reader, methods, [fits, long], out)
    status = {(row["id"], row["policy"]): row["status"] for row in out.rows}
    assert status == {
        ("0-0", "full"): "ok",
        ("0-0", "default"): "out_of_memory",
        ("0-0", "rotation"): "ok",
        ("0-0", "random"): "out_of_memory",
        **{("long", method.name): "too_long" for method in methods},
    }
    monkeypatch.setattr(Reader, "read", original)
    out = RunFolder(tmp_path, {}, {})
    run(reader, methods, [fits, long], out)
    assert {row["status"] for row in out.rows if row["id"] == "0-0"} == {"ok"}, "memory may be there by now"


def test_a_donor_that_is_not_cached_is_no_perfect_score(reader: Reader, source: Source, tmp_path: Path) -> None:
    """Of a prompt that is too short for the cache nothing is reused, and all would agree with full reading."""
    (pair,) = moved(source, tokens=TOKENS, share=0.6, cases=1)
    short = dataclasses.replace(pair, donor="Too short to be cached.", max_new_tokens=2)
    out = RunFolder(tmp_path, {}, {})
    run(reader, methods_of("full,default,answer-cache"), [short], out)
    assert [row["status"] for row in out.rows] == ["ok", "out_of_memory", "out_of_memory"]
    assert out.rows[1]["error"] == "there is no room to cache the donor"


def test_a_donor_that_left_is_cached_again(
    reader: Reader, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair,) = moved(source, tokens=TOKENS, share=0.6, cases=1)
    pair = dataclasses.replace(pair, max_new_tokens=2)
    donor, original = reader.encode(pair.donor), Reader.forget

    def forgets_all(self: Reader, prompt: object, namespace: str) -> None:
        original(self, prompt, namespace)
        if namespace == "pair":
            original(self, donor, namespace)

    monkeypatch.setattr(Reader, "forget", forgets_all)
    out = RunFolder(tmp_path, {}, {})
    run(reader, methods_of("full,naive,rotation"), [pair], out)
    assert [row["kind"] for row in out.rows] == ["none", "similar", "similar"]


def test_arrivals_in_order(reader: Reader, tmp_path: Path, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = [
        Arrival(task="chat", id="a", text="a", turns=(prose[:700], "Why is that?")),
        Arrival(task="chat", id="b", text="b", turns=(prose[:700],), references=("not mentioned",)),
    ]
    methods = methods_of("full,prefix,default,answer-cache")
    out = RunFolder(tmp_path, {}, {})
    stored = []
    monkeypatch.setattr(arrive, "Stored", lambda *of: stored.append(of) or rows.Stored(*of))
    arrive.run(reader, methods, coming, out, max_new_tokens=4, chat=True)
    assert len(stored) == 2, "what is answered from the cache is not read, and has no answer of its own to store"
    by = {(row["id"], row["policy"]): row for row in out.rows}
    assert len(out.rows) == len(by) == 12
    assert [by[name, "default"]["kind"] for name in ("a-1", "a-2", "b")] == ["none", "prefix", "same"]
    assert by["b", "default"]["kl"] == [0.0] * len(by["b", "default"]["kl"])
    assert by["b", "answer-cache"]["prediction"] == by["a-1", "full"]["prediction"]
    assert [by[name, "answer-cache"]["kind"] for name in ("a-1", "a-2", "b")] == ["none", "none", "answer"]
    assert [by[name, "default"]["evicted"] for name in ("a-1", "a-2", "b")] == [0, 0, 0]
    assert {row["text"] for row in out.rows} == {"a", "b"}
    assert all(row["score"] == 1.0 for row in out.rows if row["policy"] != "answer-cache")
    assert by["b", "full"]["reference_score"] == rouge_l(by["b", "full"]["prediction"], ["not mentioned"])
    assert by["a-1", "full"]["reference_score"] is None
    assert by["a-2", "prefix"]["context_tokens"] > by["a-1", "prefix"]["context_tokens"] + 4
    # Half-way stopped, it is read again from its beginning, so that caches are as they were.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-2]))
    out = RunFolder(tmp_path, {}, {})
    arrive.run(reader, methods, coming, out, max_new_tokens=4, chat=True)
    again = {(row["id"], row["policy"]): row for row in out.rows}
    assert again.keys() == by.keys()
    assert again["b", "default"]["kind"] == "same"
    monkeypatch.setattr(Reader, "full", None)
    arrive.run(reader, methods, coming, RunFolder(tmp_path, {}, {}), max_new_tokens=4, chat=True)
    cell = next(cell for cell in summarise(out.rows) if cell["method"] == "default")
    assert cell["kinds"] == {"none": 1, "prefix": 1, "same": 1}
    assert cell["reused_share_quantiles"][0] == 0.0
    assert cell["reused_share_quantiles"][-1] == 1.0
    assert cell["bleu"] == pytest.approx(1.0)


def test_what_a_method_fails_on_is_in_no_cache(
    reader: Reader, tmp_path: Path, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what comes later would be compared with other caches behind it."""
    original = Reader.read
    failures = [MemoryError("too little")]

    def fails(self: Reader, prompt: object, namespace: str, method: Method, *args: object, **more: object) -> object:
        if namespace == "chat: prefix" and failures:
            raise failures.pop()
        return original(self, prompt, namespace, method, *args, **more)

    monkeypatch.setattr(Reader, "read", fails)
    coming = [Arrival(task="chat", id=name, text=name, turns=(prose[:700],)) for name in "ab"]
    out = RunFolder(tmp_path, {}, {})
    arrive.run(reader, methods_of("full,prefix,default,answer-cache"), coming, out, max_new_tokens=2, chat=False)
    status = {(row["id"], row["policy"]): row["status"] for row in out.rows}
    assert [name for name, each in status.items() if each != "ok"] == [("a", "prefix")]
    assert {row["kind"] for row in out.rows if row["id"] == "b"} == {"none"}


def test_what_leaves_for_want_of_room_is_counted(lm: LongContextLM, tmp_path: Path, prose: str) -> None:
    """The bound is of all methods together, so that it may be another's prompt that leaves."""
    measured = Reader(lm)
    measured.add(measured.encode(prose[:700]), "one")
    room = int(1.5 * measured.cached_bytes("one"))
    measured.close()
    reader = Reader(lm.with_config(reuse_bytes=room))
    coming = [Arrival(task="chat", id=f"{at}", text=f"{at}", turns=(prose[at : at + 700],)) for at in (0, 2000, 4000)]
    out = RunFolder(tmp_path, {}, {})
    arrive.run(reader, methods_of("full,default"), coming, out, max_new_tokens=2, chat=False)
    reader.close()
    assert [row["evicted"] for row in out.rows if row["policy"] == "default"] == [0, 1, 1]


def test_the_command(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All parts with a tiny model that has no chat template."""
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(generate_prose(1500, seed=4))
    options = {"text": [tmp_path / "text.txt"], "tokens": 160, "cases": 1, "facts": 2, "shares": "0.2"}
    options |= {"methods": "default", "places": "middle", "kinds": "reorder"}
    options |= {"model": str(tmp_path / "model")}
    main(part="moved,edits,facts,controls", out=tmp_path / "runs", **options, **CPU)
    tasks = {
        part: {row["task"] for row in rows_of(tmp_path / "runs" / part)} for part in ("edits", "facts", "controls")
    }
    assert tasks["edits"] == {"reorder"}
    assert tasks["facts"] == {"fact", "all_facts", "fact_after_other_question"}
    assert tasks["controls"] == {"wrong_donor", "random_donor"}
    wrong = [row for row in rows_of(tmp_path / "runs" / "controls") if row["policy"] == "default"]
    assert all(row["kind"] == "none" and row["reason"] and row["kl"] == [0.0] * len(row["kl"]) for row in wrong)
    config = json.loads((tmp_path / "runs" / "moved" / "config.json").read_text())
    assert (config["suite"], config["policies"]) == ("reuse-moved", ["full", "default"])
    assert config["methods"]["default"] == METHODS["default"].settings()
    said = capsys.readouterr().out
    assert "What reuse changes" in said
    assert "donor's 0" in said
    assert json.loads((tmp_path / "runs" / "facts" / "summary.json").read_text())[0]["method"] == "full"


def test_quick_sets_what_was_not_given(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "methods": "full", "quick": True, **CPU}
    main(part="edits", tokens=170, shares="0.3", kinds="reorder", out=tmp_path / "run", **asked)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    given = {name: config[name] for name in ("tokens", "shares", "places", "cases", "facts")}
    assert given == {"tokens": 170, "shares": [0.3], "places": ["middle", "end"], "cases": 1, "facts": 2}
    # A run in which nothing can be answered says so, and has no tables of nothing.
    capsys.readouterr()
    main(part="moved", tokens=4200, out=tmp_path / "long", **asked)
    said = capsys.readouterr().out
    assert said.startswith("1 of 1 rows have no answer; the first: too_long, ")
    assert "What it costs" not in said


def test_a_run_of_other_options_is_not_gone_on_with(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the methods' names are the same."""
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "methods": "rotation", "tokens": 160, "cases": 1, **CPU}
    main(part="moved", out=tmp_path / "run", **asked)
    changed = dataclasses.replace(METHODS["rotation"], options={**METHODS["rotation"].options, "last_tokens": 9})
    monkeypatch.setitem(METHODS, "rotation", changed)
    with pytest.raises(typer.BadParameter, match=r"holds a run of other settings \(methods: "):
        main(part="moved", out=tmp_path / "run", **asked)


def test_what_is_wrong_is_said_in_a_sentence(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Before a model is loaded, where it can be known."""
    for options, match in (
        ({"part": "moving"}, "parts are of moved, edits"),
        ({"part": "moved", "methods": "nothing"}, "methods are full"),
        ({"part": "moved", "methods": ","}, "methods are names separated by commas"),
        ({"part": "moved", "methods": ""}, "methods are names separated by commas"),
        ({"part": "moved", "methods": "similar:ration=1"}, "unknown reuse option"),
        ({"part": "edits", "shares": "0.5,x"}, "numbers separated by commas"),
        ({"part": "edits", "shares": "0.5,1"}, "above 0 and below 1"),
        ({"part": "edits", "kinds": "all"}, "kinds are of entity"),
        ({"part": "arrivals"}, "arrivals need --data"),
        ({"part": "arrivals", "data": tmp_path}, r"chat needs mt_bench_question\.jsonl"),
    ):
        with pytest.raises(typer.BadParameter, match=match):
            main(model="nowhere", **options)
    (tmp_path / "mt_bench_question.jsonl").write_text("{}")
    with pytest.raises(typer.BadParameter, match="have a cache for each method"):
        main(model="nowhere", part="arrivals", data=tmp_path, methods="default,random")
    with pytest.raises(typer.BadParameter, match="is not as chat has it"):
        main(part="arrivals", data=tmp_path, out=tmp_path / "run", **CPU)
    (tmp_path / "text.txt").write_text("Short.")
    with pytest.raises(typer.BadParameter, match="give a longer one"):
        main(part="moved", text=[tmp_path / "text.txt"], out=tmp_path / "run", **CPU)
    sliding = make_model("qwen2")
    sliding.save_pretrained(tmp_path / "sliding")
    tokenizer.save_pretrained(tmp_path / "sliding")
    with pytest.raises(typer.BadParameter, match="has sliding-window layers"):
        main(model=str(tmp_path / "sliding"), out=tmp_path / "run", **CPU)
    assert not (tmp_path / "run").exists()


def test_rouge_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"ROUGE-L needs rouge-score: pip install 'sentencekv\[eval\]'"):
        measures.rouge_l("a", ["b"])
    with pytest.raises(ImportError, match=r"chrF needs sacrebleu: pip install 'sentencekv\[eval\]'"):
        measures.chrf("a", ["b"])
    with pytest.raises(ImportError, match=r"BLEU needs sacrebleu: pip install 'sentencekv\[eval\]'"):
        measures.bleu(["a"], [["b"]])
