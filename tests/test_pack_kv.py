"""Codes of keys and values: what they decode to, where they stand, and what the gather kernel makes of them."""

import pytest
import torch

from tests.lanes import pack_lanes, random_batch, random_lengths, random_selection
from triton_ops.gather_kv import gather_kv, gather_kv_ref, gather_kv_triton
from triton_ops.offload_kv import offload_kv, offload_kv_ref, offload_kv_triton
from triton_ops.pack_kv import (
    GROUP,
    Format,
    Packed,
    code_width,
    pack_kv,
    packed_slab,
    row_bytes,
    scale_width,
    unpack_kv,
)
from triton_ops.resolve_hot_set import resolve_hot_set_ref

FORMATS: list[Format] = ["fp8", "int8", "int4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("dim", [12, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_come_back_within_their_step(
    kv_format: Format, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Large ones and small ones, and some keys far from zero, as models with biases have them."""
    torch.manual_seed(0)
    kv = torch.randn(3, 17, 2, dim, device=device)
    kv[0] *= 300
    kv[1] *= 0.01
    kv[2, :, 0] += 50
    kv = kv.to(dtype)
    packed = pack_kv(kv, kv_format)
    assert packed.code.dtype == torch.uint8
    assert packed.code.shape == (3, 17, 2, code_width(dim, kv_format))
    assert packed.scale.shape == (3, 17, 2, scale_width(dim, kv_format))
    assert packed.code[0, 0].nbytes + packed.scale[0, 0].nbytes == row_bytes(dim, kv_format)
    back = unpack_kv(packed, dim, torch.float32, kv_format)
    error = (back - kv.float()).abs()
    if kv_format == "int4":
        groups = torch.stack([part.amax(-1) - part.amin(-1) for part in kv.float().split(GROUP, dim=-1)], dim=-1)
        allowed = (groups / 15).repeat_interleave(GROUP, dim=-1)[..., :dim] * 0.51
        # The minimum and the step are float16.
        assert (error <= allowed + 2e-3 * kv.float().abs().amax(-1, keepdim=True)).all()
    else:
        largest = kv.float().abs().amax(-1, keepdim=True)
        if kv_format == "int8":
            assert (error <= 0.51 * largest / 127 + 1e-3 * largest).all()
        else:
            assert (error <= kv.float().abs() / 15.9 + largest * 2**-18).all()
    assert unpack_kv(packed, dim, dtype, kv_format).dtype == dtype


@pytest.mark.parametrize("kv_format", FORMATS)
def test_special_rows(kv_format: Format, device: torch.device) -> None:
    """Zeros, one number, all equal, the largest of float16, and numbers too small for a scale in float16."""
    rows = torch.zeros(5, 2, 64, device=device)
    rows[1, :, 3] = -2.5
    rows[2] = 7.25
    rows[3] = 65504.0
    rows[3, :, ::2] *= -1
    rows[4] = 1e-9
    back = unpack_kv(pack_kv(rows, kv_format), 64, torch.float32, kv_format)
    assert back.isfinite().all()
    # The end of a range of 15 rounded steps.
    torch.testing.assert_close(back, rows, rtol=2e-3, atol=2e-3 if kv_format == "int4" else 1e-6)


@pytest.mark.parametrize("kv_format", ["fp8", "int8"])
def test_small_numbers_are_not_lost(kv_format: Format, device: torch.device) -> None:
    """Their scale is no number of float16; the smallest there is serves."""
    rows = 3e-6 * torch.linspace(-1, 1, 64, device=device).repeat(2, 1)[None]
    back = unpack_kv(pack_kv(rows, kv_format), 64, torch.float32, kv_format)
    assert ((back - rows).norm() / rows.norm()) < 0.05


def test_nibbles_are_where_they_are_promised(device: torch.device) -> None:
    kv = torch.arange(16.0, device=device).repeat(2, 4).view(1, 2, 64)  # in each group of 32, 0 to 15 twice
    packed = pack_kv(kv, "int4")
    assert packed.scale.view(2, 2, 2)[..., 0].eq(1).all()
    for j in range(32):
        assert (packed.code[0, 0, j] & 15) == j % 16
        assert (packed.code[0, 0, j] >> 4) == (j + 32) % 16


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_slab_is_one_run_of_codes_and_one_of_scales_for_each_head(kv_format: Format) -> None:
    kv = torch.randn(2, 48, 2, 64)
    rows = torch.zeros(2, 48 * row_bytes(64, kv_format), dtype=torch.uint8)
    slab = packed_slab(rows, 48, 64, kv_format)
    packed = pack_kv(kv, kv_format)
    slab.code.copy_(packed.code)
    slab.scale.copy_(packed.scale)
    for head in range(2):
        codes = packed.code[head].flatten()
        assert torch.equal(rows[head, : codes.numel()], codes)
        assert torch.equal(rows[head, codes.numel() :].view(torch.float16), packed.scale[head].flatten())


@pytest.mark.parametrize("op", [gather_kv, gather_kv_ref, gather_kv_triton])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(("dim", "slot_tokens"), [(16, 8), (80, 8), (128, 32), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_gather_unpacks(
    op, kv_format: Format, dim: int, slot_tokens: int, dtype: torch.dtype, device: torch.device, request
) -> None:
    """What is in a slot is what `unpack_kv` gives, to the bit or the last rounding, and nothing else is written."""
    if op is gather_kv_triton:
        request.getfixturevalue("kernel_device")
    layer = 2
    lengths = [[random_lengths(9, slot_tokens), [slot_tokens] * 4, [1] * 3], [[5, 1]], []]
    options = {"dim": dim, "slots": 6, "dtype": dtype, "slot_tokens": slot_tokens, "layers": (0, layer)}
    lanes = random_batch(lengths, device, slab_tokens=48, **options)
    kept = [lane.slabs[layer] for lane in lanes.lanes]
    pack_lanes(lanes, kv_format)
    lanes.count()
    selected = random_selection(lanes, [[6, 2], [2, 0], [0, 0]])
    resolved = resolve_hot_set_ref(selected, lanes, layer)
    slot, miss = resolved.slot_BNK, resolved.miss_BNK
    expected = [lane.hot_kv[layer].clone() for lane in lanes.lanes]
    for b, n, k in miss.nonzero().tolist():
        length, slab, row, _ = lanes.lanes[b].place_S4[selected[b, n, k]].tolist()
        packed = pack_kv(kept[b][slab][n, row : row + length], kv_format)
        expected[b][n, slot[b, n, k], :length] = unpack_kv(packed, dim, dtype, kv_format).to(device)
    selected[miss == 0] = 2**31 - 1
    slot[miss == 0] = 2**31 - 1
    op(selected, slot, miss, lanes, layer)
    for lane, want in zip(lanes.lanes, expected, strict=True):
        torch.testing.assert_close(lane.hot_kv[layer], want, equal_nan=True)
        assert lane.hot_kv[0].isnan().all()


@pytest.mark.parametrize("op", [offload_kv, offload_kv_ref, offload_kv_triton])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_codes_and_scales_are_offloaded_to_their_places(
    op, kv_format: Format, dim: int, device: torch.device, request
) -> None:
    if op is offload_kv_triton:
        request.getfixturevalue("kernel_device")
    lengths, capacity, heads, depth = [5, 8, 1], 32, 2, 3
    kv = torch.randn(depth, heads, sum(lengths), 2, dim, device=device)
    packed = pack_kv(kv, kv_format)
    total = row_bytes(dim, kv_format)
    pinned = device.type == "cuda"
    slabs_of = [[torch.full((heads, capacity * total), 7, dtype=torch.uint8, pin_memory=pinned)] for _ in range(depth)]
    addresses = torch.tensor([[[slabs[0].data_ptr(), capacity]] for slabs in slabs_of], device=device)
    place = torch.tensor([[5, 0, 20, 0], [8, 0, 3, 0], [1, 0, 31, 0]], dtype=torch.int32, device=device)
    code_bytes = 2 * code_width(dim, kv_format)
    op(packed.code, slabs_of, addresses, place, 8, pitch=total)
    op(packed.scale, slabs_of, addresses, place, 8, pitch=total // 2, skip=code_bytes // 2)
    if pinned:
        torch.cuda.synchronize()
    for d, (slab,) in enumerate(slabs_of):
        got, start = packed_slab(slab, capacity, dim, kv_format), 0
        untouched = torch.ones(capacity, dtype=torch.bool)
        for length, row in ((5, 20), (8, 3), (1, 31)):
            rows = slice(start, start + length)
            want = Packed(packed.code[d, :, rows].cpu(), packed.scale[d, :, rows].cpu())
            assert torch.equal(got.code[:, row : row + length], want.code)
            assert torch.equal(got.scale[:, row : row + length], want.scale)
            untouched[row : row + length] = False
            start += length
        assert (got.code[:, untouched] == 7).all()
        assert (got.scale[:, untouched].view(torch.uint8) == 7).all()
