"""What several commands take: their options, and from these a text, a model and a document.

Knows the command line and the public API; nothing of what commands do.
"""

# As in cli.py: torch and transformers are imported when a model is needed.

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentencekv.files import STANDARD_INPUT, LoadedText, Part, is_saved_document, load_text
from sentencekv.terminal import ReadingProgress, make_console, one_line, plural
from sentencekv.units import format_seconds

if TYPE_CHECKING:
    from sentencekv import Document, LongContextLM

DEFAULT_BUDGET_TOKENS = 1024
"""`Config.budget_tokens`, for the help texts; a test holds them together."""

DEFAULT_POLICY = "codes"
"""`Config.policy`, likewise."""

Model = Annotated[str, typer.Option("--model", help="A model folder, a hub name, or 'pocket', the built-in one.")]
Policy = Annotated[str, typer.Option("--policy", help="How sentences are chosen; see `sentencekv policies`.")]
PolicyOptions = Annotated[
    list[str] | None, typer.Option("--policy-option", metavar="NAME=VALUE", help="An option of the policy; repeatable.")
]
Budget = Annotated[int, typer.Option("--budget", help="Context tokens that one KV head may read at one step.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="KV in host memory and files: auto, fp8, int8 or int4.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="The most tokens of one answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own warnings.")]
File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A text file, '-' for standard input, a directory, read file by file, or what `sentencekv read` saved.",
    ),
]


def load(name: str) -> LoadedText | None:
    """The text of a file; None for a saved document, whose text comes with it."""
    if is_saved_document(name):
        return None
    err = make_console(stderr=True)
    if name == STANDARD_INPUT and sys.stdin.isatty():
        err.print("reading the text from the keyboard; end it with Ctrl-D", style="dim")
    loaded = load_text(name)
    if loaded.skipped:
        shown = ", ".join(one_line(each) for each in loaded.skipped[:3])
        more = f" and {len(loaded.skipped) - 3:,} more" if len(loaded.skipped) > 3 else ""
        err.print(f"skipped {plural(len(loaded.skipped), 'file')} not readable as text: {shown}{more}", style="yellow")
    return loaded


def load_model(
    model: str,
    device: str,
    dtype: str,
    policy: str,
    budget: int,
    policy_options: list[str] | None,
    sampling: dict[str, Any] | None = None,
    kv_dtype: str = "auto",
) -> LongContextLM:
    """The model under a configuration; `sampling` is checked before it is loaded."""
    from transformers.utils import logging as transformers_logging

    from sentencekv.sampling import SamplingOptions

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        transformers_logging.disable_progress_bar()
    SamplingOptions(**(sampling or {}))  # a bad value must not wait until the text was read
    options = dict(map(_parse_option, policy_options or []))
    from sentencekv.lm import LongContextLM

    err = make_console(stderr=True)
    with err.status(f"loading {one_line(model)}"):
        return LongContextLM.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            policy=policy,
            policy_options=options,
            budget_tokens=budget,
            kv_dtype=kv_dtype,
        )


def _parse_option(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise ValueError(f"--policy-option must be NAME=VALUE, got {given!r}; for example --policy-option group=mean")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def take_up(
    lm: LongContextLM, file: str, loaded: LoadedText | None, question: str, max_new_tokens: int
) -> tuple[Document, LoadedText]:
    """Read a text, or open a saved document; with the text that places in it are named by.

    What the model could not answer afterwards is refused before the text is read.
    """
    err = make_console(stderr=True)
    if loaded is not None:
        _check_positions(lm, loaded.name, _count(lm, loaded.text), question, max_new_tokens)
        return read(lm, loaded), loaded
    document = lm.open(file)
    _check_positions(lm, file, document.num_tokens, question, max_new_tokens)
    opened = f"{plural(document.num_tokens, 'token')} in {format_seconds(document.seconds_to_read)}"
    err.print(f"opened {one_line(file)}: {opened}\n", style="dim", soft_wrap=True)
    return document, LoadedText(file, document.text, (Part(file, 0),))


def _count(lm: LongContextLM, text: str) -> int:
    return len(lm.tokenizer(text, verbose=False)["input_ids"])


def _check_positions(lm: LongContextLM, name: str, num_tokens: int, question: str, max_new_tokens: int) -> None:
    if lm.max_positions is None:
        return
    more = _count(lm, question) + max_new_tokens
    if num_tokens + more > lm.max_positions:
        raise ValueError(
            f"{name!r} has {num_tokens:,} tokens, question and answer may take {more:,} more, and the model has "
            f"positions for {lm.max_positions:,}; shorten the text, lower --max-new-tokens, or take a model with more "
            "positions"
        )


def read(lm: LongContextLM, loaded: LoadedText) -> Document:
    """Read a text, with its progress on standard error."""
    err = make_console(stderr=True)
    with ReadingProgress(err) as progress:
        document = lm.read(loaded.text, progress=progress)
    err.print(f"read {loaded.name}: {progress.report()}\n", style="dim", soft_wrap=True)
    return document
