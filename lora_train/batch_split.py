"""How the global batch is split over the processes of a run. Imports no torch."""

from __future__ import annotations

from lora_train.config import Config
from lora_train.errors import UserError


def micro_batch_size(config: Config) -> int:
    """Return data.micro_batch_size; auto counts as 1 until it is settled (see `plan.settling`)."""
    size = config.data.micro_batch_size
    return 1 if size == "auto" else size


def gradient_accumulation_steps(config: Config, num_processes: int) -> int:
    """Count the micro-batches that each process sums before an optimizer step.

    Args:
        config: the run; the data section's batch sizes are read.
        num_processes: of the run, on all nodes.

    Returns:
        global batch / (micro-batch x processes).

    Raises:
        UserError: the global batch does not divide by micro-batch x processes; says what would.
    """
    data = config.data
    per_forward = micro_batch_size(config) * num_processes
    if data.global_batch_size % per_forward == 0:
        return data.global_batch_size // per_forward
    on = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    smaller = data.global_batch_size // per_forward * per_forward
    batches = [str(size) for size in (smaller, smaller + per_forward) if size]
    fitting = [
        str(size)
        for size in range(1, data.global_batch_size + 1)
        if data.global_batch_size % (size * num_processes) == 0
    ]
    micro = f"data.micro_batch_size={' or '.join(fitting)}, or " if fitting else ""
    raise UserError(
        f"data.global_batch_size={data.global_batch_size} does not divide into micro-batches of "
        f"{micro_batch_size(config)} on {on}",
        hint=f"{micro}data.global_batch_size={' or '.join(batches)}",
    )
