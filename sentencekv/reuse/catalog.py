"""What is cached for whom: prompts with their payloads, in host memory and in files, bounded, and found by likeness.

Knows token ids, sentence ends, embeddings, bytes, files and the order of use; nothing of models, KV or sessions: a
payload is whatever can be written, dropped and loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from sentencekv.reuse.index import load_faiss
from sentencekv.reuse.namespace import Entry, Namespace, Payload, digest, holding
from sentencekv.reuse.records import CatalogError, Record, Records
from sentencekv.reuse.tiers import Bounds, EntryGoneError, Loader, Tiers

_LOG = logging.getLogger(__name__)

__all__ = ["Catalog", "CatalogError", "EntryGoneError", "Loader", "Payload", "Record", "Statistics"]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one namespace; what is counted begins when the catalog is opened."""

    entries: int
    approximate_entries: int
    """Among them."""
    host_bytes: int
    disk_bytes: int
    hits: int
    """Calls of `same` that found the prompt."""
    misses: int
    """Calls of `same` that did not."""
    donor_hits: int
    """Calls of `donors` that found any."""
    donor_misses: int
    """Calls of `donors` that found none."""


class Catalog:
    """Prompts and their payloads, by namespace; when bytes are short, those not used for longest leave.

    A payload leaves host memory for a file if there is a folder, else the entry goes; an entry with a file alone goes
    when the disk's bytes are short. An entry whose rows others need, their parent, outlasts them in either place.

    **Namespaces** have nothing in common but the process and the bounds. Each has entries, an index, statistics and a
    folder of its own; no method looks into two, and keys are random. Who adds makes room among its own entries first,
    then takes from the namespace that holds most. So this is what one can notice of others: while all together are at
    a common bound, some of its entries leave, and room takes longer to make or is not to be had. Where the namespaces'
    own bounds add up to no more than the common ones, that does not happen.

    **Approximate** entries are found by `same` alone, and are nobody's parent.

    **Crashes** lose what was not written, no more; what is found afterwards is whole.

    One process at a time has a folder, and one thread at a time calls a catalog. Methods raise OSError if the folder
    cannot be read or written, ValueError after `close`.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        owner: str,
        load: Loader | None,
        limit_bytes: int | None,
        disk_limit_bytes: int | None = None,
        namespace_limit_bytes: int | None = None,
        namespace_disk_limit_bytes: int | None = None,
        embedding_size: int,
    ) -> None:
        """`folder`: where records and payloads are kept; None: nowhere. `owner`: what payloads belong to, for example a
        hash of a model's weights and settings. Bounds are on payloads' bytes, in host memory and in files, of all and
        of each namespace; None: no bound. One file more than that is on the disk while it is written.

        Raises CatalogError for a folder that is in use, another owner's, or a newer release's; ImportError where there
        is no faiss.
        """
        if folder is not None and load is None:
            raise ValueError("a catalog in a folder gets payloads back from it by `load`, got None; give a loader")
        bounds = Bounds(
            host=limit_bytes,
            disk=disk_limit_bytes,
            namespace_host=namespace_limit_bytes,
            namespace_disk=namespace_disk_limit_bytes,
        )
        load_faiss()  # before anything is written
        self._embedding_size = embedding_size
        self._closed = False
        self._records = Records(folder, owner=owner, embedding_size=embedding_size)
        try:
            self._tiers = Tiers(folder, self._records, load, bounds, embedding_size)
        except BaseException:
            self._records.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(
        self,
        namespace: str,
        token_ids: ArrayLike,
        ends: ArrayLike,
        payload: Payload,
        embedding: ArrayLike,
        *,
        approximate: bool = False,
        recipe: str = "",
        parent: int | None = None,
    ) -> Record | None:
        """Keep a payload for a prompt; the catalog drops it when its time has come.

        `ends`: sentence ends, ascending. `embedding`: numbers of which the angle matters. `recipe`: what an
        approximation was made with. `parent`: the key of an exact entry of the same namespace, in host memory (see
        `held`), without whose rows this payload means nothing.

        None, and the payload stays the caller's, if there cannot be room for it: with its ancestors and what is held
        it exceeds a bound. Raises ValueError for a prompt that is there already, CatalogError for such a parent.
        """
        space = self._space(namespace)
        ids, vector = _token_ids(token_ids), self._unit(embedding)
        key, checked_ends = secrets.randbits(62), _sentence_ends(ends, len(ids))
        record = Record(key, namespace, ids, checked_ends, approximate, parent, recipe)
        entry = Entry(record, digest(ids), 0, payload.host_bytes, payload)
        if (entry.digest, approximate) in space.by_prompt:
            kind = "approximate" if approximate else "exact"
            raise ValueError(f"this prompt of {len(ids):,} tokens has an {kind} entry; use `same`, or remove it first")
        if not self._tiers.insert(space, entry, vector, _ancestors(space, parent)):
            _LOG.info("a prompt of %d tokens is not cached: %d bytes are too many", len(ids), entry.stored_bytes)
            return None
        return record

    def same(self, namespace: str, token_ids: ArrayLike, recipe: str | None = None) -> Record | None:
        """The entry of just this prompt: an exact one, or else an approximate one that was made with that recipe.

        `recipe`: None takes none that is approximate.
        """
        space = self._space(namespace)
        found = self.entry(namespace, token_ids, approximate=False)
        if found is None and recipe is not None:
            found = self.entry(namespace, token_ids, approximate=True)
        if found is None or (found.approximate and found.recipe != recipe):
            space.misses += 1
            return None
        space.hits += 1
        return found

    def entry(self, namespace: str, token_ids: ArrayLike, *, approximate: bool) -> Record | None:
        """The entry of just this prompt that is of that kind; in statistics it is neither a hit nor a miss."""
        entry = self._space(namespace).by_prompt.get((digest(_token_ids(token_ids)), approximate))
        return None if entry is None else entry.record

    def donors(
        self,
        namespace: str,
        token_ids: ArrayLike,
        embedding: ArrayLike | None,
        limit: int = 8,
        *,
        min_similarity: float = -1.0,
    ) -> list[Record]:
        """Exact entries that may share most with this prompt, the likeliest first: by an estimate of the shared tokens,
        then by the cosine of embeddings. `min_similarity`: the least cosine of what shares next to no tokens; without
        an embedding these are not looked for."""
        space = self._space(namespace)
        unit = None if embedding is None else self._unit(embedding)
        found = space.index.find(_token_ids(token_ids), unit, limit, min_similarity)
        if found:
            space.donor_hits += 1
        else:
            space.donor_misses += 1
        return [space.entries[each.key].record for each in found]

    def prefix_donor(self, namespace: str, token_ids: ArrayLike) -> Record | None:
        """The exact entry that begins most as this prompt does; None if none begins so. Counts as `donors`."""
        space = self._space(namespace)
        key = space.index.longest_prefix(_token_ids(token_ids))
        if key is None:
            space.donor_misses += 1
            return None
        space.donor_hits += 1
        return space.entries[key].record

    def payload(self, record: Record) -> Payload:
        """A record's payload, now the last used, and in host memory until room is needed for another.

        Raises EntryGoneError if it left or its file is damaged, MemoryError if there is no room beside what is held.
        """
        return self._tiers.loaded(*self._find(record))

    @contextlib.contextmanager
    def held(self, record: Record) -> Iterator[Payload]:
        """As `payload`; in the block it stays in host memory, and the entry in the catalog."""
        payload = self.payload(record)
        space, entry = self._find(record)
        with holding(space.lineage(entry)):
            yield payload

    def remove(self, record: Record) -> None:
        """Forget an entry and all that need it, children first; nothing happens if it has left already.

        Raises ValueError if one of them is held.
        """
        space = self._space(record.namespace)
        entry = space.entries.get(record.key)
        if entry is not None:
            self._tiers.remove(space, space.family(entry))

    def clear(self, namespace: str) -> None:
        """Forget a namespace: its entries, files and statistics. Raises ValueError if one of its entries is held."""
        self._check_open()
        self._tiers.clear(namespace)

    def make_room(self, num_bytes: int, namespace: str | None = None) -> int:
        """Let go of so many bytes of host memory, or all that is not held; returns how many.

        `namespace`: who needs them, and gives its own first. A closed catalog has none.
        """
        return self._tiers.release(num_bytes, None if namespace is None else self._space(namespace))

    def statistics(self, namespace: str) -> Statistics:
        """Counts and bytes of one namespace."""
        space = self._space(namespace)
        return Statistics(
            entries=len(space.entries),
            approximate_entries=len(space.entries) - len(space.index),
            host_bytes=sum(entry.host_bytes for entry in space.entries.values()),
            disk_bytes=sum(entry.disk_bytes for entry in space.entries.values()),
            hits=space.hits,
            misses=space.misses,
            donor_hits=space.donor_hits,
            donor_misses=space.donor_misses,
        )

    def persist(self) -> None:
        """Write what has no file yet, the last used first, as far as the disk's bounds go; nothing without a folder."""
        self._check_open()
        self._tiers.persist()

    def close(self) -> None:
        """Write what has no file yet, drop all payloads, and let go of the folder."""
        if self._closed:
            return
        try:
            self.persist()
        finally:
            self._closed = True
            self._tiers.drop()
            self._records.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the catalog is closed; open it again")

    def _space(self, namespace: str) -> Namespace:
        self._check_open()
        return self._tiers.space(namespace)

    def _find(self, record: Record) -> tuple[Namespace, Entry]:
        space = self._space(record.namespace)
        entry = space.entries.get(record.key)
        if entry is None:
            raise EntryGoneError(
                f"the entry of a prompt of {len(record.token_ids):,} tokens has left the catalog; look for another"
            )
        return space, entry

    def _unit(self, embedding: ArrayLike) -> NDArray[np.float32]:
        vector = np.asarray(embedding, dtype=np.float64)  # squares of the largest and the least do not fit 32 bits
        if vector.shape != (self._embedding_size,):
            raise ValueError(f"embeddings have the shape ({self._embedding_size},) here, got {vector.shape}")
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or norm == 0.0:
            raise ValueError(f"embeddings must be finite and not all zeros, got one of norm {norm}")
        return (vector / norm).astype(np.float32)


def _ancestors(space: Namespace, parent: int | None) -> list[Entry]:
    """A new entry's parent, its parent, and so on."""
    if parent is None:
        return []
    entry = space.entries.get(parent)
    if entry is None:
        raise EntryGoneError(f"the namespace has no entry {parent} to be a parent; hold it until its child is added")
    if entry.record.approximate:
        raise CatalogError(f"entry {parent} is approximate and feeds no others; name an exact one as parent")
    if entry.payload is None:
        raise CatalogError(f"entry {parent} is not in host memory; hold it until its child is added")
    return space.lineage(entry)


def _token_ids(values: ArrayLike) -> NDArray[np.int32]:
    ids = _integers(values, "token_ids")
    if not len(ids):
        raise ValueError("token_ids must have at least one token, got none; there is nothing to cache or to look for")
    return ids


def _sentence_ends(values: ArrayLike, num_tokens: int) -> NDArray[np.int32]:
    ends = _integers(values, "ends")
    if len(ends) and (ends[0] < 1 or ends[-1] > num_tokens or (np.diff(ends) < 1).any()):
        raise ValueError(f"ends must ascend within 1 and the number of tokens ({num_tokens:,}), got {ends}")
    return ends


def _integers(values: ArrayLike, name: str) -> NDArray[np.int32]:
    """As int32, in memory that nobody else writes to."""
    array = np.array(values)
    if not array.size:
        array = np.zeros(0, dtype=np.int32)
    limits = np.iinfo(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers in one dimension, got {array.dtype} of shape {array.shape}")
    if len(array) and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name} must fit in 32 bits, got {array.min()} to {array.max()}")
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array
