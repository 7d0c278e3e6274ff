"""Documents that grow, fork and are talked about, without being read again."""

import itertools

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentencekv import LongContextLM, policies
from tests.conftest import make_model

SMALL = {"sink_tokens": 4, "window_tokens": 12, "max_sentence_tokens": 16, "min_sentence_tokens": 4}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_lm(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LongContextLM:
    return LongContextLM.from_model(make_model("llama"), tokenizer, **{"budget_tokens": 2048, **SMALL, **changes})


def chatty(tokenizer: PreTrainedTokenizerFast, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>", eos_token="<end>")
    made.chat_template = template
    return made


def dense_greedy(lm: LongContextLM, token_ids: list[int], num_new: int) -> list[int]:
    ids = torch.tensor([token_ids])
    out = lm.model.generate(ids, do_sample=False, max_new_tokens=num_new, pad_token_id=0)
    return out[0, len(token_ids) :].tolist()


@pytest.mark.parametrize("policy", [name for name in policies.available() if name != "window"])
def test_appended_text_is_part_of_the_document(policy: str, tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """With a budget that covers all, answers are those of dense attention over the same tokens."""
    lm = make_lm(tokenizer, policy=policy, **policies.policy_class(policy).settings)
    document = lm.read(prose[:500])
    for start in range(500, 1100, 150):
        document.append(prose[start : start + 150])
        assert document.text == prose[: start + 150]
    ids = list(document._contents.prompt.token_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == document.text
    question = tokenizer("\n\nQuestion: Who?\nAnswer:", add_special_tokens=False).input_ids
    answer = document.ask("Who?", max_new_tokens=12)
    assert answer.token_ids == dense_greedy(lm, ids + question, 12)
    for source in answer.sources:
        assert document.text[source.start : source.end] == source.text


def test_appending_reads_the_new_text_only(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    document = make_lm(tokenizer).read(prose[:3000])
    before = document.num_tokens
    seen: list[tuple[int, int]] = []
    document.append(prose[3000:3200], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (document.num_tokens - before, document.num_tokens - before)
    assert 20 < seen[-1][0] < 200


def test_appending_bit_by_bit_leaves_few_extents(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """And what is found does not depend on how the text came."""
    lm = make_lm(tokenizer, budget_tokens=96, policy="codes")
    document = lm.read(prose[:200])
    for start in range(200, 3200, 60):
        document.append(prose[start : start + 60])
        extents = document._contents.session._extents
        sizes = [extent.num_sentences for extent in extents]
        assert all(2 * later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert len(sizes) <= 8
    at_once = lm.read(document.text)
    assert document.kv_host_bytes <= 3 * at_once.kv_host_bytes, "slabs that are hardly filled are packed"
    session = document._contents.session
    assert sum(sizes) == session.num_sentences
    spans = session.sentence_spans()
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans))
    ids = document._contents.prompt.token_ids + tokenizer("x", add_special_tokens=False).input_ids
    covering = make_lm(tokenizer, budget_tokens=4096)
    session.config = covering.config
    assert document.complete("x", max_new_tokens=8).token_ids == dense_greedy(lm, ids, 8)


def test_an_append_that_fails_changes_nothing(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    lm = make_lm(tokenizer, prefill_chunk_tokens=16)
    document = lm.read(prose[:400])
    expected = document.ask("Who?", max_new_tokens=8).token_ids

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        document.append(prose[400:900], progress=stop)
    with pytest.raises(ValueError, match="non-empty string"):
        document.append("")
    with pytest.raises(ValueError, match="positions"):
        document.append(prose * 20)
    assert document.text == prose[:400]
    assert document.ask("Who?", max_new_tokens=8).token_ids == expected
    document.close()
    with pytest.raises(ValueError, match="closed"):
        document.append("more")


def test_what_happens_while_text_is_appended(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """A document that was closed or grew meanwhile stays what it became."""
    document = make_lm(tokenizer).read(prose[:400])
    with pytest.raises(RuntimeError, match="append it again"):
        document.append(prose[400:600], progress=lambda *_: document.close())
    with pytest.raises(ValueError, match="closed"):
        document.ask("Who?")
    document = make_lm(tokenizer).read(prose[:400])
    inner = iter([prose[600:700]])

    def append_once(*_: int) -> None:
        for text in inner:
            document.append(text)

    with pytest.raises(RuntimeError, match="append it again"):
        document.append(prose[400:600], progress=append_once)
    assert document.text == prose[:400] + prose[600:700]
    assert document.num_tokens == document._contents.session.num_tokens
    with pytest.raises(ValueError, match="not valid Unicode"):
        document.append("\ud800")


def test_forks_go_their_own_ways(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    lm = make_lm(tokenizer)
    document = lm.read(prose[:600])
    expected = document.ask("Who?", max_new_tokens=8).token_ids
    held = document.kv_host_bytes
    fork = document.fork()
    assert lm.host_bytes_in_use == held
    fork.append(prose[600:900])
    assert (document.text, fork.text) == (prose[:600], prose[:900])
    assert document.ask("Who?", max_new_tokens=8).token_ids == expected
    document.close()
    ids = list(fork._contents.prompt.token_ids)
    question = tokenizer("\n\nQuestion: Who?\nAnswer:", add_special_tokens=False).input_ids
    assert fork.ask("Who?", max_new_tokens=8).token_ids == dense_greedy(lm, ids + question, 8)


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("policy", ["codes", "full"])
def test_a_conversation_remembers(
    policy: str, template: str | None, tokenizer: PreTrainedTokenizerFast, prose: str
) -> None:
    """Each answer is that of dense attention over document, questions and answers; long answers close sentences."""
    own = chatty(tokenizer) if template else tokenizer
    lm = make_lm(own, policy=policy)
    document = lm.read(prose[:700])
    alone = document.ask("Who came?", max_new_tokens=40).token_ids
    conversation = document.chat()
    said = own("", add_special_tokens=True).input_ids if not template else []
    text = ("<|user|>" if template else "") + prose[:700]
    between = "\n\n" if template else "\n\nQuestion: "
    after = "<end><|assistant|>" if template else "\nAnswer:"
    ids = said + own(text, add_special_tokens=False).input_ids
    for question in ("Who came?", "When was it?", "Why?"):
        ids += own(between + question + after, add_special_tokens=False).input_ids
        answer = conversation.ask(question, max_new_tokens=40)
        assert answer.token_ids == dense_greedy(lm, ids, 40)
        assert answer.stats.context_tokens == len(ids)
        ids += answer.token_ids[:-1] if answer.token_ids[-1] == own.eos_token_id else answer.token_ids
        assert conversation.num_tokens == len(ids)
        between = "<end><|user|>" if template else "\n\nQuestion: "
    assert document.ask("Who came?", max_new_tokens=40).token_ids == alone
    assert len(conversation._contents.session._extents) < 5


def test_an_answer_that_is_not_read_to_its_end_is_not_remembered(
    tokenizer: PreTrainedTokenizerFast, prose: str
) -> None:
    lm = make_lm(tokenizer)
    conversation = lm.read(prose[:600]).chat()
    expected = lm.read(prose[:600]).chat().ask("Who?", max_new_tokens=20)
    before = conversation.num_tokens
    stream = conversation.stream("What?", max_new_tokens=20)
    next(stream)
    del stream
    assert conversation.num_tokens == before
    with pytest.raises(ValueError, match="question"):
        conversation.ask(" ")
    again = conversation.ask("Who?", max_new_tokens=20)
    assert again.token_ids == expected.token_ids
    assert conversation.num_tokens > before


def test_questions_that_overlap(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """A stream that is made early asks when it is read; one that is overtaken says so and is not remembered."""
    lm = make_lm(tokenizer)
    conversation, other = lm.read(prose[:600]).chat(), lm.read(prose[:600]).chat()
    early = conversation.stream("When?", max_new_tokens=5)
    expected = [other.ask(question, max_new_tokens=5).token_ids for question in ("Who?", "When?")]
    assert conversation.ask("Who?", max_new_tokens=5).token_ids == expected[0]
    assert early.drain().token_ids == expected[1]
    late = conversation.stream("Why?", max_new_tokens=5)
    next(late)
    conversation.ask("Where?", max_new_tokens=5)
    num_tokens = conversation.num_tokens
    with pytest.raises(RuntimeError, match="another question was answered meanwhile"):
        late.drain()
    assert conversation.num_tokens == num_tokens
    assert "Where?" in conversation._contents.prompt.text
    assert "Why?" not in conversation._contents.prompt.text


def test_sources_of_a_conversation_are_in_its_text(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    conversation = make_lm(tokenizer, budget_tokens=96).read(prose[:2500]).chat()
    for question in ("Who?", "And then?"):
        answer = conversation.ask(question, max_new_tokens=30)
        text = conversation._contents.prompt.text
        assert answer.sources
        for source in answer.sources:
            assert text[source.start : source.end] == source.text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}"
        "{% endfor %}[go]",
        "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}"
        "[user]{{ messages[0]['content'] }}[go]",
    ],
)
def test_templates_that_allow_no_conversation(template: str, tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    document = make_lm(chatty(tokenizer, template)).read(prose[:300])
    document.ask("Who?", max_new_tokens=4)
    with pytest.raises(ValueError, match="one question only, or rewrites"):
        document.chat()


def test_a_conversation_of_an_opened_document(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path) -> None:
    lm = make_lm(tokenizer, budget_tokens=96)
    document = lm.read(prose[:1500])
    document.append(prose[1500:1700])
    document.save(tmp_path / "a")
    opened = lm.open(tmp_path / "a")
    opened.append(prose[1700:1800])
    document.append(prose[1700:1800])
    assert opened.text == document.text == prose[:1800]
    ours, theirs = opened.chat(), document.chat()
    for question in ("Who?", "When?"):
        assert ours.ask(question, max_new_tokens=20).token_ids == theirs.ask(question, max_new_tokens=20).token_ids
