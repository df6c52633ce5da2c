"""The plan of a run: its sizes, its memory on each GPU, and its time. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_train.batch_split import gradient_accumulation_steps
from lora_train.config import Config
from lora_train.gpu_specs import GpuSpec
from lora_train.model_size import checkpoint_bytes
from lora_train.plan.advice import memory_mend
from lora_train.plan.fitting import (
    Fit,
    choose,
    is_fused,
    largest_micro_batch,
    least_of,
    unmeasured,
)
from lora_train.plan.memory import Step, walk
from lora_train.plan.settling import spec_or_default
from lora_train.plan.speed import StepTime, step_time
from lora_train.plan.tape import KEPT, PARTS


@dataclass(frozen=True)
class Target:
    """A GPU to plan for."""

    name: str
    spec: GpuSpec | None
    """Its data sheet; None: it is not listed, and no time is planned."""
    memory_bytes: int
    is_here: bool = False


@dataclass(frozen=True)
class OnGpu:
    """A run on one kind of GPU."""

    target: Target
    fit: Fit
    """Of the setting that the run would take there."""
    is_fitting: bool
    is_hopeless: bool
    largest: dict[bool, int]
    """Sequences of the largest micro-batch, without and with checkpointing."""
    time: StepTime | None
    """None: it does not fit, or the GPU is not listed."""
    mend: str | None
    """What makes it fit."""


@dataclass(frozen=True)
class Probed:
    """What real steps took on the GPU here."""

    peak_bytes: int
    step_seconds: float
    reserved_bytes: int
    is_fused: bool
    """Whether the kernels ran the decoder as a whole."""


@dataclass(frozen=True)
class Plan:
    """All of it."""

    config: Config
    model: Mapping[str, Any]
    num_gpus: int
    shown: OnGpu
    """Whose setting and memory are shown: the GPU here, else the first that the run fits."""
    parts: dict[str, int]
    """What is live at its peak."""
    moment: str
    ways: dict[tuple[bool, bool], int]
    """(fused, checkpointing) -> activations kept of its micro-batch, in bytes."""
    gpus: list[OnGpu]
    checkpoint_bytes: int
    """On the disk, of all checkpoints and the adapter."""
    host_bytes: int
    """Page-locked, for what checkpointing keeps; 0: nothing."""
    probed: Probed | None = None

    @property
    def step(self) -> Step:
        """The setting whose memory is shown."""
        return self.shown.fit.step

    @property
    def fits_any(self) -> bool:
        """Whether there is a GPU that the run fits."""
        return any(each.is_fitting for each in self.gpus)

    @property
    def tokens_per_step(self) -> int:
        """Of all GPUs."""
        return self.config.data.global_batch_size * self.config.data.seq_length

    @property
    def caveat(self) -> str | None:
        """What of the run was never measured."""
        return unmeasured(self.config, self.model)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object: bytes and seconds."""
        shape, steps = self.step.shape, self.config.trainer.max_steps
        return {
            "parameters": shape.total,
            "trained_parameters": shape.trained,
            "gpus": self.num_gpus,
            "tokens_per_step": self.tokens_per_step,
            "shown": self.shown.target.name,
            "micro_batch_size": self.step.num_sequences,
            "gradient_checkpointing": self.step.checkpointing,
            "fused": self.step.is_fused,
            "peak_bytes": sum(self.parts.values()),
            "peak_moment": self.moment,
            "parts_bytes": self.parts,
            "activation_bytes": {
                f"{'fused' if fused else 'peft'}{', checkpointing' if on else ''}": size
                for (fused, on), size in self.ways.items()
            },
            "checkpoint_bytes": self.checkpoint_bytes,
            "host_bytes": self.host_bytes,
            "not_measured": self.caveat,
            "on": [_on_dict(each, self, steps) for each in self.gpus],
            "probe": None if self.probed is None else dataclasses.asdict(self.probed),
        }


def make_plan(
    config: Config, model: Mapping[str, Any], num_gpus: int, targets: Sequence[Target]
) -> Plan:
    """Plan a run.

    Args:
        config: the run.
        model: the content of the base model's config.json.
        num_gpus: that share a step.
        targets: GPUs to plan for.

    Returns:
        The plan.

    Raises:
        UserError: no plan is known for this model, or the batch does not divide by the GPUs.
    """
    gradient_accumulation_steps(config, num_gpus)
    on = [_plan_on(config, model, num_gpus, target) for target in targets]
    fitting = sorted((each for each in on if each.is_fitting), key=lambda e: not e.target.is_here)
    shown = fitting[0] if fitting else on[-1]
    chosen = shown.fit.step
    tape = walk(chosen)
    ways = {}
    for fused in (True, False) if is_fused(config, model) else (False,):
        for is_on in (False, True):
            way = dataclasses.replace(chosen, is_fused=fused, checkpointing=is_on)
            # on the GPU or on the host: it is kept somewhere
            ways[fused, is_on] = _kept_bytes(dataclasses.replace(way, keeps_on_host=False))
    shape = chosen.shape
    on_host = chosen.checkpointing and chosen.is_fused and chosen.keeps_on_host
    return Plan(
        config=config,
        model=model,
        num_gpus=num_gpus,
        shown=shown,
        parts={part: tape.at_peak[part] for part in PARTS if tape.at_peak.get(part)},
        moment=tape.moment,
        ways=ways,
        gpus=on,
        checkpoint_bytes=checkpoint_bytes(shape.trained, config),
        host_bytes=(shape.num_layers - 1) * 2 * chosen.tokens * shape.hidden if on_host else 0,
    )


def _plan_on(config: Config, model: Mapping[str, Any], num_gpus: int, target: Target) -> OnGpu:
    spec = spec_or_default(target.spec.name if target.spec else "")
    chosen = choose(config, model, num_gpus, target.memory_bytes, spec)
    if chosen is not None:
        best, mend = chosen[0], None
    else:
        best = least_of(config, model, num_gpus)
        mend = memory_mend(config, model, num_gpus, target.memory_bytes)
    return OnGpu(
        target=target,
        fit=best,
        is_fitting=chosen is not None,
        is_hopeless=best.is_hopeless(target.memory_bytes),
        largest={
            on: largest_micro_batch(
                dataclasses.replace(best.step, checkpointing=on), target.memory_bytes
            )
            for on in (False, True)
        },
        time=step_time(best.step, target.spec) if chosen and target.spec else None,
        mend=mend,
    )


def _kept_bytes(step: Step) -> int:
    """Activations that the backward pass needs, as the forward pass ends."""
    tape = walk(step)
    return tape.highest[KEPT]


def _on_dict(on: OnGpu, plan: Plan, steps: int | None) -> dict[str, Any]:
    seconds = None if on.time is None else on.time.seconds
    return {
        "gpu": on.target.name,
        "memory_bytes": on.target.memory_bytes,
        "needed_bytes": on.fit.needed_bytes,
        "peak_bytes": on.fit.peak_bytes,
        "fits": on.is_fitting,
        "micro_batch_size": on.fit.step.num_sequences,
        "gradient_checkpointing": on.fit.step.checkpointing,
        "largest_micro_batch": on.largest[False],
        "largest_micro_batch_checkpointing": on.largest[True],
        "step_seconds": seconds,
        "tokens_per_second": None if seconds is None else plan.tokens_per_step / seconds,
        "run_seconds": None if seconds is None or steps is None else steps * seconds,
        "is_host_bound": None if on.time is None else on.time.is_host_bound,
        "mend": on.mend,
    }
