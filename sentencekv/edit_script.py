"""An explanation of reuse as a terminal shows it: what becomes of each part of two prompts, and what that saves.

Every kind of token has a colour and a sign; where there are no colours, signs stand around the text instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sentencekv.explain import KINDS, Explanation, Kind, Outcome, Run, Trial, text_of
from sentencekv.reuse.edit import Operation
from sentencekv.terminal import key_values, one_line, plural, printable, reuse_line
from sentencekv.units import format_seconds

_LEFT_OUT = " ... "
_TEXT_CHARS: dict[bool, int] = {True: 160, False: 480}
"""Characters shown of a run of text, half of them its first: of one that is reused, and of any other."""
_ROWS = 30
"""Operations listed."""


class _Look(NamedTuple):
    sign: str
    style: str
    marks: tuple[str, str]
    """Around the text, where there are no colours."""
    meaning: str


_LOOKS: dict[Kind, _Look] = {
    "prefix": _Look("=", "green", ("", ""), "both begin with it: taken as it is, exactly"),
    "kept": _Look(":", "cyan", ("{:", ":}"), "after a change, at its old place: taken as it is"),
    "moved": _Look(">", "bright_blue", ("{>", "<}"), "at another place: taken, keys turned to the new position"),
    "fuzzy": _Look("?", "italic yellow", ("{?", "?}"), "like what A has: takes that token's KV"),
    "again": _Look("~", "yellow", ("{~", "~}"), "in A too, but computed: the first of a run, and the last of B"),
    "new": _Look("+", "bold magenta", ("{+", "+}"), "not in A: computed"),
    "gone": _Look("-", "strike red", ("[-", "-]"), "in A only"),
}
_SIGN_STYLES = {kind: look.style.replace("strike ", "").replace("italic ", "") for kind, look in _LOOKS.items()}
_KIND_OF_OPERATION: dict[str, Kind] = {
    "keep": "kept",
    "move": "moved",
    "fuzzy": "fuzzy",
    "insert": "new",
    "replace": "new",
    "delete": "gone",
}


class _Excerpt:
    """Texts on one line, each with its middle left out where there is no room."""

    def __init__(self, *parts: tuple[str, str]) -> None:
        """`parts`: texts and their styles."""
        self._parts = [(one_line(text) or (ascii(text) if text else "(no characters)"), style) for text, style in parts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        arrow = " -> "
        room = options.max_width - len(arrow) * (len(self._parts) - 1)
        lengths = [cell_len(text) for text, _ in self._parts]
        # What a short one does not need, the other gets.
        fair = room // len(self._parts)
        spare = sum(max(fair - length, 0) for length in lengths)
        shown = [
            (_without_middle(text, max(min(length, fair + spare), 1)), style)
            for (text, style), length in zip(self._parts, lengths, strict=True)
        ]
        pieces: list[tuple[str, str]] = [piece for each in shown for piece in (each, (arrow, "dim"))]
        yield Text.assemble(*pieces[:-1], no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        wanted = sum(cell_len(text) for text, _ in self._parts) + 4 * (len(self._parts) - 1)
        return Measurement(min(wanted, 16), wanted).clamp(max_width=options.max_width)


def _without_middle(text: str, width: int) -> str:
    """Text in so many terminal cells, its two ends."""
    if cell_len(text) <= width:
        return text
    room = max(width - len(_LEFT_OUT), 0)
    last = room // 2
    tail = text[len(text) - last :] if last else ""
    while cell_len(tail) > last:
        tail = tail[1:]
    return set_cell_size(text, room - last) + _LEFT_OUT[:width] + tail


class _Map:
    """One prompt from its first token to its last as one line, each cell with the sign of most of its tokens."""

    def __init__(self, code_T: np.ndarray) -> None:
        self._code_T = code_T

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cuts = np.linspace(0, len(self._code_T), min(options.max_width, len(self._code_T)) + 1).astype(int)
        line = Text(no_wrap=True)
        for start, stop in itertools.pairwise(cuts.tolist()):
            kind = KINDS[int(np.bincount(self._code_T[start:stop]).argmax())]
            line.append(_LOOKS[kind].sign, style=_SIGN_STYLES[kind])
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(16, options.max_width), options.max_width)


def explanation_block(
    explanation: Explanation, names: Sequence[str], *, full: bool = False, trial: Trial | None = None
) -> RenderableType:
    """All of it: both prompts at a glance, what the signs mean, the operations, the new text, and what is computed.

    Args:
        names: of the cached prompt and of the new one.
        full: long runs and long lists are not shortened.
    """
    parts: list[RenderableType] = [_overview(explanation, names), Text()]
    if (warning := _not_reused(explanation)) is not None:
        parts[:0] = [Text(warning, style="yellow"), Text()]
    parts += [_heading(f"{plural(len(explanation.operations), 'operation')} from A to B"), _script(explanation, full)]
    parts += [Text(), _heading("the text of B"), _NewText(explanation, full), Text()]
    parts += [_heading("reading B with A cached"), _outcomes(explanation)]
    if trial is not None:
        parts += [Text(), _heading("tried out"), _trial(explanation, trial)]
    return Group(*parts)


def _not_reused(explanation: Explanation) -> str | None:
    """What of the picture will not be so."""
    if explanation.similar.kind == "none":
        return "This is what A and B share; none of it will be reused: see the end."
    if explanation.similar.kind == "prefix" and len(explanation.alignment.matches) > 1:
        return "This is what A and B share; only the beginning of both will be reused: see the end."
    return None


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _overview(explanation: Explanation, names: Sequence[str]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for letter, name, role, code_T in (
        ("A", names[0], "cached", explanation.donor_code_T),
        ("B", names[1], "to be read", explanation.code_T),
    ):
        size = f", {plural(len(code_T), 'token')}"
        grid.add_row(letter, Text.assemble(one_line(name), (f"{size}, {role}", "dim")))
        grid.add_row("", _Map(code_T))
    return Group(grid, Text(), _legend(explanation))


def _legend(explanation: Explanation) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    total = explanation.alignment.num_tokens
    for kind, count in explanation.counts().items():
        if count:
            share = Text("" if kind == "gone" else _share(count, total), style="dim")
            look, style = _LOOKS[kind], _SIGN_STYLES[kind]
            grid.add_row(Text(f"{look.sign} {kind}", style=style), f"{count:,}", share, Text(look.meaning, style="dim"))
    return Padding(grid, (0, 0, 0, 3))


def _share(count: int, total: int) -> str:
    return "<1%" if 0 < count < 0.005 * total else f"{count / total:.0%}"


def _script(explanation: Explanation, full: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for _ in range(3):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_column()  # the one that gives way where there is no room
    grid.add_row("", *(Text(name, style="dim") for name in ("tokens", "in A", "in B", "")))
    shown = list(explanation.operations)
    left_out = 0 if full else max(len(shown) - _ROWS, 0)
    if left_out:
        shown[_ROWS // 2 : len(shown) - _ROWS // 2] = []
    for number, operation in enumerate(shown):
        if left_out and number == _ROWS // 2:
            grid.add_row(
                "", "", "", "", Text(f"... {plural(left_out, 'more operation')}; --full shows them", style="dim")
            )
        grid.add_row(*_script_row(explanation, operation))
    return Padding(grid, (0, 0, 0, 2))


def _script_row(explanation: Explanation, operation: Operation) -> Sequence[RenderableType]:
    kind = _KIND_OF_OPERATION[operation.kind]
    if operation.start < explanation.alignment.num_prefix:
        kind = "prefix"
    gone, come = operation.donor_stop - operation.donor_start, operation.stop - operation.start
    old = (text_of(explanation.donor, operation.donor_start, operation.donor_stop), _LOOKS["gone"].style)
    new = (text_of(explanation.prompt, operation.start, operation.stop), _LOOKS[kind].style)
    if operation.kind == "replace":
        count, excerpt = f"{gone:,} by {come:,}", _Excerpt(old, new)
    elif operation.kind == "delete":
        count, excerpt = f"{gone:,}", _Excerpt(old)
    else:
        count, excerpt = f"{come:,}", _Excerpt(new)
    name = Text(f"{_LOOKS[kind].sign} {operation.kind}", style=_SIGN_STYLES[kind])
    in_donor = "" if operation.kind == "insert" else f"{operation.donor_start:,}"
    in_prompt = "" if operation.kind == "delete" else f"{operation.start:,}"
    return name, count, Text(in_donor, style="dim"), Text(in_prompt, style="dim"), excerpt


class _NewText:
    """The new prompt's text, each run in its colour, or between its marks where there are no colours."""

    def __init__(self, explanation: Explanation, full: bool) -> None:
        self._explanation, self._full = explanation, full

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = console.no_color or console.color_system is None
        shown = Text(overflow="fold")
        for run in self._explanation.runs():
            look = _LOOKS[run.kind]
            opening, closing = look.marks if plain else ("", "")
            shown.append(opening)
            for text, is_text in self._pieces(run):
                shown.append(text, style=look.style if is_text else "dim")
            shown.append(closing)
        shown.rstrip()
        yield Padding(shown, (0, 0, 0, 2))

    def _pieces(self, run: Run) -> list[tuple[str, bool]]:
        text = printable(self._explanation.text(run))
        is_reused = run.kind in ("prefix", "kept", "moved", "fuzzy")
        half = _TEXT_CHARS[is_reused] // 2
        if self._full or len(text) < 3 * half:
            return [(text, True)]
        # A word is not cut in two, if there are others.
        head = re.sub(r"\S+\Z", "", text[:half]).rstrip() or text[:half]
        tail = re.sub(r"\A\S+", "", text[-half:]).lstrip() or text[-half:]
        left_out = len(text) - len(head) - len(tail)
        return [(head, True), (f" [... {plural(left_out, 'character')} ...] ", False), (tail, True)]


def _outcomes(explanation: Explanation) -> RenderableType:
    num_tokens = explanation.alignment.num_tokens
    rows: list[tuple[str, RenderableType]] = [("reuse=off", f"computes all {plural(num_tokens, 'token')}")]
    for mode, outcome in (("reuse=exact", explanation.exact), ("reuse=similar", explanation.similar)):
        rows.append((mode, _outcome_text(outcome, num_tokens)))
    return key_values(rows)


def _outcome_text(outcome: Outcome, num_tokens: int) -> Text:
    if outcome.kind == "none":
        return Text.assemble(f"computes all {plural(num_tokens, 'token')}: ", (outcome.reason, "yellow"))
    if outcome.kind == "same":
        return Text("computes nothing: A is the same prompt", style="green")
    share = _share(outcome.computed_tokens, num_tokens)
    computed = f"computes {outcome.computed_tokens:,} of {plural(num_tokens, 'token')} ({share})"
    if outcome.cost_tokens != outcome.computed_tokens:
        computed = (
            f"computes {outcome.computed_tokens:,} of {plural(num_tokens, 'token')} at the first layer, fewer at later "
            f"ones: as much work as {outcome.cost_tokens:,} ({_share(outcome.cost_tokens, num_tokens)})"
        )
    what = "an approximation" if outcome.kind == "similar" else "the shared beginning is reused, exactly"
    text = Text.assemble((computed, "green"), f"; {what}")
    return text.append(f"; {outcome.reason}", style="yellow") if outcome.reason else text


def _trial(explanation: Explanation, trial: Trial) -> RenderableType:
    # What it saves was measured here, and need not be estimated; what moved, less what is computed again, as above.
    num_moved = min(explanation.counts()["moved"], trial.reuse.reused_tokens)
    reuse = dataclasses.replace(trial.reuse, seconds_saved=None, moved_tokens=num_moved)
    times = trial.seconds_in_full / reuse.seconds_to_read
    total, agreeing = len(trial.full_token_ids), trial.num_agreeing
    agree = f"the first {total} are the same" if agreeing == total else f"the first {agreeing} of {total} are the same"
    return key_values(
        [
            ("reading", reuse_line(reuse)),
            (
                "time",
                f"{format_seconds(reuse.seconds_to_read)}, {format_seconds(reuse.seconds_to_find)} of it to find A",
            ),
            ("in full", f"{format_seconds(trial.seconds_in_full)}, {times:.1f} times as long"),
            ("divergence", f"{trial.divergence:.2g} nats, KL(full || reuse) of the next token"),
            ("greedy tokens", Text(agree, style="green" if agreeing == total else "yellow")),
        ]
    )
