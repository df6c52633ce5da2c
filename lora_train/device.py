"""The device that a process computes on, the arithmetic it computes in, and its CPU threads."""

from __future__ import annotations

import logging
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lora_train.errors import UserError
from lora_train.gpu_sign import gpu_sign, wants_cpu

logger = logging.getLogger(__name__)

# Ampere, the first GPUs with bf16 matrix units
_BF16_CAPABILITY = (8, 0)

_CGROUP = Path("/sys/fs/cgroup")
_NVIDIA_DEVICE = Path("/dev/nvidia0")


@dataclass(frozen=True)
class PrecisionChoice:
    """The arithmetic of the model, and why."""

    dtype: torch.dtype
    """Type of the model's weights and activations."""
    reason: str
    """One line for the log."""


def select_device(local_rank: int = 0) -> torch.device:
    """Return the GPU of this process, or the CPU where there is none or the user hides it.

    Args:
        local_rank: number of this process on its node, from 0.

    Returns:
        A CUDA device with its index, or the CPU.

    Raises:
        UserError: the process has no GPU of its own although others on the node have, or torch
            cannot use the GPU that the node or the job has.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and not wants_cpu() else 0
    if num_gpus == 0:
        _refuse_unused_gpu()
        return torch.device("cpu")
    # Slurm's --gpus-per-task shows each process one GPU, which is number 0 to all of them
    index = 0 if num_gpus == 1 else local_rank
    if index >= num_gpus:
        raise UserError(
            f"process {local_rank} of this node has no GPU: {num_gpus} are visible",
            hint="start as many processes per node as GPUs, or set trainer.devices=auto",
        )
    return torch.device("cuda", index)


def select_precision(
    precision: Literal["auto", "bf16", "fp32"], device: torch.device
) -> PrecisionChoice:
    """Return the arithmetic for a device.

    Args:
        precision: the configured one; auto is bf16 where the device computes it natively.
        device: where the model will be.

    Returns:
        The type and one line for the log.

    Raises:
        UserError: bf16 is asked for on a GPU that has no bf16 units.
    """
    if precision == "fp32":
        return PrecisionChoice(torch.float32, "fp32, as asked")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= _BF16_CAPABILITY:
            return PrecisionChoice(torch.bfloat16, f"bf16: {name} has bf16 units")
        if precision == "bf16":
            raise UserError(
                f"trainer.precision=bf16, but {name} (compute capability {major}.{minor}) "
                "has no bf16 units; those came with 8.0 (A100)",
                hint="ask Slurm for a newer GPU, such as --gres=gpu:a100:1 or --constraint=a100 "
                "(`sinfo -o '%G %f'` lists what there is), or set trainer.precision=fp32",
            )
        return PrecisionChoice(
            torch.float32, f"fp32: {name} (compute capability {major}.{minor}) has no bf16 units"
        )
    feature = _native_bf16_feature()
    if feature is not None:
        return PrecisionChoice(torch.bfloat16, f"bf16: this CPU has {feature}")
    if precision == "bf16":
        return PrecisionChoice(torch.bfloat16, "bf16, as asked; this CPU emulates it, slowly")
    return PrecisionChoice(torch.float32, "fp32: this CPU has neither avx512_bf16 nor amx_bf16")


def describe_device(device: torch.device) -> str:
    """Return one line that names the device, with its memory (GiB) or its threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def compute_deterministically() -> None:
    """Let the same inputs give the same bits, so that a run in two parts equals one in one piece.

    Operations without a deterministic form warn once and go on; the attention of packed rows is
    strict by itself (see `attention.py`).
    """
    # cuBLAS reads it when CUDA starts, which is later than this
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing here reads memory that was not written: no need to fill it first
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_cpu_threads(processes_per_node: int = 1, *, share: bool = True) -> int:
    """Let torch use the cores that this process may use.

    torch counts the node's cores, also where Slurm or a container grants a few of them; more
    threads than cores make every operation wait for the thread that has no core.

    Args:
        processes_per_node: processes of this run on the node.
        share: whether they share these cores; else each may have cores of its own, or all see all.

    Returns:
        The threads that torch will use.
    """
    # the user's word counts, and torch has read it already
    if not os.environ.get("OMP_NUM_THREADS"):
        cores = usable_cores()
        own = (cores if share else os.cpu_count() or cores) // processes_per_node
        torch.set_num_threads(max(1, min(cores, own)))
    return torch.get_num_threads()


def usable_cores() -> int:
    """Return the cores that affinity, control group and Slurm leave to this process, at least 1."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    limits.append(_cgroup_cores())
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits.append(int(slurm) if slurm.isdecimal() else None)
    return max(1, min(limit for limit in limits if limit is not None))


def _refuse_unused_gpu() -> None:
    """Raise a UserError where there is a GPU that torch cannot use."""
    sign = _sign_of_gpu()
    if sign is None:
        return
    if torch.version.cuda is None:
        found = f"torch {torch.__version__} is built for the CPU"
        mend = (
            "make setup TORCH_CUDA=cu126 (login nodes have no driver, so the automatic choice "
            "there is the CPU build)"
        )
    else:
        found = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds none"
        mend = (
            "start the container with --nv (docker: --gpus all), ask Slurm for the GPU "
            "(--gres=gpu:1), or have the driver looked at (`nvidia-smi` shows whether it works)"
        )
    raise UserError(
        f"there is a GPU ({sign}), but {found}",
        hint=f"{mend}; to use the CPU, set ACCELERATE_USE_CPU=true",
    )


def _sign_of_gpu() -> str | None:
    """Return what says that this process should have a GPU, or None."""
    return gpu_sign(_NVIDIA_DEVICE)


def _native_bf16_feature() -> str | None:
    """Return the name of the CPU's bf16 instructions, or None."""
    # the mkldnn predicate also holds where bf16 is emulated, at half the speed of fp32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("amx_bf16"):
        return "amx_bf16"
    if capabilities.get("avx512_bf16") or torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return None


def _cgroup_cores() -> int | None:
    """Return the control group's CPU quota in whole cores, rounded up; None without a quota."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return math.ceil(int(quota) / int(period))
