"""From text or chat messages to tokens and sentence ends; the chat template around a document and its questions.

Knows tokenizers and text, nothing of models or sessions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sentencekv.config import Config
from sentencekv.sampling import TextStream
from sentencekv.sentences import sentence_offsets, token_sentence_offsets

Message = Mapping[str, str]

_ANCHOR_CHARACTERS = 48

_DOCUMENT, _QUESTION = "<<sentencekv document>>", "<<sentencekv question>>"
_ANSWER, _LATER = "<<sentencekv answer>>", "<<sentencekv later>>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens of a text and where its sentences end."""

    text: str
    token_ids: list[int]
    spans: np.ndarray
    """Character span of each token in `text`, int64 `[T, 2]`."""
    ends: list[int]
    """Token positions one past the end of each sentence, rising; the last is the number of tokens."""

    def followed_by(self, other: Prompt) -> Prompt:
        """Both as one prompt; where this one ends, a sentence does."""
        num_tokens = len(self.token_ids)
        return Prompt(
            self.text + other.text,
            self.token_ids + other.token_ids,
            np.concatenate([self.spans, other.spans + len(self.text)]),
            self.ends + [num_tokens + end for end in other.ends],
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, config: Config, *, special_tokens: bool) -> Prompt:
    """Tokenise a text and find its sentences. Raises TypeError or ValueError for what is not a text with tokens."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a string, a list of strings or chat messages, got {type(text).__name__}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; sentencekv needs character offsets: "
            "convert it to a tokenizer.json"
        )
    _check_unicode(text)
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
    token_ids = list(encoded["input_ids"])
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return _with_sentences(text, token_ids, spans, config)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not valid Unicode text: {error.reason} at character {error.start}; decode the file with "
            "its own encoding, or with errors='replace'"
        ) from None


def _with_sentences(text: str, token_ids: list[int], spans: np.ndarray, config: Config) -> Prompt:
    offsets = sentence_offsets(
        text,
        spans,
        max_tokens=config.max_sentence_tokens,
        min_tokens=config.min_sentence_tokens,
        splitter=config.splitter,
    )
    return Prompt(text, token_ids, spans, offsets[1:].tolist())


def encode_appended(tokenizer: PreTrainedTokenizerBase, before: str, text: str, config: Config) -> Prompt:
    """Tokenise a text as it stands after `before`, whose tokens are fixed already.

    Some tokenizers put a space before whatever they are given; tokenised behind the end of `before`, a text gets none
    that is not there. Where a token would reach across, the text is tokenised by itself.
    """
    _check_unicode(text)
    anchor = before[-_ANCHOR_CHARACTERS:]
    encoded = tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    first = int(np.searchsorted(spans[:, 0], len(anchor)))
    alone = encode(tokenizer, text, config, special_tokens=False)
    clean = 0 < first < len(spans) and spans[first - 1, 1] <= len(anchor) == spans[first, 0]
    if not clean:
        return alone
    token_ids = list(encoded["input_ids"])[first:]
    if token_ids == alone.token_ids:
        return alone
    return _with_sentences(text, token_ids, spans[first:] - len(anchor), config)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], config: Config) -> Prompt:
    """Tokenise chat messages through the tokenizer's chat template, up to where the assistant starts to answer."""
    return encode(tokenizer, _render(tokenizer, messages), config, special_tokens=False)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages rather than of texts."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(m, Mapping) for m in prompt)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around a document and a question: `before` document `between` question `after`."""

    before: str
    between: str
    after: str
    special_tokens: bool
    """Whether the tokenizer adds its own begin token (a chat template holds its own)."""
    next: str | None
    """From an answer to the question after it; None: the chat template rewrites what was said before."""


def document_frame(tokenizer: PreTrainedTokenizerBase, *, chat: bool | None) -> Frame:
    """One user turn with the document and the question, or a plain question form.

    `chat` None: a turn if the tokenizer has a chat template. True without a template raises ValueError.
    """
    if chat is False or (chat is None and not tokenizer.chat_template):
        return Frame("", "\n\nQuestion: ", "\nAnswer:", special_tokens=True, next="\n\nQuestion: ")
    first = {"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}
    rendered = _render(tokenizer, [first])
    before, found_document, rest = rendered.partition(_DOCUMENT)
    between, found_question, after = rest.partition(_QUESTION)
    if not found_document or not found_question or _DOCUMENT in after or _QUESTION in before + after:
        raise ValueError(
            "the chat template changes or repeats a message's text, so a document cannot be read ahead of its "
            "question; read it with chat=False, or use generate with chat messages"
        )
    return Frame(before, between, after, special_tokens=False, next=_next(tokenizer, first, rendered, after))


def _next(tokenizer: PreTrainedTokenizerBase, first: Message, rendered: str, after: str) -> str | None:
    later = {"role": "user", "content": _LATER}
    try:
        longer = _render(tokenizer, [first, {"role": "assistant", "content": _ANSWER}, later])
    except TemplateError:
        return None  # a template that allows one question only
    begin, _, rest = longer.partition(_ANSWER)
    between, _, end = rest.partition(_LATER)
    return between if begin == rendered and end == after else None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give the prompt as a string")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"a chat message must have 'role' and 'content', got {message!r:.80}")
        if not isinstance(message["content"], str):
            raise TypeError(f"a chat message's content must be a string, got {type(message['content']).__name__}")
    rendered = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def section(prompt: Prompt, first: int, stop: int, begin_ids: Sequence[int]) -> Prompt:
    """Tokens `[first, stop)` of a prompt as a prompt of its own, with `begin_ids` before them; the text stays whole."""
    added = len(begin_ids)
    ends = [added] if added else []
    ends += [end - first + added for end in prompt.ends if first < end < stop] + [stop - first + added]
    spans = np.concatenate([np.zeros((added, 2), dtype=np.int64), prompt.spans[first:stop]])
    return Prompt(prompt.text, [*begin_ids, *prompt.token_ids[first:stop]], spans, ends)


def generated(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], context_ids: Sequence[int], config: Config
) -> Prompt:
    """Generated tokens as a prompt: what each adds to the text after `context_ids`, and where sentences end."""
    stream = TextStream(tokenizer, (), context_ids)
    pieces = [stream.add(token) for token in token_ids]
    if pieces:
        pieces[-1] += stream.finish()
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    stops = lengths.cumsum()
    spans = np.stack([stops - lengths, stops], axis=1)
    return Prompt("".join(pieces), list(token_ids), spans, _ends_of(pieces, config))


def tail_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], config: Config) -> list[int]:
    """Sentence ends within generated tokens, the last and perhaps unfinished sentence left out."""
    stream = TextStream(tokenizer, ())
    return _ends_of([stream.add(token) for token in token_ids], config)[:-1]


def _ends_of(pieces: Sequence[str], config: Config) -> list[int]:
    offsets = token_sentence_offsets(
        pieces,
        max_tokens=config.max_sentence_tokens,
        min_tokens=config.min_sentence_tokens,
        splitter=config.splitter,
    )
    return offsets[1:].tolist()
