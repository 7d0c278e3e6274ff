"""Kill a process that keeps a catalog at every moment, one after another, and look at what the next process finds.

Run as a program, `python -m tests.crash_catalog FOLDER STRIDE`; a stride of 1 takes all moments. Prints how many it
took. A moment is before and after each call that changes files, amid each payload that is written, and before each
statement of the database.
"""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencekv.reuse.catalog import Catalog
from tests.cached import Parcel, add, content_of, files, kept, open_catalog, tokens

UNTOUCHED = (1, 2)
"""Seeds of prompts that are written before the killing begins and that nobody removes."""
ALL = range(1, 20)
BOUNDS = {"limit_bytes": 350, "disk_limit_bytes": 900}


def prepare(folder: Path) -> None:
    with open_catalog(folder, **BOUNDS) as catalog:
        kept(catalog, 3)
        root = kept(catalog, 4)
        kept(catalog, 5, parent=root)
        kept(catalog, 6, 50, namespace="b")
        for seed in UNTOUCHED:
            kept(catalog, seed, 90)


def work(folder: Path, tick: Callable[[], None]) -> None:
    """Everything that changes files or records."""
    with open_catalog(folder, **BOUNDS) as catalog:
        catalog._records._database.set_trace_callback(lambda _: tick())
        root = kept(catalog, 7)
        child = kept(catalog, 8, parent=root)
        kept(catalog, 9, 60, parent=child, approximate=True)
        for seed in (10, 11):
            kept(catalog, seed)  # the ones before go to their files
        for seed in UNTOUCHED:
            record = catalog.same("a", tokens(seed), "")
            assert record is not None
            catalog.payload(record)
        catalog.persist()
        kept(catalog, 12, 200)  # files leave for its own
        catalog.persist()
        catalog.clear("b")
        kept(catalog, 13, 40, namespace="b")
        catalog.remove(root)
        add(catalog, 14)


def check(folder: Path) -> None:
    """All that is found is whole, and nothing else is there."""
    with open_catalog(folder) as catalog:
        check_entries(catalog, folder)
        again = kept(catalog, 15)
        assert catalog.donors("a", tokens(15), [1, 0, 0, 0], limit=1) == [again]
    with open_catalog(folder) as catalog:
        check_entries(catalog, folder)


def check_entries(catalog: Catalog, folder: Path) -> None:
    found = 0
    for namespace in "ab":
        for seed in ALL:
            record = catalog.same(namespace, tokens(seed), "")
            assert record is not None or namespace == "b" or seed not in UNTOUCHED, f"lost {seed}"
            if record is not None:
                payload = catalog.payload(record)
                assert isinstance(payload, Parcel)
                assert payload._content == content_of(record)
                found += 1
    assert len(files(folder)) == found
    assert found == sum(catalog.statistics(namespace).entries for namespace in "ab")


def kill_at(moment: int, folder: Path) -> bool:
    """Whether the work was over before."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert os.waitstatus_to_exitcode(status) == 0
        return True
    code = 1
    try:
        passed = 0

        def tick() -> None:
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def around(*given: Any, **named: Any) -> Any:
                tick()
                done = call(*given, **named)
                tick()
                return done

            return around

        def write(parcel: Parcel, path: Path) -> None:
            path.write_bytes(parcel._content)
            tick()
            whole(parcel, path)

        whole = Parcel.write
        Parcel.write = write  # type: ignore[method-assign]
        for name in ("replace", "fsync", "unlink", "mkdir", "rmdir"):
            setattr(os, name, watched(getattr(os, name)))
        work(folder, tick)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    start, stride = Path(sys.argv[1]), int(sys.argv[2])
    prepare(start / "first")
    for number, moment in enumerate(itertools.count(1, stride)):
        folder = start / str(moment)
        shutil.copytree(start / "first", folder)
        over = kill_at(moment, folder)
        check(folder)
        shutil.rmtree(folder)
        if over:
            sys.stdout.write(f"{number}\n")
            break


if __name__ == "__main__":
    main()
