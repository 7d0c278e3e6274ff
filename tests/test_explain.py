"""What would be reused is what is reused: explanations beside the cache itself."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sentencekv import Config, LongContextLM
from sentencekv.explain import KINDS, Trial, as_dict, explain_texts, text_of, try_out
from sentencekv.prompts import encode
from sentencekv.prose import generate_prose
from sentencekv.reuse.decide import LEAST_SHARED_TOKENS, make_reuse_options
from tests.conftest import make_model

SENTENCES = [f"{each.strip()}. " for each in generate_prose(220, seed=7).split(".") if each.strip()]
DONOR = "".join(SENTENCES)
HALF = len(SENTENCES) // 2
PROMPTS = {
    "same": DONOR,
    "moved": "".join(SENTENCES[HALF:] + SENTENCES[:HALF]),
    "moved behind the beginning": "".join(SENTENCES[:6] + SENTENCES[HALF:] + SENTENCES[6:HALF]),
    "one word changed": "".join([*SENTENCES[:HALF], "The ferry was late. ", *SENTENCES[HALF + 1 :]]),
    "appended to": DONOR + "Nobody knew what to say.",
    "beginning": "".join(SENTENCES[:HALF]),
    "without the middle": "".join(SENTENCES[:8] + SENTENCES[-8:]),
    "unrelated": generate_prose(150, seed=8),
    "hardly related": generate_prose(150, seed=9) + "".join(SENTENCES[:5]),
    "new but for the beginning": "".join(SENTENCES[:HALF]) + generate_prose(60, seed=10) + "".join(SENTENCES[-2:]),
    "short": "He came.",
}
OPTIONS: list[dict[str, object]] = [
    {},
    {"last_tokens": 0},
    {"min_gain": 0.6},
    {"ratio": 0.2, "retention": 0.5},
    {"score": "random", "ratio": 0.3, "first_tokens": 0},
]


@pytest.fixture(scope="module")
def lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return LongContextLM.from_model(make_model("llama", num_hidden_layers=4), tokenizer, budget_tokens=128)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outcomes_are_those_of_the_cache(lm: LongContextLM, options: dict[str, object]) -> None:
    """Kind, counts, reason: what was foretold from tokens is what reading reports, under both modes."""
    kinds = set()
    for mode in ("exact", "similar"):
        caching = lm.with_config(reuse=mode, reuse_options=options)
        for name, text in PROMPTS.items():
            explanation = explain_texts(DONOR, text, lm.tokenizer, lm.model.config, make_reuse_options(options))
            foretold = explanation.exact if mode == "exact" else explanation.similar
            caching.read(DONOR, chat=False, namespace=name)
            reuse = caching.read(text, chat=False, namespace=name).reuse
            assert reuse is not None
            assert (foretold.kind, foretold.reason) == (reuse.kind, reuse.reason), name
            assert foretold.computed_tokens == reuse.computed_by_layer[0] == reuse.computed_tokens, name
            assert 0 <= foretold.cost_tokens <= foretold.computed_tokens
            if reuse.kind == "similar":
                found = as_dict(explanation)
                counted = dataclasses.asdict(reuse)
                shared = {key for key in found if key in counted and key != "donor"}
                assert shared >= {"moved_tokens", "kept_tokens", "prefix_tokens", "new_tokens", "prompt_tokens"}
                if not make_reuse_options(options).chooses:
                    assert {key: found[key] for key in shared} == {key: counted[key] for key in shared}, name
            kinds.add((mode, reuse.kind))
        caching.close()
    assert {("exact", "same"), ("exact", "prefix"), ("exact", "none"), ("similar", "similar")} <= kinds


def test_moving_too_little(lm: LongContextLM) -> None:
    text, options = PROMPTS["new but for the beginning"], make_reuse_options({"first_tokens": 16, "last_tokens": 0})
    explanation = explain_texts(DONOR, text, lm.tokenizer, lm.model.config, options)
    assert explanation.counts()["moved"] > 0
    assert explanation.exact.reason == ""
    assert explanation.similar == explanation.exact._replace(reason=explanation.similar.reason)
    assert explanation.similar.reason.startswith("moving runs would save too little")


def test_short_prompts_are_not_cached(lm: LongContextLM) -> None:
    caching = lm.with_config(reuse="similar")
    text = "He came. " * 12
    explanation = explain_texts(text, text, lm.tokenizer, lm.model.config, make_reuse_options({}))
    assert LEAST_SHARED_TOKENS // 2 < explanation.alignment.donor_tokens < LEAST_SHARED_TOKENS
    caching.read(text, chat=False)
    reuse = caching.read(text, chat=False).reuse
    assert reuse is not None
    assert reuse.kind == explanation.similar.kind == explanation.exact.kind == "none"
    assert "fewer than 64 tokens" in explanation.similar.reason


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-6, len(SENTENCES) - 1), max_size=25), st.sampled_from([0, 3, 16]))
def test_runs_are_the_new_prompt(tokenizer: PreTrainedTokenizerFast, picks: list[int], first_tokens: int) -> None:
    """Any mixture of old and new sentences, in any order, some twice: every character and token is there, once."""
    text = "".join(SENTENCES[pick] if pick >= 0 else f"A {pick} \u00e9\u4e2d\n\n" for pick in picks) or "."
    config = make_model("llama").config
    options = make_reuse_options({"first_tokens": first_tokens})
    explanation = explain_texts(DONOR, text, tokenizer, config, options)
    alignment, counts = explanation.alignment, explanation.counts()
    runs = [run for run in explanation.runs() if run.kind != "gone"]
    assert "".join(explanation.text(run) for run in runs) == text
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == alignment.num_tokens
    for kind in KINDS:
        if kind != "gone":
            assert sum(run.stop - run.start for run in runs if run.kind == kind) == counts[kind]
    assert sum(counts.values()) - counts["gone"] == alignment.num_tokens
    assert counts["new"] == alignment.num_new
    last_source = -1
    for run in explanation.runs():
        if run.kind == "gone":  # it stood behind what is before it now, but for what is new
            assert run.start == last_source + 1
        else:
            source_T = explanation.planned.source_T[run.start : run.stop]
            last_source = int(source_T[-1]) if source_T[-1] >= 0 else last_source
    gone = [run for run in explanation.runs() if run.kind == "gone"]
    assert sum(run.stop - run.start for run in gone) <= counts["gone"]
    for run in gone:
        assert (explanation.donor_code_T[run.start : run.stop] == KINDS.index("gone")).all()
        assert explanation.text(run) in DONOR


def test_special_tokens_have_no_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    """Not those at the beginning, and not those at the end, where a span of (0, 0) would go back."""
    begun = encode(tokenizer, "One two.", Config(), special_tokens=True)
    ended = dataclasses.replace(
        begun,
        token_ids=[0, *begun.token_ids, 1],
        spans=torch.nn.functional.pad(torch.from_numpy(begun.spans), (0, 0, 1, 1)).numpy(),
    )
    count = len(ended.token_ids)
    assert text_of(ended, 0, 1) == ""
    assert text_of(ended, 1, count - 1) == "One two."
    assert text_of(ended, count - 1, count) == ""
    assert text_of(ended, count - 2, count - 1) == "."
    assert text_of(ended, 0, 0) == text_of(ended, count, count) == ""


def test_fuzzy_needs_embeddings(lm: LongContextLM) -> None:
    options = make_reuse_options({"fuzzy": True, "retention": 0.1})
    text = DONOR.replace("was", "is").replace("the", "a")
    with pytest.raises(ValueError, match="embedding"):
        explain_texts(DONOR, text, lm.tokenizer, lm.model.config, options)
    embedding = lm.model.get_input_embeddings()
    explanation = explain_texts(DONOR, text, lm.tokenizer, lm.model.config, options, embedding)
    assert explanation.counts()["fuzzy"] > 0


class TestTrial:
    def trial(self, lm: LongContextLM, text: str, **options: object) -> Trial:
        caching = lm.with_config(reuse="similar", reuse_options=options)
        explanation = explain_texts(DONOR, text, lm.tokenizer, lm.model.config, make_reuse_options(options))
        found = try_out(caching, explanation, num_tokens=6)
        assert json.loads(json.dumps(as_dict(explanation, found)))["run"]["num_agreeing"] == found.num_agreeing
        return found

    def test_exact_readings_agree(self, lm: LongContextLM) -> None:
        for name, kind in (("same", "same"), ("appended to", "prefix"), ("unrelated", "none")):
            found = self.trial(lm, PROMPTS[name])
            assert found.reuse.kind == kind
            assert found.divergence < 1e-9
            assert found.num_agreeing == len(found.token_ids) == 6

    def test_what_is_moved_wrongly_shows(self, lm: LongContextLM) -> None:
        moved = self.trial(lm, PROMPTS["moved"])
        spliced = self.trial(lm, PROMPTS["moved"], rotate=False, first_tokens=0)
        assert moved.reuse.kind == spliced.reuse.kind == "similar"
        assert 0 < moved.divergence < spliced.divergence

    def test_greedy_tokens_are_those_of_generation(self, lm: LongContextLM) -> None:
        """With the whole context in the budget, decoding attends to everything too."""
        found = self.trial(lm, PROMPTS["moved"])
        generating = lm.with_config(budget_tokens=2048)
        assert found.full_token_ids == generating.generate(PROMPTS["moved"], max_new_tokens=6).token_ids

    def test_greedy_tokens_end_where_a_text_ends(self, lm: LongContextLM, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.trial(lm, PROMPTS["same"])
        stop = found.full_token_ids[2]
        ended = found.full_token_ids[: found.full_token_ids.index(stop) + 1]
        original = LongContextLM.with_config

        def with_stop(self: LongContextLM, **changes: object) -> LongContextLM:
            made = original(self, **changes)
            monkeypatch.setattr(made._engine, "_stop_ids", {stop})
            return made

        monkeypatch.setattr(LongContextLM, "with_config", with_stop)
        again = self.trial(lm, PROMPTS["same"])
        assert again.token_ids == again.full_token_ids == ended
        assert again.num_agreeing == len(ended) < 6

    def test_one_that_ends_before_the_other_differs_there(self, lm: LongContextLM) -> None:
        found = self.trial(lm, PROMPTS["same"])
        shorter = [*found.full_token_ids[:2], -1]
        assert dataclasses.replace(found, token_ids=shorter).num_agreeing == 2

    def test_first_difference_counts(self, lm: LongContextLM) -> None:
        found = self.trial(lm, PROMPTS["same"])
        ours = [*found.full_token_ids[:2], -1, *found.full_token_ids[3:]]
        assert dataclasses.replace(found, token_ids=ours).num_agreeing == 2

    def test_too_long(self, lm: LongContextLM) -> None:
        text = DONOR * 40
        explanation = explain_texts(DONOR, text, lm.tokenizer, lm.model.config, make_reuse_options({}))
        with pytest.raises(ValueError, match="positions for 4096"):
            try_out(lm.with_config(reuse="similar"), explanation)
