"""LongContextLM: what users call."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from sentencekv import policies
from sentencekv.attention import check_supported
from sentencekv.config import Config
from sentencekv.document import Document, GenerationStream, Sampling
from sentencekv.engine import Engine
from sentencekv.generation import Generation, LogLikelihood, Perplexity
from sentencekv.loading import DEVICE_TYPES, load_model
from sentencekv.memory import HostMemory
from sentencekv.prompts import Message, Prompt, document_frame, encode, encode_chat, is_chat, section
from sentencekv.reading import Progress
from sentencekv.reuse.decide import make_reuse_options
from sentencekv.reuse.prompt_cache import DEFAULT_NAMESPACE
from sentencekv.sampling import make_options
from sentencekv.saved import Contents, open_saved


class LongContextLM:
    """A Hugging Face causal language model that reads long contexts once and fetches, per token, what matters.

    Not thread-safe. The model's own `generate` goes on working as before.
    """

    def __init__(self, engine: Engine, given: Mapping[str, Any]) -> None:
        """Use `from_pretrained` or `from_model`, which check what is given: fields of `Config`."""
        self._engine = engine
        self._given = dict(given)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "pocket",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
        **config: Any,
    ) -> LongContextLM:
        """Load a model folder or hub name; `"pocket"` is the small model that comes with the package.

        Args:
            device: `auto` takes a GPU where there is one.
            dtype: `auto` is the model's own on a GPU and float32 on a CPU; else a torch dtype or its name.
            tokenizer: a tokenizer, or where to load it; None: from `name_or_path`.
            config: fields of `Config`.

        Raises:
            OSError: the folder is missing, incomplete or corrupt.
            UnsupportedModelError: the model has a part that sentence retrieval does not understand.
            ValueError, TypeError: a bad device, dtype or configuration.
        """
        config_from(config)  # a mistake is known before the model is loaded
        return cls._checked(*load_model(name_or_path, device=device, dtype=dtype, tokenizer=tokenizer), config)

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **config: Any) -> LongContextLM:
        """Wrap a loaded model on the one device where it is, in its dtype; puts it in evaluation mode.

        Raises as `from_pretrained`.
        """
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        return cls._checked(model, tokenizer, config)

    @classmethod
    def _checked(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any]
    ) -> LongContextLM:
        config = config_from(given)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1 or model.device.type not in DEVICE_TYPES:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model's weights must be on one CPU or CUDA device, they are on {names}")
        check_supported(model.eval())
        memory = _make_memory(config, pinned=model.device.type == "cuda")
        return cls(Engine(model, tokenizer, config, memory), given)

    def with_config(self, **changes: Any) -> LongContextLM:
        """The same model under another configuration, for comparisons; documents are not carried over.

        What a policy brings (`Policy.settings`) goes with it.
        """
        engine = self._engine
        config = config_from(changes, self._given)
        memory = engine.memory
        if (config.host_memory_bytes, config.spill_folder) != (memory.limit_bytes, memory.spill_folder):
            memory = _make_memory(config, pinned=memory.pinned)
        made = Engine(engine.model, engine.tokenizer, config, memory, engine.layers)
        return LongContextLM(made, {**self._given, **changes})

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
        return self._engine.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._engine.tokenizer

    @property
    def config(self) -> Config:
        """The engine's configuration (the model's own is `model.config`)."""
        return self._engine.config

    @property
    def max_positions(self) -> int | None:
        """The most tokens that the model can see, context and generation together; None if it does not say."""
        return self._engine.max_positions

    @property
    def host_bytes_in_use(self) -> int:
        """Host memory that open documents and running generations hold, in bytes."""
        return self._engine.memory.in_use_bytes

    @overload
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        progress: Progress | None = ...,
        namespace: str = ...,
        **sampling: Unpack[Sampling],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        progress: Progress | None = ...,
        namespace: str = ...,
        **sampling: Unpack[Sampling],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[Message],
        *,
        progress: Progress | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        **sampling: Unpack[Sampling],
    ) -> Generation | list[Generation]:
        """Read a prompt exactly and continue it under the budget.

        Args:
            prompt: a text (continued as it is), chat messages (rendered by the chat template), or a list of texts,
                which are generated together as a batch of any lengths.
            progress: called with tokens read and tokens in all.
            namespace: with `reuse`, whose cached prompts it may take from and is added to; those of one are never
                seen, timed or counted in another.
            sampling: see `SamplingOptions`.

        Returns: one `Generation`, or a list for a list of texts.
        """
        single = isinstance(prompt, str) or is_chat(prompt)
        if not single and (not isinstance(prompt, Sequence) or not prompt):
            raise TypeError(f"a prompt must be a string, a list of strings or chat messages, got {_describe(prompt)}")
        prompts = [self._encode(prompt)] if single else [self._encode(text) for text in prompt]
        results: list[Generation] = []
        for _ in self._engine.generate(prompts, make_options(sampling), progress, results, _checked_name(namespace)):
            pass
        return results[0] if single else results

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        progress: Progress | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        **sampling: Unpack[Sampling],
    ) -> GenerationStream:
        """As `generate` for one prompt, piece by piece; the prompt is read when the first piece is asked for."""
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise TypeError(f"stream takes one string or chat messages, got {_describe(prompt)}")
        results: list[Generation] = []
        prompts, options = [self._encode(prompt)], make_options(sampling)
        pieces = self._engine.generate(prompts, options, progress, results, _checked_name(namespace))
        return GenerationStream(pieces, results)

    @overload
    def read(
        self, text: str, *, chat: bool | None = ..., progress: Progress | None = ..., namespace: str = ...
    ) -> Document: ...

    @overload
    def read(
        self, text: list[str], *, chat: bool | None = ..., progress: Progress | None = ..., namespace: str = ...
    ) -> list[Document]: ...

    def read(
        self,
        text: str | Sequence[str],
        *,
        chat: bool | None = None,
        progress: Progress | None = None,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> Document | list[Document]:
        """Read a document once; many questions can be asked of it.

        Args:
            text: the document, or a list of them, which are read together: short ones share a forward pass.
            chat: put document and question in one user turn of the tokenizer's chat template; None: if it has one.
            progress: called with tokens read and tokens in all. What it raises ends the reading, and nothing is kept.
            namespace: as of `generate`. What was reused is `Document.reuse`.

        Returns: one `Document`, or a list for a list of texts.

        Raises:
            TypeError, ValueError: not a text, empty, or longer than the model's positions.
            MemoryError: its KV does not fit in host memory; known before reading starts.
        """
        single = isinstance(text, str)
        if not single and (not isinstance(text, Sequence) or not text):
            raise TypeError(f"a document must be a string, or a list of strings, got {_describe(text)}")
        texts = [text] if isinstance(text, str) else list(text)
        for each in texts:
            if not isinstance(each, str):
                raise TypeError(f"a document must be a string, got {_describe(each)}")
            if not each.strip():
                raise ValueError("the document is empty; give a text with at least one word")
        engine = self._engine
        frame = document_frame(engine.tokenizer, chat=chat)
        started_at = time.perf_counter()
        prompts = [
            encode(engine.tokenizer, frame.before + each, engine.config, special_tokens=frame.special_tokens)
            for each in texts
        ]
        engine.check_fits(prompts, new_tokens=0)
        readings = engine.read_reusing(prompts, _checked_name(namespace), progress)
        if readings is None:
            sessions = [engine.session() for _ in prompts]
            engine.read(sessions, prompts, progress)
        else:
            sessions = [reading.session for reading in readings]
        seconds = time.perf_counter() - started_at
        reuses = [None] * len(prompts) if readings is None else [reading.finish(seconds) for reading in readings]
        documents = [
            Document(engine, Contents(each, prompt, frame, session), seconds, reuse)
            for each, prompt, session, reuse in zip(texts, prompts, sessions, reuses, strict=True)
        ]
        return documents[0] if single else documents

    def adopt(self, document: Document) -> Document:
        """The same document under this configuration's policy and budget, without reading it again.

        KV in host memory is shared, summaries are made anew; either can be closed without the other.

            other = lm.with_config(policy="mean", budget_tokens=256).adopt(document)

        Raises ValueError: the document is closed, is of another model or another memory, or its configuration differs
        in what shaped its sentences and their KV.
        """
        if not isinstance(document, Document):
            raise TypeError(f"adopt takes a Document, got {_describe(document)}; read a text with `read`")
        return document.under(self._engine)

    def open(self, path: str | os.PathLike[str]) -> Document:
        """Take up a document that `Document.save` wrote, without reading it again; its answers are the same.

        What stays on the device is read now; the KV of its sentences comes to host memory when it is first needed, so
        the file has to stay until something was asked of the document.

        Raises:
            SavedFileError: the file is damaged or no saved document; or it belongs to another model, dtype, tokenizer
                or configuration.
            FileNotFoundError, PermissionError: there is no such file, or it may not be read.
        """
        engine = self._engine
        started_at = time.perf_counter()
        contents = open_saved(path, engine.owner, engine.config, engine.policy, engine.memory)
        return Document(engine, contents, time.perf_counter() - started_at)

    def perplexity(
        self,
        text: str,
        *,
        context_tokens: int | None = None,
        stride: int = 512,
        progress: Progress | None = None,
    ) -> Perplexity:
        """Perplexity of a text under the policy, in windows.

        Each window reads `context_tokens` exactly and then scores the next `stride` tokens one by one, as in
        generation: what is measured is decoding. The first `context_tokens` of the text are not scored.

        Args:
            context_tokens: None: 4096, or half the text if that is less.
            stride: tokens scored per window; every window is read afresh, so a smaller stride costs more.
            progress: called with tokens scored and tokens to score.

        Raises ValueError if the text is too short to score anything.
        """
        prompt = self._encode(text)
        total = len(prompt.token_ids)
        if total < 2:
            raise ValueError("the text has one token; perplexity needs at least two")
        context = min(4096, total // 2) if context_tokens is None else context_tokens
        for name, value in (("context_tokens", context), ("stride", stride)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if context >= total:
            raise ValueError(
                f"the text has {total} tokens, all of them context (context_tokens is {context}); "
                "give a longer text or a smaller context_tokens"
            )
        begin_ids = prompt.token_ids[:1] if prompt.token_ids[0] == self.tokenizer.bos_token_id else []
        log_likelihood = 0.0
        for start in range(context, total, stride):
            stop = min(start + stride, total)
            first = start - context
            window = section(prompt, first, stop, begin_ids if first else [])
            scores, _ = self._engine.score(window, num_scored=stop - start)
            log_likelihood += float(scores.sum())
            if progress is not None:
                progress(stop - context, total - context)
        num_tokens = total - context
        return Perplexity(math.exp(-log_likelihood / num_tokens), log_likelihood, num_tokens)

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """How likely a continuation is after a context that is read exactly; its tokens are scored as in generation."""
        if not isinstance(continuation, str) or not continuation:
            raise ValueError(f"continuation must be a non-empty string, got {continuation!r:.80}")
        num_context = len(self._encode(context).token_ids)
        prompt = self._encode(context + continuation)
        if len(prompt.token_ids) < 2:
            raise ValueError(
                f"context {context!r:.40} and continuation {continuation!r:.40} become one token together; give a "
                "longer context, so that there is something to continue"
            )
        num_scored = min(max(len(prompt.token_ids) - num_context, 1), len(prompt.token_ids) - 1)
        scores, greedy = self._engine.score(prompt, num_scored)
        return LogLikelihood(float(scores.sum()), bool(greedy.all()), num_scored)

    def logits(self, text: str, *, context_tokens: int) -> torch.Tensor:
        """What each token after the first `context_tokens` is drawn from, for comparing distributions.

        The context is read exactly, the tokens after it are decoded one by one, as in generation.

        Returns: float32 `[tokens - context_tokens, vocabulary]` on the CPU; row i is of token `context_tokens + i`.
        Raises ValueError unless at least one token is context and one is left.
        """
        prompt = self._encode(text)
        total = len(prompt.token_ids)
        if not isinstance(context_tokens, int) or not 0 < context_tokens < total:
            raise ValueError(
                f"context_tokens must be a whole number from 1 to {total - 1}, one less than the text has tokens, got "
                f"{context_tokens!r}"
            )
        return self._engine.logits(prompt, total - context_tokens).cpu()

    def close(self) -> None:
        """Write cached prompts to `reuse_folder`, if there is one, and let go of them; documents stay as they are."""
        cache = vars(self._engine).pop("prompt_cache", None)
        if cache is not None:
            cache.close()

    def forget(self, namespace: str = DEFAULT_NAMESPACE) -> int:
        """Let go of all prompts that are cached in a namespace, in `reuse_folder` as well; returns how many."""
        cache = self._engine.prompt_cache
        return 0 if cache is None else cache.forget(_checked_name(namespace))

    def _encode(self, prompt: object) -> Prompt:
        if is_chat(prompt):
            return encode_chat(self.tokenizer, prompt, self.config)  # type: ignore[arg-type]
        if isinstance(prompt, str) and not prompt:
            raise ValueError("the prompt is empty; give at least one character")
        return encode(self.tokenizer, prompt, self.config, special_tokens=True)  # type: ignore[arg-type]


def config_from(given: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Config:
    """The configuration of what is given, on top of what `base` gives, with the settings that its policy brings.

    Raises TypeError or ValueError for an unknown setting or policy, a bad value, or one that the policy decides.
    """
    known = [field.name for field in dataclasses.fields(Config)]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}; there are: {', '.join(known)}")
    every = {**(base or {}), **given}
    policy = every.get("policy", Config.policy)
    if not isinstance(policy, str) or not isinstance(every.get("policy_options", {}), Mapping):
        return Config(**every)  # says what is wrong with them
    if isinstance(every.get("reuse_options"), Mapping):
        make_reuse_options(every["reuse_options"])
    settings = policies.load(policy, every.get("policy_options")).settings
    for name, value in settings.items():
        if given.get(name, value) != value:
            raise ValueError(f"policy {policy!r} brings its own {name}, {value}; leave it out or choose another policy")
    return Config(**{**every, **settings})


def _checked_name(namespace: str) -> str:
    if not isinstance(namespace, str) or not namespace or not _is_encodable(namespace):
        raise ValueError(f"namespace must be a non-empty string of whole characters, got {namespace!r:.80}")
    return namespace


def _is_encodable(text: str) -> bool:
    """Not so with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make_memory(config: Config, *, pinned: bool) -> HostMemory:
    return HostMemory(config.host_memory_bytes, pinned=pinned, spill_folder=config.spill_folder)


def _describe(value: object) -> str:
    return type(value).__name__ if not isinstance(value, Sequence) or value else f"an empty {type(value).__name__}"
