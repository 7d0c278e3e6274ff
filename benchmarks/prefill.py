"""Time to the first token of a long prompt and the GPU memory it takes, beside dense reading and the machine's limit.

    python -m benchmarks.prefill --shape llama-8b --contexts 32768,131072

Weights and prompts are random. transformers reads the prompt in one forward pass with its own cache and SDPA;
sentencekv reads it in chunks, summarises its sentences and leaves their KV in host memory, to the last byte before the
clock stops. The first reading takes host memory from the system (`cold`), later ones find it (`warm`). The floor is the
arithmetic of the matrix products at the rate that the machine reaches on large ones. With `--generate 64` each reading
is gone on from.

Before anything is timed, the logits of both on a short prompt, with a model of the first layers alone, must agree as
well as those of two dense implementations do; and each reading's logits are compared with those of dense reading where
that fits.
"""

from __future__ import annotations

import dataclasses
import gc
import json
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
from benchmarks.loop import time_loop
from benchmarks.profile import profile_reading, text_of_reading
from benchmarks.workload import SHAPES, Context, config_of, make_model
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.graph import Stepper
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.prompts import Prompt
from sentencekv.reading import read
from sentencekv.session import Session

CHECK_TOKENS = 6144
"""In chunks of a third, the last of which sees closed tokens in blocks, as long texts are read."""
CHECK_LAYERS = 2
"""Of the model checked: a stack of random layers multiplies what bf16 rounds away until nothing else is seen; over 32
of them two dense implementations differ by 90% under peaked attention."""
CHUNK_TOKENS = {"cuda": 8192, "cpu": 1024}
MATRIX_SIZE = {"cuda": 8192, "cpu": 512}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product; best of several."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        report.synchronize(device)
        started_at = time.perf_counter()
        torch.matmul(left, right)
        report.synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return 2 * size**3 / min(seconds[2:])


def operations(model: PreTrainedModel, num_tokens: int) -> int:
    """Floating-point operations of reading so many tokens: products with all weights of the layers, causal attention,
    and the head for the last token."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    attention = 2 * num_tokens * (num_tokens + 1) * config.num_attention_heads * head_dim * config.num_hidden_layers
    return 2 * weights * num_tokens + attention + 2 * config.vocab_size * config.hidden_size


def make_prompt(model: PreTrainedModel, num_tokens: int, config: Config, seed: int) -> Prompt:
    """Random tokens in random sentences."""
    context = Context(model, num_tokens, 0, seed)
    ends = [end for end in context.sentence_ends(config) if end < num_tokens]
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, model.config.vocab_size, (num_tokens,), generator=generator).tolist()
    return Prompt("", ids, np.zeros((num_tokens, 2), dtype=np.int64), [*ends, num_tokens])


class Ours:
    """Reading through a session, KV and all."""

    def __init__(self, model: PreTrainedModel, config: Config, memory: HostMemory) -> None:
        self._model, self._config, self.memory = model, config, memory
        self._layers = FusedLayers(model)
        self.session: Session | None = None

    def __call__(self, prompt: Prompt) -> Tensor:
        policy = load(self._config.policy, self._config.policy_options)
        self.session = Session(self._config, policy, self.memory, self._model.device)
        chunk_tokens = self._config.prefill_chunk_tokens or CHUNK_TOKENS[self._model.device.type]
        with self._layers.active():
            logits = read(self._model, [self.session], [prompt], chunk_tokens=chunk_tokens)
        self.session.state()  # waits until all rows are in host memory
        return logits

    def generate(self, logits_BV: Tensor, num_tokens: int) -> float:
        """Go on greedily after what was read: median milliseconds between tokens."""
        assert self.session is not None
        stepper = Stepper(self._model, self.session.policy, layers=self._layers)
        first = logits_BV.argmax(dim=1).tolist()
        warmup = min(4, num_tokens // 2)
        times, _ = time_loop(stepper, [self.session], first, warmup, num_tokens - warmup)
        return float(np.median(times))


@torch.inference_mode()
def dense(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """transformers: one forward pass, a cache of its own, the last token's logits."""
    ids = torch.tensor([prompt.token_ids], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].float()


def measure(run: Callable[[], Tensor], device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
    """Seconds, peak of GPU memory, and the logits; or why there are none."""
    report.free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report.synchronize(device)
    started_at = time.perf_counter()
    try:
        logits = run()
        report.synchronize(device)
    except torch.OutOfMemoryError:
        return {"status": "out of GPU memory"}, None
    except MemoryError as error:
        return {"status": f"out of host memory: {error}"}, None
    row: dict[str, Any] = {"status": "ok", "seconds": time.perf_counter() - started_at}
    if device.type == "cuda":
        row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return row, logits


def difference(got: Tensor, want: Tensor) -> float:
    """As a share of the norm."""
    return ((got - want).norm() / want.norm()).item()


def sharpen_attention(model: PreTrainedModel) -> None:
    """Make keys four times as long: with random ones all tokens matter alike, and a missed one not at all."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("k_proj.weight"):
                weight.mul_(4)


def check(shape: str, device: torch.device, dtype: torch.dtype, memory: HostMemory, seed: int) -> dict[str, Any]:
    """Relative error of reading a short prompt in several chunks against dense reading.

    The same with `eager` in place of `sdpa` attention says how much rounding alone does, dense reading of all but the
    first third how much tokens do that are missed.
    """
    model = make_model(shape, device, dtype, CHECK_TOKENS, seed, CHECK_LAYERS)
    sharpen_attention(model)
    prompt = make_prompt(model, CHECK_TOKENS, Config(), seed)
    chunk = CHECK_TOKENS // 3
    truth = dense(model, prompt)
    error = difference(Ours(model, Config(prefill_chunk_tokens=chunk), memory)(prompt), truth)
    control = difference(dense(model, dataclasses.replace(prompt, token_ids=prompt.token_ids[chunk:])), truth)
    model.set_attn_implementation("eager")
    rounding = difference(dense(model, prompt), truth)
    tolerance = tolerance_of(model.dtype, rounding)
    return {
        "tokens": CHECK_TOKENS,
        "layers": model.config.num_hidden_layers,
        "relative_error": error,
        "rounding_relative_error": rounding,
        "control_relative_error": control,
        "tolerance": tolerance,
        "passed": error <= tolerance and control >= 2 * tolerance,
    }


def rows_of(
    model: PreTrainedModel,
    ours: Ours,
    prompt: Prompt,
    floor_seconds: float,
    repeats: int,
    *,
    with_dense: bool,
    generate: int,
) -> list[dict[str, Any]]:
    """All readings of one prompt, transformers' first."""
    rows: list[dict[str, Any]] = []
    length, device = len(prompt.token_ids), model.device

    def add(variant: str, row: dict[str, Any]) -> None:
        row |= {"variant": variant, "context_tokens": length, "floor_seconds": floor_seconds}
        if "seconds" in row:
            dense_seconds = rows[0].get("seconds") if rows and with_dense else None
            row["tokens_per_second"] = length / row["seconds"]
            row["times_floor"] = row["seconds"] / floor_seconds
            row["times_dense"] = row["seconds"] / dense_seconds if dense_seconds else None
        rows.append(row)
        seconds = f"{row['seconds']:.2f} s" if "seconds" in row else row["status"]
        report.say(f"  {length:,}, {variant}: {seconds}")

    truth: Tensor | None = None
    if with_dense:
        for _ in range(2):  # the first plans and tunes
            row, truth = measure(lambda: dense(model, prompt), device)
        add("transformers", row)
    for number in range(1 + repeats):
        row, logits = measure(lambda: ours(prompt), device)
        if logits is not None and ours.session is not None:
            row["error"] = difference(logits, truth) if truth is not None else None
            row["kv_host_bytes"] = ours.session.host_bytes
            row["kv_gpu_bytes"] = ours.session.device_bytes
            row["summary_bytes"] = ours.session.summary_bytes
            if generate:
                row["generated_tokens"] = generate
                row["ms_per_generated_token"] = ours.generate(logits, generate)
        add("sentencekv, warm" if number else "sentencekv, cold", row)
        ours.session = None
        gc.collect()
    return rows


def table(rows: list[dict[str, Any]], weight_bytes: int) -> str:
    """The figures for people; everything is in the JSON line."""
    number = report.number_text
    header = [
        "read by",
        "tokens",
        "seconds",
        "of dense",
        "of floor",
        "tokens/s",
        "GPU peak - weights, MiB",
        "summaries, MiB",
        "host, MiB",
        "error",
        "ms per token after it",
        "status",
    ]
    cells = [
        [
            row["variant"],
            f"{row['context_tokens']:,}",
            number(row.get("seconds")),
            number(row.get("times_dense")),
            number(row.get("times_floor")),
            number(row.get("tokens_per_second"), 0),
            report.mib_text(row["peak_gpu_bytes"] - weight_bytes if "peak_gpu_bytes" in row else None),
            report.mib_text(row.get("summary_bytes")),
            report.mib_text(row.get("kv_host_bytes")),
            f"{row['error']:.1e}" if row.get("error") is not None else "-",
            number(row.get("ms_per_generated_token")),
            row["status"],
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)


def text_of(result: dict[str, Any]) -> str:
    """The whole report for people."""
    checked = result["check"]
    lines = [
        f"{result['shape']}, {result['dtype']}, policy {result['policy']}, host memory in {result['kv_dtype']}, "
        f"chunks of {result['chunk_tokens']:,} tokens, {result['hardware'].get('gpu', 'CPU')}, "
        f"{result['matrix_operations_per_second'] / 1e12:,.0f} TFLOP/s on large products; commit {result['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        text_of_check(checked),
        "",
        table(result["rows"], result["weight_bytes"]),
    ]
    if "profile" in result:
        longest = max(row["context_tokens"] for row in result["rows"])
        lines += ["", f"Reading {longest:,} tokens: {text_of_reading(result['profile'])}"]
    return "\n".join(lines)


def text_of_check(checked: dict[str, Any]) -> str:
    return (
        f"check at {checked['tokens']} tokens, {checked['layers']} layers: "
        f"reading in chunks is within {checked['relative_error']:.2g} of dense "
        f"(limit {checked['tolerance']:.2g}; dense with eager attention is within "
        f"{checked['rounding_relative_error']:.2g}), "
        f"without the first third {checked['control_relative_error']:.2g}"
    )


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-8b",
    contexts: Annotated[str, typer.Option(help="Tokens of prompt, separated by commas.")] = "32768,131072",
    policy: Annotated[str, typer.Option(help="Policy, or policy:option=value.")] = Config().policy,
    kv_dtype: Annotated[str, typer.Option(help="Precision of the host tier: auto, fp8, int8 or int4.")] = "auto",
    chunk: Annotated[int | None, typer.Option(help="Tokens of one forward pass; default as the library's.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Warm readings of each prompt.")] = 2,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate after each reading, greedily.")] = 0,
    dense_up_to: Annotated[int, typer.Option(help="Longest prompt that transformers reads.")] = 131072,
    profile: Annotated[bool, typer.Option("--profile", help="Profile a last reading of the longest prompt.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of weights, prompts and sentences.")] = 0,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Time reading over prompts of several lengths; the last line is JSON."""
    where, precision = where_and_how(shape, device, dtype)
    if profile and where.type != "cuda":
        raise typer.BadParameter("--profile looks at kernels; it needs --device cuda")
    lengths = sorted(numbers(contexts, "contexts", 256))
    try:
        config = config_of(policy, Config().budget_tokens, kv_dtype)
        config = dataclasses.replace(config, prefill_chunk_tokens=chunk)
        load(config.policy, config.policy_options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    memory = HostMemory(None, pinned=where.type == "cuda")
    rate = matrix_rate(where, precision)
    checked = check(shape, where, precision, memory, seed)
    report.say(f"{text_of_check(checked)}; {rate / 1e12:.1f} TFLOP/s on large products")
    if not checked["passed"]:
        report.say("not timed: the check failed")
        raise typer.Exit(1)
    report.say(f"making {shape} with random weights")
    report.free(where)
    model = make_model(shape, where, precision, max(*lengths, CHECK_TOKENS) + generate, seed)
    ours = Ours(model, config, memory)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    rows: list[dict[str, Any]] = []
    for length in lengths:
        prompt = make_prompt(model, length, config, seed)
        rows += rows_of(
            model,
            ours,
            prompt,
            operations(model, length) / rate,
            repeats,
            with_dense=length <= dense_up_to,
            generate=generate,
        )
    result: dict[str, Any] = {
        "benchmark": "prefill",
        "shape": shape,
        "policy": policy,
        "kv_dtype": kv_dtype,
        "chunk_tokens": chunk or CHUNK_TOKENS[where.type],
        "dtype": dtype,
        "seed": seed,
        "weight_bytes": weight_bytes,
        "matrix_operations_per_second": rate,
        "check": checked,
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
        "rows": rows,
    }
    if profile:
        report.say(f"profiling a reading of {length:,} tokens")
        result["profile"] = profile_reading(lambda: ours(prompt), where, model.config.num_hidden_layers)
    text = text_of(result)
    print(text)
    if save is not None:
        report.save(save, result, text)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
