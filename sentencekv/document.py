"""A text that was read once, and the streams in which answers come."""

from __future__ import annotations

import os
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from typing_extensions import Self, Unpack

from sentencekv.decoding import Decoding
from sentencekv.disk import Written
from sentencekv.engine import Engine
from sentencekv.generation import Generation
from sentencekv.prompts import Prompt, encode_appended, generated, section
from sentencekv.reading import Progress
from sentencekv.reuse.report import Reuse
from sentencekv.sampling import SamplingOptions, make_options
from sentencekv.saved import Contents, move_to_disk, save


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

    def __init__(self, engine: Engine, contents: Contents, seconds_to_read: float, reuse: Reuse | None = None) -> None:
        """Use `LongContextLM.read` or `LongContextLM.open`."""
        self.seconds_to_read = seconds_to_read
        """What reading it took, or opening its file."""
        self.reuse = reuse
        """What of it came from a cached prompt when it was read; None with `reuse="off"`, and for one from a file."""
        self._engine = engine
        self._contents = contents
        self._closed = False
        self.last_used_at = time.monotonic()
        """By `time.monotonic`; of several documents, the one not used for longest is moved to disk first."""
        engine.memory.register(self)

    def _open(self) -> Contents:
        if self._closed:
            raise ValueError("the document is closed; read it again")
        self.last_used_at = time.monotonic()
        return self._contents

    @property
    def text(self) -> str:
        """The document's text, with all that was appended."""
        return self._contents.text

    @property
    def num_tokens(self) -> int:
        """Context tokens, those of the template before the document included."""
        return len(self._contents.prompt.token_ids)

    @property
    def num_sentences(self) -> int:
        """Sentences that the document was cut into."""
        return len(self._contents.prompt.ends)

    @property
    def kv_host_bytes(self) -> int:
        """Host memory that its KV takes; 0 when closed, and for a saved one before anything was asked of it."""
        return self._contents.session.host_bytes

    @property
    def name(self) -> str:
        """Its first words, for messages; not where prompts of others are cached, who may read the messages."""
        if self._engine.config.reuse != "off":
            return f"a document of {len(self._contents.prompt.token_ids):,} tokens"
        return repr(textwrap.shorten(self.text[:200], 40, placeholder="..."))

    @property
    def can_move(self) -> bool:
        """Whether its KV is in host memory, all of it, and no answer and no append that needs it is under way."""
        return not self._closed and self._contents.session.can_move

    def move_to_disk(self, folder: Path) -> None:
        """Keep the KV of its sentences in a file without a name; it comes back when something is asked.

        Called when host memory is short, see `Config.spill_folder`. Raises OSError if it cannot be written; the
        document is then as it was.
        """
        move_to_disk(folder / f"{uuid.uuid4().hex}.spilled", self._engine.owner, self._contents)

    def ask(self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]) -> Generation:
        """Answer a question about the document. The question's own tokens attend to all of it, exactly."""
        return self.stream(question, progress=progress, **sampling).drain()

    def stream(
        self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """As `ask`, piece by piece."""
        frame = self._open().frame
        return self._continue(frame.between + _checked(question) + frame.after, progress, make_options(sampling))

    def complete(
        self, text: str = "\n", *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Continue the document with `text` appended as it is: no template, no question form."""
        return self._continue(text, progress, make_options(sampling)).drain()

    def _continue(self, text: str, progress: Progress | None, options: SamplingOptions) -> GenerationStream:
        engine, (_, prompt, frame, session) = self._engine, self._open()
        appended = encode_appended(engine.tokenizer, prompt.text, text, engine.config)
        results: list[Generation] = []

        def done(_: Decoding, generation: Generation) -> None:
            results.append(generation)

        pieces = engine.continue_from(session, prompt, len(frame.before), appended, options, progress, done)
        return GenerationStream(pieces, results)

    def chat(self) -> Conversation:
        """A conversation about the document: each question is asked after the ones before it and their answers.

        Raises ValueError if the tokenizer's chat template allows one question only, or rewrites what was said before.
        """
        return Conversation(self, self._engine, self._open())

    def append(self, text: str, *, progress: Progress | None = None) -> None:
        """Add text at the document's end; what was read before is not read again.

        Conversations and forks that were started before do not see it. If it fails or is interrupted, the document is
        what it was.

        Raises as `LongContextLM.read`, and ValueError if the document is closed.
        """
        if not isinstance(text, str) or not text:
            raise ValueError(f"what is appended must be a non-empty string, got {text!r:.80}")
        engine, contents = self._engine, self._open()
        appended = encode_appended(engine.tokenizer, contents.prompt.text, text, engine.config)
        session, _ = engine.append(contents.session, contents.prompt, appended, progress)
        session.join_extents()
        if self._contents is not contents:
            raise RuntimeError("the document was closed or appended to while this text was read; append it again")
        self._contents = Contents(contents.text + text, contents.prompt.followed_by(appended), contents.frame, session)

    def fork(self) -> Document:
        """The same document once more, sharing what was read; what is appended to one, the other does not see."""
        contents = self._open()
        forked = contents._replace(session=contents.session.fork())
        return Document(self._engine, forked, self.seconds_to_read, self.reuse)

    def under(self, engine: Engine) -> Document:
        """See `LongContextLM.adopt`."""
        contents = self._open()
        if engine.model is not self._engine.model or engine.memory is not self._engine.memory:
            raise ValueError(
                "the document was read by another LongContextLM; adopt it with one that its own made: "
                "lm.with_config(...).adopt(document), with the same bound of host memory"
            )
        started_at = time.perf_counter()
        session = engine.adopt(contents.session)
        return Document(engine, contents._replace(session=session), time.perf_counter() - started_at, self.reuse)

    def save(self, path: str | os.PathLike[str], *, progress: Written | None = None) -> int:
        """Write the document to a file, from which `LongContextLM.open` takes it up without reading it again.

        The file is in the safetensors format; it has checksums, and replaces one of that name only once it is whole.

        Args:
            progress: called with bytes written and bytes in all.

        Returns its bytes. Raises OSError if it cannot be written; ValueError if the document is closed, or if its KV is
        an approximation (`reuse="similar"`), which a file would hand on as if it were not.
        """
        if self.reuse is not None and self.reuse.approximate:
            raise ValueError(
                "the document's KV is an approximation made from a similar text (reuse='similar'); to save it, read it "
                "with reuse='exact' or 'off'"
            )
        return save(path, self._engine.owner, self._open(), progress)

    def close(self) -> None:
        """Free the document's memory; answers under way keep what they need until they end. Closing twice is fine."""
        self._closed = True
        self._contents = self._contents._replace(session=self._engine.session())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Conversation:
    """Questions about a document, each asked after the ones before it and their answers. Use `Document.chat`.

    Nothing is read twice: a question's tokens and those of its answer stay, a stop string and what came with it too. An
    answer whose stream was not read to its end is not part of the conversation, and neither is its question.
    """

    def __init__(self, document: Document, engine: Engine, contents: Contents) -> None:
        if contents.frame.next is None:
            raise ValueError(
                "the tokenizer's chat template allows one question only, or rewrites what was said before, so a "
                "conversation cannot go on from what was read; ask single questions, or read with chat=False"
            )
        self._document = document
        """Most of what the conversation reads is the document's: as long as it is there, that can be moved to disk."""
        self._engine = engine
        self._contents = contents
        self._num_answers = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the document and of all that was said about it."""
        return len(self._contents.prompt.token_ids)

    def ask(self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]) -> Generation:
        """Answer the next question. Characters of `sources` count from the document's beginning, through all turns."""
        return self.stream(question, progress=progress, **sampling).drain()

    def stream(
        self, question: str, *, progress: Progress | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """As `ask`, piece by piece; the question is asked when the first piece is.

        Raises RuntimeError at its end if another question was answered meanwhile: this one is then not remembered.
        """
        results: list[Generation] = []
        return GenerationStream(self._pieces(_checked(question), progress, make_options(sampling), results), results)

    def _pieces(
        self, question: str, progress: Progress | None, options: SamplingOptions, results: list[Generation]
    ) -> Iterator[tuple[int, str]]:
        engine, contents = self._engine, self._contents
        frame, before = contents.frame, contents.prompt
        self._document.last_used_at = time.monotonic()
        between = frame.next if self._num_answers else frame.between
        assert between is not None
        asked = encode_appended(engine.tokenizer, before.text, between + question + frame.after, engine.config)
        prompt = before.followed_by(asked)

        def done(decoding: Decoding, generation: Generation) -> None:
            if self._contents is not contents:
                raise RuntimeError("another question was answered meanwhile; ask one after the other")
            self._remember(prompt, decoding)
            results.append(generation)

        # The last token of an answer was drawn and not read: it is read with the next question.
        num_read = contents.session.num_tokens
        read, unread = section(prompt, 0, num_read, []), section(prompt, num_read, len(prompt.token_ids), [])
        session, first_char = contents.session, len(frame.before)
        yield from engine.continue_from(session, read, first_char, unread, options, progress, done)

    def _remember(self, prompt: Prompt, decoding: Decoding) -> None:
        engine = self._engine
        said = decoding.token_ids[:-1] if decoding.drew_stop_id else decoding.token_ids
        decoding.end_sentence()
        decoding.session.join_extents()
        whole = prompt.followed_by(generated(engine.tokenizer, said, prompt.token_ids, engine.config))
        self._contents = self._contents._replace(prompt=whole, session=decoding.session)
        self._num_answers += 1


def _checked(question: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"a question must be a non-empty string, got {question!r:.80}")
    return question
