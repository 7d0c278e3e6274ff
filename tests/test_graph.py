"""Recorded steps against eager ones: the same logits, for any mix of sessions, and few recordings."""

import logging

import pytest
import torch
from transformers import PreTrainedModel

from sentencekv import Config, policies
from sentencekv.attention import forward
from sentencekv.graph import Stepper
from sentencekv.memory import HostMemory
from sentencekv.session import Session
from tests.conftest import VOCABULARY, make_model
from tests.sequences import sentence_ends

CONFIG = Config(budget_tokens=96, sink_tokens=4, window_tokens=16, max_sentence_tokens=8, min_sentence_tokens=2)
GPU = torch.device("cuda")


def token_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reading_session(model: PreTrainedModel, num_tokens: int, *, policy: str = "moments", seed: int = 0) -> Session:
    """A session that has read so many random tokens, and knows where the next sentences end."""
    memory = HostMemory(None, pinned=model.device.type == "cuda")
    session = Session(CONFIG, policies.load(policy), memory, model.device)
    session.expect(sentence_ends(num_tokens + 400))
    forward(model, [token_ids(num_tokens, seed)], [session], exact=True)
    return session


def test_on_a_cpu_steps_are_eager() -> None:
    model = make_model("llama")
    stepper = Stepper(model, policies.load("moments"))
    assert not stepper.records
    session, twin = (reading_session(model, 200) for _ in range(2))
    for token in token_ids(5, seed=1):
        assert torch.equal(stepper.step([session], [token]), forward(model, [[token]], [twin], exact=False))
    assert stepper.num_recorded == 0


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gemma3_text", "smollm3", "gpt_neox"])
@pytest.mark.parametrize("policy", ["codes", "moments", "box", "mean", "window"])
def test_replays_equal_eager_steps(architecture: str, policy: str) -> None:
    """Sentences close, tables and windows move on, and one recording serves all of it."""
    model = make_model(architecture).to(GPU)
    session, twin = (reading_session(model, 300, policy=policy) for _ in range(2))
    stepper = Stepper(model, session.policy)
    for token in token_ids(60, seed=1):
        replayed = stepper.step([session], [token])
        torch.testing.assert_close(replayed, forward(model, [[token]], [twin], exact=False), rtol=1e-4, atol=1e-4)
    assert stepper.records
    assert stepper.num_recorded == 1
    assert session.num_sentences == twin.num_sentences > 40


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_fused_layers_replay_what_dense_attention_says(architecture: str, dtype: torch.dtype) -> None:
    """While the budget covers the context; a model in float32 is the measure, its own eager layers the yardstick."""
    model = make_model(architecture, hidden_size=64, head_dim=16).to(GPU, dtype)
    exact = make_model(architecture, hidden_size=64, head_dim=16).to(GPU)
    sessions = [reading_session(m, 60) for m in (model, model, exact)]
    stepper = Stepper(model, sessions[0].policy)
    for token in token_ids(25, seed=1):
        fused = stepper.step([sessions[0]], [token])
        eager = forward(model, [[token]], [sessions[1]], exact=False)
        truth = forward(exact, [[token]], [sessions[2]], exact=False)
        assert (fused - truth).norm() <= 2 * (eager - truth).norm() + 1e-3 * truth.norm()
    assert stepper.num_fused == model.config.num_hidden_layers


@pytest.mark.gpu
def test_a_batch_is_its_sessions_one_by_one() -> None:
    """Eight ragged sessions, some leaving and some joining, equal each alone, token for token."""
    model = make_model("llama").to(GPU)
    lengths = [40, 300, 120, 77, 500, 64, 210, 333]
    together, alone = ([reading_session(model, n, seed=n) for n in lengths] for _ in range(2))
    batch, single = Stepper(model, together[0].policy), Stepper(model, together[0].policy)
    last = [token_ids(1, seed=n)[0] for n in lengths]
    last_alone = list(last)
    for step in range(40):
        present = [i for i in range(8) if not (10 <= step < 20 and i in (1, 4, 6)) and not (step >= 30 and i < 4)]
        logits = batch.step([together[i] for i in present], [last[i] for i in present])
        for row, i in enumerate(present):
            last[i] = int(logits[row].argmax())
        for i in present:
            last_alone[i] = int(single.step([alone[i]], [last_alone[i]])[0].argmax())
        assert last == last_alone
    assert batch.num_recorded <= 3
    for one, other in zip(together, alone, strict=True):
        assert one.num_tokens == other.num_tokens
        assert one.traffic.num_selected == other.traffic.num_selected


@pytest.mark.gpu
def test_long_generation_records_once_and_keeps_the_device_flat() -> None:
    model = make_model("llama").to(GPU)
    session = reading_session(model, 300)
    session.expect(range(session.last_expected_end + 6, 6300, 6))
    stepper = Stepper(model, session.policy)
    token, held, allocated = 1, [], []
    for _ in range(3000):
        # Held until the next ones are there, as the decode loop holds them: also while a graph is recorded again.
        logits = stepper.step([session], [token])
        token = int(logits[0].argmax())
        held.append(session.device_bytes - session.summary_bytes)
        allocated.append(torch.cuda.memory_allocated() - session.summary_bytes)
    # Tables of sentences grow by a few bytes for each; KV does not.
    assert held[-1] - held[200] <= 3000 / 6 * 16 * 4 * 6
    assert allocated[-1] - allocated[200] <= 4 << 20, "recording again keeps nothing of before, nor a workspace"
    assert stepper.records
    assert 2 <= stepper.num_recorded <= 5
    assert session.host_bytes >= 0.9 * session.dense_bytes


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama").to(GPU)
    head = model.lm_head.forward
    # A question to the device in the middle of a pass.
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head(hidden) * (1.0 if hidden.sum().item() else 2.0))
    session, twin = (reading_session(model, 300) for _ in range(2))
    stepper = Stepper(model, session.policy)
    with caplog.at_level(logging.WARNING):
        for token in token_ids(6, seed=1):
            eager = forward(model, [[token]], [twin], exact=False)
            torch.testing.assert_close(stepper.step([session], [token]), eager, rtol=1e-4, atol=1e-4)
    assert not stepper.records
    assert sum("cannot be recorded" in record.message for record in caplog.records) == 1
    assert torch.rand(3, device=GPU).isfinite().all(), "torch's own generator still works"
