"""What says that this process should have a GPU, before anything asks the driver for one."""

from __future__ import annotations

import os
from pathlib import Path

# SLURM_GPUS_ON_NODE is a count, the others are lists of numbers, in which 0 is the first GPU
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE",
)  # fmt: skip


def wants_cpu() -> bool:
    """Whether the user hides the GPUs, or has accelerate's variable say so.

    Slurm sets CUDA_VISIBLE_DEVICES itself in each task, so in a job the other one is what counts.
    """
    is_asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y")
    return is_asked or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def gpu_sign(nvidia_device: Path) -> str | None:
    """Return what says that this process should have a GPU, or None.

    Args:
        nvidia_device: the file that stands for the first GPU, /dev/nvidia0.

    Returns:
        A variable with its value, or the file.
    """
    if wants_cpu():
        return None
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        is_none = value in ("", "-1", "NoDevFiles")
        if not is_none and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            return f"{name}={value}"
    return str(nvidia_device) if nvidia_device.exists() else None
