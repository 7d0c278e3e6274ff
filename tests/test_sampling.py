"""Sampling options, draws, and text that comes out whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sentencekv import SamplingOptions
from sentencekv.sampling import Sampler, TextStream, draw_together, make_options

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 0, "temperature": 1}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
    ],
)
def test_bad_options(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**bad)


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 2.5}, {"top_k": 5.0}, {"seed": "x"}, {"temperature": "0.5"}, {"stop": 5}, {"stop": b"x"}]
)
def test_bad_types(bad: dict) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(bad))} must be"):
        SamplingOptions(**bad)


def test_unknown_option_gets_the_list() -> None:
    with pytest.raises(TypeError, match="unknown option 'max_tokens'; there are: max_new_tokens, "):
        make_options({"max_tokens": 3})


def draws(logits: torch.Tensor, count: int = 400, **options) -> list[int]:
    sampler = Sampler(SamplingOptions(**options), [0], CPU)
    return [sampler.take(sampler.draw(logits).tolist())[0] for _ in range(count)]


def test_filters_leave_only_what_they_should() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits)) == {0}
    assert set(draws(logits, temperature=1.0, seed=0)) == {0, 1, 2, 3}
    assert set(draws(logits, temperature=1.0, top_k=2, seed=0)) == {0, 1}
    assert set(draws(logits, temperature=1.0, top_p=0.6, seed=0)) == {0, 1}
    assert set(draws(logits, temperature=1.0, min_p=0.45, seed=0)) == {0, 1, 2}
    assert set(draws(logits, temperature=0.01, seed=0)) == {0}


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn() -> None:
    logits = torch.tensor([2.0, 1.9, 1.8])
    assert draws(logits, count=3, repetition_penalty=1.5) == [1, 2, 0]


def test_seed_repeats() -> None:
    logits = torch.zeros(50)
    assert draws(logits, temperature=1.0, seed=7) == draws(logits, temperature=1.0, seed=7)
    assert draws(logits, temperature=1.0, seed=7) != draws(logits, temperature=1.0, seed=8)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    sampler = Sampler(SamplingOptions(temperature=0.5, seed=0, logprobs=True), [0], CPU)
    token, logprob = sampler.take(sampler.draw(logits).tolist())
    assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]))


def test_drawing_together_is_drawing_one_by_one() -> None:
    logits = torch.randn(3, 40)
    greedy = {"logprobs": True}
    for options in ([greedy] * 3, [greedy, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.4}]):
        samplers, alone = ([Sampler(SamplingOptions(**given), [3], CPU) for given in options] for _ in range(2))
        want = torch.stack([sampler.draw(row) for sampler, row in zip(alone, logits, strict=True)])
        torch.testing.assert_close(draw_together(samplers, logits), want)


def test_nan_logits_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        draws(torch.tensor([0.0, float("nan")]), count=1)
    with pytest.raises(FloatingPointError, match="NaN"):
        draws(torch.tensor([float("nan"), 0.0]), count=1, temperature=1.0, seed=0, repetition_penalty=1.2)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_stream_equals_decoding_at_once(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer, ())
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == text
    assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in text


@pytest.mark.parametrize("stop", [("END",), ("zzz", "END", "EN"), ("D of",)])
def test_stop_strings_are_never_shown(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> None:
    text = "It was the EVENING, the END of the day."
    expected = text[: min(at for at in map(text.find, stop) if at >= 0)]
    stream = TextStream(tokenizer, stop)
    given_out = ""
    for token in tokenizer(text).input_ids:
        given_out += stream.add(token)
        assert expected.startswith(given_out)
        if stream.stopped:
            break
    assert stream.stopped
    assert given_out + stream.finish() == expected


def test_invalid_bytes_do_not_hold_the_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    stray = tokenizer("\u00e9").input_ids[:1]
    stream = TextStream(tokenizer, ())
    shown = "".join(stream.add(token) for token in stray * 40)
    assert len(shown) >= 30


def test_held_back_text_comes_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ("ENDING",))
    shown = "".join(stream.add(token) for token in tokenizer("This is the END").input_ids)
    assert shown == "This is the "
    assert stream.finish() == "END"
