"""What is downloaded is what evaluations read: the same questions and texts, whole or not there, fetched once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eval import download, infinitebench, longbench, pg19
from eval.download import SUITES, Published, main
from eval.ruler import questions

LONGBENCH = Path(__file__).parent / "data" / "longbench"


class Hub:
    """Files by repository and path, in the place of those that are fetched; keeps what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def file(self, published: Published) -> Path:
        path = self.folder / published.repository / published.path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def table(self, published: Published, rows: list[dict[str, Any]]) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), self.file(published), row_group_size=2)

    def fetch(self, published: Published, folder: Path) -> Path:
        self.asked.append(published.path)
        if not self.file(published).exists():
            raise ConnectionError(f"{published} cannot be fetched")
        return Path(shutil.copy(self.file(published), folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(download, "fetch", stand_in.fetch)
    return stand_in


def published(suite: str) -> list[Published]:
    return [part.published for part in SUITES[suite]]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def longbench_hub(hub: Hub) -> Hub:
    archive, prompts, lengths = published("longbench")
    with zipfile.ZipFile(hub.file(archive), "w") as file:
        for name in longbench.FILES:
            sample = LONGBENCH / name
            file.writestr(f"data/{name}", sample.read_bytes() if sample.exists() else json.dumps({"file": name}))
        file.writestr("__MACOSX/data/._lcc.jsonl", "not a task")
    hub.file(prompts).write_text(json.dumps({"qasper": "Read.\n{context}\n\nThen: {input}"}))
    hub.file(lengths).write_text(json.dumps({"qasper": 7}))
    return hub


def test_every_file_is_at_a_fixed_revision() -> None:
    for suite in SUITES:
        assert all(re.fullmatch("[0-9a-f]{40}", each.revision) for each in published(suite))
    names = [name for suite in SUITES.values() for part in suite for name in part.names]
    assert len(names) == len(set(names)), "one folder can hold all suites"
    assert len(longbench.FILES) == 21 + 13


def test_longbench(longbench_hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    to = tmp_path / "new" / "LongBench"
    assert set(download.download("longbench", to)) == files_in(to) == {*longbench.FILES, *longbench.SETTINGS_FILES}
    options = {"tokenizer": tokenizer, "max_tokens": None, "count": None}
    for extended in (False, True):
        (ours, *_) = longbench.make("qasper", data=LONGBENCH, extended=extended, **options)
        (theirs, *_) = longbench.make("qasper", data=to, extended=extended, **options)
        assert (theirs.id, theirs.answers) == (ours.id, ours.answers)
        # Its own words come with the data.
        assert (theirs.extra["wording"], theirs.max_new_tokens) == ("longbench", 7)


def test_what_is_there_is_left_alone(longbench_hub: Hub, tmp_path: Path) -> None:
    download.download("longbench", tmp_path / "to")
    longbench_hub.asked.clear()
    assert download.download("longbench", tmp_path / "to") == longbench_hub.asked == []
    mine, gone = tmp_path / "to" / "trec.jsonl", tmp_path / "to" / "lcc_e.jsonl"
    mine.write_text("mine")
    gone.unlink()
    assert download.download("longbench", tmp_path / "to") == ["lcc_e.jsonl"]
    assert longbench_hub.asked == ["data.zip"]
    assert (mine.read_text(), gone.exists()) == ("mine", True)


def test_infinitebench(hub: Hub, tmp_path: Path) -> None:
    row = {"id": 3, "context": "The pass key is 05412.", "input": "What is it?", "answer": ["05412"], "options": []}
    for each in published("infinitebench"):
        hub.file(each).write_text(json.dumps(row) + "\n")
    download.download("infinitebench", tmp_path / "to")
    assert files_in(tmp_path / "to") == {"passkey.jsonl", "number_string.jsonl", "kv_retrieval.jsonl"}
    for task in infinitebench.TASKS:
        (example,) = infinitebench.read(task, data=tmp_path / "to")
        assert example.answers == ("05412",)


def test_pg19(hub: Hub, tmp_path: Path) -> None:
    texts = {"10146": "A book.\n\nOf two paragraphs – “quoted”.\r\n", "345": "Another.\n" * 3, "7": ""}
    rows = [
        {
            "short_book_title": "T",
            "publication_date": 1888,
            "url": f"http://www.gutenberg.org/ebooks/{name}",
            "text": text,
        }
        for name, text in texts.items()
    ]
    (table,) = published("pg19")
    hub.table(table, rows)
    assert download.download("pg19", tmp_path / "to") == ["test"]
    found = pg19._find(tmp_path / "to" / "test")
    assert {path.stem: path.read_bytes().decode() for path in found} == texts
    assert download.download("pg19", tmp_path / "to") == []


WORDS = st.text(alphabet="ab é\n\"'", min_size=1, max_size=6)
PARAGRAPH = st.tuples(
    WORDS, st.lists(st.tuples(WORDS, st.lists(st.tuples(WORDS, st.integers(0, 9)), max_size=2)), min_size=1, max_size=3)
)
ARTICLES = st.lists(
    st.tuples(WORDS, st.lists(PARAGRAPH, min_size=1, max_size=3, unique_by=lambda paragraph: paragraph[0])),
    min_size=1,
    max_size=3,
    unique_by=lambda article: article[0],
)
EACH_TIME_ANEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EACH_TIME_ANEW
@given(ARTICLES)
def test_squad_is_what_its_authors_published(hub: Hub, tmp_path: Path, articles: list) -> None:
    """Articles taken apart into rows, as the hub has them, and put together again."""
    counter = iter(range(1000))
    original = {
        "version": "v2.0",
        "data": [
            {
                "title": title,
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "question": question,
                                "id": str(next(counter)),
                                "answers": [{"text": text, "answer_start": start} for text, start in answers],
                                "is_impossible": not answers,
                            }
                            for question, answers in asked
                        ],
                    }
                    for context, asked in paragraphs
                ],
            }
            for title, paragraphs in articles
        ],
    }
    rows = [
        {
            "id": qa["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")},
        }
        for article in original["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    squad, _ = published("ruler")
    hub.table(squad, rows)
    to = tmp_path / "to"
    shutil.rmtree(to, ignore_errors=True)
    with pytest.raises(ConnectionError, match="hotpot_qa cannot be fetched"):
        download.download("ruler", to)
    path = questions.find("qa_1", to)
    assert files_in(to) == {path.name}, "what was fetched before stays"
    assert json.loads(path.read_text(encoding="utf-8")) == original


def test_hotpotqa_is_what_its_authors_published(hub: Hub, tmp_path: Path) -> None:
    original = [
        {
            "_id": f"5a8b{i}",
            "question": f"Who wrote “{i}”?",
            "answer": f"author {i}",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [["T 1", 0], ["T 2", 1], ["T 1", 2]],
            "context": [[f"T {j}", [f"Sentence {k} of {i}." for k in range(j)]] for j in range(4)],
        }
        for i in range(5)
    ]
    rows = [
        {
            **{name: each[name] for name in ("question", "answer", "type", "level")},
            "id": each["_id"],
            "supporting_facts": dict(
                zip(("title", "sent_id"), zip(*each["supporting_facts"], strict=True), strict=True)
            ),
            "context": dict(zip(("title", "sentences"), zip(*each["context"], strict=True), strict=True)),
        }
        for each in original
    ]
    _, hotpotqa = published("ruler")
    hub.table(hotpotqa, rows)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "dev-v2.0.json").write_text("{}")
    assert download.download("ruler", tmp_path / "to") == ["hotpot_dev_distractor_v1.json"]
    path = questions.find("qa_2", tmp_path / "to")
    assert json.loads(path.read_text(encoding="utf-8")) == original
    parsed = questions._load(path, questions.SOURCES["qa_2"].parse)
    assert [len(question.needed) for question in parsed.questions] == [2] * 5


def test_what_is_damaged_is_not_written(longbench_hub: Hub, tmp_path: Path) -> None:
    archive, *_ = published("longbench")
    with zipfile.ZipFile(longbench_hub.file(archive), "w") as file:
        file.writestr(f"data/{longbench.FILES[0]}", "")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data\.zip of zai-org/LongBench is not what it was .*qasper\.jsonl"):
            download.download("longbench", tmp_path / "to")
    longbench_hub.file(archive).write_text("<html>")
    with pytest.raises(ValueError, match=r"is not what it was \(BadZipFile"):
        download.download("longbench", tmp_path / "to")
    (table,) = published("pg19")
    longbench_hub.table(table, [{"url": "http://www.gutenberg.org/ebooks/12", "body": "renamed"}])
    with pytest.raises(ValueError, match=r"parquet of emozilla/pg19 is not what it was \(KeyError\('text'\)"):
        download.download("pg19", tmp_path / "to")
    longbench_hub.file(table).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"is not what it was \(ArrowInvalid"):
        download.download("pg19", tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_pyarrow_is_missed_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for suite in ("pg19", "ruler"):
        with pytest.raises(ImportError, match=r"need pyarrow: pip install 'sentencekv\[eval\]'"):
            download.download(suite, tmp_path)
    assert hub.asked == []


def test_the_command(longbench_hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "to"
    main("longbench", to)
    assert capsys.readouterr().out == (
        f"longbench: 36 written to '{to}'; they are read by: python -m eval.longbench --data {to}\n"
    )
    main("longbench", to)
    assert "longbench: all there already" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match=r"suite must be one of longbench, .*got 'longbank'"):
        main("longbank", to)
    with pytest.raises(typer.BadParameter, match=r"passkey\.jsonl of .*InfiniteBench cannot be fetched"):
        main("infinitebench", to)
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.BadParameter, match=r"file' cannot be written \(.*; make room, or name another folder"):
        main("longbench", tmp_path / "file")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What a server on this machine, in the place of the hub and of GitHub, answers by path."""
    files: dict[str, bytes] = {}

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            promised = len(body or b"") + 9 * self.path.endswith("cut.json")
            self.send_header("Content-Length", str(promised))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(download, "_GITHUB", here)
        yield files
        running.shutdown()


def test_files_are_fetched_by_revision(server: dict[str, bytes], tmp_path: Path) -> None:
    on_hub = Published("owner/name", "c" * 40, "folder/file.bin")
    on_github = Published("owner/name", "d" * 40, "config/prompts.json", "github")
    server["/datasets/owner/name/resolve/" + "c" * 40 + "/folder/file.bin"] = b"of the hub" * 5000
    server["/owner/name/" + "d" * 40 + "/config/prompts.json"] = b"of GitHub"
    assert download.fetch(on_hub, tmp_path).read_bytes() == b"of the hub" * 5000
    assert download.fetch(on_github, tmp_path).read_bytes() == b"of GitHub"
    server["/owner/name/" + "d" * 40 + "/cut.json"] = b"half"
    with pytest.raises(ConnectionError, match=r"cut\.json of owner/name .*IncompleteRead"):
        download.fetch(on_github._replace(path="cut.json"), tmp_path)
    for missing in (on_hub._replace(path="other.bin"), on_github._replace(path="other.json")):
        with pytest.raises(
            ConnectionError, match=r"other\.\w+ of owner/name cannot be fetched from http://127\.0\.0\.1.*404"
        ):
            download.fetch(missing, tmp_path)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(typer.BadParameter) as caught:
        main("ruler", tmp_path)
    assert re.fullmatch(
        r"squad_v2/validation\S+ of rajpurkar/squad_v2 cannot be fetched from https://huggingface\.co/datasets/\S+ "
        r"\([^()]*HF_HUB_OFFLINE[^()]*\); run the same command again, or where there is a network, and copy the folder",
        str(caught.value),
    )
    monkeypatch.setattr(download, "_GITHUB", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"a of b/c cannot be fetched from http://127\.0\.0\.1:9/b/c/.*refused"):
        download.fetch(Published("b/c", "d", "a", "github"), tmp_path)
