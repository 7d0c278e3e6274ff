"""Scores of sentences from their summaries, against the formula in float64."""

import importlib

import pytest
import torch
from torch import Tensor

from tests.lanes import DTYPES, assert_as_good, random_batch, random_heads, random_lengths
from triton_ops import Lanes, Scores, unpack_box
from triton_ops.score_sentences import Spread, score_sentences, score_sentences_ref, score_sentences_triton

RAGGED = [[random_lengths(19, 8), [], [3] * 5], [[2, 8, 1]], [[4], random_lengths(17, 8, seed=1)]]
"""Three lanes: sentences in three parts, one of them empty, in one, in two; more than one block in some."""
KINDS: list[tuple[Spread | None, bool]] = [
    ("square", True),
    ("abs", False),
    (None, False),
    ("range", True),
    ("square", False),
]


def tables_of(spread: Spread | None) -> str:
    """Which summaries have what is scored so."""
    if spread == "range":
        return "codes"
    return "moments" if spread else "mean"


def formula(lanes: Lanes, layer: int, q_BAH: Tensor, scale: float, spread: Spread | None, log_length: bool) -> Tensor:
    """The logits of all sentences that lanes have, one after another, float64."""
    logits = []
    for b, lane in enumerate(lanes.lanes):
        x_NGH = scale * q_BAH[b].double().unflatten(0, (lanes.num_kv_heads, -1))
        for part in lane.parts:
            for s in range(part.num_sentences):
                plane_NPH = part.tables[layer][0][s]
                if spread == "range":
                    low, high = unpack_box(plane_NPH[None], q_BAH.shape[2])[0].double().unbind(dim=1)
                    # Half the variance of Gaussian numbers whose range is 3.74 standard deviations.
                    plane_NPH = torch.stack([(low + high) / 2, (high - low) ** 2 / 28], dim=1)
                plane_NPH = plane_NPH.double()
                logit_NG = (x_NGH * plane_NPH[:, None, 0]).sum(-1)
                if spread is not None:
                    spread_NGH = x_NGH.abs() if spread == "abs" else x_NGH**2
                    logit_NG = logit_NG + (spread_NGH * plane_NPH[:, None, 1]).sum(-1)
                if log_length:
                    logit_NG = logit_NG + lane.place_S4[part.first + s, 0].double().log()
                logits.append(logit_NG)
    return torch.stack(logits)


def of_sentences(lanes: Lanes, scores: Scores) -> Tensor:
    """Logits of sentences that there are, in the order of `formula`; checks that the normalisers are theirs."""
    top, total = scores.extent_BNGX2.double().unbind(-1)
    assert not top.isnan().any()
    norm_BNG = (total.log() + top).logsumexp(-1)
    rows = []
    for b, lane in enumerate(lanes.lanes):
        logit_NGS = scores.logit_BNGS[b, :, :, : lane.num_sentences]
        torch.testing.assert_close(norm_BNG[b], logit_NGS.double().logsumexp(-1), rtol=1e-5, atol=1e-5)
        rows.append(logit_NGS.permute(2, 0, 1))
    assert (total[len(lanes.lanes) :] == 0).all()
    return torch.cat(rows)


@pytest.mark.parametrize(("spread", "log_length"), KINDS)
def test_the_formula(spread: Spread | None, log_length: bool, device: torch.device) -> None:
    lanes = random_batch(RAGGED, device, tables=tables_of(spread), layers=(0, 2))
    q = random_heads(lanes, 6, 16, torch.float32)
    options = {"scale": 0.3, "spread": spread, "log_length": log_length}
    got = score_sentences_ref(q, lanes, 2, **options)
    assert got.logit_BNGS.shape == (4, 2, 3, lanes.capacity)
    truth = formula(lanes, 2, q, **options)
    torch.testing.assert_close(of_sentences(lanes, got).double(), truth, rtol=1e-5, atol=1e-5)
    for b, count in enumerate([24, 3, 18, 0]):
        assert (got.logit_BNGS[b, :, :, count:] == -torch.inf).all()
    chosen = score_sentences(q, lanes, 2, **options)
    torch.testing.assert_close(of_sentences(lanes, chosen), of_sentences(lanes, got))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group", "heads"), [(16, 1, 2), (64, 3, 1), (80, 4, 2), (96, 7, 1), (128, 8, 1), (256, 1, 1)]
)
def test_kernel(
    dim: int, group: int, heads: int, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs, so that some score several blocks; the queries are strided; the last lane is empty."""
    monkeypatch.setattr(importlib.import_module("triton_ops.score_sentences"), "_PROGRAMS", 1)
    for spread, log_length in KINDS[: 4 if dim < 256 else 1]:
        lanes = random_batch(RAGGED, kernel_device, heads=heads, dim=dim, dtype=dtype, tables=tables_of(spread))
        q = random_heads(lanes, heads * group, dim, dtype)
        options = {"scale": dim**-0.5, "spread": spread, "log_length": log_length}
        got = of_sentences(lanes, score_sentences_triton(q, lanes, 0, **options))
        want = of_sentences(lanes, score_sentences_ref(q, lanes, 0, **options))
        assert_as_good(got, want, formula(lanes, 0, q, **options), ulps=4)


@pytest.mark.usefixtures("poison")
def test_kernel_without_sentences(kernel_device: torch.device) -> None:
    lanes = random_batch([[], [[]]], kernel_device)
    q = random_heads(lanes, 2, 16, torch.float32)
    scores = score_sentences_triton(q, lanes, 0, scale=1.0, spread="square", log_length=True)
    assert (scores.extent_BNGX2[..., 1] == 0).all()
