"""What is kept of a session's beginning: another one goes on from any part of it as if it had read that itself."""

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv import policies
from sentencekv.memory import HostMemory
from sentencekv.reuse.kept import Kept, StateRows
from sentencekv.reuse.rows import Mover, gather, take
from sentencekv.session import Session
from tests.sequences import CONFIG, CPU, Tokens, close, closed_kv, new_session, run, sentence_ends

PROMPT = 150
ALL = 230
WINDOW = CONFIG.window_tokens


def with_prompt(tokens: Tokens, other: Tokens, num_tokens: int) -> Tokens:
    """The one's first tokens, and the other's after them."""
    pairs = ((tokens.q, other.q), (tokens.k, other.k), (tokens.v, other.v))
    return Tokens(*(torch.cat([a[:, :, :num_tokens], b[:, :, num_tokens:]], dim=2) for a, b in pairs))


def read(session: Session, tokens: Tokens, stops: Sequence[int], ends: Sequence[int]) -> Session:
    """In passes up to these tokens, each of which closes what it closes in an extent of its own."""
    session.expect([end for end in ends if end > session.last_expected_end])
    for stop in stops:
        run(session, tokens, stop, exact=True)
        session.state()
    return session


def go_on(kept: Kept, num_tokens: int, like: Session) -> Session:
    """A session that has some of the kept tokens."""
    state = kept.upto(num_tokens, like.device)
    return Session.from_state(like.config, like.policy, like.memory, like.device, state)


def tables(session: Session, layer: int) -> list[Tensor]:
    """Summaries of all closed sentences, whatever the extents that they are in."""
    extents = [extent for extent in session.state().extents if extent.num_sentences]
    return [torch.cat(rows) for rows in zip(*(extent.summaries(layer) for extent in extents), strict=True)]


def value_sum(session: Session, layer: int) -> Tensor:
    return torch.stack([e.value_sum(layer) for e in session.state().extents if e.num_sentences]).sum(0)


def assert_equal(ours: Session, theirs: Session) -> None:
    """Closed sentences, their rows and summaries, and all else that attention sees."""
    assert ours.num_tokens == theirs.num_tokens
    assert ours.sentence_spans() == theirs.sentence_spans()
    assert ours.num_sentences > 3
    for layer in (0, 1):
        assert torch.equal(ours.kv(layer), theirs.kv(layer))
        assert torch.equal(closed_kv(ours, layer), closed_kv(theirs, layer))
        for our_table, their_table in zip(tables(ours, layer), tables(theirs, layer), strict=True):
            assert torch.equal(our_table, their_table)
        torch.testing.assert_close(value_sum(ours, layer), value_sum(theirs, layer), rtol=1e-5, atol=1e-4)
    assert ours.dense_bytes == theirs.dense_bytes


def decode_both(ours: Session, theirs: Session, tokens: Tokens, num_steps: int) -> None:
    """Sparse steps, in which sentences close, give the same."""
    for _ in range(num_steps):
        stop = ours.num_tokens + 1
        for session in (ours, theirs):
            session.expect([end for end in sentence_ends(stop) if end > session.last_expected_end])
        outputs = (run(session, tokens, stop, exact=False) for session in (ours, theirs))
        for our_output, their_output in zip(*outputs, strict=True):
            close(our_output, their_output)


@pytest.mark.parametrize("policy", policies.available())
def test_going_on_is_reading_from_the_start(policy: str, device: torch.device) -> None:
    """From a prompt that was read in parts and then continued; the new text shares some of it, any number of tokens."""
    tokens, others = Tokens.random(ALL, device), Tokens.random(ALL, device, seed=1)
    donor = new_session(device, policies.load(policy))
    read(donor, tokens, [40, 90, PROMPT], sentence_ends(PROMPT))
    donor.expect(sentence_ends(ALL, PROMPT))
    while donor.num_tokens < PROMPT + 16:
        run(donor, tokens, donor.num_tokens + 1, exact=False)
    kept = Kept(donor.state(), PROMPT, donor.memory)
    run(donor, tokens, ALL, exact=True)  # what the donor does now is its own affair
    del donor
    gc.collect()
    reached = set()
    for shared in (47, 101, PROMPT):
        text = with_prompt(tokens, others, shared)
        theirs = read(new_session(device, policies.load(policy)), text, [70, 190], sentence_ends(190))
        reach = kept.reach(shared, WINDOW)
        assert shared - WINDOW - CONFIG.max_sentence_tokens < reach <= shared - WINDOW
        assert reach in sentence_ends(PROMPT)
        reached.add(reach)
        ours = read(go_on(kept, reach, theirs), text, [190], sentence_ends(190))
        assert_equal(ours, theirs)
        decode_both(ours, theirs, text, 5)
    assert len(reached) == 3


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_part_of_any_reading(data: st.DataObject) -> None:
    """However the donor was read, and whatever came after the prompt."""
    tokens, others = Tokens.random(ALL, CPU), Tokens.random(ALL, CPU, seed=1)
    prompt = data.draw(st.integers(30, 200))
    passes = sorted(data.draw(st.sets(st.integers(1, prompt - 1), max_size=4)))
    donor = read(new_session(CPU), tokens, [*passes, prompt], sentence_ends(prompt))
    if data.draw(st.booleans()):
        run(donor, tokens, ALL, exact=True)
    kept = Kept(donor.state(), prompt, donor.memory)
    shared = data.draw(st.integers(0, prompt))
    text = with_prompt(tokens, others, shared)
    theirs = read(new_session(CPU), text, [220], sentence_ends(220))
    reach = kept.reach(shared, WINDOW)
    assert reach == max(
        (end for end in sentence_ends(prompt) if CONFIG.sink_tokens < end <= shared - WINDOW), default=0
    )
    if reach:
        assert_equal(read(go_on(kept, reach, theirs), text, [220], sentence_ends(220)), theirs)


def test_rows_are_those_of_the_prompt(device: torch.device) -> None:
    """Token by token and bit by bit: sink, closed sentences of several extents, recent ones; nothing after them."""
    tokens = Tokens.random(ALL, device)
    donor = read(new_session(device), tokens, [50, PROMPT], sentence_ends(PROMPT))
    donor.expect(sentence_ends(ALL, PROMPT))
    run(donor, tokens, ALL, exact=True)
    kept = Kept(donor.state(), PROMPT, donor.memory)
    assert kept.rows.layers == [0, 1]
    assert len(kept.rows.table(0)) == kept.num_tokens == PROMPT
    for layer in (0, 1):
        want = tokens.kv(layer, 0, PROMPT)
        everything = np.arange(PROMPT)
        assert torch.equal(take(kept.rows, layer, everything), want.cpu())
        assert torch.equal(gather(kept.rows, layer, everything, device), want)
        some = np.array([149, 0, 4, 5, 77, -1, 60])
        into = torch.full((*want.shape[:1], len(some), *want.shape[2:]), torch.nan, device=device)
        Mover(kept.rows, some, 3, None, device).into(layer, into)
        assert torch.equal(into[:, some >= 0], want[:, some[some >= 0]])
        assert into[:, 5].isnan().all()


def test_what_came_after_the_prompt_is_not_kept(device: torch.device) -> None:
    """However long the answer was: no bytes for it, but for the sentence that goes on from the prompt."""
    tokens = Tokens.random(ALL, device)
    donor = read(new_session(device), tokens, [50, PROMPT], sentence_ends(PROMPT))
    alone = Kept(donor.state(), PROMPT, donor.memory)
    donor.expect(sentence_ends(ALL, PROMPT))
    run(donor, tokens, ALL, exact=True)
    kept = Kept(donor.state(), PROMPT, donor.memory)
    sentences = [sum(len(extent.place_of) for extent in each.extents) for each in (alone, kept)]
    recent = alone.state.recent[0].shape[1]
    assert sentences[0] < sentences[1] <= sentences[0] + -(-recent // 2)
    assert kept.state.recent[0].shape[1] == 0
    last = max(int(extent.place_of[:, :2].sum(1).max()) for extent in kept.extents)
    assert PROMPT <= last < PROMPT + CONFIG.max_sentence_tokens
    assert kept.copied_bytes < 1.3 * alone.copied_bytes
    for layer in (0, 1):
        for extent in kept.extents:
            start, stop = int(extent.place_of[0, 0]), int(extent.place_of[-1, :2].sum())
            want = tokens.kv(layer, start, stop)[:, :, 1].float().sum(1).cpu()
            torch.testing.assert_close(extent.value_sum_of_layer[layer].float(), want, rtol=1e-4, atol=1e-3)


def test_rows_of_a_live_session(device: torch.device) -> None:
    """As an edit is packed from them: what is on the device is there still."""
    tokens = Tokens.random(ALL, device)
    session = read(new_session(device), tokens, [PROMPT], sentence_ends(PROMPT))
    run(session, tokens, PROMPT + 9, exact=True)
    state = session.state()
    for extent in state.extents:
        extent.flush()
    rows = StateRows(state, state.extents, PROMPT)
    for layer in (0, 1):
        assert torch.equal(take(rows, layer, np.arange(PROMPT)), tokens.kv(layer, 0, PROMPT).cpu())


@pytest.mark.parametrize("num_tokens", [3, 5, 6, 16])
def test_a_prompt_without_closed_sentences(num_tokens: int, device: torch.device) -> None:
    """Shorter than the sink, than sink and window: nothing to share, and all its rows are there."""
    tokens = Tokens.random(ALL, device)
    donor = read(new_session(device), tokens, [num_tokens], sentence_ends(num_tokens))
    kept = Kept(donor.state(), num_tokens, donor.memory)
    assert kept.reach(num_tokens, WINDOW) == 0
    assert kept.slabs == []
    for layer in (0, 1):
        assert torch.equal(take(kept.rows, layer, np.arange(num_tokens)), tokens.kv(layer, 0, num_tokens).cpu())


def test_host_memory_is_counted(device: torch.device) -> None:
    """Slabs are shared, not copied; all is given back when the last who has it goes."""
    memory = HostMemory(None, pinned=device.type == "cuda")
    tokens = Tokens.random(ALL, device)
    donor = Session(CONFIG, policies.load("codes"), memory, device)
    read(donor, tokens, [50, PROMPT], sentence_ends(PROMPT))
    held = memory.in_use_bytes
    assert held == donor.host_bytes
    state = donor.state()
    kept = Kept(state, PROMPT, memory)
    assert memory.in_use_bytes == held + memory.taken_bytes(kept.copied_bytes)
    assert [slab.rows(0).data_ptr() for slab in kept.slabs] == [
        s.rows(0).data_ptr() for e in state.extents for s in e.slabs
    ]
    ours = go_on(kept, kept.reach(100, WINDOW), donor)
    assert memory.in_use_bytes == held + memory.taken_bytes(kept.copied_bytes)
    del donor, state, kept
    gc.collect()
    run(ours, tokens, 130, exact=True)
    for layer in (0, 1):
        assert torch.equal(ours.kv(layer), tokens.kv(layer, 0, 130))
    del ours
    gc.collect()
    assert memory.in_use_bytes == 0


def test_kept_is_not_changed_by_those_who_go_on(device: torch.device) -> None:
    tokens, others = Tokens.random(ALL, device), Tokens.random(ALL, device, seed=1)
    donor = read(new_session(device), tokens, [PROMPT], sentence_ends(PROMPT))
    kept = Kept(donor.state(), PROMPT, donor.memory)
    reach = kept.reach(PROMPT, WINDOW)
    for text in (others, tokens, others):
        mixed = with_prompt(tokens, text, reach)
        ours = read(go_on(kept, reach, donor), mixed, [ALL], sentence_ends(ALL))
        assert_equal(ours, read(new_session(device), mixed, [ALL], sentence_ends(ALL)))
        assert torch.equal(take(kept.rows, 1, np.arange(PROMPT)), tokens.kv(1, 0, PROMPT).cpu())


def test_sliding_layers_are_not_kept(device: torch.device) -> None:
    tokens = Tokens.random(ALL, device)
    donor = new_session(device)
    run(donor, tokens, 60, exact=True, sliding={1: 8})
    with pytest.raises(AssertionError, match="sliding-window"):
        Kept(donor.state(), 60, donor.memory)
