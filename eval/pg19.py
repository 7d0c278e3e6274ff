"""Perplexity along books, by position, under every policy and budget.

    python -m eval.pg19 --data books --contexts 4096,16384 --policies full,codes,window --budgets 512,1024

`--data` is a folder of plain text files, such as PG-19's `test` (Rae et al., 2019, arXiv:1911.05507), which `python -m
eval.download pg19 --to pg19` makes. Books that are shorter than what is asked of them are left out, and named. From
several places of each book so many tokens are read exactly, and those after them scored one by one, as in generation:
what is measured is decoding. `window` slides: it reads the first and the last tokens, as many as the budget. A row is
a segment, the position its tokens of context; perplexities are of all segments together, intervals from drawing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from eval import arguments
from eval.run_folder import RunFolder, environment
from eval.runner import command, default_folder, digest, dtype_of, show_perplexity
from eval.statistics import summarise
from sentencekv import LongContextLM
from sentencekv.prompts import Prompt, section


def main(
    data: Annotated[Path, typer.Option(help="Folder of text files, a book each; or one file.")],
    model: arguments.Model = "pocket",
    policies: arguments.Policies = "full,codes,moments,mean,window",
    budgets: arguments.Budgets = "512",
    contexts: arguments.Contexts = "4096",
    books: Annotated[int, typer.Option(min=1, help="The first so many files, by name, that are long enough.")] = 8,
    segments: Annotated[int, typer.Option(min=1, help="Places of each book, evenly spread.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens scored at each place.")] = 128,
    quick: arguments.Quick = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """Perplexity along books, by position, under every policy and budget."""
    if quick:
        contexts, budgets, books, segments, tokens = "512,2048", "256", 1, 2, 32
    lengths = sorted(arguments.whole_numbers(contexts, "contexts"))
    paths = _find(data)
    lm = arguments.load_model(model, device, dtype)
    asked = arguments.asked_of(lm, policies, budgets)
    evicting = [each.policy for each in asked if each.evicts]
    if evicting:
        raise typer.BadParameter(f"{evicting[0]} keeps what a question asks for, and here is none; leave it out")
    books_of = _load(lm, paths, books, lengths[-1] + tokens)
    settings = arguments.settings_of(
        "pg19",
        model,
        asked,
        lengths=lengths,
        books=list(books_of),
        segments=segments,
        tokens=tokens,
        dtype=dtype_of(lm),
        contents=digest(prompt.token_ids for prompt in books_of.values()),
    )
    facts = environment(lm) | {"examples": len(books_of) * segments * len(lengths), "command": command()}
    folder = RunFolder(out or default_folder(settings), settings, facts)
    with arguments.progress_bar() as bar:
        task = bar.add_task("", total=facts["examples"] * len(asked))
        for name, prompt in books_of.items():
            bar.update(task, description=name)
            begin_ids = prompt.token_ids[:1] if prompt.token_ids[0] == lm.tokenizer.bos_token_id else []
            room = len(prompt.token_ids) - lengths[-1] - tokens
            for number in range(segments):
                # The scored tokens of a place are the same for every length of context before them.
                stop = lengths[-1] + tokens + room * number // max(segments - 1, 1)
                for length in lengths:
                    first = stop - tokens - length
                    window = section(prompt, first, stop, begin_ids if first else [])
                    for each in asked:
                        row = {
                            "task": name,
                            "id": str(number),
                            "length": length,
                            "policy": each.policy,
                            "budget_tokens": each.budget_tokens,
                            "metric": "log_likelihood",
                            "score": None,
                            "tokens": tokens,
                            "extra": {},
                        }
                        if not folder.has((name, str(number), length, each.policy, each.budget_tokens)):
                            try:
                                scores, _ = each.lm._engine.score(window, num_scored=tokens)
                                row |= {"status": "ok", "log_likelihood": float(scores.double().sum())}
                            except (MemoryError, torch.OutOfMemoryError) as error:
                                row |= {"status": "out_of_memory", "log_likelihood": None, "error": str(error)}
                            folder.add(row)
                        bar.advance(task)
    folder.finish(summarise(folder.rows))
    show_perplexity(folder)


def _find(data: Path) -> list[Path]:
    """The books by name. Raises typer.BadParameter if there are none."""
    paths = [data] if data.is_file() else sorted(data.glob("*.txt"))
    if not paths:
        what = "are no *.txt files in" if data.is_dir() else "is no folder"
        raise typer.BadParameter(
            f"there {what} {str(data)!r}: give a folder of books as plain text, such as the test set of PG-19 "
            "(python -m eval.download pg19 --to pg19, then --data pg19/test)"
        )
    return paths


def _load(lm: LongContextLM, paths: Sequence[Path], most: int, needed_tokens: int) -> dict[str, Prompt]:
    """The first so many books that are long enough. Raises typer.BadParameter if there is none, or the model sees less
    than what is asked of it."""
    if lm.max_positions is not None and needed_tokens + 1 > lm.max_positions:
        raise typer.BadParameter(
            f"{needed_tokens + 1} tokens are asked for, and the model has {lm.max_positions} positions; give shorter "
            "contexts"
        )
    found: dict[str, Prompt] = {}
    short: dict[str, int] = {}
    for path in paths:
        if len(found) == most:
            break
        (text,) = arguments.load_texts([path])
        prompt = lm._encode(text)
        if len(prompt.token_ids) < needed_tokens:
            short[path.name] = len(prompt.token_ids)
        else:
            found[path.stem] = prompt
    if not found:
        longest = max(short, key=lambda name: short[name])
        raise typer.BadParameter(
            f"{longest} has {short[longest]} tokens, and {needed_tokens} are needed, which no other book has either; "
            "give shorter contexts or longer books"
        )
    if short:
        typer.echo(f"books with fewer than {needed_tokens} tokens are left out: {', '.join(short)}", err=True)
    return found


if __name__ == "__main__":
    typer.run(main)
