"""Every kernel compiles for GPUs that are not at hand, and fits them without spilling registers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_kernels

HERE = Path(__file__).parent
KERNELS = Path(lora_kernels.__file__).parent
# bytes that one block may ask for
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# of one multiprocessor
REGISTERS = 65536
SECONDS = 900

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> dict[int, list[dict[str, Any]]]:
    """What the cases of ahead_of_time.py take of each GPU; two processes, as it needs minutes."""
    # the interpreter's kernels are Python functions, and what a GPU would run must not matter
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    processes = {
        capability: subprocess.Popen(
            [sys.executable, str(HERE / "ahead_of_time.py"), str(capability)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability in SHARED_MEMORY
    }  # fmt: skip
    printed = {}
    try:
        for capability, process in processes.items():
            out, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-2000:]
            printed[capability] = [json.loads(line) for line in out.splitlines()]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return printed


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_and_fit(rows: dict[int, list[dict[str, Any]]], capability: int) -> None:
    misfits = [row for row in rows[capability] if not _fits(row, capability)]
    assert not misfits, "\n".join(str(row) for row in misfits)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_kernel_is_forgotten(rows: dict[int, list[dict[str, Any]]], capability: int) -> None:
    assert _launched_kernels() <= {row.get("kernel") for row in rows[capability]}


def _fits(row: dict[str, Any], capability: int) -> bool:
    return (
        "error" not in row
        and row["shared"] <= SHARED_MEMORY[capability]
        and row["registers"] <= min(255, REGISTERS // (32 * row["num_warps"]))
        and row["spills"] == 0
    )


def _launched_kernels() -> set[str]:
    """Every function under `@triton.jit` that no other one uses."""
    functions = {}
    used = set()
    for path in KERNELS.glob("*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and _is_jit(function):
                functions[f"{KERNELS.name}.{path.stem}.{function.name}"] = function.name
                # handed to a reduction counts as a call
                used |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    assert functions
    return {name for name, function in functions.items() if function not in used}


def _is_jit(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
