"""LongContextLM and Document: what users call."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, overload

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self, Unpack

from sentencekv import pocket, policies
from sentencekv.attention import check_supported, forward, text_config
from sentencekv.config import Config
from sentencekv.decoding import Decoding, decode
from sentencekv.generation import Generation, LogLikelihood, Perplexity, find_sources, finish
from sentencekv.prompts import Message, Prompt, document_frame, encode, encode_chat, is_chat, section
from sentencekv.reading import Progress, read
from sentencekv.sampling import SamplingOptions
from sentencekv.session import Session
from sentencekv.store import HostMemory

logger = logging.getLogger(__name__)

_CHUNK_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Default `prefill_chunk_tokens`: large enough to fill a GPU; on a CPU small, for steady progress."""


class Sampling(TypedDict, total=False):
    """Keywords of every call that generates; meanings and defaults are those of `SamplingOptions`."""

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: bool


class GenerationStream(Iterator[str]):
    """Pieces of text as they become certain; afterwards `generation` holds the whole result."""

    def __init__(self, pieces: Iterator[tuple[int, str]], results: list[Generation]) -> None:
        self._pieces = pieces
        self._results = results

    def __next__(self) -> str:
        return next(self._pieces)[1]

    @property
    def generation(self) -> Generation:
        """The finished result. Raises RuntimeError while the stream is not exhausted."""
        if not self._results:
            raise RuntimeError("the stream is not finished: iterate over it first")
        return self._results[0]


class LongContextLM:
    """A Hugging Face causal language model that reads long contexts once and fetches, per token, what matters.

    Not thread-safe. The model's own `generate` goes on working as before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        memory: HostMemory,
    ) -> None:
        """Use `from_pretrained` or `from_model`, which check what is given."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._memory = memory
        self._policy = policies.load(config.policy, config.policy_options)
        self._stop_ids = _stop_ids(model, tokenizer)

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
        settings = _make_config(config)
        policies.load(settings.policy, settings.policy_options)
        where = _resolve_device(device)
        wanted_dtype = _resolve_dtype(dtype, where)
        path = os.fspath(name_or_path)
        folder = str(pocket.path()) if path == "pocket" else path
        looks_local = path.startswith((".", "~", os.sep)) or path.count("/") > 1
        if looks_local and not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(
                f"no model folder at {path!r}; give a folder with config.json and weights, a hub name, or 'pocket'"
            )
        folder = str(Path(folder).expanduser()) if looks_local else folder
        try:
            if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
                tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted_dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise OSError(
                f"cannot load a model from {path!r}: {reason}; it must be a folder with config.json, weights and "
                "tokenizer.json, or the name of one on the hub"
            ) from error
        torch.nn.Module.to(model, where)
        return cls._checked(model.eval(), tokenizer, settings)

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **config: Any) -> LongContextLM:
        """Wrap a loaded model, where it is and in its dtype. Raises as `from_pretrained`."""
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
        return cls._checked(model.eval(), tokenizer, _make_config(config))

    @classmethod
    def _checked(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> LongContextLM:
        memory = HostMemory(config.host_memory_bytes, pinned=model.device.type == "cuda")
        lm = cls(model, tokenizer, config, memory)
        check_supported(model)
        return lm

    def with_config(self, **changes: Any) -> LongContextLM:
        """The same model under another configuration, for comparisons; documents are not carried over."""
        config = _make_config(changes, self.config)
        memory = self._memory
        if config.host_memory_bytes != memory.limit_bytes:
            memory = HostMemory(config.host_memory_bytes, pinned=memory.pinned)
        return LongContextLM(self.model, self.tokenizer, config, memory)

    @overload
    def generate(
        self, prompt: str | Sequence[Message], *, progress: Progress | None = ..., **sampling: Unpack[Sampling]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str], *, progress: Progress | None = ..., **sampling: Unpack[Sampling]
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[Message],
        *,
        progress: Progress | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generation | list[Generation]:
        """Read a prompt exactly and continue it under the budget.

        Args:
            prompt: a text (continued as it is), chat messages (rendered by the chat template), or a list of texts,
                which are generated together as a batch of any lengths.
            progress: called with tokens read and tokens in all.
            sampling: see `SamplingOptions`.

        Returns: one `Generation`, or a list for a list of texts.
        """
        options = SamplingOptions(**sampling)
        if isinstance(prompt, str) or is_chat(prompt):
            results: list[Generation] = []
            for _ in self._generate([self._encode(prompt)], options, progress, results):
                pass
            return results[0]
        if not isinstance(prompt, Sequence) or not prompt:
            raise TypeError(f"a prompt must be a string, a list of strings or chat messages, got {_describe(prompt)}")
        results = []
        for _ in self._generate([self._encode(text) for text in prompt], options, progress, results):
            pass
        return results

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        progress: Progress | None = None,
        **sampling: Unpack[Sampling],
    ) -> GenerationStream:
        """As `generate` for one prompt, piece by piece; the prompt is read when the first piece is asked for."""
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise TypeError(f"stream takes one string or chat messages, got {_describe(prompt)}")
        results: list[Generation] = []
        pieces = self._generate([self._encode(prompt)], SamplingOptions(**sampling), progress, results)
        return GenerationStream(pieces, results)

    def read(self, text: str, *, chat: bool | None = None, progress: Progress | None = None) -> Document:
        """Read a document once; many questions can be asked of it.

        Args:
            text: the document.
            chat: put document and question in one user turn of the tokenizer's chat template; None: if it has one.
            progress: called with tokens read and tokens in all.

        Raises:
            TypeError, ValueError: not a text, empty, or longer than the model's positions.
            MemoryError: its KV does not fit in host memory; known before reading starts.
        """
        frame = document_frame(self.tokenizer, chat=chat)
        if not isinstance(text, str):
            raise TypeError(f"a document must be a string, got {_describe(text)}")
        if not text.strip():
            raise ValueError("the document is empty; give a text with at least one word")
        started_at = time.perf_counter()
        prompt = encode(self.tokenizer, frame.before + text, self.config, special_tokens=frame.special_tokens)
        self._check_fits([prompt], new_tokens=0)
        session = self._session()
        read(self.model, [session], [prompt], chunk_tokens=self._chunk_tokens, progress=progress)
        return Document(self, text, prompt, len(frame.before), session, time.perf_counter() - started_at, chat)

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
            scores, _ = self._score(window, num_scored=stop - start)
            log_likelihood += float(scores.sum())
            if progress is not None:
                progress(stop - context, total - context)
        num_tokens = total - context
        return Perplexity(float(torch.tensor(-log_likelihood / num_tokens).exp()), log_likelihood, num_tokens)

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """How likely a continuation is after a context that is read exactly; its tokens are scored as in generation."""
        if not isinstance(continuation, str) or not continuation:
            raise ValueError(f"continuation must be a non-empty string, got {continuation!r:.80}")
        num_context = len(self._encode(context).token_ids)
        prompt = self._encode(context + continuation)
        num_scored = max(len(prompt.token_ids) - num_context, 1)
        scores, greedy = self._score(section(prompt, 0, len(prompt.token_ids), []), num_scored)
        return LogLikelihood(float(scores.sum()), bool(greedy.all()), num_scored)

    def _score(self, prompt: Prompt, num_scored: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of a prompt's last tokens, and whether each is the greedy choice."""
        self._check_fits([prompt], new_tokens=0)
        session = self._session()
        first = len(prompt.token_ids) - num_scored
        context, scored = section(prompt, 0, first, []), prompt.token_ids[first:]
        logits = [read(self.model, [session], [context], chunk_tokens=self._chunk_tokens)]
        session.expect([end for end in prompt.ends if end > first])
        if self._policy.reads == "everything" and len(scored) > 1:
            logits.append(forward(self.model, [scored[:-1]], [session], exact=True, all_logits=True))
        else:
            logits += [forward(self.model, [[token]], [session], exact=False) for token in scored[:-1]]
        logits_LV = torch.cat(logits)
        if torch.isnan(logits_LV).any():
            raise FloatingPointError(
                "the model's logits are NaN; its weights or its precision are broken: try dtype='float32'"
            )
        target = torch.tensor(scored, device=logits_LV.device)
        scores = logits_LV.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        return scores.double().cpu(), (logits_LV.argmax(dim=-1) == target).cpu()

    def _generate(
        self,
        prompts: list[Prompt],
        options: SamplingOptions,
        progress: Progress | None,
        results: list[Generation],
    ) -> Iterator[tuple[int, str]]:
        started_at = time.perf_counter()
        self._check_fits(prompts, options.max_new_tokens)
        sessions = [self._session() for _ in prompts]
        logits = read(self.model, sessions, prompts, chunk_tokens=self._chunk_tokens, progress=progress)
        decodings = [self._decoding(s, p.token_ids, options) for s, p in zip(sessions, prompts, strict=True)]
        yield from decode(self.model, decodings, logits)
        for decoding, prompt in zip(decodings, prompts, strict=True):
            sources = find_sources(decoding, prompt, 0)
            results.append(finish(decoding, sources, context_tokens=len(prompt.token_ids), started_at=started_at))

    def _decoding(self, session: Session, context_ids: Sequence[int], options: SamplingOptions) -> Decoding:
        return Decoding(session, context_ids, self.tokenizer, options, self._stop_ids)

    def _session(self) -> Session:
        return Session(self.config, self._policy, self._memory, self.model.device)

    def _encode(self, prompt: object) -> Prompt:
        if is_chat(prompt):
            return encode_chat(self.tokenizer, prompt, self.config)  # type: ignore[arg-type]
        if isinstance(prompt, str) and not prompt:
            raise ValueError("the prompt is empty; give at least one character")
        return encode(self.tokenizer, prompt, self.config, special_tokens=True)  # type: ignore[arg-type]

    @property
    def _chunk_tokens(self) -> int:
        return self.config.prefill_chunk_tokens or _CHUNK_TOKENS[self.model.device.type]

    @property
    def max_positions(self) -> int | None:
        """The most tokens that the model can see, context and generation together; None if it does not say."""
        return getattr(text_config(self.model), "max_position_embeddings", None)

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that one context token leaves in host memory, over all layers that retrieve."""
        config = text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        num_layers = sum(kind != "sliding_attention" for kind in kinds)
        return num_layers * heads * 2 * head_dim * self.model.dtype.itemsize

    def _check_fits(self, prompts: Sequence[Prompt], new_tokens: int, before: int = 0) -> None:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if longest == 0:
            raise ValueError("the prompt has no tokens; give at least one character that the tokenizer knows")
        needed = before + longest + new_tokens
        if self.max_positions is not None and needed > self.max_positions:
            asked = f" and {new_tokens} more are to be generated" if new_tokens else ""
            remedy = "shorten the text" + (" or lower max_new_tokens" if new_tokens else "")
            raise ValueError(
                f"the prompt has {before + longest} tokens{asked}; the model has positions for {self.max_positions}: "
                f"{remedy}, or use a model with a longer context"
            )
        self._memory.check(sum(len(prompt.token_ids) for prompt in prompts) * self.kv_bytes_per_token())


class Document:
    """A text that was read once; every question forks from it and shares its KV.

    `close` (or leaving a `with` block) frees its memory.
    """

    def __init__(
        self,
        lm: LongContextLM,
        text: str,
        prompt: Prompt,
        first_char: int,
        session: Session,
        seconds_to_read: float,
        chat: bool | None,
    ) -> None:
        """Use `LongContextLM.read`."""
        self.text = text
        self.seconds_to_read = seconds_to_read
        self._lm = lm
        self._prompt = prompt
        self._first_char = first_char
        self._session: Session | None = session
        self._frame = document_frame(lm.tokenizer, chat=chat)

    @property
    def num_tokens(self) -> int:
        """Context tokens, those of the template before the document included."""
        return len(self._prompt.token_ids)

    @property
    def num_sentences(self) -> int:
        """Sentences that the document was cut into."""
        return len(self._prompt.ends)

    @property
    def kv_host_bytes(self) -> int:
        """Host memory that its KV takes; 0 when closed."""
        return self._session.host_bytes if self._session is not None else 0

    def ask(self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]) -> Generation:
        """Answer a question about the document. The question's own tokens attend to all of it, exactly."""
        stream = self.stream(question, progress=progress, **sampling)
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """As `ask`, piece by piece."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"a question must be a non-empty string, got {question!r:.80}")
        return self._stream(self._frame.between + question + self._frame.after, progress, SamplingOptions(**sampling))

    def complete(
        self, text: str = "\n", *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Continue the document with `text` appended as it is: no template, no question form."""
        stream = self._stream(text, progress, SamplingOptions(**sampling))
        for _ in stream:
            pass
        return stream.generation

    def _stream(self, appended: str, progress: Progress | None, options: SamplingOptions) -> GenerationStream:
        self._open_session()
        results: list[Generation] = []
        return GenerationStream(self._pieces(appended, progress, options, results), results)

    def _pieces(
        self, appended: str, progress: Progress | None, options: SamplingOptions, results: list[Generation]
    ) -> Iterator[tuple[int, str]]:
        started_at = time.perf_counter()
        lm = self._lm
        prompt = encode(lm.tokenizer, appended, lm.config, special_tokens=False)
        lm._check_fits([prompt], options.max_new_tokens, before=self.num_tokens)
        session = self._open_session().fork()
        logits = read(lm.model, [session], [prompt], chunk_tokens=lm._chunk_tokens, progress=progress)
        context_ids = self._prompt.token_ids + prompt.token_ids
        decoding = lm._decoding(session, context_ids, options)
        yield from decode(lm.model, [decoding], logits)
        sources = find_sources(decoding, self._prompt, self._first_char)
        results.append(finish(decoding, sources, context_tokens=len(context_ids), started_at=started_at))

    def _open_session(self) -> Session:
        if self._session is None:
            raise ValueError("the document is closed; read it again")
        return self._session

    def close(self) -> None:
        """Free the document's memory; answers under way keep what they need until they end. Closing twice is fine."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_config(given: dict[str, Any], base: Config | None = None) -> Config:
    known = [field.name for field in dataclasses.fields(Config)]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}; there are: {', '.join(known)}")
    return Config(**given) if base is None else dataclasses.replace(base, **given)


def _resolve_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<n>', got {device!r}") from None
    if resolved.type not in _CHUNK_TOKENS:
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} was asked for and torch sees {torch.cuda.device_count()} CUDA devices; use "
            "device='cpu', or install a CUDA build of torch and a driver"
        )
    return resolved


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return named


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collection[int]:
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ids = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def _describe(value: object) -> str:
    return type(value).__name__ if not isinstance(value, Sequence) or value else f"an empty {type(value).__name__}"
