"""Time to open a document that was saved, beside reading it again.

    python -m benchmarks.opening --shape llama-8b --context 131072 --folder /tmp

Weights and the prompt are random. The document is read twice, saved, and opened: with new host memory, with host memory
that another document gave back, and with the file's pages dropped from the machine's cache. Opening ends when the
document may be asked; the first pass over it waits for the KV of its sentences, so the time to its logits is given,
too, beside that of the same pass over the document that was read. Their logits must be equal.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import report
from benchmarks.arguments import where_and_how
from benchmarks.prefill import Ours, make_prompt
from benchmarks.workload import SHAPES, config_of, make_model
from sentencekv.attention import forward
from sentencekv.config import Config
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.prompts import Frame
from sentencekv.saved import Contents, Owner, open_saved, save
from sentencekv.session import Session

QUESTION_TOKENS = 32


class _NoWords:
    """A tokenizer for random weights: their tokens mean nothing."""

    def get_vocab(self) -> dict[str, int]:
        return {}


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has done it, and what it gave."""
    report.synchronize(device)
    started_at = time.perf_counter()
    made = run()
    report.synchronize(device)
    return time.perf_counter() - started_at, made


def first_logits(model: PreTrainedModel, session: Session) -> Tensor:
    """Of an exact pass over a question, as asking a document begins, in a fork that is then forgotten."""
    question = [number % model.config.vocab_size for number in range(1, QUESTION_TOKENS + 1)]
    return forward(model, [question], [session.fork()], exact=True)


def drop_from_cache(path: Path) -> None:
    """Have the machine forget a file's pages; the next reader has to go to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: PreTrainedModel, config: Config, context: int, folder: Path, seed: int) -> dict[str, Any]:
    """Seconds of reading, saving and opening."""
    device = model.device
    memory = HostMemory(None, pinned=device.type == "cuda")
    ours = Ours(model, config, memory)
    prompt = dataclasses.replace(make_prompt(model, context, config, seed), text=" ")
    reading = []
    for _ in range(2):
        ours.session = None
        gc.collect()
        seconds, _ = timed(lambda: ours(prompt), device)
        reading.append(seconds)
        report.say(f"  read in {seconds:.2f} s")
    session = ours.session
    assert session is not None
    truth = first_logits(model, session)
    pass_seconds, again = timed(lambda: first_logits(model, session), device)
    assert torch.equal(truth, again), "the same pass twice gives the same logits"
    owner = Owner(model, _NoWords())  # type: ignore[arg-type]
    policy = load(config.policy, config.policy_options)
    path = folder / "document.skv"
    contents = Contents("", prompt, Frame("", "", "", special_tokens=False, next=None), session)
    save_seconds, file_bytes = timed(lambda: save(path, owner, contents), device)
    report.say(f"  saved {file_bytes / 2**30:.1f} GiB in {save_seconds:.2f} s; a pass takes {pass_seconds:.3f} s")
    rows: list[dict[str, Any]] = []
    names = ["new host memory", "host memory given back", "host memory given back, file not in the cache"]
    for number, name in enumerate(names):
        if number == 1:
            # The one that was read and the first one opened are gone; their memory is there for the others.
            ours.session = session = contents = None  # type: ignore[assignment]
            gc.collect()
        if number == 2:
            drop_from_cache(path)
        open_seconds, opened = timed(lambda: open_saved(path, owner, config, policy, memory), device)
        logits_seconds, logits = timed(lambda held=opened: first_logits(model, held.session), device)
        row = {
            "variant": name,
            "open_seconds": open_seconds,
            "logits_seconds": logits_seconds,
            "equal": torch.equal(logits, truth),
        }
        row["times_faster"] = reading[-1] / open_seconds
        row["times_faster_with_logits"] = (reading[-1] + pass_seconds) / (open_seconds + logits_seconds)
        rows.append(row)
        report.say(f"  {name}: opened in {open_seconds:.3f} s, logits {logits_seconds:.2f} s after it")
        del opened
        gc.collect()
    path.unlink()
    return {
        "reading_seconds": reading,
        "pass_seconds": pass_seconds,
        "save_seconds": save_seconds,
        "file_bytes": file_bytes,
        "rows": rows,
    }


def text_of(result: dict[str, Any]) -> str:
    """The whole report for people."""
    number = report.number_text
    lines = [
        f"{result['shape']}, {result['context_tokens']:,} tokens, {result['dtype']}, policy {result['policy']}, host "
        f"memory in {result['kv_dtype']}, {result['hardware'].get('gpu', 'CPU')}; commit {result['commit']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        f"read in {number(result['reading_seconds'][-1])} s (first reading {number(result['reading_seconds'][0])}), an "
        f"exact pass of {QUESTION_TOKENS} tokens after it {number(result['pass_seconds'])} s; saved in "
        f"{number(result['save_seconds'])} s, {result['file_bytes'] / 2**30:.1f} GiB",
        "",
    ]
    header = ["opened with", "seconds", "logits after it, s", "x faster than reading", "both, with logits", "logits"]
    cells = [
        [
            row["variant"],
            number(row["open_seconds"], 3),
            number(row["logits_seconds"]),
            number(row["times_faster"], 1),
            number(row["times_faster_with_logits"], 1),
            "equal" if row["equal"] else "DIFFERENT",
        ]
        for row in result["rows"]
    ]
    return "\n".join([*lines, report.markdown_table(header, cells)])


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "llama-8b",
    context: Annotated[int, typer.Option(min=256, help="Tokens of the document.")] = 131072,
    policy: Annotated[str, typer.Option(help="Policy, or policy:option=value.")] = Config().policy,
    kv_dtype: Annotated[str, typer.Option(help="Precision of the host tier: auto, fp8, int8 or int4.")] = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="Where to save it, with room for its KV; default: that for temporary files.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of weights, prompt and sentences.")] = 0,
    source_commit: Annotated[str | None, typer.Option(help="Commit to record where git cannot tell.")] = None,
    out: Annotated[Path | None, typer.Option("--save", help="Also write SAVE.json and SAVE.md.")] = None,
) -> None:
    """Time opening a saved document and reading it again; the last line is JSON."""
    where, precision = where_and_how(shape, device, dtype)
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {str(folder)!r}")
    try:
        config = config_of(policy, Config().budget_tokens, kv_dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    report.say(f"making {shape} with random weights")
    model = make_model(shape, where, precision, context + QUESTION_TOKENS, seed)
    result: dict[str, Any] = {
        "benchmark": "opening",
        "shape": shape,
        "context_tokens": context,
        "policy": policy,
        "kv_dtype": kv_dtype,
        "dtype": dtype,
        "seed": seed,
        "commit": source_commit or report.commit(),
        "hardware": report.hardware(where),
        "versions": report.versions(),
    }
    with tempfile.TemporaryDirectory(dir=folder) as own:
        result |= measure(model, config, context, Path(own), seed)
    text = text_of(result)
    print(text)
    if out is not None:
        report.save(out, result, text)
    print(json.dumps(result))
    if not all(row["equal"] for row in result["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
