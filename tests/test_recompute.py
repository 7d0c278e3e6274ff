"""Partial prefill: which tokens are computed anew, and that what is computed is what full prefill would compute.

The truth is the same prompt read in full by the engine. Tokens are random; a cached prompt is made of paragraphs, and
the new one has some of them elsewhere.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentencekv import policies
from sentencekv.attention import forward, run_model
from sentencekv.config import Config
from sentencekv.exact import exact_attention_ref
from sentencekv.fused import FusedLayers
from sentencekv.loading import load_model
from sentencekv.memory import HostMemory
from sentencekv.prompts import Prompt
from sentencekv.prose import generate_prose
from sentencekv.reading import read
from sentencekv.reuse import recompute
from sentencekv.reuse.kept import Kept
from sentencekv.reuse.match import Alignment, Match, align
from sentencekv.reuse.recompute import SCORES, Plan, Rebuilt, Recompute, plan, rebuild
from sentencekv.reuse.rows import PackedRows, Rows, take
from sentencekv.rope import Rotation, rotations
from sentencekv.session import Session
from tests.conftest import ARCHITECTURES, SLIDING, VOCABULARY, make_model

CONFIG = Config(budget_tokens=64, sink_tokens=5, window_tokens=12, max_sentence_tokens=8, min_sentence_tokens=2)
WITHOUT_WINDOWS = [
    name for name, changes in ARCHITECTURES.items() if not changes.keys() & SLIDING.keys() - {"sliding_window"}
]
LAYERS = 5


def paragraph(number: int, num_tokens: int = 40) -> list[int]:
    return np.random.default_rng(number).integers(1, VOCABULARY, num_tokens).tolist()


A, B, C, D, X = (paragraph(number) for number in range(5))
DONOR = A + B + C + D
MOVED = A + C + X[:13] + B + D[3:] + X[20:27]
"""A begins both; C, B and most of D move; two pieces are new."""


def prompt_of(ids: Sequence[int]) -> Prompt:
    ends = [*range(6, len(ids), 6), len(ids)]
    return Prompt("", list(ids), np.zeros((len(ids), 2), dtype=np.int64), ends)


def aligned(donor: Sequence[int], ids: Sequence[int]) -> Alignment:
    return align(donor, ids, donor_ends=prompt_of(donor).ends, ends=prompt_of(ids).ends, min_run_tokens=8)


def only(**options: Any) -> Recompute:
    """What a test asks for, and the prompt's end is as any other part of it."""
    return Recompute(**{"after_new": 0, "last_tokens": 0, **options})


class Reader:
    """A model, and prompts read with it in full or with the help of rows."""

    def __init__(self, model: PreTrainedModel, *, fused: bool = False) -> None:
        self.model = model.eval()
        self.layers = FusedLayers(model, force=fused)
        self.memory = HostMemory(None, pinned=model.device.type == "cuda")
        self.rotations: Mapping[int, Rotation] | None = rotations(model)

    def session(self) -> Session:
        return Session(CONFIG, policies.load("codes"), self.memory, self.model.device)

    def full(self, ids: Sequence[int]) -> tuple[Session, Tensor]:
        session = self.session()
        return session, read(self.model, [session], [prompt_of(ids)], chunk_tokens=1000)[0]

    def kept(self, ids: Sequence[int]) -> Kept:
        return Kept(self.full(ids)[0].state(), len(ids), self.memory)

    def rebuild(
        self,
        ids: Sequence[int],
        planned: Plan,
        rows: Rows,
        options: Recompute,
        session: Session | None = None,
        chunk_tokens: int = 1000,
    ) -> tuple[Session, Rebuilt]:
        session = session or self.session()
        prompt = prompt_of(ids)
        turns = self.rotations
        rest = (self.model, self.layers, session, prompt.token_ids, prompt.ends, planned, rows, turns, options)
        return session, rebuild(*rest, chunk_tokens=chunk_tokens)

    def edited(
        self, ids: Sequence[int], donor: Sequence[int] = DONOR, chunk_tokens: int = 1000, **options: Any
    ) -> tuple[Session, Rebuilt]:
        """A prompt as an edit of another."""
        chosen = only(**options)
        planned = plan(aligned(donor, ids), chosen)
        return self.rebuild(ids, planned, self.kept(donor).rows, chosen, chunk_tokens=chunk_tokens)


@pytest.fixture
def reader(device: torch.device) -> Reader:
    return Reader(make_model("llama", num_hidden_layers=LAYERS).to(device))


def kv_of(session: Session) -> list[Tensor]:
    return [session.kv(layer) for layer in sorted(session.state().recent)]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def divergence(ours_V: Tensor, truth_V: Tensor) -> float:
    """KL in nats, from the truth."""
    ours, truth = (logits_V.double().log_softmax(0) for logits_V in (ours_V, truth_V))
    return float((truth.exp() * (truth - ours)).sum())


def counts(rebuilt: Rebuilt) -> list[int]:
    return [len(rebuilt.computed_of_layer[layer]) for layer in sorted(rebuilt.computed_of_layer)]


def computed(rebuilt: Rebuilt) -> list[set[int]]:
    return [set(rebuilt.computed_of_layer[layer].tolist()) for layer in sorted(rebuilt.computed_of_layer)]


def logits_of(rebuilt: Rebuilt) -> Tensor:
    assert rebuilt.logits_V is not None
    return rebuilt.logits_V


class TestEqualsFullPrefill:
    @pytest.mark.parametrize("architecture", WITHOUT_WINDOWS)
    def test_all_computed(self, architecture: str, device: torch.device) -> None:
        """Every token but those of the common prefix: logits, and KV of every layer."""
        reader = Reader(make_model(architecture).to(device))
        truth, want_V = reader.full(MOVED)
        ours, rebuilt = reader.edited(MOVED, first_tokens=len(MOVED))
        assert counts(rebuilt) == [len(MOVED) - len(A)] * 3
        assert difference(logits_of(rebuilt), want_V) < 1e-4
        for our_kv, true_kv in zip(kv_of(ours), kv_of(truth), strict=True):
            assert difference(our_kv, true_kv) < 1e-4
        assert ours.sentence_spans() == truth.sentence_spans()
        assert ours.dense_bytes == truth.dense_bytes
        # The control: without it, it is another prompt's KV.
        _, spliced = reader.edited(MOVED, first_tokens=0)
        assert difference(logits_of(spliced), want_V) > 0.01

    def test_the_first_layer_needs_no_computing(self, reader: Reader) -> None:
        """Its keys and values depend on token and position alone."""
        truth, _ = reader.full(MOVED)
        ours, _ = reader.edited(MOVED, first_tokens=0)
        first, *later = zip(kv_of(ours), kv_of(truth), strict=True)
        assert difference(*first) < 1e-5
        assert min(difference(*pair) for pair in later) > 1e-3

    def test_an_edit_at_the_end(self, reader: Reader) -> None:
        """What both begin with is the donor's bit by bit; what follows is computed as after reading it."""
        ids = A + B + C + X
        donor = reader.kept(DONOR)
        ours, rebuilt = reader.edited(ids, first_tokens=16)
        shared = len(A + B + C)
        truth, want_V = reader.full(ids)
        for layer, our_kv in enumerate(kv_of(ours)):
            assert torch.equal(our_kv[:, :shared].cpu(), take(donor.rows, layer, np.arange(shared)))
        assert difference(logits_of(rebuilt), want_V) < 1e-4
        assert all(difference(*pair) < 1e-4 for pair in zip(kv_of(ours), kv_of(truth), strict=True))
        assert computed(rebuilt) == [set(range(shared, len(ids)))] * LAYERS

    def test_an_identical_prompt(self, reader: Reader) -> None:
        """All rows bit by bit; but the last token is computed, for the logits."""
        donor = reader.kept(DONOR)
        ours, rebuilt = reader.edited(DONOR)
        _, want_V = reader.full(DONOR)
        assert computed(rebuilt) == [{len(DONOR) - 1}] * LAYERS
        for layer, our_kv in enumerate(kv_of(ours)):
            assert torch.equal(our_kv[:, :-1].cpu(), take(donor.rows, layer, np.arange(len(DONOR) - 1)))
        assert divergence(logits_of(rebuilt), want_V) < 1e-9
        assert rebuilt.error is not None
        assert float(rebuilt.error) < 1e-5

    def test_after_what_a_session_shares(self, reader: Reader) -> None:
        """Going on from a session of the beginning, in place of moving its rows, gives the same."""
        kept = reader.kept(DONOR)
        options = only(first_tokens=7)
        planned = plan(aligned(DONOR, MOVED), options)
        moved, want = reader.rebuild(MOVED, planned, kept.rows, options)
        reach = kept.reach(len(A), CONFIG.window_tokens)
        assert reach > 20
        state = kept.upto(reach, reader.model.device)
        session = Session.from_state(CONFIG, policies.load("codes"), reader.memory, reader.model.device, state)
        shared, rebuilt = reader.rebuild(MOVED, planned, kept.rows, options, session)
        assert shared is session
        assert difference(logits_of(rebuilt), logits_of(want)) < 1e-5
        assert computed(rebuilt) == computed(want)
        assert all(difference(*pair) < 1e-5 for pair in zip(kv_of(shared), kv_of(moved), strict=True))


class TestSession:
    """What is rebuilt is a session like any other."""

    def test_summaries_are_of_the_rows_that_are_there(self, reader: Reader) -> None:
        """Not of the donor's: where rows changed, so did they."""
        ours, _ = reader.edited(MOVED, first_tokens=4)
        spans = ours.sentence_spans()
        assert len(spans) > 10
        offsets = torch.tensor([0, *np.cumsum([stop - start for start, stop in spans])], device=ours.device)
        state = ours.state()
        for layer, kv_NTH in enumerate(kv_of(ours)):
            closed = kv_NTH[:, spans[0][0] : spans[-1][1]]
            tables = [torch.cat(rows) for rows in zip(*(e.summaries(layer) for e in state.extents), strict=True)]
            for table, want in zip(
                tables, ours.policy.summarize(closed[:, :, 0].transpose(0, 1), offsets), strict=True
            ):
                assert torch.equal(table, want.to(table.dtype))
            total = torch.stack([extent.value_sum(layer) for extent in state.extents]).sum(0)
            torch.testing.assert_close(total, closed[:, :, 1].sum(1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chunk_tokens", [1000, 30])
    def test_it_knows_at_once_what_it_holds(self, reader: Reader, chunk_tokens: int) -> None:
        """Also where rows are put in their place after the logits are known."""
        truth, _ = reader.full(MOVED)
        for ask in (
            lambda session: session.host_bytes,
            lambda session: session.summary_bytes > 0,
            lambda session: session.sentence_spans(),
            lambda session: session.num_sentences,
            lambda session: session.dense_bytes,
            lambda session: session.fork().kv(1).shape,
            lambda session: session.can_move,
            lambda session: session.unloaded_bytes,
        ):
            ours, _ = reader.edited(MOVED, chunk_tokens=chunk_tokens)
            assert ask(ours) == ask(truth)


class TestPlan:
    def test_what_is_computed(self) -> None:
        """Tokens without a match, the first of each run after the prefix, the last of all."""
        matches = (
            Match(0, 0, 5, "prefix"),
            Match(20, 5, 4, "exact"),
            Match(9, 11, 3, "exact"),
            Match(30, 15, 5, "fuzzy"),
        )
        planned = plan(Alignment(40, 20, matches), only(first_tokens=2))
        assert np.flatnonzero(planned.computed_T).tolist() == [5, 6, 9, 10, 11, 12, 14, 19]
        assert np.flatnonzero(planned.optional_T).tolist() == [7, 8, 13]
        assert np.flatnonzero(planned.fuzzy_T).tolist() == [15, 16, 17, 18]
        assert planned.source_T.tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 23, -1, -1, 9, 10, 11, -1, 30, 31, 32, 33, 34]
        starts = {ratio: np.flatnonzero(planned.starts_T(only(ratio=ratio))).tolist() for ratio in (0.0, 0.1)}
        assert starts[0.0] == [5, 6, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19]
        assert starts[0.1] == list(range(5, 20))

    @pytest.mark.parametrize("first_tokens", [0, 3, 1000])
    def test_first_tokens(self, first_tokens: int) -> None:
        """Of runs shorter than that, all; of the beginning that both share, none; the last token anyhow."""
        planned = plan(aligned(DONOR, MOVED), only(first_tokens=first_tokens))
        for start, stop in ((40, 80), (93, 133), (133, 170)):
            count = min(first_tokens, stop - start)
            assert planned.computed_T[start : start + count].all()
            assert not planned.computed_T[start + count : stop].any()
        assert not planned.computed_T[:40].any()
        assert planned.computed_T[80:93].all()
        assert planned.computed_T[170:].all()
        assert plan(aligned(DONOR, DONOR), only(first_tokens=first_tokens)).computed_T.sum() == 1

    def test_after_new_tokens(self) -> None:
        """What follows new tokens takes them in; what follows another run has nothing new before it."""
        planned = plan(aligned(DONOR, MOVED), only(first_tokens=2, after_new=9))
        for start, stop, count in ((40, 80, 2), (93, 133, 9), (133, 170, 2)):
            assert planned.computed_T[start : start + count].all()
            assert not planned.computed_T[start + count : stop].any()
        fewer = plan(aligned(DONOR, MOVED), only(first_tokens=12, after_new=9))
        assert fewer.computed_T[93 : 93 + 12].all()

    @pytest.mark.parametrize("last_tokens", [0, 1, 25, 100, 1000])
    def test_last_tokens(self, last_tokens: int) -> None:
        """Whatever the donor has of them, but for the beginning that both share: its KV is exact."""
        without = plan(aligned(DONOR, MOVED), only(first_tokens=3)).computed_T
        planned = plan(aligned(DONOR, MOVED), only(first_tokens=3, last_tokens=last_tokens))
        stop = max(len(MOVED) - last_tokens, 40)
        assert planned.computed_T[stop:].all()
        assert (planned.computed_T[:stop] == without[:stop]).all()
        assert not (planned.computed_T & planned.optional_T).any()
        matches = (Match(0, 0, 5, "prefix"), Match(30, 15, 5, "fuzzy"))
        fuzzy = plan(Alignment(40, 20, matches), only(last_tokens=2))
        assert np.flatnonzero(fuzzy.fuzzy_T).tolist() == [15, 16, 17]

    def test_random_is_as_many_and_a_seed_says_which(self) -> None:
        alignment = aligned(DONOR, MOVED)
        plans = [plan(alignment, only(first_tokens=4, score="random", ratio=0.3, seed=seed)) for seed in (0, 0, 1)]
        must = plan(alignment, only(first_tokens=4))
        num_chosen = [(each.computed_T & ~must.computed_T).sum() for each in plans]
        assert num_chosen == [round(0.3 * must.optional_T.sum())] * 3
        assert (plans[0].computed_T == plans[1].computed_T).all()
        assert (plans[0].computed_T != plans[2].computed_T).any()
        assert not (plans[0].computed_T & must.computed_T & must.optional_T).any()

    @pytest.mark.parametrize(
        "options",
        [
            {"first_tokens": 5},
            {"first_tokens": 5, "ratio": 0.4},
            {"first_tokens": 0, "ratio": 0.4, "check_layer": 2},
            {"first_tokens": 0, "ratio": 0.8, "retention": 0.2},
            {"first_tokens": 5, "ratio": 0.3, "score": "random"},
            {"first_tokens": 0, "last_tokens": 90},
        ],
        ids=str,
    )
    def test_cost_is_what_is_computed(self, options: dict[str, Any], reader: Reader) -> None:
        """In tokens at every layer; a shrinking set is estimated by a curve, to an eighth."""
        chosen = only(**options)
        cost = plan(aligned(DONOR, MOVED), chosen).cost(chosen, LAYERS)
        _, rebuilt = reader.edited(MOVED, **options)
        mean = sum(counts(rebuilt)) / LAYERS
        assert cost == pytest.approx(mean, rel=0.125 if chosen.retention < 1 else 0.01)


class TestChoice:
    """Of reused tokens, by what is computed of them at an early layer."""

    NUM_MUST, NUM_OPTIONAL = 13 + 7 + 3 * 4, 40 + 40 + 37 - 3 * 4

    @pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
    @pytest.mark.parametrize(("ratio", "check_layer"), [(0.25, 1), (0.5, 0), (0.1, 3), (1.0, 1)])
    def test_ratio(self, ratio: float, check_layer: int, score: str, reader: Reader) -> None:
        """All up to the layer where it is chosen, and that share from there on."""
        _, rebuilt = reader.edited(MOVED, first_tokens=4, ratio=ratio, check_layer=check_layer, score=score)
        everything, some = self.NUM_MUST + self.NUM_OPTIONAL, self.NUM_MUST + round(ratio * self.NUM_OPTIONAL)
        assert counts(rebuilt) == [everything] * (check_layer + 1) + [some] * (LAYERS - 1 - check_layer)

    def test_random_has_as_many_from_the_start(self, reader: Reader) -> None:
        """A control at equal recompute has to be chosen before anything is measured."""
        _, rebuilt = reader.edited(MOVED, first_tokens=4, ratio=0.25, score="random")
        assert counts(rebuilt) == [self.NUM_MUST + round(0.25 * self.NUM_OPTIONAL)] * LAYERS

    @pytest.mark.parametrize("options", [{"ratio": 0.6}, {"ratio": 0.6, "retention": 0.1}], ids=str)
    def test_sets_are_nested(self, options: dict[str, Any], reader: Reader) -> None:
        """What must be computed is in all of them."""
        chosen = only(first_tokens=4, **options)
        planned = plan(aligned(DONOR, MOVED), chosen)
        _, rebuilt = reader.rebuild(MOVED, planned, reader.kept(DONOR).rows, chosen)
        sets = computed(rebuilt)
        must = set(np.flatnonzero(planned.computed_T).tolist())
        for earlier, later in itertools.pairwise(sets):
            assert must <= later <= earlier
        assert must < sets[-1] < sets[0]
        for layer, position_L in rebuilt.computed_of_layer.items():
            assert position_L.tolist() == sorted(sets[layer])

    @pytest.mark.parametrize("check_layer", [0, 1, 2])
    @pytest.mark.parametrize("retention", [0.5, 0.05])
    def test_retention_decays_exponentially(self, retention: float, check_layer: int, reader: Reader) -> None:
        """From what was chosen, right after the choice, to that share of it at the last layer."""
        options = {"ratio": 0.8, "check_layer": check_layer, "retention": retention}
        _, rebuilt = reader.edited(MOVED, first_tokens=4, **options)
        chosen = round(0.8 * self.NUM_OPTIONAL)
        steps = LAYERS - 2 - check_layer
        want = [round(chosen * retention ** (step / steps)) for step in range(steps + 1)]
        assert want[-1] == round(chosen * retention)
        assert [count - self.NUM_MUST for count in counts(rebuilt)[check_layer + 1 :]] == want

    def test_what_is_dropped_keeps_the_donors_rows(self, reader: Reader) -> None:
        """Turned to where it stands, and no other: those of computed tokens are computed."""
        spliced, _ = reader.edited(MOVED, first_tokens=0)
        ours, rebuilt = reader.edited(MOVED, first_tokens=4, ratio=0.3, retention=0.3)
        for layer, (our_kv, spliced_kv) in enumerate(zip(kv_of(ours), kv_of(spliced), strict=True)):
            position_L = rebuilt.computed_of_layer[layer]
            rest = torch.ones(len(MOVED), dtype=torch.bool, device=our_kv.device)
            rest[position_L] = False
            rest[80:93] = rest[170:] = False  # the donor has none of these
            assert torch.equal(our_kv[:, rest], spliced_kv[:, rest])
            if layer > 0:
                assert not torch.equal(our_kv[:, position_L], spliced_kv[:, position_L])

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("architecture", WITHOUT_WINDOWS)
    def test_computed_tokens_are_those_of_a_slow_twin(
        self, architecture: str, fused: bool, device: torch.device
    ) -> None:
        """Which computes all tokens at every layer, and then puts the donor's rows in place of what was dropped."""
        reader = Reader(make_model(architecture).to(device), fused=fused)
        if fused and not reader.layers.num_fused:
            pytest.skip("none of its layers can be fused")
        spliced, _ = reader.edited(MOVED, first_tokens=0)
        ours, rebuilt = reader.edited(MOVED, first_tokens=3, ratio=0.6, retention=0.4, check_layer=0)
        assert counts(rebuilt)[0] > counts(rebuilt)[1] > counts(rebuilt)[2]
        twin = _SlowTwin(kv_of(spliced), rebuilt)
        want_V = twin.run(reader.model, MOVED)
        assert difference(logits_of(rebuilt), want_V) < 1e-4
        for layer, our_kv in enumerate(kv_of(ours)):
            assert difference(our_kv, twin.kv_of_layer[layer]) < 1e-4


class _SlowTwin:
    """Attention of partial prefill, written down: rows that are not computed are the donor's, in dense attention."""

    def __init__(self, spliced: Sequence[Tensor], rebuilt: Rebuilt) -> None:
        self.kv_of_layer: dict[int, Tensor] = {}
        self._spliced, self._rebuilt = spliced, rebuilt

    def attend(
        self,
        layer: int,
        q_ALH: Tensor,
        k_NLH: Tensor,
        v_NLH: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        **_: Any,
    ) -> Tensor:
        kv_NTH = self._spliced[layer].clone()
        position_L = self._rebuilt.computed_of_layer[layer]
        kv_NTH[:, position_L] = torch.stack([k_NLH, v_NLH], dim=2)[:, position_L]
        self.kv_of_layer[layer] = kv_NTH
        return exact_attention_ref(q_ALH, kv_NTH, scale=scale, softcap=softcap)

    @torch.inference_mode()
    def run(self, model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
        """Logits of the last token."""
        device = model.device
        return run_model(model, torch.tensor(ids, device=device), torch.arange(len(ids), device=device), self, 1)[-1]


class _Recorder:
    """Attention of full prefill, one pass; what each layer was called with stays."""

    def __init__(self, session: Session) -> None:
        self.q_of_layer: dict[int, Tensor] = {}
        self.kv_of_layer: dict[int, Tensor] = {}
        self._session = session

    def attend(self, layer: int, q_ALH: Tensor, k_NLH: Tensor, v_NLH: Tensor, **options: Any) -> Tensor:
        self.q_of_layer[layer] = q_ALH.clone()
        self.kv_of_layer[layer] = torch.stack([k_NLH, v_NLH], dim=2)
        return self._session.attend(layer, q_ALH, k_NLH, v_NLH, **options)


class Measured(NamedTuple):
    """Of a prompt's tokens, at one layer: squares of differences of keys and values to the donor's, relative errors of
    values, and attention that its last 32 tokens pay them."""

    key_T: Tensor
    value_T: Tensor
    error_T: Tensor
    attention_T: Tensor


@torch.inference_mode()
def measured(reader: Reader, layer: int) -> Measured:
    """By full prefill, and a splice: up to layer 1 computed tokens have seen nothing but what is right."""
    session = reader.session()
    session.begin(len(MOVED), exact=True)
    recorder = _Recorder(session)
    device = reader.model.device
    run_model(reader.model, torch.tensor(MOVED, device=device), torch.arange(len(MOVED), device=device), recorder, 1)
    spliced, _ = reader.edited(MOVED, first_tokens=0)
    kv_NTH = recorder.kv_of_layer[layer]
    difference_NTH = kv_NTH - kv_of(spliced)[layer]
    square_T2 = difference_NTH.square().sum((0, 3))
    norm_T = kv_NTH[:, :, 1].square().sum((0, 2))
    q_ATH = recorder.q_of_layer[layer]
    key_ATH = kv_NTH[:, :, 0].repeat_interleave(q_ATH.shape[0] // kv_NTH.shape[0], 0)
    logit_ATT = q_ATH @ key_ATH.transpose(1, 2) * q_ATH.shape[2] ** -0.5
    future_TT = torch.ones(len(MOVED), len(MOVED), device=device, dtype=torch.bool).triu(1)
    weight_ATT = logit_ATT.masked_fill(future_TT, -torch.inf).softmax(-1)
    return Measured(
        square_T2[:, 0], square_T2[:, 1], (square_T2[:, 1] / norm_T).sqrt(), weight_ATT[:, -32:].sum((0, 1))
    )


class TestScores:
    @pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
    def test_the_highest_are_chosen(self, score: str, reader: Reader) -> None:
        """At layer 1, as measured from outside."""
        options = only(first_tokens=4, ratio=0.3, score=score)  # type: ignore[arg-type]
        planned = plan(aligned(DONOR, MOVED), options)
        _, rebuilt = reader.rebuild(MOVED, planned, reader.kept(DONOR).rows, options)
        found = measured(reader, 1)
        score_T = {
            "value_deviation": found.value_T,
            "key_deviation": found.key_T,
            "attention_deviation": found.attention_T * found.value_T.sqrt(),
            "query_attention": found.attention_T,
        }[score].cpu()
        optional = np.flatnonzero(planned.optional_T)
        ranked = optional[np.argsort(-score_T[optional].numpy(), kind="stable")]
        chosen = computed(rebuilt)[-1] - set(np.flatnonzero(planned.computed_T).tolist())
        assert chosen == set(ranked[: round(0.3 * len(optional))].tolist())

    def test_scores_differ(self, reader: Reader) -> None:
        chosen = {
            score: frozenset(computed(reader.edited(MOVED, first_tokens=4, ratio=0.2, score=score)[1])[-1])
            for score in SCORES
        }
        assert len(set(chosen.values())) == len(SCORES)

    def test_target_error(self, reader: Reader) -> None:
        """The mean error of those left is below it, where they are measured; a stricter one leaves fewer."""
        found = measured(reader, 1)
        error_T = found.error_T.cpu()
        planned = plan(aligned(DONOR, MOVED), only(first_tokens=4))
        optional = np.flatnonzero(planned.optional_T)
        must = set(np.flatnonzero(planned.computed_T).tolist())
        # The least by score come first, and what they are off by, as a share of what they are, need not rise.
        ordered = optional[np.argsort(found.value_T.cpu()[optional].numpy())]
        means = error_T[ordered].double().cumsum(0) / torch.arange(1, len(ordered) + 1)
        dips = [float(means[i - 1 : i + 1].mean()) for i in range(1, len(means)) if means[i] < means[i - 1]]
        assert dips
        low, high = float(error_T[optional].min()), float(means[-1])
        targets = sorted([*np.linspace(0.9 * low, 1.01 * high, 12).tolist(), *dips[:4]])
        numbers = []
        for target in targets:
            _, rebuilt = reader.edited(MOVED, first_tokens=4, target_error=target)
            sets = computed(rebuilt)
            assert sets[0] == sets[1] == must | set(optional.tolist())
            assert must <= sets[2] == sets[-1] <= sets[1]
            left = sorted(sets[1] - sets[-1])
            numbers.append(len(left))
            assert not left or float(error_T[left].mean()) < target
        assert numbers == sorted(numbers)
        assert numbers[0] == 0
        assert 0 < numbers[len(numbers) // 2] < numbers[-1] == len(optional)

    def test_attention_recovery(self, reader: Reader) -> None:
        """The fewest tokens that get this share of the attention which the last ones pay all that may be chosen."""
        attention_T = measured(reader, 1).attention_T.cpu().numpy()
        planned = plan(aligned(DONOR, MOVED), only(first_tokens=4))
        optional = np.flatnonzero(planned.optional_T)
        must = set(np.flatnonzero(planned.computed_T).tolist())
        ranked = optional[np.argsort(-attention_T[optional], kind="stable")]
        shares = attention_T[ranked].cumsum() / attention_T[ranked].sum()
        numbers = []
        for share in (0.1, 0.5, 0.9):
            options = {"score": "query_attention", "attention_recovery": share}
            _, rebuilt = reader.edited(MOVED, first_tokens=4, **options)
            numbers.append(int((shares < share).sum()) + 1)
            assert computed(rebuilt)[-1] == must | set(ranked[: numbers[-1]].tolist())
        assert 1 <= numbers[0] < numbers[1] < numbers[2] < len(optional)


class TestError:
    def test_it_is_what_cached_rows_were_off_by(self, reader: Reader) -> None:
        """Where tokens were computed anew, over the layers but the first, whatever chunk they are in."""
        spliced, _ = reader.edited(MOVED, first_tokens=0)
        for chunk_tokens in (1000, 7):
            ours, rebuilt = reader.edited(MOVED, first_tokens=9, chunk_tokens=chunk_tokens)
            again = [at for at in sorted(computed(rebuilt)[0]) if plan_source(at) >= 0]
            cached, anew = (torch.stack(kv_of(each)[1:])[:, :, again] for each in (spliced, ours))
            assert rebuilt.error is not None
            assert float(rebuilt.error) == pytest.approx(difference(cached, anew), rel=1e-3)

    def test_layers_without_reused_tokens_say_nothing(self, reader: Reader) -> None:
        """All were dropped after the layer that chose: what that layer measured stands."""
        _, rebuilt = reader.edited(MOVED, first_tokens=0, target_error=100.0)
        whole, _ = reader.edited(MOVED, first_tokens=1000)
        spliced, _ = reader.edited(MOVED, first_tokens=0)
        again = [at for at in range(40, len(MOVED)) if plan_source(at) >= 0]
        want = difference(kv_of(spliced)[1][:, again], kv_of(whole)[1][:, again])
        assert rebuilt.error is not None
        assert float(rebuilt.error) == pytest.approx(want, rel=1e-3)

    def test_nothing_to_measure(self, reader: Reader) -> None:
        """No token that the donor has is computed anew, though rows of others hold anything."""
        _, rebuilt = reader.edited(A + X, first_tokens=0)
        assert rebuilt.error is None


def plan_source(at: int) -> int:
    return int(aligned(DONOR, MOVED).source_T()[at])


class TestChunks:
    @pytest.mark.parametrize("chunk_tokens", [1, 7, 30])
    def test_chunks_change_nothing(self, chunk_tokens: int, reader: Reader) -> None:
        """Computed tokens see all before them, whatever chunk they are in."""
        whole, want = reader.edited(MOVED, first_tokens=9)
        ours, rebuilt = reader.edited(MOVED, first_tokens=9, chunk_tokens=chunk_tokens)
        assert computed(rebuilt) == computed(want)
        assert difference(logits_of(rebuilt), logits_of(want)) < 1e-4
        assert ours.sentence_spans() == whole.sentence_spans()
        assert all(difference(*pair) < 1e-4 for pair in zip(kv_of(ours), kv_of(whole), strict=True))
        assert rebuilt.error is not None

    def test_chunks_without_anything_to_compute(self, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows alone: nothing runs for them."""
        monkeypatch.setattr(recompute, "_CHUNK_TOKENS", 9)
        ids = A + B + C + X[:5] + D
        whole, want = reader.edited(ids, first_tokens=0)
        runs: list[int] = []
        run = recompute.run_model

        def counted(model: PreTrainedModel, ids_L: Tensor, *given: Any, **more: Any) -> Tensor:
            runs.append(len(ids_L))
            return run(model, ids_L, *given, **more)

        monkeypatch.setattr(recompute, "run_model", counted)
        ours, rebuilt = reader.edited(ids, first_tokens=0)
        assert runs == [5, 1]
        assert computed(rebuilt) == computed(want) == [{*range(120, 125), len(ids) - 1}] * LAYERS
        assert difference(logits_of(rebuilt), logits_of(want)) < 1e-4
        assert all(difference(*pair) < 1e-4 for pair in zip(kv_of(ours), kv_of(whole), strict=True))

    @pytest.mark.parametrize("options", [{"ratio": 0.25}, {"ratio": 0.02}, {"target_error": 100.0}], ids=str)
    def test_choosing_in_each_chunk(self, options: dict[str, Any], reader: Reader) -> None:
        """Also where a chunk has nothing that must be computed, and nothing of it is chosen."""
        _, rebuilt = reader.edited(MOVED, first_tokens=0, chunk_tokens=16, **options)
        sets = computed(rebuilt)
        must = {*range(80, 93), *range(170, len(MOVED))}
        assert sets[0] == sets[1] == set(range(40, len(MOVED)))
        assert must <= sets[2] == sets[-1] < sets[0]
        # Each chunk rounds its share, and computes one token at least.
        assert len(sets[-1]) - len(must) == pytest.approx(options.get("ratio", 0.0) * 117, abs=9)
        assert logits_of(rebuilt).isfinite().all()


class TestPositions:
    @pytest.mark.parametrize("chunk_tokens", [1000, 11])
    def test_nobody_sees_what_comes_later(self, chunk_tokens: int, reader: Reader) -> None:
        """A row that is changed changes computed tokens from its place on, by position, and none before it."""
        options = only(first_tokens=5)
        planned = plan(aligned(DONOR, MOVED), options)
        kept = reader.kept(DONOR)
        rows = {layer: take(kept.rows, layer, np.arange(len(DONOR))) for layer in kept.rows.layers}
        changed = {layer: kv.clone() for layer, kv in rows.items()}
        donor_at, at = 40 + 20, 93 + 20  # of B, which stands after C now: its keys come from before them
        assert planned.source_T[at] == donor_at
        for kv in changed.values():
            kv[:, donor_at] += 3.0
        if reader.model.device.type == "cuda":
            rows, changed = ({layer: kv.pin_memory() for layer, kv in each.items()} for each in (rows, changed))
        results = [
            reader.rebuild(MOVED, planned, PackedRows(each), options, chunk_tokens=chunk_tokens)
            for each in (rows, changed)
        ]
        position_L = results[0][1].computed_of_layer[0]
        before, after = position_L[position_L < at], position_L[position_L > at]
        assert len(before) > 20
        assert len(after) > 10
        for layer, (kv, other_kv) in enumerate(zip(*(kv_of(session) for session, _ in results), strict=True)):
            assert torch.equal(kv[:, before], other_kv[:, before])
            assert not torch.equal(kv[:, at], other_kv[:, at])
            if layer > 0:
                assert ((kv[:, after] - other_kv[:, after]).abs().amax((0, 2, 3)) > 0).all()
        assert difference(logits_of(results[0][1]), logits_of(results[1][1])) > 1e-3

    def test_rows_that_did_not_move_need_no_rotations(self, reader: Reader) -> None:
        """As for a model whose keys nobody can explain."""
        ids = A + B + X
        want, _ = reader.edited(ids)
        reader.rotations = None
        ours, _ = reader.edited(ids)
        for our_kv, wanted_kv in zip(kv_of(ours), kv_of(want), strict=True):
            assert torch.equal(our_kv, wanted_kv)


@pytest.fixture(scope="module")
def divergences() -> Callable[..., float]:
    """Mean KL to full prefill of what follows a prompt of prose, in nats, under options; with the pocket model."""
    model, tokenizer = load_model("pocket", device="cpu", dtype="float32", tokenizer=None)
    pocket = Reader(model)
    donor = tokenizer(generate_prose(500, seed=3)).input_ids[:420]
    paragraphs = [donor[start : start + 70] for start in range(0, 420, 70)]
    mixed = [token for i in (0, 3, 5, 1, 4, 2) for token in paragraphs[i]]
    kept = pocket.kept(donor)

    def following(session: Session) -> Tensor:
        logits_LV = forward(model, [paragraphs[3][:24]], [session], exact=True, all_logits=True)
        return logits_LV.double().log_softmax(-1)

    truth_LV = following(pocket.full(mixed)[0])

    def of(**options: Any) -> float:
        chosen = only(**options)
        session, _ = pocket.rebuild(mixed, plan(aligned(donor, mixed), chosen), kept.rows, chosen)
        return float((truth_LV.exp() * (truth_LV - following(session))).sum(-1).mean())

    return of


class TestQuality:
    """With a trained model and prose: keys must be turned, and what is computed anew must help."""

    def test_turned_keys_are_better_than_keys_as_they_were(self, divergences: Callable[..., float]) -> None:
        """Naive splicing, at equal recompute."""
        for first_tokens in (0, 16):
            turned, naive = (divergences(first_tokens=first_tokens, rotate=rotate) for rotate in (True, False))
            assert turned < 0.1 * naive

    def test_computing_more_is_better(self, divergences: Callable[..., float]) -> None:
        """First tokens of runs; those whose values drifted, which is better than as many at random."""
        spliced, first, everything = (divergences(first_tokens=count) for count in (0, 16, 1000))
        assert everything < 1e-9 < first < 0.7 * spliced
        by_value = divergences(first_tokens=0, ratio=0.3)
        at_random = [divergences(first_tokens=0, ratio=0.3, score="random", seed=seed) for seed in range(3)]
        assert by_value < 0.5 * min(spliced, float(np.mean(at_random)))


def fuzzy(alignment: Alignment) -> Alignment:
    """The same, with all that comes after the prefix taken for similar tokens."""
    matches = tuple(match if match.kind == "prefix" else match._replace(kind="fuzzy") for match in alignment.matches)
    return dataclasses.replace(alignment, matches=matches)


class TestFuzzy:
    def test_similar_tokens_are_computed_at_fewer_and_fewer_layers(self, reader: Reader) -> None:
        options = only(retention=0.1)
        planned = plan(fuzzy(aligned(DONOR, MOVED)), options)
        _, rebuilt = reader.rebuild(MOVED, planned, reader.kept(DONOR).rows, options)
        must, chosen = 13 + 7, 40 + 40 + 37
        want = [must + round(chosen * 0.1 ** (step / 2)) for step in range(3)]
        assert counts(rebuilt) == [must + chosen, must + chosen, *want]

    def test_all_of_them_are_full_prefill(self, reader: Reader) -> None:
        planned = plan(fuzzy(aligned(DONOR, MOVED)), only())
        _, rebuilt = reader.rebuild(MOVED, planned, reader.kept(DONOR).rows, only())
        assert difference(logits_of(rebuilt), reader.full(MOVED)[1]) < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first_tokens": -1}, "first_tokens must be at least 0, got -1"),
        ({"after_new": -2}, "after_new must be at least 0, got -2"),
        ({"last_tokens": -3}, "last_tokens must be at least 0, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"check_layer": -2}, "check_layer must be at least 0, got -2"),
        ({"ratio": 1.5}, "ratio must be from 0 to 1 .* got 1.5"),
        ({"ratio": float("nan")}, "ratio must be"),
        ({"retention": 0.0}, "retention above 0 and at most 1, got 0.0 and 0.0"),
        ({"target_error": 0.0}, "target_error must be positive, got 0.0"),
        ({"score": "best"}, "score must be one of value_deviation, .*random, got 'best'"),
        ({"target_error": 0.1, "score": "query_attention"}, "needs a score that measures an error"),
        ({"target_error": 0.1, "score": "random"}, "needs a score that measures an error"),
        (
            {"attention_recovery": 1.0, "score": "query_attention"},
            "attention_recovery must be between 0 and 1, got 1.0",
        ),
        ({"attention_recovery": 0.5}, "attention_recovery needs score='query_attention', and no target_error"),
    ],
)
def test_bad_options(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recompute(**given)
