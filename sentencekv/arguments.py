"""What several commands take: their options, and from these a text, a model and a document.

Knows the command line and the public API; nothing of what commands do.
"""

# As in cli.py: torch and transformers are imported when a model is needed.

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentencekv.files import STANDARD_INPUT, LoadedText, Part, is_saved_document, load_text
from sentencekv.terminal import ReadingProgress, make_console, one_line, plural
from sentencekv.units import format_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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
Reuse = Annotated[
    str | None,
    typer.Option(
        "--reuse",
        metavar="MODE",
        help="What is taken from texts in --reuse-folder: 'exact' (the default there), a beginning that both share; "
        "'similar', parts that moved too, an approximation; 'off'.",
    ),
]
ReuseFolder = Annotated[
    str | None,
    typer.Option("--reuse-folder", metavar="FOLDER", help="Keep what was read there, for texts that share much of it."),
]
ReuseOptions = Annotated[
    list[str] | None,
    typer.Option("--reuse-option", metavar="NAME=VALUE", help="An option of similar reuse; repeatable."),
]
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
    reuse: Mapping[str, Any] | None = None,
) -> LongContextLM:
    """The model under a configuration; `sampling` is checked before it is loaded. `reuse`: as of `reuse_settings`."""
    from sentencekv.sampling import SamplingOptions

    _quiet_transformers()
    SamplingOptions(**(sampling or {}))  # a bad value must not wait until the text was read
    options = parse_options("--policy-option", policy_options)
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
            **(reuse or {}),
        )


def load_tokenizer(model: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """A model's tokenizer and configuration, without its weights. Raises OSError."""
    from transformers import AutoConfig, AutoTokenizer

    from sentencekv import pocket

    _quiet_transformers()
    folder = pocket.path() if model == "pocket" else os.path.expanduser(model)
    try:
        return AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip(" .:") for line in str(error).splitlines() if line.strip(" .:")), "it is incomplete")
        raise OSError(
            f"cannot load a tokenizer from {model!r}: {reason}; give a model folder with config.json and "
            "tokenizer.json, or a hub name"
        ) from error


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        transformers_logging.disable_progress_bar()


_EXAMPLES = {"--policy-option": "group=mean", "--reuse-option": "ratio=0.15"}


def parse_options(option: str, given: list[str] | None) -> dict[str, Any]:
    """What an option that takes NAME=VALUE was given; values are JSON, or else texts. Raises ValueError."""
    options = {}
    for each in given or []:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} must be NAME=VALUE, got {each!r}; for example {option} {_EXAMPLES[option]}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def reuse_settings(mode: str | None, folder: str | None, loaded: LoadedText | None) -> dict[str, Any]:
    """Fields of `Config` for --reuse and --reuse-folder. Raises ValueError if they do not make sense together."""
    if folder is None:
        if mode not in (None, "off"):
            raise ValueError(
                f"--reuse {mode} needs --reuse-folder: a text is read once here, and another can only share what was "
                "kept in a folder"
            )
        return {}
    if loaded is None:
        raise ValueError("a saved document is not read again, so nothing of it can be reused; leave out --reuse-folder")
    path = os.path.expanduser(folder)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"--reuse-folder must name a folder, and {folder!r} is a file; name another, which is made")
    if mode != "off":
        check_can_reuse()
    return {"reuse": mode or "exact", "reuse_folder": path}


def check_can_reuse() -> None:
    """Raise ValueError if what caching prompts needs is not installed: that must not wait until the model is loaded."""
    from sentencekv.reuse.index import load_faiss

    try:
        load_faiss()
    except ImportError as error:
        raise ValueError(str(error)) from error


def load_prompt(given: str) -> LoadedText:
    """A prompt: a file's text, for `@FILE` or whatever names one, as `load`; else the argument itself.

    Raises ValueError for a saved document or an empty text, and as `load_text`.
    """
    name = given.removeprefix("@")
    if given.startswith("@") or given == STANDARD_INPUT or os.path.exists(os.path.expanduser(given)):
        loaded = load(name)
        if loaded is None:
            raise ValueError(f"{name!r} is a saved document, and prompts are compared as texts; give its text")
        return loaded
    if not given.strip():
        raise ValueError("a prompt is empty; give a text, or a file with one")
    if not any(char.isspace() for char in given):
        make_console(stderr=True).print(
            f"there is no file {one_line(given)!r}, so this is taken as the text itself", style="yellow", soft_wrap=True
        )
    return LoadedText("the text itself", given, (Part("the text itself", 0),))


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
    if document.reuse is None:
        report = progress.report()
    else:
        # What is reused is no progress.
        report = f"{plural(document.num_tokens, 'token')} in {format_seconds(document.seconds_to_read)}"
    err.print(f"read {loaded.name}: {report}\n", style="dim", soft_wrap=True)
    return document


def close(lm: LongContextLM) -> None:
    """Write what is cached to its folder, if there is one, and say so while it lasts."""
    with make_console(stderr=True).status("keeping what was read, in the folder for reuse"):
        lm.close()
