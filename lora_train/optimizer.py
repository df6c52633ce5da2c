"""The optimizer of the adapter weights, and its learning rate over the run."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_train.config import LrSchedulerConfig, OptimConfig

logger = logging.getLogger(__name__)


def make_optimizer(model: PeftModel, config: OptimConfig) -> Optimizer:
    """Return the optimizer over all trainable parameters of the model.

    Args:
        model: the model with its adapter; nothing else in it is trainable.
        config: name, learning rate, decay, and LoRA+'s ratio of learning rates if wanted.

    Returns:
        The optimizer; with LoRA+ in groups with learning rates of their own.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    optimizer_class: Any = torch.optim.AdamW
    if config.name == "adamw_8bit":
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        # one kernel for all tensors: an adapter is hundreds of small ones
        options["fused"] = True
    if config.loraplus_lr_ratio is not None:
        return create_loraplus_optimizer(
            model,
            optimizer_class,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            # `weight_decay` would be overruled by the groups, which carry this one
            loraplus_weight_decay=config.weight_decay,
            **options,
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimizer_class(trainable, weight_decay=config.weight_decay, **options)


def make_scheduler(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Return the learning rate schedule; call its `step()` once per optimizer step.

    Warm-up is linear and its first step is 1 / warmup_steps of the peak. (The schedules of
    transformers start at zero, which spends the first batch on nothing.)

    Args:
        optimizer: every group's learning rate is scaled by the same factor.
        config: shape, warm-up and final learning rate.
        max_steps: optimizer steps of the whole run.

    Returns:
        The schedule, which has set the learning rate of the first step.
    """
    schedule = config.lr_scheduler
    floor = 0.1 if schedule.min_lr is None else schedule.min_lr / config.lr
    warmup = warmup_steps(schedule, max_steps)
    factor = partial(_factor, name=schedule.name, warmup=warmup, max_steps=max_steps, floor=floor)
    return LambdaLR(optimizer, factor)


def warmup_steps(config: LrSchedulerConfig, max_steps: int) -> int:
    """Return the optimizer steps of warm-up in a run of `max_steps`."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    # the rounding keeps 0.07 * 100 from being 8 steps
    return math.ceil(round(config.warmup_ratio * max_steps, 9))


def _factor(step: int, *, name: str, warmup: int, max_steps: int, floor: float) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    # 0 at the peak, 1 at the last step
    progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    if name == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if name == "linear":
        # the step after the last would be zero; the last still learns
        return (max_steps - step) / max(1, max_steps - warmup) if step < max_steps else 0.0
    return 1.0
