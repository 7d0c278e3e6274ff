"""Every kernel is compiled as it would be launched, for GPUs that need not be there.

It fits, hardly spills, and has no doubles.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one program may take on an A100 and on an H100."""
MOST_SPILLED = {"score_sentences": 80, "select_sentences": 160, "sparse_decode": 96}
"""Bytes of registers that a thread stores and loads again, where it is more than 64: `score_sentences` makes variances
of ranges of 256 dimensions on sm_80, `select_sentences` keeps keys in registers,
`sparse_decode` for groups of seven is held to three programs at a time."""
KERNELS = sorted(p.stem for p in (ROOT / "triton_ops").glob("*.py") if f"def {p.stem}_triton(" in p.read_text("utf-8"))


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_compile(op: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Without line numbers: ptxas spends registers in another way where the checkout has another path.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-m", "tests.compile_kernels", op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["capability"] for kernel in kernels} == set(MOST_SHARED)
    for kernel in kernels:
        assert kernel["shared"] <= MOST_SHARED[kernel["capability"]], kernel
        assert kernel["spilled"] <= MOST_SPILLED.get(op, 64), kernel
        # A constant below 2^-126 is a double in Triton, and so becomes all that it meets.
        assert kernel["float64"] == 0, kernel
