"""How keys turn: found for every architecture, and moved keys are those that the model itself computes there."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv import UnsupportedModelError
from sentencekv.rope import Rotation, rotate, rotations
from tests.conftest import ARCHITECTURES, make_model

SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.7,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MODELS = {name: (name, {}) for name in ARCHITECTURES} | {
    f"llama, {name}": ("llama", {"rope_parameters": parameters}) for name, parameters in SCALED.items()
}
INTERLEAVED = {"glm4", "cohere2"}
PAIRS = {"phi3": [3] * 3, "glm4": [4] * 3, "gpt_neox": [2] * 3, "smollm3": [6, 0, 6], "cohere2": [6, 0, 6]}
"""Per layer, where it is not all dimensions of each head: a part of them, or none."""


@torch.inference_mode()
def own_keys(model: PreTrainedModel, positions: list[int]) -> list[Tensor]:
    """Keys `[L, N, H]` of each layer, as transformers caches them, of L texts of one token at these positions."""
    ids = (7 * torch.arange(len(positions), device=model.device) + 3)[:, None]
    position_L1 = torch.tensor(positions, device=model.device)[:, None]
    output = model(input_ids=ids, position_ids=position_L1, use_cache=True)
    return [layer.keys[:, :, 0] for layer in output.past_key_values.layers]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", MODELS)
def test_moved_keys_are_the_models_own(name: str, device: torch.device) -> None:
    """There, back again, and there by way of another place."""
    architecture, changes = MODELS[name]
    model = make_model(architecture, **changes).to(device)
    found = rotations(model)
    assert list(found) == [0, 1, 2]
    head_dim = own_keys(model, [0])[0].shape[-1]
    for layer, rotation in found.items():
        num_pairs = PAIRS.get(architecture, [head_dim // 2] * 3)[layer]
        assert len(rotation.frequency_R) == num_pairs
        assert rotation.interleaved == (architecture in INTERLEAVED and num_pairs > 0)
    start = [0, 1, 17, 900, 3000]
    here = own_keys(model, start)
    for shift in (1, 23, 800):
        there = own_keys(model, [at + shift for at in start])
        for layer, rotation in found.items():
            # The model computes angles in float32: they are right to 3,800 radians times 6e-8.
            assert difference(rotate(here[layer], rotation, shift), there[layer]) < 3e-4
            assert difference(rotate(there[layer], rotation, -shift), here[layer]) < 3e-4
            by_way = rotate(rotate(here[layer], rotation, shift + 1234), rotation, -1234)
            assert difference(by_way, rotate(here[layer], rotation, shift)) < 1e-5
            moves = not torch.equal(here[layer], there[layer])
            assert moves == bool(rotation.frequency_R)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "glm4", "smollm3"])
def test_half_precision(architecture: str, dtype: torch.dtype, device: torch.device) -> None:
    """The same frequencies are found as in float32, rounded."""
    model = make_model(architecture).to(device)
    wanted = rotations(model)
    for layer, rotation in rotations(model.to(dtype)).items():
        assert rotation.interleaved == wanted[layer].interleaved
        # Casting a model casts its tables; the least frequencies are below float16's least normal number.
        frequency_R = pytest.approx(wanted[layer].frequency_R, rel=torch.finfo(dtype).eps, abs=3e-8)
        assert rotation.frequency_R == frequency_R


def turned_otherwise(model: PreTrainedModel, change: str) -> None:
    """Have the rotary module give other tables than its frequencies say."""
    rotary = model.model.rotary_emb
    own = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if change == "twice as fast":
            return own(x, 2 * position_ids)
        if change == "backwards":
            return own(x, -position_ids)
        if change == "not beyond 900":
            return own(x, position_ids.clamp(max=900))
        cos, sin = own(x, position_ids)
        scale = 1 + position_ids[..., None] / 1e4  # a scale that grows with the position
        return cos * scale, sin * scale

    rotary.forward = forward


@pytest.mark.parametrize("change", ["twice as fast", "backwards", "not beyond 900", "growing"])
def test_keys_that_turn_otherwise_are_refused(change: str) -> None:
    model = make_model("llama")
    rotations(model)
    turned_otherwise(model, change)
    with pytest.raises(UnsupportedModelError, match=r"keys of layer 0 do not turn .*use reuse='exact'"):
        rotations(model)


def test_one_layer_that_turns_otherwise_is_named() -> None:
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **keywords: object) -> object:
        cos, sin = position_embeddings
        return own(hidden_states=hidden_states, position_embeddings=(cos.flip(-1), sin.flip(-1)), **keywords)

    attention.forward = forward
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: keys of layer 1 do not turn"):
        rotations(model)


def test_no_position_beyond_the_models_own_is_asked_for() -> None:
    """Tables of some models end there."""
    model = make_model("llama", max_position_embeddings=50)
    seen: list[int] = []
    rotary = model.model.rotary_emb
    own = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(position_ids.max()))
        return own(x, position_ids)

    rotary.forward = forward
    found = rotations(model)
    assert 30 < max(seen) < 50
    assert all(len(rotation.frequency_R) == 6 for rotation in found.values())


def test_tables_are_right_at_any_distance() -> None:
    """In float32 an angle of 10 million radians is right to half a radian."""
    frequency_R = (1.0, 0.31622776, 1e-4)
    shifts = [0, 1, -1, 131_072, -10_000_019]
    cos_SR, sin_SR = Rotation(frequency_R, False).tables(shifts, torch.device("cpu"))
    assert cos_SR.dtype == sin_SR.dtype == torch.float32
    for (s, shift), (r, frequency) in itertools.product(enumerate(shifts), enumerate(frequency_R)):
        assert float(cos_SR[s, r]) == pytest.approx(math.cos(shift * frequency), abs=1e-7)
        assert float(sin_SR[s, r]) == pytest.approx(math.sin(shift * frequency), abs=1e-7)
    assert cos_SR[0].tolist() == [1.0] * 3
    assert sin_SR[0].tolist() == [0.0] * 3
