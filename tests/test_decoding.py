"""The decode loop with and without running ahead: the same texts, and sessions that go on from the same state."""

import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sentencekv import policies
from sentencekv.attention import forward
from sentencekv.decoding import Decoding, decode
from sentencekv.graph import Stepper
from sentencekv.sampling import SamplingOptions
from sentencekv.session import Session
from tests.conftest import make_model
from tests.test_graph import reading_session, token_ids
from triton_ops.resolve_hot_set import resolve_hot_set_triton

LENGTHS = [300, 41, 160]


class CountingStepper(Stepper):
    """Counts the tokens of the steps that were launched ahead."""

    num_launched = 0

    def launch(self, sessions: Any, given: Any) -> torch.Tensor:
        self.num_launched += len(sessions)
        return super().launch(sessions, given)

    def step(self, sessions: Any, given: Any) -> torch.Tensor:
        """Waits for tokens, though it launches too."""
        before = self.num_launched
        logits_BV = super().step(sessions, given)
        self.num_launched = before
        return logits_BV


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    options: list[dict[str, Any]],
    *,
    policy: str = "moments",
    run_ahead: bool,
    pieces: int | None = None,
    stop_ids: tuple[int, ...] = (),
) -> tuple[list[Decoding], list[list[str]], int]:
    """Decodings of sessions that have read random tokens, their pieces of text, and tokens launched ahead.

    `pieces`: after so many, nobody asks for more.
    """
    # Not in inference mode: neither are those who call the library.
    sessions = [reading_session(model, n, policy=policy, seed=n) for n in LENGTHS]
    logits = torch.cat([forward(model, [[5]], [session], exact=True) for session in sessions])
    stepper = CountingStepper(model, policies.load(policy), run_ahead=run_ahead)
    assert stepper.runs_ahead == run_ahead
    decodings = [
        Decoding(session, token_ids(n + 1, n), tokenizer, SamplingOptions(**given), stop_ids)
        for session, n, given in zip(sessions, LENGTHS, options, strict=True)
    ]
    texts: list[list[str]] = [[] for _ in sessions]
    stream = decode(stepper, decodings, logits)
    for count, (i, piece) in enumerate(stream):
        texts[i].append(piece)
        if pieces is not None and count + 1 == pieces:
            stream.close()  # type: ignore[attr-defined]
            break
    return decodings, texts, stepper.num_launched


def compare_next_steps(model: PreTrainedModel, mine: Session, other: Session) -> None:
    """Both have read the same, and what they compute next is the same."""
    assert mine.num_tokens == other.num_tokens
    assert mine.sentence_spans() == other.sentence_spans()
    for token in token_ids(30, 7):
        logits = [forward(model, [[token]], [session], exact=False) for session in (mine, other)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    logits = [forward(model, [token_ids(40, 8)], [session], exact=True) for session in (mine, other)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "greedy": [{"max_new_tokens": n} for n in (40, 1, 17)],
    "sampled": [{"max_new_tokens": n, "temperature": 1.0, "top_k": 20, "seed": n} for n in (25, 30, 2)],
    "penalty, log-probabilities": [
        {"max_new_tokens": n, "repetition_penalty": 1.3, "logprobs": True} for n in (20, 22, 24)
    ],
}


@pytest.mark.parametrize("policy", ["moments", "codes", "window"])
@pytest.mark.parametrize("name", OPTIONS)
def test_running_ahead_changes_nothing(
    name: str, policy: str, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> None:
    """Nor is a step launched that no sequence needs, where lengths alone end them."""
    model = make_model("llama").to(device)
    made = [generate(model, tokenizer, OPTIONS[name], policy=policy, run_ahead=ahead) for ahead in (True, False)]
    (mine, texts, num_launched), (others, other_texts, _) = made
    assert texts == other_texts
    # The first token comes from reading, and the step after it waits until that is out.
    assert num_launched == sum(max(given["max_new_tokens"] - 2, 0) for given in OPTIONS[name])
    for decoding, other in zip(mine, others, strict=True):
        assert decoding.token_ids == other.token_ids
        assert decoding.finish_reason == other.finish_reason == "length"
        assert decoding.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        compare_next_steps(model, decoding.session, other.session)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_what_was_launched_too_much_leaves_no_trace(
    architecture: str, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> None:
    """Sequences end by tokens that nobody could foresee, one after another, also in sliding-window layers."""
    model = make_model(architecture).to(device)
    options = [{"max_new_tokens": 60, "temperature": 1.0, "seed": n} for n in range(3)]
    free, _, _ = generate(model, tokenizer, options, run_ahead=False)
    stop_ids = tuple(decoding.token_ids[after] for decoding, after in zip(free, (10, 20, 30), strict=True))
    made = [generate(model, tokenizer, options, run_ahead=ahead, stop_ids=stop_ids) for ahead in (True, False)]
    (mine, texts, num_launched), (others, other_texts, _) = made
    assert texts == other_texts
    assert all(decoding.finish_reason == "stop" for decoding in mine)
    assert len({len(decoding.token_ids) for decoding in mine}) > 1
    # One step too many for each, and the first one of each is not launched ahead.
    assert num_launched == sum(len(decoding.token_ids) - 1 for decoding in mine)
    for decoding, other in zip(mine, others, strict=True):
        assert decoding.token_ids == other.token_ids
        compare_next_steps(model, decoding.session, other.session)


def test_stop_strings(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
    model = make_model("llama").to(device)
    options = [{"max_new_tokens": 30, "temperature": 1.0, "seed": n} for n in range(3)]
    free, _, _ = generate(model, tokenizer, options, run_ahead=False)
    for given, decoding in zip(options, free, strict=True):
        given["stop"] = decoding.stream.text[len(decoding.stream.text) // 2 :][:3]
    made = [generate(model, tokenizer, options, run_ahead=ahead) for ahead in (True, False)]
    assert made[0][1] == made[1][1]
    for decoding, other in zip(made[0][0], made[1][0], strict=True):
        assert decoding.finish_reason == other.finish_reason == "stop"
        compare_next_steps(model, decoding.session, other.session)


def test_nobody_asks_for_more(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
    """The step under way is given up; each session goes on from the tokens that it has."""
    model = make_model("llama").to(device)
    options = [{"max_new_tokens": 30, "temperature": 1.0, "seed": n} for n in range(3)]
    decodings, _, _ = generate(model, tokenizer, options, run_ahead=True, pieces=20)
    for decoding, n in zip(decodings, LENGTHS, strict=True):
        read = decoding.session.num_tokens - n - 1
        assert 0 < read < len(decoding.token_ids) + 1
        twin = reading_session(model, n, seed=n)
        forward(model, [[5]], [twin], exact=True)
        for token in decoding.token_ids[:read]:
            forward(model, [[token]], [twin], exact=False)
        logits = [forward(model, [[9]], [session], exact=False) for session in (decoding.session, twin)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_slots_of_a_step_given_up_can_be_taken(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they held for the next step, the kernel would find none for what that step misses."""
    monkeypatch.setattr("sentencekv.batch.resolve_hot_set", resolve_hot_set_triton)
    model = make_model("llama").to(kernel_device)
    session, twin = (reading_session(model, 300) for _ in range(2))
    stepper = Stepper(model, session.policy, graph=False, run_ahead=True)
    for token in token_ids(8, 3):
        for given_up in ((token + 7) % 64, (token + 19) % 64):
            stepper.launch([session], torch.tensor([given_up], device=kernel_device))
            session.cancel()
        logits = [forward(model, [[token]], [each], exact=False) for each in (session, twin)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_broken_logits_end_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama")
    session = reading_session(model, 50)
    decoding = Decoding(session, [1], tokenizer, SamplingOptions(max_new_tokens=5), ())
    stepper = Stepper(model, session.policy, run_ahead=True)
    logits = torch.full((1, model.config.vocab_size), torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        list(decode(stepper, [decoding], logits))
    assert session.num_tokens == 50
    forward(model, [[3]], [session], exact=False)
    assert session.num_tokens == 51


class ReplayingStepper(Stepper):
    """Gives its logits where the last ones were, as a recorded graph does."""

    _logits: torch.Tensor | None = None

    def launch(self, sessions: Any, given: Any) -> torch.Tensor:
        logits = super().launch(sessions, given)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        return self._logits.copy_(logits)


@pytest.mark.parametrize("run_ahead", [True, False])
def test_streams_in_turn_are_streams_one_by_one(
    run_ahead: bool, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> None:
    """Two that share a stepper: what one has computed and not yet drawn from, the other must not overwrite."""
    model = make_model("llama").to(device)

    def start(stepper: Stepper, n: int) -> tuple[Decoding, Any]:
        session = reading_session(model, n, policy="moments", seed=n)
        logits = forward(model, [[5]], [session], exact=True)
        options = SamplingOptions(max_new_tokens=30, temperature=1.0, seed=n)
        decoding = Decoding(session, [], tokenizer, options, ())
        return decoding, decode(stepper, [decoding], logits)

    def make_stepper() -> Stepper:
        return ReplayingStepper(model, policies.load("moments"), run_ahead=run_ahead)

    alone = []
    for n in (300, 160):
        decoding, stream = start(make_stepper(), n)
        list(stream)
        alone.append(decoding.token_ids)
    shared = make_stepper()
    started = [start(shared, n) for n in (300, 160)]
    for _ in itertools.zip_longest(*(stream for _, stream in started)):
        pass
    assert [decoding.token_ids for decoding, _ in started] == alone


def test_who_runs_ahead(device: torch.device) -> None:
    """By default where steps are replayed graphs: elsewhere the host would wait for the step it has launched."""
    model = make_model("llama").to(device)
    assert Stepper(model, policies.load("moments")).runs_ahead == (device.type == "cuda")
    assert not Stepper(model, policies.load("moments"), run_ahead=False).runs_ahead


def test_policies_that_read_everything_do_not_run_ahead() -> None:
    assert not Stepper(make_model("llama"), policies.load("full"), run_ahead=True).runs_ahead
