"""A plan with real steps beside it, on the GPU here."""

from __future__ import annotations

import dataclasses
import sys

import torch

from lora_train.errors import UserError
from lora_train.plan.planning import Plan, Probed, Target
from lora_train.plan.probe import probe


def probe_plan(plan: Plan, here: Target) -> Plan:
    """Run the steps that a run would take here, and put what they took into the plan.

    Args:
        plan: of the run, with this GPU.
        here: this GPU.

    Returns:
        The plan with `probed`.

    Raises:
        UserError: they ran out of memory.
    """
    step = next(on.fit.step for on in plan.gpus if on.target is here)
    print(
        f"probe: 3 steps of {plan.tokens_per_step:,} tokens on random weights ...",
        file=sys.stderr,
        flush=True,
    )
    config = plan.config
    settled = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, micro_batch_size=step.num_sequences),
        trainer=dataclasses.replace(config.trainer, gradient_checkpointing=step.checkpointing),
    )
    try:
        result = probe(settled, plan.model)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--probe: out of memory on {here.name}: {error}",
            hint="choose one of the settings that the plan says fit",
        ) from error
    return dataclasses.replace(
        plan,
        probed=Probed(
            result.max_memory_allocated_bytes,
            result.step_seconds,
            result.max_memory_reserved_bytes,
            result.is_fused,
        ),
    )
