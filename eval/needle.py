"""Facts hidden in a text, asked for one by one: exact answers by policy, budget and context length.

    python -m eval.needle --policies full,codes,moments,mean,window --budgets 256 --contexts 4096

Each text is read once, and again by what cuts or evicts otherwise; every policy gets the same questions about it, with
greedy decoding. `snapkv` and `h2o`, which evict, may stand among the policies, for comparison (`eval/evicting.py`). The
text is generated prose, or files of your own with `--text`. Prints a table, then one JSON line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import sentencekv
from eval.evicting import METHODS, Evicting, Method
from sentencekv import Document, LongContextLM
from sentencekv.engine import SHAPING
from sentencekv.files import TextError, load_text
from sentencekv.needles import Fact, Hidden, hide, is_right, make_facts
from sentencekv.policies import parse
from sentencekv.prose import generate_prose

_ROOM_FOR_QUESTION = 160
"""Tokens left for the template, the question and the answer, so that a case fits the model's positions."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One text with its facts."""

    hidden: Hidden
    facts: list[Fact]


def make_cases(lm: LongContextLM, texts: list[str], context_tokens: int, num_cases: int, num_facts: int) -> list[Case]:
    """Texts of just under `context_tokens` tokens, facts included; the same for every policy."""
    cases = []
    for i in range(num_cases):
        rng = random.Random(1000 * context_tokens + i)
        facts = make_facts(rng, num_facts)
        haystack = texts[i % len(texts)] if texts else generate_prose(context_tokens, seed=i)
        needed = sum(len(lm.tokenizer(" " + fact.sentence, add_special_tokens=False).input_ids) for fact in facts)
        spans = lm.tokenizer(haystack, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in spans["offset_mapping"]]
        length = context_tokens - needed - _ROOM_FOR_QUESTION
        if length < 1 or len(ends) < length:
            raise typer.BadParameter(
                f"a context of {context_tokens} tokens with {num_facts} facts needs {max(length, 1)} tokens of text, "
                f"got {len(ends)}; give longer texts, fewer facts, or another length"
            )
        first = rng.randrange(len(ends) - length + 1) if texts else 0
        start = ends[first - 1] if first else 0
        cases.append(Case(hide(haystack[start : ends[first + length - 1]], facts, rng), facts))
    return cases


def score(document: Document, case: Case) -> list[bool]:
    """Whether each fact's question is answered right."""
    return [is_right(document.ask(fact.question, max_new_tokens=48).text, fact) for fact in case.facts]


def load_texts(paths: Sequence[Path] | None) -> list[str]:
    """The texts of files or folders. Raises BadParameter saying what is wrong with one."""
    try:
        return [load_text(str(path)).text for path in paths or []]
    except (OSError, TextError) as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def under(lm: LongContextLM, document: Document, text: str) -> Iterator[Document]:
    """The document under another configuration; read again where that one cuts the text otherwise."""
    config = document._contents.session.config
    shared = all(getattr(config, name) == getattr(lm.config, name) for name in SHAPING)
    with lm.adopt(document) if shared else lm.read(text) as other:
        yield other


def as_config(policy: str) -> dict[str, Any]:
    """Configuration of a policy written as `name` or `name:option=value`."""
    name, options = parse(policy)
    return {"policy": name, "policy_options": options}


def whole_numbers(given: str, name: str) -> list[int]:
    """Numbers separated by commas."""
    try:
        return [int(each) for each in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{name} must be whole numbers separated by commas, got {given!r}") from error


def environment(lm: LongContextLM) -> dict[str, str]:
    """What a result depends on besides its settings."""
    on_gpu = lm.model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(lm.model.device) if on_gpu else platform.processor() or "cpu",
        "dtype": str(lm.model.dtype),
        "sentencekv": sentencekv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def progress_bar() -> Progress:
    """Texts done, and how long the rest will take, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def main(
    model: Annotated[str, typer.Option(help="Model folder, hub name, or 'pocket'.")] = "pocket",
    policies: Annotated[
        str, typer.Option(help="Comma-separated policies; also snapkv and h2o.")
    ] = "full,codes,moments,box,mean,window",
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in tokens.")] = "256",
    contexts: Annotated[str, typer.Option(help="Comma-separated context lengths in tokens.")] = "4096",
    cases: Annotated[int, typer.Option(min=1, help="Texts per length.")] = 3,
    facts: Annotated[int, typer.Option(min=1, help="Facts hidden in each text.")] = 8,
    text: Annotated[list[Path] | None, typer.Option(help="A text file as haystack; may be given again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Exact answers by policy, budget and context length."""
    lm = LongContextLM.from_pretrained(model, device=device, dtype=dtype)
    texts = load_texts(text)
    sizes, lengths = whole_numbers(budgets, "budgets"), whole_numbers(contexts, "contexts")
    # The budget says nothing to `full`: it is run once.
    pairs = [
        (name, budget)
        for name in policies.split(",")
        for budget in ([lm.config.budget_tokens] if name == "full" else sizes)
    ]
    try:
        engines = {
            (name, budget): lm.with_config(**as_config("full" if name in METHODS else name), budget_tokens=budget)
            for name, budget in pairs
        }
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    right: dict[tuple[str, int, int], int] = {}
    with progress_bar() as bar:
        task = bar.add_task("texts", total=len(engines) * len(lengths) * cases)
        for length in lengths:
            made = make_cases(lm, texts, length, cases, facts)
            for case in made:
                bar.update(task, description=f"reading {length}")
                with lm.read(case.hidden.text) as document:
                    for (name, budget), engine in engines.items():
                        bar.update(task, description=f"{name} {budget} at {length}")
                        key = (name, budget, length)
                        if name in METHODS:
                            evicting = Evicting(cast(Method, name), budget, document)
                            found = [is_right(evicting.ask(fact.question), fact) for fact in case.facts]
                        else:
                            with under(engine, document, case.hidden.text) as adopted:
                                found = score(adopted, case)
                        right[key] = right.get(key, 0) + sum(found)
                        bar.advance(task)
    table = Table("policy", "budget", *[f"{length} tokens" for length in lengths])
    for name, budget in engines:
        cells = [f"{right[name, budget, length]}/{cases * facts}" for length in lengths]
        table.add_row(name, "-" if name == "full" else str(budget), *cells)
    out = Console()
    out.print(table)
    result = {
        "task": "needle",
        "model": model,
        "facts": facts,
        "cases": cases,
        "text": [path.name for path in text or []] or "generated prose",
        "rows": [
            {"policy": name, "budget_tokens": budget, "context_tokens": length, "right": count, "of": cases * facts}
            for (name, budget, length), count in right.items()
        ],
        **environment(lm),
    }
    out.file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
