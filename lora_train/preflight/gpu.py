"""Whether there is a GPU, whether it is new enough, and whether the container lets it in."""

from __future__ import annotations

import os
import shlex
import sys

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.preflight.assets import num_parameters
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.machine import Machine
from lora_train.preflight.nvml import OLDEST, Gpu

# the driver itself keeps a few hundred MiB
_USED_BYTES = 2**30
# a larger model takes hours a step on a CPU
_CPU_PARAMETERS = 1_500_000_000
_ON_CPU = "ACCELERATE_USE_CPU=true runs on the CPU"
_NEWER = (
    "#SBATCH --gres=gpu:a100:1 or #SBATCH --constraint=a100 "
    "(`sinfo -o '%G %f'` lists what there is)"
)


def is_large(config: Config) -> bool:
    """Tell whether the model is too large for a CPU, as far as its size is known."""
    return (num_parameters(config.model) or 0) >= _CPU_PARAMETERS


def check_gpu(machine: Machine, config: Config) -> list[Finding]:
    """Judge the GPUs that this process may use, or that there is none."""
    used = machine.gpus_of_run(config)
    findings = [finding for gpu in used for finding in _judge(gpu, config)]
    if used and machine.gpus.problem is not None:
        findings.append(
            Finding(
                "gpu", "warning", machine.gpus.problem, "a GPU of this node cannot be read",
                "`nvidia-smi` shows its state; tell the cluster's support which node it is",
            )
        )  # fmt: skip
    if used:
        return findings + _idle(machine, config, len(used))
    if left_out_by_container(machine):
        return []  # `container` says so
    return [_no_gpu(machine, config)]


def check_container(machine: Machine, config: Config) -> list[Finding]:
    """Judge whether the container was started with the GPU's driver in it."""
    kind = machine.container
    if kind is None:
        return []
    if machine.wants_cpu or not left_out_by_container(machine):
        return [_entrypoint_ran(machine, kind)]
    options = machine.gpu_options
    if machine.gpus.gpus and kind == "docker":  # the driver's tools are there, its library not
        options += " -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    mend = machine.run_container(options)
    sign = machine.gpu_sign or "/proc/driver/nvidia"
    needs_gpu = config.kernels.fused == "required" or is_large(config)
    return [
        Finding(
            "container",
            # a host with a driver may run what wants no GPU
            "error" if machine.gpu_sign or needs_gpu else "warning",
            f"there is a GPU ({sign}), but libcuda.so.1 is not in this container",
            f"without the driver's library nothing runs on the GPU; {_ON_CPU}. "
            f"Was {options} given? Then this node's driver is broken: "
            f"#SBATCH --exclude={os.uname().nodename}",
            mend,
        )
    ]


def left_out_by_container(machine: Machine) -> bool:
    """Tell whether there is a GPU, and the container was started without its driver."""
    if machine.container is None or machine.wants_cpu or machine.gpus.has_libcuda:
        return False
    is_there = machine.gpu_sign is not None or bool(machine.gpus.gpus)
    return is_there or machine.file("/proc/driver/nvidia/version").exists()


def _judge(gpu: Gpu, config: Config) -> list[Finding]:
    findings = []
    if gpu.is_divided:
        return [
            Finding(
                "gpu", "error", f"{gpu} is in MIG mode, and this job has no instance of it",
                "a divided GPU runs nothing as a whole",
                "#SBATCH --gres=gpu:1g.10gb:1 with an instance that `sinfo -o '%G'` lists",
            )
        ]  # fmt: skip
    if gpu.capability is not None and gpu.capability < OLDEST:
        old = f"{gpu} has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        as_asked = config.trainer.precision == "fp32" and config.kernels.fused == "off"
        findings.append(
            Finding(
                "gpu",
                "warning" if as_asked else "error",
                old,
                "the kernels and bf16 need 8.0 (A100) or newer"
                + ("; fp32 without them takes several times longer" if as_asked else ""),
                _NEWER
                if as_asked
                else f"{_NEWER}; or, slowly, trainer.precision=fp32 kernels.fused=off",
            )
        )
    if gpu.used > _USED_BYTES:
        findings.append(
            Finding(
                "gpu", "warning",
                f"{gpu}: {in_bytes(gpu.used)} of {in_bytes(gpu.memory)} are in use already",
                "another process is on it: less memory for this run, and slower steps",
                "`nvidia-smi` names it; #SBATCH --exclusive keeps others away",
            )
        )  # fmt: skip
    if findings:
        return findings
    memory = f", {in_bytes(gpu.memory)}" if gpu.memory else ""
    return [Finding("gpu", "ok", f"{gpu}{memory}")]


def _entrypoint_ran(machine: Machine, kind: str) -> Finding:
    """Warn of a run in the image that began behind its entrypoint."""
    if not machine.in_image or not machine.run_follows or os.environ.get("LORA_STATE_DIR"):
        return Finding("container", "ok", kind)
    return Finding(
        "container",
        "warning",
        f"{sys.argv[0]} was started without the image's entrypoint",
        "the GPUs are not monitored, and caches are where their libraries put them",
        shlex.join(["/opt/lora/bin/lora-train", *machine.words]),
    )


def _idle(machine: Machine, config: Config, num_used: int) -> list[Finding]:
    """Warn of GPUs that no process will take; parts of one are no help to each other."""
    idle = [
        gpu
        for gpu in machine.usable_gpus()[num_used:]
        if not gpu.is_instance and (gpu.capability or OLDEST) >= OLDEST
    ]
    if not idle or machine.is_login_node or config.trainer.devices != "auto":
        return []
    num_gpus, data = num_used + len(idle), config.data
    batch = -(-data.global_batch_size // (micro_batch_size(config) * num_gpus))
    return [
        Finding(
            "gpu", "warning", f"{len(idle)} of {num_gpus} GPUs stay idle",
            f"{data.global_batch_size} sequences a step do not divide by {num_gpus} processes, or "
            "as few tasks were started",
            f"data.global_batch_size={batch * micro_batch_size(config) * num_gpus}, or "
            f"#SBATCH --gpus-per-node={num_used}",
        )
    ]  # fmt: skip


def _no_gpu(machine: Machine, config: Config) -> Finding:
    sign = machine.gpu_sign
    reason = machine.gpus.problem or "the driver lists none that this process may use"
    mend = f"#SBATCH --gpus=1; {_ON_CPU}"
    if sign is not None:
        seen = f"there should be a GPU ({sign}), but none can be used: {reason}"
        why = "the run would stop once torch is loaded"
        mend = (
            "#SBATCH --gpus=1 if the job asked for none; `nvidia-smi` on this node shows whether "
            f"the driver works; {_ON_CPU}"
        )
    elif config.kernels.fused == "required":
        seen, why = "no GPU, and kernels.fused=required", "the kernels need an NVIDIA GPU"
        mend = "#SBATCH --gpus=1, or kernels.fused=auto"
    elif machine.wants_cpu:
        return Finding("gpu", "ok", "CPU, as the environment says")
    elif is_large(config):
        size = num_parameters(config.model) or 0
        seen = f"no GPU, and the model has {size / 1e9:.1f} B parameters"
        why = "a step on the CPU would take minutes to hours"
    else:
        return Finding("gpu", "ok", "no GPU: CPU")
    # CUDA may work where NVML is missing or slow
    if machine.gpus.has_libcuda and not machine.gpus.driver and not machine.wants_cpu:
        return Finding(
            "gpu", "warning", f"there may be a GPU, which could not be judged: {reason}",
            "its age and its memory are not known before the run starts",
            "`nvidia-smi` shows whether the driver works",
        )  # fmt: skip
    return Finding("gpu", "error", seen, why, mend)
