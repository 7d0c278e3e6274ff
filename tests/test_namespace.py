"""Who needs whom, and who leaves when bytes are short."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sentencekv.reuse.namespace import Entry, Namespace, digest, leaving
from sentencekv.reuse.records import Record
from tests.cached import embedding, tokens


def make_entry(key: int, parent: int | None = None, approximate: bool = False) -> Entry:
    ids = tokens(key)
    record = Record(key, "a", ids, np.array([90], dtype=np.int32), approximate, parent)
    return Entry(record, digest(ids), used=key, stored_bytes=0, file_bytes=10)


def make_family() -> Namespace:
    """0 is needed by 1 and 2, 1 by 3; 4 by none. 2 is approximate."""
    space = Namespace(4)
    entries = [make_entry(0), make_entry(1, 0), make_entry(2, 0, approximate=True), make_entry(3, 1), make_entry(4)]
    space.insert([(entry, embedding(entry.record.key)) for entry in entries])
    return space


def keys(entries: list[Entry]) -> list[int]:
    return [entry.record.key for entry in entries]


def test_lineage_and_family() -> None:
    space = make_family()
    assert [keys(space.lineage(space.entries[key])) for key in range(5)] == [[0], [1, 0], [2, 0], [3, 1, 0], [4]]
    families = [keys(space.family(space.entries[key])) for key in range(5)]
    assert [set(each) for each in families] == [{0, 1, 2, 3}, {1, 3}, {2}, {3}, {4}]
    assert families[0][-1] == 0
    assert families[0].index(3) < families[0].index(1)


def test_deleting_forgets_everything() -> None:
    space = make_family()
    assert len(space.index) == 4, "what is approximate is no donor"
    space.delete(space.family(space.entries[1]))
    assert keys(list(space.entries.values())) == [0, 2, 4]
    assert keys(space.family(space.entries[0])) == [2, 0]
    assert len(space.by_prompt) == 3
    assert len(space.index) == 2
    space.delete([*space.family(space.entries[0]), space.entries[4]])
    assert not space.entries
    assert not space.by_prompt
    assert not len(space.index)


def test_a_digest_is_of_all_tokens_and_of_nothing_else() -> None:
    ids = tokens(0, 10)
    seen = {digest(ids), digest(ids[:9]), digest(ids[::-1]), digest(np.append(ids, np.int32(0)))}
    assert len(seen) == 4
    assert digest(ids) == digest(ids.astype(">i4"))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), max_size=10),
    st.integers(-5, 60),
    st.integers(-5, 120),
    st.booleans(),
)
def test_who_leaves(sizes: list[tuple[int, int]], own: int, total: int, somebody_needs_it: bool) -> None:
    """Against one that decides entry by entry; and nobody leaves who need not."""
    spaces = [Namespace(4) for _ in range(3)]
    candidates: dict[Namespace, dict[Entry, int]] = {space: {} for space in spaces}
    for used, (which, size) in enumerate(sizes):
        candidates[spaces[which]][make_entry(used)] = size
    size_of = {entry: size for entries in candidates.values() for entry, size in entries.items()}
    first = spaces[0] if somebody_needs_it else None
    own = own if somebody_needs_it else 0
    shuffled = {space: dict(reversed(entries.items())) for space, entries in candidates.items()}
    chosen, enough = leaving(first, shuffled, own, total)

    left = {space: list(entries) for space, entries in candidates.items()}
    for i, (space, entry) in enumerate(chosen):
        freed = sum(size_of[each] for _, each in chosen[:i])
        freed_own = sum(size_of[each] for which, each in chosen[:i] if which is first)
        assert freed < total or freed_own < own
        assert entry is left[space].pop(0), "not used for longest"
        if space is not first:
            assert first is None or not left[first]
            remaining = {other: sum(size_of[each] for each in left[other]) for other in spaces if other is not first}
            remaining[space] += size_of[entry]
            assert remaining[space] == max(remaining.values())
    freed = sum(size_of[entry] for _, entry in chosen)
    freed_own = sum(size_of[entry] for space, entry in chosen if space is first)
    assert enough == (freed_own >= own and freed >= total)
    assert enough or not any(left.values())
