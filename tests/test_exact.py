"""The fast exact attention against its slow twin."""

from collections.abc import Iterator

import pytest
import torch

from sentencekv import exact
from sentencekv.exact import (
    attention_in_parts,
    exact_attention,
    exact_attention_ref,
    partial_attention,
    partial_attention_ref,
)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sliding_window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize(("num_new", "num_keys"), [(1, 1), (1, 37), (37, 37), (13, 50), (33, 34)])
def test_equals_the_reference(
    num_new: int,
    num_keys: int,
    sliding_window: int | None,
    softcap: float | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact, "_QUERY_BLOCK", 8)
    torch.manual_seed(num_new)
    q = torch.randn(6, num_new, 16, device=device)
    kv = torch.randn(2, num_keys, 2, 16, device=device)
    options = {"scale": 0.3, "sliding_window": sliding_window, "softcap": softcap}
    torch.testing.assert_close(
        exact_attention(q, kv, **options), exact_attention_ref(q, kv, **options), rtol=2e-4, atol=2e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_half_precision_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    """The error against float32 is at most twice that of the reference run in the same precision."""
    torch.manual_seed(0)
    q = torch.randn(8, 300, head_dim, device="cuda")
    kv = torch.randn(2, 1700, 2, head_dim, device="cuda")
    truth = exact_attention_ref(q, kv, scale=head_dim**-0.5)
    fast = exact_attention(q.to(dtype), kv.to(dtype), scale=head_dim**-0.5).float()
    slow = exact_attention_ref(q.to(dtype), kv.to(dtype), scale=head_dim**-0.5).float()
    assert (fast - truth).norm() <= 2 * (slow - truth).norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_new", "num_keys"), [(1, 1), (37, 37), (13, 50), (50, 13)])
def test_partial_attention(
    num_new: int,
    num_keys: int,
    causal: bool,
    softcap: float | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if causal and num_new != num_keys:
        return
    monkeypatch.setattr(exact, "_LOGITS_AT_ONCE", 6 * num_keys * 16)
    torch.manual_seed(0)
    q = torch.randn(6, num_new, 16, device=device)
    whole = torch.randn(2, num_keys + 9, 2, 16, device=device)
    kv = whole[:, 4 : 4 + num_keys]  # a slice, as of a slab
    options = {"scale": 0.3, "softcap": softcap, "causal": causal}
    for got, want in zip(partial_attention(q, kv, **options), partial_attention_ref(q, kv, **options), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    if causal:
        truth = exact_attention_ref(q, kv, scale=0.3, softcap=softcap)
        torch.testing.assert_close(partial_attention_ref(q, kv, **options)[0], truth, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("cuts", [[], [5], [1, 2, 30], [17, 0, 20], [8, 16, 8]])
@pytest.mark.parametrize("grain", [1, 8, 2048])
def test_parts_equal_the_whole(
    grain: int, cuts: list[int], softcap: float | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the parts, their order, and where they are cut. A part is overwritten when the next is asked for."""
    monkeypatch.setattr(exact, "GRAIN_TOKENS", grain)
    torch.manual_seed(1)
    num_new = 11
    kv = torch.randn(2, sum(cuts) + num_new, 2, 16, device=device)
    q = torch.randn(6, num_new, 16, device=device)
    earlier = list(kv[:, : sum(cuts)].split([cut for cut in cuts if cut], dim=1)) if cuts else []

    def parts() -> Iterator[torch.Tensor]:
        for part in reversed(earlier):
            lent = part.clone()
            yield lent
            lent.fill_(torch.nan)

    got = attention_in_parts(q, kv[:, sum(cuts) :], parts(), scale=0.3, softcap=softcap)
    want = exact_attention_ref(q, kv, scale=0.3, softcap=softcap)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
def test_parts_in_half_precision_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    """As `test_half_precision_on_a_gpu`; parts are slices of a slab, strided."""
    torch.manual_seed(0)
    q = torch.randn(8, 300, head_dim, device="cuda")
    kv = torch.randn(2, 1700, 2, head_dim, device="cuda")
    scale = head_dim**-0.5
    truth = exact_attention_ref(q, kv, scale=scale)
    parts = kv.to(dtype)[:, :1400].split(500, dim=1)
    fast = attention_in_parts(q.to(dtype), kv.to(dtype)[:, 1400:], parts, scale=scale).float()
    slow = exact_attention_ref(q.to(dtype), kv.to(dtype), scale=scale).float()
    assert (fast - truth).norm() <= 2 * (slow - truth).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_cudnn_on_a_gpu(dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular shapes go to cuDNN where it is faster, and give what FlashAttention gives: outputs and log-sums."""
    torch.manual_seed(0)
    q = torch.randn(512, 8, head_dim, device="cuda", dtype=dtype).transpose(0, 1)
    kv = torch.randn(2, 1800, 2, head_dim, device="cuda", dtype=dtype)
    for part, causal in ((kv[:, 3:515], True), (kv[:, 5:1541], False)):
        options = {"scale": head_dim**-0.5, "softcap": None, "causal": causal}
        assert not exact._suits_cudnn(q, part)
        flash = partial_attention(q, part, **options)
        with monkeypatch.context() as patch:
            patch.setattr(exact, "GRAIN_TOKENS", 256)
            hopper = torch.cuda.get_device_capability() >= (9, 0)
            suits = hopper and head_dim <= 128
            assert exact._suits_cudnn(q, part) == suits
            got = partial_attention(q, part, **options)
            if causal and suits:
                assert torch.equal(exact_attention(q, part, scale=head_dim**-0.5), got[0])
        truth = partial_attention_ref(q.float(), part.float(), **options)
        assert (got[0] - truth[0]).norm() <= 2 * (flash[0] - truth[0]).norm()
        torch.testing.assert_close(got[1], truth[1], rtol=1e-4, atol=1e-3)
