"""Rows of cached prompts: derived ones equal rows that are written out, wherever they are moved to."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentencekv.memory import HostMemory
from sentencekv.reuse.rows import DerivedRows, Mover, PackedRows, Rows, gather, pack, take
from sentencekv.rope import Rotation, rotate

CPU = torch.device("cpu")
HEADS, DIM = 2, 12
ROTATIONS = {
    0: Rotation((1.0, 0.3, 0.01), False),
    2: Rotation((0.7, 0.1, 0.05, 0.01, 0.002, 0.0001), True),
    3: Rotation((), False),
}
"""Of three layers: a part of the dimensions, all of them in other pairs, none."""


def memory_of(device: torch.device) -> HostMemory:
    return HostMemory(None, pinned=device.type == "cuda")


def packed(num_tokens: int, device: torch.device = CPU, seed: int = 0) -> PackedRows:
    """Random rows of three layers, in host memory."""
    generator = torch.Generator().manual_seed(seed)
    memory = memory_of(device)
    kv_of_layer = {}
    for layer in ROTATIONS:
        kv_NTH = memory.allocate((HEADS, num_tokens, 2, DIM), torch.float32)
        kv_of_layer[layer] = kv_NTH.copy_(torch.randn(kv_NTH.shape, generator=generator))
    return PackedRows(kv_of_layer)


def derived(
    parent: Rows, sources: Sequence[int] | Mapping[int, Sequence[int]], device: torch.device = CPU, seed: int = 9
) -> DerivedRows:
    """`sources`: of all layers, or layer by layer."""
    of_layer = sources if isinstance(sources, Mapping) else dict.fromkeys(ROTATIONS, sources)
    source_of_layer = {layer: np.array(source_T, dtype=np.int64) for layer, source_T in of_layer.items()}
    own = packed(max(map(len, of_layer.values())), device, seed)
    counts = {layer: int((source_T < 0).sum()) for layer, source_T in source_of_layer.items()}
    kept = pack(own, {layer: np.arange(count) for layer, count in counts.items()}, memory_of(device))
    return DerivedRows(parent, source_of_layer, kept)


def written_out(rows: Rows, layer: int) -> Tensor:
    """All of a layer's rows `[N, T, 2, H]`, token by token."""
    if isinstance(rows, PackedRows):
        return rows.kv_of_layer[layer]
    assert isinstance(rows, DerivedRows)
    parent, own = written_out(rows.parent, layer), rows.own.kv_of_layer[layer]
    written, num_own = [], 0
    for at, source in enumerate(rows.source_of_layer[layer].tolist()):
        if source < 0:
            written.append(own[:, num_own])
            num_own += 1
        else:
            written.append(moved(parent[:, source], layer, at - source))
    return torch.stack(written, dim=1) if written else own


def moved(row_N2H: Tensor, layer: int, shift: int) -> Tensor:
    """A token's rows, so many tokens further on."""
    return torch.stack([rotate(row_N2H[:, 0], ROTATIONS[layer], shift), row_N2H[:, 1]], dim=1)


def brought(
    rows: Rows, layer: int, source_T: Sequence[int], first: int, device: torch.device, *, rotate: bool = True
) -> Tensor:
    """What a mover writes, on NaN."""
    mover = Mover(rows, np.array(source_T, dtype=np.int64), first, ROTATIONS if rotate else None, device)
    kv_NTH = torch.full((HEADS, len(source_T), 2, DIM), torch.nan, device=device)
    mover.into(layer, kv_NTH)
    return kv_NTH.cpu()


def sources_of(data: st.DataObject, num_parent: int) -> list[int]:
    """Some of the parent's tokens, runs of them more often than not, and tokens of its own."""
    pieces = data.draw(st.lists(st.tuples(st.integers(-1, num_parent - 1), st.integers(1, 5)), max_size=6))
    return [-1 if start < 0 else min(start + i, num_parent - 1) for start, length in pieces for i in range(length)] or [
        -1
    ]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_derived_rows_are_rows_written_out(data: st.DataObject) -> None:
    """Of derived rows, up to three edits deep; each layer has edits of its own."""
    rows: Rows = packed(data.draw(st.integers(1, 20)))
    for depth in range(data.draw(st.integers(0, 3))):
        num_tokens = len(rows.table(0))
        sources = {0: sources_of(data, num_tokens)}
        sources |= {layer: data.draw(st.permutations(sources[0])) for layer in (2, 3)}
        rows = derived(rows, sources, seed=depth)
    num_tokens = len(rows.table(0))
    assert rows.layers == [0, 2, 3]
    wanted, first = sources_of(data, num_tokens), data.draw(st.integers(0, 3000))
    for layer in rows.layers:
        everything = written_out(rows, layer)
        got = brought(rows, layer, range(num_tokens), 0, CPU)
        torch.testing.assert_close(got, everything, rtol=0, atol=1e-5)
        got = brought(rows, layer, wanted, first, CPU)
        for t, source in enumerate(wanted):
            if source < 0:
                assert got[:, t].isnan().all()
                continue
            want_N2H = moved(everything[:, source], layer, first + t - source)
            torch.testing.assert_close(got[:, t], want_N2H, rtol=0, atol=1e-5)
            assert torch.equal(got[:, t, 1], everything[:, source, 1]), "values are not turned"


def test_what_comes_back_to_its_place_is_what_it_was(device: torch.device) -> None:
    """Bit by bit: shifts add up, and keys are turned once, by the sum."""
    root = packed(30, device)
    away = derived(root, [-1] * 7 + list(range(30)), device)
    back = derived(away, list(range(7, 37)), device)
    for layer in ROTATIONS:
        assert torch.equal(brought(back, layer, range(30), 0, device), root.kv_of_layer[layer])
        assert torch.equal(brought(away, layer, range(9, 37), 2, device), root.kv_of_layer[layer][:, 2:])
    assert not torch.equal(brought(away, 0, range(7, 37), 7, device), root.kv_of_layer[0])


def test_room_for_rows(device: torch.device) -> None:
    mover = Mover(packed(5, device), np.array([3, -1, 0, 0]), 0, ROTATIONS, device)
    rows = {layer: mover.new(layer) for layer in ROTATIONS}
    assert {kv.shape for kv in rows.values()} == {(HEADS, 4, 2, DIM)}
    assert {kv.device.type for kv in rows.values()} == {device.type}
    assert mover.num_bytes == sum(kv.nbytes for kv in rows.values())


def test_keys_are_left_as_they_are_without_rotations(device: torch.device) -> None:
    root = packed(9, device)
    rows = derived(root, [5, 6, -1, 0], device)
    got = brought(rows, 2, [3, 0, -1, 1], 100, device, rotate=False)
    assert torch.equal(got[:, [0, 1, 3]], root.kv_of_layer[2][:, [0, 5, 6]])
    assert got[:, 2].isnan().all()


def test_rows_on_the_device_and_in_host_memory(device: torch.device) -> None:
    """A layer's tensors may be in both."""
    root = packed(11, device)
    own = PackedRows({layer: torch.randn(HEADS, 2, 2, DIM, device=device) for layer in ROTATIONS})
    rows = DerivedRows(root, dict.fromkeys(ROTATIONS, np.array([4, -1, 5, -1])), own)
    for layer in ROTATIONS:
        got = brought(rows, layer, range(4), 0, device, rotate=False)
        assert torch.equal(got[:, [1, 3]], own.kv_of_layer[layer].cpu())
        assert torch.equal(got[:, [0, 2]], root.kv_of_layer[layer][:, 4:6])


def test_layers_that_keep_other_tokens(device: torch.device) -> None:
    """Fewer are computed with depth, so later layers have fewer rows of their own."""
    root = packed(8, device)
    rows = derived(root, {0: [-1, -1, 2, -1], 2: [0, -1, 2, -1], 3: [0, 1, 2, 3]}, device)
    assert [rows.own.kv_of_layer[layer].shape[1] for layer in rows.layers] == [3, 2, 0]
    assert rows.num_tokens == 4
    assert rows.host_bytes == 5 * HEADS * 2 * DIM * 4
    for layer in rows.layers:
        torch.testing.assert_close(brought(rows, layer, range(4), 0, device), written_out(rows, layer))


def test_some_rows_as_they_are(device: torch.device) -> None:
    """`take`, `pack` and `gather` copy, bit by bit, in the order asked for."""
    root = packed(20, device)
    rows = derived(root, [0, 1, -1, 3, -1, 5, 6, 7], device)
    memory = memory_of(device)
    token_L = np.array([7, 2, 0, 4, 4, 5])
    copied = pack(rows, {0: token_L, 2: token_L[:1], 3: token_L[:0]}, memory)
    for layer, count in ((0, 6), (2, 1), (3, 0)):
        want = written_out(rows, layer)[:, torch.from_numpy(token_L[:count])]
        assert torch.equal(take(rows, layer, token_L[:count]), want)
        assert torch.equal(gather(rows, layer, token_L[:count], device).cpu(), want)
        assert torch.equal(copied.kv_of_layer[layer], want)
    assert copied.layers == [0, 2, 3]
    assert copied.host_bytes == 7 * HEADS * 2 * DIM * 4
    assert memory.in_use_bytes == sum(memory.taken_bytes(kv.nbytes) for kv in copied.kv_of_layer.values())


def test_moved_rows_are_not_copied_as_they_are() -> None:
    """They would be wrong; only a mover turns them."""
    rows = derived(packed(9), [0, 3, -1])
    for copy in (take, functools.partial(gather, device=CPU)):
        assert copy(rows, 0, np.array([0, 2])).shape == (HEADS, 2, 2, DIM)
        with pytest.raises(AssertionError):
            copy(rows, 0, np.array([0, 1]))


def test_nobody_elses_table_is_changed() -> None:
    """Tables of packed rows are shared by all of that length."""
    first, second = packed(6), packed(6, seed=1)
    derived(first, [3, 2, -1]).table(0)
    take(first, 0, np.array([1, 2]))
    gather(first, 0, np.array([1, 2]), CPU)
    brought(first, 0, [2, -1, 0], 40, CPU)
    assert second.table(0).tolist() == [[0, row, 0] for row in range(6)]
