"""Files of tensors: what comes back, what is refused, and that a file is whole under its name, whatever happens."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sentencekv import disk
from sentencekv.disk import Pieces, SavedFile, SavedFileError, write_file

ROOT = Path(__file__).parent.parent
TENSORS = {
    "half": torch.randn(3, 5).half(),
    "wide": torch.randn(2, 7, 4).bfloat16(),
    "ids": torch.arange(11, dtype=torch.int32),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(250, dtype=torch.uint8),
    "long": torch.tensor(7),
}


def save(path: Path, **description: object) -> int:
    return write_file(path, description, {name: Pieces.of(tensor) for name, tensor in TENSORS.items()})


def test_what_is_written_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, into memory of the caller's, and through the library whose format it is."""
    monkeypatch.setattr(disk, "_PIECE_BYTES", 16)
    path = tmp_path / "some.skv"
    assert save(path, title="häß", number=3) == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
    saved = SavedFile(path)
    assert saved.description == {"title": "häß", "number": 3}
    for name, tensor in TENSORS.items():
        assert saved.shape(name) == tensor.shape
        assert saved.dtype(name) == tensor.dtype
        assert torch.equal(saved.read(name), tensor)
    first, second = torch.zeros(2, 5).half(), torch.zeros(5).half()
    saved.read_into("half", [first, second])
    assert torch.equal(torch.cat([first, second[None]]), TENSORS["half"])


def test_parts_follow_one_another(tmp_path: Path) -> None:
    whole = torch.randn(2, 6, 3)
    parts = Pieces(torch.float32, (2, 4, 3), lambda: (whole[head, :4] for head in range(2)))
    seen: list[tuple[int, int]] = []
    write_file(tmp_path / "a", {}, {"kv": parts}, lambda done, total: seen.append((done, total)))
    assert torch.equal(SavedFile(tmp_path / "a").read("kv"), whole[:, :4])
    assert seen[-1] == (96, 96)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Whatever byte of the file is another: what was written, or an error."""
    path = tmp_path / "a"
    save(path, title="x")
    content = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for place in {*range(64), *draw.sample(range(len(content)), 300)}:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            saved = SavedFile(path)
            read = {name: saved.read(name) for name in TENSORS}
        except SavedFileError:
            refused += 1
            continue
        # What is not ours: the entries for readers of safetensors, and spaces.
        assert saved.description == {"title": "x"}
        assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert refused > 200


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    save(path)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(SavedFileError, match=r"was the copy cut off|is not a document"):
        SavedFile(path)


def test_a_file_cut_off_while_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path)
    saved = SavedFile(path)
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(SavedFileError, match="became shorter"):
        saved.read("long")  # the last one


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(SavedFileError, match="is not a document that sentencekv saved"):
        SavedFile(path)
    path.write_text("a text, not a file of tensors")
    with pytest.raises(SavedFileError, match="is not a document that sentencekv saved"):
        SavedFile(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SavedFile(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        SavedFile(tmp_path)


def test_an_open_file_outlives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path, number=1)
    saved = SavedFile(path)
    save(path, number=2)
    assert SavedFile(path).description == {"number": 2}
    assert saved.description == {"number": 1}
    assert torch.equal(saved.read("half"), TENSORS["half"])


def test_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IsADirectoryError, match="it is a directory"):
        save(tmp_path)
    with pytest.raises(FileNotFoundError, match="create it first"):
        save(tmp_path / "nowhere" / "a")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: disk.shutil._ntuple_diskusage(10, 8, 2))
    with pytest.raises(OSError, match=r"are needed and 2 B are free") as caught:
        save(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save(path, number=1)
    written = 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: max(len(data) // 2, 1)], offset)  # a disk may write less than it is given

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"^cannot save to '.*a': No space left on device$"):
        save(path, number=2)
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert SavedFile(path).description == {"number": 1}


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    save(tmp_path / "a")
    assert torch.equal(SavedFile(tmp_path / "a").read("wide"), TENSORS["wide"])


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    ordinary, path = tmp_path / "ordinary", tmp_path / "a"
    ordinary.write_bytes(b"")
    save(path)
    assert path.stat().st_mode == ordinary.stat().st_mode
    path.chmod(0o600)
    save(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "a")
    save(link)
    assert link.is_symlink()
    assert torch.equal(SavedFile(tmp_path / "there" / "a").read("half"), TENSORS["half"])


WRITERS = """
import os, sys, torch
from sentencekv.disk import Pieces, write_file
path, number = sys.argv[1], 0
for line in sys.stdin:
    number += 1000
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
        continue
    while True:
        number += 1
        rows = torch.full((1 << 18,), number, dtype=torch.int32)
        write_file(path, {"number": number}, {f"t{i}": Pieces.of(rows) for i in range(4)})
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    """kill -9 at 20 random moments: the old file or the new one, and what it left is cleared away."""
    path = tmp_path / "a"
    write_file(path, {"number": 0}, {f"t{i}": Pieces.of(torch.zeros(5, dtype=torch.int32)) for i in range(4)})
    draw, numbers, left = random.Random(3), set(), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITERS, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(20):
            print(file=writers.stdin, flush=True)
            writer = int(writers.stdout.readline())
            time.sleep(draw.uniform(0.002, 0.06))
            os.kill(writer, signal.SIGKILL)
            assert writers.stdout.readline() == "gone\n"
            saved = SavedFile(path)
            number = saved.description["number"]
            assert all((saved.read(f"t{i}") == number).all() for i in range(4))
            numbers.add(number)
            left += len(list(tmp_path.glob(".a.*.partial")))
    assert len(numbers) > 5
    assert left, "no writer was killed while it wrote"
    for partial in tmp_path.glob(".a.*.partial"):
        os.utime(partial, (0, 0))
    save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_the_partial_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with disk._partial(path) as file:
        os.utime(file.name, (0, 0))
        save(path)
        assert file.name.exists()
    assert not file.name.exists()
