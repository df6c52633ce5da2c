"""Whether a step fits into the GPU's memory, before any is used."""

from __future__ import annotations

import contextlib

from lora_train.config import Config, DataConfig
from lora_train.errors import UserError
from lora_train.plan.advice import memory_mend
from lora_train.plan.fitting import cannot_fit, least_of, unmeasured
from lora_train.plan.model_sizes import known_sizes
from lora_train.preflight.assets import find_data
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.machine import Machine

# of a data file, for a token; text has 3 to 5, and a row has keys around it
_MOST_BYTES_PER_TOKEN = 16


def check_memory(machine: Machine, config: Config) -> list[Finding]:
    """Compare the planned peak of a step with the memory of the smallest GPU of the run."""
    gpus = [gpu for gpu in machine.gpus_of_run(config) if gpu.memory > 0]
    if not gpus:
        return []
    model = known_sizes(config.model)
    if model is None:
        return [Finding("memory", "skipped", "the model's config.json is not here yet")]
    smallest = min(gpus, key=lambda gpu: gpu.memory)
    try:
        num_gpus = machine.ranks(config).world_size
        least = least_of(config, model, num_gpus)
        is_certain = cannot_fit(
            config, model, num_gpus, smallest.memory, data_tokens=_least_tokens(config.data)
        )
    except UserError as error:
        return [Finding("memory", "skipped", f"not planned: {error.message}")]
    reason = unmeasured(config, model)
    if reason is not None:
        return [Finding("memory", "skipped", f"not planned: {reason}")]
    seen = (
        f"a step of full sequences needs {in_bytes(least.needed_bytes)} of GPU memory, "
        f"{smallest} has {in_bytes(smallest.memory)}"
    )
    if least.fits(smallest.memory):
        return [Finding("memory", "ok", seen)]
    mend = memory_mend(config, model, num_gpus, smallest.memory)
    if is_certain:
        why = "the run would end in its first step, out of memory"
        return [Finding("memory", "error", seen, why, mend)]
    return [Finding("memory", "warning", seen, "it may run out of memory", mend)]


def _least_tokens(data: DataConfig) -> int | None:
    """Tokens that there are at least to train on; None: not known, they may fill a micro-batch."""
    folder = find_data(data).folder
    with contextlib.suppress(OSError):
        if folder is not None and folder.is_file():
            return folder.stat().st_size // _MOST_BYTES_PER_TOKEN
    return None
