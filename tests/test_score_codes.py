"""Scores from coded keys: the log of the sum of exponentials over decoded keys, in float64."""

import importlib

import pytest
import torch
from torch import Tensor

from tests.lanes import DTYPES, random_batch, random_heads, random_lengths
from tests.test_score_sentences import of_sentences
from triton_ops import Lanes, unpack_box
from triton_ops.score_codes import score_codes, score_codes_ref, score_codes_triton

RAGGED = [[random_lengths(7, 8), [], [3] * 3], [[2, 8, 1]], [[4], random_lengths(5, 8, seed=1)]]


def formula(lanes: Lanes, layer: int, q_BAH: Tensor, scale: float, bits: int) -> tuple[Tensor, Tensor]:
    """Of all sentences, one after another, in float64: their logits, and what rounding levels' weights may change.

    The kernel keeps a query and its weights of levels in half precision, both scaled so that the largest are far above
    its smallest. A logit is the log of a sum of exponentials, so it moves by no more than the largest of their
    exponents: half an ulp of each weight times the highest level, and where a query is rounded too, as much again of
    its number times what it meets in the box.
    """
    logits, slacks = [], []
    half_ulp = torch.finfo(torch.float16).eps / 2
    for b, lane in enumerate(lanes.lanes):
        x_NGH = scale * q_BAH[b].double().unflatten(0, (lanes.num_kv_heads, -1))
        largest_N = x_NGH.abs().amax((1, 2))
        for part in lane.parts:
            packed_SNW, code_TNW = part.tables[layer]
            box_SN2H = unpack_box(packed_SNW, q_BAH.shape[2])
            row = 0
            for s in range(part.num_sentences):
                length = int(lane.place_S4[part.first + s, 0])
                fields = [code_TNW[row : row + length] >> (bits * i) & (2**bits - 1) for i in range(16 // bits)]
                level_TNH = torch.cat(fields, dim=-1)[..., : q_BAH.shape[2]].double()
                low_NH, high_NH = box_SN2H[s].double().unbind(dim=1)
                step_NH = (high_NH - low_NH) / 2**bits
                key_TNH = low_NH + (level_TNH + 0.5) * step_NH
                logits.append(torch.einsum("ngh,tnh->ngt", x_NGH, key_TNH).logsumexp(-1))
                weight_NGH = (x_NGH * step_NH[:, None]).abs()
                tiny_N = largest_N * step_NH.amax(-1) * 2.0**-20
                slack_NGH = (weight_NGH * half_ulp + tiny_N[:, None, None]) * (2**bits - 1)
                if q_BAH.dtype == torch.float32:
                    furthest_NH = torch.maximum(low_NH.abs(), high_NH.abs())
                    slack_NGH += (x_NGH.abs() * half_ulp) * furthest_NH[:, None]
                slacks.append(slack_NGH.sum(-1))
                row += length
    return torch.stack(logits), torch.stack(slacks)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 20])
def test_logsumexp_over_decoded_keys(bits: int, dim: int, device: torch.device) -> None:
    lanes = random_batch(RAGGED, device, dim=dim, tables="codes", bits=bits, layers=(0, 2))
    q = random_heads(lanes, 6, dim, torch.float32)
    got = score_codes_ref(q, lanes, 2, scale=0.3, bits=bits)
    assert got.logit_BNGS.shape == (4, 2, 3, lanes.capacity)
    truth, slack = formula(lanes, 2, q, scale=0.3, bits=bits)
    torch.testing.assert_close(of_sentences(lanes, got).double(), truth, rtol=1e-5, atol=1e-5)
    for b, count in enumerate([10, 3, 6, 0]):
        assert (got.logit_BNGS[b, :, :, count:] == -torch.inf).all()
    chosen = score_codes(q, lanes, 2, scale=0.3, bits=bits)
    assert ((of_sentences(lanes, chosen) - truth).abs() <= slack + 1e-5).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group", "bits", "slot_tokens"),
    [
        (16, 1, 2, 8),
        (64, 4, 2, 32),
        (80, 3, 2, 8),
        (20, 2, 2, 8),
        (96, 7, 4, 8),
        (128, 8, 2, 32),
        (128, 4, 1, 8),
        (256, 1, 4, 8),
    ],
)
def test_kernel(
    dim: int,
    group: int,
    bits: int,
    slot_tokens: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module("triton_ops.score_codes"), "_PROGRAMS", 16)
    lengths = RAGGED if slot_tokens == 8 else [[random_lengths(4, 32), [2]], [[32, 17]]]
    options = {"tables": "codes", "bits": bits, "slot_tokens": slot_tokens}
    lanes = random_batch(lengths, kernel_device, heads=2 if dim < 96 else 1, dim=dim, dtype=dtype, **options)
    q = random_heads(lanes, lanes.num_kv_heads * group, dim, dtype)
    got, want = (
        of_sentences(lanes, op(q, lanes, 0, scale=dim**-0.5, bits=bits)) for op in (score_codes_triton, score_codes_ref)
    )
    truth, slack = formula(lanes, 0, q, scale=dim**-0.5, bits=bits)
    allowed = 2 * (want - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
    assert ((got - truth).abs() <= slack + allowed).all()
    assert (slack < (0.05 if dtype == torch.float32 else 0.025)).all(), "nothing beside the codes' own coarseness"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("factor", [0.0, 1e-4, 3e4])
def test_kernel_on_queries_of_any_size(factor: float, kernel_device: torch.device) -> None:
    """Queries are scaled to what half precision holds, by the largest of those that share a KV head."""
    lanes = random_batch([[[4, 4]]], kernel_device, heads=2, tables="codes", spare=0)
    q = random_heads(lanes, 6, 16, torch.float32)
    q[:, :3] *= factor
    q[:, 4] *= 1e-3
    scale = 1 / max(factor, 1)
    got = of_sentences(lanes, score_codes_triton(q, lanes, 0, scale=scale, bits=2))
    truth, slack = formula(lanes, 0, q, scale=scale, bits=2)
    assert ((got - truth).abs() <= slack + 1e-5).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", [score_codes_ref, score_codes_triton, score_codes])
def test_listed_sentences_score_as_among_all(op, device: torch.device, request: pytest.FixtureRequest) -> None:
    """Different ones for each head, over several parts; columns without a sentence have no part in the normalisers."""
    if op is score_codes_triton:
        request.getfixturevalue("kernel_device")
    lanes = random_batch(RAGGED, device, dim=16, tables="codes", layers=(0, 2))
    q = random_heads(lanes, 6, 16, torch.float32)
    options = {"scale": 0.3, "bits": 2}
    listed = torch.full((4, 2, 5), -1, dtype=torch.int32)
    for b, rows in enumerate([[[0, 6, 7, 9], [8]], [[1, 2], [0, 1, 2]], [[0, 1, 5], [2, 3, 4, 5]]]):
        for n, ids in enumerate(rows):
            listed[b, n, : len(ids)] = torch.tensor(ids)
    listed = listed.to(device)
    every = op(q, lanes, 2, **options)
    some = op(q, lanes, 2, **options, sentence_BNS=listed)
    assert some.sentence_BNS is listed
    top, total = some.extent_BNGX2.double().unbind(-1)
    for b in range(3):
        for n in range(2):
            ids = listed[b, n][listed[b, n] >= 0].long()
            got = some.logit_BNGS[b, n, :, : len(ids)]
            torch.testing.assert_close(got, every.logit_BNGS[b, n][:, ids])
            norm = (total[b, n].log() + top[b, n]).logsumexp(-1)
            torch.testing.assert_close(norm, got.double().logsumexp(-1), rtol=1e-5, atol=1e-5)
