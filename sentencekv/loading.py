"""A model and its tokenizer from a folder or the hub, on a device that is there."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sentencekv import pocket

DEVICE_TYPES = ("cpu", "cuda")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Arguments and errors as in `LongContextLM.from_pretrained`."""
    where = resolve_device(device)
    wanted_dtype = resolve_dtype(dtype, where)
    path = os.fspath(name_or_path)
    folder = str(pocket.path()) if path == "pocket" else path
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") > 1
    if looks_local:
        folder = str(Path(folder).expanduser())
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"no model folder at {path!r}; give a folder with config.json and weights, a hub name, or 'pocket'"
            )
    try:
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted_dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip(" .:") for line in str(error).splitlines() if line.strip(" .:")]
        reason = lines[0] if lines else type(error).__name__
        raise OSError(
            f"cannot load a model from {path!r}: {reason}; it must be a folder with config.json, weights and "
            "tokenizer.json, or the name of one on the hub"
        ) from error
    torch.nn.Module.to(model, where)
    return model.eval(), tokenizer


def resolve_device(device: str | torch.device) -> torch.device:
    """The device asked for, if it is there; `auto` takes a GPU where there is one. Raises ValueError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<n>', got {device!r}") from None
    if resolved.type not in DEVICE_TYPES:
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {str(device)!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} was asked for and torch sees {torch.cuda.device_count()} CUDA devices; use "
            "device='cpu', or install a CUDA build of torch and a driver"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """A torch dtype, or `auto` where the model's own is to be kept. Raises ValueError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return named
