"""How much of what a token reads was read before: hit rates of the hot set on real text, by its size, and drift.

    python -m benchmarks.locality --text book.txt --context 32768 --budgets 512,2048

Reads the first part of a text, then feeds its next tokens one by one, as generation would if it wrote that text. Every
selection is recorded, and hot sets of several sizes are simulated on the record (least recently used leaves, as in the
engine); the engine's own hit rate is printed beside the simulation of its own size, which it must equal. Drift is the
share of a selection that was also selected so many tokens before.
"""

from __future__ import annotations

import json
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from benchmarks import report
from benchmarks.decode import numbers
from sentencekv import LongContextLM, pocket
from sentencekv.files import TextError, load_text
from sentencekv.policies import Policy, Selection, available, load
from sentencekv.prompts import encode, section
from triton_ops import Lanes

_LAGS = (1, 8, 64)
"""Tokens between two selections that are compared."""

Selections = dict[tuple[int, int], list[list[int]]]
"""For each layer and KV head, the sentences selected at each step."""


def hit_rate(selections: Selections, num_slots: int) -> float:
    """Of a hot set of so many slots for each layer and KV head."""
    hits = total = 0
    for steps in selections.values():
        slot_of: dict[int, int] = {}
        held: list[int | None] = [None] * num_slots
        last_used = [-1] * num_slots
        for step, selected in enumerate(steps):
            missed = [sentence for sentence in selected if sentence not in slot_of]
            hits, total = hits + len(selected) - len(missed), total + len(selected)
            for sentence in selected:
                if sentence in slot_of:
                    last_used[slot_of[sentence]] = step
            # As the engine: of equally old slots the first are taken, in order.
            free = (slot for slot in range(num_slots) if last_used[slot] < step)
            victims = sorted(sorted(free, key=lambda slot: (last_used[slot], slot))[: len(missed)])
            for sentence, slot in zip(missed, victims, strict=True):
                if held[slot] is not None:
                    slot_of.pop(held[slot])  # type: ignore[arg-type]
                held[slot], last_used[slot], slot_of[sentence] = sentence, step, slot
    return hits / max(total, 1)


def overlap(selections: Selections, lag: int) -> float | None:
    """Share of what a step selects that the step `lag` before it selected; None: there are too few steps."""
    same = total = 0
    for steps in selections.values():
        for before, now in zip(steps, steps[lag:], strict=False):
            same, total = same + len(set(before) & set(now)), total + len(now)
    return same / total if total else None


def record(lm: LongContextLM, text: str, context_tokens: int, num_steps: int) -> tuple[Selections, dict[str, Any]]:
    """Selections while `num_steps` tokens of a text are fed after `context_tokens` of it; what the engine counted."""
    engine = lm._engine
    prompt = encode(lm.tokenizer, text, lm.config, special_tokens=True)
    if len(prompt.token_ids) < context_tokens + num_steps:
        raise typer.BadParameter(
            f"the text has {len(prompt.token_ids)} tokens and {context_tokens + num_steps} are needed; give a longer "
            "one, or a smaller --context"
        )
    session = engine.session()
    engine.read([session], [section(prompt, 0, context_tokens, [])])
    session.expect([end for end in prompt.ends if end > max(context_tokens, session.last_expected_end)])
    selections: Selections = {}

    def select(policy: Policy, q_BAH: Tensor, lanes: Lanes, layer: int, **options: Any) -> Selection:
        selected = original(policy, q_BAH, lanes, layer, **options)
        for head, ids in enumerate(selected.sentence_BNK[0].tolist()):
            selections.setdefault((layer, head), []).append([sentence for sentence in ids if sentence >= 0])
        return selected

    own = type(engine.policy)
    original = own.select
    with mock.patch.object(own, "select", select):
        for step in range(num_steps):
            engine.stepper.step([session], [prompt.token_ids[context_tokens + step]])
    lane = session.lane()
    counted = {
        "hit_rate": session.traffic.hit_rate,
        "num_slots": lane.num_slots,
        "selected_per_step": session.traffic.num_selected / num_steps / len(selections),
        "sentences": session.num_sentences,
        "mean_sentence_tokens": context_tokens / max(session.num_sentences, 1),
    }
    return selections, counted


def main(
    text: Annotated[str, typer.Option(help="A text file or folder, long enough for context and steps.")],
    model: Annotated[str | None, typer.Option(help="Model folder; left out: the embedded model.")] = None,
    context: Annotated[int, typer.Option(min=256, help="Tokens that are read.")] = 32768,
    steps: Annotated[int, typer.Option(min=2, help="Tokens fed one by one after them.")] = 96,
    budgets: Annotated[str, typer.Option(help="Budgets in tokens, separated by commas.")] = "512,2048",
    policies: Annotated[str, typer.Option(help="Policies that select.")] = "codes,moments",
    sizes: Annotated[str, typer.Option(help="Sizes of the hot set, in budgets.")] = "1.25,1.5,2,3,4",
) -> None:
    """Print hit rates by policy, budget and size of the hot set; the last line is JSON."""
    names = policies.split(",")
    selecting = [name for name in available() if load(name).reads == "selected"]
    if not set(names) <= set(selecting):
        raise typer.BadParameter(f"policies must be among {', '.join(selecting)}; got {policies!r}")
    budget_list = numbers(budgets, "budgets", least=1)
    try:
        multiples = [float(size) for size in sizes.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"sizes are numbers separated by commas, got {sizes!r}") from error
    try:
        content = load_text(text).text
    except (TextError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    base = LongContextLM.from_pretrained(model or str(pocket.path()))
    rows: list[dict[str, Any]] = []
    for name in names:
        for budget in budget_list:
            lm = base.with_config(policy=name, budget_tokens=budget)
            with torch.inference_mode():
                selections, counted = record(lm, content, context, steps)
            simulated = hit_rate(selections, counted["num_slots"])
            if abs(simulated - counted["hit_rate"]) > 1e-6:
                raise RuntimeError(f"the engine counted a hit rate of {counted['hit_rate']}, simulated is {simulated}")
            slot_tokens = lm.config.max_sentence_tokens
            by_size = {
                multiple: hit_rate(selections, max(int(multiple * budget / slot_tokens), most_selected(selections)))
                for multiple in multiples
            }
            same = {lag: overlap(selections, lag) for lag in _LAGS}
            rows.append(
                {"policy": name, "budget_tokens": budget, **counted, "hit_rate_of_size": by_size, "same_after": same}
            )
    header = ["policy", "budget", "engine's own", *(f"{multiple:g} budgets" for multiple in multiples)]
    header += [f"same {lag} before" for lag in _LAGS]
    cells = [
        [
            row["policy"],
            str(row["budget_tokens"]),
            f"{row['hit_rate']:.3f}",
            *(f"{row['hit_rate_of_size'][multiple]:.3f}" for multiple in multiples),
            *("-" if row["same_after"][lag] is None else f"{row['same_after'][lag]:.3f}" for lag in _LAGS),
        ]
        for row in rows
    ]
    print(f"{context} tokens of {text}, {steps} steps; slots of {base.config.max_sentence_tokens} tokens")
    print(report.markdown_table(header, cells))
    print(json.dumps({"benchmark": "locality", "context_tokens": context, "steps": steps, "rows": rows}))


def most_selected(selections: Selections) -> int:
    """The most sentences that one step selects for one head: a hot set has at least so many slots."""
    return max(len(selected) for steps in selections.values() for selected in steps)


if __name__ == "__main__":
    typer.run(main)
