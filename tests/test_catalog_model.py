"""The catalog against a model of it: lists, and one entry after another."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sentencekv.reuse.catalog import Catalog, Payload, Record
from tests.cached import Parcel, embedding, files, open_catalog, tokens

HOST, OWN_HOST, DISK, OWN_DISK = 10, 7, 15, 11
"""Bounds, for entries of 1 to 6 bytes: something leaves all the time."""
Name = tuple[str, int, bool]
"""Namespace, seed, and whether it is approximate."""


@dataclasses.dataclass(eq=False)
class Known:
    """What the model knows of an entry."""

    name: Name
    num_bytes: int
    parent: Known | None
    used: int = 0
    in_memory: bool = True
    on_disk: bool = False
    held: int = 0

    @property
    def space(self) -> str:
        return self.name[0]

    @property
    def lineage(self) -> list[Known]:
        return [self, *(self.parent.lineage if self.parent is not None else [])]


def total_of(entries: list[Known]) -> int:
    return sum(entry.num_bytes for entry in entries)


class Model:
    """Entries in a list; whoever leaves is looked for from the start each time."""

    def __init__(self, has_folder: bool) -> None:
        self.has_folder = has_folder
        self.entries: list[Known] = []
        self._clock = 0

    def use(self, entry: Known) -> None:
        for each in entry.lineage:
            self._clock += 1
            each.used = self._clock

    def forget(self, entry: Known) -> None:
        self.entries = [each for each in self.entries if entry not in each.lineage]

    def add(self, entry: Known) -> bool:
        if not self._make_room(entry.space, entry.num_bytes, entry.lineage):
            return False
        self.entries.append(entry)
        self.use(entry)
        return True

    def load(self, entry: Known) -> bool:
        self.use(entry)
        missing = [each for each in entry.lineage if not each.in_memory]
        if missing and not self._make_room(entry.space, total_of(missing), entry.lineage):
            return False
        for each in missing:
            each.in_memory = True
        return True

    def release(self, space: str, num_bytes: int) -> int:
        movable = self._movable([])
        chosen = _leaving(space, movable, 0, min(num_bytes, total_of(movable)))
        assert chosen is not None
        freed = total_of(chosen)
        for each in chosen:
            self._evict(each)
        return freed

    def persist(self) -> None:
        for each in sorted(self.entries, key=lambda each: -each.used):
            if self.has_folder and each.in_memory and not each.on_disk:
                each.on_disk = self._make_disk_room(each)

    def restart(self) -> None:
        for each in self.entries:
            each.in_memory = False
        for each in list(self.entries):
            if not each.on_disk:
                self.forget(each)

    def _movable(self, keep: list[Known]) -> list[Known]:
        return [each for each in self.entries if each.in_memory and not each.held and each not in keep]

    def _make_room(self, space: str, num_bytes: int, keep: list[Known]) -> bool:
        here = [each for each in self.entries if each.in_memory]
        own = num_bytes + total_of([each for each in here if each.space == space]) - OWN_HOST
        chosen = _leaving(space, self._movable(keep), own, num_bytes + total_of(here) - HOST)
        for each in chosen or []:
            self._evict(each)
        return chosen is not None

    def _evict(self, entry: Known) -> None:
        entry.on_disk = entry.on_disk or (self.has_folder and self._make_disk_room(entry))
        entry.in_memory = False
        if not entry.on_disk:
            self.forget(entry)

    def _make_disk_room(self, writer: Known) -> bool:
        there = [each for each in self.entries if each.on_disk]
        own = writer.num_bytes + total_of([each for each in there if each.space == writer.space]) - OWN_DISK
        older = [each for each in there if each.used < writer.used]
        chosen = _leaving(writer.space, older, own, writer.num_bytes + total_of(there) - DISK)
        for each in chosen or []:
            each.on_disk = False
            if not each.in_memory:
                self.forget(each)
        return chosen is not None


def _leaving(space: str, candidates: list[Known], own: int, total: int) -> list[Known] | None:
    """With two namespaces: those of one's own, the last used last, and then the other's."""
    chosen: list[Known] = []
    for each in sorted(candidates, key=lambda each: (each.space != space, each.used)):
        if own <= 0 and total <= 0:
            break
        chosen.append(each)
        total -= each.num_bytes
        own -= each.num_bytes if each.space == space else 0
    return chosen if own <= 0 and total <= 0 else None


class Machine(RuleBasedStateMachine):
    """Two namespaces, with a folder and without, closed and killed."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.records: dict[Name, Record] = {}
        self.holds: list[tuple[Known, contextlib.ExitStack]] = []

    @initialize(has_folder=st.booleans())
    def start(self, has_folder: bool) -> None:
        self.model = Model(has_folder)
        self.catalog = self.opened()

    def opened(self) -> Catalog:
        bounds = {"namespace_limit_bytes": OWN_HOST, "disk_limit_bytes": DISK, "namespace_disk_limit_bytes": OWN_DISK}
        return open_catalog(self.root if self.model.has_folder else None, HOST, load=self.load, **bounds)

    def load(self, path: Path, record: Record, parent: Payload | None) -> Parcel:
        assert (parent is None) == (record.parent is None)
        return Parcel(b"", len(path.read_bytes()), parent)

    def teardown(self) -> None:
        for _, held in self.holds:
            held.close()
        self.catalog.close()
        shutil.rmtree(self.root)

    def pick(self, which: int) -> Known:
        return self.model.entries[which % len(self.model.entries)]

    @rule(
        name=st.tuples(st.sampled_from("ab"), st.integers(0, 7), st.booleans()),
        num_bytes=st.integers(1, 6),
        which=st.none() | st.integers(0, 99),
    )
    def add(self, name: Name, num_bytes: int, which: int | None) -> None:
        space, seed, approximate = name
        if name in {each.name for each in self.model.entries}:
            return
        parents = [e for e in self.model.entries if e.space == space and e.in_memory and not e.name[2]]
        parent = parents[which % len(parents)] if parents and which is not None else None
        key = above = None
        if parent is not None:
            key = self.records[parent.name].key
            above = self.catalog._tiers.space(space).entries[key].payload
        parcel = Parcel(b"", num_bytes, above)
        given = (space, tokens(seed), [90], parcel, embedding(seed))
        record = self.catalog.add(*given, approximate=approximate, parent=key)
        assert self.model.add(Known(name, num_bytes, parent)) == (record is not None)
        if record is None:
            parcel.drop()
        else:
            self.records[name] = record

    @precondition(lambda self: self.model.entries)
    @rule(which=st.integers(0, 99), hold=st.booleans())
    def use(self, which: int, hold: bool) -> None:
        entry = self.pick(which)
        record = self.records[entry.name]
        if not self.model.load(entry):
            with pytest.raises(MemoryError):
                self.catalog.payload(record)
            return
        held = contextlib.ExitStack()
        assert held.enter_context(self.catalog.held(record)).host_bytes == entry.num_bytes
        if hold and len(self.holds) < 2:
            self.holds.append((entry, held))
            for each in entry.lineage:
                each.held += 1
        else:
            held.close()

    @precondition(lambda self: self.holds)
    @rule()
    def let_go(self) -> None:
        entry, held = self.holds.pop(0)
        held.close()
        for each in entry.lineage:
            each.held -= 1

    @precondition(lambda self: self.model.entries)
    @rule(which=st.integers(0, 99))
    def remove(self, which: int) -> None:
        entry = self.pick(which)
        if any(each.held for each in self.model.entries if entry in each.lineage):
            with pytest.raises(ValueError, match="held"):
                self.catalog.remove(self.records[entry.name])
            return
        self.catalog.remove(self.records[entry.name])
        self.model.forget(entry)

    @rule(space=st.sampled_from("ab"), num_bytes=st.integers(1, 12))
    def make_room(self, space: str, num_bytes: int) -> None:
        assert self.catalog.make_room(num_bytes, space) == self.model.release(space, num_bytes)

    @rule()
    def persist(self) -> None:
        self.catalog.persist()
        self.model.persist()

    @precondition(lambda self: not self.holds)
    @rule(is_killed=st.booleans())
    def reopen(self, is_killed: bool) -> None:
        if is_killed:
            self.catalog._tiers.drop()
            self.catalog._records.close()
        else:
            self.catalog.close()
            self.model.persist()
        self.model.restart()
        self.catalog = self.opened()

    @invariant()
    def agree(self) -> None:
        for space in "ab":
            theirs = [each for each in self.model.entries if each.space == space]
            expected = {self.records[each.name].key: (each.in_memory, each.on_disk) for each in theirs}
            ours = self.catalog._tiers.space(space).entries
            assert {key: (e.payload is not None, e.file_bytes is not None) for key, e in ours.items()} == expected
            statistics = self.catalog.statistics(space)
            assert statistics.host_bytes == total_of([each for each in theirs if each.in_memory]) <= OWN_HOST
            assert statistics.disk_bytes == total_of([each for each in theirs if each.on_disk]) <= OWN_DISK
            exact = {self.records[each.name].key for each in theirs if not each.name[2]}
            for seed in (0, 5):
                donors = self.catalog.donors(space, tokens(seed), embedding(seed), 99)
                assert {record.key for record in donors} == exact
                same = self.catalog.same(space, tokens(seed), "")
                kinds = [each.name[2] for each in theirs if each.name[1] == seed]
                assert (None if same is None else same.approximate) == (min(kinds) if kinds else None)
                assert same is None or same.approximate or donors[0] is same
        assert total_of([each for each in self.model.entries if each.in_memory]) <= HOST
        on_disk = [each for each in self.model.entries if each.on_disk]
        assert total_of(on_disk) <= DISK
        names = {f"{self.records[each.name].key}.payload" for each in on_disk}
        assert {path.name for path in files(self.root)} == names


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase
