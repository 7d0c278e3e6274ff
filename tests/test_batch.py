"""Sessions side by side: packed into one pass, or one token each through lanes; kernels and references alike."""

import dataclasses
import gc
import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch

import triton_ops
from sentencekv import policies
from sentencekv.batch import LaneBatch, SessionBatch
from sentencekv.session import Session
from tests.sequences import (
    CONFIG,
    SCALE,
    Scripted,
    Tokens,
    close,
    closed_kv,
    new_session,
    random_choice,
    run,
    sentence_ends,
    step,
)

LANE_POLICIES = [name for name in policies.available() if policies.policy_class(name).reads != "everything"]


def reading_session(tokens: Tokens, num_tokens: int, name: str = "moments", **changes) -> Session:
    """A session that has read so many tokens."""
    session = new_session(tokens.q.device, policies.load(*policies.parse(name)), dataclasses.replace(CONFIG, **changes))
    session.expect(sentence_ends(tokens.q.shape[2]))
    run(session, tokens, num_tokens, exact=True)
    return session


def test_reading_and_decoding_sessions_in_one_row(device: torch.device) -> None:
    """One row of 40 reading tokens, one decoding token and 7 more equals each alone."""
    all_tokens = [Tokens.random(120, device, seed=s) for s in range(3)]
    lengths = [40, 1, 7]
    together = [reading_session(tokens, 80) for tokens in all_tokens]
    alone = [reading_session(tokens, 80) for tokens in all_tokens]
    for session, length in zip(together, lengths, strict=True):
        session.begin(length, exact=length > 1)
    batch = SessionBatch(together, lengths)
    rows = [
        torch.cat([getattr(t, name)[0, :, 80 : 80 + n] for t, n in zip(all_tokens, lengths, strict=True)], dim=1)
        for name in ("q", "k", "v")
    ]
    packed = batch.attend(0, *rows, scale=SCALE).split(lengths, dim=1)
    for session, tokens, length, output in zip(alone, all_tokens, lengths, packed, strict=True):
        close(output, run(session, tokens, 80 + length, exact=length > 1)[0])


@pytest.mark.parametrize("name", LANE_POLICIES)
def test_lanes_do_not_see_each_other(name: str, device: torch.device) -> None:
    """Three ragged sessions, then one leaves, another joins, and they change places: each as if it were alone."""
    starts = [300, 15, 120, 77]
    all_tokens = [Tokens.random(start + 40, device, seed=start) for start in starts]
    together = [reading_session(tokens, start, name) for tokens, start in zip(all_tokens, starts, strict=True)]
    alone = [reading_session(tokens, start, name) for tokens, start in zip(all_tokens, starts, strict=True)]
    batch, batch_of_one = LaneBatch(together[0].policy), LaneBatch(together[0].policy)
    for seated, steps in (([0, 1, 2], 10), ([0, 2], 5), ([3, 2, 0], 10), ([2], 2), ([1, 3, 0], 12)):
        for _ in range(steps):
            _, outputs = step(batch, [together[i] for i in seated], [all_tokens[i] for i in seated], num_lanes=3)
            for i, output in zip(seated, outputs, strict=True):
                _, expected = step(batch_of_one, [alone[i]], [all_tokens[i]])
                for a, b in zip(output, expected[0], strict=True):
                    close(a, b)
    for mine, other in zip(together, alone, strict=True):
        assert mine.num_tokens == other.num_tokens
        assert mine.sentence_spans() == other.sentence_spans()
        assert torch.equal(mine.traffic.sums, other.traffic.sums)
        torch.testing.assert_close(mine.shares(), other.shares(), rtol=1e-4, atol=1e-6)
        if mine.num_sentences:
            assert torch.equal(closed_kv(mine, 1), closed_kv(other, 1))


def test_a_batch_of_scripted_sessions_reads_what_each_selected(device: torch.device) -> None:
    """Ragged lanes with selections of their own, against masked dense attention."""
    starts = [200, 60, 130]
    all_tokens = [Tokens.random(start + 40, device, seed=start) for start in starts]
    policy = Scripted()
    sessions = []
    for tokens, start in zip(all_tokens, starts, strict=True):
        session = new_session(device, policy)
        session.expect(sentence_ends(start + 40))
        run(session, tokens, start, exact=True)
        sessions.append(session)
    batch = LaneBatch(policy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        choices = [random_choice(session.num_sentences, (7, 3), generator) for session in sessions]
        policy.script[:] = [choices]
        expected = []
        for session, tokens, choice in zip(sessions, all_tokens, choices, strict=True):
            spans = session.sentence_spans()
            seen = torch.zeros(2, session.num_tokens + 1, dtype=torch.bool, device=device)
            seen[:, : CONFIG.sink_tokens] = seen[:, spans[-1][1] :] = True
            for head, ids in enumerate(choice):
                for s in ids:
                    seen[head, spans[s][0] : spans[s][1]] = True
            expected.append([tokens.masked(layer, seen) for layer in (0, 1)])
        _, outputs = step(batch, sessions, all_tokens)
        for output, want in zip(outputs, expected, strict=True):
            for a, b in zip(output, want, strict=True):
                close(a, b)


def test_seating_says_when_launches_change(device: torch.device) -> None:
    """Only when tables must grow: more lanes, more sentences, more parts; never for a token or a closed sentence."""
    tokens = Tokens.random(700, device)
    sessions = [reading_session(tokens, 200), reading_session(tokens, 150)]
    batch = LaneBatch(sessions[0].policy)
    assert step(batch, sessions, [tokens] * 2)[0]
    closed = sessions[0].num_sentences
    assert not any(step(batch, sessions, [tokens] * 2)[0] for _ in range(20))
    assert sessions[0].num_sentences > closed
    assert not step(batch, sessions[::-1], [tokens] * 2)[0]
    assert not step(batch, sessions[:1], [tokens], num_lanes=2)[0], "one fewer in the same tables"
    assert step(batch, sessions[:1], [tokens])[0], "tables for one lane"
    changes = sum(step(batch, sessions[:1], [tokens])[0] for _ in range(400))
    assert 1 <= changes <= 3, "more sentences than there was room for, and room doubles"
    forks = [sessions[0]]
    for generation in range(3):
        fork = forks[-1].fork()
        forks.append(fork)
        run(fork, tokens, fork.num_tokens + 10, exact=True)
        step(batch, [fork], [tokens])
        assert len(fork.lane().parts) == generation + 2


def test_an_ended_session_gives_its_memory_back(device: torch.device) -> None:
    """While the batch that it decoded in lives on, for the next one."""
    tokens = Tokens.random(300, device)
    session = reading_session(tokens, 280)
    memory = session.memory
    batch = LaneBatch(session.policy)
    session.begin(1, exact=False)
    batch.seat([session])
    batch.forget()
    assert memory.in_use_bytes > 0
    del session
    gc.collect()
    assert memory.in_use_bytes == 0


def test_an_exact_pass_between_steps_makes_a_new_lane(device: torch.device) -> None:
    """The lane that was seated is no more: the next step must not write to it."""
    tokens = Tokens.random(300, device)
    session = reading_session(tokens, 100, budget_tokens=300)
    batch = LaneBatch(session.policy)
    for _ in range(3):
        for _ in range(5):
            _, outputs = step(batch, [session], [tokens])
            for layer in (0, 1):
                close(outputs[0][layer], tokens.dense(layer, session.num_tokens - 1, session.num_tokens))
        run(session, tokens, session.num_tokens + 30, exact=True)


@pytest.fixture
def use_ops(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> Callable[[str], None]:
    """Makes the engine call `<op>_ref` or `<op>_triton` of every op, where there is one, whatever the device."""
    names = ["sentencekv.batch", "sentencekv.lane", "sentencekv.policies"]
    modules = [importlib.import_module(name) for name in names]
    modules += [importlib.import_module(f"sentencekv.policies.{name}") for name in policies.available()]

    def use(kind: str) -> None:
        for name in triton_ops.__all__:
            if importlib.util.find_spec(f"triton_ops.{name}") is None:
                continue  # not an op
            own = importlib.import_module(f"triton_ops.{name}")
            # The kernel's weights are in half precision, so near ties may turn: it scores in both runs.
            op = getattr(own, f"{name}_{'triton' if name == 'score_codes' else kind}", None)
            for module in modules:
                if op is not None and hasattr(module, name):
                    monkeypatch.setattr(module, name, op)

    return use


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        # A list of many columns takes the interpreter a minute.
        *(("rerank:shortlist=2" if name == "rerank" else name, "auto") for name in LANE_POLICIES),
        ("moments", "int8"),
        ("moments", "int4"),
    ],
)
def test_kernels_and_references_decode_alike(
    name: str,
    kv_dtype: str,
    use_ops: Callable[[str], None],
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ragged sessions and an empty lane, until sentences have closed; misses by a launch or by attention."""
    if kernel_device.type == "cpu":
        # The interpreter takes as long for a program that has nothing to do.
        for module in ("score_codes", "score_sentences", "sparse_decode"):
            monkeypatch.setattr(importlib.import_module(f"triton_ops.{module}"), "_PROGRAMS", 12)
    starts = [45, 21]
    all_tokens = [Tokens.random(start + 4, kernel_device, seed=start) for start in starts]
    results = []
    for kind in ("ref", "triton"):
        use_ops(kind)
        sessions = [
            reading_session(t, start, name, budget_tokens=32, kv_dtype=kv_dtype)
            for t, start in zip(all_tokens, starts, strict=True)
        ]
        batch = LaneBatch(sessions[0].policy)
        before = [session.num_sentences for session in sessions]
        outputs = [step(batch, sessions, all_tokens, num_lanes=3)[1] for _ in range(4)]
        assert [session.num_sentences for session in sessions] > before
        results.append((sessions, outputs))
    (ref_sessions, ref_outputs), (triton_sessions, triton_outputs) = results
    torch.testing.assert_close(triton_outputs, ref_outputs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(triton_sessions, ref_sessions, strict=True):
        assert torch.equal(mine.traffic.sums, other.traffic.sums)
        torch.testing.assert_close(mine.shares(), other.shares(), rtol=1e-4, atol=1e-6)
        for layer in (0, 1):
            assert torch.equal(closed_kv(mine, layer), closed_kv(other, layer))
            assert torch.equal(mine.lane().contents()[0][layer], other.lane().contents()[0][layer])
