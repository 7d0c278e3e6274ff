"""Payloads between host memory and files: who stays, who leaves, what comes back, and what a crash leaves."""

import logging
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from sentencekv.reuse.catalog import Catalog, EntryGoneError, Payload, Record
from tests.cached import Parcel, add, embedding, files, kept, load, open_catalog, tokens

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["with a folder", "without one"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where payloads go when room is needed, or None."""
    return tmp_path if request.param == "with a folder" else None


def in_memory(catalog: Catalog, namespace: str = "a") -> int:
    return catalog.statistics(namespace).host_bytes


def here(catalog: Catalog, seeds: range, namespace: str = "a") -> list[int]:
    """Which of these prompts the catalog has, in memory or on disk."""
    return [seed for seed in seeds if catalog.same(namespace, tokens(seed), "") is not None]


class TestHostMemory:
    def test_those_not_used_for_longest_leave(self, folder: Path | None) -> None:
        with open_catalog(folder, 300) as catalog:
            made = [add(catalog, seed) for seed in range(3)]
            assert made[0][0] is not None
            catalog.payload(made[0][0])
            kept(catalog, 3)
            assert [parcel.dropped for _, parcel in made] == [False, True, False]
            kept(catalog, 4)
            assert [parcel.dropped for _, parcel in made] == [False, True, True]
            assert in_memory(catalog) == 300
            assert here(catalog, range(5)) == ([0, 1, 2, 3, 4] if folder else [0, 3, 4])

    def test_without_a_folder_they_are_gone(self) -> None:
        with open_catalog(None, 250) as catalog:
            first = kept(catalog, 0)
            kept(catalog, 1)
            kept(catalog, 2)
            with pytest.raises(EntryGoneError, match="90 tokens has left the catalog; look for another"):
                catalog.payload(first)
            assert first not in catalog.donors("a", tokens(0), embedding(0))

    def test_they_come_back_from_their_files_and_are_written_once(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 250) as catalog:
            records = [kept(catalog, seed) for seed in range(4)]
            assert len(files(tmp_path)) == 2
            for _ in range(3):
                for record in records:
                    payload = catalog.payload(record)
                    assert payload is catalog.payload(record)
                    assert in_memory(catalog) == 200
            written = {path: path.stat().st_ino for path in files(tmp_path)}
            assert len(written) == 4
        assert {path: path.stat().st_ino for path in files(tmp_path)} == written

    def test_what_cannot_fit_is_not_kept_and_nobody_leaves_for_it(self, folder: Path | None) -> None:
        with open_catalog(folder, 300, namespace_limit_bytes=250) as catalog:
            first = kept(catalog, 0)
            other = kept(catalog, 0, namespace="b")
            record, parcel = add(catalog, 1, 251)
            assert record is None
            assert not parcel.dropped
            assert here(catalog, range(2)) == [0]
            assert in_memory(catalog) == in_memory(catalog, "b") == 100
            with catalog.held(first), catalog.held(other):
                assert add(catalog, 2, 101)[0] is None
                assert add(catalog, 3, 100)[0] is not None
            assert add(catalog, 4, 250)[0] is not None

    def test_payloads_may_grow(self, folder: Path | None) -> None:
        """Their bytes are asked for when room is made."""
        with open_catalog(folder, 300) as catalog:
            _, parcel = add(catalog, 0)
            kept(catalog, 1)
            parcel._num_bytes = 250
            kept(catalog, 2)
            assert parcel.dropped
            assert in_memory(catalog) == 200

    def test_room_can_be_asked_for(self, folder: Path | None) -> None:
        with open_catalog(folder) as catalog:
            for seed in range(4):
                kept(catalog, seed)
                kept(catalog, seed, 70, namespace="b")
            assert catalog.make_room(0) == 0
            assert catalog.make_room(130, "b") == 140
            assert (in_memory(catalog), in_memory(catalog, "b")) == (400, 140)
            assert catalog.make_room(150) == 200, "of the one that holds most"
            assert catalog.make_room(200, "b") == 240, "its own first"
            assert (in_memory(catalog), in_memory(catalog, "b")) == (100, 0)
            assert catalog.make_room(100, "b") == 100
            with catalog.held(kept(catalog, 9)):
                kept(catalog, 10)
                assert catalog.make_room(1000) == 100
            assert in_memory(catalog) == 100
        assert catalog.make_room(100) == 0


class TestHolding:
    def test_what_is_held_stays(self, folder: Path | None) -> None:
        with open_catalog(folder, 300) as catalog:
            root = kept(catalog, 0)
            child = kept(catalog, 1, parent=root)
            with catalog.held(child) as payload, catalog.held(child):
                assert isinstance(payload, Parcel)
                kept(catalog, 2)
                kept(catalog, 3)
                assert not payload.dropped
                assert here(catalog, range(2)) == [0, 1]
                for record in (root, child):
                    with pytest.raises(ValueError, match="is held cannot be removed; leave the `held` block"):
                        catalog.remove(record)
                with pytest.raises(ValueError, match="is held"):
                    catalog.clear("a")
                assert here(catalog, range(2)) == [0, 1]
            kept(catalog, 4, 300)
            assert payload.dropped
            catalog.clear("a")

    def test_what_is_held_may_leave_no_room(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 250) as catalog:
            records = [kept(catalog, seed) for seed in range(3)]
            with ExitStack() as held:
                for record in records[1:]:
                    held.enter_context(catalog.held(record))
                with pytest.raises(MemoryError, match="needs 100 B of host memory, more than the bounds leave"):
                    catalog.payload(records[0])
            assert catalog.payload(records[0]).host_bytes == 100


class TestFamilies:
    """`Parcel` fails where a parent is dropped before its child, or a child is loaded without its parent."""

    def grow(self, catalog: Catalog) -> list[Record]:
        """0, needed by 1 and 3; 1 by 2."""
        root = kept(catalog, 0)
        child = kept(catalog, 1, parent=root)
        return [root, child, kept(catalog, 2, parent=child), kept(catalog, 3, parent=root)]

    def test_children_leave_before_their_parents(self, folder: Path | None) -> None:
        with open_catalog(folder, 400) as catalog:
            records = self.grow(catalog)
            assert [record.parent for record in records] == [None, *(records[at].key for at in (0, 1, 0))]
            catalog.payload(records[2])
            for seed in range(10, 14):
                kept(catalog, seed)
            assert here(catalog, range(4)) == ([0, 1, 2, 3] if folder else [])

    def test_what_a_child_needs_comes_with_it(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 400) as catalog:
            self.grow(catalog)
        with open_catalog(tmp_path, 400) as catalog:
            assert in_memory(catalog) == 0
            record = catalog.same("a", tokens(2), "")
            assert record is not None
            payload = catalog.payload(record)
            assert isinstance(payload, Parcel)
            assert in_memory(catalog) == 300
            kept(catalog, 10, 150)
            assert in_memory(catalog) == 350
            assert payload.dropped
            with pytest.raises(MemoryError), catalog.held(kept(catalog, 11, 200)):
                catalog.payload(record)
            catalog.payload(record)

    def test_removing_takes_children_along(self, folder: Path | None) -> None:
        with open_catalog(folder, 450) as catalog:
            records = self.grow(catalog)
            kept(catalog, 10, 50)
            catalog.persist()
            catalog.remove(records[1])
            assert here(catalog, range(11)) == [0, 3, 10]
            catalog.remove(records[1])
            catalog.remove(records[0])
            assert here(catalog, range(11)) == [10]
            if folder is not None:
                assert len(files(folder)) == 1

    def test_a_parent_must_be_there(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 250) as catalog:
            root = kept(catalog, 0)
            kept(catalog, 1, 200)
            with pytest.raises(ValueError, match="is not in host memory; hold it until its child is added"):
                catalog.add("a", tokens(2), [], Parcel(b"", 9), embedding(2), parent=root.key)
            catalog.remove(root)
            with pytest.raises(EntryGoneError, match=r"no entry \d+ to be a parent"):
                catalog.add("a", tokens(2), [], Parcel(b"", 9), embedding(2), parent=root.key)
            assert here(catalog, range(3)) == [1]

    def test_a_new_child_does_not_drive_its_parent_out(self, folder: Path | None) -> None:
        with open_catalog(folder, 250) as catalog:
            root = kept(catalog, 0)
            kept(catalog, 1)
            child = kept(catalog, 2, 150, parent=root)
            assert in_memory(catalog) == 250
            record, parcel = add(catalog, 3, 10, parent=child)
            assert record is None
            assert not parcel.dropped, "it is still the caller's"
            parcel.drop()


class TestDisk:
    def test_files_not_used_for_longest_go(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 100, disk_limit_bytes=250) as catalog:
            for seed in range(5):
                kept(catalog, seed)
            assert here(catalog, range(5)) == [2, 3, 4]
            assert catalog.statistics("a").disk_bytes == 200
        assert len(files(tmp_path)) == 2
        with open_catalog(tmp_path) as catalog:
            assert here(catalog, range(5)) == [3, 4]

    def test_a_file_of_what_is_in_memory_goes_alone(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 200, disk_limit_bytes=150) as catalog:
            records = [kept(catalog, seed) for seed in range(2)]
            catalog.persist()
            assert len(files(tmp_path)) == 1, "of the last used"
            for record in reversed(records):
                catalog.payload(record)
            kept(catalog, 2)
            assert here(catalog, range(3)) == [0, 1, 2]
            catalog.payload(records[0])
            kept(catalog, 3)
            assert here(catalog, range(4)) == [0, 2, 3] or here(catalog, range(4)) == [0, 3]

    def test_nobody_used_later_goes(self, tmp_path: Path) -> None:
        """The one that leaves memory is itself the oldest: it finds no room on the disk."""
        with open_catalog(tmp_path, 300, disk_limit_bytes=250) as catalog:
            old = kept(catalog, 0)
            for seed in (1, 2):
                kept(catalog, seed)
            catalog.persist()
            assert len(files(tmp_path)) == 2
            kept(catalog, 3)
            assert here(catalog, range(4)) == [1, 2, 3]
            with pytest.raises(EntryGoneError):
                catalog.payload(old)

    def test_what_is_wanted_does_not_leave_for_room_made_for_it(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, 100, disk_limit_bytes=100) as catalog:
            first = kept(catalog, 0)
            kept(catalog, 1)
            assert here(catalog, range(2)) == [0, 1]
            assert catalog.payload(first).host_bytes == 100
            assert here(catalog, range(2)) == [0], "what it drove out had no room on the disk"

    def test_children_go_before_their_parents(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path, disk_limit_bytes=300) as catalog:
            root = kept(catalog, 0)
            child = kept(catalog, 1, parent=root)
            kept(catalog, 2, parent=child)
            kept(catalog, 3)
        with open_catalog(tmp_path, disk_limit_bytes=300) as catalog:
            assert here(catalog, range(4)) == [0, 1, 3]

    def test_bounds_may_be_tighter_than_they_were(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            for seed in range(4):
                kept(catalog, seed)
                kept(catalog, seed, 50, namespace="b")
        with open_catalog(tmp_path, disk_limit_bytes=450, namespace_disk_limit_bytes=210) as catalog:
            assert (here(catalog, range(4)), here(catalog, range(4), "b")) == ([2, 3], [0, 1, 2, 3])
        with open_catalog(tmp_path, disk_limit_bytes=0) as catalog:
            assert (here(catalog, range(4)), here(catalog, range(4), "b")) == ([], [])
        assert files(tmp_path) == []

    def test_what_cannot_be_written_is_lost_and_said_to_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(parcel: Parcel, path: Path) -> None:
            path.write_bytes(b"some")
            raise OSError(28, "No space left on device")

        with open_catalog(tmp_path, 250) as catalog:
            first = kept(catalog, 0)
            child = kept(catalog, 1, parent=first)
            with monkeypatch.context() as patch:
                patch.setattr(Parcel, "write", full)
                with caplog.at_level(logging.WARNING):
                    kept(catalog, 2, 150)
                assert "a cached prompt of 90 tokens is lost: [Errno 28] No space left" in caplog.text
                assert here(catalog, range(3)) == [0, 2]
                with pytest.raises(OSError, match="No space"):
                    catalog.persist()
                assert files(tmp_path) == []
            with pytest.raises(EntryGoneError):
                catalog.payload(child)
            catalog.persist()
            assert len(files(tmp_path)) == 2
        with open_catalog(tmp_path) as catalog:
            assert here(catalog, range(3)) == [0, 2]

    def test_a_record_that_cannot_be_written_leaves_no_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_catalog(tmp_path) as catalog:
            kept(catalog, 0)
            with monkeypatch.context() as patch:
                patch.setattr(catalog._records, "set_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
                with pytest.raises(OSError, match="full"):
                    catalog.persist()
            assert files(tmp_path) == []
            assert catalog.statistics("a").disk_bytes == 0

    def test_a_damaged_file_takes_its_entry_and_its_children_along(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            root = kept(catalog, 0)
            kept(catalog, 1, parent=root)
            kept(catalog, 2, parent=root)
            kept(catalog, 3)
        path = next(path for path in files(tmp_path) if path.name.startswith(f"{root.key}."))
        path.write_bytes(b"x" * path.stat().st_size)
        with open_catalog(tmp_path) as catalog:
            record = catalog.same("a", tokens(1), "")
            assert record is not None
            with pytest.raises(EntryGoneError, match=r"so its entry is removed: .* is not what was written"):
                catalog.payload(record)
            assert here(catalog, range(4)) == [3]
            assert len(files(tmp_path)) == 1


class TestFailures:
    """A disk that cannot be written to loses what it loses, and nobody's answer."""

    def test_uses_that_cannot_be_noted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with open_catalog(tmp_path) as catalog:
            record = kept(catalog, 0)
            catalog._records._database.execute("PRAGMA query_only = ON")
            assert catalog.payload(record) is not None
            assert "is not noted" in caplog.text
            catalog.remove(record)
            assert catalog.same("a", tokens(0)) is None
            assert "are forgotten" in caplog.text
            catalog._records._database.execute("PRAGMA query_only = OFF")
        with open_catalog(tmp_path) as catalog:
            assert catalog.same("a", tokens(0)) is None, "a record without a file"

    def test_files_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        """In a folder that others can read, too."""
        folder = tmp_path / "open"
        folder.mkdir(mode=0o755)
        with open_catalog(folder) as catalog:
            kept(catalog, 0)
            catalog.persist()
            paths = list(folder.rglob("*"))
            assert len(paths) >= 5
            for path in paths:
                assert path.stat().st_mode & 0o077 == 0, path


class TestReopening:
    def test_everything_is_as_it_was(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            root = kept(catalog, 0)
            made = [root, kept(catalog, 1, parent=root), kept(catalog, 2, approximate=True)]
            made += [kept(catalog, 0, 60, namespace="b")]
            parcels = [catalog.payload(record) for record in made]
        assert all(isinstance(parcel, Parcel) and parcel.dropped for parcel in parcels)
        with open_catalog(tmp_path) as catalog:
            for record, seed in zip(made, (0, 1, 2, 0), strict=True):
                again = catalog.same(record.namespace, tokens(seed), "")
                assert again is not None
                assert (again.key, again.parent, again.approximate) == (record.key, record.parent, record.approximate)
                assert again.token_ids.tolist() == record.token_ids.tolist()
                assert again.ends.tolist() == record.ends.tolist()
            assert {each.key for each in catalog.donors("a", tokens(1), embedding(1))} == {made[0].key, made[1].key}
            assert catalog.statistics("b").disk_bytes == 60
            with pytest.raises(ValueError, match="is held"), catalog.held(made[1]):
                catalog.remove(made[0])

    def test_the_order_of_use_outlasts_the_process(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            records = [kept(catalog, seed) for seed in range(4)]
            for i in (2, 0, 3, 1):
                catalog.payload(records[i])
        for expected in ([0, 1, 3], [1, 3], [1]):
            with open_catalog(tmp_path, disk_limit_bytes=100 * len(expected)) as catalog:
                assert here(catalog, range(4)) == expected

    def test_strays_are_deleted_and_what_is_not_ours_stays(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            kept(catalog, 0)
            kept(catalog, 1)
        mine = files(tmp_path)[0].parent
        strays = [mine / "123.payload", mine / "5.partial", mine / ".5.partial.1a2b.partial"]
        ours = [mine / "notes.txt", tmp_path / "7.payload"]
        for path in (*strays, *ours):
            path.write_bytes(b"x")
        first, second = (path for path in files(tmp_path) if path not in (*strays, *ours))
        first.unlink()
        second.write_bytes(second.read_bytes() + b"y")
        with open_catalog(tmp_path) as catalog:
            assert here(catalog, range(2)) == []
            assert files(tmp_path) == [ours[0]]
            assert ours[1].exists()
            catalog.clear("a")
            assert ours[0].exists()

    def test_without_a_folder_nothing_is_kept(self) -> None:
        with open_catalog() as catalog:
            _, parcel = add(catalog, 0)
            catalog.persist()
            assert not parcel.dropped
        assert parcel.dropped

    def test_closing_lets_go_of_everything_even_if_it_cannot_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        catalog = open_catalog(tmp_path)
        _, parcel = add(catalog, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "broken")))
            with pytest.raises(OSError, match="broken"):
                catalog.close()
        assert parcel.dropped
        catalog.close()
        open_catalog(tmp_path).close()


def test_a_loader_may_ask_for_room(tmp_path: Path) -> None:
    """What is being loaded does not leave for it, nor what it needs."""

    def hungry(path: Path, record: Record, parent: Payload | None) -> Parcel:
        parcel = load(path, record, parent)
        catalog.make_room(1000)
        return parcel

    with open_catalog(tmp_path) as catalog:
        child = kept(catalog, 1, parent=kept(catalog, 0))
        kept(catalog, 2)
    with open_catalog(tmp_path, load=hungry) as catalog:
        others = [record for record in catalog.donors("a", tokens(2), embedding(2)) if record.key != child.key]
        catalog.payload(others[0])
        payload = catalog.payload(child)
        assert isinstance(payload, Parcel)
        assert not payload.dropped
        assert in_memory(catalog) == 200


def test_a_loader_that_runs_out_of_memory_costs_nothing(tmp_path: Path) -> None:
    """The file is not at fault."""
    short = True

    def sometimes(path: Path, record: Record, parent: object) -> Parcel:
        if short:
            raise MemoryError("no")
        return load(path, record, None)

    with open_catalog(tmp_path) as catalog:
        kept(catalog, 0)
    with open_catalog(tmp_path, load=sometimes) as catalog:
        record = catalog.same("a", tokens(0), "")
        assert record is not None
        with pytest.raises(MemoryError):
            catalog.payload(record)
        short = False
        assert catalog.payload(record).host_bytes == 100


def test_a_process_that_is_killed_leaves_whole_entries() -> None:
    """kill -9 at many moments; what tests/crash_catalog.py finds afterwards is whole, and what was written is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # In memory where that can be: hundreds of flushes take long, and a process that is killed needs none.
    fast = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as folder:
        command = [sys.executable, "-m", "tests.crash_catalog", folder, "5"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout) > 25
