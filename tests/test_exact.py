"""The fast exact attention against its slow twin."""

import pytest
import torch

from sentencekv import exact
from sentencekv.exact import exact_attention, exact_attention_ref


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
