"""Compiles an op's kernels for a GPU that need not be there, and prints what they take: one JSON line for each.

Run as a program, `python -m tests.compile_kernels <op>`, without TRITON_INTERPRET. Launchers are called as ever, on CPU
tensors; their launches are compiled and not run. So what is compiled is what would be launched.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.lanes import random_batch, random_heads
from triton_ops import Beside, Lanes, Resolved, Scores, pack_kv
from triton_ops.draw_greedy import draw_greedy_triton
from triton_ops.encode_keys import encode_keys_triton
from triton_ops.gated_linear import gated_linear_triton
from triton_ops.gated_product import gated_product_triton
from triton_ops.gather_kv import gather_kv_triton
from triton_ops.linear import linear_triton
from triton_ops.merge_attention import merge_attention_triton
from triton_ops.move_kv import move_kv_triton
from triton_ops.offload_kv import offload_kv_triton
from triton_ops.pack_box import pack_box_triton, unpack_box_triton
from triton_ops.positional_attention import positional_attention_triton
from triton_ops.resolve_hot_set import resolve_hot_set_triton
from triton_ops.rms_norm import rms_norm_triton
from triton_ops.rotary import rotary_triton
from triton_ops.score_codes import score_codes_triton
from triton_ops.score_sentences import score_sentences_triton
from triton_ops.select_sentences import select_sentences_triton
from triton_ops.sparse_decode import sparse_decode_triton
from triton_ops.summarize import summarize_triton
from triton_ops.token_signatures import token_signatures_triton


class Shape(NamedTuple):
    """Of a model: heads, and the widths of its layers."""

    heads: int
    group: int
    dim: int
    dtype: torch.dtype
    hidden: int
    intermediate: int


SHAPES = {
    "llama-8b": Shape(8, 4, 128, torch.bfloat16, 4096, 14336),
    "qwen-7b": Shape(4, 7, 128, torch.bfloat16, 3584, 18944),
    "llama-1b": Shape(8, 4, 64, torch.bfloat16, 2048, 8192),
    "wide-heads": Shape(4, 2, 256, torch.float16, 2304, 9216),
}
CAPABILITIES = {90: list(SHAPES), 80: ["llama-8b", "wide-heads"]}
"""Compute capabilities of an H100 and of an A100; for the second, what takes most."""
CPU = torch.device("cpu")


def lanes_of(shape: Shape, batch: int, capacity: int = 8192) -> Lanes:
    """Lanes that are launched as those of a long context are; what they hold is never read."""
    options = {"slot_tokens": 32, "slab_tokens": 4096, "tables": "codes", "ring": {1: 4096}}
    lanes = random_batch(
        [[[21] * 50, [32]]] * batch,
        CPU,
        residents=[80] * batch,
        heads=shape.heads,
        dim=shape.dim,
        dtype=shape.dtype,
        slots=8,
        spare=0,
        **options,
    )
    lanes.capacity, lanes.most_selected, lanes.most_slots = capacity, 68, 128
    return lanes


def queries(lanes: Lanes, shape: Shape) -> Tensor:
    return random_heads(lanes, shape.heads * shape.group, shape.dim, shape.dtype)


def chosen(lanes: Lanes) -> tuple[Tensor, Resolved]:
    """A selection, and where it is: shapes alone matter."""
    shape = (lanes.num_lanes, lanes.num_kv_heads, lanes.most_selected)
    selected, slot, length = (torch.zeros(shape, dtype=torch.int32) for _ in range(3))
    return selected, Resolved(
        slot, length, torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:2], dtype=torch.int32)
    )


def score_sentences(shape: Shape) -> None:
    lanes = lanes_of(shape, 1)
    for spread, log_length in (("square", True), ("range", True), ("abs", False), (None, False))[
        : 4 if shape.dim == 64 else 2
    ]:
        score_sentences_triton(queries(lanes, shape), lanes, 0, scale=0.1, spread=spread, log_length=log_length)


def score_codes(shape: Shape) -> None:
    lanes = lanes_of(shape, 1)
    for bits in (2, 4) if shape.dim == 64 else (2,):
        score_codes_triton(queries(lanes, shape), lanes, 0, scale=0.1, bits=bits)
    listed = torch.zeros(1, shape.heads, 272, dtype=torch.int32)
    score_codes_triton(queries(lanes, shape), lanes, 0, scale=0.1, bits=2, sentence_BNS=listed)


def select_sentences(shape: Shape) -> None:
    for capacity in (8192, 65536) if shape.dim == 64 else (8192,):
        lanes = lanes_of(shape, 1, capacity)
        scores = Scores(
            torch.zeros(1, shape.heads, shape.group, capacity), torch.zeros(1, shape.heads, shape.group, 500, 2)
        )
        beside = Beside(queries(lanes, shape), 0, 0.1)
        for group in ("max", "mean") if shape.dim == 64 else ("max",):
            select_sentences_triton(scores, lanes, group=group, room_tokens=944)
            select_sentences_triton(scores, lanes, group=group, room_tokens=944, beside=beside)
        select_sentences_triton(scores, lanes, group="max", room_tokens=944, beside=beside, mass=0.9)
    listed = Scores(
        torch.zeros(1, shape.heads, shape.group, 512),
        torch.zeros(1, shape.heads, shape.group, 500, 2),
        torch.zeros(1, shape.heads, 512, dtype=torch.int32),
    )
    select_sentences_triton(listed, lanes, group="max", room_tokens=944, budgets=4)


def resolve_hot_set(shape: Shape) -> None:
    for most_slots in (128, 1024):
        lanes = lanes_of(shape, 1)
        lanes.most_slots = most_slots
        resolve_hot_set_triton(chosen(lanes)[0], lanes, 0)


def gather_kv(shape: Shape) -> None:
    lanes = lanes_of(shape, 1)
    selected, resolved = chosen(lanes)
    gather_kv_triton(selected, resolved.slot_BNK, resolved.miss_BNK, lanes, 0)
    for kv_format in ("fp8", "int8", "int4") if shape.dim == 64 else ("fp8", "int4"):
        lanes.kv_format = kv_format
        gather_kv_triton(selected, resolved.slot_BNK, resolved.miss_BNK, lanes, 0)


def merge_attention(shape: Shape) -> None:
    total = torch.zeros(shape.heads * shape.group, 100, shape.dim)
    part = torch.zeros(1, 100, shape.heads * shape.group, shape.dim, dtype=shape.dtype).transpose(1, 2)[0]
    merge_attention_triton(total, total[:, :, 0].contiguous(), part, total[:, :, 0].contiguous())


def move_kv(shape: Shape) -> None:
    kv = torch.zeros(shape.heads, 100, 2, shape.dim, dtype=shape.dtype)
    place, addresses = torch.zeros(100, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)
    ways = ((shape.dim // 2, False), (shape.dim // 8, True), (0, False))
    for pairs, interleaved in ways if shape.dim == 64 else ways[:1]:
        table = torch.zeros(7, pairs)
        move_kv_triton(kv, [kv], addresses, place, table, table, interleaved=interleaved)


def offload_kv(shape: Shape) -> None:
    kv = torch.zeros(2, shape.heads, 64, 2, shape.dim, dtype=shape.dtype)
    for part, skip in ((kv, 0), *((part, 128) for part in pack_kv(kv, "int4"))):
        addresses, places = torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int32)
        offload_kv_triton(part, [], addresses, places, 32, pitch=400, skip=skip)


def positional_attention(shape: Shape) -> None:
    softcap = 50.0 if shape.dim == 256 else None
    # Rows enough for every program to have its own; and so few that several share keys.
    for rows, dtype in ((4096, shape.dtype), (8, shape.dtype), (4096, torch.float32)):
        q = torch.zeros(rows, shape.heads * shape.group, shape.dim, dtype=dtype).transpose(0, 1)
        kv = torch.zeros(shape.heads, 5000, 2, shape.dim, dtype=dtype)
        position = torch.zeros(rows, dtype=torch.int32)
        positional_attention_triton(q, kv, position, scale=0.1, softcap=softcap)


def sparse_decode(shape: Shape) -> None:
    lanes = lanes_of(shape, 1)
    q = queries(lanes, shape)
    k, v = (random_heads(lanes, shape.heads, shape.dim, shape.dtype) for _ in range(2))
    softcap = 50.0 if shape.dim == 256 else None
    scores = Scores(torch.zeros(1, shape.heads, shape.group, 8192), torch.zeros(1, shape.heads, shape.group, 330, 2))
    rest = scores if softcap is None else None
    for fetch in (False, True):
        sparse_decode_triton(q, k, v, lanes, 0, *chosen(lanes), scale=0.1, softcap=softcap, fetch=fetch, rest=rest)
    if shape.group == 4:
        sparse_decode_triton(q, k, v, lanes, 1, None, None, scale=0.1, sliding=True)


def summarize(shape: Shape) -> None:
    key = torch.zeros(64, shape.heads, 2, shape.dim, dtype=shape.dtype)[:, :, 0]
    summarize_triton(key, torch.tensor([0, 32, 64]))


def encode_keys(shape: Shape) -> None:
    key = torch.zeros(64, shape.heads, 2, shape.dim, dtype=shape.dtype)[:, :, 0]
    for bits in (1, 2, 4):
        encode_keys_triton(key, torch.zeros(2, *key.shape[1:2], 2, shape.dim), torch.tensor([0, 32, 64]), bits=bits)


def pack_box(shape: Shape) -> None:
    low, high = torch.zeros(2, 4, shape.heads, shape.dim)
    unpack_box_triton(pack_box_triton(low, high), shape.dim)


def of_layer(shape: Shape, batch: int, num_out: int, num_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and a norm of a linear layer."""
    x, weight, norm = torch.empty(batch, num_in), torch.empty(num_out, num_in), torch.empty(num_in)
    return x.to(shape.dtype), weight.to(shape.dtype), norm.to(shape.dtype)


def linear(shape: Shape) -> None:
    for batch in (1, 32):
        x, weight, norm = of_layer(shape, batch, shape.dim * shape.heads, shape.hidden)
        linear_triton(x, (weight, weight, weight), norm_weight_I=norm)
        linear_triton(x, (weight,), residual_BO=x[:, : weight.shape[0]])


def gated_linear(shape: Shape) -> None:
    for batch in (1, 32):
        x, weight, norm = of_layer(shape, batch, 512, shape.hidden)
        gated_linear_triton(x, weight, weight, norm_weight_I=norm)


def gated_product(shape: Shape) -> None:
    gate = torch.zeros(3, 512, dtype=shape.dtype)
    for activation in ("silu", "gelu_tanh"):
        gated_product_triton(gate, gate.clone(), activation=activation)


def draw_greedy(shape: Shape) -> None:
    for dtype in (shape.dtype, torch.float32):
        draw_greedy_triton(torch.zeros(2, 128_256, dtype=dtype))


def rms_norm(shape: Shape) -> None:
    x, _, norm = of_layer(shape, 4, 16, shape.hidden)
    rms_norm_triton(x, norm, eps=1e-5)


def rotary(shape: Shape) -> None:
    qkv = torch.zeros(4, (shape.group + 2) * shape.heads * shape.dim, dtype=shape.dtype)
    cos = torch.zeros(4, shape.dim, dtype=shape.dtype)
    for norm in (None, cos[0].clone()):
        rotary_triton(qkv, cos, cos, num_kv_heads=shape.heads, head_dim=shape.dim, q_norm_H=norm, k_norm_H=norm)


def token_signatures(shape: Shape) -> None:
    token, embedding = torch.zeros(3, dtype=torch.int64), torch.zeros(8, shape.hidden, dtype=shape.dtype)
    for bits in (32, 128):
        token_signatures_triton(token, embedding, token, torch.zeros(shape.hidden, bits))


OPS: dict[str, Callable[[Shape], None]] = {
    op.__name__: op
    for op in (
        score_sentences,
        score_codes,
        select_sentences,
        resolve_hot_set,
        gather_kv,
        merge_attention,
        move_kv,
        pack_box,
        offload_kv,
        positional_attention,
        summarize,
        encode_keys,
        sparse_decode,
        linear,
        gated_linear,
        gated_product,
        draw_greedy,
        rms_norm,
        rotary,
        token_signatures,
    )
}


class NoDevice:
    """What a launch asks Triton's driver for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(op: Callable[[Shape], None], shape: Shape, known: dict[str, dict]) -> Iterator[dict]:
    """What each distinct kernel of the op takes; `known`: those compiled before, by their hash."""
    kernels: dict[str, dict] = {}

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                made = kernel.run(*args, grid=grid, warmup=True, **options)
            if made.hash not in known:
                spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
                assert spilled, "ptxas said nothing"
                known[made.hash] = {
                    "kernel": made.metadata.name,
                    "shared": made.metadata.shared,
                    "warps": made.metadata.num_warps,
                    "registers": max(int(used) for used in re.findall(r"Used (\d+) registers", log.getvalue())),
                    "spilled": sum(int(number) for number in spilled),
                    "float64": made.asm["ptx"].count(".f64"),
                }
            kernels[made.hash] = known[made.hash]

        return launch

    JITFunction.__getitem__ = compile_only
    op(shape)
    yield from kernels.values()


def main(name: str) -> None:
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    known: dict[str, dict] = {}
    for capability, models in CAPABILITIES.items():
        triton.runtime.driver.set_active(NoDevice(capability))
        for name_of_module, module in sys.modules.items():
            # As on a device of this kind, and not as on a CPU.
            if name_of_module.startswith("triton_ops.") and hasattr(module, "starts_early"):
                module.starts_early = lambda _, early=capability >= 90: early
        for model in models:
            for kernel in compiled(OPS[name], SHAPES[model], known):
                sys.stdout.write(json.dumps({"op": name, "capability": capability, "model": model, **kernel}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
