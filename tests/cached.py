"""Payloads for tests of catalogs: some bytes that know whose they are, and notice what a catalog must not do."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sentencekv.reuse.catalog import Catalog, Payload, Record

SIZE = 4
"""Of embeddings."""


class Parcel:
    """A payload: so many bytes in host memory, and as many in its file."""

    def __init__(self, content: bytes, num_bytes: int, parent: Payload | None = None) -> None:
        self._content = content
        self._num_bytes = num_bytes
        self._children: list[Parcel] = []
        self.dropped = False
        if parent is not None:
            assert isinstance(parent, Parcel)
            assert not parent.dropped, "a child is made while its parent is there"
            parent._children.append(self)

    @property
    def host_bytes(self) -> int:
        assert not self.dropped
        return self._num_bytes

    def write(self, path: Path) -> None:
        assert not self.dropped
        assert len(self._content) <= self._num_bytes
        path.write_bytes(self._content.ljust(self._num_bytes, b"."))

    def drop(self) -> None:
        assert not self.dropped, "dropped once"
        assert all(child.dropped for child in self._children), "children are dropped before their parents"
        self.dropped = True


def content_of(record: Record) -> bytes:
    return f"{record.token_ids.sum()} {record.approximate} {record.namespace}".encode()


def load(path: Path, record: Record, parent: Payload | None) -> Parcel:
    content = path.read_bytes()
    expected = content_of(record)
    if not content.startswith(expected):
        raise ValueError(f"{path.name} is not what was written")
    assert (parent is None) == (record.parent is None)
    return Parcel(expected, len(content), parent)


def tokens(seed: int, count: int = 90) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 5000, count).astype(np.int32)


def embedding(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def open_catalog(folder: Path | None = None, limit_bytes: int | None = None, **changes: object) -> Catalog:
    settings = {"owner": "ours", "load": load, "limit_bytes": limit_bytes, "embedding_size": SIZE, **changes}
    return Catalog(folder, **settings)  # type: ignore[arg-type]


def add(
    catalog: Catalog,
    seed: int,
    num_bytes: int = 100,
    namespace: str = "a",
    *,
    parent: Record | None = None,
    approximate: bool = False,
) -> tuple[Record | None, Parcel]:
    """Cache the prompt of that seed."""
    ids = tokens(seed)
    content = f"{ids.sum()} {approximate} {namespace}".encode()
    above = None if parent is None else catalog.payload(parent)
    parcel = Parcel(content, num_bytes, above)
    key = None if parent is None else parent.key
    given = (namespace, ids, [40, 90], parcel, embedding(seed))
    return catalog.add(*given, approximate=approximate, parent=key), parcel


def kept(catalog: Catalog, seed: int, num_bytes: int = 100, namespace: str = "a", **changes: object) -> Record:
    """As `add`, where there is room."""
    record, _ = add(catalog, seed, num_bytes, namespace, **changes)  # type: ignore[arg-type]
    assert record is not None
    return record


def files(folder: Path) -> list[Path]:
    """All payloads' files, and what is beside them."""
    return sorted(path for path in (folder / "namespaces").glob("**/*") if path.is_file())
