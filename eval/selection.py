"""What policies choose, beside what attention wants: a study of selection on texts with facts hidden in them.

    python -m eval.selection --policies codes,moments,box,mean --budgets 128,256,512 --contexts 4096

Each text is read once (by `pages`, which cuts it otherwise, once more; what is needed is then whole pages, so that its
row says less beside the others) and each fact asked for with dense attention. At every token of the answers and in
every layer, each policy chooses among the text's sentences for the very queries that dense attention has, so that all
are compared on the same ones; `oracle` chooses by the true attention mass, within the same budget. Reported for each
policy and budget:

    mass          attention mass that falls on what is read (chosen sentences, sink, everything after the text), mean
                  over heads, layers and tokens
    of sentences  the same of the sentences alone: their chosen share
    error         of the attention output, relative to its norm
    needed        of heads that put a tenth of their mass or more on the fact's own sentence: share of that mass chosen
    rank          of that sentence in the policy's order, median over those heads
    answers       right answers when the policy decodes by itself
    bytes         of summaries per token of context and their share of the KV, both as with a model in 16 bits

`--trace FILE` also writes what was chosen: a JSON object per line. The first of each reading has its `sentences`, as
texts; those after it, for every token of an answer, policy, budget and layer, the `chosen` sentences of each KV head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from eval.needle import Case, as_config, environment, load_texts, make_cases, progress_bar, score, whole_numbers
from sentencekv import Document, LongContextLM
from sentencekv.attention import run_model
from sentencekv.batch import LaneBatch, SessionBatch
from sentencekv.engine import SHAPING
from sentencekv.needles import Fact
from sentencekv.prompts import encode_appended
from sentencekv.session import Session
from triton_ops import Lanes
from triton_ops.score_sentences import scores_of
from triton_ops.select_sentences import group_scores, select_sentences_ref

ORACLE = "oracle"
_ANSWER_TOKENS = 24
"""Tokens of an answer at most."""
_WANTED_MASS = 0.1
"""Share of a head's attention from which on a sentence counts as needed by it."""


@dataclasses.dataclass
class Figures:
    """Sums over heads, layers and tokens, of one policy at one budget and context length."""

    count: int = 0
    mass: float = 0.0
    of_sentences: float = 0.0
    error: float = 0.0
    mass_of_layer: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    needed: list[float] = dataclasses.field(default_factory=list)
    rank: list[int] = dataclasses.field(default_factory=list)
    right: int = 0
    bytes_per_token: float = 0.0
    kv_share: float = 0.0


class Choice(NamedTuple):
    """Chosen sentences, bool `[N, S]`; the order among all, `[N, S]` scores; and estimated logs of mass, `[N, G, S]`,
    if those not chosen count by it."""

    chosen_NS: Tensor
    order_NS: Tensor
    logit_NGS: Tensor | None


@dataclasses.dataclass(frozen=True)
class Chooser:
    """A policy at a budget over one document, ready to be asked."""

    name: str
    budget: int
    session: Session
    lanes: Lanes

    @property
    def summary_bytes(self) -> int:
        """Of all layers, as with a model in 16 bits; none of the oracle."""
        if self.name == ORACLE:
            return 0
        tables = [
            table
            for extent in self.session._extents
            for layer in (extent.slabs[0].known_layers if extent.slabs else ())
            for table in extent.summaries(layer)
        ]
        return sum(2 * table.numel() if table.is_floating_point() else table.nbytes for table in tables)

    def choose(self, q_AH: Tensor, layer: int, scale: float, mass_NGS: Tensor) -> Choice:
        """What it chooses by these queries. `mass_NGS`: the true mass, for the oracle."""
        room_tokens = self.session.config.room_tokens
        num_sentences = mass_NGS.shape[2]
        if self.name == ORACLE:
            logit_BNGS = torch.full((1, *mass_NGS.shape[:2], self.lanes.capacity), -torch.inf, device=mass_NGS.device)
            logit_BNGS[0, :, :, :num_sentences] = mass_NGS.log()
            scores = scores_of(logit_BNGS, self.lanes)
            ids_NK = select_sentences_ref(scores, self.lanes, group="max", room_tokens=room_tokens)[0]
            order_NS = group_scores(mass_NGS.log(), group="max")
            logit_NGS = None
        else:
            policy = self.session.policy
            ids_BNK, rest = policy.select(q_AH[None], self.lanes, layer, scale=scale, room_tokens=room_tokens)
            ids_NK = ids_BNK[0]
            logit_NGS = policy.score(q_AH[None], self.lanes, layer, scale=scale).logit_BNGS[0, :, :, :num_sentences]
            order_NS = group_scores(logit_NGS, group=policy.group)
            logit_NGS = logit_NGS if rest is not None else None
        chosen_NS = torch.zeros(mass_NGS.shape[0], num_sentences + 1, dtype=torch.bool, device=mass_NGS.device)
        chosen_NS.scatter_(1, torch.where(ids_NK >= 0, ids_NK.long(), num_sentences), True)
        return Choice(chosen_NS[:, :num_sentences], order_NS, logit_NGS)


class Text:
    """One document: its KV, the choosers over it, and where its sentences are."""

    def __init__(self, document: Document, choosers: Sequence[Chooser]) -> None:
        session = document._contents.session
        self.engine, self.contents, self.choosers = document._engine, document._contents, list(choosers)
        self.spans = session.sentence_spans()
        self.lengths = torch.tensor([stop - start for start, stop in self.spans], device=session.device)
        self.kv_of_layer: dict[int, Tensor] = {}

    def kv(self, layer: int) -> Tensor:
        """`[N, T, 2, H]`: sink, sentences, and what comes after them."""
        if layer not in self.kv_of_layer:
            self.kv_of_layer[layer] = self.contents.session.kv(layer)
        return self.kv_of_layer[layer]

    def sentences_of(self, start: int, stop: int) -> list[int]:
        """Sentences with characters of `text[start:stop]`."""
        first_char = len(self.contents.frame.before)
        found = []
        for i, (first, last) in enumerate(self.spans):
            spans = self.contents.prompt.spans[first:last]
            spans = spans[spans[:, 1] > spans[:, 0]]
            if len(spans) and spans[:, 0].min() - first_char < stop and start < spans[:, 1].max() - first_char:
                found.append(i)
        return found


class Trace:
    """Writes what was chosen, a JSON object per line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def reading(self, text: Text) -> None:
        """What comes next is of this text."""
        prompt = text.contents.prompt
        edges = [
            (int(prompt.spans[first:stop, 0].min()), int(prompt.spans[first:stop, 1].max()))
            for first, stop in text.spans
        ]
        self._file.write(json.dumps({"sentences": [prompt.text[start:stop] for start, stop in edges]}) + "\n")

    def chosen(self, token: dict[str, Any], choice: dict[str, Any]) -> None:
        """One policy's choice in one layer for a token of an answer."""
        self._file.write(json.dumps({**token, **choice}) + "\n")


class Watch:
    """Stands between a model and a session: hands every layer's queries to the choosers, then lets it attend."""

    def __init__(self, text: Text, needed: Sequence[int], figures: dict[tuple[str, int], Figures]) -> None:
        self.batch: SessionBatch | None = None
        self.counts = False
        """Whether this pass is one of the answer's tokens; what was before it is only remembered."""
        self._text, self._needed, self._figures = text, list(needed), figures
        self.trace: Callable[[dict[str, Any]], None] | None = None
        """Given what each chooser chose."""
        self._later_of_layer: dict[int, list[Tensor]] = {}

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """As a session's."""
        assert self.batch is not None
        if sliding_window is None:
            self._later_of_layer.setdefault(layer, []).append(torch.stack([k_NLH, v_NLH], dim=2))
            if self.counts:
                self._compare(layer, q_ALH[:, 0], scale, softcap)
        return self.batch.attend(
            layer, q_ALH, k_NLH, v_NLH, scale=scale, sliding_window=sliding_window, softcap=softcap
        )

    def _compare(self, layer: int, q_AH: Tensor, scale: float, softcap: float | None) -> None:
        text = self._text
        kv_NTH = torch.cat([text.kv(layer), *self._later_of_layer[layer]], dim=1).float()
        num_heads, num_tokens = kv_NTH.shape[:2]
        q_NGH = q_AH.float().unflatten(0, (num_heads, -1))
        logit_NGT = torch.einsum("ngh,nth->ngt", q_NGH, kv_NTH[:, :, 0]) * scale
        if softcap is not None:
            logit_NGT = softcap * torch.tanh(logit_NGT / softcap)
        weight_NGT = logit_NGT.softmax(dim=-1)
        first, stop = text.spans[0][0], text.spans[-1][1]
        sums = torch.nn.functional.pad(weight_NGT[:, :, first:stop].double().cumsum(-1), (1, 0))
        edges = torch.nn.functional.pad(text.lengths.cumsum(0), (1, 0))
        mass_NGS = (sums[:, :, edges[1:]] - sums[:, :, edges[:-1]]).clamp(min=0).float()
        beside_NG = 1 - mass_NGS.sum(-1)
        output_NGH = torch.einsum("ngt,nth->ngh", weight_NGT, kv_NTH[:, :, 1])
        needed_NG = mass_NGS[:, :, self._needed].sum(-1)
        wanted_NG = needed_NG >= _WANTED_MASS
        for chooser in text.choosers:
            figures = self._figures[chooser.name, chooser.budget]
            chosen_NS, order_NS, estimate_NGS = chooser.choose(q_AH, layer, scale, mass_NGS)
            if self.trace is not None:
                chosen = [row.nonzero().flatten().tolist() for row in chosen_NS]
                self.trace({"policy": chooser.name, "budget": chooser.budget, "layer": layer, "chosen": chosen})
            of_chosen_NG = (mass_NGS * chosen_NS[:, None]).sum(-1)
            read_NT = torch.ones(num_heads, num_tokens, dtype=torch.bool, device=kv_NTH.device)
            read_NT[:, first:stop] = chosen_NS.repeat_interleave(text.lengths, dim=1)
            part_NGT = weight_NGT * read_NT[:, None]
            total_NG = part_NGT.sum(-1)
            sum_NGH = torch.einsum("ngt,nth->ngh", part_NGT, kv_NTH[:, :, 1])
            if estimate_NGS is not None:
                unread_NGS = estimate_NGS.masked_fill(chosen_NS[:, None], -torch.inf)
                rest_NG = (unread_NGS - logit_NGT.logsumexp(-1, keepdim=True)).exp().sum(-1)
                total_NG = total_NG + rest_NG
                sum_NGH = sum_NGH + rest_NG[..., None] * kv_NTH[:, None, first:stop, 1].mean(2)
            difference = sum_NGH / total_NG[..., None] - output_NGH
            figures.count += 1
            mass = float((beside_NG + of_chosen_NG).mean())
            figures.mass += mass
            figures.mass_of_layer.setdefault(layer, []).append(mass)
            figures.of_sentences += float((of_chosen_NG / mass_NGS.sum(-1).clamp(min=1e-9)).mean())
            figures.error += float((difference.norm(dim=-1) / output_NGH.norm(dim=-1)).mean())
            if self._needed and bool(wanted_NG.any()):
                found_NG = (mass_NGS * chosen_NS[:, None])[:, :, self._needed].sum(-1) / needed_NG
                figures.needed += found_NG[wanted_NG].tolist()
                best_N = order_NS[:, self._needed].amax(-1)
                rank_N = (order_NS > best_N[:, None]).sum(-1) + 1
                figures.rank += rank_N[wanted_NG.any(-1)].tolist()


@torch.inference_mode()
def watch_answer(text: Text, fact: Fact, watch: Watch, trace: Trace | None = None) -> None:
    """Ask for a fact with dense attention, token by token."""
    engine, contents = text.engine, text.contents
    asked = contents.frame.between + fact.question + contents.frame.after
    ids = encode_appended(engine.tokenizer, contents.prompt.text, asked, engine.config).token_ids
    session = contents.session.fork()
    for number in range(_ANSWER_TOKENS):
        watch.counts = number > 0
        if trace is not None and number:
            token = engine.tokenizer.decode(ids)
            watch.trace = functools.partial(trace.chosen, {"question": fact.question, "number": number, "token": token})
        watch.batch = SessionBatch([session], [len(ids)])
        session.begin(len(ids), exact=True)
        at = torch.arange(session.num_tokens, session.num_tokens + len(ids), device=session.device)
        logits = run_model(engine.model, torch.tensor(ids, device=session.device), at, watch, keep=1)  # type: ignore[arg-type]
        session.end()
        ids = [int(logits[-1].argmax())]
        if ids[0] in engine._stop_ids:
            return


def choosers_of(document: Document, engines: dict[tuple[str, int], LongContextLM]) -> list[Chooser]:
    """All policies and budgets over one document; the oracle keeps no summaries of its own."""
    made = []
    for (name, budget), lm in engines.items():
        session = lm.adopt(document)._contents.session
        batch = LaneBatch(session.policy)
        batch.seat([session.fork()])
        assert batch._lanes is not None
        made.append(Chooser(name, budget, session, batch._lanes))
    return made


def study(
    lm: LongContextLM,
    engines: dict[tuple[str, int], LongContextLM],
    cases: Sequence[Case],
    tick: Callable[[], None] = lambda: None,
    trace: Trace | None = None,
) -> dict[tuple[str, int], Figures]:
    """Figures of every policy and budget over cases of one length.

    Args:
        lm: reads the texts and asks with dense attention: policy `full`.
        engines: by policy and budget, made of `lm` by `with_config`.
        trace: is told everything that was chosen.
    """
    figures = {key: Figures() for key in engines}
    # Those that cut a text alike look at one reading of it.
    alike: dict[tuple[Any, ...], dict[tuple[str, int], LongContextLM]] = {}
    for key, engine in engines.items():
        alike.setdefault(tuple(getattr(engine.config, name) for name in SHAPING), {})[key] = engine
    for case in cases:
        for shape, some in alike.items():
            with lm.with_config(**dict(zip(SHAPING, shape, strict=True))).read(case.hidden.text) as document:
                look(document, some, case, figures, len(cases), trace)
        tick()
    return figures


def look(
    document: Document,
    engines: dict[tuple[str, int], LongContextLM],
    case: Case,
    figures: dict[tuple[str, int], Figures],
    num_cases: int,
    trace: Trace | None,
) -> None:
    """Add the figures of one reading."""
    text = Text(document, choosers_of(document, engines))
    if trace is not None:
        trace.reading(text)
    for fact, span in zip(case.facts, case.hidden.spans, strict=True):
        watch_answer(text, fact, Watch(text, text.sentences_of(*span), figures), trace)
    for chooser in text.choosers:
        found = figures[chooser.name, chooser.budget]
        dense_bytes = chooser.session.dense_bytes * 2 / document._engine.model.dtype.itemsize
        found.bytes_per_token += chooser.summary_bytes / document.num_tokens / num_cases
        found.kv_share += chooser.summary_bytes / dense_bytes / num_cases
        if chooser.name != ORACLE:
            with engines[chooser.name, chooser.budget].adopt(document) as adopted:
                found.right += sum(score(adopted, case))


def row_of(key: tuple[str, int], context: int, found: Figures, asked: int) -> dict[str, Any]:
    """Means of the sums."""
    rank = sorted(found.rank)
    return {
        "policy": key[0],
        "budget_tokens": key[1],
        "context_tokens": context,
        "mass": found.mass / found.count,
        "mass_of_sentences": found.of_sentences / found.count,
        "output_error": found.error / found.count,
        "mass_by_layer": [sum(each) / len(each) for _, each in sorted(found.mass_of_layer.items())],
        "needed": sum(found.needed) / len(found.needed) if found.needed else None,
        "needed_rank_median": rank[len(rank) // 2] if rank else None,
        "needed_heads": len(found.needed),
        "right": None if key[0] == ORACLE else found.right,
        "of": asked,
        "summary_bytes_per_token": found.bytes_per_token,
        "summary_share_of_kv": found.kv_share,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: the needed mass that is chosen, against bytes of summaries and against the budget."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max(row["context_tokens"] for row in rows)
    shown = [row for row in rows if row["context_tokens"] == longest and row["needed"] is not None]
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["policy"] for row in shown))}
    for name, color in colors.items():
        of_name = sorted((r for r in shown if r["policy"] == name), key=lambda row: row["budget_tokens"])
        needed = [row["needed"] for row in of_name]
        right.plot([row["budget_tokens"] for row in of_name], needed, marker="o", color=color, label=name)
        if name != ORACLE:
            left.plot([100 * row["summary_share_of_kv"] for row in of_name], needed, marker="o", color=color)
    right.legend(frameon=False, loc="lower right")
    left.set(
        xlabel="summaries, % of KV", ylabel="needed mass chosen", title=f"{longest:,} tokens; a dot for each budget"
    )
    left.set_xlim(left=0)
    right.set(xlabel="budget, tokens", xscale="log", title=f"{longest:,} tokens")
    right.set_xticks(budgets := sorted({row["budget_tokens"] for row in shown}), [f"{b:,}" for b in budgets])
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(0, 1.05)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def main(
    model: Annotated[str, typer.Option(help="Model folder, hub name, or 'pocket'.")] = "pocket",
    policies: Annotated[
        str, typer.Option(help="Comma-separated policies that select, as policy or policy:option=value.")
    ] = "codes,moments,box,mean",
    budgets: Annotated[str, typer.Option(help="Comma-separated budgets in tokens.")] = "128,256,512",
    contexts: Annotated[str, typer.Option(help="Comma-separated context lengths in tokens.")] = "4096",
    cases: Annotated[int, typer.Option(min=1, help="Texts per length.")] = 2,
    facts: Annotated[int, typer.Option(min=1, help="Facts hidden in each text.")] = 8,
    text: Annotated[list[Path] | None, typer.Option(help="A text file as haystack; may be given again.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Also write which sentences each token chose, as JSON lines.")
    ] = None,
    save_plot: Annotated[Path | None, typer.Option(help="Also draw the longest context, to a PNG or SVG file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """What policies choose, beside what attention wants."""
    names = policies.split(",")
    lengths, sizes = whole_numbers(contexts, "contexts"), whole_numbers(budgets, "budgets")
    lm = LongContextLM.from_pretrained(model, device=device, dtype=dtype).with_config(policy="full")
    try:
        engines = {
            (name, budget): lm.with_config(**as_config("mean" if name == ORACLE else name), budget_tokens=budget)
            for name in [*names, ORACLE]
            for budget in sizes
        }
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    silent = [name for (name, _), engine in engines.items() if engine._engine.policy.reads != "selected"]
    if silent:
        raise typer.BadParameter(f"{silent[0]!r} selects no sentences; there is nothing to study")
    for path in (trace, save_plot):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {str(path.parent)!r} to write {path.name} to")
    texts = load_texts(text)
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar, open(trace, "w") if trace else contextlib.nullcontext() as out_file:
        task = bar.add_task("texts", total=len(lengths) * cases)
        for length in lengths:
            made = make_cases(lm, texts, length, cases, facts)
            found = study(lm, engines, made, lambda: bar.advance(task), Trace(out_file) if out_file else None)
            rows += [row_of(key, length, each, cases * facts) for key, each in found.items()]
    policy_column = Column("policy", no_wrap=True)
    table = Table(
        "context",
        "budget",
        policy_column,
        "mass",
        "of sentences",
        "error",
        "needed",
        "rank",
        "answers",
        "bytes",
        "of KV",
    )
    for row in rows:
        table.add_row(
            f"{row['context_tokens']:,}",
            f"{row['budget_tokens']:,}",
            row["policy"],
            f"{row['mass']:.3f}",
            f"{row['mass_of_sentences']:.3f}",
            f"{row['output_error']:.3f}",
            "-" if row["needed"] is None else f"{row['needed']:.3f}",
            str(row["needed_rank_median"] or "-"),
            "-" if row["right"] is None else f"{row['right']}/{row['of']}",
            f"{row['summary_bytes_per_token']:.0f}",
            f"{row['summary_share_of_kv']:.1%}",
        )
    out = Console()
    out.width = max(out.width, 110)  # into a file as well
    out.print(table)
    result = {
        "task": "selection",
        "model": model,
        "facts": facts,
        "cases": cases,
        "text": [path.name for path in text or []] or "generated prose",
        "rows": rows,
        **environment(lm),
    }
    if save_plot is not None:
        plot(rows, save_plot)
    out.file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
