"""The kernels of the model's own layers against their references: odd sizes, every number of rows.

With no GPU the kernels run in Triton's interpreter, in a process of their own: the interpreter must be asked for before
triton is imported. It is wrong on bf16, which is tested on a GPU only.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from triton_ops.gated_linear import gated_linear, gated_linear_ref, gated_linear_triton
from triton_ops.gated_product import gated_product, gated_product_ref, gated_product_triton
from triton_ops.linear import MAX_ROWS, linear, linear_ref, linear_triton
from triton_ops.rms_norm import rms_norm, rms_norm_ref, rms_norm_triton
from triton_ops.rotary import rotary, rotary_ref, rotary_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [1, 3, 17, 32]

kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="test_kernels_in_the_interpreter runs it")


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Memory that a kernel forgets to write holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stdout[-5000:]


def close(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: object, **keywords: object
) -> None:
    """The kernel's error against float64 is at most twice that of the reference in the same dtype.

    And a rounding; a few of them in float32, where the order of a sum matters as much as its precision.
    """

    def to(value: object, dtype: torch.dtype) -> object:
        if isinstance(value, tuple):
            return tuple(to(part, dtype) for part in value)
        return value.to(dtype) if isinstance(value, Tensor) else value

    truth = reference(
        *[to(t, torch.float64) for t in tensors], **{k: to(v, torch.float64) for k, v in keywords.items()}
    )
    want = reference(*tensors, **keywords)
    got = kernel(*tensors, **keywords)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    rounding = torch.finfo(want.dtype).eps * (4 if want.dtype == torch.float32 else 1)
    allowed = 2 * (want.double() - truth).abs().max() + rounding * truth.abs().max()
    assert (got.double() - truth).abs().max() <= allowed


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float, dtype: torch.dtype) -> None:
    for num_in in (1, 70, 4096 if GPU else 256):
        x = normal(3, num_in + 8, dtype=dtype, scale=3.0)[:, :num_in]
        close(rms_norm_triton, rms_norm_ref, x, normal(num_in, dtype=dtype), eps=1e-5, offset=offset)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize(("num_in", "outs"), [(40, (24,)), (96, (40, 8, 16)), (272, (5, 33))])
def test_linear(num_in: int, outs: tuple[int, ...], batch: int, dtype: torch.dtype) -> None:
    x = normal(batch, num_in, dtype=dtype, scale=2.0)
    weights = tuple(normal(out, num_in, dtype=dtype, scale=num_in**-0.5) for out in outs)
    biases = tuple(normal(out, dtype=dtype) for out in outs)
    residual = normal(batch, sum(outs), dtype=dtype)
    norm = normal(num_in, dtype=dtype)
    close(linear_triton, linear_ref, x, weights)
    close(linear_triton, linear_ref, x, weights, biases, norm_weight_I=norm, norm_eps=1e-3)
    close(linear_triton, linear_ref, x, weights, norm_weight_I=norm, norm_offset=1.0, residual_BO=residual)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize(("num_in", "num_out"), [(40, 24), (272, 37)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear(activation: str, num_in: int, num_out: int, batch: int, dtype: torch.dtype) -> None:
    x = normal(batch, num_in, dtype=dtype, scale=2.0)
    gate, up = (normal(num_out, num_in, dtype=dtype, scale=num_in**-0.5) for _ in range(2))
    norm = normal(num_in, dtype=dtype)
    biases = [normal(num_out, dtype=dtype) for _ in range(2)]
    close(gated_linear_triton, gated_linear_ref, x, gate, up, activation=activation)
    close(gated_linear_triton, gated_linear_ref, x, gate, up, *biases, activation=activation, norm_weight_I=norm)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (5, 2048)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_product(activation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = (normal(*shape, dtype=dtype, scale=3.0) for _ in range(2))
    for op in (gated_product_triton, gated_product_ref):
        given = gate.clone()
        assert op(given, up, activation=activation) is given

    def each(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda gate, up, **keywords: op(gate.clone(), up, **keywords)

    close(each(gated_product_triton), each(gated_product_ref), gate, up, activation=activation)


@kernels
@pytest.mark.parametrize("batch", [1, 5])
def test_large_rows_of_half_precision_do_not_overflow(batch: int) -> None:
    x = torch.full((batch, 64), 3e4, device=DEVICE, dtype=torch.float16)
    norm = torch.full((64,), 4.0, device=DEVICE, dtype=torch.float16)
    weight = normal(8, 64, dtype=torch.float16, scale=0.1)
    assert linear_triton(x, (weight,), norm_weight_I=norm).isfinite().all()
    assert gated_linear_triton(x, weight, weight, norm_weight_I=norm).isfinite().all()


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "num_rotary"), [(16, 16), (24, 24), (16, 8), (8, 0)])
def test_rotary(head_dim: int, num_rotary: int, normed: bool, dtype: torch.dtype) -> None:
    for batch, num_heads, num_kv_heads in ((1, 4, 2), (3, 2, 1), (34, 7, 1)):
        qkv = normal(batch, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, scale=3.0)
        angle = torch.rand(batch, num_rotary, device=DEVICE) * 6
        cos, sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if num_rotary else (None, None)
        norms = {"q_norm_H": normal(head_dim, dtype=dtype), "k_norm_H": normal(head_dim, dtype=dtype)} if normed else {}
        for part in range(3):
            close(
                lambda *a, part=part, **k: rotary_triton(*a, **k)[part],
                lambda *a, part=part, **k: rotary_ref(*a, **k)[part],
                qkv,
                cos,
                sin,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                **norms,
            )


@pytest.mark.gpu
def test_rotary_of_more_rows_than_a_grid_has() -> None:
    qkv = normal(70_000, 4 * 8, dtype=torch.float32)
    angle = torch.rand(70_000, 8, device=DEVICE) * 6
    options = {"num_kv_heads": 1, "head_dim": 8}
    got, want = (op(qkv, angle.cos(), angle.sin(), **options) for op in (rotary_triton, rotary_ref))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_sizes_of_real_models(batch: int) -> None:
    """A size per launch rule: tall, wide and long matrices, in bfloat16."""
    for num_in, outs in ((4096, (4096, 1024, 1024)), (4096, (4096,)), (14336, (4096,)), (2560, (4096, 1024, 1024))):
        x = normal(batch, num_in, dtype=torch.bfloat16)
        weights = tuple(normal(out, num_in, dtype=torch.bfloat16, scale=num_in**-0.5) for out in outs)
        norm = normal(num_in, dtype=torch.bfloat16)
        close(linear_triton, linear_ref, x, weights, norm_weight_I=norm)
    gate, up = (normal(9728, 2560, dtype=torch.bfloat16, scale=0.02) for _ in range(2))
    close(gated_linear_triton, gated_linear_ref, x, gate, up, norm_weight_I=norm)


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    x = normal(5, 4096, dtype=torch.bfloat16)
    weight = normal(4096, 4096, dtype=torch.bfloat16)
    norm = normal(4096, dtype=torch.bfloat16)
    first = linear_triton(x, (weight,), norm_weight_I=norm)
    for _ in range(20):
        assert torch.equal(first, linear_triton(x, (weight,), norm_weight_I=norm))


def test_ops_choose_by_device(device: torch.device) -> None:
    x = torch.randn(2, 32, device=device)
    weight = torch.randn(8, 32, device=device)
    norm = torch.randn(32, device=device)
    for op, reference, arguments in (
        (rms_norm, rms_norm_ref, (x, norm)),
        (linear, linear_ref, (x, (weight,))),
        (gated_linear, gated_linear_ref, (x, weight, weight)),
    ):
        keywords = {"eps": 1e-5} if op is rms_norm else {}
        torch.testing.assert_close(op(*arguments, **keywords), reference(*arguments, **keywords))
    want = gated_product_ref(x.clone(), x, activation="silu")
    torch.testing.assert_close(gated_product(x.clone(), x, activation="silu"), want)
    qkv = torch.randn(2, 32, device=device)
    got = rotary(qkv, None, None, num_kv_heads=1, head_dim=8)
    want = rotary_ref(qkv, None, None, num_kv_heads=1, head_dim=8)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@kernels
def test_more_rows_than_the_kernels_take_are_refused() -> None:
    x = torch.randn(MAX_ROWS + 1, 16, device=DEVICE)
    with pytest.raises(AssertionError):
        linear_triton(x, (torch.randn(4, 16, device=DEVICE),))
