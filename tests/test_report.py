"""The page holds what the runs do, escaped, and says what is missing; what cannot be read is named by its line."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer

from eval.report import MOST_SAMPLES, expected_rows, find_runs, main, read_run, render, wrong_answers

CONFIG = {
    "suite": "needle",
    "model": "tiny & <model>",
    "policies": ["full", "codes"],
    "budgets": [256],
    "examples": 4,
    "hardware": {"gpu": "NVIDIA H100", "gpu_count": 1},
    "versions": {"torch": "2.10.0"},
    "commit": "abc1234",
    "command": ["python", "-m", "eval.needle", "--text", "a book.txt"],
}


def row(policy: str, budget: int | None, id: str, score: float | None, **other: Any) -> dict[str, Any]:
    made = {"task": "needle", "id": id, "length": 4096, "policy": policy, "budget_tokens": budget, "metric": "exact"}
    said = {"prediction": f"said {id}", "score": score, "status": "ok", "extra": {"answers": ["<b>4821973</b>"]}}
    return {**made, **said, **other}


ROWS = [
    *[row("full", None, str(i), 1.0) for i in range(4)],
    *[row("codes", 256, str(i), float(i != 1)) for i in range(3)],
    row("codes", 256, "3", None, status="out_of_memory"),
]


def write(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] = CONFIG, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows) + tail)
    return folder


def page_of(directory: Path) -> str:
    out = directory / "page.html"
    render(directory, out)
    return out.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that elements close in order; keeps addresses, and the text of all that is shown."""

    EMPTY = frozenset({"meta", "img", "source"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_has_the_figures_and_what_was_run(tmp_path: Path) -> None:
    text = Outline(page_of(write(tmp_path / "run", ROWS))).text
    assert "needle: tiny & <model>" in text
    for fact in ("gpu NVIDIA H100, gpu count 1", "torch 2.10.0", "abc1234", "eval.needle --text 'a book.txt'"):
        assert fact in text
    # Two of three are right, full has all three, and one failed.
    assert re.search(r"66\.7\s*−33\.3 \[−100\.0, 0\.0\]\s*1 out of memory", text)
    assert "incomplete" not in text


def test_text_from_models_is_escaped(tmp_path: Path) -> None:
    rows = [row("codes", 256, "0", 0.0, prediction="<script>alert('x')</script> & \udcff")]
    page = page_of(write(tmp_path, rows))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; ?" in page
    assert "Expected: &lt;b&gt;4821973&lt;/b&gt;" in page
    assert "tiny &amp; &lt;model&gt;" in page


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    rows = [{**each, "length": length} for each in ROWS for length in (4096, 8192)]
    written = render(write(tmp_path / "a", rows), tmp_path / "out.html")
    assert [path.name for path in written] == ["out.html", "out-a-length.png"]
    page = Outline(written[0].read_text(encoding="utf-8"))
    dark, light = (address for address in page.addresses)
    assert base64.b64decode(light.removeprefix("data:image/png;base64,")) == written[1].read_bytes()
    assert base64.b64decode(dark.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert dark != light


def test_every_run_below_a_folder_has_its_section(tmp_path: Path) -> None:
    write(tmp_path / "b" / "deep", ROWS, {**CONFIG, "model": "second"})
    write(tmp_path / "a", ROWS, {**CONFIG, "model": "first"})
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.json").write_text("{}")
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b" / "deep"]
    assert read_run(tmp_path / "b" / "deep", tmp_path).name == "b/deep"
    page = page_of(tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["needle: first", "needle: second"]
    assert Outline(page).addresses == ["#run-1", "#run-2"]


def test_what_is_missing_of_a_run_is_said(tmp_path: Path) -> None:
    assert "This run is incomplete: 5 of 8 rows." in page_of(write(tmp_path / "a", ROWS[:5]))
    unknown = {"suite": "needle", "model": "m"}
    page = page_of(write(tmp_path / "b", ROWS[:5], unknown))
    assert "it has no summary.json. 5 rows so far" in page
    (tmp_path / "b" / "summary.json").write_text("[]")
    assert "incomplete" not in page_of(tmp_path / "b")
    assert "There are no rows yet." in page_of(write(tmp_path / "c", []))


def test_full_is_asked_once_and_others_with_every_budget() -> None:
    config = {"examples": 10, "policies": ["full", "codes", "mean"], "budgets": [256, 512, 1024]}
    assert expected_rows(config) == 70
    assert expected_rows({**config, "examples": None}) is None


def test_a_half_written_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, ROWS[:6], tail=json.dumps(ROWS[6])[:40]), tmp_path)
    assert len(run.rows) == 6
    assert run.notes == [
        "This run is incomplete: 6 of 8 rows.",
        "The last line of rows.jsonl was half written and is left out.",
    ]
    # Cut within a character of several bytes it is the same; whole but for its end, it counts.
    (tmp_path / "rows.jsonl").write_bytes(b'{"task": "caf\xc3')
    assert read_run(tmp_path, tmp_path).rows == []
    assert len(read_run(write(tmp_path, ROWS[:6], tail=json.dumps(ROWS[6])), tmp_path).rows) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "needle", \n', r"rows.jsonl, line 3 is not JSON \(.*take the line out"),
        ("[1, 2]\n", "rows.jsonl, line 3 is no row: it lacks task, id"),
        ('{"task": "needle", "id": "9"}\n', "line 3 is no row: it lacks length, policy, budget_tokens, metric, status"),
        (json.dumps(ROWS[0]) + "\n", "needle '0' at 4096 was asked twice under full"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, ROWS[:2], tail=line + json.dumps(ROWS[2]) + "\n")
    with pytest.raises(typer.BadParameter, match=message):
        main(directory=tmp_path, out=None)


def test_settings_that_are_broken_are_named(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(typer.BadParameter, match=r"config.json is not JSON"):
        main(directory=tmp_path, out=None)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(typer.BadParameter, match="must hold an object with the run's settings, got list"):
        main(directory=tmp_path, out=None)


def test_where_there_is_no_run_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"no run below .*config.json and rows.jsonl"):
        main(directory=tmp_path, out=None)
    with pytest.raises(typer.BadParameter, match=r"must be a folder to write page\.html in"):
        main(directory=write(tmp_path / "run", ROWS), out=tmp_path / "none" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_page_lies_in_the_folder_if_no_other_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(directory=write(tmp_path / "run", ROWS), out=None)
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / "report.html")]


def test_wrong_answers_are_the_lowest_of_the_worst_task() -> None:
    rows = [row("codes", 256, str(i), 0.5, task="fair") for i in range(3)]
    rows += [row("codes", 256, str(i), 0.0 if i < 4 else 0.4, task="worst") for i in range(30)]
    rows += [row("full", None, str(i), 1.0, task="worst") for i in range(30)]
    rows[4]["prediction"] = "x" * 1000
    (sample,) = wrong_answers(rows)
    assert (sample["policy"], sample["task"], sample["score"]) == ("codes", "worst", "34.7 of 100")
    assert len(sample["answers"]) == MOST_SAMPLES == 10
    abouts = [answer["about"] for answer in sample["answers"]]
    assert {about.partition(",")[0] for about in abouts[:4]} == {"0", "1", "2", "3"}
    assert abouts[4].endswith(", 4,096 tokens, budget 256, score 40.0")
    (long,) = [answer for answer in sample["answers"] if answer["prediction"].startswith("x")]
    assert long["prediction"] == "x" * 400 + " … (600 more characters)"
    assert wrong_answers(rows) == [sample]


def test_a_run_of_perplexity_has_no_answers(tmp_path: Path) -> None:
    rows = [
        row(p, b, i, None, task=book, length=n, metric="log_likelihood", log_likelihood=-nats * 10, tokens=10)
        for p, b, nats in (("full", None, 2.0), ("codes", 256, 2.01))
        for book in ("one", "two")
        for n in (0, 4096)
        for i in "abc"
    ]
    page = page_of(write(tmp_path / "pg", rows, {**CONFIG, "suite": "pg19", "examples": 12}))
    text = Outline(page).text
    assert "Perplexity, all 2 texts together" in text
    assert re.search(r"7\.463\s*\+1\.01% \[\+1\.01, \+1\.01\] ▼", text)
    # Three segments of a book may differ in the same direction by chance.
    assert len(re.findall(r"7\.463\s*\+1\.01% \[\+1\.01, \+1\.01\](?! ▼)", text)) == 4
    assert "Wrong answers" not in text
    assert "Memory and time" not in text, "nothing of it was measured"
    assert (tmp_path / "pg" / "page-pg-perplexity.png").is_file()


def test_texts_that_are_grouped_by_words_have_their_table(tmp_path: Path) -> None:
    rows = [
        row(policy, budget, f"{group}-{i}", score, task=task, length=0, extra={"length_group": group}, kv_gpu_bytes=1)
        for policy, budget, of_group in (("full", None, (1.0, 0.5, 0.9)), ("codes", 256, (1.0, 0.25, 0.3)))
        for group, score in zip(("0-4k", "8k+", "4-8k"), of_group, strict=True)
        for task in ("qasper_e", "trec_e")
        for i in range(2)
        if (task, group) != ("trec_e", "4-8k")
    ]
    text = Outline(page_of(write(tmp_path, rows, {**CONFIG, "suite": "longbench-e", "examples": 10}))).text
    _, _, table = text.partition("By words of text")
    table, _, _ = table.partition("Memory and time")
    assert re.findall(r"(\S+) \((\d)\)\s*(\d+\.\d)\s*(\d+\.\d)", table) == [
        ("0-4k", "4", "100.0", "100.0"),
        ("4-8k", "2", "90.0", "30.0"),
        ("8k+", "4", "50.0", "25.0"),
    ]
    assert "By words of text" not in Outline(page_of(write(tmp_path / "other", ROWS))).text
