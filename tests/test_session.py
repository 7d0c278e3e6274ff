"""A session against brute force over all its tokens: random queries and keys, no model."""

import dataclasses
import gc

import pytest
import torch

from sentencekv import policies, slabs, streaming
from sentencekv import session as session_module
from sentencekv.batch import LaneBatch
from sentencekv.exact import exact_attention_ref
from sentencekv.memory import HostMemory
from sentencekv.policies import Policy
from sentencekv.session import Session
from tests.sequences import (
    CONFIG,
    DIM,
    HEADS,
    SCALE,
    Scripted,
    Tokens,
    close,
    closed_kv,
    new_session,
    random_choice,
    run,
    scripted_step,
    sentence_ends,
    step,
)
from triton_ops import pack_kv, unpack_kv

SELECTING = [name for name in policies.available() if policies.policy_class(name).reads == "selected"]


@pytest.mark.parametrize("assembled", [0, 1000])
@pytest.mark.parametrize("chunk", [1, 3, 11, 64, 300])
def test_reading_is_exact_for_any_chunk(
    chunk: int, assembled: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a layer's KV comes in blocks or is brought together."""
    monkeypatch.setitem(session_module.ASSEMBLED_TOKENS, device.type, assembled)
    monkeypatch.setattr(streaming, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(slabs, "LARGE_SLAB_TOKENS", 64)
    monkeypatch.setattr(slabs, "SMALL_SLAB_TOKENS", 32)
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


def test_sparse_step_is_dense_attention_masked_to_the_selection(device: torch.device) -> None:
    """Heads select differently; the same through hits, misses and eviction; sentences close meanwhile."""
    tokens = Tokens.random(340, device, seed=3)
    config = dataclasses.replace(CONFIG, hot_tokens=CONFIG.budget_tokens)
    session = new_session(device, Scripted(), config)
    session.expect(sentence_ends(340))
    run(session, tokens, 300, exact=True)
    closed = session.num_sentences
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        scripted_step(session, tokens, random_choice(session.num_sentences, (7, 4), generator))
    assert session.num_sentences > closed
    traffic = session.traffic
    assert traffic.steps == 40
    assert traffic.num_selected == 40 * 2 * (7 + 4)
    assert 0 < traffic.num_missed < traffic.num_selected
    assert traffic.num_missed <= traffic.tokens_fetched <= traffic.num_missed * CONFIG.max_sentence_tokens
    assert 0 < traffic.hit_rate < 1


@pytest.mark.parametrize("name", SELECTING)
def test_budget_holds_for_every_head(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens.random(400, device)
    session = new_session(device, policies.load(name))
    session.expect(sentence_ends(400))
    run(session, tokens, 380, exact=True)
    selections = []
    cls = policies.policy_class(name)
    select = Policy.select
    monkeypatch.setattr(cls, "select", lambda *args, **kw: selections.append(select(*args, **kw)) or selections[-1])
    most_selected = session.lane().max_selected
    for stop in range(381, 401):
        run(session, tokens, stop, exact=False)
        recent = stop - session.sentence_spans()[-1][1]
        assert CONFIG.window_tokens <= recent < CONFIG.window_tokens + 2 * CONFIG.max_sentence_tokens
    lengths = session._places.place_S4[:, 0]
    assert len(selections) == 40
    for selected, _ in selections:
        tokens_read = torch.where(selected >= 0, lengths[selected.clamp(min=0).long()], 0).sum(-1)
        assert (tokens_read <= CONFIG.room_tokens).all()
        almost_full = tokens_read > CONFIG.room_tokens - 2 * CONFIG.max_sentence_tokens
        most_are_taken = (selected >= 0).sum(-1) >= most_selected
        assert (almost_full | most_are_taken).all(), "the budget is used"


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
        for layer, output in enumerate(run(session, tokens, stop, exact=exact, sliding={0: 20, 1: 20})):
            close(output, tokens.dense(layer, first, stop, sliding_window=20))
    assert sum(session._local[layer].nbytes for layer in (0, 1)) == 2 * 19 * HEADS * 2 * DIM * 4
    assert session.host_bytes == 0


def test_long_generation_keeps_the_device_flat(device: torch.device) -> None:
    """700 generated tokens: only summaries grow, and no faster than their share of the KV; all of it is on the host."""
    tokens = Tokens.random(1000, device)
    session = new_session(device, None, dataclasses.replace(CONFIG, hot_tokens=64))
    session.expect(sentence_ends(1000))
    run(session, tokens, 300, exact=True)
    batch = LaneBatch(session.policy)
    resident, rows = [], set()
    for _ in range(700):
        step(batch, [session], [tokens])
        lane = session.lane()
        resident.append(lane.num_resident)
        rows.add(lane.resident_kv[0].shape[1])
    assert len(rows) == 1, "a buffer that does not grow"
    limit = CONFIG.sink_tokens + CONFIG.window_tokens + 2 * CONFIG.max_sentence_tokens
    assert max(resident) <= limit <= rows.pop()
    assert session.host_bytes >= session.dense_bytes * 0.9
    assert session.device_bytes < session.dense_bytes
    spans = session.sentence_spans()
    assert [stop for _, stop in spans] == sentence_ends(1000, after=CONFIG.sink_tokens)[: len(spans)]
    assert spans[-1][1] > 1000 - CONFIG.window_tokens - CONFIG.max_sentence_tokens
    for layer in (0, 1):
        assert torch.equal(closed_kv(session, layer), tokens.kv(layer, CONFIG.sink_tokens, spans[-1][1]))


def test_no_ends_are_expected_for_a_while(device: torch.device) -> None:
    """The resident tokens outgrow their buffer; then all their sentences close at once."""
    tokens = Tokens.random(400, device)
    session = new_session(device, Scripted())
    session.expect(sentence_ends(60))
    run(session, tokens, 60, exact=True)
    rows = session.lane().resident_kv[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scripted_step(session, tokens, random_choice(session.num_sentences, (3, 2), generator))
    assert session.lane().resident_kv[0].shape[1] > rows
    closed = session.num_sentences
    session.expect(sentence_ends(400, after=60))
    for _ in range(140):
        scripted_step(session, tokens, random_choice(session.num_sentences, (7, 4), generator))
    assert session.num_sentences > closed + 40
    for layer in (0, 1):
        assert torch.equal(closed_kv(session, layer), tokens.kv(layer, 5, session.sentence_spans()[-1][1]))


@pytest.mark.parametrize("sliding", [{}, {0: 20}])
@pytest.mark.parametrize("name", [*SELECTING, "full"])
def test_questions_and_answers_in_turn(name: str, sliding: dict[int, int], device: torch.device) -> None:
    """Read, answer, read a question, answer, ...: with a budget that covers all, the same as reading everything."""
    tokens = Tokens.random(300, device)
    session = new_session(device, policies.load(name), dataclasses.replace(CONFIG, budget_tokens=300))
    session.expect(sentence_ends(300))
    for question, answer in ((100, 115), (160, 161), (190, 235), (236, 240), (290, 300)):
        for exact in (True, False):
            while session.num_tokens < (question if exact else answer):
                first = session.num_tokens
                stop = question if exact else first + 1
                for layer, output in enumerate(run(session, tokens, stop, exact=exact, sliding=sliding)):
                    close(output, tokens.dense(layer, first, stop, sliding_window=sliding.get(layer)))
    for layer in {0, 1} - set(sliding):
        assert torch.equal(closed_kv(session, layer), tokens.kv(layer, 5, session.sentence_spans()[-1][1]))


def test_a_short_context_is_all_resident(device: torch.device) -> None:
    """Sparse from the third token on: the sink fills up while decoding, then the first sentence closes."""
    tokens = Tokens.random(80, device)
    session = new_session(device, None, dataclasses.replace(CONFIG, budget_tokens=80))
    session.expect(sentence_ends(80))
    run(session, tokens, 2, exact=True)
    for stop in range(3, 81):
        for layer, output in enumerate(run(session, tokens, stop, exact=False)):
            close(output, tokens.dense(layer, stop - 1, stop))
    assert session.num_sentences > 5
    assert session.sentence_spans()[0][0] == CONFIG.sink_tokens


def test_sliding_layers_beside_retrieving_ones(device: torch.device) -> None:
    """Layer 0 slides, layer 1 retrieves, through reading, decoding and reading again."""
    tokens = Tokens.random(260, device)
    session = new_session(device, None, dataclasses.replace(CONFIG, budget_tokens=260))
    session.expect(sentence_ends(260))
    for stop in (7, *range(8, 60), 150, *range(151, 200), 230, *range(231, 261)):
        first = session.num_tokens
        for layer, output in enumerate(run(session, tokens, stop, exact=stop - first > 1, sliding={0: 30})):
            close(output, tokens.dense(layer, first, stop, sliding_window={0: 30}.get(layer)))
    assert session.sliding_layers == {0}
    assert torch.equal(closed_kv(session, 1), tokens.kv(1, 5, session.sentence_spans()[-1][1]))


def test_slots_and_tables_grow_and_keep_what_they_hold(device: torch.device) -> None:
    """From a few sentences to hundreds while decoding: every step is right, and what was in a slot is still a hit."""
    tokens = Tokens.random(700, device)
    config = dataclasses.replace(CONFIG, hot_tokens=512)
    session = new_session(device, Scripted(), config)
    session.expect(sentence_ends(700))
    run(session, tokens, 60, exact=True)
    generator = torch.Generator().manual_seed(0)
    slots, widths = [], []
    while session.num_tokens < 700:
        lane = session.lane()
        count = min(session.num_sentences, lane.max_selected, 8)
        choice = random_choice(session.num_sentences, (count, count // 2), generator)
        scripted_step(session, tokens, choice)
        slots.append(lane.num_slots)
        widths.append(lane.slot_of_sentence[0].shape[1])
        missed = session.traffic.num_missed
        if session.num_tokens < 700 and len(slots) % 5 == 0:
            scripted_step(session, tokens, choice)
            assert session.traffic.num_missed == missed, "the same again is all there, growth or not"
    assert slots[0] < 20 < slots[-1] == config.num_slots
    assert len(set(slots)) < 6, "by doubling"
    assert widths[0] < session.num_sentences <= widths[-1]
    assert len(session.lane().share_S) >= session.num_sentences
    assert 0 < sum(session.shares()) < 1


def test_a_fork_of_a_fork(device: torch.device) -> None:
    """Each adds sentences of its own: one part more for each, and all are right, also after they went on together."""
    length = 120
    all_tokens = [Tokens.random(500, device)]
    sessions = [new_session(device, Scripted())]
    generator = torch.Generator().manual_seed(0)
    for generation in range(3):
        session, tokens = sessions[-1], all_tokens[-1]
        session.expect(sentence_ends(length + 60, after=length if generation else 0))
        run(session, tokens, length + 50, exact=True)
        for _ in range(10):
            scripted_step(session, tokens, random_choice(session.num_sentences, (7, 4), generator))
        length += 60
        child = Tokens.random(500, device, seed=generation + 1)
        for name in ("q", "k", "v"):
            getattr(child, name)[:, :, :length] = getattr(tokens, name)[:, :, :length]
        sessions.append(session.fork())
        all_tokens.append(child)
    for session in sessions:
        session.expect(sentence_ends(session.num_tokens + 80, after=session.last_expected_end))
    for _ in range(60):
        for session, tokens in zip(sessions, all_tokens, strict=True):
            scripted_step(session, tokens, random_choice(session.num_sentences, (7, 4), generator))
    assert [len(session.lane().parts) for session in sessions] == [2, 3, 4, 4]
    for session, tokens in zip(sessions, all_tokens, strict=True):
        for layer in (0, 1):
            assert torch.equal(closed_kv(session, layer), tokens.kv(layer, 5, session.sentence_spans()[-1][1]))


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
    with pytest.raises(MemoryError, match=r"needs .* of host memory .*host_memory_bytes"):
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


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8", "int4"])
def test_closed_kv_in_fewer_bits(kv_dtype: str, device: torch.device) -> None:
    """Rounded once, whether it was closed while reading or while decoding; the rest is as it was."""
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype)
    tokens = Tokens.random(260, device)
    session = new_session(device, policies.load("codes"), config)
    session.expect(sentence_ends(260))
    run(session, tokens, 130, exact=True)
    for stop in range(131, 230):
        run(session, tokens, stop, exact=False)
    read_again = new_session(device, policies.load("codes"), config)
    read_again.expect(sentence_ends(260))
    run(read_again, tokens, 230, exact=True)
    assert read_again.sentence_spans() == session.sentence_spans()
    last = session.sentence_spans()[-1][1]
    for layer in (0, 1):
        kv = tokens.kv(layer, CONFIG.sink_tokens, last)
        rounded = unpack_kv(pack_kv(kv, kv_dtype), DIM, torch.float32, kv_dtype)
        assert not torch.equal(rounded, kv)
        assert torch.equal(closed_kv(session, layer), rounded)
        assert torch.equal(closed_kv(read_again, layer), rounded)
        recent = torch.cat([read_again._sink[layer], read_again._recent[layer]], dim=1)
        parts = [tokens.kv(layer, 0, CONFIG.sink_tokens), tokens.kv(layer, last, 230)]
        assert torch.equal(recent, torch.cat(parts, dim=1))
    # Exact passes see the same, and so do sparse ones: with a budget that covers all, both are attention over it.
    for layer, output in enumerate(run(read_again, tokens, 240, exact=True)):
        kv = tokens.kv(layer, 0, 240)
        kv[:, CONFIG.sink_tokens : last] = closed_kv(session, layer)
        close(output, exact_attention_ref(tokens.q[layer, :, 230:240], kv, scale=SCALE))
    wide = dataclasses.replace(config, budget_tokens=400)
    covering = new_session(device, policies.load("codes"), wide)
    covering.expect(sentence_ends(260))
    run(covering, tokens, 230, exact=True)
    for layer, output in enumerate(run(covering, tokens, 231, exact=False)):
        kv = tokens.kv(layer, 0, 231)
        kv[:, CONFIG.sink_tokens : last] = closed_kv(session, layer)
        close(output, exact_attention_ref(tokens.q[layer, :, 230:231], kv, scale=SCALE))
    assert read_again.host_bytes < 0.8 * reading_bytes(tokens, device)


def reading_bytes(tokens: Tokens, device: torch.device) -> int:
    session = new_session(device, policies.load("codes"), CONFIG)
    session.expect(sentence_ends(260))
    run(session, tokens, 230, exact=True)
    return session.host_bytes
