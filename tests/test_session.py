"""A session against brute force over all its tokens: random queries and keys, no model."""

import dataclasses
import gc

import pytest
import torch
from torch import Tensor

from sentencekv import Config, policies
from sentencekv.exact import exact_attention_ref
from sentencekv.policies import Policy
from sentencekv.session import Session, SessionBatch
from sentencekv.store import HostMemory

HEADS, GROUPS, DIM, SCALE = 2, 3, 16, 0.25
CONFIG = Config(budget_tokens=64, sink_tokens=5, window_tokens=12, max_sentence_tokens=8, min_sentence_tokens=2)
LENGTHS = [3, 8, 1, 5, 8, 2, 7, 4]


def sentence_ends(num_tokens: int) -> list[int]:
    ends, at = [], 0
    while at < num_tokens:
        at = min(at + LENGTHS[len(ends) % len(LENGTHS)], num_tokens)
        ends.append(at)
    return ends


@dataclasses.dataclass
class Tokens:
    """Random queries, keys and values of a sequence, for two layers."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, num_tokens: int, device: torch.device, seed: int = 0) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            return torch.randn(2, heads, num_tokens, DIM, generator=generator).to(device)

        return cls(2 * draw(HEADS * GROUPS), draw(HEADS), draw(HEADS))

    def dense(self, layer: int, first: int, stop: int, **options) -> Tensor:
        kv = torch.stack([self.k[layer, :, :stop], self.v[layer, :, :stop]], dim=2)
        return exact_attention_ref(self.q[layer, :, first:stop], kv, scale=SCALE, **options)


def new_session(device: torch.device, policy: Policy | None = None, config: Config = CONFIG) -> Session:
    memory = HostMemory(None, pinned=device.type == "cuda")
    return Session(config, policy or policies.load("moments"), memory, device)


def run(session: Session, tokens: Tokens, stop: int, *, exact: bool, **options) -> list[Tensor]:
    """One pass of both layers up to token `stop`."""
    first = session.num_tokens
    session.begin(stop - first, exact=exact)
    rows = slice(first, stop)
    outputs = [
        session.attend(
            layer, tokens.q[layer, :, rows], tokens.k[layer, :, rows], tokens.v[layer, :, rows], scale=SCALE, **options
        )
        for layer in (0, 1)
    ]
    session.end()
    return outputs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 11, 64, 300])
def test_reading_is_exact_for_any_chunk(chunk: int, device: torch.device) -> None:
    tokens = Tokens.random(300, device)
    session = new_session(device)
    session.expect(sentence_ends(300))
    while session.num_tokens < 300:
        first, stop = session.num_tokens, min(session.num_tokens + chunk, 300)
        for layer, output in enumerate(run(session, tokens, stop, exact=True)):
            close(output, tokens.dense(layer, first, stop))
    held = session._places.num_tokens + sum(t[0].shape[1] for t in (session._sink, session._recent))
    assert held == 300, "no token is lost and none is held twice"
    for first, stop in session.sentence_spans():
        assert first in {CONFIG.sink_tokens, *sentence_ends(300)}
        assert stop in sentence_ends(300)


@pytest.mark.parametrize("name", policies.available())
def test_covering_budget_equals_dense(name: str, device: torch.device) -> None:
    """Every policy but `window`, as long as the context is not longer than the budget; `full` beyond it too."""
    tokens = Tokens.random(150, device)
    config = dataclasses.replace(CONFIG, budget_tokens=150)
    session = new_session(device, policies.load(name), config)
    session.expect(sentence_ends(150))
    run(session, tokens, 90, exact=True)
    agree = []
    for stop in range(91, 151):
        for layer, output in enumerate(run(session, tokens, stop, exact=False)):
            dense = tokens.dense(layer, stop - 1, stop)
            agree.append(torch.allclose(output, dense, rtol=1e-4, atol=1e-5))
    assert all(agree) if name != "window" else not any(agree)


def test_full_ignores_the_budget(device: torch.device) -> None:
    tokens = Tokens.random(300, device)
    session = new_session(device, policies.load("full"))
    session.expect(sentence_ends(300))
    run(session, tokens, 280, exact=True)
    for stop in range(281, 301):
        close(run(session, tokens, stop, exact=False)[1], tokens.dense(1, stop - 1, stop))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(Policy):
    """Selects what the test says, and records what it was asked."""

    script: list = dataclasses.field(default_factory=list)

    def summarize(self, key_TNH: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        return (key_TNH[offsets[:-1]], key_TNH)

    def select(self, q_NGH, parts, length_S, *, scale, longest, room_tokens, max_selected) -> Tensor:
        assert sum(table.shape[0] for table, _ in parts) == length_S.numel()
        assert sum(table.shape[0] for _, table in parts) == length_S.sum()
        return self.script[0].to(q_NGH.device)


def test_sparse_step_is_dense_attention_masked_to_the_selection(device: torch.device) -> None:
    """Heads select differently; the same through hits, misses and eviction; sentences close meanwhile."""
    tokens = Tokens.random(340, device, seed=3)
    policy = Scripted()
    config = dataclasses.replace(CONFIG, hot_tokens=CONFIG.budget_tokens)
    session = new_session(device, policy, config)
    session.expect(sentence_ends(340))
    run(session, tokens, 300, exact=True)
    generator = torch.Generator().manual_seed(0)
    for stop in range(301, 341):
        num_sentences, count = session.num_sentences, 7
        chosen = torch.stack([torch.randperm(num_sentences, generator=generator)[:count] for _ in range(HEADS)])
        chosen[1, 4:] = -1
        policy.script[:] = [chosen]
        recent = session._recent[0].shape[1] + 1
        all_spans = session.sentence_spans()
        spans = [[all_spans[s] for s in chosen[head].tolist() if s >= 0] for head in range(HEADS)]
        outputs = run(session, tokens, stop, exact=False)
        for layer, output in enumerate(outputs):
            for head in range(HEADS):
                seen = torch.zeros(stop, dtype=torch.bool, device=device)
                seen[: config.sink_tokens] = seen[stop - recent :] = True
                for first, end in spans[head]:
                    seen[first:end] = True
                key, value = tokens.k[layer, head, :stop][seen], tokens.v[layer, head, :stop][seen]
                q = tokens.q[layer, head * GROUPS : (head + 1) * GROUPS, stop - 1]
                close(output[head * GROUPS : (head + 1) * GROUPS, 0], (SCALE * q @ key.T).softmax(-1) @ value)
    traffic = session.traffic
    assert traffic.steps == 40
    assert int(traffic.num_selected) == 40 * 2 * (7 + 4)
    assert 0 < traffic.num_missed < int(traffic.num_selected)
    assert 0 < traffic.hit_rate < 1


@pytest.mark.parametrize("name", [n for n in policies.available() if policies.policy_class(n).reads == "selected"])
def test_budget_holds_for_every_head(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens.random(400, device)
    session = new_session(device, policies.load(name))
    session.expect(sentence_ends(400))
    run(session, tokens, 380, exact=True)
    selections = []
    cls = policies.policy_class(name)
    select = Policy.select
    monkeypatch.setattr(cls, "select", lambda *args, **kw: selections.append(select(*args, **kw)) or selections[-1])
    for stop in range(381, 401):
        run(session, tokens, stop, exact=False)
        recent = session._recent[0].shape[1]
        assert CONFIG.window_tokens <= recent < CONFIG.window_tokens + 2 * CONFIG.max_sentence_tokens
    lengths = session._places.length_on_device
    assert len(selections) == 40
    for selected in selections:
        tokens_read = torch.where(selected >= 0, lengths[selected.clamp(min=0)], 0).sum(-1)
        assert (tokens_read <= CONFIG.room_tokens).all()
        almost_full = tokens_read > CONFIG.room_tokens - 2 * CONFIG.max_sentence_tokens
        assert (almost_full | (selected >= 0).all(-1)).all(), "the budget is used"


def test_moments_finds_the_sentence_that_holds_the_mass(device: torch.device) -> None:
    """One key aligned with the query among many: `moments` reads its sentence, `window` cannot."""
    tokens = Tokens.random(300, device)
    tokens.q[:, :, 299] = tokens.q[:, :1, 299]
    tokens.k[:, :, 150] = 6 * tokens.q[:, :1, 299] / tokens.q[:, :1, 299].norm(dim=-1, keepdim=True)
    found = {}
    for name in ("moments", "window"):
        session = new_session(device, policies.load(name))
        session.expect(sentence_ends(300))
        run(session, tokens, 299, exact=True)
        output = run(session, tokens, 300, exact=False)[0]
        dense = tokens.dense(0, 299, 300)
        found[name] = float((output - dense).norm() / dense.norm())
        if name == "moments":
            best = max(range(session.num_sentences), key=session.shares().__getitem__)
            first, stop = session.sentence_spans()[best]
            assert first <= 150 < stop
            assert 0.5 < sum(session.shares()) < 1
    assert found["moments"] < 0.2 < 0.8 < found["window"]


def test_fork_shares_and_is_independent(device: torch.device) -> None:
    tokens, other = Tokens.random(200, device), Tokens.random(200, device, seed=9)
    for source in ("q", "k", "v"):
        getattr(other, source)[:, :, :120] = getattr(tokens, source)[:, :, :120]
    parent = new_session(device)
    parent.expect([end for end in sentence_ends(200) if end <= 120])
    run(parent, tokens, 120, exact=True)
    in_use = parent.memory.in_use_bytes
    first, second = parent.fork(), parent.fork()
    assert parent.memory.in_use_bytes == in_use, "forking copies no KV"
    for session, mine in ((first, tokens), (second, other), (parent, tokens)):
        session.expect([end for end in sentence_ends(200) if end > 120])
        run(session, mine, 180, exact=True)
        assert session.num_tokens == 180
    for stop in (190, 200):
        for session, mine in ((second, other), (first, tokens), (parent, tokens)):
            close(run(session, mine, stop, exact=True)[0], mine.dense(0, stop - 10, stop))
    for session in (first, second, parent):
        spans = session.sentence_spans()
        assert [start for start, _ in spans] == [CONFIG.sink_tokens, *[stop for _, stop in spans[:-1]]], (
            "no gap, no overlap"
        )


def test_sliding_layers_keep_their_window_only(device: torch.device) -> None:
    tokens = Tokens.random(200, device)
    session = new_session(device)
    for stop in (70, 71, 150, 151, 152, 200):
        first = session.num_tokens
        exact = stop - first > 1
        for layer, output in enumerate(run(session, tokens, stop, exact=exact, sliding_window=20)):
            close(output, tokens.dense(layer, first, stop, sliding_window=20))
    assert session.device_bytes == 2 * 19 * HEADS * 2 * DIM * 4
    assert session.host_bytes == 0


def test_long_generation_keeps_the_device_flat(device: torch.device) -> None:
    """700 generated tokens: only summaries grow, and no faster than their share of the KV."""
    tokens = Tokens.random(1000, device)
    config = dataclasses.replace(CONFIG, hot_tokens=64)
    session = new_session(device, None, config)
    session.expect(sentence_ends(1000))
    run(session, tokens, 300, exact=True)
    resident = []
    for stop in range(301, 1001):
        run(session, tokens, stop, exact=False)
        resident.append(sum(t.nbytes for t in session._recent.values()) + session._hot[0].kv.nbytes)
    assert max(resident[350:]) <= max(resident[:350])
    assert session.host_bytes >= session.dense_bytes * 0.9
    assert session.device_bytes < session.dense_bytes


def test_batch_packs_sessions(device: torch.device) -> None:
    """One row of 40 reading tokens, one decoding token and 7 more equals each alone."""
    all_tokens = [Tokens.random(120, device, seed=s) for s in range(3)]
    lengths = [40, 1, 7]
    together, alone = [], []
    for sessions in (together, alone):
        for tokens in all_tokens:
            session = new_session(device)
            session.expect(sentence_ends(120))
            run(session, tokens, 80, exact=True)
            sessions.append(session)
    batch = SessionBatch(together, lengths)
    for session, length in zip(together, lengths, strict=True):
        session.begin(length, exact=length > 1)
    rows = [
        torch.cat([getattr(t, name)[0, :, 80 : 80 + n] for t, n in zip(all_tokens, lengths, strict=True)], dim=1)
        for name in ("q", "k", "v")
    ]
    packed = batch.attend(0, *rows, scale=SCALE).split(lengths, dim=1)
    for session, tokens, length, output in zip(alone, all_tokens, lengths, packed, strict=True):
        close(output, run(session, tokens, 80 + length, exact=length > 1)[0])


def test_memory_is_given_back(device: torch.device) -> None:
    session = new_session(device)
    memory = session.memory
    session.expect(sentence_ends(300))
    run(session, Tokens.random(300, device), 300, exact=True)
    assert memory.in_use_bytes == session.host_bytes > 0
    child = session.fork()
    del session
    gc.collect()
    assert memory.in_use_bytes == child.host_bytes > 0
    del child
    gc.collect()
    assert memory.in_use_bytes == 0


def test_bounded_host_memory(device: torch.device) -> None:
    memory = HostMemory(1000, pinned=device.type == "cuda")
    session = Session(CONFIG, policies.load("moments"), memory, device)
    session.expect(sentence_ends(300))
    with pytest.raises(MemoryError, match=r"needs .* MiB of host memory .*host_memory_bytes"):
        run(session, Tokens.random(300, device), 300, exact=True)
    with pytest.raises(MemoryError, match="close documents"):
        memory.check(1 << 60)


def test_a_reply_does_not_double_the_summaries(device: torch.device) -> None:
    """What one more closed sentence adds to the device does not depend on the length of the context."""
    num_tokens = 8000
    session = new_session(device)
    session.expect(sentence_ends(num_tokens + 40))
    session.begin(num_tokens, exact=True)
    session.append_context(0, torch.randn(HEADS, num_tokens, 2, DIM, device=device))
    session.end()
    before, closed = session.device_bytes, session.num_sentences
    session.begin(40, exact=True)
    session.append_context(0, torch.randn(HEADS, 40, 2, DIM, device=device))
    session.end()
    assert session.num_sentences > closed > 1000
    assert session.device_bytes < 1.3 * before
    assert session.num_tokens == num_tokens + 40
