"""Policies: the registry, the options, and the formulas against brute force."""

import pytest
import torch

from sentencekv import policies
from sentencekv.policies import Policy


def test_the_folder_is_the_registry() -> None:
    assert {"box", "codes", "full", "mean", "moments", "window"} <= set(policies.available())
    for name in policies.available():
        assert isinstance(policies.load(name), Policy)
        assert policies.policy_class(name).describe()


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(
        ValueError, match=r"unknown policy 'momentz'; available: box, codes, full, mean, moments, window"
    ):
        policies.load("momentz")
    with pytest.raises(ValueError, match=r"unknown option 'groups' of policy 'mean'; it has: group"):
        policies.load("mean", {"groups": "max"})
    with pytest.raises(ValueError, match="'max' or 'mean', got 'sum'"):
        policies.load("mean", {"group": "sum"})


def split_keys(lengths: list[int], heads: int = 1, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys `[T, heads, dim]`, their offsets and lengths."""
    torch.manual_seed(0)
    length = torch.tensor(lengths)
    return torch.randn(sum(lengths), heads, dim), torch.tensor([0, *lengths]).cumsum(0), length


def test_formulas() -> None:
    key, offsets, length = split_keys([4, 1, 9, 6])
    q = torch.randn(1, 1, 8)
    x = 0.3 * q[0, 0].double()
    parts = [part[:, 0].double() for part in key.split(length.tolist())]
    expected = {
        "mean": [x @ p.mean(0) for p in parts],
        "moments": [
            x @ p.mean(0) + 0.5 * (x**2) @ p.var(0, unbiased=False) + torch.tensor(float(len(p))).log() for p in parts
        ],
        "box": [torch.maximum(x * p.amin(0), x * p.amax(0)).sum() for p in parts],
    }
    for name, values in expected.items():
        policy = policies.load(name)
        got = policy.logits(q, policy.summarize(key, offsets), length, scale=0.3, longest=32)
        torch.testing.assert_close(got[0, 0], torch.stack(values).float(), rtol=1e-4, atol=1e-4)


def test_codes_approach_the_true_mass_with_more_bits() -> None:
    key, offsets, length = split_keys([4, 1, 30, 6, 17], heads=3, dim=20)
    q = torch.randn(3, 2, 20)
    truth = torch.stack(
        [torch.logsumexp(torch.einsum("ngh,tnh->ngt", 0.3 * q, part), -1) for part in key.split(length.tolist())],
        dim=-1,
    )
    error = {}
    for bits in (1, 2, 4):
        policy = policies.load("codes", {"bits": bits})
        tables = policy.summarize(key, offsets)
        assert tables[1].dtype == torch.uint8
        assert tables[1].shape == (58, 3, -(-20 * bits // 8))
        error[bits] = (policy.logits(q, tables, length, scale=0.3, longest=32) - truth).abs().mean()
    assert error[4] < 0.1 < error[1]
    assert error[4] < error[2] < error[1]
    one_token = policies.load("codes").logits(
        q, policies.load("codes").summarize(key, offsets), length, scale=0.3, longest=32
    )
    torch.testing.assert_close(one_token[..., 1], truth[..., 1])
    with pytest.raises(ValueError, match="bits must be 1, 2 or 4, got 3"):
        policies.load("codes", {"bits": 3})


@pytest.mark.parametrize("name", [n for n in policies.available() if policies.policy_class(n).reads == "selected"])
def test_parts_are_scored_as_one(name: str) -> None:
    """A session's sentences may lie in several extents: selection must not see the seam."""
    key, offsets, length = split_keys([4, 1, 9, 6, 5, 3, 8, 2], heads=2)
    policy = policies.load(name)
    q = torch.randn(2, 3, 8)
    whole = [policy.summarize(key, offsets)]
    split = [policy.summarize(key[:20], offsets[:5]), policy.summarize(key[20:], offsets[4:] - 20)]
    options = {"scale": 0.4, "longest": 9, "room_tokens": 20, "max_selected": 5}
    assert torch.equal(policy.select(q, whole, length, **options), policy.select(q, split, length, **options))


def test_box_is_an_upper_bound() -> None:
    key, offsets, length = split_keys([8] * 8)
    q = torch.randn(1, 1, 8)
    policy = policies.load("box")
    bound = policy.logits(q, policy.summarize(key, offsets), length, scale=1.0, longest=32)[0, 0]
    best = (key[:, 0] @ q[0, 0]).view(8, 8).amax(1)
    assert (bound >= best - 1e-5).all()


def test_moments_is_exact_for_gaussian_keys() -> None:
    """With many Gaussian keys the score approaches the true log of the sentence's attention mass."""
    torch.manual_seed(2)
    mean = torch.randn(1, 8)
    key = (mean + 0.5 * torch.randn(200_000, 8))[:, None]
    q = torch.randn(1, 1, 8)
    policy = policies.load("moments")
    offsets = torch.tensor([0, key.shape[0]])
    estimate = policy.logits(q, policy.summarize(key, offsets), offsets[1:], scale=1.0, longest=200_000)
    truth = torch.logsumexp(key[:, 0] @ q[0, 0], dim=0)
    torch.testing.assert_close(estimate[0, 0, 0], truth, rtol=0, atol=0.1)
