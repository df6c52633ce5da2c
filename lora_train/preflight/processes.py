"""The processes of the run: whether the job can start them, and what they share."""

from __future__ import annotations

import os

from lora_train.batch_split import gradient_accumulation_steps
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.machine import Machine

# Docker gives 64 MiB; NCCL takes tens of MiB for each pair of processes
_SHM_BYTES = 2**30


def check_ranks(machine: Machine, config: Config) -> list[Finding]:
    """Judge the shape of the job: which processes it starts, and with which GPUs."""
    try:
        ranks = machine.ranks(config)
    except UserError as error:
        return [
            Finding(
                "processes", "error", error.message, "every process needs a GPU of its own, and "
                "all nodes as many", error.hint or "",
            )
        ]  # fmt: skip
    if ranks.warning is not None:
        seen, _, mend = ranks.warning.partition(": ")
        return [Finding("processes", "warning", seen, "the GPUs cost the same when idle", mend)]
    told = "as the configuration says"
    here = told if machine.is_login_node else f"{ranks.local_world_size} here"
    return [Finding("processes", "ok", f"{_count(ranks.world_size)}, {here}")]


def check_batch(machine: Machine, config: Config) -> list[Finding]:
    """Divide the global batch over the processes, on a login node over those asked for."""
    try:
        num_processes = machine.ranks(config).world_size
    except UserError:
        return []  # `processes` says so
    try:
        steps = gradient_accumulation_steps(config, num_processes)
    except UserError as error:
        return [
            Finding(
                "batch", "error", error.message, "every process takes the same number of "
                "micro-batches in a step", error.hint or "",
            )
        ]  # fmt: skip
    data = config.data
    return [
        Finding(
            "batch",
            "ok",
            f"{data.global_batch_size} sequences a step on {_count(num_processes)}: "
            + (
                "micro-batches as the GPU's memory allows"
                if data.micro_batch_size == "auto"
                else f"micro-batches of {data.micro_batch_size}, {steps} accumulated"
            ),
        )
    ]


def check_shm(machine: Machine, config: Config) -> list[Finding]:
    """Judge the size of /dev/shm, through which the processes of a node exchange data."""
    num_processes = machine.processes_per_node(config)
    if num_processes == 1:
        return [Finding("shm", "ok", "one process on this node: not needed")]
    try:
        status = os.statvfs(machine.file("/dev/shm"))
    except OSError as error:
        return [Finding("shm", "skipped", f"/dev/shm: {error.strerror}")]
    size = status.f_blocks * status.f_frsize
    if size >= _SHM_BYTES:
        return [Finding("shm", "ok", f"/dev/shm has {in_bytes(size)}")]
    return [
        Finding(
            "shm", "warning",
            f"/dev/shm has {in_bytes(size)}, for {num_processes} processes on this node",
            "NCCL exchanges gradients through it, and dies with a bus error when it is full",
            "docker run --ipc=host ..., or docker run --shm-size=8g ...",
        )
    ]  # fmt: skip


def _count(num_processes: int) -> str:
    return f"{num_processes} process{'es' if num_processes > 1 else ''}"
