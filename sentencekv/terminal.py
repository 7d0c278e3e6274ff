"""What the command line shows: progress while reading, answers with their sources, costs and tables.

Knows results and terminals; nothing of models or of how an answer comes about.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from sentencekv.units import format_bytes, format_seconds

if TYPE_CHECKING:
    # Only for their types: this module is part of every start of the command line, torch need not be.
    from sentencekv import Config, Generation, GenerationStream, Source, Stats
    from sentencekv.demo import Summary, Verdict
    from sentencekv.files import LoadedText
    from sentencekv.reuse.report import Reuse

MAX_WIDTH = 100
"""Lines longer than this are hard to read, however wide the terminal."""


_SHOWN_SOURCES = 5


def make_console(*, stderr: bool = False) -> Console:
    """A console for standard output or error: no markup, no guessing at highlights, no control codes in a pipe."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if console.width > MAX_WIDTH:
        console.width = MAX_WIDTH
    return console


def printable(text: str) -> str:
    """Text without control characters other than newline and tab, so that it cannot steer a terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() or char.isspace() else "\ufffd" for char in text)


def one_line(text: str) -> str:
    """Text on one line, white space collapsed, control characters replaced."""
    return " ".join(printable(text).split())


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_pace(seconds_to_first_token: float, seconds_per_token: float | None) -> str:
    first = f"first token {format_seconds(seconds_to_first_token)}"
    return first if seconds_per_token is None else f"{first}, then {format_seconds(seconds_per_token)} each"


def format_reach(stats: Stats, config: Config) -> str:
    """How much of the context one KV head reads at one step, in words."""
    from sentencekv.policies import policy_class  # not above, since it imports torch

    reads = policy_class(stats.policy).reads
    most = {
        "everything": stats.context_tokens,
        "selected": config.budget_tokens,
        "recent": config.sink_tokens + config.window_tokens,
    }[reads]
    if most >= stats.context_tokens:
        return f"all {stats.context_tokens:,} tokens per head"
    return f"{most:,} of {stats.context_tokens:,} tokens per head"


class _Rate(ProgressColumn):
    def __init__(self, noun: str) -> None:
        super().__init__()
        self._noun = noun

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} {self._noun}/s", style="dim")


class ReadingProgress:
    """Progress while a text is read: a bar on a terminal, else a line for every tenth.

    Call it with tokens read and tokens in all; afterwards `num_tokens` and `seconds` say what the reading came to.

    Args:
        doing, noun: of other work, what it is and what it counts in place of tokens.
        patience: seconds that pass before the first line.
    """

    def __init__(self, console: Console, doing: str = "reading", noun: str = "tokens", patience: float = 0.0) -> None:
        self._console = console
        self._doing, self._noun, self._patience = doing, noun, patience
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tenths = 0
        self._started_at = 0.0
        self.num_tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._started_at = time.perf_counter()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn(self._doing),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.completed:,}/{task.total:,} " + self._noun),
                _Rate(self._noun),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.num_tokens = done
        self.seconds = time.perf_counter() - self._started_at
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._doing, total=total)
            self._bar.update(self._task, completed=done)
        elif (tenths := 10 * done // max(total, 1)) > self._tenths and self.seconds >= self._patience:
            self._tenths = tenths
            share = f"{done:,} of {total:,} {self._noun}"
            self._console.print(f"{self._doing}: {10 * tenths}% ({share}, {self._rate})", style="dim")

    @property
    def _rate(self) -> str:
        return f"{self.num_tokens / max(self.seconds, 1e-9):,.0f} {self._noun}/s"

    def report(self) -> str:
        """What the reading came to, in one phrase."""
        return f"{self.num_tokens:,} tokens in {format_seconds(self.seconds)} ({self._rate})"


def show(console: Console, renderable: RenderableType) -> None:
    """Print; into a file or a pipe without the blanks that fill a table's lines."""
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as captured:
        console.print(renderable)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    console.file.flush()


def key_values(rows: Iterable[tuple[str, RenderableType]]) -> RenderableType:
    """Names on the left, values on the right."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return Padding(grid, (0, 0, 0, 2))


def sources_table(
    sources: Sequence[Source],
    place: Callable[[Source], str],
    *,
    is_marked: Callable[[Source], bool] = lambda _source: False,
) -> RenderableType:
    """Sentences that were read: the share of attention each got, its place, its text; marked ones stand out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for source in sources:
        text = Text(one_line(source.text))
        if is_marked(source):
            text = Text.assemble(("the fact: ", "green"), (text.plain, "bold"))
        grid.add_row(f"{100 * source.share:.1f}%", place(source), text)
    return grid


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_answer(stream: GenerationStream) -> Generation:
    """Write an answer piece by piece as it comes; raw into a pipe, harmless on a terminal."""
    clean: Callable[[str], str] = printable if sys.stdout.isatty() else str
    begun = False
    for piece in stream:
        # Models like to begin with a blank; nobody wants to read it.
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        write(clean(piece))
    write("\n")
    return stream.generation


def sources_list(generation: Generation, loaded: LoadedText) -> RenderableType:
    """The sentences that an answer was read from, with their places in the user's files."""
    if not generation.sources:
        return Text("no sentence was fetched: what is always read was enough", style="dim")

    def place(source: Source) -> str:
        if source.start >= len(loaded.text):
            return "said before"
        name, line = loaded.place(source.start)
        if name is not None:
            return f"{one_line(name)}:{line}"
        return f"{100 * source.start // len(loaded.text)}% in, line {line:,}"

    heading = Text("read most, by share of attention:", style="dim")
    fetched = sum(source.share for source in generation.sources)
    rest = Text(
        f"all fetched sentences {100 * fetched:.1f}%; the rest went to the text's first and last tokens, the question "
        "and the answer, which are always read",
        style="dim",
    )
    return Group(heading, sources_table(generation.sources[:_SHOWN_SOURCES], place), rest)


def reuse_line(reuse: Reuse) -> str:
    """What of a prompt came from a cached one, in one phrase."""
    if reuse.kind == "none":
        return f"reused nothing: {reuse.reason}"
    saved = ""
    if reuse.seconds_saved is not None and reuse.seconds_saved > 0:
        saved = f"; saved about {format_seconds(reuse.seconds_saved)}"
    if reuse.kind == "same":
        again = f"reused all {plural(reuse.prompt_tokens, 'token')}: the same text was read before"
        return f"{again}, as an approximation{saved}" if reuse.approximate else again + saved
    share = f"{reuse.reused_tokens:,} of {plural(reuse.prompt_tokens, 'token')}"
    if reuse.kind == "prefix":
        return f"reused the first {share}, computed {reuse.computed_tokens:,}{saved}"
    error = "" if reuse.estimated_error is None else f", estimated error {100 * reuse.estimated_error:.1f}%"
    moved = f" ({reuse.moved_tokens:,} moved)" if reuse.moved_tokens else ""
    return (
        f"reused {share} of a similar text{moved}, computed {reuse.computed_tokens:,}: an approximation{error}{saved}"
    )


def cost_lines(stats: Stats, config: Config, reuse: Reuse | None = None) -> RenderableType:
    """What one answer read, how fast, and what its KV takes: two dim lines, and one more for what was reused."""
    pace = format_pace(stats.seconds_to_first_token, stats.seconds_per_token)
    kv = (
        f"KV {format_bytes(stats.kv_gpu_bytes)} on the device + {format_bytes(stats.kv_host_bytes)} on the host; "
        f"dense {format_bytes(stats.kv_dense_bytes)}"
    )
    reused = "" if reuse is None else f"\n{reuse_line(reuse)}"
    return Text(f"{format_reach(stats, config)}; {pace}\n{kv}{reused}", style="dim")


def stats_table(stats: Stats, config: Config, reuse: Reuse | None = None) -> RenderableType:
    """Everything that one answer cost."""
    rate = "nothing was selected" if stats.hot_hit_rate is None else f"{100 * stats.hot_hit_rate:.1f}%"
    return key_values(
        [
            *([] if reuse is None else [("the text", reuse_line(reuse))]),
            ("policy", stats.policy),
            ("read", format_reach(stats, config)),
            ("sentences", f"{stats.sentences:,}"),
            ("answer", plural(stats.generated_tokens, "token")),
            ("pace", format_pace(stats.seconds_to_first_token, stats.seconds_per_token)),
            ("KV on the device", format_bytes(stats.kv_gpu_bytes)),
            ("KV on the host", format_bytes(stats.kv_host_bytes)),
            ("dense KV", f"{format_bytes(stats.kv_dense_bytes)}, all on the device"),
            ("hot set", f"{rate} of the selected sentences were there already"),
            ("fetched", f"{stats.tokens_fetched:,} tokens from the host, over all layers and KV heads"),
        ]
    )


def verdict_block(number: int, total: int, verdict: Verdict, text_chars: int, config: Config) -> RenderableType:
    """One of the demonstration's answers: question, answer, judgement, sentences read, cost."""
    generation = verdict.generation
    answer = one_line(generation.text) or "(no words)"
    judged = ("  right", "bold green") if verdict.right else ("  WRONG", "bold red")
    said = Table.grid(padding=(0, 2))
    said.add_column(no_wrap=True)
    said.add_column(overflow="fold")
    said.add_row("answer", Text.assemble((answer, "bold"), judged))
    if not verdict.right:
        said.add_row("wanted", Text(verdict.fact.answer, style="bold"))
    body: list[RenderableType] = [said]
    if generation.sources:
        body.append(
            sources_table(
                generation.sources[:3],
                lambda source: f"{100 * source.start // text_chars}% in, at {source.start:,}",
                is_marked=verdict.is_the_fact,
            )
        )
    else:
        body.append(Text("no sentence was fetched: what is always read was enough", style="dim"))
    body.append(cost_lines(generation.stats, config))
    question = Text.assemble((f"{number} of {total}  ", "dim"), (one_line(verdict.fact.question), "bold"))
    return Group(question, Padding(Group(*body), (0, 0, 1, 2)))


def summary_block(summary: Summary, reading: str, reach: str, tiers: str) -> RenderableType:
    """What the demonstration came to."""
    all_right = summary.num_right == summary.num_facts
    hit_rate = "nothing was selected" if summary.hot_hit_rate is None else f"hit rate {100 * summary.hot_hit_rate:.0f}%"
    kv_gpu, kv_host, kv_dense = (
        format_bytes(each) for each in (summary.kv_gpu_bytes, summary.kv_host_bytes, summary.kv_dense_bytes)
    )
    share = summary.kv_gpu_bytes / summary.kv_dense_bytes
    return Group(
        Text(f"{summary.num_right} of {summary.num_facts} right", style="bold green" if all_right else "bold red"),
        key_values(
            [
                ("reading", reading),
                ("answers", f"{format_pace(summary.seconds_to_first_token, summary.seconds_per_token)} (medians)"),
                ("read", reach),
                ("KV", f"{kv_gpu} on the device, {kv_host} on the host; dense {kv_dense}"),
                ("", f"{share:.0%} of dense on the device ({tiers})"),
                ("hot set", hit_rate),
            ]
        ),
    )
