"""`auto` in a run's settings becomes numbers, once the GPUs are known. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.gpu_specs import GpuSpec, gpu_spec
from lora_train.plan.advice import memory_mend
from lora_train.plan.fitting import Fit, cannot_fit, choose, least_of, unmeasured
from lora_train.plan.shape import shape_of

log = logging.getLogger(__name__)

# where the GPU is not listed only the order of times counts: an A100's
_UNKNOWN_GPU = "A100-80"


@dataclass(frozen=True)
class Settings:
    """What may be auto, decided."""

    micro_batch_size: int
    gradient_checkpointing: bool

    @classmethod
    def recorded(cls, tree: Mapping[str, Any]) -> Settings | None:
        """Read what an earlier part of a run decided.

        Args:
            tree: the content of its config.yaml.

        Returns:
            None: it has decided nothing.
        """
        size = tree.get("data", {}).get("micro_batch_size")
        checkpointing = tree.get("trainer", {}).get("gradient_checkpointing")
        if type(size) is not int or type(checkpointing) is not bool:
            return None
        return cls(size, checkpointing)

    @classmethod
    def of(cls, planned: Fit) -> Settings:
        """Return those of a planned step."""
        return cls(planned.step.num_sequences, planned.step.checkpointing)


def has_auto(config: Config) -> bool:
    """Tell whether a run leaves something open that the GPU's memory decides."""
    return "auto" in (config.data.micro_batch_size, config.trainer.gradient_checkpointing)


def settle(
    config: Config,
    model: Mapping[str, Any],
    *,
    num_gpus: int,
    memory_bytes: int | None,
    gpu_name: str,
    num_shards: int | None = None,
    before: Settings | None = None,
) -> Config:
    """Return the run with `data.micro_batch_size` and `trainer.gradient_checkpointing` decided.

    The whole memory of the GPU decides, not what is free. A run that goes on keeps what it had as
    long as that fits: gradients summed over other micro-batches are other bits.

    Args:
        config: the run.
        model: the content of the base model's config.json.
        num_gpus: that share a step, on all nodes.
        memory_bytes: of the smallest of them; None: it computes on CPUs.
        gpu_name: what the driver calls it.
        num_shards: GPUs that share each layer with trainer.strategy=fsdp2; None: all.
        before: what an earlier part of this run computed with.

    Returns:
        The run; as it was where nothing is auto.

    Raises:
        UserError: it cannot fit; names what would.
    """
    if not has_auto(config):
        return config
    kept = None if before is None else _settled(config, before)
    if kept is not None and not _divides(kept, num_gpus):
        kept = None  # on other GPUs than before
    otherwise = kept or _settled(config, Settings(micro_batch_size(config), False))
    if memory_bytes is None:
        return otherwise
    reason = _why_not_planned(config, model)
    if reason is not None:
        log.info("auto settings: not by the GPU's memory, whose use is not known: %s", reason)
        return otherwise
    if kept is not None and least_of(kept, model, num_gpus, num_shards).fits(memory_bytes):
        log.info("auto settings, as before: %s", _words(kept))
        return kept
    gpu = spec_or_default(gpu_name)
    chosen = choose(config, model, num_gpus, memory_bytes, gpu, num_shards)
    if chosen is not None:
        settled = _settled(config, Settings.of(chosen[0]))
        if kept is not None:
            log.warning(
                "auto settings: no room here for those that the run had (%s): it ends with other "
                "bits than on one kind of GPU",
                _words(kept),
            )
        log.info(
            "auto settings: %s, planned peak %.1f GiB of %.1f",
            _words(settled), chosen[0].peak_bytes / 2**30, memory_bytes / 2**30,
        )  # fmt: skip
        return settled
    least = least_of(config, model, num_gpus, num_shards)
    seen = (
        f"a step of full sequences needs {least.needed_bytes / 2**30:.1f} GiB of GPU memory, "
        f"{gpu_name} has {memory_bytes / 2**30:.1f}"
    )
    mend = memory_mend(config, model, num_gpus, memory_bytes, num_shards)
    if cannot_fit(config, model, num_gpus, memory_bytes, num_shards):
        raise UserError(seen, hint=mend)
    log.warning("auto settings: it may run out of memory: %s; %s", seen, mend)
    return kept or _settled(config, Settings.of(least))


def _why_not_planned(config: Config, model: Mapping[str, Any]) -> str | None:
    try:
        shape_of(model, config.peft)
    except UserError as error:
        return error.message
    return unmeasured(config, model)


def _divides(config: Config, num_gpus: int) -> bool:
    return config.data.global_batch_size % (micro_batch_size(config) * num_gpus) == 0


def spec_or_default(gpu_name: str) -> GpuSpec:
    """Return a GPU's data sheet; of one that is not listed, an A100's."""
    spec = gpu_spec(gpu_name) or gpu_spec(_UNKNOWN_GPU)
    assert spec is not None
    return spec


def _settled(config: Config, settings: Settings) -> Config:
    """Put the settings where auto stands, and nowhere else."""
    size, checkpointing = config.data.micro_batch_size, config.trainer.gradient_checkpointing
    return replace(
        config,
        data=replace(
            config.data,
            micro_batch_size=settings.micro_batch_size if size == "auto" else size,
        ),
        trainer=replace(
            config.trainer,
            gradient_checkpointing=settings.gradient_checkpointing
            if checkpointing == "auto"
            else checkpointing,
        ),
    )


def _words(config: Config) -> str:
    return (
        f"data.micro_batch_size={config.data.micro_batch_size} "
        f"trainer.gradient_checkpointing={str(config.trainer.gradient_checkpointing).lower()}"
    )
