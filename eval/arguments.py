"""What all evaluations ask of their command line, and what is wrong with it said in a sentence."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.evicting import METHODS
from eval.peers import KVPRESS, PEERS
from eval.statistics import FULL
from sentencekv import LongContextLM
from sentencekv.files import TextError, load_text
from sentencekv.policies import parse
from sentencekv.prompts import document_frame

Model = Annotated[str, typer.Option(help="Model folder, hub name, or 'pocket'.")]
Policies = Annotated[
    str, typer.Option(help="Comma-separated policies, as policy or policy:option=value; also snapkv and h2o.")
]
Budgets = Annotated[str, typer.Option(help="Comma-separated budgets in tokens.")]
Contexts = Annotated[str, typer.Option(help="Comma-separated context lengths in tokens.")]
Seed = Annotated[int, typer.Option(help="Of what is generated.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Texts = Annotated[list[Path] | None, typer.Option(help="A text file as haystack; may be given again.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the run, which goes on if it was interrupted; default: runs/...")
]
Data = Annotated[Path | None, typer.Option(help="Folder of the benchmark's own files.")]
Count = Annotated[int, typer.Option(min=1, help="Examples of each task and length.")]
Peers = Annotated[
    str | None, typer.Option(help=f"Other libraries, asked the same: kvpress, or some of {', '.join(PEERS)}.")
]
PeersPython = Annotated[Path | None, typer.Option(help="The Python that has them; default: the running one.")]
Quick = Annotated[bool, typer.Option(help="A few short examples: minutes on a CPU.")]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A policy, a method that evicts, or a peer, at a budget."""

    policy: str
    budget_tokens: int | None
    """None: it reads everything."""
    lm: LongContextLM
    """Under the policy; with a method that evicts, under `full`; with a peer, as it was given."""

    @property
    def evicts(self) -> bool:
        return self.policy in METHODS

    @property
    def is_peer(self) -> bool:
        return self.policy in PEERS

    def __str__(self) -> str:
        return self.policy if self.budget_tokens is None else f"{self.policy} {self.budget_tokens}"


def names(given: str, option: str, known: Sequence[str]) -> list[str]:
    """Names separated by commas, each one of those known. Raises typer.BadParameter."""
    found = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        raise typer.BadParameter(f"{option} are of {', '.join(known)}, got {given!r}")
    return found


def with_data(tasks: Sequence[str], find: Callable[[str], Path], *, named: bool) -> list[str]:
    """The tasks whose file is there: all where they were `named`, else at least one.

    `find` gives a task's file, and raises ValueError where there is none. Raises typer.BadParameter with the first
    such reason, before a model is loaded.
    """
    found: list[str] = []
    missing: list[ValueError] = []
    for task in tasks:
        try:
            find(task)
        except ValueError as error:
            missing.append(error)
        else:
            found.append(task)
    if missing and (named or not found):
        raise typer.BadParameter(str(missing[0])) from missing[0]
    return found


def whole_numbers(given: str, name: str) -> list[int]:
    """Numbers of at least 1 separated by commas, each once. Raises typer.BadParameter."""
    try:
        found = list(dict.fromkeys(int(each) for each in given.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"{name} must be whole numbers separated by commas, got {given!r}") from error
    if min(found) < 1:
        raise typer.BadParameter(f"{name} must be at least 1, got {given!r}")
    return found


def load_model(model: str, device: str, dtype: str) -> LongContextLM:
    """The model that is named. Raises typer.BadParameter if it cannot be loaded so."""
    try:
        return LongContextLM.from_pretrained(model, device=device, dtype=dtype)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def load_texts(paths: Sequence[Path] | None) -> list[str]:
    """The texts of files or folders. Raises typer.BadParameter saying what is wrong with one."""
    try:
        return [load_text(str(path)).text for path in paths or []]
    except (OSError, TextError) as error:
        raise typer.BadParameter(str(error)) from error


def as_config(policy: str) -> dict[str, Any]:
    """Configuration of a policy written as `name` or `name:option=value`."""
    name, options = parse(policy)
    return {"policy": name, "policy_options": options}


def asked_of(lm: LongContextLM, policies: str, budgets: str, peers: str | None = None) -> list[Asked]:
    """Every policy and peer at every budget; one that reads everything once. Raises typer.BadParameter.

    `window` reads nothing but its window: that is made as long as the budget allows, as others would fill it.
    """
    sizes = whole_numbers(budgets, "budgets")
    found: list[Asked] = []
    for name in dict.fromkeys(part.strip() for part in policies.split(",") if part.strip()):
        if name in METHODS:
            # What they keep has no sink or window that the budget would have to hold.
            found += [Asked(name, size, lm.with_config(policy="full")) for size in sizes]
            continue
        if name.partition(":")[0] in METHODS:
            raise typer.BadParameter(f"{name.partition(':')[0]} has no options, got {name!r}")
        try:
            config = as_config(name)
            if config["policy"] == FULL:
                found.append(Asked(FULL, None, lm.with_config(**config)))
                continue
            for size in sizes:
                fields = config | {"budget_tokens": size}
                if config["policy"] == "window":
                    beside = lm.config.sink_tokens + lm.config.max_sentence_tokens
                    fields["window_tokens"] = max(size - beside, lm.config.window_tokens)
                found.append(Asked(name, size, lm.with_config(**fields)))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if not found and peers is None:
        raise typer.BadParameter(f"policies are names separated by commas, got {policies!r}")
    if peers is not None:
        chosen = names(peers, "peers", (KVPRESS, *PEERS))
        found += [Asked(name, size, lm) for name in (PEERS if KVPRESS in chosen else chosen) for size in sizes]
    return found


def settings_of(suite: str, model: str, asked: Sequence[Asked], **more: Any) -> dict[str, Any]:
    """What a run was asked for, as its folder keeps it."""
    return {
        "suite": suite,
        "model": model,
        "policies": sorted({each.policy for each in asked}),
        "budgets": sorted({each.budget_tokens for each in asked if each.budget_tokens is not None}),
        **more,
    }


def template_tokens(lm: LongContextLM) -> int:
    """What a chat template adds to a prompt, and a little for how its tokens meet those of the text."""
    frame = document_frame(lm.tokenizer, chat=None)
    added = frame.before + frame.between + frame.after
    return len(lm.tokenizer(added, add_special_tokens=False).input_ids) + 8


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """What is done, and how long the rest will take, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar
