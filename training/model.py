"""The pocket model for training: Llama's arithmetic and parameter names, with dropout, compiled block by block.

A state dict of `PocketModel` loads unchanged into transformers' `LlamaForCausalLM` with `pocket_config()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.tokenizer import BEGIN_ID, END_ID, PAD_ID, VOCAB_SIZE


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model; the defaults are the pocket model's."""

    hidden: int = 384
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 1024
    vocab: int = VOCAB_SIZE
    rope_theta: float = 1e6
    max_positions: int = 40_960


def pocket_config(shape: Shape) -> Any:
    """The same model as a transformers `LlamaConfig`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        shape = self.shape
        q = self.q_proj(x_BTD).view(batch, length, shape.heads, shape.head_dim).transpose(1, 2)
        k = self.k_proj(x_BTD).view(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
        v = self.v_proj(x_BTD).view(batch, length, shape.kv_heads, shape.head_dim).transpose(1, 2)
        q, k = (_rotate(t, cos_TH, sin_TH).to(v.dtype) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _rotate(t: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    left, right = t.chunk(2, dim=-1)
    return t * cos_TH + torch.cat((-right, left), dim=-1) * sin_TH


class _MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One layer; the residual stream stays in the dtype that it comes in."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.mlp = _MLP(shape)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTD), cos_TH, sin_TH)
        x_BTD = x_BTD + F.dropout(attended, self.dropout, self.training)
        fed = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + F.dropout(fed, self.dropout, self.training)


class _Decoder(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)


class PocketModel(nn.Module):
    """Returns the last hidden states `[B, T, hidden]`; logits are their product with `embedding`."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Decoder(shape, dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * shape.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    @property
    def embedding(self) -> Tensor:
        return self.model.embed_tokens.weight

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, head_dim]` in float32, both halves alike."""
        dim = self.shape.head_dim
        frequency = self.shape.rope_theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def forward(self, ids_BT: Tensor, blocks: Sequence[Callable[..., Tensor]] | None = None) -> Tensor:
        """`blocks`: compiled stand-ins for the layers, else the layers themselves."""
        cos, sin = self.rope(ids_BT.shape[1], ids_BT.device)
        x_BTD = self.model.embed_tokens(ids_BT)
        for block in blocks or self.model.layers:
            x_BTD = block(x_BTD, cos, sin)
        return self.model.norm(x_BTD)
