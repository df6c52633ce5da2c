"""What makes a run need less memory of a GPU, by how much. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.plan.fitting import least_of

# a change is worth naming from here on
_WORTH = 0.95
# more than would be asked for only to share one model
_MOST_GPUS = 65


def memory_mend(
    config: Config,
    model: Mapping[str, Any],
    num_gpus: int,
    memory_bytes: float,
    num_shards: int | None = None,
) -> str:
    """Return the line that makes a run fit into a GPU's memory.

    Args:
        config: the run.
        model: the content of config.json.
        num_gpus: that share a step.
        memory_bytes: of each.
        num_shards: see `steps_of`.

    Returns:
        Words for the command line, each with what the run needs then: single changes, the ones
        that change least first, or all of them together if none of them is enough.
    """
    found = []
    now = least_of(config, model, num_gpus, num_shards).needed_bytes
    together, words = config, []
    for word, changed in _changes(config):
        needed = least_of(changed, model, num_gpus, num_shards).needed_bytes
        if needed <= memory_bytes:
            found.append(f"{word} ({needed / 2**30:.1f} GiB)")
        elif needed < _WORTH * now:
            words.append(word)
            together = next(new for key, new in _changes(together) if key == word)
    if not found and len(words) > 1:
        needed = least_of(together, model, num_gpus, num_shards).needed_bytes
        if needed <= memory_bytes:
            found.append(f"{' '.join(words)} ({needed / 2**30:.1f} GiB)")
    if config.trainer.strategy == "fsdp2":
        found += _with_more_gpus(config, model, num_gpus, memory_bytes)
    if found:
        return "one of: " * (len(found) > 1) + "; ".join(found)
    return "a GPU with more memory, or a smaller model: `lora-train plan` shows what each takes"


def _with_more_gpus(
    config: Config, model: Mapping[str, Any], num_gpus: int, memory_bytes: float
) -> list[str]:
    """How many GPUs would hold a small enough share of the base each, if that is what helps."""
    for more in range(num_gpus + 1, _MOST_GPUS):
        if config.data.global_batch_size % (micro_batch_size(config) * more) == 0:
            needed = least_of(config, model, more).needed_bytes
            if needed <= memory_bytes:
                return [f"{more} GPUs ({needed / 2**30:.1f} GiB)"]
    return []


def _changes(config: Config) -> list[tuple[str, Config]]:
    changes = []
    data, trainer, model = config.data, config.trainer, config.model
    if micro_batch_size(config) > 1:
        changes.append(
            ("data.micro_batch_size=1", replace(config, data=replace(data, micro_batch_size=1)))
        )
    if trainer.gradient_checkpointing is False:
        changed = replace(config, trainer=replace(trainer, gradient_checkpointing=True))
        changes.append(("trainer.gradient_checkpointing=true", changed))
    if model.quantization is None and trainer.strategy == "ddp":
        changed = replace(config, model=replace(model, quantization="nf4"))
        changes.append(("model.quantization=nf4", changed))
    half = data.seq_length // 2
    if half >= 8:
        changed = replace(config, data=replace(data, seq_length=half))
        changes.append((f"data.seq_length={half}", changed))
    return changes
