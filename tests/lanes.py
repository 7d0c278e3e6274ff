"""Random lanes for tests of the ops: ragged, in several parts and slabs, NaN wherever nothing was written yet."""

import pytest
import torch
from torch import Tensor

from triton_ops import Scores, encode_keys, pack_box, summarize, unpack_box
from triton_ops.gather_kv import gather_kv_ref
from triton_ops.lanes import Lane, Lanes, Part
from triton_ops.pack_kv import Format, pack_kv, packed_slab, row_bytes
from triton_ops.resolve_hot_set import Resolved, resolve_hot_set_ref

SLOT_TOKENS = 8

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter is wrong on bfloat16."""


def random_lane(
    lengths: list[list[int]],
    *,
    heads: int,
    dim: int,
    slots: int,
    resident: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    layers: tuple[int, ...] = (0,),
    slot_tokens: int = SLOT_TOKENS,
    bits: int = 2,
    tables: str = "moments",
    slab_tokens: int = 64,
    ring: dict[int, int] | None = None,
) -> Lane:
    """A lane whose parts have sentences of the given lengths; NaN in slots and in resident rows not yet in use.

    Args:
        lengths: of each part, the tokens of its sentences.
        resident: tokens that are always read.
        tables: which summaries: `mean`, `moments` or `codes`.
        ring: rows of each sliding-window layer.
    """
    pinned = device.type == "cuda"

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_sentences = sum(len(part) for part in lengths)
    place: list[list[int]] = []
    parts: list[Part] = []
    slabs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    used = slab_tokens
    num_slabs = 0
    first = 0
    for part in lengths:
        part_tables: dict[int, tuple[Tensor, ...]] = {}
        row_in_part = 0
        for length in part:
            if used + length > slab_tokens:
                num_slabs, used = num_slabs + 1, 0
                for layer in layers:
                    slab = draw(heads, slab_tokens, 2, dim)
                    slabs[layer].append(slab.pin_memory() if pinned else slab)
            place.append([length, num_slabs - 1, used, row_in_part])
            used += length
            row_in_part += length
        for layer in layers:
            keys = [slabs[layer][s][:, r : r + n, 0] for n, s, r, _ in place[first : first + len(part)]]
            key_TNH = torch.cat(keys, dim=1).transpose(0, 1) if keys else draw(0, heads, dim)
            offsets = torch.tensor([0, *part]).cumsum(0)
            moments = summarize(key_TNH, offsets)
            if tables == "moments":
                made = (torch.stack([moments.mean, 0.5 * moments.variance], dim=2).to(dtype),)
            elif tables == "mean":
                made = (moments.mean[:, :, None].to(dtype),)
            else:
                packed = pack_box(moments.minimum, moments.maximum)
                made = (packed, encode_keys(key_TNH, unpack_box(packed, dim), offsets, bits=bits))
            part_tables[layer] = tuple(table.to(device) for table in made)
        parts.append(Part(first, len(part), part_tables))
        first += len(part)

    def table(*shape: int) -> dict[int, Tensor]:
        return {layer: torch.full(shape, -1, dtype=torch.int32, device=device) for layer in layers}

    rows = resident + 5
    lane = Lane(
        resident_kv={layer: partly_filled(draw(heads, rows, 2, dim), resident).to(device) for layer in layers},
        hot_kv={
            layer: torch.full((heads, slots, slot_tokens, 2, dim), torch.nan, dtype=dtype, device=device)
            for layer in layers
        },
        sentence_of_slot=table(heads, slots),
        last_used=table(heads, slots),
        slot_of_sentence=table(heads, num_sentences + 3),
        place_S4=torch.tensor(place, dtype=torch.int32, device=device).reshape(-1, 4),
        slabs=slabs,
        slab_of={
            layer: torch.tensor(
                [[slab.data_ptr(), slab_tokens] for slab in slabs[layer]], dtype=torch.int64, device=device
            ).reshape(-1, 2)
            for layer in layers
        },
        parts=parts,
        share_S=torch.zeros(num_sentences + 3, dtype=torch.int64, device=device),
        traffic=torch.zeros(3, dtype=torch.int64, device=device),
        num_resident=resident,
        num_sentences=num_sentences,
        max_selected=slots,
        num_slots=slots,
        step=0,
        position=sum(map(sum, lengths)) + resident,
    )
    for layer, size in (ring or {}).items():
        lane.resident_kv[layer] = partly_filled(draw(heads, size, 2, dim), lane.position).to(device)
    return lane


def partly_filled(kv_NTH: Tensor, num_tokens: int) -> Tensor:
    """NaN in all rows but the first `num_tokens`."""
    kv_NTH[:, num_tokens:] = torch.nan
    return kv_NTH


def scores_from(lanes: Lanes, logit_BNGS: Tensor, num_extents: int = 3) -> Scores:
    """Scores from logits: NaN in all columns that are no sentences, normalisers in shares, one of them empty."""
    logit_BNGS = logit_BNGS.clone()
    extent = torch.zeros(*logit_BNGS.shape[:3], num_extents + 1, 2, device=lanes.device)
    extent[..., 0] = -torch.inf
    for b in range(lanes.num_lanes):
        count = lanes.lanes[b].num_sentences if b < len(lanes.lanes) else 0
        logit_BNGS[b, :, :, count:] = torch.nan
        for x in range(min(num_extents, count)):
            share = logit_BNGS[b, :, :, x:count:num_extents]
            top = share.amax(-1)
            extent[b, :, :, x, 0] = top
            extent[b, :, :, x, 1] = (share - top.clamp(min=-1e30)[..., None]).exp().sum(-1)
    return Scores(logit_BNGS, extent)


def seat(lanes: list[Lane], device: torch.device, *, spare: int = 1, most_selected: int | None = None) -> Lanes:
    """A batch with these lanes, and `spare` empty ones behind them; no lane selects more than `most_selected`."""
    for lane in lanes:
        lane.max_selected = min(lane.max_selected, most_selected or lane.max_selected)
    layers = sorted(lanes[0].resident_kv)
    heads = lanes[0].resident_kv[layers[0]].shape[0]
    batch = Lanes(
        len(lanes) + spare,
        layers,
        device,
        num_kv_heads=heads,
        capacity=max(lane.num_sentences for lane in lanes) + 7,
        most_selected=most_selected or max(lane.max_selected for lane in lanes),
        most_slots=max(lane.num_slots for lane in lanes) + 2,
        max_parts=max(len(lane.parts) for lane in lanes) + 1,
        slot_tokens=next(iter(lanes[0].hot_kv.values())).shape[2],
    )
    batch.seat(lanes)
    return batch


def pack_lanes(lanes: Lanes, kv_format: Format) -> None:
    """Bring all slabs of a batch into a format of fewer bits."""
    for lane in lanes.lanes:
        for layer, slabs in lane.slabs.items():
            packed_slabs = []
            for slab in slabs:
                heads, capacity, _, dim = slab.shape
                rows = torch.zeros(
                    (heads, capacity * row_bytes(dim, kv_format)), dtype=torch.uint8, pin_memory=slab.is_pinned()
                )
                for target, source in zip(
                    packed_slab(rows, capacity, dim, kv_format), pack_kv(slab, kv_format), strict=True
                ):
                    target.copy_(source)
                packed_slabs.append(rows)
            lane.slabs[layer] = packed_slabs
            table = [[rows.data_ptr(), slab.shape[1]] for rows, slab in zip(packed_slabs, slabs, strict=True)]
            lane.slab_of[layer] = torch.tensor(table, dtype=torch.int64, device=lanes.device).reshape(-1, 2)
    lanes.kv_format = kv_format
    lanes.seat(lanes.lanes)


def random_batch(
    lengths: list[list[list[int]]],
    device: torch.device,
    *,
    residents: list[int] | None = None,
    seed: int = 0,
    heads: int = 2,
    dim: int = 16,
    slots: int = 12,
    dtype: torch.dtype = torch.float32,
    spare: int = 1,
    most_selected: int | None = None,
    **options,
) -> Lanes:
    """A batch of lanes whose parts have sentences of the given lengths, `spare` empty lanes behind them.

    The same arguments give equal batches in memory of their own: one for the kernel, one for the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    lanes = [
        random_lane(
            parts,
            heads=heads,
            dim=dim,
            slots=slots,
            resident=resident,
            dtype=dtype,
            device=device,
            generator=generator,
            **options,
        )
        for parts, resident in zip(lengths, residents or [7 + 3 * i for i in range(len(lengths))], strict=True)
    ]
    return seat(lanes, device, spare=spare, most_selected=most_selected)


def random_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """So many sentence lengths; the first two are the extremes."""
    drawn = torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [longest, 1, *drawn][:count]


def random_selection(lanes: Lanes, counts: list[list[int]], seed: int = 0) -> Tensor:
    """int32 `[B, N, K]`: rising ids, so many for each lane and head."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.full((lanes.num_lanes, lanes.num_kv_heads, lanes.most_selected), -1, dtype=torch.int32)
    for b, lane in enumerate(lanes.lanes):
        for n in range(lanes.num_kv_heads):
            ids = torch.randperm(lane.num_sentences, generator=generator)[: counts[b][n]].sort().values
            selected[b, n, : ids.numel()] = ids.int()
    return selected.to(lanes.device)


def fetch(lanes: Lanes, layer: int, selected_BNK: Tensor) -> Resolved:
    """Bring a selection into the hot set, by the references."""
    resolved = resolve_hot_set_ref(selected_BNK, lanes, layer)
    gather_kv_ref(selected_BNK, resolved.slot_BNK, resolved.miss_BNK, lanes, layer)
    return resolved


def random_heads(lanes: Lanes, num_heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`[B, num_heads, dim]`, strided as attention hands it over: heads first in memory."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(num_heads, lanes.num_lanes, dim, generator=generator).to(dtype).to(lanes.device).transpose(0, 1)


def assert_as_good(got: Tensor, want: Tensor, truth: Tensor, *, ulps: int = 1) -> None:
    """The kernel's error is at most twice that of the reference in the same dtype, against float64.

    `ulps`: of the largest result, on top. Matrix units cut off what they add up, where the reference rounds it: sums of
    some hundred products in float32 may lose a few.
    """
    assert got.dtype == want.dtype
    assert got.shape == want.shape == truth.shape
    assert truth.dtype == torch.float64
    assert truth.isfinite().all()
    allowed = 2 * (want.double() - truth).abs().max() + ulps * torch.finfo(want.dtype).eps * truth.abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
