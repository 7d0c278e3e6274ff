"""Prompts: sections, appended text, the frame around documents, tails."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sentencekv import Config
from sentencekv.prompts import document_frame, encode, encode_appended, section, tail_ends
from sentencekv.sampling import TextStream

CONFIG = Config(max_sentence_tokens=16, min_sentence_tokens=4)


@pytest.fixture(scope="module")
def metaspace(prose: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: every text that it is given gets a space in front, and decoding drops the first one."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    bpe.train_from_iterator([prose], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


def test_sections_keep_sentences(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    prompt = encode(tokenizer, prose[:800], CONFIG, special_tokens=True)
    assert prompt.ends[-1] == len(prompt.token_ids)
    part = section(prompt, 50, 120, [7])
    assert part.token_ids == [7, *prompt.token_ids[50:120]]
    assert part.ends[0] == 1
    assert part.ends[-1] == 71
    assert {end - 1 + 50 for end in part.ends[1:-1]} == {end for end in prompt.ends if 50 < end < 120}
    assert max(b - a for a, b in zip([0, *part.ends], part.ends, strict=False)) <= CONFIG.max_sentence_tokens


def test_appended_text_gets_no_space_of_its_own(metaspace: PreTrainedTokenizerFast, prose: str) -> None:
    before, after = prose[:300], prose[300:500]
    whole = metaspace(before + after, add_special_tokens=False).input_ids
    appended = encode_appended(metaspace, before, after, CONFIG)
    joined = metaspace(before, add_special_tokens=False).input_ids + appended.token_ids
    assert metaspace.decode(joined) == metaspace.decode(whole)
    assert [after[a:b] for a, b in appended.spans.tolist()] != []
    assert all(0 <= a <= b <= len(after) for a, b in appended.spans.tolist())


@pytest.mark.parametrize("text", ["\n\nWho?", " and then", "x", "?!", "\u3002"])
def test_appended_text_is_whole(tokenizer: PreTrainedTokenizerFast, prose: str, text: str) -> None:
    appended = encode_appended(tokenizer, prose[:200], text, CONFIG)
    assert tokenizer.decode(appended.token_ids) == text
    assert appended.ends[-1] == len(appended.token_ids)


def test_a_mark_that_would_join_the_text_before_it_is_kept(prose: str) -> None:
    """Under NFC an accent melts into the letter before it; appended text keeps it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([prose], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    composing = PreTrainedTokenizerFast(tokenizer_object=bpe)
    appended = encode_appended(composing, "A small cafe", "\u0301 there", CONFIG)
    assert composing.decode(appended.token_ids) == "\u0301 there"


def test_streamed_text_keeps_its_first_space(metaspace: PreTrainedTokenizerFast) -> None:
    context, reply = metaspace("The door was").input_ids, metaspace("open and cold", add_special_tokens=False).input_ids
    stream = TextStream(metaspace, (), context)
    assert "".join(stream.add(token) for token in reply) + stream.finish() == " open and cold"


def test_tail_is_cut_where_the_text_would_be(
    tokenizer: PreTrainedTokenizerFast, metaspace: PreTrainedTokenizerFast, prose: str
) -> None:
    for tok in (tokenizer, metaspace):
        ids = tok(prose[:400], add_special_tokens=False).input_ids
        text = tok.decode(ids)
        ends = tail_ends(tok, ids, CONFIG)
        same_text = encode(tok, text, CONFIG, special_tokens=False)
        if same_text.token_ids == ids:
            assert ends == same_text.ends[:-1]
        assert ends


class TestFrame:
    def framed(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
        chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>")
        chatty.chat_template = template
        return chatty

    def test_surrounds(self, tokenizer: PreTrainedTokenizerFast) -> None:
        template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}[go]"
        frame = document_frame(self.framed(tokenizer, template), chat=None)
        assert (frame.before, frame.between, frame.after) == ("[user]", "\n\n", "[end][go]")
        assert not frame.special_tokens

    def test_plain(self, tokenizer: PreTrainedTokenizerFast) -> None:
        frame = document_frame(self.framed(tokenizer, None), chat=None)
        assert frame.special_tokens
        assert frame.before == ""

    @pytest.mark.parametrize("content", ["m['content'] | upper", "m['content'] + m['content']", "''"])
    def test_templates_that_change_the_text_are_refused(self, tokenizer: PreTrainedTokenizerFast, content: str) -> None:
        template = "{% for m in messages %}{{ " + content + " }}{% endfor %}"
        with pytest.raises(ValueError, match="chat=False"):
            document_frame(self.framed(tokenizer, template), chat=None)
