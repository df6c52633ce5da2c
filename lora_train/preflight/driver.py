"""Whether the driver runs this build of torch, and whether Triton can load kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lora_train.config import Config
from lora_train.model_size import DECODERS
from lora_train.preflight.assets import model_config
from lora_train.preflight.caches import triton_cache
from lora_train.preflight.findings import Finding
from lora_train.preflight.gpu import left_out_by_container
from lora_train.preflight.machine import Machine

# CUDA's major version -> oldest driver, by minor version compatibility
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Blackwell: unknown to what was built with CUDA before 12.8
_BLACKWELL = (10, 0)
_FIRST_FOR_BLACKWELL = (12, 8)
_LDCONFIG = "/sbin/ldconfig"


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch, read from its files."""

    version: str
    """Such as 2.13.0+cu126."""
    cuda: tuple[int, int] | None
    """CUDA that it is built for; None: the CPU."""


def torch_build() -> TorchBuild | None:
    """Read what the installed torch is built for, without importing it; None: there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = Path(spec.submodule_search_locations[0], "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    if version is None:
        return None
    return TorchBuild(version[1], (int(cuda[1]), int(cuda[2])) if cuda else None)


def check_driver(machine: Machine, config: Config) -> list[Finding]:
    """Compare the driver with the CUDA that torch is built for."""
    driver, build = machine.driver(), torch_build()
    gpus = machine.usable_gpus()
    if build is None or machine.wants_cpu or left_out_by_container(machine):
        return []
    if build.cuda is None:
        if not gpus:
            return []
        return [
            Finding(
                "driver", "error", f"torch {build.version} is built for the CPU, and there is a "
                f"GPU: {gpus[0]}", "the GPU would not be used", _rebuild(machine, "cu126"),
            )
        ]  # fmt: skip
    if driver is None:
        return []
    major = int(driver.partition(".")[0])
    cuda = f"{build.cuda[0]}.{build.cuda[1]}"
    oldest = _OLDEST_DRIVER.get(build.cuda[0])
    if oldest is not None and major < oldest:
        compat = _compat_folder()
        if compat is not None:
            return [Finding("driver", "ok", f"{driver} with CUDA {cuda}'s libcuda from {compat}")]
        return [
            Finding(
                "driver", "error", f"driver {driver}, torch {build.version} (CUDA {cuda})",
                f"CUDA {build.cuda[0]} needs driver {oldest} or newer",
                _rebuild(machine, "cu126")
                if build.cuda[0] > 12 and major >= _OLDEST_DRIVER[12]
                else f"ask for a node with driver {oldest}, or put CUDA's compat libraries first: "
                "export LD_LIBRARY_PATH=/usr/local/cuda/compat:$LD_LIBRARY_PATH",
            )
        ]  # fmt: skip
    newest = max((gpu.capability for gpu in gpus if gpu.capability), default=None)
    if newest is not None and newest >= _BLACKWELL and build.cuda < _FIRST_FOR_BLACKWELL:
        return [
            Finding(
                "driver", "error",
                f"{gpus[0]} has compute capability {newest[0]}.{newest[1]}, "
                f"torch {build.version} is built with CUDA {cuda}",
                "it holds no code for this GPU", _rebuild(machine, "cu130"),
            )
        ]  # fmt: skip
    return [Finding("driver", "ok", f"{driver} runs torch {build.version}")]


def check_toolchain(machine: Machine, config: Config) -> list[Finding]:
    """Look for what Triton needs at run time, where Triton looks for it."""
    if not machine.usable_gpus() or config.kernels.fused == "off":
        return []
    if left_out_by_container(machine):
        return []
    missing = []
    # what it compiles is kept, and the image brings it along
    is_compiled = any(triton_cache().glob("*/cuda_utils*.so"))
    if not _finds_libcuda(is_compiled):
        missing.append(
            (
                "libcuda.so.1 is neither in TRITON_LIBCUDA_PATH, nor in `ldconfig -p`, nor in "
                "LD_LIBRARY_PATH",
                "export TRITON_LIBCUDA_PATH=FOLDER with the driver's libcuda.so.1 in it",
            )
        )
    if not is_compiled:
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        header = Path(sysconfig.get_paths(scheme=_include_scheme())["include"]) / "Python.h"
        if compiler is None or shutil.which(compiler) is None:
            missing.append(
                (
                    f"no C compiler ({f'CC={compiler}' if compiler else 'gcc, clang'})",
                    "module load gcc, or export CC=/path/to/gcc",
                )
            )
        if not header.is_file():
            missing.append((f"no {header}", "install Python's headers (python3-dev)"))
    if not missing:
        return [Finding("toolchain", "ok", "all that Triton needs")]
    content = model_config(config.model)
    # a model that the kernels do not take runs without Triton
    is_fused = content is not None and content.get("model_type") in DECODERS
    is_certain = config.kernels.fused == "required" or is_fused
    return [
        Finding(
            "toolchain", "error" if is_certain else "warning", seen,
            "Triton cannot load the fused kernels without it",
            f"{mend}; kernels.fused=off does without the kernels",
        )
        for seen, mend in missing
    ]  # fmt: skip


def _rebuild(machine: Machine, cuda: str) -> str:
    if machine.in_image:
        return f"an image that was built with `make sif TORCH_CUDA={cuda}`"
    return f"make setup TORCH_CUDA={cuda}"


def _compat_folder() -> str | None:
    """Return the folder of CUDA's forward-compatible libcuda, if it is the one that is loaded."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and Path(folder, "libcuda.so.1").exists():
            return folder if "compat" in Path(folder).parts else None
    return None


def _finds_libcuda(is_compiled: bool) -> bool:
    """Look for libcuda.so.1 as `triton.backends.nvidia.driver.libcuda_dirs` does (3.7.1)."""
    given = os.environ.get("TRITON_LIBCUDA_PATH")
    if given:  # taken as it is, and read by the compiler alone
        return is_compiled or Path(given, "libcuda.so.1").exists()
    try:
        listed = subprocess.run([_LDCONFIG, "-p"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    lines = [line for line in listed.stdout.splitlines() if "libcuda.so.1" in line]
    folders = [os.path.dirname(line.split()[-1]) for line in lines]
    if not folders:
        folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return any(folder and Path(folder, "libcuda.so.1").exists() for folder in folders)


def _include_scheme() -> str:
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme
