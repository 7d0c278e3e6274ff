"""The seam to transformers: an attention function that hands queries, keys and values to sessions.

The only file that touches transformers' internals. In transformers v5 a cache never sees the query and an attention
function never sees the cache, so the engine is both: models run with `use_cache=False`, explicit positions and one more
keyword, `session`, which flows through to the function registered here under `NAME`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from sentencekv.batch import LaneBatch, SessionBatch
from sentencekv.config import Config
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.sampling import refuse_nan
from sentencekv.session import Session
from sentencekv.transfer import to_device

NAME = "sentencekv"

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_KNOWN_KEYWORDS = {
    # What attention modules may pass on besides the tensors; none of these changes the result beyond what is used here.
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "is_causal",
    "cache_position",
    "past_key_values",
    "return_dict",
    "logits_to_keep",
}


_NO_MASK_SHAPE = (1, 1, 1, 1)
"""A mask of four dimensions is passed on by transformers as it is; this one says that sessions see to it themselves."""


class UnsupportedModelError(ValueError):
    """The model has a part that sentence retrieval does not understand; the message says which."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    session: Attends | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The registered function: `[1, heads, L, H]` in, `[1, L, heads, H]` out."""
    if session is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not hand the engine's keyword on to its attention")
    if attention_mask is None or attention_mask.shape != _NO_MASK_SHAPE:
        raise UnsupportedModelError(
            f"{type(module).__name__} makes an attention mask of its own, which sentencekv would ignore"
        )
    unknown = {name for name, given in keywords.items() if given is not None} - _KNOWN_KEYWORDS
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which sentencekv does not "
            "know; leaving it out would change the model's answers"
        )
    if key.shape[-1] != value.shape[-1] or key.shape[-1] != query.shape[-1]:
        raise UnsupportedModelError(
            f"{type(module).__name__} has keys of {key.shape[-1]} and values of {value.shape[-1]} dimensions; "
            "sentencekv stores them side by side and needs them equal (multi-head latent attention is not supported)"
        )
    output = session.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output.transpose(0, 1)[None].contiguous(), None


def _mask(*_: object, **__: object) -> None:
    """Sessions mask by position themselves; forward passes hand in a ready 4-D mask, so models build none."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def attention_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's attention is `name` inside, and what it was before outside: its own `generate` goes on working."""
    config = model.config
    before = {"": config._attn_implementation}
    before |= {
        key: getattr(config, key)._attn_implementation for key in config.sub_configs if getattr(config, key, None)
    }
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    sessions: Sequence[Session],
    *,
    exact: bool,
    all_logits: bool = False,
    expected_tokens: Sequence[int] | None = None,
) -> Tensor:
    """One pass of several sessions' new tokens. Returns float32 logits.

    Args:
        token_ids: each session's new tokens, at least one.
        exact: new tokens attend to everything; otherwise one token per session, sentences selected.
        all_logits: logits of every new token, `[sum of lengths, vocabulary]`; else of each session's last one,
            `[B, vocabulary]`.
        expected_tokens: per session, tokens that will still be closed (see `Session.begin`).
    """
    lengths = [len(ids) for ids in token_ids]
    device = model.device
    positions: list[Tensor] = []
    for i, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
        positions.append(torch.arange(session.num_tokens, session.num_tokens + length))
        session.begin(length, exact=exact, expected_tokens=expected_tokens[i] if expected_tokens else 0)
    batch: SessionBatch | LaneBatch
    if exact or not sessions[0].is_sparse:
        batch = SessionBatch(sessions, lengths)
    else:
        batch = LaneBatch(sessions[0].policy)
        batch.seat(sessions)
    keep: int | Tensor = 0 if all_logits else to_device(lengths, device).cumsum(0) - 1
    ids = to_device([token for ids in token_ids for token in ids], device)
    logits = run_model(model, ids, to_device(torch.cat(positions), device), batch, keep)
    for session in sessions:
        session.end()
    return logits


def _layer_number(module: nn.Module) -> int | None:
    """Of a decoder layer: its attention's; None for other modules."""
    numbers: list[Any] = [child.layer_idx for child in module.children() if hasattr(child, "layer_idx")]
    return numbers[0] if numbers else None


class Attends(Protocol):
    """What a model's attention function hands queries, keys and values to."""

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention output `[A, L, H]` of the pass's tokens."""
        ...


def run_model(
    model: PreTrainedModel, ids_L: Tensor, position_L: Tensor, batch: Attends, keep: int | Tensor = 0
) -> Tensor:
    """The model over one row of packed tokens, attention through `batch`. Returns float32 logits, `[L, vocabulary]`.

    `keep`: the tokens whose logits are wanted, as transformers' `logits_to_keep`; 0: all.
    """
    with attention_as(model, NAME):
        output = model(
            input_ids=ids_L[None],
            position_ids=position_L[None],
            attention_mask=torch.zeros(_NO_MASK_SHAPE, device=ids_L.device),
            use_cache=False,
            return_dict=True,
            logits_to_keep=keep,
            session=batch,
        )
    return output.logits[0].float()


@contextlib.contextmanager
def dropping_rows(model: PreTrainedModel, kept_by: Callable[[int], Tensor | None]) -> Iterator[None]:
    """Inside, a pass may compute fewer tokens with depth: what is dropped ahead of a layer, later ones do not see
    either.

    `kept_by` is called with each layer's number, in order; it gives the rows that go on, int64 and rising, of those
    that the layer before had, or None for all.
    """
    kept: Tensor | None = None

    def drop(layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal kept
        row_L = kept_by(cast(int, _layer_number(layer)))
        if row_L is not None:
            kept = row_L if kept is None else kept[row_L]
            if arguments:
                arguments = (arguments[0][:, row_L], *arguments[1:])
            else:
                keywords = {**keywords, "hidden_states": keywords["hidden_states"][:, row_L]}
        if kept is None:
            return arguments, keywords
        # The model hands every layer the tables of all rows that the pass began with.
        cos, sin = keywords["position_embeddings"]
        changed = {"position_embeddings": (cos[:, kept], sin[:, kept])}
        if keywords.get("position_ids") is not None:
            changed["position_ids"] = keywords["position_ids"][:, kept]
        return arguments, {**keywords, **changed}

    layers = [module for module in model.modules() if _layer_number(module) is not None]
    handles = [layer.register_forward_pre_hook(drop, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language model itself, where a model nests it."""
    return model.config.get_text_config(decoder=True)


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, unless sentence retrieval is exact for this model."""
    config = text_config(model)
    name = type(model).__name__

    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{name} ({config.model_type}) is not supported: {reason}")

    if model.config.is_encoder_decoder:
        refuse("it is an encoder-decoder model; sentencekv needs a causal language model")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES)
    if strange:
        refuse(
            f"it has layers of kind {', '.join(strange)}; only full and sliding-window attention can be retrieved from"
        )
    if not getattr(type(model), "_supports_attention_backend", False):
        refuse("its attention does not go through transformers' attention interface")
    if model.get_output_embeddings() is None:
        refuse("it has no language-model head; load it with AutoModelForCausalLM")
    if getattr(config, "output_router_logits", False):
        refuse("its configuration asks for router logits; set output_router_logits=False")
    if not any(isinstance(part, nn.Module) and "rotary" in type(part).__name__.lower() for part in model.modules()):
        refuse("it has no rotary position embedding (RoPE)")
    if getattr(config, "num_kv_shared_layers", 0):
        refuse("some of its layers share the KV of others")
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            refuse(
                f"its RoPE type {rope['rope_type']!r} changes with the length of the text, so keys computed early "
                "would be wrong later"
            )
    _compare_with_dense(model, config)


@torch.inference_mode()
def _compare_with_dense(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Run a few tokens both ways; a part that no rule above knows shows as a difference."""
    ids = torch.randint(0, config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [ids, ids[5:20]]
    num_read = [16, 7]
    engine = Config(budget_tokens=64, sink_tokens=2, window_tokens=4, max_sentence_tokens=4, min_sentence_tokens=1)
    memory = HostMemory(None, pinned=model.device.type == "cuda")
    sessions = [Session(engine, load("moments"), memory, model.device) for _ in rows]
    for session, row in zip(sessions, rows, strict=True):
        session.expect(range(4, len(row) + 1, 4))
    read = [row[:count] for row, count in zip(rows, num_read, strict=True)]
    ours = list(forward(model, read, sessions, exact=True, all_logits=True).split(num_read))
    for step in range(8):
        tokens = [[row[count + step]] for row, count in zip(rows, num_read, strict=True)]
        logits = forward(model, tokens, sessions, exact=False)
        ours = [torch.cat([before, now[None]]) for before, now in zip(ours, logits, strict=True)]
    _check_sliding_layers(model, config, sessions[0].sliding_layers)
    for row, logits in zip(rows, ours, strict=True):
        refuse_nan(logits)
        with attention_as(model, "eager"):
            dense = model(input_ids=torch.tensor([row], device=model.device), use_cache=False, return_dict=True)
        truth = dense.logits[0].float()
        # The median token, since in half precision a near tie in a router may send a few tokens to other experts.
        error = ((logits - truth).norm(dim=-1) / truth.norm(dim=-1)).median().item()
        limit = 1e-3 if model.dtype == torch.float32 else 5e-2
        if not error <= limit:
            raise UnsupportedModelError(
                f"{type(model).__name__} ({config.model_type}) is not supported: on {len(row)} tokens its logits "
                f"differ from its own dense attention by {error:.2g} of their norm (limit {limit:.2g}); its attention "
                "has a part that sentencekv does not know"
            )


def sliding_layers(config: PretrainedConfig) -> set[int]:
    """Layers that see a window of the last tokens only, by a text model's configuration."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return set(range(config.num_hidden_layers))
    return set()


def _check_sliding_layers(model: PreTrainedModel, config: PretrainedConfig, sliding: set[int]) -> None:
    """A window that a model keeps in its mask alone never reaches us, and short texts would not show it."""
    expected = sliding_layers(config)
    if sliding != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({config.model_type}) is not supported: its configuration has sliding-window "
            f"attention in layers {sorted(expected)}, its attention function was told so in layers {sorted(sliding)}"
        )
