"""Finding cached prompts that resemble a new one: by what they share at the start or anywhere else, and by meaning.

Three ways, since each finds what the others miss. Prompts in the order of their tokens: neighbours share the longest
prefix. Locality-sensitive buckets: the smallest hash (MinHash) in each window of shingles, so that windows fall into
the same bucket as often as they are alike, and always if they are equal; a run of 71 shared tokens holds such a window,
wherever it is. Embeddings, in an index of nearest neighbours: paraphrases share no tokens.

Knows tokens and vectors; nothing of payloads, files or namespaces: an index holds the prompts of one namespace.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SHINGLE_TOKENS = 8
_WINDOW_SHINGLES = 64
_RANKED_TOKENS = 16
"""Shared tokens are compared in units of so many: fewer are no reason to prefer a prompt to a more similar one."""
_MOST_POSTINGS = 1 << 14
"""Bucket members looked at for one prompt, those of small buckets first: what all prompts share tells none apart."""

Ids = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Counts = NDArray[np.int64]


def load_faiss() -> ModuleType:
    """The library that holds embeddings. Raises ImportError, naming what to install, where there is none."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('similar prompts are found with faiss: pip install "sentencekv[reuse]"') from error
    return faiss


class Prompt(NamedTuple):
    """What is known of a cached prompt."""

    key: int
    token_ids: Ids
    embedding: NDArray[np.float32]
    """Of length 1 in the Euclidean norm."""


class Found(NamedTuple):
    """A cached prompt that resembles another."""

    key: int
    shared_tokens: int
    """About so many of the other's tokens are in it."""
    prefix_tokens: int
    """So many of them at the start."""
    similarity: float
    """Cosine of the embeddings; 0 where meaning was not asked for."""


class PromptIndex:
    """Prompts of one namespace, found by likeness.

    Takes 24 bytes of memory for a bucket, of which a prompt has one for about 32 tokens. Adding and removing take time
    in proportion to all buckets; finding does not. Not thread-safe.
    """

    def __init__(self, embedding_size: int) -> None:
        faiss = load_faiss()
        # A flat index: of those that faiss has, graphs cannot forget, and the others have to be trained.
        self._embeddings = faiss.IndexIDMap2(faiss.IndexFlatIP(embedding_size))
        self._buckets = _Buckets()
        self._ids: dict[int, Ids] = {}
        self._buckets_of: dict[int, Hashes] = {}
        self._by_tokens: list[int] = []
        """Keys in the order of their prompts' tokens."""

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Make them findable; many at once take less time. Their keys must be new, and no two prompts alike."""
        if not prompts:
            return
        keys = np.array([prompt.key for prompt in prompts], dtype=np.int64)
        for prompt in prompts:
            assert prompt.key not in self._ids
            self._ids[prompt.key] = prompt.token_ids
            self._buckets_of[prompt.key] = window_buckets(prompt.token_ids)[0]
            bisect.insort(self._by_tokens, prompt.key, key=self._sort_key)
        self._buckets.add([self._buckets_of[prompt.key] for prompt in prompts], keys)
        self._embeddings.add_with_ids(np.stack([prompt.embedding for prompt in prompts]), keys)

    def remove(self, keys: Sequence[int]) -> None:
        """Forget prompts; many at once take less time."""
        if not keys:
            return
        for key in keys:
            del self._ids[key], self._buckets_of[key]
        self._by_tokens = [key for key in self._by_tokens if key in self._ids]
        self._buckets.remove(np.array(keys, dtype=np.int64))
        self._embeddings.remove_ids(np.array(keys, dtype=np.int64))

    def find(
        self, token_ids: Ids, embedding: NDArray[np.float32] | None, limit: int, min_similarity: float = -1.0
    ) -> list[Found]:
        """Up to `limit` prompts that share tokens with this one, or are at least so similar; the likeliest donor first.

        They are ranked by shared tokens, in units of 16, then by similarity; the one with the longest common prefix is
        always among them, since what it gives is exact. `embedding` None: only those that share tokens.
        """
        if not self._ids or limit < 1:
            return []
        buckets, weights = window_buckets(token_ids)
        candidates = set(self._neighbours(token_ids, limit))
        candidates.update(self._buckets.most_shared(buckets, weights, 2 * limit))
        if embedding is None:
            min_similarity = np.inf
        else:
            _, nearest = self._embeddings.search(embedding[None], min(limit, len(self)))
            candidates.update(nearest[0].tolist())
        found = [self._compare(key, token_ids, buckets, weights, embedding) for key in candidates]
        kept = [each for each in found if each.shared_tokens >= _RANKED_TOKENS or each.similarity >= min_similarity]
        kept.sort(key=lambda each: (each.shared_tokens // _RANKED_TOKENS, each.similarity, each.key), reverse=True)
        longest = max(kept, key=lambda each: each.prefix_tokens, default=None)
        if longest is not None and longest.prefix_tokens and longest not in kept[:limit]:
            return [*kept[: limit - 1], longest]
        return kept[:limit]

    def longest_prefix(self, token_ids: Ids) -> int | None:
        """The key of the prompt that begins most as this one does; None if none begins so."""
        longest = max(self._neighbours(token_ids, 1), key=lambda key: self._shared_prefix(key, token_ids), default=None)
        return longest if longest is not None and self._shared_prefix(longest, token_ids) else None

    def _shared_prefix(self, key: int, token_ids: Ids) -> int:
        return shared_prefix(self._ids[key], token_ids)

    def _sort_key(self, key: int) -> bytes:
        return _big_endian(self._ids[key])

    def _neighbours(self, token_ids: Ids, limit: int) -> list[int]:
        """Those just before and just after it in the order of tokens: nobody shares a longer prefix with it."""
        place = bisect.bisect_left(self._by_tokens, _big_endian(token_ids), key=self._sort_key)
        return self._by_tokens[max(place - limit, 0) : place + limit]

    def _compare(
        self, key: int, token_ids: Ids, buckets: Hashes, weights: Counts, embedding: NDArray[np.float32] | None
    ) -> Found:
        shared = prefix = self._shared_prefix(key, token_ids)
        if len(buckets) and len(self._buckets_of[key]):
            theirs = self._buckets_of[key]
            # Without the last, which stands for all beyond it: every place is one that there is.
            common = theirs[np.searchsorted(theirs[:-1], buckets)] == buckets
            shared = max(shared, round(len(token_ids) * float(weights[common].sum() / weights.sum())))
        similarity = 0.0 if embedding is None else float(self._embeddings.reconstruct(key) @ embedding)
        return Found(key, shared, prefix, similarity)


class _Buckets:
    """Which prompts are in which bucket: pairs, sorted by bucket."""

    def __init__(self) -> None:
        self._bucket_P: Hashes = np.zeros(0, dtype=np.uint64)
        self._key_P: Counts = np.zeros(0, dtype=np.int64)

    def add(self, buckets: Iterable[Hashes], keys: Counts) -> None:
        """One array of buckets for each key."""
        arrays = list(buckets)
        bucket_P = np.concatenate(arrays)
        key_P = np.repeat(keys, [len(each) for each in arrays])
        order = np.argsort(bucket_P, kind="stable")
        places = np.searchsorted(self._bucket_P, bucket_P[order])
        self._bucket_P = np.insert(self._bucket_P, places, bucket_P[order])
        self._key_P = np.insert(self._key_P, places, key_P[order])

    def remove(self, keys: Counts) -> None:
        others = self._key_P != keys[0] if len(keys) == 1 else ~np.isin(self._key_P, keys)
        self._bucket_P, self._key_P = self._bucket_P[others], self._key_P[others]

    def most_shared(self, buckets: Hashes, weights: Counts, limit: int) -> list[int]:
        """Up to `limit` keys, of those whose buckets among these weigh most."""
        first = np.searchsorted(self._bucket_P, buckets, side="left")
        sizes = np.searchsorted(self._bucket_P, buckets, side="right") - first
        smallest = np.argsort(sizes, kind="stable")
        smallest = smallest[np.cumsum(sizes[smallest]) <= _MOST_POSTINGS]
        first, sizes, weights = first[smallest], sizes[smallest], weights[smallest]
        before = np.cumsum(sizes) - sizes
        places = np.arange(sizes.sum()) + np.repeat(first - before, sizes)
        keys, which = np.unique(self._key_P[places], return_inverse=True)
        shared = np.bincount(which, weights=np.repeat(weights, sizes), minlength=len(keys))
        return [int(key) for key in keys[np.argsort(-shared, kind="stable")[:limit]]]


def window_buckets(token_ids: Ids) -> tuple[Hashes, Counts]:
    """The buckets that a prompt's windows fall into, sorted, and how many windows fall into each.

    A window is 64 shingles of 8 tokens, or all there are; its bucket is the smallest hash among them. So two windows
    share a bucket with the probability that a shingle of either is in both (Broder, 1997), a window's neighbours mostly
    share its bucket, and a prompt has about one bucket for 32 tokens (winnowing: Schleimer et al., 2003). Empty
    for fewer than 8 tokens.
    """
    if len(token_ids) < _SHINGLE_TOKENS:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes = _mixed(token_ids.astype(np.uint64) + np.uint64(1))
    reach = 1
    while reach < _SHINGLE_TOKENS:
        hashes = hashes[:-reach] * _ODD[reach] + hashes[reach:]
        reach *= 2
    hashes = _mixed(hashes)
    window = min(_WINDOW_SHINGLES, len(hashes))
    reach = 1
    while reach < window:
        step = min(reach, window - reach)
        hashes = np.minimum(hashes[:-step], hashes[step:])
        reach += step
    starts = np.concatenate(([0], np.flatnonzero(hashes[1:] != hashes[:-1]) + 1))
    lengths = np.diff(starts, append=len(hashes))
    buckets, which = np.unique(hashes[starts], return_inverse=True)
    weights = np.zeros(len(buckets), dtype=np.int64)
    np.add.at(weights, which, lengths)
    return buckets, weights


_ODD = {
    1: np.uint64(0xC2B2AE3D27D4EB4F),
    2: np.uint64(0x9E3779B97F4A7C15),
    4: np.uint64(0xD6E8FEB86659FD93),
}
"""Weights of the earlier half of a shingle, by its length: tokens in another order are another shingle."""


def _mixed(values: Hashes) -> Hashes:
    """Numbers that look random, one for each: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shared_prefix(first: Ids, second: Ids) -> int:
    """Tokens that two prompts have in common at the start."""
    length = min(len(first), len(second))
    start, piece = 0, 256  # most differ early
    while start < length:
        different = first[start : min(start + piece, length)] != second[start : min(start + piece, length)]
        if different.any():
            return start + int(different.argmax())
        start, piece = start + piece, 2 * piece
    return length


def _big_endian(token_ids: Ids) -> bytes:
    """Bytes in whose order prompts with a longer common prefix are nearer."""
    return token_ids.astype(">i4").tobytes()
