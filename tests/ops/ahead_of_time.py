"""Compile the kernels for a GPU that need not be there: `python tests/ops/ahead_of_time.py 80`.

Prints one line of JSON for each case of the files aot_*.py beside this one: what it takes of the
GPU, or the error that stopped its compilation.

Such a file holds `aot_cases(capability)`, which calls launchers and yields what `recorded` gives.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from unittest import mock

HERE = Path(__file__).parent


class AotCase(NamedTuple):
    """One compilation of one kernel."""

    kernel: Any
    """The function under `@triton.jit`."""
    signature: dict[str, str]
    """Type of every parameter, "constexpr" for those in `constexprs`."""
    constexprs: dict[tuple[int], Any]
    """Values, by place of the parameter."""
    num_warps: int
    num_stages: int
    attrs: dict[tuple[int], list[Any]]
    """Likewise what is known of the others: that 16 divides them."""


def recorded(capability: int, launch: Callable[[], Any]) -> list[AotCase]:
    """The cases that launchers would have compiled on a GPU of a capability.

    Nothing is compiled: the tensors may be on the CPU and hold anything.

    Args:
        capability: 80 or 90, names the launch tables too.
        launch: calls launchers.
    """
    from triton import knobs

    from lora_kernels.absent_gpu import absent_gpu

    cases = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        (attrs,) = compile["configs"]
        cases.append(
            AotCase(
                fn.jit_function, compile["signature"], compile["constants"],
                compile["num_warps"], compile["num_stages"], attrs,
            )
        )  # fmt: skip
        # as if another cache had taken care of it
        return True

    with mock.patch.object(knobs.runtime, "jit_cache_hook", record), absent_gpu(capability):
        launch()
    return cases


def cases(capability: int) -> Iterator[tuple[str, AotCase | str]]:
    """Yield the name of each file of cases and a case, or what stopped it from making any."""
    for path in sorted(HERE.glob("aot_*.py")):
        try:
            made = importlib.import_module(path.stem).aot_cases
            known = set()
            for case in made(capability):
                key = (id(case.kernel), *map(repr, case[1:]))
                if key not in known:
                    known.add(key)
                    yield path.stem, case
        except Exception as error:
            yield path.stem, _summary(error)


def compiled(case: AotCase, capability: int) -> dict[str, int]:
    """Compile a case and return the bytes of shared memory, the registers and the spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    result = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    return {"shared": result.metadata.shared, **_resources(result.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True
        )
    used = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", text)}
    # bytes for each thread in memory: nothing but spills puts something there
    return {"registers": used["REG"], "spills": used["STACK"] + used["LOCAL"]}


def _description(case: AotCase) -> str:
    names = case.kernel.arg_names
    values = [f"{names[index]}={value}" for (index,), value in case.constexprs.items()]
    return " ".join([*values, f"num_warps={case.num_warps}", f"num_stages={case.num_stages}"])


def _summary(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    # an error of the compiler has all of its code in the middle
    return text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"


def main(capability: int, rows: TextIO) -> None:
    """Write a line of JSON for every case."""
    for file, case in cases(capability):
        row: dict[str, Any] = {"file": file}
        if isinstance(case, str):
            row["error"] = case
        else:
            row["kernel"] = f"{case.kernel.__module__}.{case.kernel.__name__}"
            row |= {"case": _description(case), "num_warps": case.num_warps}
            try:
                row |= compiled(case, capability)
            except Exception as error:
                row["error"] = _summary(error)
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    # kernels under it are Python functions
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET")
    sys.path.insert(0, str(HERE))
    with contextlib.redirect_stdout(sys.stderr):
        # where Triton prints what it could not compile
        main(int(sys.argv[1]), sys.__stdout__)
