"""Packed boxes hold what they are packed from, and are hardly larger."""

import pytest
import torch

from triton_ops import pack_box, unpack_box
from triton_ops.pack_box import pack_box_ref, pack_box_triton, unpack_box_ref, unpack_box_triton


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


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dim", [16, 64, 80, 20])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 3e3, 1e5])
def test_kernels_against_references(dim: int, scale: float, kernel_device: torch.device) -> None:
    """The same bytes, ties included; what they unpack to differs by a rounding at most."""
    torch.manual_seed(0)
    key = torch.randn(5, 4, 3, dim, device=kernel_device)
    key[1] = key[1].round()  # many middles between two steps
    key[2, 1:] = key[2, :1]
    low, high = (scale * bound for bound in (key.amin(1), key.amax(1)))
    packed = pack_box_triton(low, high)
    assert torch.equal(packed, pack_box_ref(low, high))
    box = unpack_box_ref(packed, dim)
    torch.testing.assert_close(unpack_box_triton(packed, dim), box, rtol=0, atol=2**-22 * box.abs().max().item())


def test_kernels_of_no_sentences(kernel_device: torch.device) -> None:
    nothing = torch.empty(0, 2, 16, device=kernel_device)
    packed = pack_box_triton(nothing, nothing)
    assert packed.shape == (0, 2, 20)
    assert unpack_box_triton(packed, 16).shape == (0, 2, 2, 16)
