"""Every command and every bad input, as a user meets them: output, one sentence for an error, exit status."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentencekv import Config, __version__, arguments, cli, pocket, policies
from sentencekv.prose import generate_prose
from tests.conftest import make_model

ROOT = Path(__file__).parent.parent
CONTROL_CODE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit status, standard output and standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run a command that must fail with one sentence and nothing on standard output; returns the sentence."""

    def fails(status: int, *args: object) -> str:
        got, out, err = run(*args)
        assert got == status, err
        assert out == ""
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.rstrip().endswith(line)
        return line

    return fails


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, architecture: str = "llama", **changes: object) -> str:
    make_model(architecture, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    return save_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(generate_prose(300, seed=4), encoding="utf-8")
    return path


class TestAsk:
    def test_answer_alone_on_standard_output(self, run: Run, model: str, text: Path) -> None:
        status, out, err = run("ask", text, "Who came?", "--model", model, "--max-new-tokens", 8, "--budget", 128)
        assert status == 0
        assert out.endswith("\n")
        assert len(out.strip().splitlines()) >= 1
        assert "tokens per head; first token" in err
        assert "reading: 100%" in err
        assert "read most" not in err
        assert not CONTROL_CODE.search(err)
        again = run("ask", text, "Who came?", "--model", model, "--max-new-tokens", 8, "--budget", 128)
        assert again[1] == out

    def test_sources(self, run: Run, model: str, text: Path) -> None:
        status, _, err = run("ask", text, "Who?", "--model", model, "--max-new-tokens", 4, "--budget", 128, "--sources")
        assert status == 0
        found = re.findall(r"^ *\d+\.\d%  \d+% in, line \d+ ", err, re.MULTILINE)
        assert len(found) == 5
        assert re.search(r"^all fetched sentences \d+\.\d%; the rest went to", err, re.MULTILINE)
        assert all(len(line) <= 100 for line in err.splitlines() if str(text) not in line)
        assert all(line == line.rstrip() for line in err.splitlines())

    def test_json(self, run: Run, model: str, text: Path) -> None:
        status, out, _ = run("ask", text, "Who?", "--model", model, "--max-new-tokens", 4, "--budget", 128, "--json")
        assert status == 0
        result = json.loads(out)
        assert result["question"] == "Who?"
        assert result["stats"]["generated_tokens"] == 4
        first = result["sources"][0]
        content = text.read_text(encoding="utf-8")
        assert content[first["start"] : first["end"]].strip() == first["text"]
        assert content.splitlines()[first["line"] - 1].startswith(first["text"][:5]) or first["line"] > 0

    def test_policy_and_options(self, run: Run, model: str, text: Path) -> None:
        for name in policies.available():
            status, out, err = run(
                "ask", text, "Who?", "--model", model, "--max-new-tokens", 2, "--policy", name, "--budget", 128
            )
            assert status == 0, err
            assert out.strip() or out == "\n"
        chosen = ("--policy", "mean", "--policy-option", "group=mean", "--temperature", 0.7, "--seed", 3)
        assert run("ask", text, "Who?", "--model", model, "--max-new-tokens", 2, *chosen)[0] == 0

    def test_standard_input(self, run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A short story. It ends.")))
        status, _, err = run("ask", "-", "What?", "--model", model, "--max-new-tokens", 2)
        assert status == 0
        assert "read standard input" in err

    def test_directory(self, run: Run, model: str, text: Path, tmp_path: Path) -> None:
        shutil.copy(text, tmp_path / "one.txt")
        (tmp_path / "two.bin").write_bytes(b"\0\1")
        status, _, err = run(
            "ask", tmp_path, "Who?", "--model", model, "--max-new-tokens", 4, "--budget", 128, "--sources"
        )
        assert status == 0
        assert err.count("skipped 1 file not readable as text: two.bin") == 1


class TestChat:
    def test_conversation(self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = "/stats\nWho came?\n\n/sources\n/stats\n/nonsense\n" + "word " * 5000 + "\n/quit\nnever asked\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status, out, err = run("chat", text, "--model", model, "--max-new-tokens", 4, "--budget", 128)
        assert status == 0
        assert out.count("\n") >= 1
        for expected in (
            "nothing was asked yet",
            "read most, by share of attention",
            "tokens from the host",
            "unknown command /nonsense",
            "error: the prompt has",
        ):
            assert expected in err
        assert "never asked" not in out + err

    def test_end_of_input(self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert run("chat", text, "--model", model)[:2] == (0, "")

    def test_interrupt_at_the_prompt_leaves(
        self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(_prompt: str = "") -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupt)
        assert run("chat", text, "--model", model)[0] == 0

    def test_interrupt_stops_the_answer_only(
        self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(_stream: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "write_answer", interrupt)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n/nonsense\n"))
        status, _, err = run("chat", text, "--model", model)
        assert status == 0
        assert err.index("stopped; Ctrl-C at the prompt leaves") < err.index("unknown command /nonsense")

    def test_not_from_standard_input(self, fails: Callable[..., str]) -> None:
        assert "save it to a file" in fails(2, "chat", "-")

    def test_questions_are_remembered(self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second answer depends on the first question, unless told otherwise."""
        options = ("--model", model, "--max-new-tokens", 6, "--budget", 128)
        answers = {}
        for option in ("--remember", "--forget"):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Who came?\nWho came?\n/sources\n"))
            status, out, err = run("chat", text, *options, option)
            assert status == 0
            answers[option] = out.splitlines()
            assert ("are remembered" in err) == (option == "--remember")
        # An answer of random weights may hold line breaks.
        lines = len(answers["--forget"]) // 2
        first, second = answers["--forget"][:lines], answers["--forget"][lines:]
        assert first == second == answers["--remember"][:lines] != answers["--remember"][lines:]


class TestRead:
    def test_saves_what_ask_and_chat_open(
        self,
        run: Run,
        fails: Callable[..., str],
        model: str,
        text: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        options = ("--model", model, "--budget", 128)
        saved = tmp_path / "book.skv"
        status, out, err = run("read", text, saved, *options)
        assert (status, out) == (0, "")
        assert re.search(r"^saved .*book\.skv: \d+\.\d [KM]iB$", err, re.MULTILINE)
        ask = ("Who came?", *options, "--max-new-tokens", 8, "--json")
        ours, theirs = json.loads(run("ask", saved, *ask)[1]), json.loads(run("ask", text, *ask)[1])
        assert ours["answer"] == theirs["answer"]
        for mine, other in zip(ours["sources"], theirs["sources"], strict=True):
            assert (mine["text"], mine["line"], mine["share"]) == (other["text"], other["line"], other["share"])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who came?\n/sources\n"))
        status, out, err = run("chat", saved, *options, "--max-new-tokens", 8)
        assert status == 0
        assert "opened" in err
        assert "reading:" not in err
        assert "read and saved already" in fails(2, "read", saved, tmp_path / "again", *options)
        assert "is a saved document" in fails(2, "demo", "--text", saved, *options)
        assert "was read under policy='codes'" in fails(2, "ask", saved, "Who?", *options, "--policy", "box")
        content = bytearray(saved.read_bytes())
        content[-9] ^= 1
        saved.write_bytes(content)
        assert "does not match its checksum" in fails(2, "ask", saved, "Who?", *options)
        saved.write_bytes(content[:-9])
        assert "was the copy cut off" in fails(2, "ask", saved, "Who?", *options)

    def test_what_cannot_be_written_is_known_at_once(
        self, fails: Callable[..., str], text: Path, tmp_path: Path
    ) -> None:
        """Before the model is loaded: there is none of that name."""
        assert "it is a directory" in fails(1, "read", text, tmp_path, "--model", "nowhere")
        assert "create it first" in fails(2, "read", text, tmp_path / "no" / "a", "--model", "nowhere")
        assert "is the text itself" in fails(2, "read", text, text, "--model", "nowhere")
        os.mkfifo(tmp_path / "pipe")
        assert "a device or a pipe" in fails(1, "read", text, tmp_path / "pipe", "--model", "nowhere")

    def test_fewer_bits(self, run: Run, model: str, text: Path, tmp_path: Path) -> None:
        options = ("--model", model, "--budget", 128, "--kv-dtype", "int8")
        assert run("read", text, tmp_path / "a", *options)[0] == 0
        status, out, _ = run("ask", tmp_path / "a", "Who?", *options, "--max-new-tokens", 6)
        assert status == 0
        assert out == run("ask", text, "Who?", *options, "--max-new-tokens", 6)[1]


class TestReuse:
    @pytest.fixture
    def texts(self, text: Path, tmp_path: Path) -> tuple[Path, Path]:
        """A text, and the same with its paragraphs in another order."""
        paragraphs = text.read_text(encoding="utf-8").split("\n\n")
        half = len(paragraphs) // 2
        moved = tmp_path / "moved.txt"
        moved.write_text("\n\n".join([*paragraphs[half:], *paragraphs[:half]]), encoding="utf-8")
        return text, moved

    def test_a_folder_spares_the_next_process_the_reading(
        self, run: Run, model: str, texts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        options = ("--model", model, "--max-new-tokens", 6, "--budget", 128)
        first, moved = texts
        plain = run("ask", first, "Who?", *options)[1]
        for mode, path, expected in (
            (None, first, r"reused nothing: nothing like it is cached"),
            (None, first, r"reused all [\d,]+ tokens: the same text was read before"),
            ("exact", moved, r"reused nothing: nothing like it is cached"),
            ("similar", moved, r"reused all [\d,]+ tokens"),
        ):
            reuse = ("--reuse-folder", tmp_path / "cache", *(() if mode is None else ("--reuse", mode)))
            status, out, err = run("ask", path, "Who?", *options, *reuse)
            assert status == 0, err
            assert re.search(expected, " ".join(err.split())), (mode, err)
            assert re.search(r"^read .*: [\d,]+ tokens in ", err, re.MULTILINE)
            if path == first:
                assert out == plain

    def test_similar_texts(self, run: Run, model: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
        options = ("--model", model, "--max-new-tokens", 4, "--budget", 128, "--reuse-folder", tmp_path / "cache")
        assert run("ask", texts[0], "Who?", *options)[0] == 0
        status, _, err = run("ask", texts[1], "Who?", *options, "--reuse", "similar")
        assert status == 0
        line = " ".join(err.split())
        found = re.search(
            r"reused ([\d,]+) of ([\d,]+) tokens of a similar text \(([\d,]+) moved\), computed ([\d,]+): an "
            r"approximation, estimated error [\d.]+%",
            line,
        )
        assert found
        reused, total, moved, computed = (int(number.replace(",", "")) for number in found.groups())
        assert reused + computed == total
        assert 0 < computed < moved < total
        status, out, _ = run("ask", texts[1], "Who?", *options, "--reuse", "similar", "--json")
        reuse = json.loads(out)["reuse"]
        assert (reuse["kind"], reuse["approximate"], reuse["prompt_tokens"]) == ("same", True, total)
        # What is an approximation serves nobody who did not ask for one.
        assert "reused nothing" in run("ask", texts[1], "Who?", *options)[2]

    def test_chat(self, run: Run, model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        longer = tmp_path / "longer.txt"
        longer.write_text(text.read_text(encoding="utf-8") + "\nNobody came after that.", encoding="utf-8")
        options = ("--model", model, "--max-new-tokens", 4, "--budget", 128, "--reuse-folder", tmp_path / "cache")
        for path, expected in (
            (text, "reused nothing"),
            (longer, r"reused the first [\d,]+ of [\d,]+ tokens, computed"),
        ):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n/stats\n"))
            status, _, err = run("chat", path, *options)
            assert status == 0
            assert re.search(rf"^{expected}", err, re.MULTILINE)
            assert re.search(rf"^  the text +{expected}", err, re.MULTILINE)

    def test_an_interrupted_answer_leaves_no_trace(
        self, run: Run, model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(_stream: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "write_answer", interrupt)
        status, _, err = run("ask", text, "Who?", "--model", model, "--reuse-folder", tmp_path / "cache")
        assert status == 130
        assert err.splitlines()[-1] == "interrupted; nothing was written"
        assert not list((tmp_path / "cache").rglob("*.payload"))

    def test_explain(self, run: Run, model: str, texts: tuple[Path, Path]) -> None:
        status, out, err = run("reuse", "explain", texts[0], f"@{texts[1]}", "--model", model)
        assert status == 0
        assert err == ""
        for expected in (" operations from A to B", "reuse=off ", "reuse=exact ", "reuse=similar ", "> moved "):
            assert expected in out
        assert not CONTROL_CODE.search(out)
        assert max(map(len, out.splitlines())) <= 100

    def test_explain_needs_no_weights(self, run: Run, model: str, texts: tuple[Path, Path], tmp_path: Path) -> None:
        shutil.copytree(model, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        assert run("reuse", "explain", *texts, "--model", tmp_path / "model")[0] == 0

    def test_explain_texts(self, run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        long_text = "It rained for a week. " * 40 + "~\0"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"It rained. Then it stopped.")))
        status, out, err = run("reuse", "explain", long_text, "-", "--model", model, "--json")
        assert status == 0
        assert err == ""
        found = json.loads(out)
        assert (found["donor"], found["prompt"]) == ("the text itself", "standard input")
        assert "".join(each["text"] for each in found["operations"]) == "It rained. Then it stopped."
        status, out, err = run("reuse", "explain", "no.txt", "It rained.", "--model", model)
        assert status == 0
        assert "there is no file 'no.txt', so this is taken as the text itself" in err

    def test_explain_and_run(self, run: Run, model: str, texts: tuple[Path, Path]) -> None:
        explain = ("reuse", "explain", *texts, "--model", model, "--run")
        status, out, _ = run(*explain)
        assert status == 0
        assert re.search(r"reused [\d,]+ of [\d,]+ tokens of a similar text", " ".join(out.split()))
        assert re.search(r"^  divergence +[\d.e-]+ nats", out, re.MULTILINE)
        status, out, _ = run(*explain, "--json", "--reuse-option", "min_gain=0.99")
        found = json.loads(out)
        assert found["run"]["reuse"]["kind"] == found["similar"]["kind"] == "none"
        assert found["run"]["reuse"]["reason"] == found["similar"]["reason"] != ""
        assert found["run"]["divergence"] < 1e-9
        fuzzy = ("--reuse-option", "fuzzy=true", "--reuse-option", "retention=0.1", "--json")
        assert json.loads(run(*explain, *fuzzy)[1])["run"]["reuse"]["kind"] == "similar"

    def test_asked_wrongly(
        self, fails: Callable[..., str], model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ask, explain = ("ask", text, "Who?"), ("reuse", "explain", text, text)
        assert "--reuse similar needs --reuse-folder" in fails(2, *ask, "--reuse", "similar")
        assert "is a file" in fails(2, *ask, "--reuse-folder", text)
        folder = ("--reuse-folder", tmp_path / "cache")
        assert "'exact' or 'similar', got 'fast'" in fails(2, *ask, *folder, "--reuse", "fast")
        assert "needs kv_dtype='auto'" in fails(2, *ask, *folder, "--kv-dtype", "int8")
        assert "not both" in fails(2, "reuse", "explain", "-", "-")
        assert "a prompt is empty" in fails(2, "reuse", "explain", text, " ")
        assert "no file or directory 'nowhere'" in fails(2, "reuse", "explain", text, "@nowhere")
        assert "must be NAME=VALUE, got 'ratio'" in fails(2, *explain, "--reuse-option", "ratio")
        assert "unknown reuse option 'size'" in fails(2, *explain, "--reuse-option", "size=3")
        fuzzy = ("--reuse-option", "fuzzy=true", "--reuse-option", "retention=0.1")
        assert "add --run" in fails(2, *explain, *fuzzy)
        assert "cannot load a tokenizer from" in fails(1, *explain, "--model", tmp_path)
        assert "No such command 'stats'" in fails(2, "reuse", "stats")
        monkeypatch.setitem(sys.modules, "faiss", None)
        for args in ((*ask, *folder), (*explain, "--run")):
            assert 'pip install "sentencekv[reuse]"' in fails(2, *args, "--model", "nowhere")

    def test_saved_documents(self, run: Run, fails: Callable[..., str], model: str, text: Path, tmp_path: Path) -> None:
        saved = tmp_path / "a"
        assert run("read", text, saved, "--model", model)[0] == 0
        assert "leave out --reuse-folder" in fails(2, "ask", saved, "Who?", "--reuse-folder", tmp_path / "cache")
        assert "prompts are compared as texts" in fails(2, "reuse", "explain", text, saved)


class TestDemo:
    def test_wrong_answers(self, run: Run, model: str) -> None:
        status, out, err = run("demo", "--model", model, "--tokens", 1200, "--facts", 2, "--budget", 256)
        assert status == 1
        for expected in (
            "2 facts hidden in a text of 1,",
            "no GPU: both are CPU memory" if not torch.cuda.is_available() else "pinned memory",
            "1 of 2  ",
            "WRONG",
            "wanted  ",
            "256 of 1,",
            "0 of 2 right",
            "hit rate",
            "2 answers wrong: exit status 1",
        ):
            assert expected in out
        assert re.search(r"^ +\d+\.\d%  \d+% in, at [\d,]+ ", out, re.MULTILINE)
        assert re.search(r"reading: 100% \(1,\d+ of 1,\d+ tokens, [\d,]+ tokens/s\)", err)
        assert not CONTROL_CODE.search(out + err)
        assert max(map(len, out.splitlines())) <= 100

    def test_all_right(self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sentencekv.demo.is_right", lambda _answer, _fact: True)
        status, out, _ = run("demo", "--model", model, "--text", text, "--tokens", 300, "--facts", 1)
        assert status == 0
        assert "1 of 1 right" in out
        assert re.search(r"cut after \d+% \(--tokens 300\)", " ".join(out.split()))
        assert "not longer than the budget" in out

    @pytest.mark.skipif(not (pocket.path() / "model.safetensors").is_file(), reason="no pocket model here")
    def test_pocket_model(self, run: Run) -> None:
        status, out, _ = run("demo", "--tokens", 1500, "--facts", 3, "--budget", 384)
        assert "3 of 3 right" in out
        assert status == 0


class TestPlain:
    def test_help_and_version_come_at_once(self) -> None:
        code = (
            "import sys; from sentencekv.cli import main; status = main(sys.argv[1:]); "
            "assert not {'torch', 'transformers', 'nltk', 'numpy'} & set(sys.modules); sys.exit(status)"
        )
        for args, expected in ((["--help"], "policies"), (["ask", "--help"], "--budget"), (["--version"], __version__)):
            done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert expected in done.stdout

    def test_without_a_command(self, run: Run) -> None:
        status, out, err = run()
        assert status == 2
        assert "Commands" in out + err
        assert "error" not in err

    def test_policies(self, run: Run) -> None:
        status, out, _ = run("policies")
        assert status == 0
        assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == list(policies.available())
        assert out.count("(the default)") == 1

    def test_info(self, run: Run) -> None:
        status, out, _ = run("info")
        assert status == 0
        for expected in (__version__, torch.__version__, "host memory", "pocket model"):
            assert expected in out

    def test_help_tells_the_engine_s_defaults(self) -> None:
        assert Config().budget_tokens == arguments.DEFAULT_BUDGET_TOKENS
        assert Config().policy == arguments.DEFAULT_POLICY


class TestBadInput:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["ask", "nowhere.txt", "Who?"], "no file or directory 'nowhere.txt'; check the path"),
            (["ask", "TEXT", " "], "the question is empty"),
            (["ask", "TEXT", "Who?", "--budget", "64"], r"must exceed .* \(80\), got 64; raise the budget"),
            (["ask", "TEXT", "Who?", "--budget", "few"], r"'--budget': .*'few'"),
            (["ask", "TEXT", "Who?", "--policy", "best"], "unknown policy 'best'; available: box, "),
            (["ask", "TEXT", "Who?", "--policy-option", "size=3"], r"unknown option 'size' of policy '\w+'; it has"),
            (["ask", "TEXT", "Who?", "--policy-option", "group=min"], "group must be 'max' or 'mean', got 'min'"),
            (["ask", "TEXT", "Who?", "--policy-option", "group"], "must be NAME=VALUE, got 'group'"),
            (["ask", "TEXT", "Who?", "--temperature", "-1"], "temperature must be 0 .* got -1"),
            (["ask", "TEXT", "Who?", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
            (["ask", "TEXT", "Who?", "--device", "tpu"], "device must be .* got 'tpu'"),
            (["ask", "TEXT", "Who?", "--dtype", "int8"], "dtype must be .* got 'int8'"),
            (["ask", "TEXT", "Who?", "--model", "./nowhere"], "no model folder at './nowhere'; give a folder"),
            (["ask", "TEXT"], "Missing argument .*; see `sentencekv ask --help`"),
            (["ask", "TEXT", "Who?", "--fast"], "No such option: --fast.*; see `sentencekv ask --help`"),
            (["sing"], "No such command 'sing'"),
            (["demo", "--facts", "0"], "--facts must be at least 1, got 0"),
            (["demo", "--text", "nowhere.txt"], "no file or directory 'nowhere.txt'"),
        ],
    )
    def test_asked_wrongly(
        self, fails: Callable[..., str], model: str, text: Path, args: list[str], message: str
    ) -> None:
        given = [str(text) if arg == "TEXT" else arg for arg in args]
        assert re.search(message, fails(2, *given))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda(self, fails: Callable[..., str], model: str, text: Path) -> None:
        line = fails(2, "ask", text, "Who?", "--model", model, "--device", "cuda")
        assert "torch sees 0 CUDA devices" in line

    @pytest.mark.parametrize("content", [b"", b" \n", b"\0\1", b"caf\xe9"])
    def test_not_a_text(self, fails: Callable[..., str], model: str, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        assert "convert" in (line := fails(2, "ask", path, "Who?", "--model", model)) or "give a text" in line

    def test_longer_than_the_positions(self, fails: Callable[..., str], model: str, tmp_path: Path) -> None:
        path = tmp_path / "long.txt"
        path.write_text(generate_prose(3000, seed=1))
        line = fails(2, "ask", path, "Who?", "--model", model)
        assert re.search(r"has \d,\d+ tokens, .* positions for 4,096; shorten the text", line)
        line = fails(2, "demo", "--tokens", 5000, "--model", model)
        assert "positions for 4,096 tokens; use --tokens 3920" in line

    def test_model_without_rope(
        self, fails: Callable[..., str], tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
    ) -> None:
        folder = save_model(tmp_path, tokenizer, "gpt2", n_embd=48, n_head=4, n_layer=2)
        assert "rotary" in fails(2, "ask", text, "Who?", "--model", folder)

    @pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize("how", ["truncated", "missing"])
    def test_corrupt_model_folder(
        self, fails: Callable[..., str], model: str, text: Path, tmp_path: Path, broken: str, how: str
    ) -> None:
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        if how == "missing":
            (folder / broken).unlink()
        else:
            content = (folder / broken).read_bytes()
            (folder / broken).write_bytes(content[: len(content) // 2])
        line = fails(1, "ask", text, "Who?", "--model", folder)
        assert re.search(r"cannot load a model from '.*': .*; it must be a folder with config.json", line)

    def test_host_memory_too_small(
        self, fails: Callable[..., str], model: str, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sentencekv.memory.available_host_bytes", lambda: 2**16)
        line = fails(1, "ask", text, "Who?", "--model", model, "--max-new-tokens", 4)
        assert re.search(r"needs \d.* of host memory and .* is free", line)

    def test_nan_weights(
        self, fails: Callable[..., str], tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
    ) -> None:
        broken = make_model("llama")
        with torch.no_grad():
            broken.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
        broken.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert "NaN" in fails(1, "ask", text, "Who?", "--model", tmp_path)

    def test_a_bug_is_not_hidden(self, run: Run, model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_args: object, **_keywords: object) -> None:
            raise RuntimeError("shapes do not match")

        monkeypatch.setattr("sentencekv.lm.LongContextLM.read", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            run("ask", text, "Who?", "--model", model)

    def test_debug_shows_the_traceback(self, run: Run) -> None:
        with pytest.raises(FileNotFoundError):
            run("ask", "nowhere.txt", "Who?", "--debug")


def test_interrupt_while_reading(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_model(tmp_path / "model", tokenizer, max_position_embeddings=10**6)
    path = tmp_path / "long.txt"
    path.write_text(generate_prose(20_000, seed=1))
    with subprocess.Popen(
        [sys.executable, "-m", "sentencekv", "ask", str(path), "Who?", "--model", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Whoever runs the tests may ignore interrupts, as shells do for what they run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline().startswith("reading: 10%")
        process.send_signal(signal.SIGINT)
        started_at = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - started_at < 30
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in err
