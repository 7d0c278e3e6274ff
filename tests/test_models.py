"""Every supported architecture equals its own dense attention when the budget covers the context."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentencekv import LongContextLM, UnsupportedModelError
from tests.conftest import ARCHITECTURES, make_model

NEW_TOKENS = 16
SMALL = {"sink_tokens": 4, "window_tokens": 12, "max_sentence_tokens": 16, "min_sentence_tokens": 4}


def dense_greedy(model, tokenizer, text: str) -> list[int]:
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equals_dense(architecture: str, tokenizer: PreTrainedTokenizerFast, prose: str, device: torch.device) -> None:
    model = make_model(architecture).to(device)
    if architecture == "gemma2":
        model.set_attn_implementation("eager")
    texts = [prose[:500], prose[500:620], prose[700:1300]]
    dense = [dense_greedy(model, tokenizer, text) for text in texts]
    covering = LongContextLM.from_model(model, tokenizer, budget_tokens=1024, prefill_chunk_tokens=97, **SMALL)
    assert [covering.generate(text, max_new_tokens=NEW_TOKENS).token_ids for text in texts] == dense
    batch = covering.generate(texts, max_new_tokens=NEW_TOKENS)
    assert [generation.token_ids for generation in batch] == dense
    full = covering.with_config(policy="full", budget_tokens=32)
    assert [generation.token_ids for generation in full.generate(texts, max_new_tokens=NEW_TOKENS)] == dense
    assert dense_greedy(model, tokenizer, texts[0]) == dense[0], "the model's own generate must go on working"


def test_small_budget_differs_from_dense(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """The control: what the equality tests compare is sensitive to what is read."""
    model = make_model("llama")
    window = LongContextLM.from_model(model, tokenizer, policy="window", budget_tokens=32, **SMALL)
    assert window.generate(prose[:1500], max_new_tokens=NEW_TOKENS).token_ids != dense_greedy(
        model, tokenizer, prose[:1500]
    )


@pytest.mark.parametrize("budget", [1024, 40])
def test_documents_with_sliding_layers(tokenizer: PreTrainedTokenizerFast, prose: str, budget: int) -> None:
    """A question far longer than the window, asked twice: local layers fork like the others."""
    model = make_model("gemma3_text")
    policy = "codes" if budget == 1024 else "full"
    lm = LongContextLM.from_model(model, tokenizer, budget_tokens=budget, policy=policy, **SMALL)
    document = lm.read(prose[:700])
    for question in (prose[700:900], prose[900:950]):
        text = f"{prose[:700]}\n\nQuestion: {question}\nAnswer:"
        assert document.ask(question, max_new_tokens=8).token_ids == dense_greedy(model, tokenizer, text)[:8]


REFUSED = {
    "gpt2": ({"n_embd": 48, "n_head": 4, "n_layer": 2}, "rotary"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "attention interface"),
    "mamba": ({}, "layers of kind|attention interface"),
    "deepseek_v3": (
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 3,
        },
        "values of",
    ),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, "s_aux"),
    "qwen3_next": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "shared_expert_intermediate_size": 16,
        },
        "linear_attention",
    ),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
        "sliding-window attention in layers",
    ),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "dynamic"),
}


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_refused_with_the_reason(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    changes, reason = REFUSED[architecture]
    model = make_model(architecture, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        LongContextLM.from_model(model, tokenizer)
