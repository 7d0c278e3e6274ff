"""What decoding benchmarks run on: models of known shapes with random weights, and contexts of random KV.

The KV of a context is drawn, not computed: reading it would take longer than everything that is timed. It is a function
of seed, layer and shape alone, so that every variant gets the same.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sentencekv.config import Config
from sentencekv.policies import load
from sentencekv.session import Session
from sentencekv.store import HostMemory

_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5}
_SMALL = {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}

SHAPES: dict[str, dict] = {
    # Llama 3.2 1B
    "llama-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    # Llama 3.1 8B
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    # Qwen 2.5 7B
    "qwen-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # sentencekv's own embedded model
    "pocket": {
        **_SMALL,
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # for tests
    "tiny": {
        **_SMALL,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    },
}

KEY_SCALE = 2.0
"""Standard deviation of context keys: large enough that attention is peaked and what is read changes the logits."""


def make_model(shape: str, device: torch.device, dtype: torch.dtype, max_tokens: int, seed: int) -> PreTrainedModel:
    """A model of that shape with random weights, made where it will run, with SDPA as its own attention."""
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, max_position_embeddings=max_tokens, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def streamed_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoding step must read: all but the embedding table, unless that is the head too."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    if model.config.tie_word_embeddings:
        return total
    return total - sum(parameter.nbytes for parameter in model.get_input_embeddings().parameters())


@dataclasses.dataclass(frozen=True)
class Context:
    """Random keys and values of `num_tokens` tokens in sentences, and the tokens that are fed after them."""

    model: PreTrainedModel
    num_tokens: int
    num_new: int
    seed: int

    @property
    def head_dim(self) -> int:
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def num_units(self) -> int:
        """Layers times KV heads: how many times a token's keys and values are kept."""
        return self.model.config.num_hidden_layers * self.model.config.num_key_value_heads

    @property
    def vector_bytes(self) -> int:
        """Bytes of one key, one value or one plane of a summary, in one unit."""
        return self.head_dim * self.model.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all units."""
        return 2 * self.vector_bytes * self.num_units

    def kv(self, layer: int) -> Tensor:
        """Post-RoPE keys and values `[N, T, 2, H]` of one layer."""
        config, device = self.model.config, self.model.device
        generator = torch.Generator(device).manual_seed(self.seed * 1009 + layer)
        shape = (config.num_key_value_heads, self.num_tokens, 2, self.head_dim)
        kv = torch.randn(shape, generator=generator, device=device, dtype=self.model.dtype)
        kv[:, :, 0] *= KEY_SCALE
        return kv

    def token_ids(self) -> list[int]:
        """The tokens fed to every variant; greedy tokens of random weights would mean nothing."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(0, self.model.config.vocab_size, (self.num_new,), generator=generator).tolist()

    def sentence_ends(self, config: Config) -> list[int]:
        """Ends of random sentences, in the context and in the tokens after it.

        Log-normal lengths with a median of 20 tokens, held between the configured minimum and maximum, as sentences of
        English prose come out of the splitter.
        """
        generator = torch.Generator().manual_seed(self.seed + 2)
        total = self.num_tokens + self.num_new
        draws = torch.randn(total // config.min_sentence_tokens + 2, generator=generator)
        lengths = (20 * (0.45 * draws).exp()).round().long()
        ends = lengths.clamp(config.min_sentence_tokens, config.max_sentence_tokens).cumsum(0) + config.sink_tokens
        return [end for end in ends.tolist() if end <= total]

    def session(self, config: Config, memory: HostMemory) -> Session:
        """A session that holds the context, as if it had read it."""
        session = Session(config, load(config.policy, config.policy_options), memory, self.model.device)
        session.expect(self.sentence_ends(config))
        session.begin(self.num_tokens, exact=True, expected_tokens=self.num_tokens)
        for layer in range(self.model.config.num_hidden_layers):
            session.append_context(layer, self.kv(layer))
        session.end()
        return session

    def cache(self) -> DynamicCache:
        """transformers' own cache with the same KV."""
        cache = DynamicCache(config=self.model.config)
        for layer in range(self.model.config.num_hidden_layers):
            key, value = self.kv(layer)[None].unbind(dim=3)
            cache.update(key.contiguous(), value.contiguous(), layer)
        return cache
