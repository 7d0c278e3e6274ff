"""Imports flow one way, as docs/design.md draws it, and importing the package is quiet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVEL = {
    # A module may import those of a lower level only.
    "sentences": 0,
    "failures": 0,
    "units": 0,
    "files": 0,
    "transfer": 0,
    "needles": 0,
    "prose": 0,
    "pocket": 0,
    "punkt": 0,
    "exact": 0,
    "config": 1,
    "policies": 1,
    "disk": 1,
    "memory": 1,
    "slabs": 2,
    "store": 3,
    "lane": 4,
    "streaming": 4,
    "session": 5,
    "saved": 6,
    "batch": 6,
    "sampling": 1,
    "prompts": 2,
    "attention": 7,
    "fused": 8,
    "rope": 8,
    "reading": 8,
    "reuse": 9,
    "graph": 9,
    "decoding": 10,
    "loading": 11,
    "generation": 11,
    "engine": 12,
    "scoring": 13,
    "document": 13,
    "lm": 14,
    "__init__": 15,
    "harness": 16,
    "demo": 16,
    "explain": 16,
    "terminal": 17,
    "edit_script": 18,
    "arguments": 18,
    "cli": 19,
    "__main__": 20,
}
OUTSIDE = {"eval", "benchmarks", "training", "tests"}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "sentencekv").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", source_files("sentencekv"), ids=lambda path: str(path.relative_to(ROOT)))
def test_engine_imports_flow_down(path: Path) -> None:
    here = module_of(path)
    assert here in LEVEL, f"{here} is new: give it a level here and a line in docs/design.md"
    modules = {name.split(".")[1] for name in imported_modules(path) if name.startswith("sentencekv.")} & set(LEVEL)
    upward = {name for name in modules if name != here and LEVEL[name] >= LEVEL[here]}
    assert not upward, f"{here} must not import {sorted(upward)}"
    tops = {name.partition(".")[0] for name in imported_modules(path)}
    assert not tops & OUTSIDE, f"{here} imports {sorted(tops & OUTSIDE)}, which are not installed"


@pytest.mark.parametrize("path", source_files("triton_ops"), ids=lambda path: str(path.relative_to(ROOT)))
def test_ops_import_torch_and_triton_only(path: Path) -> None:
    allowed = {"torch", "triton", "triton_ops", *sys.stdlib_module_names}
    tops = {name.partition(".")[0] for name in imported_modules(path)}
    assert tops <= allowed, f"{path.name} imports {sorted(tops - allowed)}"


def test_only_attention_touches_the_attention_interface() -> None:
    for path in source_files("sentencekv"):
        if module_of(path) != "attention":
            assert "_attn_implementation" not in path.read_text(encoding="utf-8")
            assert "AttentionInterface" not in path.read_text(encoding="utf-8")


def test_import_is_quiet() -> None:
    code = "import logging, sentencekv; assert not logging.getLogger().handlers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == ""
    assert done.stderr == ""
