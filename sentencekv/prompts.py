"""From text or chat messages to tokens and sentence ends; the chat template around a document and its questions.

Knows tokenizers and text, nothing of models or sessions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sentencekv.config import Config
from sentencekv.sentences import sentence_offsets, token_sentence_offsets

Message = Mapping[str, str]

_DOCUMENT, _QUESTION = "<<sentencekv document>>", "<<sentencekv question>>"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens of a text and where its sentences end."""

    text: str
    token_ids: list[int]
    spans: np.ndarray
    """Character span of each token in `text`, int64 `[T, 2]`."""
    ends: list[int]
    """Token positions one past the end of each sentence, rising; the last is the number of tokens."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str, config: Config, *, special_tokens: bool) -> Prompt:
    """Tokenise a text and find its sentences. Raises TypeError or ValueError for what is not a text with tokens."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a string, a list of strings or chat messages, got {type(text).__name__}")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; sentencekv needs character offsets: "
            "convert it to a tokenizer.json"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not valid Unicode text: {error.reason} at character {error.start}; decode the file with "
            "its own encoding, or with errors='replace'"
        ) from None
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
    token_ids = list(encoded["input_ids"])
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    offsets = sentence_offsets(
        text,
        spans,
        max_tokens=config.max_sentence_tokens,
        min_tokens=config.min_sentence_tokens,
        splitter=config.splitter,
    )
    return Prompt(text, token_ids, spans, offsets[1:].tolist())


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


def document_frame(tokenizer: PreTrainedTokenizerBase, *, chat: bool | None) -> Frame:
    """One user turn with the document and the question, or a plain question form.

    `chat` None: a turn if the tokenizer has a chat template. True without a template raises ValueError.
    """
    if chat is False or (chat is None and not tokenizer.chat_template):
        return Frame("", "\n\nQuestion: ", "\nAnswer:", special_tokens=True)
    rendered = _render(tokenizer, [{"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}])
    before, _, rest = rendered.partition(_DOCUMENT)
    between, _, after = rest.partition(_QUESTION)
    return Frame(before, between, after, special_tokens=False)


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
    ends = [end - first + added for end in prompt.ends if first < end < stop] + [stop - first + added]
    spans = np.concatenate([np.zeros((added, 2), dtype=np.int64), prompt.spans[first:stop]])
    return Prompt(prompt.text, [*begin_ids, *prompt.token_ids[first:stop]], spans, ends)


def tail_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], config: Config) -> list[int]:
    """Sentence ends within generated tokens, the last and perhaps unfinished sentence left out."""
    pieces = tokenizer.batch_decode([[token] for token in token_ids])
    offsets = token_sentence_offsets(
        pieces,
        max_tokens=config.max_sentence_tokens,
        min_tokens=config.min_sentence_tokens,
        splitter=config.splitter,
    )
    return offsets[1:-1].tolist()
