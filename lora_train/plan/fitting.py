"""What fits on a GPU, and what of it is fastest. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.gpu_specs import GpuSpec
from lora_train.plan.memory import Step, walk
from lora_train.plan.shape import shape_of
from lora_train.plan.speed import StepTime, step_time
from lora_train.plan.tape import Tape

# Measured on an H100: the CUDA context with torch's and the kernels' code takes 0.6 GiB of what the
# driver reports as the GPU's memory, and torch's allocator keeps up to 4 % in pieces that fit
# nothing.
_CONTEXT_BYTES = round(0.6 * 2**30)
_PIECES = 0.04
# among settings that are this close in time the one with the least memory is taken
_AS_FAST = 1.02
# tokens of a micro-batch that no GPU is larger than
_MOST_TOKENS = 2**22


@dataclass(frozen=True)
class Fit:
    """A setting of a run on one GPU."""

    step: Step
    peak_bytes: int
    """Of torch's tensors."""
    needed_bytes: int
    """With all that stands beside them."""

    def fits(self, memory_bytes: float) -> bool:
        """Whether it fits a GPU with so much memory, for certain."""
        return self.needed_bytes <= memory_bytes

    def is_hopeless(self, memory_bytes: float) -> bool:
        """Whether it cannot fit: the tensors alone are too large, by more than the plan's error."""
        return 0.97 * self.peak_bytes + _CONTEXT_BYTES > memory_bytes


def steps_of(
    config: Config, model: Mapping[str, Any], num_gpus: int, num_shards: int | None = None
) -> Iterator[Step]:
    """Yield what each GPU may compute in a step: one way, or several where settings are auto.

    Args:
        config: the run.
        model: the content of config.json.
        num_gpus: that share a step.
        num_shards: that share each layer with trainer.strategy=fsdp2; None: all of them.

    Yields:
        Ways to split and to keep, small micro-batches first, of full sequences.

    Raises:
        UserError: a model whose layers are not known.
    """
    is_sharded = config.trainer.strategy == "fsdp2"
    common = Step(
        shape=shape_of(model, config.peft),
        tokens=0,
        num_sequences=0,
        is_quantized=config.model.quantization is not None,
        double_quantization=config.model.double_quantization,
        is_fused=is_fused(config, model),
        num_gpus=num_gpus,
        num_shards=(num_shards or num_gpus) if is_sharded else 1,
        is_optimizer_8bit=config.optim.name == "adamw_8bit",
        has_dropout=config.peft.dropout > 0,
    )
    whole = max(1, config.data.global_batch_size // num_gpus)
    sizes = [micro_batch_size(config)]
    if config.data.micro_batch_size == "auto":
        sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    checkpointing = config.trainer.gradient_checkpointing
    for size in sizes:
        for is_on in (False, True) if checkpointing == "auto" else (checkpointing,):
            yield dataclasses.replace(
                common,
                tokens=size * config.data.seq_length,
                num_sequences=size,
                checkpointing=is_on,
                accumulation=-(-whole // size),
            )


def is_fused(config: Config, model: Mapping[str, Any]) -> bool:
    """Tell whether the kernels run the decoder as a whole, of a model whose layers are known."""
    return (
        config.kernels.fused != "off"
        and not config.peft.use_dora
        and model.get("hidden_act", "silu") == "silu"
        and not model.get("attention_dropout")
    )


def unmeasured(config: Config, model: Mapping[str, Any]) -> str | None:
    """Return what of a run the plan was never held against measurements of, or None."""
    peft = config.peft
    if peft.use_dora:
        return "peft.use_dora=true"
    if peft.modules_to_save:
        return f"peft.modules_to_save={peft.modules_to_save}"
    if peft.target_modules != "all-linear" and any("lm_head" in t for t in peft.target_modules):
        return "an adapter on lm_head"
    if config.trainer.precision == "fp32":
        return "trainer.precision=fp32"
    if config.model.attn_implementation == "eager" and not is_fused(config, model):
        return "model.attn_implementation=eager"
    if config.model.trust_remote_code and "auto_map" in model:
        return "code that the model brings along"
    return None


def fit(step: Step, tape: Tape | None = None) -> Fit:
    """Return what a step needs."""
    peak = (tape or walk(step)).peak
    return Fit(step, peak, round(peak * (1 + _PIECES)) + _CONTEXT_BYTES)


def least_of(
    config: Config, model: Mapping[str, Any], num_gpus: int, num_shards: int | None = None
) -> Fit:
    """Return, of the ways that the settings leave open, what needs the least."""
    fits = (fit(step) for step in steps_of(config, model, num_gpus, num_shards))
    return min(fits, key=lambda each: each.needed_bytes)


def cannot_fit(
    config: Config,
    model: Mapping[str, Any],
    num_gpus: int,
    memory_bytes: float,
    num_shards: int | None = None,
    data_tokens: int | None = None,
) -> bool:
    """Tell whether a run's steps run out of memory for certain, whatever its data is like.

    Args:
        config: the run.
        model: the content of config.json.
        num_gpus: that share a step.
        memory_bytes: of the smallest of them.
        num_shards: see `steps_of`.
        data_tokens: that there are at least; None: not known, enough for a micro-batch.

    Returns:
        True only where even half full packs are too large, few of whose tokens are learned, and
        with PEFT's own forward too where kernels.fused=auto may come to that.

    Raises:
        UserError: a model whose layers are not known.
    """
    for step in steps_of(config, model, num_gpus, num_shards):
        # two packs are one if they fit into it: more than half is full. Others are as they come
        tokens = step.tokens // 2 if config.data.packed_sequence else step.num_sequences
        if data_tokens is not None:
            tokens = min(tokens, data_tokens)
        for fused in {step.is_fused, step.is_fused and config.kernels.fused == "required"}:
            least = dataclasses.replace(step, tokens=max(1, tokens), supervised=0.0, is_fused=fused)
            if not fit(least).is_hopeless(memory_bytes):
                return False
    return True


def choose(
    config: Config,
    model: Mapping[str, Any],
    num_gpus: int,
    memory_bytes: float,
    gpu: GpuSpec,
    num_shards: int | None = None,
) -> tuple[Fit, StepTime] | None:
    """Choose the micro-batch and whether to checkpoint, where they are auto.

    Args:
        config: the run.
        model: the content of config.json.
        num_gpus: that share a step.
        memory_bytes: of each.
        gpu: which.
        num_shards: see `steps_of`.

    Returns:
        Of those that fit and are as fast as any, the one that needs the least; None: none fits.

    Raises:
        UserError: a model whose layers are not known.
    """
    steps = list(steps_of(config, model, num_gpus, num_shards))
    # better what fits also where the host has no room for what checkpointing keeps
    for on_host in (False, True):
        timed = [
            (fit(step), step_time(step, gpu))
            for step in steps
            if fit(dataclasses.replace(step, keeps_on_host=on_host)).fits(memory_bytes)
        ]
        if timed:
            break
    if not timed:
        return None
    fastest = min(time.seconds for _, time in timed)
    return min(
        (pair for pair in timed if pair[1].seconds <= _AS_FAST * fastest),
        key=lambda pair: pair[0].needed_bytes,
    )


def largest_micro_batch(step: Step, memory_bytes: float) -> int:
    """Return the most sequences of a micro-batch that fit.

    Args:
        step: the setting; its number of sequences does not count.
        memory_bytes: of the GPU.

    Returns:
        Sequences; 0: not even one.
    """
    length = step.tokens // step.num_sequences

    def is_small_enough(count: int) -> bool:
        several = dataclasses.replace(step, tokens=count * length, num_sequences=count)
        return fit(several).fits(memory_bytes)

    most = max(1, _MOST_TOKENS // length)
    low, high = 0, 1
    while high <= most and is_small_enough(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_small_enough(middle) else (low, middle)
    return low
