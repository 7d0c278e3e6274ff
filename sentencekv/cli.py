"""The command line: `sentencekv demo | ask | read | chat | reuse | policies | info`.

Answers go to standard output; progress, sources of an answer, costs and errors go to standard error. Every error of
the user's is one sentence; exit status 2 for what was asked wrongly, 1 for what failed, 130 for Ctrl-C.
"""

# torch and transformers take seconds to import: they are imported inside the commands, so that `--help` and every
# error that can be found without a model come at once.

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sentencekv import __version__, arguments, failures
from sentencekv.files import STANDARD_INPUT, LoadedText, check_can_save
from sentencekv.terminal import (
    ReadingProgress,
    cost_lines,
    format_reach,
    key_values,
    make_console,
    one_line,
    plural,
    reuse_line,
    show,
    sources_list,
    stats_table,
    summary_block,
    verdict_block,
    write,
    write_answer,
)
from sentencekv.units import format_bytes

if TYPE_CHECKING:
    from sentencekv import Conversation, Document, Generation, LongContextLM

DEMO_BUDGET_TOKENS = 512


app = typer.Typer(
    name="sentencekv",
    help="Long-context decoding: read a text once, keep every sentence, fetch the ones that each token needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
reuse_app = typer.Typer(
    help="Reuse across prompts: what is read of one because another was read before.", no_args_is_help=True
)
app.add_typer(reuse_app, name="reuse")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `args`: None for those of the process."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    _prepare(debug)
    if args is None and not debug:
        sys.excepthook = _report_unexpected
    try:
        status = app(args=given, prog_name="sentencekv", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = failures.INTERRUPTED
    except failures.USAGE_ERROR as error:
        return _fail(failures.sentence(error, given), failures.exit_status(error))
    except failures.EXPECTED as error:
        if debug or not failures.is_expected(error):
            raise
        return _fail(failures.sentence(error), failures.exit_status(error))
    if status == failures.INTERRUPTED:
        make_console(stderr=True).print("interrupted; nothing was written")
    return status if isinstance(status, int) else failures.OK


def _prepare(debug: bool) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of ending the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(name)s: %(message)s")
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(message: str, status: int) -> int:
    if message:
        make_console(stderr=True).print(Text.assemble(("error: ", "bold red"), one_line(message)), soft_wrap=True)
    return status


def _report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        make_console(stderr=True).print("interrupted; nothing was written")
        return
    _fail(f"unexpected {kind.__name__}: {error}; run it again with --debug for the traceback, and report it", 1)


def _show_version(wanted: bool) -> None:
    if wanted:
        make_console().print(f"sentencekv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="Hide the facts in this text.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the text; a longer FILE is cut there.")] = 16000,
    facts: Annotated[int, typer.Option("--facts", help="How many facts to hide and ask for.")] = 8,
    budget: arguments.Budget = DEMO_BUDGET_TOKENS,
    policy: arguments.Policy = arguments.DEFAULT_POLICY,
    policy_option: arguments.PolicyOptions = None,
    model: arguments.Model = "pocket",
    seed: Annotated[int, typer.Option("--seed", help="Another seed: other prose, other facts.")] = 1,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
    debug: arguments.Debug = False,
) -> None:
    """Hide facts in a long text, read it, ask for each fact, and judge the answers.

    Exit status 0 if every answer is right, else 1.
    """
    for option, value in (("--tokens", tokens), ("--facts", facts)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    loaded = arguments.load(text) if text is not None else None
    if text is not None and loaded is None:
        raise ValueError(f"{text!r} is a saved document, and facts are hidden in a text before it is read; give a text")
    lm = arguments.load_model(model, device, dtype, policy, budget, policy_option)
    from sentencekv.demo import ask_all, build_text, summarize

    hay = build_text(
        lm, tokens=tokens, num_facts=facts, seed=seed, user_text=loaded.text if loaded else None, name=model
    )
    console = make_console()
    where = f"{loaded.name}" if loaded is not None else "generated prose"
    if hay.cut_at is not None:
        where += f", cut after {100 * hay.cut_at:.0f}% (--tokens {tokens})"
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    console.print(Text(f"{plural(facts, 'fact')} hidden in a text of {hay.num_tokens:,} tokens", style="bold"))
    rows: list[tuple[str, RenderableType]] = [
        ("text", f"{where}, {len(hay.text):,} characters"),
        ("model", f"{model}, {weights / 1e6:,.1f} million parameters, {_device_text(lm)}"),
        ("policy", f"{policy}, budget {budget:,} tokens"),
        ("KV", f"on the device and on the host ({_tiers_text(lm)})"),
    ]
    show(console, key_values(rows))
    if hay.num_tokens <= budget:
        console.print("the text is not longer than the budget, so all of it will be read", style="yellow")
    console.print()
    progress = ReadingProgress(make_console(stderr=True))
    with progress:
        document = lm.read(hay.text, progress=progress)
    reading = f"{progress.report()}, {plural(document.num_sentences, 'sentence')}"
    console.print(f"read {reading}\n")
    verdicts = []
    for number, verdict in enumerate(ask_all(document, hay), start=1):
        verdicts.append(verdict)
        show(console, verdict_block(number, facts, verdict, len(hay.text), lm.config))
    summary = summarize(verdicts)
    reach = format_reach(verdicts[-1].generation.stats, lm.config)
    show(console, summary_block(summary, reading, reach, _tiers_text(lm)))
    if summary.num_right < summary.num_facts:
        console.print(f"{plural(facts - summary.num_right, 'answer')} wrong: exit status 1", style="red")
        raise typer.Exit(1)


@app.command()
def ask(
    file: arguments.File,
    question: Annotated[str, typer.Argument(help="What to ask of it.")],
    sources: Annotated[bool, typer.Option("--sources", help="Show the sentences that it was read from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the bare answer.")] = False,
    max_new_tokens: arguments.MaxNewTokens = 256,
    temperature: arguments.Temperature = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes draws at --temperature repeatable.")] = None,
    budget: arguments.Budget = arguments.DEFAULT_BUDGET_TOKENS,
    policy: arguments.Policy = arguments.DEFAULT_POLICY,
    policy_option: arguments.PolicyOptions = None,
    model: arguments.Model = "pocket",
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
    kv_dtype: arguments.KvDtype = "auto",
    reuse: arguments.Reuse = None,
    reuse_folder: arguments.ReuseFolder = None,
    debug: arguments.Debug = False,
) -> None:
    """Answer one question about a text; the answer goes to standard output."""
    if not question.strip():
        raise ValueError("the question is empty; ask for something that the text may say")
    loaded = arguments.load(file)
    reusing = arguments.reuse_settings(reuse, reuse_folder, loaded)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    lm = arguments.load_model(model, device, dtype, policy, budget, policy_option, sampling, kv_dtype, reusing)
    document, loaded = arguments.take_up(lm, file, loaded, question, max_new_tokens)
    err = make_console(stderr=True)
    if as_json:
        generation = document.ask(question, **sampling)  # type: ignore[arg-type]
        write(
            json.dumps(_as_json(question, generation, document, loaded, model, lm), ensure_ascii=False, indent=2) + "\n"
        )
        arguments.close(lm)
        return
    generation = write_answer(document.stream(question, **sampling))  # type: ignore[arg-type]
    if sources:
        err.print()
        show(err, sources_list(generation, loaded))
    err.print()
    show(err, cost_lines(generation.stats, lm.config, document.reuse))
    arguments.close(lm)


@app.command()
def read(
    file: arguments.File,
    saved: Annotated[str, typer.Argument(metavar="SAVED", help="The file to write; one of that name is replaced.")],
    budget: arguments.Budget = arguments.DEFAULT_BUDGET_TOKENS,
    policy: arguments.Policy = arguments.DEFAULT_POLICY,
    policy_option: arguments.PolicyOptions = None,
    model: arguments.Model = "pocket",
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
    kv_dtype: arguments.KvDtype = "auto",
    debug: arguments.Debug = False,
) -> None:
    """Read a text once and save what was read, for `ask` and `chat` to open."""
    loaded = arguments.load(file)
    if loaded is None:
        raise ValueError(f"{file!r} was read and saved already; give it to ask or chat")
    target = check_can_save(saved)
    if target == Path(file).expanduser().resolve():
        raise ValueError(f"{saved!r} is the text itself; name another file to save to")
    lm = arguments.load_model(model, device, dtype, policy, budget, policy_option, None, kv_dtype)
    document = arguments.read(lm, loaded)
    err = make_console(stderr=True)
    with ReadingProgress(err, "saving", "MiB", patience=2) as progress:
        num_bytes = document.save(saved, progress=lambda done, total: progress(done >> 20, total >> 20))
    err.print(f"saved {one_line(saved)}: {format_bytes(num_bytes)}", style="dim", soft_wrap=True)


@app.command()
def chat(
    file: arguments.File,
    remember: Annotated[
        bool, typer.Option("--remember/--forget", help="Ask each question after the ones before it, or by itself.")
    ] = True,
    max_new_tokens: arguments.MaxNewTokens = 256,
    temperature: arguments.Temperature = 0.0,
    budget: arguments.Budget = arguments.DEFAULT_BUDGET_TOKENS,
    policy: arguments.Policy = arguments.DEFAULT_POLICY,
    policy_option: arguments.PolicyOptions = None,
    model: arguments.Model = "pocket",
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
    kv_dtype: arguments.KvDtype = "auto",
    reuse: arguments.Reuse = None,
    reuse_folder: arguments.ReuseFolder = None,
    debug: arguments.Debug = False,
) -> None:
    """Read a text once and answer question after question about it."""
    if file == STANDARD_INPUT:
        raise ValueError("chat takes its questions from standard input, so '-' cannot be the text; save it to a file")
    loaded = arguments.load(file)
    reusing = arguments.reuse_settings(reuse, reuse_folder, loaded)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    lm = arguments.load_model(model, device, dtype, policy, budget, policy_option, sampling, kv_dtype, reusing)
    document, loaded = arguments.take_up(lm, file, loaded, "", max_new_tokens)
    err = make_console(stderr=True)
    if document.reuse is not None:
        err.print(f"{reuse_line(document.reuse)}\n", style="dim")
    asked: Document | Conversation = document
    if remember:
        try:
            asked = document.chat()
        except ValueError as error:
            err.print(f"{one_line(str(error))}; each question stands alone", style="yellow", soft_wrap=True)
    memory = "Earlier questions and answers are remembered" if asked is not document else "Each question stands alone"
    err.print(
        f"Ask about the text. {memory}.\n/sources: what the last answer was read from   /stats: what it cost   /quit",
        style="dim",
    )
    last: Generation | None = None
    while (line := _next_line()) is not None and line != "/quit":
        if not line:
            continue
        if line in ("/sources", "/stats"):
            if last is None:
                err.print("nothing was asked yet", style="dim")
            elif line == "/sources":
                show(err, sources_list(last, loaded))
            else:
                show(err, stats_table(last.stats, lm.config, document.reuse))
        elif line.startswith("/"):
            err.print(f"unknown command {one_line(line)}; there are /sources, /stats and /quit", style="yellow")
        else:
            try:
                last = write_answer(asked.stream(line, **sampling))  # type: ignore[arg-type]
            except ValueError as error:
                _fail(str(error), 2)
            except KeyboardInterrupt:
                write("\n")
                err.print("stopped; Ctrl-C at the prompt leaves", style="dim")
    arguments.close(lm)


@reuse_app.command()
def explain(
    prompt_a: Annotated[str, typer.Argument(metavar="PROMPT_A", help="The cached one: a text, a file, or @FILE.")],
    prompt_b: Annotated[str, typer.Argument(metavar="PROMPT_B", help="The one to be read then, likewise.")],
    run: Annotated[bool, typer.Option("--run", help="Load the model, read both, and say what came of it.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Show all of B and all operations, however long.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the pictures.")] = False,
    reuse_option: arguments.ReuseOptions = None,
    model: arguments.Model = "pocket",
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
    debug: arguments.Debug = False,
) -> None:
    """Show how PROMPT_B would be read with PROMPT_A cached: what is taken from it, what moves, what is computed.

    Needs the model's tokenizer only, unless --run is given.
    """
    if prompt_a == prompt_b == STANDARD_INPUT:
        raise ValueError("standard input can be one of the two prompts, not both; save one to a file")
    given = arguments.parse_options("--reuse-option", reuse_option)
    first, second = arguments.load_prompt(prompt_a), arguments.load_prompt(prompt_b)
    if run:
        arguments.check_can_reuse()
    from sentencekv.edit_script import explanation_block
    from sentencekv.explain import as_dict, explain_texts, try_out
    from sentencekv.reuse.decide import make_reuse_options

    options = make_reuse_options(given)
    if options.fuzzy and not run:
        raise ValueError("fuzzy=true compares the model's embeddings, which the tokenizer has not; add --run")
    trial = None
    if run:
        reusing = {"reuse": "similar", "reuse_options": given}
        policy, budget = arguments.DEFAULT_POLICY, arguments.DEFAULT_BUDGET_TOKENS  # decoding here attends to all
        lm = arguments.load_model(model, device, dtype, policy, budget, None, reuse=reusing)
        of_model = lm.tokenizer, lm.model.config, options, lm.model.get_input_embeddings()
        explanation = explain_texts(first.text, second.text, *of_model)
        with make_console(stderr=True).status("reading both"):
            trial = try_out(lm, explanation)
    else:
        explanation = explain_texts(first.text, second.text, *arguments.load_tokenizer(model), options)
    if as_json:
        found = {"model": model, "donor": first.name, "prompt": second.name, **as_dict(explanation, trial)}
        write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
        return
    show(make_console(), explanation_block(explanation, (first.name, second.name), full=full, trial=trial))


@app.command()
def policies() -> None:
    """List how sentences can be chosen."""
    from sentencekv.policies import available, policy_class

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name in available():
        cls = policy_class(name)
        text = Text(cls.describe())
        if name == arguments.DEFAULT_POLICY:
            text.append(" (the default)", style="green")
        options = [field.name for field in dataclasses.fields(cls)]
        text.append(f"\noptions: {', '.join(options) or 'none'}", style="dim")
        grid.add_row(name, text)
    show(make_console(), grid)


@app.command()
def info() -> None:
    """Show versions, devices, memory and the built-in model."""
    import torch
    import transformers

    from sentencekv.memory import available_host_bytes

    rows: list[tuple[str, RenderableType]] = [
        ("sentencekv", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA")),
        ("transformers", transformers.__version__),
        ("triton", _version_of("triton")),
        ("CPU", f"{plural(os.cpu_count() or 1, 'core')}, torch uses {plural(torch.get_num_threads(), 'thread')}"),
        ("host memory", f"{format_bytes(available_host_bytes())} free for KV"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {format_bytes(free)} of {format_bytes(total)} free"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch can use; everything runs on the CPU"))
    rows.append(("pocket model", _pocket_text()))
    rows.append(("defaults", f"policy {arguments.DEFAULT_POLICY}, budget {arguments.DEFAULT_BUDGET_TOKENS:,} tokens"))
    show(make_console(), key_values(rows))


def _as_json(
    question: str, generation: Generation, document: Document, loaded: LoadedText, model: str, lm: LongContextLM
) -> dict[str, Any]:
    sources = []
    for source in generation.sources:
        name, line = loaded.place(source.start)
        sources.append({**dataclasses.asdict(source), "file": name or loaded.name, "line": line})
    return {
        "question": question,
        "answer": generation.text.strip(),
        "finish_reason": generation.finish_reason,
        "model": model,
        "device": str(lm.model.device),
        "sources": sources,
        "stats": dataclasses.asdict(generation.stats),
        "reuse": dataclasses.asdict(document.reuse) if document.reuse is not None else None,
    }


def _next_line() -> str | None:
    """The next question; None when there are no more."""
    with contextlib.suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  (gives input() a history and editing keys)
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            write("\n")
        return None
    return line


def _device_text(lm: LongContextLM) -> str:
    return f"{str(lm.model.dtype).removeprefix('torch.')} on {lm.model.device}"


def _tiers_text(lm: LongContextLM) -> str:
    """What `device` and `host` mean on this machine."""
    if lm.model.device.type == "cuda":
        return "a GPU and pinned memory"
    return "no GPU: both are CPU memory"


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _pocket_text() -> str:
    from sentencekv import pocket

    folder = Path(pocket.path())
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return "not installed"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return f"{format_bytes(weights)} of weights, {settings.get('max_position_embeddings', 0):,} positions"
