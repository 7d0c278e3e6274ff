"""Memory and time per token while one reply grows long.

    python -m benchmarks.long_generation --shape llama-1b --context 4096 --new-tokens 50000

The engine's own decode loop, greedy, over random weights and a random context. The reply's sentences close, are
summarised and leave for host memory like those of a document; what grows on the device is their summaries alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import report
from benchmarks.arguments import where_and_how
from benchmarks.loop import time_loop
from benchmarks.ours import holdings, make_stepper
from benchmarks.workload import SHAPES, Context, config_of, make_model
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.graph import Stepper
from sentencekv.memory import HostMemory
from sentencekv.session import Session

WARMUP_TOKENS = 8


def snapshot(session: Session, stepper: Stepper, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """What is held after so many tokens of reply."""
    row = {"generated_tokens": num_tokens, "graphs": stepper.num_recorded, **holdings([session])}
    if device.type == "cuda":
        row["allocated_bytes"] = torch.cuda.memory_allocated(device)
        row["reserved_bytes"] = torch.cuda.memory_reserved(device)
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return row


def table(result: dict[str, Any]) -> str:
    """The figures for people; everything is in the JSON line."""
    mib, number = report.mib_text, report.number_text
    header = [
        "tokens generated",
        "ms per token",
        "GPU KV MiB",
        "summaries",
        "beside them",
        "peak beside weights",
        "host MiB",
    ]
    header += ["dense KV MiB", "hit rate", "graphs recorded"]
    cells = [
        [
            f"{row['generated_tokens']:,}",
            number(row.get("tpot_ms_median")),
            mib(row["kv_gpu_bytes"]),
            mib(row["summary_bytes"]),
            mib(row["kv_gpu_bytes"] - row["summary_bytes"]),
            mib(row["peak_bytes"] - result["weight_bytes"] if "peak_bytes" in row else None),
            mib(row["kv_host_bytes"]),
            mib(row["kv_dense_bytes"]),
            report.share_text(row["hit_rate"]),
            str(row["graphs"]),
        ]
        for row in result["rows"]
    ]
    return report.markdown_table(header, cells)


def text_of(result: dict[str, Any]) -> str:
    """The whole report for people."""
    lines = [
        f"{result['shape']}, {result['context_tokens']:,} tokens of context, {result['dtype']}, policy "
        f"{result['policy']}, budget {result['budget_tokens']:,}, {result['hardware'].get('gpu', 'CPU')}; commit "
        f"{result['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        "",
        table(result),
        "",
        "Weights and context are random, so selections have little to do with each other.",
    ]
    return "\n".join(lines)


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-1b",
    context: Annotated[int, typer.Option(min=256, help="Tokens before the reply.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=100, help="Tokens of the reply.")] = 50_000,
    policy: Annotated[str, typer.Option(help="Policy, or policy:option=value.")] = Config().policy,
    budget: Annotated[int, typer.Option(help="Tokens read at each step.")] = Config().budget_tokens,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 10,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of weights, context and sentences.")] = 0,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Generate one long reply and follow its memory and time; the last line is JSON."""
    where, precision = where_and_how(shape, device, dtype)
    try:
        config = config_of(policy, budget)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    report.say(f"making {shape} with random weights")
    model = make_model(shape, where, precision, context + new_tokens + 100, seed)
    filled = Context(model, context, new_tokens + 100, seed)
    session = filled.session(config, HostMemory(None, pinned=where.type == "cuda"))
    stepper = make_stepper(model, session, FusedLayers(model), run_ahead=None)
    snapshots: list[dict[str, Any]] = []
    every = -(-new_tokens // rows)

    def on_token(count: int) -> None:
        count -= WARMUP_TOKENS
        if count > new_tokens:
            return
        if count == 1 or (count > 0 and count % every == 0) or count == new_tokens:
            snapshots.append(snapshot(session, stepper, count, where))
            report.say(f"  {count:,} tokens, {snapshots[-1]['kv_gpu_bytes'] / 2**20:.1f} MiB of KV on the device")

    times, _ = time_loop(stepper, [session], filled.token_ids()[:1], WARMUP_TOKENS, new_tokens, on_token)
    before = 0
    for row in snapshots:
        row["tpot_ms_median"] = float(np.median(times[before : row["generated_tokens"]]))
        before = row["generated_tokens"]
    result: dict[str, Any] = {
        "benchmark": "long_generation",
        "shape": shape,
        "context_tokens": context,
        "policy": policy,
        "budget_tokens": budget,
        "dtype": dtype,
        "seed": seed,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
        "rows": snapshots,
    }
    text = text_of(result)
    print(text)
    if save is not None:
        report.save(save, result, text)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
