"""What generation returns: the text, the sentences that it was read from, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sentencekv.decoding import Decoding, FinishReason
from sentencekv.prompts import Prompt
from sentencekv.reuse.report import Reuse


@dataclasses.dataclass(frozen=True)
class Source:
    """A sentence of the context that sparse steps read."""

    text: str
    share: float
    """Attention that the sentence got, averaged over generated tokens, heads and layers. Sink, window and tail, which
    are always read, get the rest up to 1."""
    start: int
    """First character in the prompt, the document, or the rendered chat: `text` is what stands at `start:end`."""
    end: int
    """One past the last character."""
    first_token: int
    """Position of its first token in the context."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one generation cost. Bytes are of this sequence, parts shared with a document included."""

    policy: str
    budget_tokens: int
    context_tokens: int
    """Tokens before the first generated one."""
    sentences: int
    """Closed sentences at the end: those that could be selected."""
    generated_tokens: int
    seconds_to_first_token: float
    """From the call to the first token, reading included; for a document, the question's reading only."""
    seconds_per_token: float | None
    """Mean over the tokens after the first; None if there were none."""
    kv_gpu_bytes: int
    """KV, summaries and hot set on the device."""
    kv_host_bytes: int
    """KV in host memory."""
    kv_dense_bytes: int
    """What a dense KV cache of the same tokens takes on the device."""
    hot_hit_rate: float | None
    """Share of selected sentences that were in the hot set already; None if nothing was selected."""
    tokens_fetched: int
    """Tokens copied from host memory to the hot set, summed over layers and KV heads."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated text."""

    text: str
    """Without special tokens and without the stop string."""
    token_ids: list[int]
    """All generated tokens, a final end-of-sequence token included."""
    finish_reason: FinishReason
    """`stop`: an end-of-sequence token or a stop string; `length`: `max_new_tokens`."""
    logprobs: list[float] | None
    """Log-probability of each token under the model itself, if asked for."""
    sources: list[Source]
    """Sentences that sparse steps read, most attention first; none under `full` and `window`, which do not select, and
    none if only one token was generated, which comes from the exact reading."""
    stats: Stats
    reuse: Reuse | None = None
    """What of the prompt came from a cached one; None with `reuse="off"`, and for questions of a document."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per scored token."""

    value: float
    log_likelihood: float
    """Sum over the scored tokens, in nats."""
    num_tokens: int
    """Scored tokens."""


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """How likely a continuation is."""

    value: float
    """Sum of the log-probabilities of the continuation's tokens, in nats."""
    is_greedy: bool
    """Whether greedy decoding would produce just this continuation."""
    num_tokens: int


def find_sources(decoding: Decoding, context: Prompt, first_char: int) -> list[Source]:
    """Sentences of a context by the attention they got; `first_char`: where the user's text begins in it."""
    session = decoding.session
    found = []
    for share, (first, stop) in zip(session.shares(), session.sentence_spans(), strict=True):
        spans = context.spans[first:stop]
        spans = spans[spans[:, 1] > spans[:, 0]]  # special tokens have no characters
        if share <= 0 or not len(spans):
            continue
        start, end = max(int(spans[:, 0].min()), first_char), int(spans[:, 1].max())
        text = context.text[start:end]
        start += len(text) - len(text.lstrip())
        text = text.strip()
        if text:
            first_in_text = start - first_char
            found.append(Source(text, share, first_in_text, first_in_text + len(text), first))
    return sorted(found, key=lambda source: -source.share)


def finish(decoding: Decoding, sources: Sequence[Source], *, context_tokens: int, started_at: float) -> Generation:
    """The result of a sequence that has ended."""
    session, traffic = decoding.session, decoding.session.traffic
    later = len(decoding.token_ids) - 1
    stats = Stats(
        policy=session.config.policy,
        budget_tokens=session.config.budget_tokens,
        context_tokens=context_tokens,
        sentences=session.num_sentences,
        generated_tokens=len(decoding.token_ids),
        seconds_to_first_token=decoding.first_token_at - started_at,
        seconds_per_token=(decoding.last_token_at - decoding.first_token_at) / later if later else None,
        kv_gpu_bytes=session.device_bytes,
        kv_host_bytes=session.host_bytes,
        kv_dense_bytes=session.dense_bytes,
        hot_hit_rate=traffic.hit_rate,
        tokens_fetched=traffic.tokens_fetched,
    )
    assert decoding.finish_reason is not None
    return Generation(
        text=decoding.stream.text,
        token_ids=list(decoding.token_ids),
        finish_reason=decoding.finish_reason,
        logprobs=list(decoding.logprobs) or None,
        sources=list(sources),
        stats=stats,
    )
