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
from lora_train.preflight.folders import existing_parent
from lora_train.preflight.gpu import is_large, left_out_by_container
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
    build = torch_build()
    if build is None or machine.wants_cpu or left_out_by_container(machine):
        return []
    gpus = machine.gpus_of_run(config)
    if build.cuda is None:
        return _cpu_build(machine, config, build)
    findings = _check_version(machine, build, build.cuda)
    newest = max((gpu.capability for gpu in gpus if gpu.capability), default=None)
    if newest is not None and newest >= _BLACKWELL and build.cuda < _FIRST_FOR_BLACKWELL:
        findings.append(
            Finding(
                "driver", "error",
                f"{gpus[0]} has compute capability {newest[0]}.{newest[1]}, "
                f"torch {build.version} is built with CUDA {_dotted(build.cuda)}",
                "it holds no code for this GPU", _rebuild(machine, "cu130"),
            )
        )  # fmt: skip
    if findings or machine.driver() is None:
        return findings
    return [Finding("driver", "ok", f"{machine.driver()} runs torch {build.version}")]


def _cpu_build(machine: Machine, config: Config, build: TorchBuild) -> list[Finding]:
    gpus = machine.usable_gpus()
    seen, mend = f"torch {build.version} is built for the CPU", _rebuild(machine, "cu126")
    # of the installation, which the nodes of a job share, not of this node
    if machine.is_login_node and is_large(config):
        return [Finding("driver", "warning", seen, "no GPU of a job would be used", mend)]
    if not gpus:
        return []
    seen += f", and there is a GPU: {gpus[0]}"
    return [Finding("driver", "error", seen, "the GPU would not be used", mend)]


def _check_version(machine: Machine, build: TorchBuild, needed: tuple[int, int]) -> list[Finding]:
    driver, runs = machine.driver(), machine.gpus.cuda
    major = int(driver.partition(".")[0]) if driver is not None else None
    oldest = _OLDEST_DRIVER.get(needed[0])
    is_new = major is not None and oldest is not None and major >= oldest
    # the library that is loaded decides, which may be newer or older than the driver
    runs_it = runs[0] >= needed[0] if runs is not None else is_new
    if runs_it or oldest is None or (driver is None and runs is None):
        return []
    seen = f"driver {driver}" if driver is not None else "driver of unknown version"
    if runs is not None:
        seen += f" with a libcuda.so.1 for CUDA {_dotted(runs)}"
    if is_new:
        mend = "take the folder of the older libcuda.so.1 (compat) out of LD_LIBRARY_PATH"
    elif needed[0] > 12 and major is not None and major >= _OLDEST_DRIVER[12]:
        mend = _rebuild(machine, "cu126")
    else:
        mend = (
            f"ask for a node with driver {oldest}, or put CUDA's compat libraries first: "
            "export LD_LIBRARY_PATH=/usr/local/cuda/compat:$LD_LIBRARY_PATH"
        )
    return [
        Finding(
            "driver", "error", f"{seen}, torch {build.version} (CUDA {_dotted(needed)})",
            f"CUDA {needed[0]} needs driver {oldest} or newer", mend,
        )
    ]  # fmt: skip


def _dotted(cuda: tuple[int, int]) -> str:
    return f"{cuda[0]}.{cuda[1]}"


def check_toolchain(machine: Machine, config: Config) -> list[Finding]:
    """Look for what Triton needs at run time, where Triton looks for it."""
    if not machine.usable_gpus() or config.kernels.fused == "off":
        return []
    if left_out_by_container(machine):
        return []
    missing = []
    # what it compiles is kept, and the image brings it along
    suffix = sysconfig.get_config_var("EXT_SUFFIX")  # another Python's is of no use
    is_compiled = any(triton_cache().glob(f"*/cuda_utils{suffix}"))
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
    if os.statvfs(existing_parent(triton_cache())).f_flag & os.ST_NOEXEC:
        missing.append(
            (
                f"{triton_cache()} is on a file system that is mounted noexec",
                "export TRITON_CACHE_DIR=/path/on/another/file/system",
            )
        )
    if not missing:
        return [Finding("toolchain", "ok", "all that Triton needs")]
    content = model_config(config.model)
    # what the kernels do not take, such as DoRA, runs without Triton
    is_fused = content is not None and content.get("model_type") in DECODERS
    is_certain = config.kernels.fused == "required" or (is_fused and not config.peft.use_dora)
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
