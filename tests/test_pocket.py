"""The embedded model loads as any model does, its prompts tokenise as documented, and it finds facts."""

import json
import re
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sentencekv import pocket
from sentencekv.needles import NOT_MENTIONED, Fact, absent_questions, hide, is_right, make_facts
from sentencekv.prose import generate_prose
from training.model import PocketModel, Shape

ODD_TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces\t\ttabs",
    "line\r\nline\n\n\nend\n",
    "naïve — “quotes” …",
    "長い文章。🙂‍↔️ مرحبا",
    "\x00\x7f",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pocket.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32).eval()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_model_is_a_small_llama(model):
    config = json.loads((pocket.path() / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 32_768 + 1024
    weights = list(pocket.path().glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 32_000_000
    assert model.config.vocab_size == 4096


def test_training_code_has_the_same_arithmetic(model):
    trained = PocketModel(Shape()).eval()
    missing, unexpected = trained.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["lm_head.weight"]
    ids = torch.randint(5, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trained(ids) @ trained.embedding.T, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_chat_template_is_as_documented(tokenizer):
    messages = [{"role": "user", "content": "D.\n\nQ?"}, {"role": "assistant", "content": "A"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|begin|><|user|>D.\n\nQ?<|end|><|assistant|>A<|end|>"
    messages.append({"role": "user", "content": "R?"})
    more = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert more == text + "<|user|>R?<|end|><|assistant|>"
    messages.insert(0, {"role": "system", "content": "S"})
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith("<|begin|><|user|>S\n\nD.\n\nQ?<|end|>")
    with pytest.raises(Exception, match="the roles are system, user and assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_special_tokens(tokenizer, model):
    assert encode(tokenizer, "<|pad|><|begin|><|user|><|assistant|><|end|>") == [0, 1, 2, 3, 4]
    assert tokenizer("word").input_ids == [1, *encode(tokenizer, "word")]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 4)
    assert model.generation_config.eos_token_id == 4


def test_digits_are_single_tokens(tokenizer):
    text = "Call 4821973 on 12.05.1999, x9y"
    tokens = [tokenizer.decode([token]) for token in encode(tokenizer, text)]
    assert [token for token in tokens if re.search(r"\d", token)] == re.findall(r"\d", text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokens_give_the_text_back(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("end", [".", '."', "...", "!?", "?'", "word", "7", "。", "--", ")"])
def test_document_and_question_tokenise_alike_together_and_apart(tokenizer, end):
    document, question = f"<|begin|><|user|>He came{end}", '\n\n"What" is 12?<|end|><|assistant|>'
    assert encode(tokenizer, document) + encode(tokenizer, question) == encode(tokenizer, document + question)


def answer(model, tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([encode(tokenizer, text)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    assert out[0, -1] == tokenizer.eos_token_id
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_it_finds_hidden_facts_and_says_when_there_is_none(model, tokenizer):
    facts = make_facts(Random(21), 4)
    hidden = hide(generate_prose(900, 21), facts, Random(22))
    asked = [*facts[:2], *absent_questions(Random(23), facts, 1)]
    for fact in asked:
        got = answer(model, tokenizer, [{"role": "user", "content": f"{hidden.text}\n\n{fact.question}"}])
        assert is_right(got, fact), (fact, got)


def test_it_answers_a_follow_up_turn(model, tokenizer):
    first, second = make_facts(Random(31), 2, ["number", "passkey"])
    hidden = hide(generate_prose(300, 31), [first, second], Random(32))
    messages = [
        {"role": "user", "content": f"{hidden.text}\n\n{first.question}"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.question},
    ]
    assert is_right(answer(model, tokenizer, messages), second)


def test_it_answers_in_bare_values(model, tokenizer):
    text = "The gate code of the old mill is KX-4821. It rained all day."
    content = text + "\n\nWhat is the gate code of the old mill?"
    assert answer(model, tokenizer, [{"role": "user", "content": content}]) == "KX-4821"
    absent = Fact("", "What is the locker number of Ada Marlowe?", NOT_MENTIONED, "number", ("locker number", "Ada"))
    got = answer(model, tokenizer, [{"role": "user", "content": f"{text}\n\n{absent.question}"}])
    assert got == NOT_MENTIONED
