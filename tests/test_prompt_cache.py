"""Reading with a cache of prompts: what is taken from whom, that it is what reading gives, and who never sees it."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv import UnsupportedModelError, policies
from sentencekv.config import Config
from sentencekv.fused import FusedLayers
from sentencekv.memory import HostMemory
from sentencekv.prompts import Prompt
from sentencekv.reading import read
from sentencekv.reuse.catalog import CatalogError
from sentencekv.reuse.decide import ReuseOptions, make_reuse_options
from sentencekv.reuse.edit import MAX_DEPTH, CachedPrompt
from sentencekv.reuse.prompt_cache import PromptCache, Reading
from sentencekv.reuse.report import Reuse
from sentencekv.session import Session
from tests.conftest import VOCABULARY, make_model

SMALL: dict[str, Any] = {
    "budget_tokens": 64,
    "sink_tokens": 5,
    "window_tokens": 12,
    "max_sentence_tokens": 8,
    "min_sentence_tokens": 2,
}
LAYERS = 3


def paragraph(number: int, num_tokens: int = 100) -> list[int]:
    return np.random.default_rng(number).integers(1, VOCABULARY, num_tokens).tolist()


A, B, C, D, E, X, Y, Z = (paragraph(number) for number in range(8))
DONOR = A + B + C + D
MOVED = A + C + X[:30] + B + D


def prompt_of(ids: Sequence[int]) -> Prompt:
    ends = [*range(6, len(ids), 6), len(ids)]
    return Prompt("", list(ids), np.zeros((len(ids), 2), dtype=np.int64), ends)


def divergence(ours_V: Tensor, truth_V: Tensor) -> float:
    """KL in nats, from the truth."""
    ours, truth = (logits_V.double().log_softmax(0) for logits_V in (ours_V, truth_V))
    return float((truth.exp() * (truth - ours)).sum())


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def kv_of(session: Session) -> list[Tensor]:
    return [session.kv(layer) for layer in range(LAYERS)]


def without_times(reuse: Reuse) -> Reuse:
    """And without the donor's key, which is random."""
    donor = None if reuse.donor is None else 0
    return dataclasses.replace(reuse, donor=donor, seconds_to_find=0.0, seconds_to_read=0.0, seconds_saved=None)


class Reader:
    """A model with a cache of prompts."""

    def __init__(
        self, device: torch.device, options: dict[str, Any] | None = None, architecture: str = "llama", **settings: Any
    ) -> None:
        # Prompts here are hardly longer than the end that is computed by default.
        few = {"first_tokens": 16, "after_new": 0, "last_tokens": 0, **(options or {})}
        self.config = Config(**{**SMALL, "reuse": "similar", "reuse_options": few, **settings})
        self.model = make_model(architecture).to(device)
        self.policy = policies.load("codes")
        self.memory = HostMemory(self.config.host_memory_bytes, pinned=device.type == "cuda")
        self.cache = self.opened()

    def session(self) -> Session:
        return Session(self.config, self.policy, self.memory, self.model.device)

    def opened(self, owner: str = "ours") -> PromptCache:
        layers = FusedLayers(self.model)
        given = (self.model, layers, self.config, self.memory, self.session)
        return PromptCache(*given, owner=owner, chunk_tokens=128)

    def reopen(self) -> None:
        self.cache.close()
        self.cache = self.opened()

    def full(self, ids: Sequence[int]) -> tuple[Session, Tensor]:
        session = self.session()
        return session, read(self.model, [session], [prompt_of(ids)], chunk_tokens=128)[0]

    def read(self, ids: Sequence[int], namespace: str = "a", seconds: float = 1.0) -> tuple[Reading, Reuse]:
        reading = self.cache.read(prompt_of(ids), namespace)
        return reading, reading.finish(seconds)

    def counts(self, namespace: str = "a") -> tuple[int, int]:
        """Entries, and those of them that are approximate."""
        statistics = self.cache.catalog.statistics(namespace)
        return statistics.entries, statistics.approximate_entries


@pytest.fixture
def reader(device: torch.device) -> Reader:
    return Reader(device)


def assert_adds_up(reuse: Reuse, ids: Sequence[int]) -> None:
    matched = reuse.prefix_tokens + reuse.kept_tokens + reuse.moved_tokens + reuse.fuzzy_tokens
    assert matched + reuse.new_tokens == reuse.prompt_tokens == len(ids)
    assert reuse.computed_tokens + reuse.reused_tokens == len(ids)
    assert len(reuse.computed_by_layer) == LAYERS
    assert reuse.computed_by_layer[0] == reuse.computed_tokens
    assert (reuse.kind == "none") == (reuse.donor is None)
    assert reuse.approximate <= (reuse.kind in ("same", "similar"))


class TestKinds:
    def test_nothing(self, reader: Reader) -> None:
        reading, reuse = reader.read(DONOR)
        assert without_times(reuse) == Reuse(
            kind="none",
            approximate=False,
            reason="nothing like it is cached",
            donor=None,
            prompt_tokens=400,
            prefix_tokens=0,
            kept_tokens=0,
            moved_tokens=0,
            fuzzy_tokens=0,
            recomputed_tokens=0,
            new_tokens=400,
            computed_by_layer=(400,) * LAYERS,
            seconds_to_find=0.0,
            seconds_to_read=0.0,
            seconds_saved=None,
            estimated_error=0.0,
        )
        _, want_V = reader.full(DONOR)
        assert torch.equal(reading.logits_V, want_V)
        assert reader.counts() == (1, 0)

    def test_the_same(self, reader: Reader) -> None:
        """KL is 0, and KV is the same bit by bit."""
        first, _ = reader.read(DONOR)
        reading, reuse = reader.read(DONOR)
        assert (reuse.kind, reuse.approximate, reuse.reason) == ("same", False, "")
        assert (reuse.prefix_tokens, reuse.computed_tokens, reuse.reused_tokens) == (400, 0, 400)
        assert reuse.estimated_error == 0
        assert_adds_up(reuse, DONOR)
        assert torch.equal(reading.logits_V, first.logits_V)
        assert divergence(reading.logits_V, first.logits_V) == 0
        for ours, theirs in zip(kv_of(reading.session), kv_of(first.session), strict=True):
            assert torch.equal(ours, theirs)
        assert reading.session.sentence_spans() == first.session.sentence_spans()
        assert reader.counts() == (1, 0)

    @pytest.mark.parametrize("shared", [64, 150, 300, 399])
    def test_a_beginning(self, shared: int, reader: Reader) -> None:
        """Its rows are the donor's, bit by bit; all after it is what reading gives."""
        ids = DONOR[:shared] + X[: (400 - shared) // 3]
        first, _ = reader.read(DONOR)
        reading, reuse = reader.read(ids)
        assert (reuse.kind, reuse.approximate) == ("prefix", False)
        assert (reuse.prefix_tokens, reuse.new_tokens) == (shared, len(ids) - shared)
        assert reuse.computed_tokens == max(len(ids) - shared, 1)
        assert reuse.estimated_error == 0
        assert_adds_up(reuse, ids)
        session, want_V = reader.full(ids)
        assert difference(reading.logits_V, want_V) < 1e-4
        again = shared - (shared == len(ids))
        for ours, theirs, truth in zip(kv_of(reading.session), kv_of(first.session), kv_of(session), strict=True):
            assert torch.equal(ours[:, :again], theirs[:, :again])
            assert difference(ours, truth) < 1e-4
        assert reading.session.sentence_spans() == session.sentence_spans()
        assert reader.counts() == (2, 0)

    def test_moved_runs(self, reader: Reader) -> None:
        """Counted as they are; the sum is the prompt."""
        reader.read(DONOR)
        reading, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.approximate, reuse.reason) == ("similar", True, "")
        assert (reuse.prefix_tokens, reuse.kept_tokens, reuse.moved_tokens) == (100, 0, 300)
        assert (reuse.new_tokens, reuse.recomputed_tokens) == (30, 3 * 16 + 1)
        assert reuse.computed_by_layer == (79,) * LAYERS
        assert_adds_up(reuse, MOVED)
        assert reuse.estimated_error is not None
        assert 0 < reuse.estimated_error < 2
        assert reading.logits_V.isfinite().all()
        assert reader.counts() == (2, 1)

    def test_tokens_that_stay_where_they_are(self, reader: Reader) -> None:
        """Behind a replaced one of the same length."""
        reader.read(DONOR)
        _, reuse = reader.read(A + X + C + D)
        assert (reuse.prefix_tokens, reuse.kept_tokens, reuse.moved_tokens, reuse.new_tokens) == (100, 200, 0, 100)

    def test_a_prompt_all_of_whose_moved_tokens_are_computed(self, device: torch.device) -> None:
        """Is what full prefill gives."""
        reader = Reader(device, {"first_tokens": 1000, "min_gain": 0.0})
        reader.read(DONOR)
        reading, reuse = reader.read(MOVED)
        assert reuse.kind == "similar"
        session, want_V = reader.full(MOVED)
        assert divergence(reading.logits_V, want_V) < 1e-8
        for ours, truth in zip(kv_of(reading.session), kv_of(session), strict=True):
            assert difference(ours, truth) < 1e-4

    def test_similar_tokens(self, device: torch.device) -> None:
        """In place of new ones, if that is asked for: here those of each pair of tokens are near neighbours."""
        ids = A + [token ^ 1 for token in B] + C + D
        for options, num_fuzzy in (({"fuzzy": True, "retention": 0.1}, 100), ({}, 0)):
            reader = Reader(device, {"first_tokens": 4, "check_layer": 0, **options})
            with torch.no_grad():
                embedding = reader.model.get_input_embeddings().weight
                embedding[1::2] = embedding[0::2] + 0.01 * torch.randn_like(embedding[1::2])
            reader.read(DONOR)
            _, reuse = reader.read(ids)
            assert reuse.kind == "similar"
            assert (reuse.prefix_tokens, reuse.kept_tokens, reuse.fuzzy_tokens) == (100, 200, num_fuzzy)
            assert_adds_up(reuse, ids)
            first, last = reuse.computed_by_layer[0], reuse.computed_by_layer[-1]
            assert first == 4 + 100 + 1
            assert last == (4 + round(0.1 * 100) + 1 if num_fuzzy else first)


class TestChoice:
    """Of a cached prompt: the one that leaves least to compute, if that is worth it."""

    def test_the_longest_beginning(self, reader: Reader) -> None:
        for ids in (A + B + X, A + B + C + Y, A + E):
            reader.read(ids)
        longest = reader.cache.catalog.same("a", A + B + C + Y)
        assert longest is not None
        _, reuse = reader.read(A + B + C + Z)
        assert (reuse.kind, reuse.prefix_tokens, reuse.donor) == ("prefix", 300, longest.key)

    def test_a_longer_beginning_than_what_shares_more(self, device: torch.device) -> None:
        """Others share more tokens, elsewhere; only a beginning can be taken."""
        reader = Reader(device, reuse="exact")
        for ids in (A + B + X, *(paragraph(30 + number) + B + A + Z + E for number in range(4))):
            reader.read(ids)
        _, reuse = reader.read(A + B + Z + E)
        assert (reuse.kind, reuse.prefix_tokens) == ("prefix", 200)

    @pytest.mark.parametrize("mode", ["exact", "similar"])
    def test_a_beginning_too_short_to_share(self, mode: str, device: torch.device) -> None:
        """Though nothing has to be saved: it is read as if nothing were cached."""
        reader = Reader(device, {"min_gain": 0.0}, reuse=mode)
        reader.read(DONOR)
        for shared in (0, 1, 63):
            _, reuse = reader.read(A[:shared] + paragraph(40 + shared, 200))
            assert (reuse.kind, reuse.donor, reuse.prefix_tokens) == ("none", None, 0)

    def test_moved_runs_only_if_they_save_enough(self, reader: Reader) -> None:
        """Beside the beginning that both share, which costs nothing in exactness."""
        reader.read(A + B + C + D)
        ids = A + B + C + X[:5] + D[10:28] + Y[:60]
        reading, reuse = reader.read(ids)
        assert (reuse.kind, reuse.approximate, reuse.moved_tokens) == ("prefix", False, 0)
        assert reuse.reason == "moving runs would save too little beside the shared beginning"
        assert difference(reading.logits_V, reader.full(ids)[1]) < 1e-4

    @pytest.mark.parametrize(("min_gain", "kind"), [(0.0, "prefix"), (0.2, "prefix"), (0.3, "none"), (0.9, "none")])
    def test_min_gain(self, min_gain: float, kind: str, device: torch.device) -> None:
        """A quarter of the tokens is shared."""
        reader = Reader(device, {"min_gain": min_gain}, reuse="exact")
        reader.read(DONOR)
        reading, reuse = reader.read(A + X + Y + Z)
        assert reuse.kind == kind
        if kind == "none":
            assert (
                reuse.reason
                == f"300 of 400 tokens would be computed anyway, and reuse has to save {min_gain:.0%} (min_gain)"
            )
            assert torch.equal(reading.logits_V, reader.full(A + X + Y + Z)[1])

    def test_a_wrong_donor(self, reader: Reader) -> None:
        """Nothing in common: read as if there were no cache, to the last bit, and it says why."""
        reader.read(DONOR)
        reading, reuse = reader.read(E + X + Y)
        assert reuse.kind == "none"
        assert reuse.reason == "nothing like it is cached"
        session, want_V = reader.full(E + X + Y)
        assert torch.equal(reading.logits_V, want_V)
        for ours, truth in zip(kv_of(reading.session), kv_of(session), strict=True):
            assert torch.equal(ours, truth)

    def test_exact_never_moves(self, device: torch.device) -> None:
        reader = Reader(device, reuse="exact")
        reader.read(DONOR)
        _, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.prefix_tokens, reuse.moved_tokens) == ("prefix", 100, 0)
        assert reader.counts() == (2, 0)

    def test_a_short_prompt_is_not_worth_it(self, reader: Reader) -> None:
        _, reuse = reader.read(A[:63])
        assert reuse.kind == "none"
        assert reader.counts() == (0, 0)

    def test_keys_that_nobody_can_explain(self, device: torch.device) -> None:
        """Are refused for moving, and need no moving otherwise."""
        reader = Reader(device, reuse="exact")
        rotary = reader.model.model.rotary_emb
        own = rotary.forward
        rotary.forward = lambda x, position_ids: own(x, 2 * position_ids)
        reader.read(DONOR)
        reading, reuse = reader.read(A + B + X)
        assert (reuse.kind, reuse.prefix_tokens) == ("prefix", 200)
        assert difference(reading.logits_V, reader.full(A + B + X)[1]) < 1e-4
        reader.config = dataclasses.replace(reader.config, reuse="similar")
        with pytest.raises(UnsupportedModelError, match="use reuse='exact'"):
            reader.opened()

    @pytest.mark.parametrize("architecture", ["gemma3_text", "cohere2", "qwen2"])
    def test_sliding_windows_are_refused(self, architecture: str, device: torch.device) -> None:
        for mode in ("exact", "similar"):
            with pytest.raises(UnsupportedModelError, match=r"has sliding-window layers.*use reuse='off'"):
                Reader(device, architecture=architecture, reuse=mode)


class TestTree:
    def test_a_chain_of_longer_prompts(self, device: torch.device) -> None:
        """Each an edit of one before it, no deeper than that, and as good as read in full."""
        reader = Reader(device, reuse="exact")
        ids: list[int] = list(A)
        depths, keys = [], []
        for number in range(MAX_DEPTH + 4):
            ids = ids + paragraph(20 + number, 40)
            reading, reuse = reader.read(ids)
            assert reuse.kind == ("prefix" if number else "none")
            assert reuse.computed_tokens == (40 if number else 140)
            assert difference(reading.logits_V, reader.full(ids)[1]) < 1e-4
            record = reader.cache.catalog.same("a", ids)
            assert record is not None
            with reader.cache.catalog.held(record) as payload:
                assert isinstance(payload, CachedPrompt)
                depths.append(payload.depth)
            keys.append(record.key)
            assert (record.parent is None) == (number == 0)
        assert depths == [min(number, MAX_DEPTH) for number in range(len(depths))]
        for ours, truth in zip(kv_of(reading.session), kv_of(reader.full(ids)[0]), strict=True):
            assert difference(ours, truth) < 1e-4

    def test_bytes_are_counted(self, device: torch.device) -> None:
        """All that is held is an entry's, and each row of it once."""
        reader = Reader(device)
        for ids in (DONOR, DONOR + X, DONOR + X + Y, MOVED, MOVED[:-40] + Z, E + X + Y):
            reader.read(ids)
        assert reader.counts() == (6, 3)
        held = reader.cache.catalog.statistics("a").host_bytes
        if reader.memory.pinned:
            assert held <= reader.memory.in_use_bytes
        else:
            assert held == reader.memory.in_use_bytes
        reader.cache.close()
        assert reader.memory.in_use_bytes == 0

    def test_variants_of_one_prompt(self, device: torch.device) -> None:
        """A fact changed, and a paragraph moved in every other one: below a quarter of as many copies."""
        reader = Reader(device)
        rng = np.random.default_rng(0)
        paragraphs = [paragraph(number, 90) for number in range(40, 60)]
        reader.read([token for each in paragraphs for token in each])
        one = reader.cache.catalog.statistics("a").host_bytes
        for variant in range(19):
            changed = [list(each) for each in paragraphs]
            where = rng.integers(len(changed))
            changed[where][30:36] = rng.integers(1, VOCABULARY, 6).tolist()
            if variant % 2:
                changed.insert(rng.integers(len(changed)), changed.pop(rng.integers(len(changed))))
            ids = [token for each in changed for token in each]
            _, reuse = reader.read(ids)
            assert reuse.kind == "similar"
            assert reuse.new_tokens <= 6
        assert reader.counts() == (20, 19)
        assert reader.memory.in_use_bytes < 0.25 * 20 * one
        assert reader.cache.catalog.statistics("a").host_bytes < 0.25 * 20 * one

    def test_what_is_not_finished_is_not_kept(self, reader: Reader) -> None:
        for ids in (DONOR, MOVED):
            reader.cache.read(prompt_of(ids), "a")
            assert reader.counts() == (0, 0)
            assert reader.memory.in_use_bytes == 0
        reader.read(DONOR)
        held = reader.memory.in_use_bytes
        reader.cache.read(prompt_of(MOVED), "a")
        assert reader.counts() == (1, 0)
        assert reader.memory.in_use_bytes == held

    def test_who_is_finished_first_does_not_matter(self, reader: Reader) -> None:
        """Two readings of one prompt; a donor that has left meanwhile."""
        readings = [reader.cache.read(prompt_of(DONOR), "a") for _ in range(2)]
        assert [reading.finish(1.0).kind for reading in readings] == ["none", "none"]
        assert reader.counts() == (1, 0)
        readings = [reader.cache.read(prompt_of(ids), "a") for ids in (MOVED, DONOR + X)]
        reader.cache.catalog.clear("a")
        similar, prefix = (reading.finish(1.0) for reading in readings)
        assert (similar.kind, prefix.kind) == ("similar", "prefix")
        assert reader.counts() == (1, 0), "an edit of what is gone means nothing; what was read exactly does"
        again, reuse = reader.read(DONOR + X)
        assert reuse.kind == "same"
        assert torch.equal(again.logits_V, readings[1].logits_V)
        assert difference(again.logits_V, reader.full(DONOR + X)[1]) < 1e-4


class TestPoisoning:
    """An approximation serves the identical prompt, and nobody else."""

    def test_it_serves_the_identical_prompt(self, reader: Reader) -> None:
        reader.read(DONOR)
        first, _ = reader.read(MOVED)
        reading, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.approximate, reuse.computed_tokens) == ("same", True, 0)
        assert torch.equal(reading.logits_V, first.logits_V)
        for ours, theirs in zip(kv_of(reading.session), kv_of(first.session), strict=True):
            assert difference(ours, theirs) < 1e-6
        assert reader.counts() == (2, 1)

    def test_it_feeds_no_others(self, reader: Reader) -> None:
        """What only the approximate prompt has is new to those that begin as it does, or have its runs."""
        reader.read(DONOR)
        donor = reader.cache.catalog.same("a", DONOR)
        assert donor is not None
        approximate = A + C + X + B + D
        reader.read(approximate)
        for ids in (approximate + Y[:50], approximate[:-30], X + approximate):
            _, reuse = reader.read(ids)
            assert reuse.donor == donor.key
            assert reuse.kind == "similar"
            assert reuse.new_tokens == len(ids) - 400 + (30 if ids == approximate[:-30] else 0)
        # Runs of X are nowhere but in approximations: a prompt of them alone gets nothing.
        reading, reuse = reader.read(X + Y)
        assert reuse.kind == "none"
        assert torch.equal(reading.logits_V, reader.full(X + Y)[1])

    def test_no_approximation_is_anybodys_parent(self, reader: Reader) -> None:
        reader.read(DONOR)
        for ids in (MOVED, MOVED + Y, MOVED + Y + Z):
            reader.read(ids)
        entry = reader.cache.catalog.entry
        records = [entry("a", ids, approximate=ids != DONOR) for ids in (DONOR, MOVED, MOVED + Y, MOVED + Y + Z)]
        assert None not in records
        assert [record.parent for record in records] == [None, *[records[0].key] * 3]

    def test_an_exact_reading_replaces_it(self, tmp_path: Path, device: torch.device) -> None:
        """Once there is one; and where only exact reuse is asked for, an approximation is not there."""
        reader = Reader(device, reuse_folder=str(tmp_path))
        reader.read(DONOR)
        reader.read(MOVED)
        reader.config = dataclasses.replace(reader.config, reuse="exact")
        reader.reopen()
        reading, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.approximate, reuse.prefix_tokens) == ("prefix", False, 100)
        assert difference(reading.logits_V, reader.full(MOVED)[1]) < 1e-4
        _, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.approximate) == ("same", False)
        reader.config = dataclasses.replace(reader.config, reuse="similar")
        reader.reopen()
        _, reuse = reader.read(MOVED)
        assert (reuse.kind, reuse.approximate) == ("same", False)
        assert reader.counts() == (3, 1)


class TestNamespaces:
    """What one sees with others beside it is what it sees alone."""

    PROMPTS = (DONOR, MOVED, DONOR, DONOR + X, E + Y + Z, MOVED)

    def test_others_are_not_seen(self, device: torch.device) -> None:
        """Neither in what is reused, nor in what is counted, whatever the others cache."""
        alone, beside = Reader(device), Reader(device)
        for ids in (MOVED, DONOR, E + Y + Z, DONOR + X):
            beside.read(ids, "theirs")
        for ids in self.PROMPTS:
            before = beside.cache.catalog.statistics("theirs")
            (reading, reuse), (want, wanted) = beside.read(ids, "ours"), alone.read(ids, "ours")
            assert without_times(reuse) == without_times(wanted)
            assert torch.equal(reading.logits_V, want.logits_V)
            assert beside.cache.catalog.statistics("ours") == alone.cache.catalog.statistics("ours")
            assert beside.cache.catalog.statistics("theirs") == before

    def test_donors_are_ones_own(self, reader: Reader) -> None:
        keys: dict[str, set[int]] = {"a": set(), "b": set()}
        for ids in (DONOR, DONOR + X, DONOR + Y):
            for namespace, own in keys.items():
                _, reuse = reader.read(ids, namespace)
                record = reader.cache.catalog.same(namespace, ids)
                assert record is not None
                assert reuse.donor is None or reuse.donor in own
                assert record.parent is None or record.parent in own
                own.add(record.key)
        assert not keys["a"] & keys["b"]

    def test_a_name_is_no_part_of_another(self, reader: Reader) -> None:
        for namespace in ("a", "a ", "A", "a/b", "", "ä", "default"):
            _, reuse = reader.read(DONOR, namespace)
            assert reuse.kind == "none"

    def test_times_are_of_ones_own_readings(self, device: torch.device, tmp_path: Path) -> None:
        """What is saved is told by how long one's own prompts took."""
        reader = Reader(device, reuse_folder=str(tmp_path))
        reader.read(DONOR, "a", seconds=4.0)
        assert reader.read(DONOR, "a", seconds=0.5)[1].seconds_saved == pytest.approx(3.5, abs=0.1)
        reader.reopen()
        assert reader.read(DONOR, "a")[1].seconds_saved is None
        reader.read(E + X + Y, "b", seconds=8.0)
        assert reader.read(E + X + Y, "b", seconds=0.5)[1].seconds_saved == pytest.approx(7.5, abs=0.1)
        assert reader.read(DONOR, "a")[1].seconds_saved is None


class TestFolder:
    def test_all_kinds_come_back(self, device: torch.device, tmp_path: Path) -> None:
        """The same prompts as they were, and donors for others."""
        reader = Reader(device, reuse_folder=str(tmp_path))
        prompts = (DONOR, MOVED, DONOR + X, DONOR + X + Y)
        before = [reader.read(ids)[0] for ids in prompts]
        for _ in range(2):
            reader.reopen()
            for ids, was in zip(prompts, before, strict=True):
                reading, reuse = reader.read(ids)
                assert (reuse.kind, reuse.approximate) == ("same", ids == MOVED)
                assert torch.equal(reading.logits_V, was.logits_V)
                for ours, theirs in zip(kv_of(reading.session), kv_of(was.session), strict=True):
                    assert difference(ours, theirs) < 1e-6
                    if ids != MOVED:
                        assert torch.equal(ours, theirs)
                assert reading.session.sentence_spans() == was.session.sentence_spans()
        reading, reuse = reader.read(DONOR + X + Z)
        assert (reuse.kind, reuse.prefix_tokens) == ("prefix", 500)
        assert difference(reading.logits_V, reader.full(DONOR + X + Z)[1]) < 1e-4
        _, reuse = reader.read(A + D + B + C)
        assert (reuse.kind, reuse.moved_tokens) == ("similar", 300)
        reader.reopen()
        assert reader.counts() == (6, 2)

    @pytest.mark.parametrize(("ids", "want"), [(DONOR, "none"), (DONOR + X[:40], "none"), (MOVED, "none")], ids=len)
    def test_a_damaged_file(self, ids: list[int], want: str, device: torch.device, tmp_path: Path) -> None:
        """Is as if it were not there: the prompt is read, and the entry is gone."""
        reader = Reader(device, reuse_folder=str(tmp_path))
        reader.read(DONOR)
        reader.cache.close()
        (path,) = tmp_path.glob("namespaces/*/*.payload")
        content = bytearray(path.read_bytes())
        content[-50] ^= 1
        path.write_bytes(content)
        reader.cache = reader.opened()
        reading, reuse = reader.read(ids)
        assert reuse.kind == want
        assert "cannot be read, so its entry is removed" in reuse.reason
        assert torch.equal(reading.logits_V, reader.full(ids)[1])
        assert reader.counts() == (1, 0)
        assert reader.read(ids)[1].kind == "same"

    def test_somebody_elses_folder(self, device: torch.device, tmp_path: Path) -> None:
        reader = Reader(device, reuse_folder=str(tmp_path))
        reader.read(DONOR)
        with pytest.raises(CatalogError, match="is open already"):
            reader.opened()
        reader.cache.close()
        with pytest.raises(CatalogError, match="belongs to"):
            reader.opened("theirs")
        reader.cache = reader.opened()
        assert reader.read(DONOR)[1].kind == "same"

    def test_namespaces_come_back_apart(self, device: torch.device, tmp_path: Path) -> None:
        reader = Reader(device, reuse_folder=str(tmp_path))
        reader.read(DONOR, "a")
        reader.read(E + X, "b")
        reader.reopen()
        assert reader.read(E + X, "a")[1].kind == "none"
        assert reader.read(DONOR, "b")[1].kind == "none"
        assert reader.read(DONOR, "a")[1].kind == reader.read(E + X, "b")[1].kind == "same"


class TestBounds:
    def size(self, device: torch.device) -> int:
        """Host memory that a cached prompt takes; pinned memory comes in powers of two."""
        reader = Reader(device)
        reader.read(DONOR)
        return reader.memory.in_use_bytes

    @pytest.mark.parametrize("folder", [False, True])
    def test_few_bytes(self, folder: bool, device: torch.device, tmp_path: Path) -> None:
        """What does not fit leaves or goes to the folder, and answers stay right."""
        one = Reader(device)
        one.read(DONOR)
        bound = int(1.7 * one.cache.catalog.statistics("a").host_bytes)
        reader = Reader(device, reuse_bytes=bound, reuse_folder=str(tmp_path) if folder else None)
        prompts = (DONOR, E + X + Y + Z, DONOR + X[:40], Z + Y + X + E)
        truth = [reader.full(ids) for ids in prompts]
        for turn in range(2):
            for ids, (session, want_V) in zip(prompts, truth, strict=True):
                reading, reuse = reader.read(ids)
                assert reader.cache.catalog.statistics("a").host_bytes <= bound
                if not reuse.approximate:
                    assert difference(reading.logits_V, want_V) < 1e-4
                    assert all(
                        difference(*pair) < 1e-4 for pair in zip(kv_of(reading.session), kv_of(session), strict=True)
                    )
                assert_adds_up(reuse, ids)
                if turn and folder:
                    assert reuse.kind != "none"
        assert 0 < reader.counts()[0] <= (4 if folder else 1)

    def test_no_bytes_at_all(self, device: torch.device) -> None:
        reader = Reader(device, reuse_bytes=10)
        for _ in range(2):
            reading, reuse = reader.read(DONOR)
            assert reuse.kind == "none"
        assert torch.equal(reading.logits_V, reader.full(DONOR)[1])
        assert reader.counts() == (0, 0)

    def test_they_make_room(self, device: torch.device) -> None:
        """What is cached is given up before anything is refused."""
        size = self.size(device)
        reader = Reader(device, host_memory_bytes=8 * size, reuse_bytes=8 * size)
        for number in range(5):
            reader.read(paragraph(100 + number, 400))
        assert reader.counts() == (5, 0)
        reader.memory.check(6 * size)
        assert reader.memory.in_use_bytes <= 2 * size
        assert 0 < reader.counts()[0] <= 2
        assert reader.read(paragraph(104, 400))[1].kind == "same", "the last used stays"
        reader.memory.check(8 * size)
        assert reader.memory.in_use_bytes == 0

    def test_they_make_room_also_where_others_share_them(self, device: torch.device) -> None:
        """Giving up what a session still holds frees nothing, so more has to go."""
        size = self.size(device)
        reader = Reader(device, host_memory_bytes=4 * size, reuse_bytes=8 * size)
        held, _ = reader.read(DONOR)
        reader.read(paragraph(100, 400))
        in_use = reader.memory.in_use_bytes
        assert in_use > 1.8 * size
        reader.memory.check(int(2.6 * size))
        assert kv_of(held.session)[0].isfinite().all()

    def test_caching_fails_and_reading_does_not(self, device: torch.device) -> None:
        """Where there is no room beside the prompt that was read."""
        size = self.size(device)
        reader = Reader(device, reuse_bytes=8 * size)
        reading = reader.cache.read(prompt_of(DONOR), "a")
        kv_of(reading.session)
        reader.memory.limit_bytes = reader.memory.in_use_bytes + 100
        assert reading.finish(1.0).kind == "none"
        assert reader.counts() == (0, 0)
        reader.memory.limit_bytes = None
        reader.read(DONOR)
        reading = reader.cache.read(prompt_of(MOVED), "a")
        kv_of(reading.session)
        reader.memory.limit_bytes = reader.memory.in_use_bytes + 100
        assert reading.finish(1.0).kind == "similar"
        assert reader.counts() == (1, 0)

    @pytest.mark.parametrize("ids", [DONOR, DONOR + X[:20], A + B], ids=["the same", "longer", "shorter"])
    @pytest.mark.parametrize("sizes", [1.2, 1.5, 2.0])
    def test_loading_fails_and_reading_does_not(
        self, ids: list[int], sizes: float, device: torch.device, tmp_path: Path
    ) -> None:
        """Room for a prompt, and not for a cached one beside it, or hardly."""
        size = self.size(device)
        reader = Reader(device, reuse_folder=str(tmp_path), reuse_bytes=8 * size)
        reader.read(DONOR)
        session, want_V = reader.full(ids)
        truth = kv_of(session)
        del session
        reader.reopen()
        assert reader.memory.in_use_bytes == 0
        reader.memory.limit_bytes = int(sizes * size)
        reader.memory.check(size)
        reading = reader.cache.read(prompt_of(ids), "a")
        assert difference(reading.logits_V, want_V) < 1e-4
        for ours, theirs in zip(kv_of(reading.session), truth, strict=True):
            assert difference(ours, theirs) < 1e-4
        reading.finish(1.0)


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_prompts_in_any_order(data: st.DataObject) -> None:
    """Of the same paragraphs, for two namespaces, within any bound, with a pause now and then: with all moved tokens
    computed anew, whatever is reused gives what reading in full gives, and what is counted adds up."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"first_tokens": 1000, "min_gain": data.draw(st.sampled_from([0.0, 0.3]))}
        bound = data.draw(st.sampled_from([None, 250_000, 500_000]))
        where = data.draw(st.sampled_from([None, folder]))
        reader = Reader(torch.device("cpu"), options, reuse_bytes=bound, reuse_folder=where)
        seen: dict[str, set[tuple[int, ...]]] = {"a": set(), "b": set()}
        for _ in range(data.draw(st.integers(2, 7))):
            if data.draw(st.integers(0, 4)) == 0:
                reader.reopen()
                if where is None:
                    seen = {"a": set(), "b": set()}
            pieces = data.draw(st.lists(st.tuples(st.integers(20, 23), st.integers(1, 100)), min_size=1, max_size=4))
            ids = [token for number, count in pieces for token in paragraph(number)[:count]]
            namespace = data.draw(st.sampled_from(["a", "b"]))
            reading, reuse = reader.read(ids, namespace)
            session, want_V = reader.full(ids)
            assert difference(reading.logits_V, want_V) < 1e-3
            for ours, truth in zip(kv_of(reading.session), kv_of(session), strict=True):
                assert difference(ours, truth) < 1e-3
            assert_adds_up(reuse, ids)
            if not seen[namespace]:
                assert reuse.reason == "nothing like it is cached"
            if tuple(ids) not in seen[namespace]:
                assert reuse.kind != "same"
            seen[namespace].add(tuple(ids))
            if bound is not None:
                assert sum(reader.cache.catalog.statistics(each).host_bytes for each in seen) <= bound
        reader.cache.close()


class TestOptions:
    def test_unknown_ones_are_named(self) -> None:
        with pytest.raises(
            TypeError, match=r"unknown reuse option 'rato'; there are: first_tokens, .*ratio, .*min_gain"
        ):
            make_reuse_options({"rato": 0.1})
        assert make_reuse_options({"ratio": 0.1, "fuzzy": False}) == ReuseOptions(ratio=0.1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"min_gain": 1.0}, "min_gain must be at least 0 and below 1, got 1.0"),
            ({"min_gain": -0.1}, "min_gain must be"),
            ({"min_gain": math.nan}, "min_gain must be"),
            ({"fuzzy": True}, "retention=1 computes all; give retention below 1"),
            ({"ratio": 2.0}, "ratio must be from 0 to 1"),
        ],
    )
    def test_bad_values(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ReuseOptions(**given)

    def embedded(self, reader: Reader, embed: Callable[[str], Sequence[float]]) -> PromptCache:
        given = (reader.model, FusedLayers(reader.model), reader.config, reader.memory, reader.session)
        return PromptCache(*given, owner="ours", chunk_tokens=128, embed=embed)

    def test_an_embedding_of_ones_own(self, device: torch.device) -> None:
        """It is asked for the text, once."""
        reader = Reader(device)
        texts: list[str] = []

        def embed(text: str) -> Sequence[float]:
            texts.append(text)
            return [1.0, float(len(text)), 0.0]

        reader.cache = self.embedded(reader, embed)
        del texts[:]  # its size was looked at
        reader.cache.read(dataclasses.replace(prompt_of(DONOR), text="a text"), "a").finish(1.0)
        assert texts == ["a text"]
        assert reader.read(DONOR)[1].kind == "same"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([1.0, 2.0], r"reuse_embedding must give 3 numbers for every text, as it did at first; got shape \[2\]"),
            ([[1.0, 2.0, 3.0]], r"reuse_embedding must give 3 numbers .* got shape \[1, 3\]"),
            ([1.0, float("nan"), 0.0], r"reuse_embedding must give finite numbers, got nan"),
            ([1.0, float("inf"), 0.0], r"reuse_embedding must give finite numbers, got inf"),
        ],
    )
    def test_a_bad_embedding_is_known_before_anything_is_computed(
        self, row: Any, message: str, device: torch.device
    ) -> None:
        reader = Reader(device)
        reader.cache = self.embedded(reader, lambda text: [1.0, 0.0, 0.0] if text == "size" else row)
        with pytest.raises(ValueError, match=message):
            reader.cache.read(prompt_of(DONOR), "a")
        assert reader.memory.in_use_bytes == 0

    @pytest.mark.parametrize("fuzzy", [False, True])
    def test_the_models_own_is_made_after_the_answer(
        self, fuzzy: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unless prompts of similar meaning are looked for."""
        reader = Reader(device, {"fuzzy": True, "retention": 0.1} if fuzzy else None)
        made: list[int] = []
        own = PromptCache._embedding

        def counted(cache: PromptCache, prompt: Prompt) -> np.ndarray:
            made.append(len(prompt.token_ids))
            return own(cache, prompt)

        monkeypatch.setattr(PromptCache, "_embedding", counted)
        reading = reader.cache.read(prompt_of(DONOR), "a")
        assert made == [len(DONOR)] * fuzzy
        reading.finish(1.0)
        assert made == [len(DONOR)]
