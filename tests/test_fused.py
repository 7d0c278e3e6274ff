"""Fused layers against the model's own: same logits where they are taken, none taken that differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sentencekv.attention import forward, run_model
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.memory import HostMemory
from sentencekv.policies import load
from sentencekv.session import Session
from tests.conftest import COMMON, make_model

FUSED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with GELU": {"hidden_act": "gelu_pytorch_tanh"},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "ministral": {},
    "smollm3": {},
    "gemma": {},
    "granite": {"residual_multiplier": 1.0},
}
"""Must be fused in every layer."""
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {},
    "granite": {"residual_multiplier": 0.5},
    "olmo2": {},
    "olmo3": {},
    "cohere2": {},
    "gpt_neox": {},
    "mixtral": {},
    "qwen3_moe": {},
    "glm4": {},
    "phi3": {},
}
"""Must be left alone."""


def make(name: str, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny model whose norms and biases are not all one and zero."""
    model = make_model(name.partition(" ")[0], **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape) * 0.2
    return model.to(device, dtype)


class MeanOfPast:
    """A session's stand-in: each token attends evenly to itself and to what the others are."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        assert keywords.keys() == {"scale", "sliding_window", "softcap"}
        self.layers.append(layer)
        group = q.shape[0] // k.shape[0]
        return (q * keywords["scale"] + (k + v).repeat_interleave(group, 0)).contiguous()


@torch.inference_mode()
def run(model: PreTrainedModel, num_tokens: int, session: Any) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(0, COMMON["vocab_size"], (num_tokens,), generator=generator)
    positions = torch.randint(0, 4000, (num_tokens,), generator=generator)
    return run_model(model, ids.to(model.device), positions.to(model.device), session)


def compare(model: PreTrainedModel, fused: FusedLayers) -> None:
    for num_tokens in (1, 2, 17, 33):
        watched, own = MeanOfPast(), MeanOfPast()
        want = run(model, num_tokens, own)
        with fused.active():
            got = run(model, num_tokens, watched)
        assert watched.layers == own.layers
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < (1e-4 if model.dtype == torch.float32 else 5e-2), (num_tokens, error)


@pytest.mark.parametrize("name", FUSED)
def test_layers_of_the_pattern_are_fused(name: str, device: torch.device) -> None:
    model = make(name, device, **FUSED[name])
    fused = FusedLayers(model, force=True)
    assert fused.left_alone == {}
    assert fused.num_fused == model.config.num_hidden_layers
    compare(model, fused)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_alone(name: str, device: torch.device) -> None:
    model = make(name, device, **OTHERS[name])
    fused = FusedLayers(model, force=True)
    assert fused.num_fused == 0
    compare(model, fused)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = make(name, torch.device("cuda"), dtype, **FUSED[name])
    fused = FusedLayers(model)
    assert fused.left_alone == {}
    assert fused.num_fused == model.config.num_hidden_layers
    compare(model, fused)


@pytest.mark.gpu
def test_graph() -> None:
    """A captured step gives what the same step gives launch by launch."""
    model = make("qwen3", torch.device("cuda"), torch.bfloat16, hidden_size=256, intermediate_size=1024)
    fused = FusedLayers(model)
    assert fused.num_fused == 3
    layer = model.model.layers[1]
    hidden = torch.randn(1, 4, 256, device="cuda", dtype=torch.bfloat16)
    tables = model.model.rotary_emb(hidden, torch.tensor([[1, 5, 9, 77]], device="cuda"))
    with torch.inference_mode(), fused.active():
        for _ in range(2):
            want = layer(hidden, position_embeddings=tables, session=MeanOfPast())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer(hidden, position_embeddings=tables, session=MeanOfPast())
        for _ in range(3):
            got.zero_()
            graph.replay()
            assert torch.equal(got, want)


def test_layer_that_computes_more_is_left_alone(device: torch.device) -> None:
    """No name gives it away: the check does."""
    model = make("llama", device)

    class Louder(type(model.model.layers[1])):  # type: ignore[misc]
        def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
            return super().forward(*arguments, **keywords) * 1.001

    model.model.layers[1].__class__ = Louder
    fused = FusedLayers(model, force=True)
    assert fused.num_fused == 2
    assert "model.layers.1" in fused.left_alone
    compare(model, fused)


def test_layer_that_computes_more_of_long_texts_is_left_alone(device: torch.device) -> None:
    """One that reads and one that decodes are two ways through a fused layer; both are checked."""
    model = make("llama", device)

    class LouderWhenLong(type(model.model.layers[1])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            return super().forward(hidden_states, *arguments, **keywords) * (1.001 if hidden_states.shape[1] > 4 else 1)

    model.model.layers[1].__class__ = LouderWhenLong
    fused = FusedLayers(model, force=True)
    assert list(fused.left_alone) == ["model.layers.1"]


def test_a_hooked_last_norm_is_left_alone(device: torch.device) -> None:
    model = make("llama", device)
    model.model.norm.register_forward_hook(lambda *_: None)
    fused = FusedLayers(model, force=True)
    assert fused.num_fused == 3
    with fused.active():
        assert "forward" not in vars(model.model.norm)


def test_queries_scaled_by_position_are_noticed(device: torch.device) -> None:
    model = make("llama", device)
    attention = type(model.model.layers[0].self_attn)

    class FarSighted(attention):  # type: ignore[misc, valid-type]
        def forward(self, *, hidden_states: Tensor, position_ids: Tensor, **keywords: Any) -> Any:
            session = keywords["session"]

            class Scaling:
                def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
                    far = 1.0 + 0.1 * torch.log1p(position_ids[0] // 16384)
                    return session.attend(layer, q * far[:, None], k, v, **rest)

            return super().forward(hidden_states=hidden_states, **{**keywords, "session": Scaling()})

    model.model.layers[2].self_attn.__class__ = FarSighted
    fused = FusedLayers(model, force=True)
    assert list(fused.left_alone) == ["model.layers.2"]


def change_to_a_subclass(model: PreTrainedModel) -> None:
    class Adapter(nn.Linear):
        pass

    model.model.layers[0].self_attn.k_proj.__class__ = Adapter


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)


def add_a_tensor(model: PreTrainedModel) -> None:
    model.model.layers[0].scale = nn.Parameter(torch.ones(1, device=model.device))


def transpose_a_weight(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


@pytest.mark.parametrize("change", [change_to_a_subclass, hook, add_a_tensor, transpose_a_weight])
def test_unusual_parts_are_left_alone(change: Callable[[PreTrainedModel], None], device: torch.device) -> None:
    model = make("llama", device)
    change(model)
    fused = FusedLayers(model, force=True)
    assert list(fused.left_alone) == ["model.layers.0"]
    assert fused.num_fused == 2
    compare(model, fused)


def test_the_model_is_unchanged_outside(device: torch.device) -> None:
    model = make("llama", device)
    layers = model.model.layers
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    fused = FusedLayers(model, force=True)
    with fused.active():
        with fused.active():
            assert all("forward" in vars(layer) for layer in layers)
        assert all("forward" in vars(layer) for layer in layers)
        assert "forward" in vars(model.model.norm)
        # Without a session, calls are the model's own, but for the rounding of the last norm.
        ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
        inside = model(ids, use_cache=False).logits
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(inside, model(ids, use_cache=False).logits)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("change", ["hook", "adapter", "new part", "own forward", "hooked norm"])
def test_what_changed_since_is_left_alone(change: str, device: torch.device) -> None:
    """Between two passes somebody hooks a layer or replaces a part of it; what they did is not undone, either."""
    model = make("llama", device)
    fused = FusedLayers(model, force=True)
    layer = model.model.layers[1]
    called: list[str] = []
    if change == "hook":
        layer.self_attn.q_proj.register_forward_hook(lambda *_: called.append("hook"))
    elif change == "adapter":

        class Doubled(nn.Module):
            def __init__(self, base: nn.Linear) -> None:
                super().__init__()
                self.base, self.weight, self.bias = base, base.weight, base.bias

            def forward(self, x: Tensor) -> Tensor:
                called.append("adapter")
                return 2 * self.base(x)

        layer.mlp.down_proj = Doubled(layer.mlp.down_proj)
    elif change == "new part":
        layer.mlp = type(layer.mlp)(model.config).to(device)
        called.append("nobody asks")
    elif change == "own forward":
        own = layer.forward

        def patched(*arguments: Any, **keywords: Any) -> Any:
            called.append("forward")
            return own(*arguments, **keywords)

        layer.forward = patched
    else:
        model.model.norm.register_forward_hook(lambda *_: called.append("norm"))
    with fused.active():
        assert isinstance(vars(layer).get("forward"), type(model.model.layers[0].forward)) == (change == "hooked norm")
        assert "forward" in vars(model.model.layers[0])
    compare(model, fused)
    assert called
    assert ("forward" in vars(layer)) == (change == "own forward")


def test_two_of_one_model(device: torch.device) -> None:
    """The inner one leaves alone what the outer one has taken, and gives nothing back that it did not take."""
    model = make("llama", device)
    outer, inner = (FusedLayers(model, force=True) for _ in range(2))
    with outer.active():
        taken = [vars(module).get("forward") for module in model.modules()]
        with inner.active():
            assert [vars(module).get("forward") for module in model.modules()] == taken
        assert [vars(module).get("forward") for module in model.modules()] == taken
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_norm_of_another_kind_is_left_alone(dtype: torch.dtype, device: torch.device) -> None:
    model = make("llama", device, dtype)
    size = model.config.hidden_size
    model.model.norm = nn.LayerNorm(size, bias=False, device=device, dtype=dtype)
    fused = FusedLayers(model, force=True)
    with fused.active():
        assert "forward" not in vars(model.model.norm)
        assert "forward" in vars(model.model.layers[0])


def test_norms_of_layers_that_are_left_alone_are_left_alone(device: torch.device) -> None:
    model = make("qwen3", device)
    hook_handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    fused = FusedLayers(model, force=True)
    hook_handle.remove()
    with fused.active():
        replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert replaced == ["model.layers.0", "model.layers.2", "model.norm"]


def test_a_norm_that_is_given_more_than_rows(device: torch.device) -> None:
    model = make("llama", device)

    class Gated(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            normed = super().forward(hidden_states)
            return normed if gate is None else normed * gate

    model.model.norm.__class__ = Gated
    x = torch.randn(2, model.config.hidden_size, device=device)
    with FusedLayers(model, force=True).active(), torch.inference_mode():
        assert "forward" in vars(model.model.norm)
        torch.testing.assert_close(model.model.norm(x, gate=x), model.model.norm(x) * x)


def test_nothing_is_fused_on_a_cpu_unasked() -> None:
    fused = FusedLayers(make("llama", torch.device("cpu")))
    assert fused.num_fused == 0
    assert set(fused.left_alone.values()) == {"its weights are not 16-bit on a GPU"}


def test_with_sessions(device: torch.device) -> None:
    """Two sequences that decode side by side, their KV in sessions."""
    model = make("qwen3", device)
    fused = FusedLayers(model, force=True)
    memory = HostMemory(None, pinned=device.type == "cuda")
    config = Config(budget_tokens=64, sink_tokens=2, window_tokens=4, max_sentence_tokens=4, min_sentence_tokens=1)

    def steps() -> Tensor:
        sessions = [Session(config, load("moments"), memory, device) for _ in range(2)]
        forward(model, [[1, 2, 3, 4, 5], [6, 7, 8]], sessions, exact=True)
        return torch.cat([forward(model, [[token], [token + 1]], sessions, exact=False) for token in range(4)])

    want = steps()
    with fused.active():
        torch.testing.assert_close(steps(), want, rtol=1e-3, atol=1e-3)
