"""Whether the batch fits the processes of the run, and whether these can share memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from lora_train.config import Config
from lora_train.distributed import check_devices, gradient_accumulation_steps
from lora_train.errors import UserError
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.machine import Machine

# Docker gives 64 MiB; NCCL takes tens of MiB for each pair of processes
_SHM_BYTES = 2**30


def check_batch(machine: Machine, config: Config) -> list[Finding]:
    """Divide the global batch over the processes, in a rehearsal over those that are asked for."""
    asked = config.trainer.devices
    rehearsed = None
    if not machine.run_follows and asked != "auto" and not os.environ.get("WORLD_SIZE"):
        rehearsed = asked * config.trainer.num_nodes
    try:
        if rehearsed is None:
            check_devices(config)
            steps = gradient_accumulation_steps(config)
        else:
            with _announced(rehearsed):
                steps = gradient_accumulation_steps(config)
    except UserError as error:
        return [
            Finding(
                "batch", "error", error.message, "every process takes the same number of "
                "micro-batches in a step", error.hint or "",
            )
        ]  # fmt: skip
    data = config.data
    on = f" on {rehearsed} processes" if rehearsed is not None else ""
    return [
        Finding(
            "batch",
            "ok",
            f"{data.global_batch_size} sequences a step: micro-batches of "
            f"{data.micro_batch_size}, {steps} accumulated{on}",
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


@contextlib.contextmanager
def _announced(num_processes: int) -> Iterator[None]:
    """Announce processes as torchrun would; no run follows a rehearsal."""
    os.environ["WORLD_SIZE"] = str(num_processes)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
