"""Records of what is cached, in SQLite: what a catalog knows again after the process ended, however it did.

One process at a time: a lock on a file beside the database says whose it is. Every method is one transaction, so that
a crash leaves the state before it or after it.

Knows rows and one folder; nothing of payloads, limits or likeness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_VERSION = 1
_APPLICATION = 0x534B5643
"""What SQLite writes into the header of our databases: 'SKVC'."""
# Prompts have a table of their own: SQLite writes a whole row for each change, and `used` changes with every use.
_SCHEMA = f"""
BEGIN;
CREATE TABLE catalog (owner TEXT NOT NULL, embedding_size INTEGER NOT NULL);
CREATE TABLE records (
    key INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    approximate INTEGER NOT NULL,
    recipe TEXT NOT NULL,
    parent INTEGER REFERENCES records (key),
    used INTEGER NOT NULL,
    host_bytes INTEGER NOT NULL,
    file_bytes INTEGER
);
CREATE TABLE prompts (
    key INTEGER PRIMARY KEY REFERENCES records (key) ON DELETE CASCADE,
    token_ids BLOB NOT NULL,
    ends BLOB NOT NULL,
    embedding BLOB NOT NULL
);
CREATE INDEX children ON records (parent);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class CatalogError(ValueError):
    """The catalog cannot be used like this: the message says why, and what can be done."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A prompt that is cached. Its arrays must not be written to."""

    key: int
    """Random: keys tell nothing of how many there are."""
    namespace: str
    token_ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    """Sentence ends: token positions in ascending order."""
    approximate: bool
    """Whether its rows differ from what a full prefill of the prompt gives."""
    parent: int | None
    """Key of the record whose rows it needs."""
    recipe: str = ""
    """What an approximation was made with; empty for what is exact."""


class Row(NamedTuple):
    """A record with what the catalog notes beside it."""

    record: Record
    embedding: NDArray[np.float32]
    """Of length 1 in the Euclidean norm."""
    used: int
    """When it was last used, by the catalog's clock, which counts uses."""
    host_bytes: int
    """Host memory that its payload held when it was added or written."""
    file_bytes: int | None
    """What its payload's file takes; None: it has none."""


class Records:
    """The table of records, in a folder or, without one, in memory.

    Raises CatalogError for a database of another program, owner, embedding size or newer release, and while another
    process has it open. All methods raise OSError if the database cannot be read or written. Not thread-safe.
    """

    def __init__(self, folder: Path | None, *, owner: str, embedding_size: int) -> None:
        """`owner`: what the payloads belong to, for example a hash of the model's weights and settings."""
        self._name = "in memory" if folder is None else repr(str(folder))
        with contextlib.ExitStack() as undo:
            self._lock = undo.enter_context(self._locked(folder)) if folder is not None else None
            path = ":memory:" if folder is None else str(folder / "catalog.sqlite3")
            with self._errors_named("; if it is damaged, delete the folder or use another one"):
                # One thread at a time, but not always the same: the caller sees to it.
                self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                undo.callback(self._database.close)
                self._prepare(owner, embedding_size)
            undo.pop_all()

    def _locked(self, folder: Path) -> IO[bytes]:
        # What people asked is in there: nobody else's to read.
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise CatalogError(f"a catalog needs a folder, and {self._name} is or runs through a file") from None
        for name in ("lock", "catalog.sqlite3"):  # the folder may be one that others can read
            (folder / name).touch(mode=0o600)
        lock = (folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise CatalogError(
                f"the catalog {self._name} is open already, here or in another process; close it there, or give this "
                "one a folder of its own"
            ) from None
        return lock

    def _prepare(self, owner: str, embedding_size: int) -> None:
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != _APPLICATION and (application or version or tables):
            raise CatalogError(f"the database in {self._name} is not a catalog of sentencekv; use another folder")
        if version > _VERSION:
            raise CatalogError(
                f"the catalog {self._name} has version {version}, and this release reads version {_VERSION}; upgrade "
                "sentencekv, or use another folder"
            )
        self._database.execute("PRAGMA journal_mode = WAL")
        # After a power failure the last transactions may be missing; the order of writes makes that harmless.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA foreign_keys = ON")
        # A prompt that is deleted is not to be found in the file either.
        self._database.execute("PRAGMA secure_delete = ON")
        if not tables:
            self._database.executescript(_SCHEMA)
        ours = (owner, embedding_size)
        theirs = self._database.execute("SELECT owner, embedding_size FROM catalog").fetchone()
        if theirs is None:
            self._database.execute("INSERT INTO catalog VALUES (?, ?)", ours)
        elif theirs != ours:
            raise CatalogError(
                f"the catalog {self._name} belongs to {theirs[0]!r} with embeddings of {theirs[1]} numbers, and this "
                f"is {owner!r} with {embedding_size}; use another folder, or delete that one"
            )

    @contextlib.contextmanager
    def _errors_named(self, remedy: str = "") -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"the catalog {self._name} cannot be read or written: {error}{remedy}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors_named():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # a full disk ends it by itself
                    self._database.execute("ROLLBACK")
                raise

    def insert(self, row: Row, used: Mapping[int, int]) -> None:
        """Add a row, and set when others were used."""
        record = row.record
        numbers = (record.approximate, record.recipe, record.parent, row.used, row.host_bytes, row.file_bytes)
        arrays = (record.token_ids.astype("<i4"), record.ends.astype("<i4"), row.embedding.astype("<f4"))
        with self._transaction() as database:
            database.execute(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (record.key, record.namespace, *numbers)
            )
            blobs = [array.tobytes() for array in arrays]
            database.execute("INSERT INTO prompts VALUES (?, ?, ?, ?)", (record.key, *blobs))
            self._set_used(database, used)

    def touch(self, used: Mapping[int, int]) -> None:
        """Set when records were used, by their keys."""
        with self._transaction() as database:
            self._set_used(database, used)

    def _set_used(self, database: sqlite3.Connection, used: Mapping[int, int]) -> None:
        database.executemany("UPDATE records SET used = ? WHERE key = ?", [(time, key) for key, time in used.items()])

    def set_file(self, key: int, host_bytes: int, file_bytes: int | None) -> None:
        """Note that a record's payload has a file, or that it has none any more."""
        with self._transaction() as database:
            change = "UPDATE records SET host_bytes = ?, file_bytes = ? WHERE key = ?"
            database.execute(change, (host_bytes, file_bytes, key))

    def delete(self, keys: Iterable[int]) -> None:
        """Forget records, children before their parents."""
        with self._transaction() as database:
            database.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def rows(self) -> Iterator[Row]:
        """All rows, the last used first."""
        with self._errors_named():
            numbers = self._database.execute("SELECT * FROM records ORDER BY used DESC").fetchall()
            for key, namespace, approximate, recipe, parent, used, host_bytes, file_bytes in numbers:
                found = self._database.execute("SELECT token_ids, ends, embedding FROM prompts WHERE key = ?", (key,))
                token_ids, ends, embedding = found.fetchone()
                record = Record(
                    key,
                    namespace,
                    np.frombuffer(token_ids, dtype="<i4").astype(np.int32, copy=False),
                    np.frombuffer(ends, dtype="<i4").astype(np.int32, copy=False),
                    bool(approximate),
                    parent,
                    recipe,
                )
                vector = np.frombuffer(embedding, dtype="<f4").astype(np.float32, copy=False)
                yield Row(record, vector, used, host_bytes, file_bytes)

    def close(self) -> None:
        """Let go of the database and the lock."""
        with self._errors_named():
            self._database.close()
        if self._lock is not None:
            self._lock.close()
