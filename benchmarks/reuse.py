"""Time to the first token of a prompt that shares most of its tokens, moved, with a cached one.

    python -m benchmarks.reuse --shape llama-8b --tokens 5000,32768

Weights and prompts are random. A cached prompt is made of paragraphs; the new one has a share of these in another
order, and the others in other words: each token's neighbour, which the model's embeddings are made to have, so that
`fuzzy` finds one for all that is new. No text is so kind, and its row says no more than what they cost.

All that a user waits for is timed: looking for a cached prompt, aligning, moving KV out of host memory, computing the
rest, until the first token is known; and until the new prompt's KV is in host memory (`settled`), as for reading in
full. What caching a prompt costs is timed apart, after the answer.

The limit: tokens that the cached prompt does not have must be computed, so with a share s of shared tokens and no fuzzy
matches nothing can be faster than full reading by more than 1 / (1 - s).

Before anything is timed, a prompt all of whose tokens are computed anew must agree with reading it in full as well as
two dense implementations do with each other, and one whose keys are not turned must not.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import report
from benchmarks.arguments import where_and_how
from benchmarks.decode import numbers, tolerance_of
from benchmarks.prefill import CHUNK_TOKENS, dense, difference, sharpen_attention
from benchmarks.workload import SHAPES, make_model
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.prompts import Prompt
from sentencekv.reading import read
from sentencekv.reuse.prompt_cache import PromptCache, Reading
from sentencekv.session import Session

CHECK_TOKENS = 3000
CHECK_LAYERS = 2
SENTENCE_TOKENS = 16
_NOTHING: dict[str, Any] = {"first_tokens": 0, "after_new": 0, "last_tokens": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "similar, by default": {},
    "16 first tokens of each run computed": {"first_tokens": 16, "after_new": 16, "last_tokens": 0},
    "nothing of them computed": _NOTHING,
    "and 15% by value deviation": {**_NOTHING, "ratio": 0.15},
    "fuzzy, a tenth computed at the last layer (neighbours made for it)": {
        **_NOTHING,
        "fuzzy": True,
        "retention": 0.1,
    },
    "the same, any token for any other": {**_NOTHING, "fuzzy": True, "monotone": False, "retention": 0.1},
}
"""Options of `reuse="similar"` by name."""


def make_prompts(
    vocabulary: int, num_tokens: int, share: float, paragraph_tokens: int, seed: int
) -> tuple[Prompt, Prompt, Prompt]:
    """A cached prompt, one with a share of its paragraphs in another order and the others where they were in other
    words, each token's neighbour in place of it, and one that has nothing in common."""
    rng = np.random.default_rng(seed)
    count = -(-num_tokens // paragraph_tokens)
    old, strange = (rng.integers(0, vocabulary, (count, paragraph_tokens)) for _ in range(2))
    moved, mixed = rng.permutation(count)[: round(share * count)], old ^ 1
    mixed[np.sort(moved)] = old[moved]

    def prompt(paragraphs: Any) -> Prompt:
        ids = np.concatenate(list(paragraphs))[:num_tokens]
        ends = list(range(SENTENCE_TOKENS, len(ids), SENTENCE_TOKENS))
        return Prompt("", ids.tolist(), np.zeros((len(ids), 2), dtype=np.int64), [*ends, len(ids)])

    return prompt(old), prompt(mixed), prompt(strange)


def pair_embeddings(model: PreTrainedModel, seed: int) -> None:
    """Make tokens 2i and 2i + 1 near neighbours, as words of one meaning are."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        table: Any = model.get_input_embeddings()
        even, odd = table.weight[0::2], table.weight[1::2]
        noise = torch.empty_like(odd).normal_(generator=generator)
        odd.copy_(even + 0.1 * even.std() * noise)


class Reader:
    """A model that reads prompts, in full or with the help of cached ones."""

    def __init__(self, model: PreTrainedModel, config: Config, memory: HostMemory) -> None:
        self.model, self.config, self.memory = model, config, memory
        self.layers = FusedLayers(model)
        self.policy = load(config.policy, config.policy_options)
        self.chunk_tokens = CHUNK_TOKENS[model.device.type]

    def session(self) -> Session:
        return Session(self.config, self.policy, self.memory, self.model.device)

    def cache(self, **options: Any) -> PromptCache:
        """With options of `reuse="similar"`."""
        config = dataclasses.replace(self.config, reuse="similar", reuse_options=options)
        return PromptCache(
            self.model,
            self.layers,
            config,
            self.memory,
            self.session,
            owner="benchmark",
            chunk_tokens=self.chunk_tokens,
        )

    def full(self, prompt: Prompt) -> tuple[Session, Tensor]:
        session = self.session()
        with self.layers.active():
            return session, read(self.model, [session], [prompt], chunk_tokens=self.chunk_tokens)[0]


def timed(run: Callable[[], tuple[Session | None, Tensor]], device: torch.device) -> tuple[float, float, Tensor]:
    """Seconds to the first token, and until KV is in host memory; the logits."""
    gc.collect()
    report.synchronize(device)
    started_at = time.perf_counter()
    session, logits_V = run()
    int(logits_V.argmax())
    first_at = time.perf_counter()
    if session is not None:
        session.state()
    report.synchronize(device)
    return first_at - started_at, time.perf_counter() - started_at, logits_V


def check(shape: str, device: torch.device, dtype: torch.dtype, memory: HostMemory, seed: int) -> dict[str, Any]:
    """Relative errors of logits of a short prompt against dense reading."""
    model = make_model(shape, device, dtype, CHECK_TOKENS, seed, CHECK_LAYERS)
    sharpen_attention(model)
    reader = Reader(model, Config(), memory)
    old, mixed, _ = make_prompts(model.config.vocab_size, CHECK_TOKENS, 0.8, 128, seed)
    truth = dense(model, mixed)[0]
    errors = {}
    for name, options in {
        "all computed": {"first_tokens": CHECK_TOKENS, "min_gain": 0.0},
        "by default": {},
        "keys not turned": {**_NOTHING, "rotate": False},
    }.items():
        cache = reader.cache(**options)
        cache.read(old, "check").finish(0.0)
        reading = cache.read(mixed, "check")
        assert reading.finish(0.0).kind == "similar"
        errors[name] = difference(reading.logits_V, truth)
        cache.close()
    model.set_attn_implementation("eager")
    rounding = difference(dense(model, mixed)[0], truth)
    tolerance = tolerance_of(model.dtype, rounding)
    passed = errors["all computed"] <= tolerance and errors["keys not turned"] >= 2 * tolerance
    return {"errors": errors, "rounding": rounding, "tolerance": tolerance, "passed": passed}


def rows_of(
    reader: Reader, num_tokens: int, share: float, paragraph_tokens: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """All ways to read one prompt; medians."""
    model, device = reader.model, reader.model.device
    old, mixed, strange = make_prompts(model.config.vocab_size, num_tokens, share, paragraph_tokens, seed)
    rows: list[dict[str, Any]] = []

    def add(variant: str, run: Callable[[], tuple[Session | None, Tensor]], **more: Any) -> dict[str, Any]:
        run()  # kernels are compiled and memory is taken
        runs = [timed(run, device) for _ in range(repeats)]
        first, settled = ([each[i] for each in runs] for i in (0, 1))
        seconds = statistics.median(first)
        full = rows[0]["seconds"] if rows else seconds
        row = {
            "variant": variant,
            "tokens": num_tokens,
            "seconds": seconds,
            "least_seconds": min(first),
            "most_seconds": max(first),
            "settled_seconds": statistics.median(settled),
            "times_faster": full / seconds,
            **more,
        }
        rows.append(row)
        report.say(f"  {num_tokens:,}, {variant}: {1e3 * row['seconds']:.1f} ms ({row['times_faster']:.2f} times)")
        return row

    add("in full", lambda: reader.full(mixed))
    add("transformers, dense", lambda: (None, dense(model, mixed)[0]))
    for name, options in VARIANTS.items():
        cache = reader.cache(**options)
        reading = cache.read(old, "benchmark")
        int(reading.logits_V.argmax())
        started_at = time.perf_counter()
        reading.finish(0.0)
        caching_seconds = time.perf_counter() - started_at
        found: list[Reading] = []

        def run(cache: PromptCache = cache, found: list[Reading] = found) -> tuple[Session, Tensor]:
            found.clear()  # pinning memory for two readings at once is not what is timed
            found.append(cache.read(mixed, "benchmark"))
            return found[0].session, found[0].logits_V

        row = add(name, run, caching_seconds=caching_seconds)
        reuse = found[0].finish(row["seconds"])
        row |= {
            "kind": reuse.kind,
            "computed_by_layer": reuse.computed_by_layer,
            "seconds_to_find": reuse.seconds_to_find,
            "reused_tokens": reuse.reused_tokens,
            "edit_bytes": cache.catalog.statistics("benchmark").host_bytes,
        }
        if name == next(iter(VARIANTS)):

            def same(cache: PromptCache = cache) -> tuple[Session, Tensor]:
                reading = cache.read(mixed, "benchmark")
                return reading.session, reading.logits_V

            add("the same prompt again", same)

            def wrong(cache: PromptCache = cache) -> tuple[Session, Tensor]:
                reading = cache.read(strange, "benchmark")
                return reading.session, reading.logits_V

            add("a prompt that has nothing in common", wrong)
        cache.close()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people; everything is in the JSON line."""
    header = [
        "read",
        "kind",
        "tokens",
        "ms to first token",
        "spread",
        "times faster",
        "ms to settle",
        "computed, first and last layer",
        "ms to find",
        "ms to cache",
    ]
    cells = []
    for row in rows:
        layers = row.get("computed_by_layer")
        cells.append(
            [
                row["variant"],
                row.get("kind", "-"),
                f"{row['tokens']:,}",
                f"{1e3 * row['seconds']:.1f}",
                f"{1e3 * row['least_seconds']:.1f}-{1e3 * row['most_seconds']:.1f}",
                f"{row['times_faster']:.2f}",
                f"{1e3 * row['settled_seconds']:.1f}",
                f"{layers[0]:,} / {layers[-1]:,}" if layers else "-",
                *(f"{1e3 * row[name]:.1f}" if name in row else "-" for name in ("seconds_to_find", "caching_seconds")),
            ]
        )
    return report.markdown_table(header, cells)


def text_of(result: dict[str, Any]) -> str:
    """The whole report for people."""
    checked = result["check"]
    errors = ", ".join(f"{name} {error:.2g}" for name, error in checked["errors"].items())
    return "\n".join(
        [
            f"{result['shape']}, {result['dtype']}, {result['share']:.0%} of the tokens in moved paragraphs of "
            f"{result['paragraph_tokens']}, {result['hardware'].get('gpu', 'CPU')}; commit {result['commit']}, "
            + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
            f"check: errors of logits against dense reading: {errors} (rounding {checked['rounding']:.2g}, limit "
            f"{checked['tolerance']:.2g})",
            "kind: what came of it; none, where reuse would have saved too little. ms to cache: the cached prompt, "
            "after its answer",
            "",
            table(result["rows"]),
        ]
    )


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-8b",
    tokens: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "5000,32768",
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the new prompt's tokens, those that are cached.")
    ] = 0.8,
    paragraph: Annotated[int, typer.Option(min=16, help="Tokens of a paragraph.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed readings of each kind.")] = 5,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Time reading with and without reuse; the last line is JSON."""
    where, precision = where_and_how(shape, device, dtype)
    lengths = sorted(numbers(tokens, "tokens", 512))
    memory = HostMemory(None, pinned=where.type == "cuda")
    checked = check(shape, where, precision, memory, seed)
    report.say(f"check: {checked}")
    if not checked["passed"]:
        report.say("not timed: the check failed")
        raise typer.Exit(1)
    report.free(where)
    report.say(f"making {shape} with random weights")
    model = make_model(shape, where, precision, max(lengths), seed)
    pair_embeddings(model, seed)
    reader = Reader(model, Config(), memory)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        rows += rows_of(reader, length, share, paragraph, repeats, seed)
    result: dict[str, Any] = {
        "benchmark": "reuse",
        "shape": shape,
        "dtype": dtype,
        "share": share,
        "paragraph_tokens": paragraph,
        "seed": seed,
        "check": checked,
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
        "rows": rows,
    }
    text = text_of(result)
    print(text)
    if save is not None:
        report.save(save, result, text)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
