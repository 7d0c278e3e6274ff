"""A model's own layers in few kernels besides attention: five for the few rows of a decoding step.

With many rows, as when a text is read, the products are the library's, and what is between them is four kernels in
place of fifteen. The norms outside layers, as that before the head, are a kernel each.

Layers of the Llama pattern are found by their parts, not by their names, and each is taken only if it computes, on
random hidden states, what the layer's own forward computes; all others are left as they are. Nothing is copied, and
the model is changed only inside `FusedLayers.active`, where those layers have a `forward` of their own.

With more than two rows, the two norms of a step are kernels of their own: seven.

Knows layers and the keywords that models hand them. Knows nothing of what `session.attend` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sentencekv.attention import NAME, attention_as, run_model
from triton_ops.gated_linear import gated_linear
from triton_ops.gated_product import Activation, gated_product
from triton_ops.linear import MAX_ROWS, linear
from triton_ops.rms_norm import rms_norm, rms_norm_ref
from triton_ops.rotary import Heads, rotary

_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}

_CHECKED_POSITIONS = ([3], [0, 700, 100_003], [*range(MAX_ROWS), 100_003])
"""Of the rows that a layer is checked with, in three passes; one is far, since some models scale far queries."""
_CHECKED_SCALES = (0.02, 1.0)
"""Of random hidden states. Small ones, since then the layer's own contribution stands out from the residual."""
_LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference, as a share of what the layer adds to its input, on top of one rounding of the output."""


class _UnfitError(Exception):
    """Why a layer cannot be fused; caught here."""


@dataclasses.dataclass(frozen=True)
class _Norm:
    module: Any
    eps: float
    offset: float

    def __call__(self, x: Tensor, *more: Any, **keywords: Any) -> Any:
        """What the module returns for rows of any shape; if it is given more than rows, its own forward sees to it."""
        if more or keywords:
            return type(self.module).forward(self.module, x, *more, **keywords)
        return rms_norm(x.reshape(-1, x.shape[-1]), self.module.weight, eps=self.eps, offset=self.offset).view(x.shape)


class _FixedAttention:
    """Stands in for a session: remembers how it was called; mixes queries, keys and values, token by token."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, int | None, float | None, int, int]] = []

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
        self.calls.append((layer, scale, sliding_window, softcap, k_NLH.shape[0], k_NLH.shape[2]))
        group = q_ALH.shape[0] // k_NLH.shape[0]
        # Dimensions of k are shifted, so that it does not look the same when q and k are confused.
        mixed_NLH = v_NLH.float() + 0.5 * k_NLH.float().roll(1, -1)
        return (mixed_NLH.repeat_interleave(group, 0) + 0.5 * q_ALH.float()).to(q_ALH.dtype)


@dataclasses.dataclass
class _Call:
    """How the model calls a layer: everything but the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _FusedLayer:
    """The forward of one layer. Weights are looked up in the modules at every call: they may be moved or replaced."""

    def __init__(self, layer: Any) -> None:
        self.own_forward: Callable[..., Any] = layer.forward
        _check_parts(layer)
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.input_norm = _norm_of(layer.input_layernorm)
        self.mlp_norm = _norm_of(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = (
            _norm_of(getattr(self.attention, name)) if hasattr(self.attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        self.head_norm = self.q_norm or self.k_norm or self.input_norm
        for norm in (self.q_norm, self.k_norm):
            if norm and (norm.eps, norm.offset) != (self.head_norm.eps, self.head_norm.offset):
                raise _UnfitError("its query and key norms are of two kinds")
        self.activation = _activation_of(self.mlp.act_fn)
        self.rotates = True
        # Known once the layer's own forward has been watched.
        self.layer_number = 0
        self.scale = 1.0
        self.sliding_window: int | None = None
        self.num_kv_heads = 0
        self.head_dim = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """What the layer's own forward returns. Passes without a session go to that one."""
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        session = keywords.get("session")
        if session is None or hidden.shape[0] != 1:
            return self.own_forward(*arguments, **keywords)
        return self.run(hidden[0], keywords["position_embeddings"], session)[None]

    def run(self, hidden_LI: Tensor, position_embeddings: tuple[Tensor, Tensor], session: Any) -> Tensor:
        """Hidden states `[L, I]` of L tokens through the layer."""
        run = self._step if hidden_LI.shape[0] <= MAX_ROWS else self._read
        return run(hidden_LI, position_embeddings, session)

    def _read(self, hidden_LI: Tensor, position_embeddings: tuple[Tensor, Tensor], session: Any) -> Tensor:
        attention, mlp = self.attention, self.mlp
        normed_LI = self.input_norm(hidden_LI)
        qkv_LO = _products(normed_LI, attention.q_proj, attention.k_proj, attention.v_proj)
        output_LI = self._attend(qkv_LO, position_embeddings, session)
        hidden_LI = _add_product(hidden_LI, output_LI, attention.o_proj)
        normed_LI = self.mlp_norm(hidden_LI)
        gate_LO, up_LO = mlp.gate_proj(normed_LI), mlp.up_proj(normed_LI)
        gated_product(gate_LO, up_LO, activation=self.activation)
        del up_LO
        return _add_product(hidden_LI, gate_LO, mlp.down_proj, in_place=True)

    def _attend(self, qkv_LO: Tensor, position_embeddings: tuple[Tensor, Tensor], session: Any) -> Tensor:
        """Attention output `[L, A * H]` from packed projections."""
        heads = self._heads(qkv_LO, position_embeddings)
        output_ALH = session.attend(
            self.layer_number,
            heads.q_BAH.transpose(0, 1),
            heads.k_BNH.transpose(0, 1),
            heads.v_BNH.transpose(0, 1),
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=None,
        )
        return output_ALH.transpose(0, 1).reshape(qkv_LO.shape[0], -1)

    def _heads(self, qkv_LO: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Heads:
        cos, sin = (table[0] for table in position_embeddings) if self.rotates else (None, None)
        return rotary(
            qkv_LO,
            cos,
            sin,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm_H=self.q_norm.module.weight if self.q_norm else None,
            k_norm_H=self.k_norm.module.weight if self.k_norm else None,
            norm_eps=self.head_norm.eps,
            norm_offset=self.head_norm.offset,
        )

    def _step(self, hidden_LI: Tensor, position_embeddings: tuple[Tensor, Tensor], session: Any) -> Tensor:
        attention, mlp = self.attention, self.mlp
        qkv_LO = linear(
            hidden_LI,
            (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            _present(attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias),
            norm_weight_I=self.input_norm.module.weight,
            norm_eps=self.input_norm.eps,
            norm_offset=self.input_norm.offset,
        )
        hidden_LI = linear(
            self._attend(qkv_LO, position_embeddings, session),
            (attention.o_proj.weight,),
            _present(attention.o_proj.bias),
            residual_BO=hidden_LI,
        )
        gated_LO = gated_linear(
            hidden_LI,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.gate_proj.bias,
            mlp.up_proj.bias,
            activation=self.activation,
            norm_weight_I=self.mlp_norm.module.weight,
            norm_eps=self.mlp_norm.eps,
            norm_offset=self.mlp_norm.offset,
        )
        return linear(gated_LO, (mlp.down_proj.weight,), _present(mlp.down_proj.bias), residual_BO=hidden_LI)

    def check(self, layer: nn.Module, calls: Sequence[_Call]) -> None:
        """Raise _UnfitError unless the layer's own forward and this one agree on calls that the model made."""
        weight = self.attention.q_proj.weight
        generator = torch.Generator().manual_seed(0)
        first = True
        for call in calls:
            cos = call.keywords["position_embeddings"][0]
            for scale in _CHECKED_SCALES:
                hidden = torch.randn(1, cos.shape[1], weight.shape[1], generator=generator) * scale
                hidden = hidden.to(weight.device, weight.dtype)
                watched = _FixedAttention()
                own = layer(hidden, *call.arguments, **{**call.keywords, "session": watched})
                if not isinstance(own, Tensor) or len(watched.calls) != 1:
                    raise _UnfitError("it does not return hidden states alone, or does not attend once")
                self._learn(watched)
                agrees = self._agrees(own, hidden, call)
                if first and not agrees:
                    # Layers without rotation are handed the tables nevertheless.
                    self.rotates = False
                    agrees = self._agrees(own, hidden, call)
                first = False
                if not agrees:
                    raise _UnfitError("it computes something else than the parts it has suggest")

    def still_fits(self, layer: Any, force: bool) -> bool:
        """Whether the layer has the parts that were looked at, and nobody listens in on them; cheap."""
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if [layer.self_attn, layer.mlp, *norms] != [
            self.attention,
            self.mlp,
            self.input_norm.module,
            self.mlp_norm.module,
        ]:
            return False
        try:
            _check_parts(layer)
            _check_weights(self, force)
        except _UnfitError:
            return False
        return True

    def _learn(self, watched: _FixedAttention) -> None:
        self.layer_number, self.scale, self.sliding_window, softcap, self.num_kv_heads, self.head_dim = watched.calls[0]
        if softcap is not None:
            raise _UnfitError("it caps its attention scores")
        if self.attention.v_proj.out_features != self.num_kv_heads * self.head_dim:
            raise _UnfitError("its projections are not one head after the other")
        for norm in (self.q_norm, self.k_norm):
            if norm and norm.module.weight.shape != (self.head_dim,):
                raise _UnfitError("its query or key norm goes over more than a head")

    def _agrees(self, own: Tensor, hidden: Tensor, call: _Call) -> bool:
        cos, sin = call.keywords["position_embeddings"]
        if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[2] > self.head_dim:
            raise _UnfitError("its rotary tables are of an unknown shape")
        ours = self.run(hidden[0], (cos, sin), _FixedAttention())
        truth = own[0].float()
        added = (truth - hidden[0].float()).norm()
        error = (ours.float() - truth).norm()
        limit = _LIMIT[own.dtype] * added + torch.finfo(own.dtype).eps * truth.norm()
        return bool((error <= limit) & error.isfinite())


class FusedLayers:
    """Those layers and norms of a loaded model that can run in a few kernels, and a context in which they do.

    Args:
        model: in evaluation mode, and supported by `attention.check_supported`. Runs two short passes here, and
            each layer a few times.
        force: also on a CPU and in float32, through the ops' references: for tests. Otherwise layers are fused where
            their weights are 16-bit on a GPU.
    """

    def __init__(self, model: PreTrainedModel, *, force: bool = False) -> None:
        self.left_alone: dict[str, str] = {}
        """Name of each layer that looks like a decoder layer but is not fused, and why."""
        self._fused: list[tuple[nn.Module, _FusedLayer]] = []
        self._norms: list[tuple[nn.Module, _Norm]] = []
        self._force = force
        self._num_active = 0
        found = {}
        layers: list[nn.Module] = []
        for name, module in model.named_modules():
            if isinstance(getattr(module, "self_attn", None), nn.Module):
                layers.append(module)
                try:
                    found[name] = (module, _FusedLayer(module))
                    _check_weights(found[name][1], force)
                except _UnfitError as reason:
                    found.pop(name, None)
                    self.left_alone[name] = str(reason)
        if not found:
            return
        with torch.inference_mode():
            calls = [_watch(model, [module for module, _ in found.values()], at) for at in _CHECKED_POSITIONS]
            with attention_as(model, NAME):
                for name, (module, fused) in found.items():
                    try:
                        fused.check(module, [_usable(watched.get(module)) for watched in calls])
                        self._fused.append((module, fused))
                    except _UnfitError as reason:
                        self.left_alone[name] = str(reason)
        if self._fused:
            self._norms = _norms_outside(model, layers, self._fused[0][1])

    @property
    def num_fused(self) -> int:
        """Layers that run in a few kernels."""
        return len(self._fused)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers' `forward` is the fused one wherever they are called with a session, that of norms always.

        Layers that were hooked or whose parts were replaced since they were looked at are left alone. May be entered
        again inside itself. CUDA graphs captured inside stay valid outside.
        """
        self._num_active += 1
        replaced: list[Any] = []
        try:
            if self._num_active == 1:
                for module, ours in self._replacements:
                    if self._is_as_it_was(module, ours):
                        replaced.append(module)
                        module.forward = ours  # type: ignore[assignment]
            yield
        finally:
            self._num_active -= 1
            for module in replaced:
                del module.forward

    @property
    def _replacements(self) -> list[tuple[nn.Module, _FusedLayer | _Norm]]:
        return [*self._fused, *self._norms]

    def _is_as_it_was(self, module: nn.Module, ours: _FusedLayer | _Norm) -> bool:
        if isinstance(ours, _Norm):
            return not _is_hooked(module)
        return ours.still_fits(module, self._force)


def _products(x_LI: Tensor, *layers: nn.Linear) -> Tensor:
    """Outputs of linear layers side by side, `[L, O]`; no copies."""
    out_LO = x_LI.new_empty((x_LI.shape[0], sum(layer.out_features for layer in layers)))
    for layer, part in zip(layers, out_LO.split([layer.out_features for layer in layers], dim=1), strict=True):
        if layer.bias is None:
            torch.mm(x_LI, layer.weight.t(), out=part)
        else:
            torch.addmm(layer.bias, x_LI, layer.weight.t(), out=part)
    return out_LO


def _add_product(residual_LO: Tensor, x_LI: Tensor, layer: nn.Linear, *, in_place: bool = False) -> Tensor:
    """The layer's output plus the residual, which is written to if `in_place`."""
    if layer.bias is not None:
        return residual_LO + layer(x_LI)
    return torch.addmm(residual_LO, x_LI, layer.weight.t(), out=residual_LO if in_place else None)


def _norms_outside(model: nn.Module, layers: Sequence[nn.Module], like: _FusedLayer) -> list[tuple[nn.Module, _Norm]]:
    """RMSNorms that are no part of a layer, as the last one of a model; with weights like those of a fused layer."""
    inside = {module for layer in layers for module in layer.modules()}
    weight = like.input_norm.module.weight
    found = []
    for module in model.modules():
        its = getattr(module, "weight", None)
        if module in inside or not isinstance(its, Tensor) or its.dim() != 1:
            continue
        if (its.device, its.dtype) != (weight.device, weight.dtype) or _is_hooked(module):
            continue
        with contextlib.suppress(_UnfitError):
            found.append((module, _norm_of(module)))
    return found


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _present(*biases: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(bias for bias in biases if bias is not None)


def _check_parts(layer: Any) -> None:
    """Raise _UnfitError unless the layer has the parts of the pattern, no others, and nobody listens in on them."""

    def names(module: Any) -> set[str]:
        return {name for name, _ in module.named_children()}

    if names(layer) != _LAYER_PARTS:
        raise _UnfitError(f"its parts are {', '.join(sorted(names(layer)))}")
    attention, mlp = names(layer.self_attn), names(layer.mlp)
    if not _PROJECTIONS <= attention <= _PROJECTIONS | _HEAD_NORMS:
        raise _UnfitError(f"its attention's parts are {', '.join(sorted(attention))}")
    if not _MLP_PARTS <= mlp <= _MLP_PARTS | {"act_fn"} or not hasattr(layer.mlp, "act_fn"):
        raise _UnfitError(f"its feed-forward part consists of {', '.join(sorted(mlp))}")
    for module in (layer, layer.self_attn, layer.mlp):
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            raise _UnfitError(f"{type(module).__name__} has tensors of its own")
    for module in layer.modules():
        if _is_hooked(module):
            raise _UnfitError(f"{type(module).__name__} is hooked")


def _norm_of(module: Any) -> _Norm:
    """The norm's constants, if it is an RMSNorm; tried out on rows so small that its epsilon matters, too."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(eps, float):
        raise _UnfitError(f"{type(module).__name__} is no RMSNorm")
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        # Not around zero, lest a norm that takes the mean off looks the same.
        x = torch.randn(3, weight.shape[0], generator=generator) + 1
        x *= torch.tensor([eps**0.5, 1.0, 30.0])[:, None]
        x = x.to(weight.device, weight.dtype)
        want = module(x)
        for offset in (0.0, 1.0):
            got = rms_norm_ref(x, weight, eps=eps, offset=offset)
            if (got.float() - want.float()).norm() <= 4 * torch.finfo(x.dtype).eps * want.float().norm():
                return _Norm(module, eps, offset)
    raise _UnfitError(f"{type(module).__name__} is no RMSNorm")


def _activation_of(function: Callable[[Tensor], Tensor]) -> Activation:
    x = torch.linspace(-8, 8, 1001)
    got = function(x)
    if torch.allclose(got, F.silu(x), atol=1e-5):
        return "silu"
    if torch.allclose(got, F.gelu(x, approximate="tanh"), atol=1e-5):
        return "gelu_tanh"
    raise _UnfitError("its activation is neither SiLU nor the tanh form of GELU")


def _check_weights(fused: _FusedLayer, force: bool) -> None:
    """Raise _UnfitError unless all weights are plain ones that the kernels can read where they are."""
    attention, mlp = fused.attention, fused.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    linears = [*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for module in linears:
        if type(module) is not nn.Linear:
            raise _UnfitError(f"it has a {type(module).__name__} in place of a plain linear layer")
    tensors = [module.weight for module in linears]
    tensors += [module.bias for module in linears if module.bias is not None]
    tensors += [norm.module.weight for norm in (fused.input_norm, fused.mlp_norm, fused.q_norm, fused.k_norm) if norm]
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        raise _UnfitError("its weights are of several types or on several devices")
    if tensors[0].dtype not in _LIMIT:
        raise _UnfitError(f"its weights are {tensors[0].dtype}")
    if not force and (tensors[0].device.type != "cuda" or tensors[0].dtype == torch.float32):
        raise _UnfitError("its weights are not 16-bit on a GPU")
    if any(not tensor.is_contiguous() or tensor.data_ptr() % 16 for tensor in tensors):
        raise _UnfitError("its weights do not lie row after row at an aligned address")
    for group in (qkv, [mlp.gate_proj, mlp.up_proj]):
        if len({module.bias is None for module in group}) != 1:
            raise _UnfitError("some of its projections have a bias and some have none")


def _usable(call: _Call | None) -> _Call:
    if call is None:
        raise _UnfitError("the model did not call it")
    tables = call.keywords.get("position_embeddings")
    if not isinstance(tables, tuple) or len(tables) != 2 or "session" not in call.keywords:
        raise _UnfitError("it is not handed its rotary tables and the session by name")
    return call


def _watch(model: PreTrainedModel, layers: Sequence[nn.Module], positions: list[int]) -> dict[nn.Module, _Call]:
    """How the model calls its layers, from a short pass."""
    calls: dict[nn.Module, _Call] = {}

    def remember(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
        calls[layer] = _Call(arguments[1:], rest)

    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in layers]
    try:
        ids = torch.zeros(len(positions), dtype=torch.int64, device=model.device)
        at = torch.tensor(positions, device=model.device)
        run_model(model, ids, at, _FixedAttention(), keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return calls
