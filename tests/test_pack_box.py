"""Packed boxes hold what they are packed from, and are hardly larger."""

import pytest
import torch

from triton_ops import pack_box, unpack_box


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("outliers", [1.0, 12.0])
def test_packed_boxes_hold_their_boxes(scale: float, outliers: float, device: torch.device) -> None:
    torch.manual_seed(0)
    key = scale * (torch.randn(50, 20, 2, 64, device=device) + torch.randn(50, 1, 2, 64, device=device))
    key[..., ::16] *= outliers
    low, high = key.amin(1), key.amax(1)
    packed = pack_box(low, high)
    assert packed.dtype == torch.uint8
    assert packed.shape == (50, 2, 68)
    got_low, got_high = unpack_box(packed, 64).unbind(2)
    tiny = 1e-6 * (high - low)
    assert (got_low <= low + tiny).all()
    assert (got_high >= high - tiny).all()
    # The middle is off by half a step of a seventh of the largest, on either side, and half as much again comes on top.
    middle = ((low + high) / 2).abs().amax(-1, keepdim=True)
    most = 1.5 * 1.002 * ((high - low) + middle / 7 * 1.002)
    least = ((high - low).amax(-1, keepdim=True) + middle / 7) * 1.002 / 96
    assert (got_high - got_low <= torch.maximum(most, least)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -6e4, 1e-7])
def test_a_sentence_of_one_token(value: float, device: torch.device) -> None:
    """Its box has no extent, or as little as the rounding of its middle."""
    key = torch.full((3, 1, 16), value, device=device)
    low, high = unpack_box(pack_box(key, key), key.shape[-1]).unbind(2)
    assert low.isfinite().all()
    torch.testing.assert_close((low + high) / 2, key, rtol=2e-3, atol=2e-7)
    assert (high - low <= 0.005 * abs(value) + 4e-7).all()
