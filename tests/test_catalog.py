"""The catalog: what is found for whom, and that namespaces do not notice one another."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

from sentencekv.reuse.catalog import Catalog, CatalogError, EntryGoneError, Record, Statistics
from tests.cached import Parcel, add, embedding, files, kept, open_catalog, tokens


def found(catalog: Catalog, seed: int, namespace: str = "a", limit: int = 8) -> list[Record]:
    return catalog.donors(namespace, tokens(seed), embedding(seed), limit)


class TestFinding:
    def test_the_same_prompt(self) -> None:
        with open_catalog() as catalog:
            assert catalog.same("a", tokens(0)) is None
            record = kept(catalog, 0)
            assert catalog.same("a", tokens(0)) is record
            assert catalog.same("a", tokens(0).tolist()) is record
            assert catalog.same("a", tokens(0)[:-1]) is None
            assert catalog.same("a", np.append(tokens(0), 0)) is None
            assert catalog.same("a", tokens(0)[::-1]) is None

    def test_exact_entries_come_before_approximate_ones(self) -> None:
        with open_catalog() as catalog:
            approximate = kept(catalog, 0, approximate=True)
            assert catalog.same("a", tokens(0), "") is approximate
            assert catalog.same("a", tokens(0), "another recipe") is None
            assert catalog.same("a", tokens(0)) is None
            assert [catalog.entry("a", tokens(0), approximate=kind) for kind in (False, True)] == [None, approximate]
            exact = kept(catalog, 0)
            assert catalog.same("a", tokens(0)) is exact
            assert [catalog.entry("a", tokens(0), approximate=kind) for kind in (False, True)] == [exact, approximate]
            catalog.remove(exact)
            assert catalog.same("a", tokens(0), "") is approximate

    def test_donors_are_ranked_by_what_they_share(self) -> None:
        """A whole prompt, its first half, a run in its middle, a paraphrase; then one that shares nothing."""
        with open_catalog() as catalog:
            ids = tokens(0, 400)

            def put(token_ids: np.ndarray, seed: int) -> Record:
                record = catalog.add("a", token_ids, [], Parcel(b"", 9), embedding(seed))
                assert record is not None
                return record

            like = embedding(0) + 0.01
            expected = [
                put(np.append(ids, 1), 1),
                put(np.concatenate([ids[:200], tokens(2, 300)]), 2),
                put(np.concatenate([tokens(3, 300), ids[150:250], tokens(4, 77)]), 3),
            ]
            paraphrase = catalog.add("a", tokens(5, 350), [], Parcel(b"", 9), 3 * like)
            far = put(tokens(6, 400), 6)
            records = catalog.donors("a", ids, embedding(0))
            assert records == [*expected, paraphrase, far]
            assert catalog.donors("a", ids, embedding(0), 2) == expected[:2]
            assert catalog.donors("a", ids, embedding(0), min_similarity=0.99) == [*expected, paraphrase]
            assert catalog.donors("a", ids, embedding(0), 0) == []

    def test_what_is_removed_is_not_found(self) -> None:
        with open_catalog() as catalog:
            records = [kept(catalog, seed) for seed in range(5)]
            catalog.remove(records[2])
            catalog.remove(records[2])
            assert catalog.same("a", tokens(2)) is None
            assert set(found(catalog, 2)) == {*records[:2], *records[3:]}
            for call in (catalog.payload, lambda record: catalog.held(record).__enter__()):
                with pytest.raises(EntryGoneError):
                    call(records[2])
            again = kept(catalog, 2)
            assert again.key != records[2].key
            assert found(catalog, 2)[0] is again


class TestApproximate:
    def test_they_never_feed_others(self, tmp_path: Path) -> None:
        """However alike, wherever they are, and after the catalog was opened again."""
        with open_catalog(tmp_path, 250) as catalog:
            root = kept(catalog, 0)
            fed = kept(catalog, 1, parent=root, approximate=True)
            kept(catalog, 2, approximate=True)
            assert [found(catalog, seed) for seed in range(3)] == [[root]] * 3
            with pytest.raises(CatalogError, match="is approximate and feeds no others; name an exact one"):
                catalog.add("a", tokens(3), [], Parcel(b"", 9), embedding(3), parent=fed.key)
            assert catalog.same("a", tokens(3)) is None
        with open_catalog(tmp_path, 250) as catalog:
            for seed in range(3):
                assert [record.key for record in found(catalog, seed)] == [root.key]
            again = catalog.same("a", tokens(1), "")
            assert again is not None
            assert again.approximate
            with pytest.raises(CatalogError, match="is approximate"):
                catalog.add("a", tokens(3), [], Parcel(b"", 9), embedding(3), parent=again.key)


class TestNamespaces:
    def test_nothing_is_found_in_another(self, tmp_path: Path) -> None:
        """The same prompts in two namespaces, and one that has none."""
        with open_catalog(tmp_path) as catalog:
            ours = {kept(catalog, seed).key for seed in range(4)}
            theirs = {kept(catalog, seed, namespace="b").key for seed in range(2, 6)}
            assert not ours & theirs
            for seed in range(6):
                assert {record.key for record in found(catalog, seed)} <= ours
                assert {record.key for record in found(catalog, seed, "b", limit=99)} <= theirs
                assert found(catalog, seed, "c") == []
                assert catalog.same("c", tokens(seed)) is None
            assert (catalog.same("a", tokens(5)), catalog.same("b", tokens(0))) == (None, None)

    def test_nobody_is_a_parent_in_another(self) -> None:
        """And the error is the one for a key that nobody has."""
        with open_catalog() as catalog:
            other = kept(catalog, 0, namespace="b")
            errors = []
            for key in (other.key, 7):
                with pytest.raises(EntryGoneError) as caught:
                    catalog.add("a", tokens(1), [], Parcel(b"", 9), embedding(1), parent=key)
                errors.append(str(caught.value).replace(str(key), "KEY"))
            assert errors[0] == errors[1]

    def test_statistics_are_ones_own(self, tmp_path: Path) -> None:
        """Whatever the other does, they stay as they were."""
        with open_catalog(tmp_path) as catalog:
            kept(catalog, 0)
            kept(catalog, 1, 70, approximate=True)
            catalog.persist()
            for seed in (0, 1, 2):
                catalog.same("a", tokens(seed), "")
            found(catalog, 0)
            expected = Statistics(
                entries=2,
                approximate_entries=1,
                host_bytes=170,
                disk_bytes=170,
                hits=2,
                misses=1,
                donor_hits=1,
                donor_misses=0,
            )
            assert catalog.statistics("a") == expected
            for seed in range(5):
                kept(catalog, seed, namespace="b")
                found(catalog, seed, "b")
                catalog.same("b", tokens(seed + 1))
            catalog.persist()
            catalog.clear("b")
            assert catalog.statistics("a") == expected
            found(catalog, 0, "b")
            assert catalog.statistics("b") == Statistics(0, 0, 0, 0, 0, 0, 0, 1)

    def test_each_has_a_folder_of_its_own_whatever_its_name(self, tmp_path: Path) -> None:
        names = ["", "a", "../a", "a/b", "ä", "x" * 300, "a\0b", "CON", "."]
        with open_catalog(tmp_path) as catalog:
            for name in names:
                assert catalog.add(name, tokens(0), [], Parcel(b"", 9), embedding(0)) is not None
        folders = {path.parent for path in files(tmp_path)}
        assert len(folders) == len(names)
        assert {folder.parent for folder in folders} == {tmp_path / "namespaces"}
        assert all(len(folder.name) == 64 for folder in folders)
        with open_catalog(tmp_path) as catalog:
            for name in names:
                record = catalog.same(name, tokens(0))
                assert record is not None
                assert record.namespace == name

    def test_clearing_leaves_the_others(self, tmp_path: Path) -> None:
        with open_catalog(tmp_path) as catalog:
            root = kept(catalog, 0)
            for seed in (1, 2):
                kept(catalog, seed, parent=root)
            kept(catalog, 0, namespace="b")
            catalog.persist()
            catalog.clear("a")
            assert [catalog.statistics(name).entries for name in "ab"] == [0, 1]
            assert len(files(tmp_path)) == 1
            assert len(list((tmp_path / "namespaces").iterdir())) == 1
            catalog.clear("never seen")
            kept(catalog, 0)
        with open_catalog(tmp_path) as catalog:
            assert [catalog.statistics(name).entries for name in "ab"] == [1, 1]

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_who_adds_takes_from_its_own_first(self, on_disk: bool, tmp_path: Path) -> None:
        """In host memory, and among files: then from the namespace that holds most."""
        bounds = {"disk_limit_bytes": 600} if on_disk else {"limit_bytes": 600}
        with open_catalog(tmp_path if on_disk else None, **bounds) as catalog:  # type: ignore[arg-type]

            def counts() -> list[int]:
                """Where only what is on disk counts, all of it is there."""
                if on_disk:
                    catalog.persist()
                    catalog.make_room(10_000)
                return [catalog.statistics(name).entries for name in "abc"]

            for name in "aaabb":
                kept(catalog, sum(counts()), namespace=name)
            assert counts() == [3, 2, 0]
            kept(catalog, 20, namespace="b")
            assert counts() == [3, 3, 0]
            kept(catalog, 21, namespace="b")
            assert counts() == [3, 3, 0]
            assert catalog.same("b", tokens(3)) is None
            kept(catalog, 22, 150, namespace="c")
            assert counts() == [2, 2, 1]
            kept(catalog, 23, 200, namespace="c")
            assert counts() == [2, 2, 1]
            assert catalog.same("c", tokens(22)) is None

    def test_bounds_of_ones_own(self, tmp_path: Path) -> None:
        """Where they add up to no more than the common ones, nobody takes anything from anybody."""
        bounds = {"namespace_limit_bytes": 200, "disk_limit_bytes": 600, "namespace_disk_limit_bytes": 300}
        with open_catalog(tmp_path, 400, **bounds) as catalog:  # type: ignore[arg-type]
            for seed in range(2):
                kept(catalog, seed)
            before = catalog.statistics("a")
            for seed in range(9):
                kept(catalog, seed, namespace="b")
                now = catalog.statistics("b")
                assert (now.host_bytes, now.disk_bytes) == (
                    min(100 * (seed + 1), 200),
                    min(100 * max(seed - 1, 0), 300),
                )
            assert catalog.statistics("a") == before
            assert [catalog.same("b", tokens(seed)) is not None for seed in range(9)] == [False] * 4 + [True] * 5

    def test_keys_tell_nothing(self) -> None:
        """Neither how many entries there are, nor when they were added: they are random."""
        with open_catalog() as catalog:
            keys = [kept(catalog, seed).key for seed in range(40)]
        assert len(set(keys)) == 40
        assert sorted(keys) != keys
        assert max(keys) > 1 << 55

    def test_nothing_but_bounds_is_shared(self) -> None:
        """No method that answers for a namespace looks through all of them."""
        for method in (Catalog.same, Catalog.entry, Catalog.donors, Catalog.statistics, Catalog.prefix_donor):
            source = inspect.getsource(method)
            assert "_space(namespace)" in source or "_find(record)" in source
            assert "_tiers" not in source


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"token_ids": []}, "token_ids must have at least one token"),
            ({"token_ids": [1.5]}, "token_ids must be integers in one dimension, got float64"),
            ({"token_ids": [[1]]}, r"got int64 of shape \(1, 1\)"),
            ({"token_ids": [1 << 31]}, "must fit in 32 bits"),
            ({"token_ids": [True]}, "must be integers"),
            ({"ends": [3, 3]}, r"ends must ascend within 1 and the number of tokens \(5\)"),
            ({"ends": [0, 3]}, "ends must ascend"),
            ({"ends": [3, 6]}, "ends must ascend"),
            ({"embedding": [1, 2]}, r"embeddings have the shape \(4,\) here, got \(2,\)"),
            ({"embedding": [0, 0, 0, 0]}, "must be finite and not all zeros, got one of norm 0.0"),
            ({"embedding": [1, 0, np.nan, 0]}, "must be finite"),
        ],
    )
    def test_bad_ones_are_named(self, changes: dict[str, object], message: str) -> None:
        given = {"token_ids": [1, 2, 3, 4, 5], "ends": [3, 5], "embedding": [1, 2, 3, 4], **changes}
        with open_catalog() as catalog:
            with pytest.raises(ValueError, match=message):
                catalog.add("a", payload=Parcel(b"", 9), **given)  # type: ignore[arg-type]
            assert catalog.statistics("a").entries == 0

    def test_what_is_there_is_not_added_again(self) -> None:
        with open_catalog() as catalog:
            record = kept(catalog, 0)
            with pytest.raises(ValueError, match="this prompt of 90 tokens has an exact entry; use `same`, or remove"):
                add(catalog, 0)
            kept(catalog, 0, approximate=True)
            with pytest.raises(ValueError, match="has an approximate entry"):
                add(catalog, 0, approximate=True)
            catalog.remove(record)
            kept(catalog, 0)

    def test_callers_may_change_what_they_gave(self) -> None:
        with open_catalog() as catalog:
            ids, ends = tokens(0), np.array([40, 90])
            record = catalog.add("a", ids, ends, Parcel(b"", 9), embedding(0))
            assert record is not None
            ids[:], ends[:] = 0, 1
            assert record.token_ids.tolist() == tokens(0).tolist()
            assert record.ends.tolist() == [40, 90]
            with pytest.raises(ValueError, match="read-only"):
                record.token_ids[0] = 1

    def test_settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="gets payloads back from it by `load`, got None; give a loader"):
            open_catalog(tmp_path, load=None)
        for name in ("limit_bytes", "disk_limit_bytes", "namespace_limit_bytes", "namespace_disk_limit_bytes"):
            with pytest.raises(ValueError, match="a bound must be None or at least 0 bytes, got -1"):
                open_catalog(tmp_path, **{name: -1})
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ImportError, match=r'pip install "sentencekv\[reuse\]"'):
            open_catalog(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_after_closing(self) -> None:
        catalog = open_catalog()
        record = kept(catalog, 0)
        catalog.close()
        for call in (
            lambda: catalog.same("a", tokens(0)),
            lambda: found(catalog, 0),
            lambda: add(catalog, 1),
            lambda: catalog.payload(record),
            lambda: catalog.remove(record),
            lambda: catalog.clear("a"),
            lambda: catalog.statistics("a"),
            catalog.persist,
        ):
            with pytest.raises(ValueError, match="the catalog is closed; open it again"):
                call()


def test_embeddings_need_not_have_a_length() -> None:
    """Their angles are compared."""
    with open_catalog() as catalog:
        record = catalog.add("a", tokens(0), [], Parcel(b"", 9), 1e-30 * embedding(1))
        kept(catalog, 2)
        for factor in (1e-30, 1e4, 1e30):
            assert catalog.donors("a", tokens(9), factor * embedding(1), min_similarity=0.999) == [record]
