"""How long a step takes: what must be computed and moved, at rates that were measured.

The rates are those of H100s and H200s, from the rows of kernels/benchmarks/results/plan.jsonl; for
other GPUs they are scaled by the data sheets' peaks. A step takes as long as its GPU, or as the
host, which launches its kernels: the slower of the two. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_train.gpu_specs import GpuSpec
from lora_train.plan.memory import Step

# Shares of the peak that were reached. Products: narrow models reach less, f = A K / (K + B).
_PRODUCTS, _NARROW = 0.68, 300
_ATTENTION = 0.40
_TRAFFIC = 0.75
# Passes over [T, K], [T, heads], [T, keys] and [T, I] of a fused layer, forward and backward, in
# all; PEFT's own forward makes so many times more.
_PASSES = (14, 4, 4, 12)
_UNFUSED_TRAFFIC = 9.0
# Of the host, for the forward and backward pass of a layer: from run to run, on hosts of one kind,
# 4.7 to 7.0 ms were measured, so what the host bounds is known to a fifth at best.
_HOST_SECONDS = 5.6e-3
_HOST_SECONDS_NF4 = 8.2e-3
_HOST_SECONDS_UNFUSED = 13.0e-3
# a layer is run again up to its last product
_RECOMPUTED_HOST = 0.4
# bitsandbytes' optimizer launches a kernel for each of the adapters' matrices, after the backward
_OPTIMIZER_8BIT_SECONDS = 1e-4
# over the same layers unsharded, 2 H100s, Llama-3.1-70B's shape (results/data_parallel.jsonl)
_SHARDED = 1.3
# sums of gradients between 2 H100s of a node, of a step (the same file)
_GRADIENT_SUMS = 0.01


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on each GPU."""

    products: float
    """Linear layers and the output layer."""
    attention: float
    traffic: float
    """What is bound by memory: norms, activations, unpacking of 4-bit weights."""
    host: float
    """Launching it all."""
    optimizer: float = 0.0
    """What an 8-bit optimizer adds."""
    exchange: float = 0.0
    """What the GPUs' exchange adds, as a share of the rest."""

    @property
    def gpu(self) -> float:
        """What the GPU computes, if the host keeps up."""
        return self.products + self.attention + self.traffic

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.gpu, self.host) * (1 + self.exchange) + self.optimizer

    @property
    def is_host_bound(self) -> bool:
        """Whether the GPU waits for the host."""
        return self.host > self.gpu


def step_time(step: Step, gpu: GpuSpec) -> StepTime:
    """Predict the time of an optimizer step.

    Args:
        step: what each GPU computes.
        gpu: where.

    Returns:
        Its time, with full sequences whose tokens all count in the loss.
    """
    shape, t = step.shape, step.tokens
    peak, bandwidth = gpu.bf16_tflops * 1e12, gpu.bandwidth_tbs * 1e12
    length = t / step.num_sequences
    recomputed = 1 - _last_product_share(step) if step.checkpointing else 0.0
    products = t * (
        (4 + 2 * recomputed) * shape.matrices
        + 6 * shape.trained
        + 4 * shape.hidden * shape.vocabulary
    )
    efficiency = _PRODUCTS * shape.hidden / (shape.hidden + _NARROW)
    keys = t * (length + 1) / 2
    # forward 2 products a key, backward 5
    attention = shape.num_layers * shape.attention_width * keys * (14 + 4 * step.checkpointing)
    widths = (shape.hidden, shape.attention_width, shape.key_width, shape.intermediate)
    passes = sum(n * width for n, width in zip(_PASSES, widths, strict=True))
    traffic = 2 * shape.num_layers * t * passes * (1 + 0.3 * step.checkpointing)
    traffic *= 1.0 if step.is_fused else _UNFUSED_TRAFFIC
    if step.is_quantized:  # half a byte is read and two written, in each pass
        traffic += 2.5 * shape.matrices * (2 + step.checkpointing)
    of_layer = _HOST_SECONDS_NF4 if step.is_quantized else _HOST_SECONDS
    host = shape.num_layers * (of_layer if step.is_fused else _HOST_SECONDS_UNFUSED)
    host *= 1 + _RECOMPUTED_HOST * step.checkpointing
    count = step.accumulation
    time = StepTime(
        products=count * products / (peak * efficiency),
        attention=count * attention / (peak * _ATTENTION),
        traffic=count * traffic / (bandwidth * _TRAFFIC),
        host=count * host,
        optimizer=_OPTIMIZER_8BIT_SECONDS * _num_matrices(step) * step.is_optimizer_8bit,
    )
    if step.num_gpus == 1:
        return time
    return replace(time, exchange=_SHARDED - 1 if step.is_sharded else _GRADIENT_SUMS)


def _last_product_share(step: Step) -> float:
    """The down projection's share of a layer's matrices."""
    layer = step.shape.layers[0]
    return (
        layer["down"].num_in * layer["down"].num_out * step.shape.num_layers / step.shape.matrices
    )


def _num_matrices(step: Step) -> int:
    """A and B of every adapter."""
    return 2 * sum(
        rank > 0 for layer in step.shape.layers for group in layer.values() for rank in group.ranks
    )
