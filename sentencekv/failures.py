"""From an exception to what a user of the command line is told: one sentence and an exit status.

Knows exceptions; nothing of commands.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

OK, FAILED, ASKED_WRONGLY, INTERRUPTED = 0, 1, 2, 130

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""The parent of all errors of usage: click's in older versions of typer, typer's own copy of it in newer ones."""

EXPECTED = (OSError, ValueError, TypeError, MemoryError, FloatingPointError, RuntimeError)
"""What the engine and the libraries below it raise for bad input and for what can fail."""


def is_expected(error: Exception) -> bool:
    """Whether the error's own message tells a user enough; else it is a bug and needs a traceback."""
    return isinstance(error, EXPECTED) and (not isinstance(error, RuntimeError) or _is_out_of_memory(error))


def sentence(error: Exception, args: Sequence[str] = ()) -> str:
    """What went wrong and what can be done about it; empty if the help was shown in its place.

    `args`: those of the command line, to name a value that could not be understood.
    """
    if _is_out_of_memory(error):
        first = str(error).partition(". ")[0]
        return f"out of memory: {first}; read a shorter text, lower --budget, or use --device cpu"
    if isinstance(error, MemoryError) and not str(error):
        return "out of host memory; read a shorter text or free some memory"
    if isinstance(error, USAGE_ERROR):
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        see = f"; see `{context.command_path} --help`" if context is not None else ""
        return f"{message}{_got(error, message, args)}{see}" if message else ""
    return str(error) or type(error).__name__


def exit_status(error: Exception) -> int:
    """2 for what was asked wrongly, 1 for what failed."""
    wrong = (USAGE_ERROR, ValueError, TypeError, FileNotFoundError)
    return ASKED_WRONGLY if isinstance(error, wrong) else FAILED


def _got(error: Exception, message: str, args: Sequence[str]) -> str:
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for i, each in enumerate(args):
            name, equals, value = each.partition("=")
            if name == option:
                value = value if equals else args[i + 1] if i + 1 < len(args) else ""
                return f", got {value!r}" if repr(value) not in message else ""
    return ""


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError of its own on a GPU and a plain one on a CPU.
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
