"""What all benchmarks ask of their arguments: a shape that is known, a device that is there, a dtype that is timed."""

from __future__ import annotations

import torch
import typer

from benchmarks.workload import SHAPES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def where_and_how(shape: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that are named. Raises typer.BadParameter if one is not known or not there."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"device must be cuda or cpu, got {device!r}") from error
    if where.type not in ("cuda", "cpu"):
        raise typer.BadParameter(f"device must be cuda or cpu, got {device!r}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device was found; give --device cpu")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    return where, DTYPES[dtype]
