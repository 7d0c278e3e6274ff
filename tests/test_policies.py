"""Policies: the registry, the options, and the formulas against brute force."""

import pytest
import torch

from sentencekv import policies
from sentencekv.policies import Policy


def test_the_folder_is_the_registry() -> None:
    assert {"box", "full", "mean", "moments", "window"} <= set(policies.available())
    for name in policies.available():
        assert isinstance(policies.load(name), Policy)
        assert policies.policy_class(name).describe()


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'momentz'; available: box, full, mean, moments, window"):
        policies.load("momentz")
    with pytest.raises(ValueError, match=r"unknown option 'groups' of policy 'mean'; it has: group"):
        policies.load("mean", {"groups": "max"})
    with pytest.raises(ValueError, match="'max' or 'mean', got 'sum'"):
        policies.load("mean", {"group": "sum"})


def logits(name: str, q: torch.Tensor, key: torch.Tensor, offsets: torch.Tensor, scale: float) -> torch.Tensor:
    """The policy's logits for one query head, recovered from the shares (up to a constant)."""
    policy = policies.load(name)
    summary = policy.summarize(key, offsets)
    assert summary.shape == (offsets.numel() - 1, key.shape[1], policy.num_planes, key.shape[2])
    from triton_ops import score_sentences

    lengths = offsets[1:] - offsets[:-1]
    share = score_sentences(q, [summary], scale=scale, spread=policy.spread, bias_S=policy.bias(lengths))
    return share.log()[0]


def test_formulas() -> None:
    torch.manual_seed(0)
    lengths = [4, 1, 9, 6]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    key = torch.randn(20, 1, 8)
    q = torch.randn(1, 1, 8)
    x = 0.3 * q[0, 0].double()
    parts = [part[:, 0].double() for part in key.split(lengths)]
    expected = {
        "mean": [x @ p.mean(0) for p in parts],
        "moments": [
            x @ p.mean(0) + 0.5 * (x**2) @ p.var(0, unbiased=False) + torch.tensor(float(len(p))).log() for p in parts
        ],
        "box": [torch.maximum(x * p.amin(0), x * p.amax(0)).sum() for p in parts],
    }
    for name, values in expected.items():
        want = torch.stack(values).log_softmax(0).float()
        torch.testing.assert_close(logits(name, q, key, offsets, 0.3), want, rtol=1e-4, atol=1e-4)


def test_box_is_an_upper_bound() -> None:
    torch.manual_seed(1)
    key, q = torch.randn(64, 1, 8), torch.randn(1, 1, 8)
    offsets = torch.arange(0, 65, 8)
    summary = policies.load("box").summarize(key, offsets)
    bound = (summary[:, 0, 0] @ q[0, 0]) + summary[:, 0, 1] @ q[0, 0].abs()
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
    summary = policy.summarize(key, offsets)
    estimate = q[0, 0] @ summary[0, 0, 0] + (q[0, 0] ** 2) @ summary[0, 0, 1] + policy.bias(offsets[1:])
    truth = torch.logsumexp(key[:, 0] @ q[0, 0], dim=0)
    torch.testing.assert_close(estimate[0], truth, rtol=0, atol=0.1)
