"""Records of what is cached: what is kept, whose it is, and that each change is made wholly or not at all."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sentencekv.reuse.records import CatalogError, Record, Records, Row

ROOT = Path(__file__).parent.parent


def make_row(key: int, used: int, parent: int | None = None, namespace: str = "a", approximate: bool = False) -> Row:
    ids = np.arange(key % 1_000_000, key % 1_000_000 + 50, dtype=np.int32)
    record = Record(key, namespace, ids, np.array([20, 50], dtype=np.int32), approximate, parent)
    return Row(record, np.full(3, ids[0], dtype=np.float32), used, 500, None)


def open_records(folder: Path | None, **changes: object) -> Records:
    return Records(folder, **{"owner": "ours", "embedding_size": 3, **changes})


def keys(records: Records) -> list[int]:
    return [row.record.key for row in records.rows()]


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_come_back_the_last_used_first(on_disk: bool, tmp_path: Path) -> None:
    records = open_records(tmp_path / "new" / "folder" if on_disk else None)
    large = (1 << 62) - 1
    first, second = make_row(5, 1, namespace="häß\n"), make_row(7, 2, approximate=True)
    records.insert(first, {})
    records.insert(second, {})
    records.insert(make_row(large, 3, parent=5), {5: 4})
    records.set_file(7, 12, 34)
    if on_disk:
        records.close()
        records = open_records(tmp_path / "new" / "folder")
    rows = list(records.rows())
    assert [(row.record.key, row.used) for row in rows] == [(5, 4), (large, 3), (7, 2)]
    assert [(row.record.parent, row.record.approximate) for row in rows] == [(None, False), (5, False), (None, True)]
    assert [(row.host_bytes, row.file_bytes) for row in rows] == [(500, None), (500, None), (12, 34)]
    for row, given in ((rows[0], first), (rows[2], second)):
        assert row.record.namespace == given.record.namespace
        assert row.record.token_ids.dtype == row.record.ends.dtype == np.int32
        assert np.array_equal(row.record.token_ids, given.record.token_ids)
        assert np.array_equal(row.record.ends, given.record.ends)
        assert np.array_equal(row.embedding, given.embedding)
        assert not row.record.token_ids.flags.writeable
    records.touch({large: 6, 7: 5})
    assert keys(records) == [large, 7, 5]
    records.delete([large, 5])
    assert keys(records) == [7]
    records.close()


def test_a_change_is_made_wholly_or_not_at_all(tmp_path: Path) -> None:
    records = open_records(tmp_path)
    records.insert(make_row(1, 1), {})
    records.insert(make_row(2, 2, parent=1), {})
    with pytest.raises(OSError, match="FOREIGN KEY"):
        records.delete([1, 2])
    with pytest.raises(OSError, match="FOREIGN KEY"):
        records.insert(make_row(4, 4, parent=3), {1: 9})
    with pytest.raises(OSError, match="UNIQUE"):
        records.insert(make_row(2, 4), {1: 9})
    assert [(row.record.key, row.used) for row in records.rows()] == [(2, 2), (1, 1)]
    records.close()


def test_nothing_of_a_deleted_prompt_stays(tmp_path: Path) -> None:
    records = open_records(tmp_path)
    row = make_row(123_456, 1)
    records.insert(row, {})
    records.delete([123_456])
    records.close()
    needle = row.record.token_ids[:8].tobytes()
    assert not [path for path in tmp_path.iterdir() if needle in path.read_bytes()]


def test_others_are_refused(tmp_path: Path) -> None:
    open_records(tmp_path).close()
    with pytest.raises(CatalogError, match="belongs to 'ours' with embeddings of 3 numbers, and this is 'theirs'"):
        open_records(tmp_path, owner="theirs")
    with pytest.raises(CatalogError, match="with 4; use another folder"):
        open_records(tmp_path, embedding_size=4)
    database = sqlite3.connect(tmp_path / "catalog.sqlite3")
    database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(CatalogError, match="has version 2, and this release reads version 1; upgrade"):
        open_records(tmp_path)


def test_other_files_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE records (mine TEXT)")
    database.close()
    content = path.read_bytes()
    with pytest.raises(CatalogError, match="is not a catalog of sentencekv"):
        open_records(tmp_path)
    assert path.read_bytes() == content
    path.write_text("a text that is long enough to be a database, if it were one" * 20)
    with pytest.raises(OSError, match="cannot be read or written: file is not a database"):
        open_records(tmp_path)
    path.unlink()
    open_records(tmp_path).close()


def test_one_at_a_time(tmp_path: Path) -> None:
    """In this process or another; whoever is refused changes nothing, and a lock goes with its process."""
    code = f"""
import os, sys
from pathlib import Path
from sentencekv.reuse.records import CatalogError, Records
def attempt():
    try:
        return Records(Path({str(tmp_path)!r}), owner="ours", embedding_size=3)
    except CatalogError as error:
        print(error, flush=True)
attempt()
sys.stdin.readline()
records = attempt()
print("mine", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""
    records = open_records(tmp_path)
    records.insert(make_row(1, 1), {})
    with pytest.raises(CatalogError, match="is open already"):
        open_records(tmp_path)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert "is open already, here or in another process; close it there" in other.stdout.readline()
        assert keys(records) == [1]
        records.close()
        print(file=other.stdin, flush=True)
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(CatalogError, match="is open already"):
            open_records(tmp_path)
        print(file=other.stdin, flush=True)
        assert other.wait() == -9
    records = open_records(tmp_path)
    assert keys(records) == [1]
    records.close()


def test_only_its_user_may_read_it(tmp_path: Path) -> None:
    open_records(tmp_path / "cache").close()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_database_that_fails_is_an_operating_system_error(tmp_path: Path) -> None:
    records = open_records(tmp_path)
    records._database.execute("PRAGMA max_page_count = 8")
    with pytest.raises(OSError, match="full"):
        records.insert(make_row(1, 1)._replace(embedding=np.zeros(100_000, dtype=np.float32)), {})
    assert keys(records) == []
    records.insert(make_row(2, 1), {})
    assert keys(records) == [2]
    records.close()
