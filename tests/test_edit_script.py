"""Explanations on a terminal: nothing is lost or wider than the terminal, and signs stand where no colours are."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from sentencekv.edit_script import _without_middle, explanation_block
from sentencekv.explain import Explanation, Trial, explain_texts
from sentencekv.prose import generate_prose
from sentencekv.reuse.decide import make_reuse_options
from sentencekv.reuse.report import Reuse
from sentencekv.terminal import show
from tests.conftest import make_model

SENTENCES = [f"{each.strip()}. " for each in generate_prose(260, seed=7).split(".") if each.strip()]
DONOR = "".join(SENTENCES)
CHANGED = "".join(
    [
        *SENTENCES[:4],
        "A lantern \u96e8. ",
        *SENTENCES[9:12],
        "No. ",
        *SENTENCES[13:],
        *SENTENCES[5:8],
        "It was 4410927.",
    ]
)


@pytest.fixture(scope="module")
def explanation(tokenizer: PreTrainedTokenizerFast) -> Explanation:
    return explained(tokenizer, CHANGED)


def explained(tokenizer: PreTrainedTokenizerFast, text: str, **options: object) -> Explanation:
    return explain_texts(DONOR, text, tokenizer, make_model("llama").config, make_reuse_options(options))


def shown(
    explanation: Explanation, width: int = 80, *, colours: bool = False, full: bool = False, trial: Trial | None = None
) -> str:
    system = "standard" if colours else None
    console = Console(file=io.StringIO(), width=width, force_terminal=colours, color_system=system, highlight=False)
    show(console, explanation_block(explanation, ("one.txt", "two.txt"), full=full, trial=trial))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("full", [False, True])
def test_width(explanation: Explanation, width: int, full: bool) -> None:
    lines = shown(explanation, width, full=full).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_signs_in_place_of_colours(explanation: Explanation) -> None:
    out = words(shown(explanation, full=True))
    assert "[-" in out
    assert re.search(r"\{\+[^+]*lantern", out)
    assert re.search(r"\{\+[^+]*4410927\.\+\}", out)
    # The text of B is there from end to end, between its marks and beside what is gone.
    text = out[out.index("the text of B") + len("the text of B") : out.index("reading B with A cached")]
    without_gone = re.sub(r"\[-.*?-\]", "", text)
    assert "".join(re.sub(r"\{[:>?~+]|[:<?~+]\}", "", without_gone).split()) == "".join(CHANGED.split())
    assert "\x1b" not in out


def test_colours_in_place_of_signs(explanation: Explanation) -> None:
    out = shown(explanation, colours=True)
    assert "\x1b[1;35m" in out  # what is new
    assert not re.search(r"\{[:>?~+]|[:>?~+]\}|\[-|-\]", out)


def test_counts_and_operations(explanation: Explanation) -> None:
    out = shown(explanation)
    counts, total = explanation.counts(), explanation.alignment.num_tokens
    for kind, count in counts.items():
        row = rf"^ +[=:>?~+-] {kind} +{count:,}  " + ("" if kind == "gone" else rf" *{count / total:.0%} ")
        assert bool(re.search(row, out, re.MULTILINE)) == bool(count), kind
    assert f"{len(explanation.operations)} operations from A to B" in out
    rows = re.findall(r"^  [=:>?~+-] (keep|move|insert|delete|replace) ", out, re.MULTILINE)
    assert rows == [operation.kind for operation in explanation.operations]
    first, second = (line.strip() for line in out.splitlines()[1:4:2])
    assert set(first) <= set("=:>-")
    assert set(second) <= set("=:>~+")
    assert len(first) == len(second)


def test_long_runs_and_long_lists_are_shortened(tokenizer: PreTrainedTokenizerFast) -> None:
    unchanged = explained(tokenizer, DONOR + "It ended.")
    assert len(shown(unchanged)) < len(shown(unchanged, full=True)) - len(DONOR) // 2
    assert re.search(r"\[\.\.\. [\d,]+ characters \.\.\.\]", words(shown(unchanged)))
    sentences = [f"{each.strip()}. " for each in generate_prose(700, seed=8).split(".")]
    numbered = "".join(f"{sentence}{number} " for number, sentence in enumerate(sentences))
    options = make_reuse_options({})
    many = explain_texts("".join(sentences), numbered, tokenizer, make_model("llama").config, options)
    num_operations = len(many.operations)
    assert num_operations > 30
    assert f"... {num_operations - 30} more operations; --full shows them" in shown(many)
    assert "--full" not in shown(many, full=True)


def test_outcomes(tokenizer: PreTrainedTokenizerFast) -> None:
    moved = words(shown(explained(tokenizer, CHANGED)))
    assert re.search(r"reuse=similar computes \d+ of \d+ tokens \(\d+%\); an approximation$", moved)
    again = words(shown(explained(tokenizer, DONOR)))
    assert again.endswith("reuse=similar computes nothing: A is the same prompt")
    assert "again" not in again
    other = words(shown(explained(tokenizer, generate_prose(80, seed=9))))
    assert re.search(r"reuse=similar computes all \d+ tokens: nothing like it is cached$", other)
    little = words(shown(explained(tokenizer, CHANGED, min_gain=0.95)))
    assert re.search(r"reuse=similar computes all \d+ tokens: .* 95% \(min_gain\)$", little)
    deeper = words(shown(explained(tokenizer, CHANGED, last_tokens=0, ratio=0.1)))
    assert re.search(r"at the first layer, fewer at later ones: as much work as \d+ \(\d+%\)", deeper)


def test_what_will_not_be_reused_is_said_above_the_picture(tokenizer: PreTrainedTokenizerFast) -> None:
    nothing = "none of it will be reused: see the end"
    beginning = "only the beginning of both will be reused: see the end"
    assert not any(
        line in words(shown(explained(tokenizer, text))) for text in (CHANGED, DONOR) for line in (nothing, beginning)
    )
    assert nothing in words(shown(explained(tokenizer, CHANGED, min_gain=0.99)).split(" operations from A to B")[0])
    begun = "".join(SENTENCES[:-8]) + generate_prose(60, seed=10) + "".join(SENTENCES[-2:])
    little = explained(tokenizer, begun)
    assert little.similar.kind == "prefix"
    assert little.counts()["moved"] + little.counts()["again"] > 0
    assert beginning in words(shown(little))


def test_the_legend_says_what_is_computed_again(explanation: Explanation) -> None:
    """The last tokens of the prompt, of which there are many, not the last one."""
    assert explanation.counts()["again"] > 32
    assert "in A too, but computed: the first of a run, and the last of B" in words(shown(explanation, 200))


def test_trial(explanation: Explanation) -> None:
    reuse = Reuse(
        kind="similar",
        approximate=True,
        reason="",
        donor=1,
        prompt_tokens=900,
        prefix_tokens=100,
        kept_tokens=0,
        moved_tokens=700,
        fuzzy_tokens=0,
        recomputed_tokens=32,
        new_tokens=100,
        computed_by_layer=(132, 132),
        seconds_to_find=0.01,
        seconds_to_read=0.5,
        seconds_saved=1.25,
        estimated_error=0.0321,
    )
    trial = Trial(reuse, seconds_in_full=2.0, divergence=0.00123, token_ids=[1, 2, 3], full_token_ids=[1, 2, 4])
    out = words(shown(explanation, trial=trial))
    for expected in (
        f"reused 768 of 900 tokens of a similar text ({explanation.counts()['moved']} moved), computed 132: "
        "an approximation, estimated error 3.2% "
        "time 500 ms",
        "time 500 ms, 10.0 ms of it to find A",
        "in full 2.0 s, 4.0 times as long",
        "divergence 0.0012 nats, KL(full || reuse) of the next token",
        "the first 2 of 3 are the same",
    ):
        assert expected in out
    alike = Trial(reuse, seconds_in_full=2.0, divergence=0.0, token_ids=[1, 2], full_token_ids=[1, 2])
    assert "the first 2 are the same" in shown(explanation, trial=alike)


@given(st.text(st.sampled_from("ab \u4e2d\u00e9\U0001f600"), max_size=60), st.integers(1, 40))
def test_without_middle(text: str, width: int) -> None:
    short = _without_middle(text, width)
    assert cell_len(short) <= width
    if cell_len(text) <= width:
        assert short == text
    elif width > 20:
        head, dots, tail = short.partition(" ... ")
        assert dots
        assert text.startswith(head.rstrip())
        assert text.endswith(tail)
        assert cell_len(short) >= width - 2
