"""The claim itself, on the embedded model: on a small budget the default policy answers what dense attention does."""

import pytest

from eval.needle import make_cases, score
from sentencekv import LongContextLM
from sentencekv.prose import generate_prose


@pytest.fixture(scope="module")
def lm() -> LongContextLM:
    return LongContextLM.from_pretrained("pocket", device="cpu", budget_tokens=256)


def test_full_is_the_models_own_greedy_decoding(lm: LongContextLM) -> None:
    messages = [{"role": "user", "content": generate_prose(900, seed=8) + "\n\nWhat is the name of the door?"}]
    ids = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    dense = lm.model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :].tolist()
    assert lm.with_config(policy="full").generate(messages, max_new_tokens=12).token_ids == dense


def test_default_policy_keeps_the_answers_and_window_loses_them(lm: LongContextLM) -> None:
    """8 facts in 4,096 tokens, budget 256: 6% of the context is read at each step."""
    (case,) = make_cases(lm, [], 4096, num_cases=1, num_facts=8)
    right = {}
    with lm.with_config(policy="full").read(case.hidden.text) as document:
        for name in ("full", lm.config.policy, "window"):
            right[name] = sum(score(lm.with_config(policy=name).adopt(document), case))
    assert right["full"] >= 7
    assert right[lm.config.policy] >= 0.95 * right["full"]
    assert right["window"] <= 1
