"""The ops of sparse decoding against brute force: odd shapes, empty selections, ties."""

import pytest
import torch
from torch import Tensor

from triton_ops import (
    HotSetState,
    encode_keys,
    gather_kv,
    group_scores,
    resolve_hot_set,
    score_codes,
    score_sentences,
    select_sentences,
    sparse_decode,
    summarize,
)
from triton_ops.score_codes import decode_keys_ref


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def offsets_of(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 32, 7], [1] * 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_summarize(lengths: list[int], heads: int, device: torch.device) -> None:
    key = torch.randn(sum(lengths), heads, 10, device=device) * 3 + 100
    moments = summarize(key, offsets_of(lengths, device))
    for s, part in enumerate(key.double().split(lengths)):
        torch.testing.assert_close(moments.mean[s].double(), part.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.variance[s].double(), part.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.minimum[s].double(), part.amin(0))
        torch.testing.assert_close(moments.maximum[s].double(), part.amax(0))


@pytest.mark.parametrize("planes", [1, 2])
def test_score_sentences(planes: int, device: torch.device) -> None:
    q, table = torch.randn(2, 3, 8, device=device), torch.randn(11, 2, planes, 8, device=device)
    bias = torch.randn(11, device=device)
    for spread, function in (("square", torch.square), ("abs", torch.abs)):
        got = score_sentences(q, table, scale=0.5, spread=spread, bias_S=bias)
        for n in range(2):
            for g in range(3):
                x = 0.5 * q[n, g]
                second = table[:, n, 1] @ function(x) if planes == 2 else 0
                torch.testing.assert_close(got[n, g], table[:, n, 0] @ x + second + bias)


def test_group_scores(device: torch.device) -> None:
    logit = torch.randn(2, 3, 11, device=device) * 4
    share = logit.softmax(-1)
    torch.testing.assert_close(group_scores(logit, group="max"), share.amax(1))
    torch.testing.assert_close(group_scores(logit, group="mean"), share.mean(1))
    loud = logit.clone()
    loud[:, 0] += 100
    torch.testing.assert_close(group_scores(loud, group="max"), share.amax(1), msg="a constant shift changes nothing")


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 20, 9])
def test_codes_decode_to_within_half_a_cell(bits: int, dim: int, device: torch.device) -> None:
    lengths = [5, 1, 32, 7]
    offsets = offsets_of(lengths, device)
    key = torch.randn(45, 2, dim, device=device) * 3 + 50
    moments = summarize(key, offsets)
    box = torch.stack([moments.minimum, moments.maximum], dim=2)
    code = encode_keys(key, box, offsets, bits=bits)
    box_of_token = box.repeat_interleave(torch.tensor(lengths, device=device), dim=0)
    decoded = decode_keys_ref(code, box_of_token, bits=bits)
    half_cell = (box_of_token[:, :, 1] - box_of_token[:, :, 0]) / 2**bits / 2
    assert ((decoded - key).abs() <= half_cell + 1e-4).all()


def test_score_codes_is_logsumexp_over_decoded_keys(device: torch.device) -> None:
    lengths = [5, 1, 32, 7]
    offsets = offsets_of(lengths, device)
    key, q = torch.randn(45, 2, 16, device=device), torch.randn(2, 3, 16, device=device)
    moments = summarize(key, offsets)
    box = torch.stack([moments.minimum, moments.maximum], dim=2)
    code = encode_keys(key, box, offsets, bits=2)
    length = torch.tensor(lengths, device=device)
    decoded = decode_keys_ref(code, box.repeat_interleave(length, dim=0), bits=2)
    got = score_codes(q, box, code, length, scale=0.5, bits=2, longest=32)
    torch.testing.assert_close(score_codes(q, box, code, length, scale=0.5, bits=2, longest=40), got)
    for s, part in enumerate(decoded.split(lengths)):
        expected = torch.logsumexp(0.5 * torch.einsum("ngh,tnh->ngt", q, part), dim=-1)
        torch.testing.assert_close(got[:, :, s], expected, rtol=1e-4, atol=1e-5)


def test_select_takes_the_longest_prefix_that_fits(device: torch.device) -> None:
    score = torch.tensor([[0.1, 0.5, 0.3, 0.05, 0.05]], device=device)
    length = torch.tensor([4, 6, 9, 2, 2], device=device)

    def select(room: int, most: int = 5) -> list[int]:
        return select_sentences(score, length, room_tokens=room, max_selected=most)[0].tolist()

    assert select(5) == [-1, -1, -1, -1, -1], "the best does not fit, and nothing worse takes its place"
    assert select(6) == [1, -1, -1, -1, -1]
    assert select(14) == [1, -1, -1, -1, -1], "2 does not fit, so neither does anything after it"
    assert select(15) == [1, 2, -1, -1, -1]
    assert select(23) == [1, 2, 0, 3, 4], "ties by rising id"
    assert select(23, most=2) == [1, 2]


def test_select_never_passes_the_budget(device: torch.device) -> None:
    length = torch.randint(1, 33, (200,), device=device)
    score = torch.rand(4, 200, device=device).round(decimals=1)
    selected = select_sentences(score, length, room_tokens=300, max_selected=40)
    for head in range(4):
        ids = selected[head][selected[head] >= 0]
        assert ids.unique().numel() == ids.numel()
        assert int(length[ids].sum()) <= 300
        again = select_sentences(score, length, room_tokens=300, max_selected=40)
        assert torch.equal(again, selected)


def test_select_skips_minus_infinity(device: torch.device) -> None:
    score = torch.tensor([[-torch.inf, 1.0, -torch.inf]], device=device)
    ones = torch.ones(3, dtype=torch.int64, device=device)
    assert select_sentences(score, ones, room_tokens=9, max_selected=3)[0].tolist() == [1, -1, -1]


def new_state(heads: int, slots: int, sentences: int, device: torch.device) -> HotSetState:
    def table(width: int) -> Tensor:
        return torch.full((heads, width), -1, dtype=torch.int64, device=device)

    return HotSetState(table(slots), table(slots), table(sentences))


def plain_lru(held: list[int], last_used: list[int], wanted: list[int], step: int) -> tuple[list[int], list[bool]]:
    """The specification in plain Python, for one head: `held[slot]` is a sentence or -1; both lists are updated."""
    hits = {sentence: held.index(sentence) for sentence in wanted if sentence in held}
    free = sorted((last_used[slot], slot) for slot in range(len(held)) if slot not in hits.values())
    slots = []
    for sentence in wanted:
        slot = hits[sentence] if sentence in hits else free.pop(0)[1]
        held[slot], last_used[slot] = sentence, step
        slots.append(slot)
    return slots, [sentence not in hits for sentence in wanted]


def test_resolve_against_a_plain_lru(device: torch.device) -> None:
    heads, slots, sentences = 3, 7, 20
    state = new_state(heads, slots, sentences, device)
    held = [[-1] * slots for _ in range(heads)]
    last_used = [[-1] * slots for _ in range(heads)]
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        selected = torch.full((heads, slots), -1, dtype=torch.int64)
        for head in range(heads):
            count = int(torch.randint(0, slots + 1, (), generator=generator))
            selected[head, :count] = torch.randperm(sentences, generator=generator)[:count]
        slot, miss = resolve_hot_set(selected.to(device), state, step)
        for head in range(heads):
            wanted = [s for s in selected[head].tolist() if s >= 0]
            expected_slots, expected_misses = plain_lru(held[head], last_used[head], wanted, step)
            padding = slots - len(wanted)
            assert slot[head].tolist() == expected_slots + [-1] * padding
            assert miss[head].tolist() == expected_misses + [False] * padding
            assert state.sentence_of_slot[head].tolist() == held[head]
            where = [held[head].index(s) if s in held[head] else -1 for s in range(sentences)]
            assert state.slot_of_sentence[head].tolist() == where


def test_resolve_nothing(device: torch.device) -> None:
    state = new_state(2, 4, 0, device)
    slot, miss = resolve_hot_set(torch.empty((2, 0), dtype=torch.int64, device=device), state, 0)
    assert slot.shape == miss.shape == (2, 0)


def test_gather_copies_whole_sentences_and_touches_no_other_slot(device: torch.device) -> None:
    slabs = {3: torch.randn(2, 100, 2, 8), 9: torch.randn(2, 40, 2, 8)}
    hot = torch.full((2, 4, 6, 2, 8), torch.nan, device=device)
    slab, head, row = torch.tensor([3, 3, 9]), torch.tensor([0, 1, 1]), torch.tensor([0, 94, 39])
    length, slot = torch.tensor([3, 6, 1]), torch.tensor([2, 0, 3])
    assert gather_kv(slabs, slab, head, row, length, slot, hot) == 10
    for i, h, r, n, s in zip(*(t.tolist() for t in (slab, head, row, length, slot)), strict=True):
        assert torch.equal(hot[h, s, :n].cpu(), slabs[i][h, r : r + n])
    untouched = [(0, 0), (0, 1), (0, 3), (1, 1), (1, 2)]
    assert all(hot[h, s].isnan().all() for h, s in untouched)
    none = torch.empty(0, dtype=torch.int64)
    assert gather_kv(slabs, none, none, none, none, none, hot) == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_selected", [0, 1, 5])
def test_sparse_decode_is_one_softmax(num_selected: int, softcap: float | None, device: torch.device) -> None:
    heads, groups, dim, slots, slot_tokens = 2, 3, 8, 6, 4
    q = torch.randn(heads, groups, dim, device=device)
    hot = torch.full((heads, slots, slot_tokens, 2, dim), torch.nan, device=device)
    resident = torch.randn(heads, 3, 2, dim, device=device)
    slot = torch.full((heads, num_selected), -1, dtype=torch.int64, device=device)
    length = torch.ones((heads, num_selected), dtype=torch.int64, device=device)
    for head in range(heads):
        # The second head selects less than the first: rows are padded.
        for k in range(num_selected - head):
            slot[head, k] = (2 * k + head) % slots
            length[head, k] = 1 + (k + head) % slot_tokens
            hot[head, slot[head, k], : length[head, k]] = torch.randn(int(length[head, k]), 2, dim, device=device)
    output, share = sparse_decode(q, hot, slot, length, resident, scale=0.7, softcap=softcap)
    for head in range(heads):
        parts = [hot[head, slot[head, k], : length[head, k]] for k in range(num_selected) if slot[head, k] >= 0]
        kv = torch.cat([*parts, resident[head]]).double()
        logit = 0.7 * (q[head].double() @ kv[:, 0].T)
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        weight = logit.softmax(-1)
        torch.testing.assert_close(output[head].double(), weight @ kv[:, 1], rtol=1e-5, atol=1e-5)
        expected = [part.sum(-1) for part in weight.split([len(p) for p in parts] + [3], dim=-1)[:-1]]
        for k, value in enumerate(expected):
            torch.testing.assert_close(share[head, :, k].double(), value, rtol=1e-5, atol=1e-6)
        assert (share[head, :, len(expected) :] == 0).all()
