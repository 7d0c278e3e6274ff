"""Edits: operations turn the cached prompt into the new one, and a tree of them gives every prompt its rows."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv import policies
from sentencekv.disk import SavedFileError, write_file
from sentencekv.memory import HostMemory
from sentencekv.reuse.edit import MAX_DEPTH, CachedPrompt, Operation, derived, operations, rebased
from sentencekv.reuse.kept import Kept
from sentencekv.reuse.match import Alignment, Match, align
from sentencekv.reuse.rows import DerivedRows, Mover, PackedRows, Rows
from sentencekv.rope import Rotation
from sentencekv.session import Session
from tests.sequences import CONFIG, CPU, Tokens, run, sentence_ends

ROTATIONS = {0: Rotation((1.0, 0.3, 0.01), False), 1: Rotation((0.7, 0.1), True)}
HEADS, DIM = 2, 12


def aligned(donor: list[int], ids: list[int], min_run_tokens: int = 2) -> Alignment:
    donor_ends, ends = ([*range(7, len(text), 7), len(text)] if text else [] for text in (donor, ids))
    return align(donor, ids, donor_ends=donor_ends, ends=ends, min_run_tokens=min_run_tokens)


def carried_out(steps: list[Operation], donor: list[int], ids: list[int]) -> list[int]:
    """What the operations make of the donor; placeholders are filled as if they were computed."""
    made: list[int] = []
    for step in steps:
        if step.kind in ("keep", "move", "fuzzy"):
            assert step.stop - step.start == step.donor_stop - step.donor_start > 0
            assert (step.kind == "keep") <= (step.donor_start == step.start)
            assert (step.kind == "move") <= (step.donor_start != step.start)
        assert step.start == len(made), "in the new prompt's order, and nothing is left out"
        if step.kind in ("keep", "move"):
            made += donor[step.donor_start : step.donor_stop]
        elif step.kind == "delete":
            assert step.start == step.stop
        else:
            assert step.stop > step.start
            assert (step.donor_stop > step.donor_start) == (step.kind != "insert")
            made += ids[step.start : step.stop]
    return made


def edited(data: st.DataObject, donor: list[int]) -> list[int]:
    """A few cuts, moves, copies, insertions and replacements."""
    ids = list(donor)
    for _ in range(data.draw(st.integers(0, 5))):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(ids))] * 2)))
        new = data.draw(st.lists(st.integers(0, 30), max_size=6))
        kind = data.draw(st.sampled_from(["delete", "insert", "replace", "move", "copy"]))
        piece = ids[start:stop]
        if kind in ("delete", "move"):
            del ids[start:stop]
        if kind == "replace":
            ids[start:stop] = new
        if kind == "insert":
            ids[start:start] = new
        if kind in ("move", "copy"):
            at = data.draw(st.integers(0, len(ids)))
            ids[at:at] = piece
    return ids


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_operations_turn_the_donor_into_the_prompt(data: st.DataObject) -> None:
    """And each of the donor's tokens is in just one of them, or is inserted nowhere: nothing is left over."""
    donor = data.draw(st.lists(st.integers(0, 40), max_size=60))
    ids = edited(data, donor)
    steps = operations(aligned(donor, ids))
    assert carried_out(steps, donor, ids) == ids
    used = sorted((step.donor_start, step.donor_stop) for step in steps if step.donor_stop > step.donor_start)
    at = 0
    for start, stop in used:
        assert start == at
        at = stop
    assert at == len(donor)


def test_operations_by_name() -> None:
    """Of a text of ten paragraphs of ten tokens: one stays, one goes, one is written anew, two change places."""
    matches = (
        Match(0, 0, 10, "prefix"),  # the second is deleted
        Match(20, 10, 10, "exact"),  # the fourth is replaced by something longer
        Match(40, 35, 10, "fuzzy"),
        Match(60, 45, 10, "exact"),
        Match(50, 55, 10, "exact"),
        Match(70, 70, 10, "exact"),  # five tokens inserted; the last two are deleted
    )
    assert operations(Alignment(100, 80, matches)) == [
        Operation("keep", 0, 10, 0, 10),
        Operation("delete", 10, 20, 10, 10),
        Operation("move", 20, 30, 10, 20),
        Operation("replace", 30, 40, 20, 35),
        Operation("fuzzy", 40, 50, 35, 45),
        Operation("move", 60, 70, 45, 55),
        Operation("move", 50, 60, 55, 65),
        Operation("insert", 60, 60, 65, 70),
        Operation("keep", 70, 80, 70, 80),
        Operation("delete", 80, 100, 80, 80),
    ]


def test_operations_of_nothing_in_common() -> None:
    assert operations(Alignment(5, 3, ())) == [Operation("replace", 0, 5, 0, 3)]
    assert operations(Alignment(0, 3, ())) == [Operation("insert", 0, 0, 0, 3)]
    assert operations(Alignment(5, 0, ())) == [Operation("delete", 0, 5, 0, 0)]
    assert operations(Alignment(0, 0, ())) == []


def packed(num_tokens: int, memory: HostMemory, seed: int = 0, dtype: torch.dtype = torch.float32) -> PackedRows:
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for layer in ROTATIONS:
        kv_NTH = memory.allocate((HEADS, num_tokens, 2, DIM), dtype)
        rows[layer] = kv_NTH.copy_(torch.randn(kv_NTH.shape, generator=generator))
    return PackedRows(rows)


def brought(rows: Rows, layer: int, source_T: np.ndarray | None = None) -> Tensor:
    """Rows where a prompt has them; NaN where there is no source."""
    if source_T is None:
        source_T = np.arange(len(rows.table(layer)))
    kv_NTH = torch.full((HEADS, len(source_T), 2, DIM), torch.nan, dtype=rows.tensors(layer)[0].dtype)
    Mover(rows, source_T, 0, ROTATIONS, CPU).into(layer, kv_NTH)
    return kv_NTH


def tree(
    num_edits: int, memory: HostMemory, dtype: torch.dtype = torch.float32
) -> tuple[list[CachedPrompt], list[PackedRows]]:
    """Entries, each an edit of the one before it, and what their rows are."""
    rng = np.random.default_rng(num_edits)
    whole = [packed(20, memory, dtype=dtype)]
    entries = [CachedPrompt(whole[0], torch.randn(7))]
    for number in range(num_edits):
        num_parent, num_tokens = entries[-1].num_tokens, int(rng.integers(15, 30))
        sources = {layer: rng.integers(0, num_parent, num_tokens) for layer in ROTATIONS}
        own = packed(num_tokens, memory, number + 1, dtype)
        for layer, source_T in sources.items():
            source_T[rng.permutation(num_tokens)[: rng.integers(1, 8)]] = -1
            moved = brought(entries[-1].rows, layer, source_T)
            own.kv_of_layer[layer] = moved.where(moved.isfinite(), own.kv_of_layer[layer])
        whole.append(own)
        entries.append(derived(own, sources, entries[-1], torch.randn(7), memory))
    return entries, whole


@pytest.mark.parametrize("num_edits", [1, MAX_DEPTH, 3 * MAX_DEPTH])
def test_rows_of_a_long_chain(num_edits: int) -> None:
    """Chains stay short: what is deeper becomes an edit of one nearer to the root, with all that it then lacks."""
    entries, whole = tree(num_edits, HostMemory(None, pinned=False))
    assert [entry.depth for entry in entries] == [min(depth, MAX_DEPTH) for depth in range(num_edits + 1)]
    for entry, rows in zip(entries, whole, strict=True):
        assert entry.num_tokens == rows.num_tokens
        for layer in ROTATIONS:
            torch.testing.assert_close(brought(entry.rows, layer), rows.kv_of_layer[layer], rtol=0, atol=1e-5)


def test_a_rebased_edit_has_what_the_ones_between_had() -> None:
    """A token whose row the skipped entry had of its own is its own; one that came from farther up still does."""
    entries, _ = tree(MAX_DEPTH, HostMemory(None, pinned=False))
    last = entries[-1]
    sources = {layer: np.array([-1, *range(last.num_tokens)]) for layer in ROTATIONS}
    found, parent = rebased(sources, last)
    assert parent is last.parent
    for layer in ROTATIONS:
        assert found[layer].tolist() == [-1, *last.source_of_layer[layer].tolist()]
        assert sources[layer].tolist() == [-1, *range(last.num_tokens)], "the caller's stay as they are"
    assert rebased(sources, entries[-2]) == (sources, entries[-2])


def test_only_what_differs_is_stored() -> None:
    memory = HostMemory(None, pinned=False)
    root = CachedPrompt(packed(100, memory), torch.zeros(3))
    held = memory.in_use_bytes
    assert root.host_bytes == held == 2 * 100 * HEADS * 2 * DIM * 4
    sources = {0: np.arange(100), 1: np.arange(100)}
    sources[0][40:45] = -1
    sources[1][40:42] = -1
    rows = packed(100, HostMemory(None, pinned=False), 1)
    child = derived(rows, sources, root, torch.zeros(3), memory)
    assert child.host_bytes == memory.in_use_bytes - held == 7 * HEADS * 2 * DIM * 4
    assert (root.depth, child.depth) == (0, 1)
    child.drop()
    gc.collect()
    assert memory.in_use_bytes == held
    assert child.host_bytes == 0
    root.drop()
    gc.collect()
    assert memory.in_use_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_give_back_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """Root and edits, bit by bit, into memory that is counted; also when they are written again."""
    memory, other = (HostMemory(None, pinned=False) for _ in range(2))
    entries, _ = tree(3, memory, dtype)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        loaded: CachedPrompt | None = None
        for number, entry in enumerate(entries):
            path = tmp_path / folder / str(number)
            entry.write(path)
            loaded = CachedPrompt.load(path, loaded, other)
            assert (loaded.depth, loaded.num_tokens) == (entry.depth, entry.num_tokens)
            assert loaded.host_bytes == entry.host_bytes
            assert torch.equal(loaded.logits_V, entry.logits_V)
            for layer in ROTATIONS:
                assert torch.equal(brought(loaded.rows, layer), brought(entry.rows, layer))
            entries[number] = loaded
    assert [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "b").iterdir())
    ]
    assert other.in_use_bytes >= 2 * sum(entry.host_bytes for entry in entries)


def test_an_edits_file_has_its_own_rows_only(tmp_path: Path) -> None:
    memory = HostMemory(None, pinned=False)
    root = CachedPrompt(packed(400, memory), torch.zeros(3))
    sources = {layer: np.arange(400) for layer in ROTATIONS}
    child = derived(packed(400, memory, 1), sources, root, torch.zeros(3), memory)
    root.write(tmp_path / "root")
    child.write(tmp_path / "child")
    rows_bytes = root.host_bytes
    assert (tmp_path / "root").stat().st_size > rows_bytes
    assert (tmp_path / "child").stat().st_size < 0.2 * rows_bytes


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A byte that changed, an end that is missing, another kind, another version: never other rows or logits."""
    memory = HostMemory(None, pinned=False)
    entries, _ = tree(1, memory)
    path = tmp_path / "a"
    for entry in entries:
        entry.write(path)
        content = path.read_bytes()
        num_refused = 0
        for at in range(0, len(content), len(content) // 60):
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            try:
                loaded = CachedPrompt.load(path, entry.parent, memory)
            except SavedFileError:
                num_refused += 1
                continue
            # What only other readers of such files look at.
            assert torch.equal(loaded.logits_V, entry.logits_V)
            for layer in ROTATIONS:
                assert torch.equal(brought(loaded.rows, layer), brought(entry.rows, layer))
        assert num_refused > 40
        for size in (0, 7, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(SavedFileError):
                CachedPrompt.load(path, entry.parent, memory)
    for kind, version in (("sentencekv document", 1), ("sentencekv cached prompt", 99)):
        write_file(path, {"kind": kind, "version": version, "layers": [0, 1]}, {})
        with pytest.raises(SavedFileError):
            CachedPrompt.load(path, None, memory)


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    """Nothing of it stays."""
    root = CachedPrompt(packed(50, HostMemory(None, pinned=False)), torch.zeros(3))
    root.write(tmp_path / "a")
    tight = HostMemory(root.host_bytes - 1, pinned=False)
    with pytest.raises(MemoryError):
        CachedPrompt.load(tmp_path / "a", None, tight)
    gc.collect()
    assert tight.in_use_bytes == 0


class TestKept:
    """Entries that keep a session's own rows, and those that went on from them."""

    PROMPT = 600

    def cached(
        self, memory: HostMemory, device: torch.device, tokens: Tokens, parent: CachedPrompt | None = None
    ) -> CachedPrompt:
        """A prompt read exactly, from half of its parent's tokens if there is one."""
        shared = 0
        if parent is not None:
            assert parent.kept is not None
            shared = parent.kept.reach(self.PROMPT // 2, CONFIG.window_tokens)
            state = parent.kept.upto(shared, device)
            session = Session.from_state(CONFIG, policies.load("codes"), memory, device, state)
        else:
            session = Session(CONFIG, policies.load("codes"), memory, device)
        session.expect(sentence_ends(self.PROMPT, session.last_expected_end))
        run(session, tokens, self.PROMPT, exact=True)
        kept = Kept(session.state(), self.PROMPT, memory)
        token_T = np.arange(self.PROMPT)
        sources = {layer: np.where(token_T < shared, token_T, -1) for layer in (0, 1)} if parent is not None else {}
        return CachedPrompt(kept.rows, torch.zeros(5), kept=kept, parent=parent, source_of_layer=sources)

    def test_shared_slabs_are_counted_once(self, device: torch.device) -> None:
        memory = HostMemory(None, pinned=device.type == "cuda")
        tokens, others = (Tokens.random(self.PROMPT, device, seed) for seed in (0, 1))
        for source, other in ((tokens.q, others.q), (tokens.k, others.k), (tokens.v, others.v)):
            other[:, :, : self.PROMPT // 2] = source[:, :, : self.PROMPT // 2]
        root = self.cached(memory, device, tokens)
        alone = memory.in_use_bytes
        child = self.cached(memory, device, others, root)
        gc.collect()
        assert root.addresses().keys() < child.addresses().keys()
        if not memory.pinned:
            assert root.host_bytes == alone
            assert child.host_bytes == memory.in_use_bytes - alone
        child.drop()
        gc.collect()
        assert memory.in_use_bytes == alone

    def test_files(self, device: torch.device, tmp_path: Path) -> None:
        """What was kept comes back as rows; its child stores what the parent does not have."""
        memory = HostMemory(None, pinned=device.type == "cuda")
        tokens = Tokens.random(self.PROMPT, device)
        root = self.cached(memory, device, tokens)
        child = self.cached(memory, device, tokens, root)
        root.write(tmp_path / "root")
        child.write(tmp_path / "child")
        loaded_root = CachedPrompt.load(tmp_path / "root", None, memory)
        loaded = CachedPrompt.load(tmp_path / "child", loaded_root, memory)
        assert loaded.kept is None
        assert loaded.parent is loaded_root
        assert isinstance(loaded.rows, DerivedRows)
        # The tokens that it took from its parent are less than half of it.
        assert 0.5 < loaded.host_bytes / loaded_root.host_bytes < 0.6
        for entry in (loaded_root, loaded):
            for layer in (0, 1):
                want = tokens.kv(layer, 0, self.PROMPT)
                into = torch.full_like(want, torch.nan)
                Mover(entry.rows, np.arange(self.PROMPT), 0, None, device).into(layer, into)
                assert torch.equal(into, want)
