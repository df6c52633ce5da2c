"""Fill a folder with the compiled kernels of the recipes: `python -m lora_train.precompile FOLDER`.

Run where an image is built, without a GPU. FOLDER is laid out as Triton's cache and holds what
runs look up on the GPUs of `CAPABILITIES`, and the module through which Triton calls the driver:
the first step on such a GPU compiles nothing, and needs no C compiler.

Triton's group files name the others by absolute path. So FOLDER must stay where it was filled, and
another cache that holds a copy of the small files alone finds the kernels in it:

    cd FOLDER && cp -rn --parents */__grp__*.json */*.so "$TRITON_CACHE_DIR"
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import build

from lora_kernels.absent_gpu import absent_gpu
from lora_train.config import Config
from lora_train.config_loading import recipe_names, resolve
from lora_train.errors import LoraTrainError, UserError
from lora_train.kernel_cache import KernelCount
from lora_train.known_models import MODELS
from lora_train.rehearsal import rehearse

CAPABILITIES = (80, 90)
"""A100; H100 and H200. Those that launch tables are there for."""

Case = tuple[Config, Mapping[str, Any]]
"""The configuration of a run, and the dimensions of its model as `rehearse` takes them."""

# what users change of a recipe, one at a time
_OVERRIDES: tuple[dict[str, str], ...] = (
    {},
    {"peft.dim": "8"},
    {"peft.dim": "16"},
    {"peft.dim": "32"},
    {"peft.dropout": "0.05"},
    {"model.quantization": "nf4"},
)


def recipe_configs() -> Iterator[Config]:
    """Yield the configurations that kernels are compiled for."""
    seen = set()
    for name in recipe_names():
        # writes its weights out on demand as nf4 does, and so launches what that recipe's do
        if resolve(factory=name, overrides={}).trainer.strategy == "fsdp2":
            continue
        for overrides in _OVERRIDES:
            config = resolve(factory=name, overrides=overrides)
            # nothing else of it decides about kernels
            key = repr((config.model, config.peft))
            if key not in seen:
                seen.add(key)
                yield config


def precompile(destination: Path, cases: Sequence[Case]) -> KernelCount:
    """Compile the kernels of some runs into a folder, one process for each capability.

    Args:
        destination: the folder; what it holds already is kept and not compiled again.
        cases: the runs.

    Returns:
        How many kernels the runs launch, and how many of them were not there.

    Raises:
        UserError: kernels compiled in this environment would not be found, or cannot be.
    """
    _check_environment()
    # as it is: what the group files name must exist under this name later
    destination = destination.absolute()
    environment = {"TRITON_CACHE_DIR": str(destination), "TRITON_STORE_BINARY_ONLY": "1"}
    total = KernelCount()
    with mock.patch.dict(os.environ, environment):
        _build_driver_module()
        with ProcessPoolExecutor(
            len(CAPABILITIES), mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            for count in pool.map(compile_cases, CAPABILITIES, [cases] * len(CAPABILITIES)):
                total.cached += count.cached
                total.compiled += count.compiled
                total.seconds += count.seconds
    _drop_sources(destination)
    return total


def compile_cases(capability: int, cases: Iterable[Case]) -> KernelCount:
    """Compile the kernels of some runs for one kind of GPU, into Triton's cache.

    Args:
        capability: of the GPU, 80 or 90.
        cases: the runs.

    Returns:
        How many kernels the cache held, and how many were compiled.
    """
    # one of the processes that share the cores
    torch.set_num_threads(1)
    count = KernelCount()
    with mock.patch.object(triton.knobs.compilation, "listener", count), absent_gpu(capability):
        for config, dimensions in cases:
            rehearse(config, dimensions)
            # a model refers to itself, and would be freed some models later
            gc.collect()
    return count


def _check_environment() -> None:
    from triton._C.libtriton import get_cache_invalidating_env_vars

    if triton.knobs.runtime.interpret:
        raise UserError(
            "TRITON_INTERPRET is set: kernels are interpreted and not compiled",
            hint="unset TRITON_INTERPRET",
        )
    found = sorted(get_cache_invalidating_env_vars())
    if found:
        raise UserError(
            f"{', '.join(found)} set: Triton compiles otherwise for it, and a run without it "
            "would look for other kernels",
            hint=f"unset {' '.join(found)}",
        )


def _build_driver_module() -> None:
    """Compile Triton's module for the driver, which is linked to a library that is not there."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UserError(
            "no C compiler: Triton's module for the driver cannot be built",
            hint="install gcc where the image is built; runs need none",
        )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # What is linked records the library's name, if the library has any function that it calls;
        # the others are found when it is loaded.
        subprocess.run(
            [compiler, "-shared", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-x", "c", "-",
             "-o", f"{folder}/libcuda.so.1"],
            input=b"void cuDeviceGet(void) {}", check=True,
        )  # fmt: skip
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}))
        # without a driver it cannot be loaded
        stack.enter_context(mock.patch.object(build, "_load_module_from_path", mock.Mock()))
        nvidia_driver.libcuda_dirs.cache_clear()
        nvidia_driver.library_dirs.cache_clear()
        nvidia_driver.CudaUtils()


def _drop_sources(destination: Path) -> None:
    """Take away what no launch reads: each kernel's code before it was compiled."""
    for group in destination.glob("*/__grp__*.json"):
        children = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in children.items() if not name.endswith(".source")}
        if kept != children:
            # in this order: no group may name what is not there
            group.write_text(json.dumps({"child_paths": kept}))
            for name in children.keys() - kept.keys():
                Path(children[name]).unlink()


def _cases() -> list[Case]:
    cases: list[Case] = []
    for config in recipe_configs():
        if config.model.path not in MODELS:
            raise UserError(
                f"model.path={config.model.path}: its dimensions are not known here",
                hint="add them to MODELS in lora_train/known_models.py",
            )
        cases.append((config, MODELS[config.model.path]))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Compile for all recipes.

    Args:
        argv: words after the module's name. None: the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m lora_train.precompile")
    parser.add_argument("folder", type=Path, help="where the kernels are put, and must stay")
    folder = parser.parse_args(argv).folder
    begun = time.perf_counter()
    try:
        count = precompile(folder, _cases())
    except LoraTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: kernels: {count}; {size / 1e6:.1f} MB, {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
