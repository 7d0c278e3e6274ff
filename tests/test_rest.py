"""What is not selected, as one token more: the mean values it takes, and what it does for the output."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sentencekv import policies
from sentencekv.session import Session
from tests.sequences import (
    CONFIG,
    LENGTHS,
    Scripted,
    Tokens,
    new_session,
    random_choice,
    run,
    scripted_step,
    sentence_ends,
)


def assert_means(session: Session, tokens: Tokens) -> None:
    first, stop = CONFIG.sink_tokens, session.sentence_spans()[-1][1]
    for layer in (0, 1):
        want = tokens.v[layer, :, first:stop].mean(1)
        torch.testing.assert_close(session.lane().mean_value[layer], want, rtol=1e-4, atol=1e-6)


def test_mean_values_are_those_of_closed_tokens(device: torch.device) -> None:
    """Read in chunks, closed while decoding, forked, joined, under other summaries."""
    tokens = Tokens.random(400, device, seed=5)
    tokens.v += 0.5
    session = new_session(device, Scripted())
    session.expect(sentence_ends(400))
    for stop in (2, 90, 91, 260):
        run(session, tokens, stop, exact=True)
    assert_means(session, tokens)
    generator = torch.Generator().manual_seed(0)

    def decode(one: Session) -> None:
        before = one.num_sentences
        addresses = [mean.data_ptr() for mean in one.lane().mean_value.values()]
        for _ in range(3 * sum(LENGTHS[:3])):
            scripted_step(one, tokens, random_choice(one.num_sentences, (7, 4), generator))
        assert one.num_sentences > before
        assert [mean.data_ptr() for mean in one.lane().mean_value.values()] == addresses, "a graph reads them"
        assert_means(one, tokens)

    decode(session)
    forks = [session.fork(), session.fork()]
    for fork in forks:
        assert_means(fork, tokens)
        decode(fork)
    assert_means(session, tokens)
    forks[0].join_extents()
    decode(forks[0])
    assert_means(forks[1].under(CONFIG, policies.load("codes")), tokens)


def flat_tokens(device: torch.device) -> Tokens:
    """Attention spread over all tokens, values that have a mean."""
    tokens = Tokens.random(400, device, seed=1)
    return Tokens(0.5 * tokens.q, tokens.k, tokens.v + 1)


def last_outputs(policy: policies.Policy, tokens: Tokens, device: torch.device, **options) -> Tensor:
    session = new_session(device, policy, dataclasses.replace(CONFIG, budget_tokens=96))
    session.expect(sentence_ends(400))
    run(session, tokens, 380, exact=True, **options)
    return torch.stack([torch.cat(run(session, tokens, stop, exact=False, **options)) for stop in range(381, 401)])


@pytest.mark.parametrize("name", ["codes", "moments"])
def test_the_rest_brings_flat_attention_closer_to_dense(name: str, device: torch.device) -> None:
    tokens = flat_tokens(device)
    dense = torch.stack([torch.cat([tokens.dense(i, stop - 1, stop) for i in (0, 1)]) for stop in range(381, 401)])
    errors = [
        (last_outputs(policies.load(name, {"rest": rest}), tokens, device) - dense).norm() / dense.norm()
        for rest in (1, 0)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_cap_on_logits_leaves_the_rest_out(device: torch.device) -> None:
    """Scores know nothing of it, so what they say of the rest would be wrong."""
    tokens = flat_tokens(device)
    both = [last_outputs(policies.load("codes", {"rest": rest}), tokens, device, softcap=5.0) for rest in (1, 0)]
    assert torch.equal(*both)


@pytest.mark.parametrize("name", ["box", "mean", "pages", "rerank"])
def test_policies_that_do_not_estimate_mass_have_no_rest(name: str) -> None:
    with pytest.raises(ValueError, match="unknown option 'rest'"):
        policies.load(name, {"rest": 1})
    with pytest.raises(ValueError, match="must be 1 or 0"):
        policies.load("codes", {"rest": 2})
