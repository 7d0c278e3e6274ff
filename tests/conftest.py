"""Tiny random models and a tiny tokenizer; where kernels run. No network, no GPU needed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, on CPU tensors; it has to be asked for before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from triton.runtime.interpreter import ReduceOps

from sentencekv.prose import generate_prose

# Tiny models are fastest on one thread, and workers that run side by side do not fight for the cores.
torch.set_num_threads(1)

VOCABULARY = 512

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 16, **SLIDING},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "olmo2": {},
    "olmo3": {**SLIDING},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], **EXPERTS},
    "glm4": {"head_dim": 16},
    "cohere2": {**SLIDING},
    "gpt_neox": {},
}


def make_model(architecture: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model in float32; the scale of its weights makes its attention peaked, not uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES.get(architecture, {}), **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on generated prose."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([generate_prose(3000, seed=1)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<begin>", pad_token="<begin>")


@pytest.fixture(scope="session")
def prose() -> str:
    return generate_prose(2000, seed=2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs on the CPU, and on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def kernel_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where `<op>_triton` runs: on the GPU if there is one, else on the CPU in the interpreter."""
    if device.type == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels run on the GPU here")
        monkeypatch.setattr(ReduceOps, "generic_reduce", _reduce)
    return device


_reduce_one_by_one = ReduceOps.generic_reduce


def _reduce(reduction: ReduceOps, parts: tuple) -> list:
    """Several sums at once, where the interpreter would add up element by element in Python."""
    if reduction.combine_fn.fn.__name__.startswith("_sum_"):
        return [reduction.sum(part) for part in parts]
    return _reduce_one_by_one(reduction, parts)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write holds NaN, or a number that no table has room for."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_and_fill(*args: object, **keywords: object) -> Tensor:
            tensor = make(*args, **keywords)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return make_and_fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes masked-out elements as well, of which numpy warns, and uses arrays as numbers.
    for category in ("RuntimeWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
