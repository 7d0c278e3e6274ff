"""Time per generated token, and what it holds in memory, against transformers' dense decoding.

    python -m benchmarks.decode --shape llama-8b --context 32768

The model has random weights and the context random KV, the same for every variant; a fixed random token is fed at each
step. Queries of random weights have little to do with each other, so the hit rate of the hot set is far below what text
gives, and the time of the sparse variants is that of a poor case. Before anything is timed, sparse decoding with a
budget that covers a short context must equal dense decoding, and decoding without that context must not.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from benchmarks import report
from benchmarks.profile import profile_step
from benchmarks.workload import SHAPES, Context, make_model, streamed_weight_bytes
from sentencekv.attention import forward
from sentencekv.config import Config
from sentencekv.policies import available, load
from sentencekv.session import Session, Traffic
from sentencekv.store import HostMemory

CHECK_TOKENS = 2048
CHECK_STEPS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Difference to dense decoding that always passes, as a share of the logits' norm. Where rounding alone does more, the
limit is twice the difference between transformers' own two dense implementations."""

Step = Callable[[int], Tensor]
"""Feeds one token, returns its float32 logits `[1, vocabulary]`."""


def session_step(model: PreTrainedModel, session: Session) -> Step:
    """One token through the engine."""
    return lambda token: forward(model, [[token]], [session], exact=False)


def dense_step(model: PreTrainedModel, cache: DynamicCache, *, cudnn: bool = True) -> Step:
    """One token through transformers: eager modules, DynamicCache, SDPA.

    `cudnn=False` keeps SDPA from cuDNN, which recent torch prefers on Hopper and which plans anew for every length.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    @torch.inference_mode()
    def step(token: int) -> Tensor:
        position = torch.tensor([[cache.get_seq_length()]], device=model.device)
        ids = torch.tensor([[token]], device=model.device)
        with contextlib.nullcontext() if cudnn else sdpa_kernel(backends):
            output = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        return output.logits[0].float()

    return step


def check(model: PreTrainedModel, memory: HostMemory, policy: str, context_tokens: int, seed: int) -> dict[str, Any]:
    """Relative error of covering sparse decoding against dense, and that of reading no context, as a control.

    The same dense decoding with `eager` in place of `sdpa` attention says how much rounding alone does.
    """
    context = Context(model, context_tokens, CHECK_STEPS, seed)
    covering = Config(policy=policy, budget_tokens=context_tokens + CHECK_STEPS)
    steps = {
        "dense": dense_step(model, context.cache()),
        "sparse": session_step(model, context.session(covering, memory)),
        "window": session_step(model, context.session(Config(policy="window"), memory)),
    }
    logits = {name: torch.cat([step(token) for token in context.token_ids()]) for name, step in steps.items()}
    model.set_attn_implementation("eager")
    step = dense_step(model, context.cache())
    logits["eager"] = torch.cat([step(token) for token in context.token_ids()])
    model.set_attn_implementation("sdpa")

    def difference(name: str) -> float:
        return ((logits[name] - logits["dense"]).norm() / logits["dense"].norm()).item()

    error, rounding, control = difference("sparse"), difference("eager"), difference("window")
    tolerance = max(TOLERANCE[model.dtype], 2 * rounding)
    passed = error <= tolerance and control >= 2 * tolerance
    return {
        "context_tokens": context_tokens,
        "steps": CHECK_STEPS,
        "relative_error": error,
        "rounding_relative_error": rounding,
        "control_relative_error": control,
        "tolerance": tolerance,
        "passed": passed,
    }


def time_steps(step: Step, token_ids: list[int], device: torch.device) -> list[float]:
    """Milliseconds of each step, synchronised before and after."""
    milliseconds = []
    for token in token_ids:
        report.synchronize(device)
        started_at = time.perf_counter()
        step(token)
        report.synchronize(device)
        milliseconds.append((time.perf_counter() - started_at) * 1e3)
    return milliseconds


def measure(
    step: Step, context: Context, num_warmup: int, num_timed: int, on_warm: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Time and peak memory of a variant. `on_warm` is called between warm-up and timing."""
    device = context.model.device
    token_ids = context.token_ids()[: num_warmup + num_timed]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    time_steps(step, token_ids[:num_warmup], device)
    if on_warm is not None:
        on_warm()
    milliseconds = time_steps(step, token_ids[num_warmup:], device)
    return {
        "timed_steps": len(milliseconds),
        "tpot_ms_median": report.quantile(milliseconds, 0.5),
        "tpot_ms_p10": report.quantile(milliseconds, 0.1),
        "tpot_ms_p90": report.quantile(milliseconds, 0.9),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def run_dense(context: Context, num_warmup: int, num_timed: int, *, cudnn: bool = True) -> dict[str, Any]:
    """transformers' own decoding."""
    cache = context.cache()
    step = dense_step(context.model, cache, cudnn=cudnn)
    name = "transformers" if cudnn else "transformers, no cuDNN"
    row: dict[str, Any] = {"variant": name, "policy": None, "budget_tokens": None}
    row |= measure(step, context, num_warmup, num_timed)
    kv_bytes = cache.get_seq_length() * context.token_bytes
    return row | {"kv_gpu_bytes": kv_bytes, "kv_host_bytes": 0, "kv_dense_bytes": kv_bytes, "read_bytes": kv_bytes}


def run_session(
    context: Context, config: Config, memory: HostMemory, num_warmup: int, num_timed: int
) -> dict[str, Any]:
    """The engine under one policy and budget."""
    session = context.session(config, memory)
    step = session_step(context.model, session)

    def forget_warmup() -> None:
        session.traffic = Traffic()

    selects = session.policy.reads == "selected"
    row: dict[str, Any] = {
        "variant": f"{config.policy} {config.budget_tokens}" if selects else config.policy,
        "policy": config.policy,
        "budget_tokens": config.budget_tokens if selects else None,
    }
    row |= measure(step, context, num_warmup, num_timed, forget_warmup)
    traffic = session.traffic
    summary_bytes = session.summary_bytes
    if selects:
        num_read = min(config.budget_tokens, session.num_tokens)
    elif session.policy.reads == "recent":
        num_read = config.sink_tokens + config.window_tokens
    else:
        num_read = session.num_tokens
    steps = max(traffic.steps, 1)
    return row | {
        "sentences": session.num_sentences,
        "kv_gpu_bytes": session.device_bytes,
        "kv_host_bytes": session.host_bytes,
        "kv_dense_bytes": session.dense_bytes,
        "summary_bytes": summary_bytes,
        "read_bytes": summary_bytes + num_read * context.token_bytes,
        "hit_rate": traffic.hit_rate,
        "tokens_fetched_per_step": traffic.tokens_fetched / steps,
        "bytes_fetched_per_step": traffic.tokens_fetched / steps * 2 * context.vector_bytes,
    }


def profile_variant(context: Context, step: Step, num_warmup: int) -> dict[str, Any]:
    """Where the time of one step goes, after the warm-up."""
    *warmup, last = context.token_ids()[: num_warmup + 1]
    time_steps(step, warmup, context.model.device)
    return profile_step(lambda: step(last), context.model.device)


def add_floor(row: dict[str, Any], weight_bytes: int, bandwidth: float) -> None:
    """The least time that the memory system allows: weights, summaries and the KV read, once each."""
    row["floor_ms"] = (weight_bytes + row["read_bytes"]) / bandwidth * 1e3
    row["share_of_floor"] = row["floor_ms"] / row["tpot_ms_median"]


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for people; everything is in the JSON line."""

    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value / 2**20:,.1f}"

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    header = ["variant", "ms/token", "p10", "p90", "KV GPU MiB", "of dense", "KV host MiB", "hit rate"]
    header += ["fetched MiB/token", "floor ms", "floor/time", "peak GPU MiB"]
    cells = [
        [
            row["variant"],
            f"{row['tpot_ms_median']:.2f}",
            f"{row['tpot_ms_p10']:.2f}",
            f"{row['tpot_ms_p90']:.2f}",
            mib(row["kv_gpu_bytes"]),
            percent(row["kv_gpu_bytes"] / row["kv_dense_bytes"]),
            mib(row["kv_host_bytes"]),
            percent(row.get("hit_rate")),
            mib(row.get("bytes_fetched_per_step")),
            f"{row['floor_ms']:.2f}",
            percent(row["share_of_floor"]),
            mib(row["peak_gpu_bytes"]),
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)


def _free(device: torch.device) -> None:
    """Give back the device memory that the last variant held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _budgets(text: str) -> list[int]:
    try:
        budgets = [int(part) for part in text.split(",")]
        for budget in budgets:
            Config(budget_tokens=budget)
    except ValueError as error:
        raise typer.BadParameter(f"budgets are whole numbers separated by commas, got {text!r}: {error}") from error
    return budgets


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-8b",
    context: Annotated[int, typer.Option(min=256, help="Tokens of context.")] = 32768,
    budgets: Annotated[str, typer.Option(help="Budgets in tokens, separated by commas.")] = "512,2048,8192",
    policy: Annotated[str, typer.Option(help="Policy that the budgets are run with.")] = Config().policy,
    new_tokens: Annotated[int, typer.Option(min=1, help="Timed tokens per variant.")] = 32,
    warmup_tokens: Annotated[int, typer.Option(min=1, help="Tokens before timing starts.")] = 8,
    full_tokens: Annotated[int, typer.Option(min=0, help="Timed tokens of the full policy; 0 leaves it out.")] = 4,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of weights, KV, sentences and tokens.")] = 0,
    profile: Annotated[bool, typer.Option(help="Profile one step of each variant, after all are timed.")] = False,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Time decoding with random weights over a random context, sparse and dense; the last line is JSON."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    selecting = [name for name in available() if load(name).reads == "selected"]
    if policy not in selecting:
        raise typer.BadParameter(f"policy must be one that selects: {', '.join(selecting)}; got {policy!r}")
    budget_list = _budgets(budgets)
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device was found; give --device cpu")
    precision = getattr(torch, dtype, None)
    if precision not in TOLERANCE:
        raise typer.BadParameter(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")

    bandwidth = report.copy_bandwidth(where)
    _free(where)
    num_new = warmup_tokens + max(new_tokens, full_tokens)
    _say(f"making {shape} with random weights")
    model = make_model(shape, where, precision, max_tokens=max(context, CHECK_TOKENS) + num_new, seed=seed)
    weight_bytes = streamed_weight_bytes(model)
    memory = HostMemory(None, pinned=where.type == "cuda")

    _say("checking sparse against dense decoding")
    checked = check(model, memory, policy, min(context, CHECK_TOKENS), seed)
    _free(where)
    if not checked["passed"]:
        _say(
            f"not timed: covering sparse decoding differs from dense by {checked['relative_error']:.3g} of the logits' "
            f"norm (at most {checked['tolerance']:.3g}), decoding without the context by "
            f"{checked['control_relative_error']:.3g} (at least {2 * checked['tolerance']:.3g})"
        )
        raise typer.Exit(1)

    work = Context(model, context, num_new, seed)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        add_floor(row, weight_bytes, bandwidth)
        rows.append(row)
        _free(where)
        _say(f"  {row['variant']}: {row['tpot_ms_median']:.2f} ms per token")

    _say(f"timing {new_tokens} tokens after {warmup_tokens} at {context} tokens of context")
    add(run_dense(work, warmup_tokens, new_tokens))
    if where.type == "cuda":
        add(run_dense(work, warmup_tokens, new_tokens, cudnn=False))
    configs = [Config(policy=policy, budget_tokens=budget) for budget in budget_list] + [Config(policy="window")]
    for config in configs:
        add(run_session(work, config, memory, warmup_tokens, new_tokens))
    if full_tokens:
        add(run_session(work, Config(policy="full"), memory, 1, full_tokens))
    if profile:
        # Last of all: once it has run, a profiler may slow down every later launch.
        rows[0]["profile"] = profile_variant(work, dense_step(model, work.cache()), warmup_tokens)
        sparse = [row for row in rows if row["policy"] is not None]
        for row, config in zip(sparse, configs, strict=False):
            _free(where)
            step = session_step(model, work.session(config, memory))
            row["profile"] = profile_variant(work, step, warmup_tokens)
            del step

    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {
        "benchmark": "decode",
        "shape": shape,
        "parameters": parameters,
        "weights": "random",
        "context_tokens": context,
        "batch": 1,
        "new_tokens": new_tokens,
        "warmup_tokens": warmup_tokens,
        "dtype": dtype,
        "seed": seed,
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
        "copy_bandwidth_bytes_per_second": bandwidth,
        "streamed_weight_bytes": weight_bytes,
        "check": checked,
        "variants": rows,
    }
    place = result["hardware"].get("gpu", "CPU")
    text = "\n".join(
        [
            f"{shape}, {parameters / 1e9:.3g} B parameters, {dtype}, batch 1, {context} tokens of context, {place}, "
            f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s",
            f"check at {checked['context_tokens']} tokens: covering sparse decoding is within "
            f"{checked['relative_error']:.2g} of dense (limit {checked['tolerance']:.2g}; dense with eager attention "
            f"is within {checked['rounding_relative_error']:.2g}), without the context "
            f"{checked['control_relative_error']:.2g}",
            "",
            table(rows),
            "",
            "Weights and KV are random: so are the queries, and the hit rate is not what text gives.",
        ]
    )
    line = json.dumps(result)
    print(text)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.with_suffix(".json").write_text(line + "\n", encoding="utf-8")
        save.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    typer.run(main)
