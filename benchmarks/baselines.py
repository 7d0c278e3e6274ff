"""What others do with the same KV: transformers' caches, and flashinfer's attention where it is installed.

Untouched as far as possible: models run as transformers runs them, and only caches are filled without reading.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from benchmarks import report
from benchmarks.workload import Context

Step = Callable[[Sequence[int]], Tensor]
"""Feeds one token to each sequence, returns float32 logits `[B, vocabulary]`."""


def dense_step(model: PreTrainedModel, cache: DynamicCache, *, cudnn: bool = True) -> Step:
    """One token through transformers: eager modules, its cache, SDPA.

    `cudnn=False` keeps SDPA from cuDNN, which recent torch prefers on Hopper and which plans anew for every length.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    @torch.inference_mode()
    def step(tokens: Sequence[int]) -> Tensor:
        position = torch.full((len(tokens), 1), cache.get_seq_length(), device=model.device)
        ids = torch.tensor(tokens, device=model.device)[:, None]
        with contextlib.nullcontext() if cudnn else sdpa_kernel(backends):
            output = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].float()

    return step


@torch.inference_mode()
def offloaded_cache(context: Context) -> DynamicCache:
    """transformers' cache that keeps layers in host memory and fetches each one ahead of its use.

    It pins what it sends to the host, rounded up to a power of two, and a context of a power of two grows past that
    with the first new token. So what is filled in moves to ordinary memory: pinned memory is then taken once, by the
    first step.
    """
    cache = DynamicCache(config=context.model.config, offloading=True)
    for number in range(context.num_layers):
        cache.update(*context.layer_kv(number), number)
        report.synchronize(context.model.device)
        layer: Any = cache.layers[number]
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def flashinfer_launch(context: Context, num_heads: int) -> tuple[Callable[[], object], float]:
    """flashinfer's batch decode over all layers' KV, attention alone, and its relative error in the first layer.

    Raises ImportError where flashinfer is not installed.
    """
    if importlib.util.find_spec("flashinfer") is None:
        raise ImportError("flashinfer is not installed")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    device, dtype, page = context.model.device, context.model.dtype, 16
    num_pages = -(-context.num_tokens // page)
    pad = num_pages * page - context.num_tokens
    paged = []
    for layer in range(context.num_layers):
        tensors = [F.pad(part[0].transpose(0, 1), (0, 0, 0, 0, 0, pad)) for part in context.layer_kv(layer)]
        paged.append(tuple(t.reshape(num_pages, page, context.num_kv_heads, context.head_dim) for t in tensors))
    q_BAH = torch.randn(1, num_heads, context.head_dim, device=device, dtype=dtype)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(128 << 20, dtype=torch.uint8, device=device), "NHD")
    wrapper.plan(
        torch.tensor([0, num_pages], dtype=torch.int32, device=device),
        torch.arange(num_pages, dtype=torch.int32, device=device),
        torch.tensor([page - pad], dtype=torch.int32, device=device),
        num_heads,
        context.num_kv_heads,
        context.head_dim,
        page,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    key, value = context.layer_kv(0)
    want = F.scaled_dot_product_attention(q_BAH[:, :, None], key, value, enable_gqa=True)[:, :, 0]
    error = ((wrapper.run(q_BAH, paged[0]) - want).float().norm() / want.float().norm()).item()
    return lambda: [wrapper.run(q_BAH, kv) for kv in paged], error
