"""The ops of a model's own layers, for `benchmarks.ops`: random weights of all layers, one launch for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Op
from benchmarks.workload import Described
from triton_ops.gated_linear import gated_linear, gated_linear_ref
from triton_ops.linear import linear, linear_ref
from triton_ops.rotary import rotary, rotary_ref


def layer_ops(described: Described, batch: int, seed: int) -> Iterator[Op]:
    """Ops over the weights of all layers; each one's weights are gone when the next is made."""
    config, device, dtype = described.config, described.device, described.dtype
    depth, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    has_bias = config.model_type == "qwen2"
    torch.manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * scale

    def linears(detail: str, num_in: int, outs: tuple[int, ...], *, norm: bool, residual: bool, bias: bool) -> Op:
        weights = [tuple(normal(out, num_in, scale=num_in**-0.5) for out in outs) for _ in range(depth)]
        biases = tuple(normal(out) for out in outs) if bias else ()
        keywords: dict[str, Any] = {"norm_weight_I": normal(num_in)} if norm else {}
        if residual:
            keywords["residual_BO"] = normal(batch, sum(outs))
        x = normal(batch, num_in)
        return Op(
            name="linear",
            detail=detail,
            launch=lambda: [linear(x, weight, biases, **keywords) for weight in weights],
            check=lambda: excess(linear, linear_ref, x, weights[0], biases, **keywords),
            limit=1.0,
            num_bytes=depth * sum(weight.nbytes for weight in weights[0]),
            launches=depth,
        )

    def gated() -> Op:
        pairs = [tuple(normal(inner, hidden, scale=hidden**-0.5) for _ in range(2)) for _ in range(depth)]
        x, norm = normal(batch, hidden), normal(hidden)
        return Op(
            name="gated_linear",
            detail="gate and up",
            launch=lambda: [gated_linear(x, *pair, norm_weight_I=norm) for pair in pairs],
            check=lambda: excess(gated_linear, gated_linear_ref, x, *pairs[0], norm_weight_I=norm),
            limit=1.0,
            num_bytes=depth * sum(weight.nbytes for weight in pairs[0]),
            launches=depth,
        )

    def rotate() -> Op:
        rows = [normal(batch, q_size + 2 * kv_size) for _ in range(depth)]
        angle = torch.rand(batch, head_dim // 2, device=device) * 6.28
        cos, sin = (torch.cat([part, part], dim=1).to(dtype) for part in (angle.cos(), angle.sin()))
        keywords: dict[str, Any] = {"num_kv_heads": config.num_key_value_heads, "head_dim": head_dim}

        def parts(op: Callable[..., Any]) -> Callable[..., Tensor]:
            return lambda *tensors, **given: torch.cat([part.flatten() for part in op(*tensors, **given)])

        return Op(
            name="rotary",
            detail="q and k",
            launch=lambda: [rotary(row, cos, sin, **keywords) for row in rows],
            check=lambda: excess(parts(rotary), parts(rotary_ref), rows[0], cos, sin, **keywords),
            limit=1.0,
            num_bytes=None,
            launches=depth,
        )

    yield linears("qkv", hidden, (q_size, kv_size, kv_size), norm=True, residual=False, bias=has_bias)
    yield rotate()
    yield linears("o", q_size, (hidden,), norm=False, residual=True, bias=False)
    yield gated()
    yield linears("down", inner, (hidden,), norm=False, residual=True, bias=False)


def excess(op: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Any, **keywords: Any) -> float:
    """The op's largest error against float32, as a share of what is allowed: twice the reference's, and a rounding."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(wide(part) for part in value)
        return value.float() if isinstance(value, Tensor) else value

    truth = reference(*map(wide, tensors), **{name: wide(value) for name, value in keywords.items()})
    want, got = reference(*tensors, **keywords), op(*tensors, **keywords)
    allowed = 2 * (want.float() - truth).abs().max() + torch.finfo(want.dtype).eps * truth.abs().max()
    return ((got.float() - truth).abs().max() / allowed).item()
