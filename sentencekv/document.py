"""A text that was read once, and the streams in which answers come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypedDict

from typing_extensions import Self, Unpack

from sentencekv.disk import Written
from sentencekv.engine import Engine
from sentencekv.generation import Generation
from sentencekv.prompts import encode_appended
from sentencekv.reading import Progress
from sentencekv.sampling import SamplingOptions, make_options
from sentencekv.saved import Contents, save
from sentencekv.session import Session


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

    def drain(self) -> Generation:
        """Generate to the end; returns the finished result."""
        for _ in self:
            pass
        return self.generation


class Document:
    """A text that was read once; every question forks from it and shares its KV.

    `close` (or leaving a `with` block) frees its memory.
    """

    def __init__(self, engine: Engine, contents: Contents, seconds_to_read: float) -> None:
        """Use `LongContextLM.read` or `LongContextLM.open`."""
        self.text = contents.text
        self.seconds_to_read = seconds_to_read
        """What reading it took, or opening its file."""
        self._engine = engine
        self._prompt = contents.prompt
        self._frame = contents.frame
        self._session: Session | None = contents.session

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
        """Host memory that its KV takes; 0 when closed, and for a saved one before anything was asked of it."""
        return self._session.host_bytes if self._session is not None else 0

    def ask(self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]) -> Generation:
        """Answer a question about the document. The question's own tokens attend to all of it, exactly."""
        return self.stream(question, progress=progress, **sampling).drain()

    def stream(
        self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """As `ask`, piece by piece."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"a question must be a non-empty string, got {question!r:.80}")
        appended = self._frame.between + question + self._frame.after
        return self._continue(appended, progress, make_options(sampling))

    def complete(
        self, text: str = "\n", *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Continue the document with `text` appended as it is: no template, no question form."""
        return self._continue(text, progress, make_options(sampling)).drain()

    def _continue(self, text: str, progress: Progress | None, options: SamplingOptions) -> GenerationStream:
        session = self._contents().session
        engine = self._engine
        appended = encode_appended(engine.tokenizer, self._prompt.text, text, engine.config)
        results: list[Generation] = []
        first_char = len(self._frame.before)
        pieces = engine.continue_from(session, self._prompt, first_char, appended, options, progress, results)
        return GenerationStream(pieces, results)

    def save(self, path: str | os.PathLike[str], *, progress: Written | None = None) -> int:
        """Write the document to a file, from which `LongContextLM.open` takes it up without reading it again.

        The file is in the safetensors format; it has checksums, and replaces one of that name only once it is whole.

        Args:
            progress: called with bytes written and bytes in all.

        Returns its bytes. Raises OSError if it cannot be written; ValueError if the document is closed.
        """
        return save(path, self._engine.owner, self._contents(), progress)

    def _contents(self) -> Contents:
        if self._session is None:
            raise ValueError("the document is closed; read it again")
        return Contents(self.text, self._prompt, self._frame, self._session)

    def close(self) -> None:
        """Free the document's memory; answers under way keep what they need until they end. Closing twice is fine."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
