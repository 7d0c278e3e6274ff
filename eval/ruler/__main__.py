"""RULER's tasks under every policy and budget.

    python -m eval.ruler --contexts 4096,16384 --policies full,codes,mean --budgets 256,1024 --cases 10
    python -m eval.ruler --file niah_single_1/validation.jsonl          files made by RULER's own generator

Questions of `qa_1` and `qa_2` need SQuAD's and HotpotQA's files (`--data`, which `python -m eval.download ruler --to
DATA` fills); without, the other eleven tasks are asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval import arguments
from eval.examples import Example
from eval.ruler import TASKS, make, read_file
from eval.ruler.questions import SOURCES, find
from eval.runner import run, show


def main(
    model: arguments.Model = "pocket",
    policies: arguments.Policies = "full,codes,moments,mean,window",
    budgets: arguments.Budgets = "256,1024",
    contexts: arguments.Contexts = "4096",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated tasks; default: all that have their data.")] = None,
    cases: arguments.Count = 10,
    text: arguments.Texts = None,
    data: arguments.Data = None,
    file: Annotated[list[Path] | None, typer.Option(help="JSONL of RULER's generator; may be given again.")] = None,
    seed: arguments.Seed = 0,
    peers: arguments.Peers = None,
    peers_python: arguments.PeersPython = None,
    quick: arguments.Quick = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """RULER's tasks under every policy and budget."""
    if quick:
        contexts, cases, budgets = "2048", 1, "256"
    lengths = arguments.whole_numbers(contexts, "contexts")
    chosen = list(TASKS) if tasks is None else arguments.names(tasks, "tasks", TASKS)
    asking = [task for task in chosen if task in SOURCES and not file]
    there = []
    if tasks is not None or data is not None:
        there = arguments.with_data(asking, lambda task: find(task, data), named=tasks is not None)
    chosen = [task for task in chosen if task not in asking or task in there]
    texts = arguments.load_texts(text)
    lm = arguments.load_model(model, device, dtype)
    asked = arguments.asked_of(lm, policies, budgets, peers)
    examples: list[Example] = []
    try:
        if file:
            for path in file:
                examples += read_file(path)[:cases]
        else:
            reserved = arguments.template_tokens(lm)
            for length in lengths:
                for task in chosen:
                    examples += make(
                        task,
                        tokenizer=lm.tokenizer,
                        length=length,
                        count=cases,
                        seed=seed,
                        haystacks=texts,
                        data=data,
                        reserved_tokens=reserved,
                    )
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    settings = arguments.settings_of(
        "ruler",
        model,
        asked,
        lengths=lengths,
        tasks=chosen,
        cases=cases,
        text=[path.name for path in text or []] or "generated prose",
        files=[path.name for path in file or []],
        seed=seed,
    )
    show(run(lm, asked, examples, out, settings, peers_python))


if __name__ == "__main__":
    typer.run(main)
