"""The demonstration's text, questions and judgement; what it shows is in test_cli."""

import dataclasses

import pytest
from transformers import PreTrainedTokenizerFast

from sentencekv import LongContextLM
from sentencekv.demo import ask_all, build_text, summarize
from sentencekv.needles import sentence_ends
from tests.conftest import make_model


@pytest.fixture(scope="module")
def lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return LongContextLM.from_model(make_model("llama"), tokenizer, budget_tokens=128)


def num_tokens(lm: LongContextLM, text: str) -> int:
    return len(lm.tokenizer(text)["input_ids"])


def test_generated_text(lm: LongContextLM) -> None:
    demo = build_text(lm, tokens=1500, num_facts=5, seed=0)
    assert demo.num_tokens == num_tokens(lm, demo.text) >= 1500
    assert demo.num_tokens < 1500 + 5 * 80 + 100
    assert demo.cut_at is None
    for fact, (start, end) in zip(demo.facts, demo.spans, strict=True):
        assert demo.text[start:end] == fact.sentence
        assert fact.answer in fact.sentence
    assert demo == build_text(lm, tokens=1500, num_facts=5, seed=0)
    assert demo.text != build_text(lm, tokens=1500, num_facts=5, seed=1).text


def test_short_user_text_is_used_whole(lm: LongContextLM) -> None:
    own = "The cat sat on the mat. The dog looked on. Nobody spoke of it again.\n"
    demo = build_text(lm, tokens=1500, num_facts=2, seed=0, user_text=own)
    assert demo.cut_at is None
    without = demo.text
    for start, end in sorted(demo.spans, reverse=True):
        without = without[: start - 1] + without[end:]
    assert without == own


def test_long_user_text_is_cut_at_a_sentence_end(lm: LongContextLM, prose: str) -> None:
    demo = build_text(lm, tokens=500, num_facts=1, seed=0, user_text=prose)
    assert demo.cut_at is not None
    kept = round(demo.cut_at * len(prose))
    assert kept in sentence_ends(prose)
    assert num_tokens(lm, prose[:kept]) >= 500
    assert num_tokens(lm, prose[: kept - 400]) < 500


def test_text_without_sentences_is_cut_anyway(lm: LongContextLM) -> None:
    demo = build_text(lm, tokens=300, num_facts=1, seed=0, user_text="字" * 5000)
    assert demo.cut_at is not None
    assert 300 <= demo.num_tokens < 400


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, r"--tokens must be at least 1, got 0"),
        ({"num_facts": 0}, r"--facts must be at least 1, got 0"),
        ({"tokens": 4000}, r"'this one' has positions for 4,096 tokens; use --tokens 3920"),
        ({"tokens": 3900, "num_facts": 6}, r"positions for 4,096 tokens; use --tokens 3\d\d\d,"),
        ({"tokens": 100, "num_facts": 300}, r"use fewer --facts"),
    ],
)
def test_bad_numbers(lm: LongContextLM, given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_text(lm, **{"tokens": 500, "num_facts": 2, "seed": 0, "name": "this one", **given})


def test_verdicts_and_summary(lm: LongContextLM) -> None:
    demo = build_text(lm, tokens=800, num_facts=2, seed=0)
    with lm.read(demo.text) as document:
        verdicts = list(ask_all(document, demo))
    assert [verdict.fact for verdict in verdicts] == list(demo.facts)
    assert not any(verdict.right for verdict in verdicts), "a random model cannot know"
    for verdict in verdicts:
        marked = [source for source in verdict.generation.sources if verdict.is_the_fact(source)]
        for source in marked:
            shared = demo.text[max(source.start, verdict.span[0]) : min(source.end, verdict.span[1])]
            assert shared
            assert shared in verdict.fact.sentence
        assert len(marked) < len(verdict.generation.sources)
    summary = summarize([dataclasses.replace(verdicts[0], right=True), verdicts[1]])
    assert (summary.num_right, summary.num_facts) == (1, 2)
    assert summary.kv_dense_bytes == max(verdict.generation.stats.kv_dense_bytes for verdict in verdicts)
    assert summary.seconds_per_token is not None
    assert summary.hot_hit_rate is not None
    assert 0 <= summary.hot_hit_rate <= 1
