"""Time of each op of a sparse step, as its share of what the memory system allows.

    python -m benchmarks.ops --shape llama-8b --context 131072

Each op runs over all layers of the shape, one launch after another as in a decoding step, recorded as a CUDA graph and
replayed; layers are different data, so that caches hold little. Before it is timed, its result in one layer is compared
with the reference's; what differs is not timed. `gather_kv` is also timed against pinned copies of as many bytes, each
one `cudaMemcpyAsync`. Ops of the retrieval are in `RetrievalOps`, those of the model's own layers in `layer_ops`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import report
from benchmarks.arguments import where_and_how
from benchmarks.layer_ops import layer_ops
from benchmarks.report import Op
from benchmarks.retrieval_ops import RetrievalOps
from benchmarks.workload import SHAPES, Context, Shape, make_config
from sentencekv.memory import HostMemory


def measure(op: Op, device: torch.device, bandwidth_of: dict[str, float], repeats: int) -> dict[str, Any]:
    """One row: checked, then timed. Times and bytes are those of one launch."""
    row: dict[str, Any] = {"op": op.name, "detail": op.detail, "status": "ok", "launches": op.launches}
    row["bytes"] = op.num_bytes / op.launches if op.num_bytes else None
    try:
        row["error"], row["limit"] = op.check(), op.limit
        if not row["error"] <= op.limit:
            return row | {"status": f"failed its check: differs by {row['error']:.2g} (limit {op.limit:.2g})"}
        times = report.recorded_times(op.launch, device, repeats, graph=op.graph)
    except torch.OutOfMemoryError:
        return row | {"status": "out_of_memory"}
    for key, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        row[f"us_{key}"] = report.quantile(times, share) / op.launches
    if row["bytes"]:
        row["bytes_per_second"] = row["bytes"] / row["us_median"] * 1e6
        row["share_of_peak"] = row["bytes_per_second"] / bandwidth_of[op.limited_by]
        row["limited_by"] = op.limited_by
    return row


def add_memcpy_ratios(rows: list[dict[str, Any]]) -> None:
    """To each gather the speed of the pinned copy of as many bytes, as the share of it that the gather reaches."""
    copies = {row["detail"]: row for row in rows if row["op"] == "pinned copy" and "us_median" in row}
    for row in rows:
        if row["op"] == "gather_kv" and "us_median" in row and row["detail"] in copies:
            copy = copies[row["detail"]]
            row["share_of_memcpy"] = row["bytes_per_second"] / copy["bytes_per_second"]


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people; everything is in the JSON line."""
    number, share = report.number_text, report.share_text
    header = ["op", "of", "us", "p10", "p90", "MB", "GB/s", "of peak", "of memcpy", "error", "status"]
    cells = [
        [
            row["op"],
            row["detail"],
            *(number(row.get(f"us_{key}")) for key in ("median", "p10", "p90")),
            number(row["bytes"] / 1e6 if row["bytes"] else None),
            number(row["bytes_per_second"] / 1e9 if "bytes_per_second" in row else None, 0),
            f"{share(row['share_of_peak'])} {row['limited_by']}" if "share_of_peak" in row else "-",
            share(row.get("share_of_memcpy")),
            f"{row['error']:.1e}" if row.get("error") is not None else "-",
            row["status"],
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)


def sizes(text: str) -> list[float]:
    """Mebibytes separated by commas. Raises typer.BadParameter."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"sizes are numbers separated by commas, got {text!r}") from error
    if min(found) <= 0:
        raise typer.BadParameter(f"sizes must be above 0, got {text!r}")
    return found


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-8b",
    context: Annotated[int, typer.Option(min=256, help="Tokens of context.")] = 131072,
    budget: Annotated[int, typer.Option(help="Budget in tokens.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    gather_mib: Annotated[str, typer.Option(help="MiB gathered by one launch, separated by commas.")] = "4,32",
    model_layers: Annotated[bool, typer.Option(help="Also the ops of the model's own layers.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed replays of each op.")] = 20,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of KV, sentences and queries.")] = 0,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Time the ops over all layers of a shape; the last line is JSON."""
    where, precision = where_and_how(shape, device, dtype)
    gather_sizes = sizes(gather_mib)
    bandwidth_of = {"device": report.copy_bandwidth(where), "host": report.host_copy_bandwidth(where)}
    report.free(where)
    described = Shape(make_config(shape, context), where, precision)
    rows: list[dict[str, Any]] = []

    def add(op: Op) -> None:
        row = measure(op, where, bandwidth_of, repeats)
        rows.append(row)
        text = f"{row['us_median']:.2f} us" if "us_median" in row else row["status"]
        report.say(f"  {op.name}, {op.detail}: {text}")

    if model_layers:
        for op in layer_ops(described, batch, seed):
            add(op)
            report.free(where)
    work = Context(described, context, 64, seed)
    report.say(f"filling {context} tokens, {work.kv_bytes / 2**30:.1f} GiB of host memory")
    retrieval = RetrievalOps(work, HostMemory(None, pinned=where.type == "cuda"), budget, batch)
    for op in retrieval.ops(gather_sizes):
        add(op)
        report.free(where)
    add_memcpy_ratios(rows)
    result = {
        "benchmark": "ops",
        "shape": shape,
        "context_tokens": context,
        "budget_tokens": budget,
        "batch": batch,
        "dtype": dtype,
        "seed": seed,
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
        "copy_bandwidth_bytes_per_second": bandwidth_of["device"],
        "host_copy_bandwidth_bytes_per_second": bandwidth_of["host"],
        "rows": rows,
    }
    place = report.hardware(where).get("gpu", "CPU")
    text = "\n".join(
        [
            f"{shape}, {dtype}, batch {batch}, {context} tokens of context, budget {budget}, {place}, copy bandwidth "
            f"{bandwidth_of['device'] / 1e9:,.0f} GB/s on the device and {bandwidth_of['host'] / 1e9:,.0f} from pinned "
            f"memory; commit {result['commit']}",
            "",
            table(rows),
            "",
            f"Per launch, of {work.num_layers} layers' launches in one recorded graph; `of peak` is the share of the "
            "measured copy bandwidth.",
        ]
    )
    if save is not None:
        report.save(save, result, text)
    print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
