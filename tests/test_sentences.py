"""Invariants of segmentation: every token in one sentence, none too long, ends where a reader would put them."""

import json
import random
import re
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sentencekv.prose import generate_prose
from sentencekv.sentences import PunktSplitter, default_splitter, sentence_offsets, token_sentence_offsets

MAX_TOKENS, MIN_TOKENS = 32, 8

ODD_TEXTS = [
    "",
    " ",
    "\n\n\n",
    ".",
    "a",
    "\0" * 300,
    "\r\n" * 100,
    "..." * 100,
    "One. Two.\r\n\r\nThree.\r\n",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 8,
    "他说：“你好。”然后走了！真的吗？不知道" * 20,
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 family. Flags! " * 30,
    "lone \ud800 surrogate. And \udfff another.",
    "| a | b |\n|---|---|\n| 1 | 2 |\n" * 20,
    "def f(x):\n    return x.y.z()  # done. Really\n\n\nclass A:\n\tpass\n" * 10,
    '{"a":1,"b":[1.5,2,3],"c":"x.y"}' * 100,
    "مرحبا بالعالم؟ كيف حالك۔ بخير. ",
    "यह एक वाक्य है। यह दूसरा है।",
    'He said "No." Then "Yes!" and (left.) "Oh?" said he.',
    "\u2028line\u2029paragraph\x0cpage\x85next\u00a0space",
    "a" * 2000,
    "1. One\n2. Two\n\n* three\n* four\n" * 9,
]


def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([generate_prose(20_000, seed=7)], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["spaces-kept", "spaces-trimmed"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return _byte_level(request.param)


def _spans(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text).offsets, np.int64).reshape(-1, 2)


def _split(tokenizer: Tokenizer, text: str, max_tokens: int = MAX_TOKENS, min_tokens: int = 1) -> list[str]:
    spans = _spans(tokenizer, text)
    offsets = sentence_offsets(text, spans, max_tokens=max_tokens, min_tokens=min_tokens)
    starts = [0, *(int(spans[offset, 0]) for offset in offsets[1:-1]), len(text)]
    return [text[start:end] for start, end in pairwise(starts)]


def _check(offsets: np.ndarray, num_tokens: int, max_tokens: int, min_tokens: int) -> None:
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == num_tokens
    sizes = np.diff(offsets)
    assert (sizes > 0).all()
    assert (sizes <= max_tokens).all()
    assert ((sizes[1:] + sizes[:-1] > max_tokens) | ((sizes[1:] >= min_tokens) & (sizes[:-1] >= min_tokens))).all()


def _code_point_spans(text: str) -> np.ndarray:
    positions = np.arange(len(text))
    return np.stack([positions, positions + 1], axis=1)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize(("max_tokens", "min_tokens"), [(32, 8), (1, 1), (5, 5), (64, 1)])
def test_odd_texts_lose_nothing(text: str, max_tokens: int, min_tokens: int) -> None:
    offsets = sentence_offsets(text, _code_point_spans(text), max_tokens=max_tokens, min_tokens=min_tokens)
    _check(offsets, len(text), max_tokens, min_tokens)


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if "\ud800" not in text])
def test_odd_texts_through_a_byte_level_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    spans = _spans(tokenizer, text)
    offsets = sentence_offsets(text, spans, max_tokens=MAX_TOKENS, min_tokens=MIN_TOKENS)
    _check(offsets, len(spans), MAX_TOKENS, MIN_TOKENS)


_LIVELY = st.text(st.sampled_from("ab Z1.!?…\"'”“()[],;:—-\n\r\t\0。？、中🙂\ud800"), max_size=200)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=80), _LIVELY), data=st.data())
@example(text="", data=None)
def test_any_text_and_any_spans(text: str, data: st.DataObject | None) -> None:
    ends = default_splitter()(text)
    assert ((ends > 0) & (ends < len(text))).all()
    assert (np.diff(ends) > 0).all()
    if data is None:
        return
    max_tokens = data.draw(st.integers(1, 12))
    min_tokens = data.draw(st.integers(1, max_tokens))
    position = st.integers(0, len(text))
    pairs = sorted(tuple(sorted(pair)) for pair in data.draw(st.lists(st.tuples(position, position), max_size=60)))
    spans = np.array(pairs, np.int64).reshape(-1, 2)
    for index in data.draw(st.lists(st.integers(0, max(0, len(spans) - 1)), max_size=3)):
        spans[index : index + 1] = 0
    _check(
        sentence_offsets(text, spans, max_tokens=max_tokens, min_tokens=min_tokens), len(spans), max_tokens, min_tokens
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=6), max_size=60))
def test_pieces_give_what_their_spans_give(pieces: list[str]) -> None:
    ends = np.cumsum([0, *map(len, pieces)])
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    expected = sentence_offsets("".join(pieces), spans, max_tokens=9, min_tokens=3)
    np.testing.assert_array_equal(token_sentence_offsets(pieces, max_tokens=9, min_tokens=3), expected)


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Darcy bowed.", " Mrs. Long did not.", " Dr. Brown, of St. Giles, left."],
        ["He was J. R. Smith of Ohio.", " He came at 5 p.m. on Friday."],
        ["See No. 5, vol. II, pp. 3-9 and fig. 2.", " He said no.", " Then he left."],
        ["The cap.", " I took it.", " St. Louis is far.", " Yes and no.", " I left."],
        ["J. J. O’Molloy of the Y. M. C. A. spoke.", " Then Dr. Long did."],
        ["Wait!", " Stop it...", " She did.", " Oh…", " The end."],
        ["Prices rose 3.5% in the U.S. last year.", " The end came soon."],
        ["“Is he married?” said his wife.", " “Single, my dear!”", " She sat down."],
        ['"Where is it?" he asked.', ' "Nobody knows."', " It was late."],
        ["Wait... what was that?", " Nothing.", " (It was a cat.)", " He slept."],
        ["The ship sank.[12]", " Nobody was lost.(3)", " So it goes."],
        ["She bought apples, pears, etc. at the shop.", " He paid."],
        ["吾輩は猫である。", "名前はまだ無い。", "「本当？」", "はい。"],
        ["यह एक वाक्य है।", " यह दूसरा है।"],
        ["CHAPTER I\n\n", "The Bertolini\n\n", "The Signora had no business to do it."],
        ["1. Mix the flour.\n", "2. Add the eggs.\n", "3. Bake."],
        ["Dear John,\n\n", "I am well.\n\n", "Yours,\nAnn"],
        ["It was called _Emma._", " Everyone liked it."],
        ["Visit www.example.com/a.b?c=d.", " Then call."],
        ["| a | b |\n", "| c | d |\n", "| e | f |"],
        ["x = f(a.b)\n", "y = g(x)\n", "return y"],
        ["One.\r\n\r\n", "Two.\r\n"],
    ],
)
def test_where_sentences_end(tokenizer: Tokenizer, sentences: list[str]) -> None:
    split = [piece.strip() for piece in _split(tokenizer, "".join(sentences), max_tokens=64)]
    assert split == [sentence.strip() for sentence in sentences if sentence.strip()] or split == [
        piece.strip() for sentence in sentences for piece in sentence.strip().split("\n")
    ]


def test_wrapped_lines_are_not_ends() -> None:
    words = generate_prose(600, seed=3).replace("\n", " ").split()
    lines, line = [], ""
    for word in words:
        if len(line) + 1 + len(word) > 72:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    wrapped = "\n".join([*lines, line])
    assert np.array_equal(default_splitter()(wrapped), default_splitter()(wrapped.replace("\n", " ")))


def test_long_sentences_are_cut_at_marks_before_spaces_before_words() -> None:
    def cut(text: str) -> list[str]:
        offsets = sentence_offsets(text, _code_point_spans(text), max_tokens=20, min_tokens=4)
        return [text[start:end] for start, end in pairwise(offsets.tolist())]

    assert cut("aaaa bbbb; cccc, dddd eeee")[0] == "aaaa bbbb; "
    assert cut("aaaa bbbb cccc, dddd eeee")[0] == "aaaa bbbb cccc, "
    assert cut("aaaa bbbb cccc dddd eeee ffff")[0] == "aaaa bbbb cccc dddd "
    assert cut('{"aaaaaaa":1,"bbbbbbbbbb":2}')[0].endswith(",")
    assert [len(piece) for piece in cut("a" * 41)] == [20, 17, 4]


def test_long_sentences_are_not_cut_after_abbreviations() -> None:
    text = "and so it was that on a wet day old Mr. Bartholomew Featherstonehaugh of nowhere"
    offsets = sentence_offsets(text, _code_point_spans(text), max_tokens=40, min_tokens=4)
    assert "Mr. B" in text[offsets[0] : offsets[1]] or "Mr. B" in text[offsets[1] : offsets[2]]


def test_long_sentences_of_ones_own_are_cut_where_the_default_would() -> None:
    text = "One two three. Four five, six seven eight nine"
    spans = _code_point_spans(text)
    offsets = sentence_offsets(text, spans, max_tokens=30, min_tokens=4, splitter=lambda text: [])
    assert text[: offsets[1]].strip() == "One two three."


def test_short_sentences_join_within_their_paragraph() -> None:
    text = "A long first paragraph here.\n\nNo.\nAnd a second line that is long.\n\nThird paragraph, also long."
    offsets = sentence_offsets(text, _code_point_spans(text), max_tokens=60, min_tokens=10)
    pieces = [text[start:end].strip() for start, end in pairwise(offsets.tolist())]
    assert pieces[1] == "No.\nAnd a second line that is long."


def test_a_heading_joins_what_follows(tokenizer: Tokenizer) -> None:
    text = "He went home at last, and slept.\n\nLate\n\nThe next morning it rained on everybody in the town."
    assert [piece.strip()[:4] for piece in _split(tokenizer, text, min_tokens=6)] == ["He w", "Late"]


def test_fused_and_straddling_tokens() -> None:
    text = 'He said "no."\n\nShe left. '
    pieces = ["He", " said", ' "', "no", '."\n\n', "She", " left", ".", " "]
    assert token_sentence_offsets(pieces, max_tokens=32, min_tokens=1).tolist() == [0, 5, 9]
    assert "".join(pieces) == text
    # The white space after a stop stays with its sentence even as a token of its own.
    pieces = ["One", ".", "\n\n", " ", "Two", "."]
    assert token_sentence_offsets(pieces, max_tokens=32, min_tokens=1).tolist() == [0, 4, 6]


def test_special_tokens_with_empty_spans_stay_where_they_stand() -> None:
    text = "One. Two."
    spans = np.array([[0, 0], [0, 3], [3, 4], [0, 0], [4, 8], [8, 9], [0, 0]])
    assert sentence_offsets(text, spans, max_tokens=32, min_tokens=1).tolist() == [0, 4, 7]


def test_bytes_of_one_character_are_kept_together() -> None:
    text = "🙂" * 30
    spans = np.repeat(_code_point_spans(text), 4, axis=0)
    offsets = sentence_offsets(text, spans, max_tokens=30, min_tokens=4)
    assert (offsets % 4 == 0).all()


def test_a_splitter_of_ones_own() -> None:
    text = "aa|bb|cc"

    def splitter(text: str) -> list[int]:
        return [match.end() for match in re.finditer(r"\|", text)][::-1] * 2

    offsets = sentence_offsets(text, _code_point_spans(text), max_tokens=9, min_tokens=1, splitter=splitter)
    assert offsets.tolist() == [0, 3, 6, 8]
    nothing = sentence_offsets(text, _code_point_spans(text), max_tokens=9, min_tokens=1, splitter=lambda text: [])
    assert nothing.tolist() == [0, 8]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([3, 99], ValueError, r"offsets must lie in 0\.\.8, got 99; return"),
        ([-1], ValueError, r"got -1"),
        ([1.5], TypeError, "flat sequence of integers, got float64"),
        (["a"], TypeError, "flat sequence of integers"),
        (None, TypeError, "sequence of integers, got NoneType"),
        (7, TypeError, "sequence of integers, got int"),
        ([[1, 2], [3, 4]], TypeError, "flat sequence"),
        ([[1], [3, 4]], TypeError, "sequence of integers"),
        ([True], TypeError, "got bool"),
    ],
)
def test_a_bad_splitter_is_named(answer: object, error: type[Exception], message: str) -> None:
    text = "aa|bb|cc"
    with pytest.raises(error, match=message):
        sentence_offsets(text, _code_point_spans(text), max_tokens=9, min_tokens=1, splitter=lambda text: answer)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"min_tokens": 0}, ValueError, r"min_tokens must lie in 1\.\.max_tokens \(9\), got 0"),
        ({"min_tokens": 10}, ValueError, "got 10"),
        ({"text": b"ab"}, TypeError, "text must be a string, got bytes"),
        ({"token_spans": np.array([[0, 3]])}, ValueError, r"within 0\.\.2, got 0\.\.3"),
        ({"token_spans": np.array([[2, 1]])}, ValueError, "start <= end"),
        ({"token_spans": np.array([[0.0, 1.0]])}, TypeError, "integers, got float64"),
        ({"token_spans": np.array([0, 1])}, ValueError, r"shape \[T, 2\], got \[2\]"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"text": "ab", "token_spans": np.array([[0, 1], [1, 2]]), "max_tokens": 9, "min_tokens": 1}
    with pytest.raises(error, match=message):
        sentence_offsets(**{**good, **arguments})  # type: ignore[arg-type]


def test_agrees_with_nltk_but_for_what_is_meant() -> None:
    splitter = PunktSplitter()
    num_both = num_either = 0
    for paragraph in generate_prose(12_000, seed=11).split("\n\n"):
        ours = {int(end) for end in splitter(paragraph) if paragraph[end : end + 1] != "\n"}
        theirs = {
            len(paragraph[:start].rstrip())
            for start, _ in list(splitter._punkt.span_tokenize(paragraph))[1:]
            if paragraph[start - 1] != "\n"
        }
        meant = {
            end
            for end in theirs
            if (paragraph[end - 1] == '"' and paragraph[end:].lstrip(' "')[:1].islower())
            or re.search(r"(?:Mrs?|Dr|Capt|Prof|Rev|Col)\.$", paragraph[:end])
        }
        num_both += len(ours & theirs)
        num_either += len(ours | (theirs - meant))
    assert num_both > 0.98 * num_either


def test_unknown_words_leave_no_trace() -> None:
    splitter = PunktSplitter()
    num_words = len(splitter._parameters.ortho_context)
    splitter("Call Mr. Xqzzy. Then A. Vbnmq etc. Wrtyp at 5 p.m. Klmnb.")
    assert len(splitter._parameters.ortho_context) == num_words


def _minified_json() -> str:
    generator = random.Random(0)
    rows = [{"id": generator.randrange(10**6), "value": generator.random()} for _ in range(24_000)]
    return json.dumps(rows, separators=(",", ":"))


@pytest.mark.parametrize(
    ("make", "least_mb_per_second"),
    [
        (lambda: generate_prose(170_000), 0.3),
        (lambda: "lorem ipsum dolor " * 55_000, 0.3),
        (lambda: "." * 1_000_000, 0.3),
        (lambda: "a" * 1_000_000, 0.3),
        (lambda: "A. " * 333_333, 0.1),
        (lambda: "\n" * 1_000_000, 0.1),
        (lambda: '."' * 500_000, 0.1),
        (lambda: ("." * 1000 + "x") * 1000, 0.1),
        (_minified_json, 0.3),
    ],
    ids=["prose", "one-line", "stops", "letters", "initials", "newlines", "quotes", "runs", "json"],
)
def test_linear_and_fast(make: Callable[[], str], least_mb_per_second: float) -> None:
    text = make()
    positions = np.arange(0, len(text), 3)
    spans = np.stack([positions, np.minimum(positions + 3, len(text))], axis=1)
    default_splitter()
    started = time.perf_counter()
    offsets = sentence_offsets(text, spans, max_tokens=MAX_TOKENS, min_tokens=MIN_TOKENS)
    seconds = time.perf_counter() - started
    _check(offsets, len(spans), MAX_TOKENS, MIN_TOKENS)
    assert len(text.encode()) / 1e6 / seconds > least_mb_per_second
