"""A model under one configuration: prompts in, generations and scores out.

What LongContextLM and Document have in common. Knows how to make sessions, read into them, decode and score; nothing
of how models are loaded or of what a document is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sentencekv import policies
from sentencekv.attention import forward, text_config
from sentencekv.config import Config
from sentencekv.decoding import Decoding, decode
from sentencekv.fused import FusedLayers
from sentencekv.generation import Generation, find_sources, finish
from sentencekv.graph import Stepper
from sentencekv.memory import HostMemory
from sentencekv.prompts import Prompt, section
from sentencekv.reading import Progress, read
from sentencekv.reuse.prompt_cache import DEFAULT_NAMESPACE, PromptCache, Reading
from sentencekv.reuse.report import Reuse
from sentencekv.sampling import SamplingOptions, refuse_nan
from sentencekv.saved import Owner
from sentencekv.session import Session
from sentencekv.slabs import Layout, host_slabs

SHAPING = ("sink_tokens", "window_tokens", "max_sentence_tokens", "min_sentence_tokens", "splitter", "kv_dtype")
"""Settings that shape the sentences and the KV of what is read."""
_CHUNK_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Default `prefill_chunk_tokens`: large enough to fill a GPU; on a CPU small, for steady progress."""


class Engine:
    """One model, tokenizer, configuration and bound of host memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        memory: HostMemory,
        layers: FusedLayers | None = None,
    ) -> None:
        """`layers`: those of the model, if they were looked at already."""
        self.model = model
        self.layers = layers or FusedLayers(model)
        self.tokenizer = tokenizer
        self.config = config
        self.policy = policies.load(config.policy, config.policy_options)
        self.memory = memory
        self.stepper = Stepper(model, self.policy, layers=self.layers)
        self.owner = Owner(model, tokenizer)
        self._stop_ids = _stop_ids(model, tokenizer)
        embedding: Any = model.get_input_embeddings()
        self._num_embeddings: int = embedding.weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """The most tokens that the model can see, context and generation together; None if it does not say."""
        return getattr(text_config(self.model), "max_position_embeddings", None)

    def _layout(self) -> tuple[Layout, int]:
        """How KV of closed sentences looks in host memory, and in how many layers."""
        config = text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        num_layers = sum(kind != "sliding_attention" for kind in kinds)
        return Layout(heads, head_dim, self.model.dtype, self.config.kv_format), num_layers

    def check_fits(self, prompts: Sequence[Prompt], new_tokens: int, before: int = 0, more_bytes: int = 0) -> None:
        """Raise ValueError or MemoryError unless prompts, each after `before` tokens, fit positions and host memory.

        `more_bytes`: of host memory, for what else will come there.
        """
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if min(len(prompt.token_ids) for prompt in prompts) == 0:
            raise ValueError("the prompt has no tokens; give at least one character that the tokenizer knows")
        if self.max_positions is not None and before + longest + new_tokens > self.max_positions:
            asked = f" and {new_tokens} more are to be generated" if new_tokens else ""
            remedy = "shorten the text" + (" or lower max_new_tokens" if new_tokens else "")
            raise ValueError(
                f"the prompt has {before + longest} tokens{asked}; the model has positions for {self.max_positions}: "
                f"{remedy}, or use a model with a longer context"
            )
        largest = max(max(prompt.token_ids) for prompt in prompts)
        if largest >= self._num_embeddings:
            raise ValueError(
                f"the tokenizer gave token {largest} and the model knows {self._num_embeddings}; give the model's own "
                "tokenizer, or resize the model's embeddings"
            )
        longest_sentence = self.config.max_sentence_tokens
        layout, num_layers = self._layout()
        needed = 0
        for prompt in prompts:
            counts = (0, len(prompt.token_ids) + new_tokens) if before else (len(prompt.token_ids), new_tokens)
            slabs = host_slabs(*counts, longest_sentence, layout.row_bytes)
            needed += sum(self.memory.taken_bytes(layout.num_bytes(capacity)) for capacity in slabs)
        self.memory.check(needed * num_layers + more_bytes)

    def session(self) -> Session:
        """A new, empty session."""
        return Session(self.config, self.policy, self.memory, self.model.device, self._layout()[0].row_bytes)

    @functools.cached_property
    def prompt_cache(self) -> PromptCache | None:
        """Cached prompts, if the configuration asks for them; made when first used. Raises as `PromptCache`."""
        if self.config.reuse == "off":
            return None
        owner = "\n".join(
            [self.owner.weights, self.owner.vocabulary, str(self.model.dtype), str(self.owner.rotary.tolist())]
        )
        return PromptCache(
            self.model,
            self.layers,
            self.config,
            self.memory,
            self.session,
            owner=hashlib.sha256(owner.encode()).hexdigest(),
            chunk_tokens=self.chunk_tokens,
            embed=self.config.reuse_embedding,
        )

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one forward pass while reading."""
        return self.config.prefill_chunk_tokens or _CHUNK_TOKENS[self.model.device.type]

    def read_reusing(
        self, prompts: Sequence[Prompt], namespace: str, progress: Progress | None = None
    ) -> list[Reading] | None:
        """Read prompts one after another with the help of what is cached; None if nothing is cached at all.

        Of several, each is cached at once, for those after it; one alone when its answer is there.
        """
        if self.prompt_cache is None:
            return None
        total, done, readings = sum(len(prompt.token_ids) for prompt in prompts), 0, []
        for prompt in prompts:
            started_at = time.perf_counter()
            one = None if progress is None else functools.partial(_of_all, progress, done, total)
            reading = self.prompt_cache.read(prompt, namespace, one)
            if len(prompts) > 1:
                int(reading.logits_V.argmax())  # waits for it
                reuse = reading.finish(time.perf_counter() - started_at)
                reading = reading._replace(finish=functools.partial(_told, reuse))
            readings.append(reading)
            done += len(prompt.token_ids)
        return readings

    def read(self, sessions: Sequence[Session], prompts: Sequence[Prompt], progress: Progress | None = None) -> Tensor:
        """Append prompts to sessions, exactly; returns the logits `[B, vocabulary]` of their last tokens."""
        with self.layers.active():
            return read(self.model, sessions, prompts, chunk_tokens=self.chunk_tokens, progress=progress)

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        progress: Progress | None,
        results: list[Generation],
        namespace: str = DEFAULT_NAMESPACE,
    ) -> Iterator[tuple[int, str]]:
        """Read prompts and continue them; yields `(index, text)`, and appends to `results` when all have ended."""
        started_at = time.perf_counter()
        self.check_fits(prompts, options.max_new_tokens)
        readings = self.read_reusing(prompts, namespace, progress)
        if readings is None:
            sessions = [self.session() for _ in prompts]
            logits = self.read(sessions, prompts, progress)
        else:
            sessions = [reading.session for reading in readings]
            logits = torch.stack([reading.logits_V for reading in readings])
        decodings = [self._decoding(s, p.token_ids, options) for s, p in zip(sessions, prompts, strict=True)]
        yield from decode(self.stepper, decodings, logits)
        for i, (decoding, prompt) in enumerate(zip(decodings, prompts, strict=True)):
            sources = find_sources(decoding, prompt, 0)
            result = finish(decoding, sources, context_tokens=len(prompt.token_ids), started_at=started_at)
            if readings is not None:
                reuse = readings[i].finish(result.stats.seconds_to_first_token)
                result = dataclasses.replace(result, reuse=reuse)
            results.append(result)

    def adopt(self, base: Session) -> Session:
        """A fork of another configuration's session of the same model and memory, under this one.

        Raises ValueError naming a setting that shaped what the session holds and differs here.
        """
        for name in SHAPING:
            theirs, ours = getattr(base.config, name), getattr(self.config, name)
            if theirs != ours:
                raise ValueError(
                    f"the document was read with {name}={_shown(theirs)}, and this is {_shown(ours)}: read it again"
                )
        with base.using_host_memory():
            return base.under(self.config, self.policy)

    def append(
        self, base: Session, context: Prompt, appended: Prompt, progress: Progress | None, new_tokens: int = 0
    ) -> tuple[Session, Tensor]:
        """Fork a session that has read `context` and append a prompt to it; with the logits of its last token.

        `new_tokens`: how many will be generated after it, for the check that they fit.
        """
        with base.using_host_memory():
            num_before = len(context.token_ids)
            self.check_fits([appended], new_tokens, before=num_before, more_bytes=base.unloaded_bytes)
            session = base.fork()
            return session, self.read([session], [appended], progress)

    def continue_from(
        self,
        base: Session,
        context: Prompt,
        first_char: int,
        appended: Prompt,
        options: SamplingOptions,
        progress: Progress | None,
        done: Callable[[Decoding, Generation], None],
    ) -> Iterator[tuple[int, str]]:
        """Append a prompt to a session's fork and continue; as `generate` for one, and `done` takes the result."""
        started_at = time.perf_counter()
        context_ids = context.token_ids + appended.token_ids
        with base.using_host_memory():
            session, logits = self.append(base, context, appended, progress, options.max_new_tokens)
            decoding = self._decoding(session, context_ids, options)
            yield from decode(self.stepper, [decoding], logits)
        sources = find_sources(decoding, context, first_char)
        done(decoding, finish(decoding, sources, context_tokens=len(context_ids), started_at=started_at))

    def logits(self, prompt: Prompt, num_scored: int) -> Tensor:
        """Logits `[num_scored, vocabulary]` that a prompt's last tokens are drawn from, float32, on the model's device.

        What comes before them is read exactly; they are decoded one by one, as generation would.
        """
        self.check_fits([prompt], new_tokens=0)
        session = self.session()
        first = len(prompt.token_ids) - num_scored
        context, scored = section(prompt, 0, first, []), prompt.token_ids[first:]
        logits = [self.read([session], [context])]
        session.expect([end for end in prompt.ends if end > first])
        if self.policy.reads == "everything" and len(scored) > 1:
            with self.layers.active():
                logits.append(forward(self.model, [scored[:-1]], [session], exact=True, all_logits=True))
        else:
            logits += [self.stepper.step([session], [token]).clone() for token in scored[:-1]]
        logits_LV = torch.cat(logits)
        refuse_nan(logits_LV)
        return logits_LV

    def score(self, prompt: Prompt, num_scored: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[num_scored]` of a prompt's last tokens, and whether each is the greedy choice."""
        logits_LV = self.logits(prompt, num_scored)
        target = torch.tensor(prompt.token_ids[-num_scored:], device=logits_LV.device)
        scores = logits_LV.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        return scores.double().cpu(), (logits_LV.argmax(dim=-1) == target).cpu()

    def _decoding(self, session: Session, context_ids: Sequence[int], options: SamplingOptions) -> Decoding:
        return Decoding(session, context_ids, self.tokenizer, options, self._stop_ids)


def _of_all(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    """Progress of one prompt as that of several."""
    progress(before + done, total)


def _told(reuse: Reuse, _: float) -> Reuse:
    """What was reused, of a prompt that is cached already."""
    return reuse


def _shown(setting: object) -> str:
    """As it is written; a function by its name."""
    return getattr(setting, "__name__", repr(setting))


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """As transformers: the generation configuration's, and the tokenizer's where that has none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
