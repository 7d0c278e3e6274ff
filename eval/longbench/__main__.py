"""LongBench's tasks under every policy and budget.

    python -m eval.download longbench --to LongBench
    python -m eval.longbench --data LongBench --model meta-llama/Llama-3.1-8B-Instruct --budgets 1024

`--data` holds LongBench's JSONL files. Its own prompts are taken where `dataset2prompt.json` is beside them, as
`eval.download` leaves it and published figures need; else ours, which ask the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eval import arguments
from eval.examples import Example
from eval.longbench import E_TASKS, TASKS, find, make
from eval.runner import run, show

_ROOM_TOKENS = 640
"""Left for the answer and the chat template of a model whose positions are the limit."""


def main(
    data: Annotated[Path, typer.Option(help="Folder of LongBench's JSONL files.")],
    model: arguments.Model = "pocket",
    policies: arguments.Policies = "full,codes,moments,mean,window",
    budgets: arguments.Budgets = "256,1024",
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated tasks; default: all that are in the folder.")
    ] = None,
    extended: Annotated[bool, typer.Option("--e", help="The E split; its report has scores by length.")] = False,
    cases: Annotated[int | None, typer.Option(min=1, help="The first so many of each task; default: all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=64, help="Longer prompts lose their middle. Default: what the model can see.")
    ] = None,
    quick: arguments.Quick = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """LongBench's tasks under every policy and budget."""
    if quick:
        cases, budgets, max_tokens = 1, "256", min(max_tokens or 2048, 2048)
    known = E_TASKS if extended else TASKS
    chosen = list(known) if tasks is None else arguments.names(tasks, "tasks", known)
    chosen = arguments.with_data(chosen, lambda task: find(task, data, extended=extended), named=tasks is not None)
    lm = arguments.load_model(model, device, dtype)
    asked = arguments.asked_of(lm, policies, budgets)
    if max_tokens is None and lm.max_positions is not None:
        max_tokens = lm.max_positions - _ROOM_TOKENS
    examples: list[Example] = []
    try:
        for task in chosen:
            examples += make(
                task, tokenizer=lm.tokenizer, data=data, max_tokens=max_tokens, count=cases, extended=extended
            )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    settings = arguments.settings_of(
        "longbench-e" if extended else "longbench",
        model,
        asked,
        tasks=chosen,
        cases=cases,
        max_tokens=max_tokens,
        wording=sorted({str(example.extra["wording"]) for example in examples}),
    )
    show(run(lm, asked, examples, out, settings))


if __name__ == "__main__":
    typer.run(main)
