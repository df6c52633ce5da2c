"""How many processes a run has, and how the global batch is split over them. Imports no torch."""

from __future__ import annotations

import os

from lora_train.config import Config
from lora_train.errors import UserError


def world_size() -> int:
    """Count the processes of this run.

    Returns:
        What torchrun or `accelerate launch` announced; 1 when nobody did.

    Raises:
        UserError: WORLD_SIZE is set and is not a positive number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"WORLD_SIZE={text!r}: expected a positive number", hint="unset WORLD_SIZE")
    return int(text)


def gradient_accumulation_steps(config: Config) -> int:
    """Count the micro-batches that each process sums before an optimizer step.

    Args:
        config: the run; the data section's batch sizes are read.

    Returns:
        global batch / (micro-batch x processes).

    Raises:
        UserError: the global batch does not divide by micro-batch x processes; says what would.
    """
    processes, data = world_size(), config.data
    per_forward = data.micro_batch_size * processes
    if data.global_batch_size % per_forward == 0:
        return data.global_batch_size // per_forward
    on = f"{processes} process{'es' if processes > 1 else ''}"
    smaller = data.global_batch_size // per_forward * per_forward
    batches = [str(size) for size in (smaller, smaller + per_forward) if size]
    fitting = [
        str(size)
        for size in range(1, data.global_batch_size + 1)
        if data.global_batch_size % (size * processes) == 0
    ]
    micro = f"data.micro_batch_size={' or '.join(fitting)}, or " if fitting else ""
    raise UserError(
        f"data.global_batch_size={data.global_batch_size} does not divide into micro-batches of "
        f"{data.micro_batch_size} on {on}",
        hint=f"{micro}data.global_batch_size={' or '.join(batches)}",
    )


def check_devices(config: Config) -> None:
    """Refuse a device count that this process was not started for.

    Args:
        config: the run; `trainer.devices` and `trainer.num_nodes` are read.

    Raises:
        UserError: `trainer.devices` x `trainer.num_nodes` is not the number of processes.
    """
    asked = config.trainer.devices
    if asked == "auto":
        return
    wanted, found = asked * config.trainer.num_nodes, world_size()
    if wanted == found:
        return
    raise UserError(
        f"trainer.devices={asked} on {config.trainer.num_nodes} node(s) means {wanted} processes; "
        f"this run was started with {found}",
        hint=f"start it with `torchrun --no-python --nproc-per-node {asked} lora-train ...`"
        if found == 1
        else "trainer.devices=auto takes what was started",
    )
