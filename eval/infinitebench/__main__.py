"""InfiniteBench's retrieval tasks under every policy and budget.

python -m eval.infinitebench --contexts 16384,65536 --policies full,codes,mean
python -m eval.download infinitebench --to InfiniteBench
python -m eval.infinitebench --data InfiniteBench --model meta-llama/Llama-3.1-8B-Instruct --budgets 1024
"""

from __future__ import annotations

from typing import Annotated

import typer

from eval import arguments
from eval.examples import Example
from eval.infinitebench import TASKS, find, make, read
from eval.runner import run, show


def main(
    model: arguments.Model = "pocket",
    policies: arguments.Policies = "full,codes,moments,mean,window",
    budgets: arguments.Budgets = "256,1024",
    contexts: arguments.Contexts = "4096",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated tasks; default: all that have their data.")] = None,
    cases: arguments.Count = 10,
    data: arguments.Data = None,
    seed: arguments.Seed = 0,
    quick: arguments.Quick = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """InfiniteBench's retrieval tasks: its own files with --data, else made at any length."""
    if quick:
        contexts, cases, budgets = "2048", 1, "256"
    lengths = arguments.whole_numbers(contexts, "contexts") if data is None else []
    chosen = list(TASKS) if tasks is None else arguments.names(tasks, "tasks", TASKS)
    if data is not None:
        folder = data
        chosen = arguments.with_data(chosen, lambda task: find(task, folder), named=tasks is not None)
    lm = arguments.load_model(model, device, dtype)
    asked = arguments.asked_of(lm, policies, budgets)
    examples: list[Example] = []
    try:
        for task in chosen:
            if data is not None:
                examples += read(task, data=data, count=cases)
            for length in lengths:
                reserved = arguments.template_tokens(lm)
                examples += make(
                    task, tokenizer=lm.tokenizer, length=length, count=cases, seed=seed, reserved_tokens=reserved
                )
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    settings = arguments.settings_of(
        "infinitebench",
        model,
        asked,
        lengths=lengths,
        tasks=chosen,
        cases=cases,
        data=None if data is None else data.name,
        seed=seed,
    )
    show(run(lm, asked, examples, out, settings))


if __name__ == "__main__":
    typer.run(main)
