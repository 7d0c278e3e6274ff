"""The files that evaluations read with `--data`, fetched from where they are published.

    python -m eval.download longbench --to LongBench
    python -m eval.longbench --data LongBench --model meta-llama/Llama-3.1-8B-Instruct

A command of its own and not an option of the evaluations: machines that evaluate often have no network, a run that is
gone on with must not depend on one, and a folder can be looked at and copied. `SUITES` are:

* `longbench`: the 34 files of tasks in `data.zip` of the hub's zai-org/LongBench (once THUDM/LongBench), and from its
  authors' repository the prompts and generation lengths that published figures are of;
* `infinitebench`: the files of the three retrieval tasks, of xinrongzhang2022/InfiniteBench;
* `pg19`: the 100 books of the test set, of emozilla/pg19 (deepmind/pg19 itself is a script, which `datasets` no longer
  runs), in a folder `test` and under their numbers, as the authors' own folder has them;
* `ruler`: SQuAD 2.0 (rajpurkar/squad_v2) and HotpotQA (hotpotqa/hotpot_qa; its first address is dead), written as the
  JSON files that their authors published, for `qa_1` and `qa_2`.

Each file is taken at a fixed revision, so that figures are of the same texts tomorrow. None was fetched when this was
written. Repositories, revisions, names of files and their fields were looked up in public programs that read them, each
revision in several: data.zip with its members `data/<task>.jsonl` and its SHA-256 (cb45b11a4133c6bc...), the columns of
the three tables and the address of a book in PG-19's; what SQuAD's and HotpotQA's JSON files hold, in the readers of
lm_eval's RULER tasks. `HF_ENDPOINT` names a mirror of the hub. The data sets keep their own licences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import typer
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError

from eval import infinitebench
from eval.longbench import FILES as LONGBENCH_FILES
from eval.longbench import SETTINGS_FILES as LONGBENCH_SETTINGS_FILES
from eval.ruler.questions import SOURCES

_GITHUB = "https://raw.githubusercontent.com"
_TIMEOUT_SECONDS = 60


class Published(NamedTuple):
    """A file at a fixed revision of a repository."""

    repository: str
    revision: str
    path: str
    host: str = "hub"
    """`hub` (a data set of the Hugging Face hub) or `github`."""

    def __str__(self) -> str:
        return f"{self.path} of {self.repository}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    published: Published

    names: tuple[str, ...]
    """What is made of it, in the folder that `--data` names."""

    make: Callable[[Path, Path, Sequence[str]], None]
    """Makes those of the names that are asked for, in an empty folder, of the fetched file, which may be moved."""

    @property
    def is_table(self) -> bool:
        return self.published.path.endswith(".parquet")


def download(suite: str, folder: Path) -> list[str]:
    """Write what `--data` of a suite reads and the folder does not have; returns the names of what was written.

    What has one of the names is taken for it and left alone. Under its name a file is whole or not there. A connection
    that breaks is taken up again some times; a command that was broken off begins with the file that it had come to.

    Raises ValueError for an unknown suite or a file that is not what it was, ImportError where pyarrow is needed and
    missing, ConnectionError where a file cannot be fetched, OSError where the folder cannot be written.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    written: list[str] = []
    for part in SUITES[suite]:
        missing = [name for name in part.names if not (folder / name).exists()]
        if not missing:
            continue
        if part.is_table:
            _parquet()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{suite}-", dir=folder) as beside:
                _write(part, missing, folder, Path(beside))
        except ConnectionError:
            raise
        except OSError as error:
            raise OSError(f"{str(folder)!r} cannot be written ({error}); make room, or name another folder") from error
        written += missing
    return written


def fetch(published: Published, folder: Path) -> Path:
    """The file itself, somewhere below the folder. Raises ConnectionError saying what cannot be fetched from where."""
    try:
        if published.host == "github":
            address = f"{_GITHUB}/{published.repository}/{published.revision}/{published.path}"
            path = folder / Path(published.path).name
            with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as answer:
                path.write_bytes(answer.read())
            return path
        repository, revision, name, _ = published
        address = hf_hub_url(repository, name, repo_type="dataset", revision=revision)
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_dir=folder))
    except (OSError, HTTPException, HTTPError, RuntimeError) as error:
        # urllib and the hub's two clients let errors of their own through.
        raise ConnectionError(_unreachable(published, address, error.__cause__ or error)) from error


def _unreachable(published: Published, address: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"{published} cannot be fetched from {address} ({reason}); run the same command again, or where there is a "
        "network, and copy the folder"
    )


def _write(part: _Part, names: Sequence[str], folder: Path, beside: Path) -> None:
    """Fetch the file of a part, and put what is made of it into the folder by renaming."""
    fetched = fetch(part.published, beside)
    made = beside / "made"
    made.mkdir()
    try:
        part.make(fetched, made, names)
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{part.published} is not what it was ({error!r}); run the same command again") from error
    for name in names:
        os.replace(made / name, folder / name)


def _keep(fetched: Path, folder: Path, names: Sequence[str]) -> None:
    (name,) = names
    os.replace(fetched, folder / name)


def _unpack(fetched: Path, folder: Path, names: Sequence[str]) -> None:
    with zipfile.ZipFile(fetched) as archive:
        for name in names:
            with archive.open(f"data/{name}") as member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def _write_books(fetched: Path, folder: Path, names: Sequence[str]) -> None:
    (name,) = names
    (folder / name).mkdir()
    for row in _rows(fetched):
        number = int(row["url"].rpartition("/")[2])
        (folder / name / f"{number}.txt").write_text(row["text"], encoding="utf-8", newline="")


def _write_squad(fetched: Path, folder: Path, names: Sequence[str]) -> None:
    """Rows, one a question, as articles of paragraphs of questions."""
    (name,) = names
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _rows(fetched):
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        asked = {"question": row["question"], "id": row["id"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(asked)
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": asked} for context, asked in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    _write_json(folder / name, {"version": "v2.0", "data": data})


def _write_hotpotqa(fetched: Path, folder: Path, names: Sequence[str]) -> None:
    """Rows with columns of titles and sentences, as pairs of a title and its sentences."""
    (name,) = names
    questions = [
        {
            "_id": row["id"],
            "question": row["question"],
            "answer": row["answer"],
            "type": row["type"],
            "level": row["level"],
            "supporting_facts": list(
                zip(row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"], strict=True)
            ),
            "context": list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
        }
        for row in _rows(fetched)
    ]
    _write_json(folder / name, questions)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.closing(_parquet().ParquetFile(path)) as table:
        for batch in table.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "the tables of PG-19, SQuAD and HotpotQA need pyarrow: pip install 'sentencekv[eval]'"
        ) from error
    return pyarrow.parquet


_LONGBENCH_CODE = ("THUDM/LongBench", "2e00731f8d0bff23dc4325161044d0ed8af94c1e")
_INFINITEBENCH = ("xinrongzhang2022/InfiniteBench", "90f0394333616266d9fe85824ceaf505093cbaa5")

SUITES: dict[str, tuple[_Part, ...]] = {
    "longbench": (
        _Part(
            published=Published("zai-org/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672", "data.zip"),
            names=LONGBENCH_FILES,
            make=_unpack,
        ),
        *(
            _Part(
                published=Published(*_LONGBENCH_CODE, f"LongBench/config/{name}", "github"), names=(name,), make=_keep
            )
            for name in LONGBENCH_SETTINGS_FILES
        ),
    ),
    "infinitebench": tuple(
        _Part(published=Published(*_INFINITEBENCH, name), names=(name,), make=_keep) for name in infinitebench.FILES
    ),
    "pg19": (
        _Part(
            published=Published(
                "emozilla/pg19",
                "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
                "data/test-00000-of-00001-29a571947c0b5ccc.parquet",
            ),
            names=("test",),
            make=_write_books,
        ),
    ),
    "ruler": (
        _Part(
            published=Published(
                "rajpurkar/squad_v2",
                "3ffb306f725f7d2ce8394bc1873b24868140c412",
                "squad_v2/validation-00000-of-00001.parquet",
            ),
            names=SOURCES["qa_1"].files[:1],
            make=_write_squad,
        ),
        _Part(
            published=Published(
                "hotpotqa/hotpot_qa",
                "1908d6afbbead072334abe2965f91bd2709910ab",
                "distractor/validation-00000-of-00001.parquet",
            ),
            names=SOURCES["qa_2"].files[:1],
            make=_write_hotpotqa,
        ),
    ),
}
"""By the name of the evaluation that reads it."""


def main(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    to: Annotated[Path, typer.Option(help="Folder to write to; what it has already is not fetched again.")],
) -> None:
    """The files that an evaluation reads with --data, from where they are published."""
    try:
        written = download(suite, to)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    done = f"{len(written)} written to {str(to)!r}" if written else f"all there already in {str(to)!r}"
    data = to / "test" if suite == "pg19" else to
    typer.echo(f"{suite}: {done}; they are read by: python -m eval.{suite} --data {data}")


if __name__ == "__main__":
    typer.run(main)
