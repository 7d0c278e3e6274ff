"""Cross-prompt reuse under every method, beside full reading.

    python -m eval.reuse --part moved --tokens 5000 --share 0.8 --text novel.txt     the setting of published figures
    python -m eval.reuse --part edits,facts,controls                                 all on generated prose
    python -m eval.reuse --part arrivals --data qa --new-tokens 64                   chat, summaries, translation
    python -m eval.reuse --methods full,default,similar:first_tokens=4:ratio=0.05    options of one's own

A prompt is read in full and then by each method with its donor cached; the figures compare what the model would say
after either. Distributions and continuations are of exact passes behind both readings, so that nothing of what
retrieval leaves out while decoding is in them. Times are those to the first token: looking for a donor, aligning,
moving and computing, and summaries of sentences are part of them; tokenising is not, as in `Stats`. Every method reads
a prompt of a run's length before anything is timed, and full reading is timed before and after the methods of a prompt.
Each part writes a run's folder; `python -m eval.report` makes a page of the scores in it.

The pocket model was taught to answer questions about a text, so that it answers most of the chat questions that arrive
with "not mentioned", whatever was reused: with it, give `--plain`, or leave chat out.

    agreement           share of the tokens of full reading's greedy answer that are the method's choice as well, each
                        after the ones before it: one slip counts once
    before divergence   share of them before the first that is not: how long greedy decoding by itself stays the same
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement

from eval import arguments
from eval.reuse import arrive
from eval.reuse.arrivals import TASKS as ARRIVALS
from eval.reuse.arrivals import Arrival, arrivals, find
from eval.reuse.edits import KINDS, PLACES, edits
from eval.reuse.facts import facts as changed_facts
from eval.reuse.methods import Method, methods_of
from eval.reuse.moved import moved, random_donor, wrong_donor
from eval.reuse.pairs import PASSAGE_TOKENS, Pair, Source
from eval.reuse.reader import Reader
from eval.reuse.run import run
from eval.reuse.summary import summarise, tables
from eval.run_folder import RunFolder, environment
from eval.runner import command, default_folder, digest, dtype_of
from sentencekv import LongContextLM
from sentencekv.attention import UnsupportedModelError

PARTS: dict[str, str] = {
    "moved": "full,prefix,naive,rotation,first-4,value,key,attention,query,fuzzy,semshare,default,random"
    ",random-as-value",
    "edits": "full,prefix,naive,rotation,value,fuzzy,semshare,default,random",
    "facts": "full,prefix,naive,rotation,first-4,value,fuzzy,semshare,default,answer-cache",
    "controls": "full,prefix,naive,fuzzy,semshare,default,answer-cache",
    "arrivals": "full,prefix,fuzzy-or-full,default,answer-cache",
}
"""Parts, and the methods that are asked if none are named."""

_LONGEST_PASSAGES = 12 * PASSAGE_TOKENS
"""Room left in a text for its last passages, which are taken whole."""

_WIDEST = 400
"""Characters of a table's line."""

_SHARES = "0.01,0.1,0.5,0.9"

_OTHER_SEED = 1_000_000
"""Of prose that has nothing to do with any text that prompts are made of."""


def make_pairs(
    part: str,
    lm: LongContextLM,
    texts: Sequence[str],
    *,
    tokens: int,
    share: float,
    cases: int,
    num_facts: int,
    shares: Sequence[float],
    places: Sequence[str],
    kinds: Sequence[str],
    seed: int,
) -> list[Pair]:
    """The pairs of a part. Raises ValueError if a text is too short."""

    def source(wanted: float) -> Source:
        return Source(lm.tokenizer, texts, round(wanted) + _LONGEST_PASSAGES)

    if part == "edits":
        made, short = edits(
            source(2 * tokens), tokens=tokens, cases=cases, shares=shares, places=places, kinds=kinds, seed=seed
        )
        if short:
            typer.echo(f"edits that found less to edit than was asked for: {', '.join(short)}", err=True)
        return made
    if part == "facts":
        return changed_facts(lm.tokenizer, source(tokens), tokens=tokens, cases=cases, num_facts=num_facts, seed=seed)
    asked: dict[str, Any] = {"tokens": tokens, "share": share, "cases": cases, "seed": seed}
    passages = source((2 - share) * tokens)
    if part == "moved":
        return moved(passages, **asked)
    other = Source(lm.tokenizer, (), tokens + _LONGEST_PASSAGES, first_seed=_OTHER_SEED)
    return [*wrong_donor(passages, other, **asked), *random_donor(passages, **asked)]


def main(
    part: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = "moved,edits,facts,controls",
    model: arguments.Model = "pocket",
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated methods, also similar:option=value; default: what suits each part."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=256, help="Of a prompt. Default: 5000; edits and facts 2000.")
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of a prompt's tokens, those in passages that are cached.")
    ] = 0.8,
    cases: Annotated[int | None, typer.Option(min=1, help="Texts. Default: 16; edits 1, facts 2.")] = None,
    facts: Annotated[int | None, typer.Option(min=2, help="Facts hidden in each text. Default: 8.")] = None,
    shares: Annotated[
        str | None, typer.Option(help=f"Comma-separated shares of tokens that edits touch. Default: {_SHARES}.")
    ] = None,
    places: Annotated[str | None, typer.Option(help=f"Where edits are. Default: {','.join(PLACES)}.")] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of edits.")] = ",".join(KINDS),
    tasks: Annotated[
        str | None, typer.Option(help=f"Of arrivals: {', '.join(ARRIVALS)}; default: all that have their data.")
    ] = None,
    arriving: Annotated[int | None, typer.Option(min=1, help="The first so many of each task; default: all.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer to what arrives. Default: 64.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="What arrives is continued as plain text, though there is a chat template.")
    ] = False,
    text: arguments.Texts = None,
    data: arguments.Data = None,
    seed: arguments.Seed = 0,
    quick: arguments.Quick = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """Cross-prompt reuse under every method, beside full reading."""
    if quick:  # what was asked for stays
        tokens, cases, facts, shares = tokens or 512, cases or 1, facts or 2, shares or "0.1,0.5"
        places, arriving, new_tokens = places or "middle,end", arriving or 3, new_tokens or 16
    facts, new_tokens, shares, places = facts or 8, new_tokens or 64, shares or _SHARES, places or ",".join(PLACES)
    parts = arguments.names(part, "parts", list(PARTS))
    chosen_tasks: list[str] = []
    if "arrivals" in parts:
        chosen_tasks = _tasks_of(tasks, data)
    asked = {each: _methods_of(PARTS[each] if methods is None else methods, each) for each in parts}
    settings: dict[str, Any] = {
        "shares": _shares_of(shares),
        "places": arguments.names(places, "places", PLACES),
        "kinds": arguments.names(kinds, "kinds", list(KINDS)),
    }
    texts = arguments.load_texts(text)
    lm = arguments.load_model(model, device, dtype)
    try:
        reader = Reader(lm)
    except (ImportError, UnsupportedModelError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        for each in parts:
            common = {
                "suite": f"reuse-{each}",
                "model": model,
                "policies": [method.name for method in asked[each]],
                "methods": {method.name: method.settings() for method in asked[each]},
            }
            folder = out / each if out is not None and len(parts) > 1 else out
            if each == "arrivals":
                assert data is not None
                coming = _arrivals_of(chosen_tasks, data, arriving)
                made: dict[str, Any] = {
                    **common,
                    "tasks": chosen_tasks,
                    "arriving": arriving,
                    "new_tokens": new_tokens,
                    "plain": plain,
                }
                done = _folder(folder, made, lm, coming)
                chat = bool(lm.tokenizer.chat_template) and not plain
                arrive.run(reader, asked[each], coming, done, max_new_tokens=new_tokens, chat=chat)
            else:
                few = each in ("edits", "facts")
                made = {
                    "tokens": tokens or (2000 if few else 5000),
                    "cases": cases or {"edits": 1, "facts": 2}.get(each, 16),
                    "share": share,
                    "seed": seed,
                }
                try:
                    pairs = make_pairs(each, lm, texts, num_facts=facts, **settings, **made)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from error
                names = [path.name for path in text or []] or "generated prose"
                done = _folder(folder, {**common, **made, "facts": facts, **settings, "text": names}, lm, pairs)
                run(reader, asked[each], pairs, done)
            show(done)
    finally:
        reader.close()


def show(done: RunFolder) -> None:
    """Write the summary of a run, and print it as tables."""
    cells = summarise(done.rows)
    done.finish(cells)
    console = Console()
    for table in tables(cells):
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)  # into a file as well
        console.print(table)
    failed = [row for row in done.rows if row["status"] != "ok"]
    if failed:
        first = f"{failed[0]['status']}, {failed[0].get('error')}"
        console.print(f"{len(failed)} of {len(done.rows)} rows have no answer; the first: {first}")
    console.print(f"rows and summary: {done.folder}; as a page: python -m eval.report {done.folder}", soft_wrap=True)


def _folder(folder: Path | None, settings: dict[str, Any], lm: LongContextLM, asked: Sequence[Any]) -> RunFolder:
    settings = {
        **settings,
        "dtype": dtype_of(lm),
        "contents": digest(dataclasses.asdict(each) for each in asked),
    }
    return RunFolder(folder or default_folder(settings), settings, {"command": command()} | environment(lm))


def _methods_of(given: str, part: str) -> list[Method]:
    try:
        found = methods_of(given)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if part == "arrivals" and (like := [method.name for method in found if method.like is not None]):
        raise typer.BadParameter(
            f"{like[0]} computes as much as another method does with the same cache, and arrivals "
            "have a cache for each method; leave it out"
        )
    return found


def _shares_of(given: str) -> list[float]:
    try:
        found = [float(each) for each in given.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"shares must be numbers separated by commas, got {given!r}") from error
    if not all(0 < each < 1 for each in found):
        raise typer.BadParameter(f"shares must be above 0 and below 1, got {given!r}")
    return found


def _tasks_of(given: str | None, data: Path | None) -> list[str]:
    if data is None:
        raise typer.BadParameter(
            "arrivals need --data, a folder of the data sets' own files: see eval/reuse/arrivals.py"
        )
    chosen = list(ARRIVALS) if given is None else arguments.names(given, "tasks", ARRIVALS)
    return arguments.with_data(chosen, lambda task: find(task, data), named=given is not None)


def _arrivals_of(tasks: Sequence[str], data: Path, count: int | None) -> list[Arrival]:
    try:
        return [each for task in tasks for each in arrivals(task, data, count)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
