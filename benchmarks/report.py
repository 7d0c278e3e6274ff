"""Where a benchmark ran, what the machine can do, and how results are printed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sentencekv


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the benchmark ran on."""
    facts: dict[str, Any] = {"device": device.type, "cpu_cores": os.cpu_count(), "machine": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return facts


def versions() -> dict[str, str | None]:
    """Versions of everything that can change a figure."""
    found: dict[str, str | None] = {
        "sentencekv": sentencekv.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in ("torch", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the source that runs, `+changes` appended if it was edited; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        edited = subprocess.run(
            ["git", "status", "--porcelain", "--", "sentencekv", "triton_ops", "benchmarks"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if edited else "")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy within the device's memory, bytes read plus bytes written; best of several."""
    num_bytes = (4 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.randint(0, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        started_at = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started_at)
    return 2 * num_bytes / min(seconds[2:])


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table: names to the left, figures to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])
