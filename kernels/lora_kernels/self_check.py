"""Prove on this GPU, with this model, that the fused decoder computes what torch does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import DecoderLayer, Sequences
from lora_kernels.reference_decoder import reference_decoder

# two sequences, one of them no multiple of any block
_LENGTHS = (93, 163)
# in place of longer ones, so that it hides something
_LONGEST_WINDOW = 50


class CheckResult(NamedTuple):
    """What the check found."""

    failures: list[str]
    """One line per result outside of the bound; empty: all are within it."""
    seconds: float
    """Time it took, compiling included."""


def check_decoder(stack: DecoderStack) -> CheckResult:
    """Compare output and every gradient of a layer with torch's: of the first layer of each kind.

    The error against fp32 may be twice that of the same formulas computed by torch in the stack's
    dtype. Adapters are random for the check and put back after it: at the start lora_B is zero,
    and nothing would be seen.

    Args:
        stack: the stack as it will be trained.

    Returns:
        What is outside of the bound, and the time it took.
    """
    begun = time.perf_counter()
    kinds: dict[tuple[Any, ...], DecoderLayer] = {}
    for layer in stack.layers:
        ranks = [slot.rank for group in layer.groups for slot in group.slots]
        kinds.setdefault((layer.window, layer.attention_scale, *ranks), layer)
    failures: list[str] = []
    for layer in kinds.values():
        window = None if layer.window is None else min(layer.window, _LONGEST_WINDOW)
        alone = DecoderStack(
            [replace(layer, window=window)], stack.final_norm, stack.final_norm_eps
        )  # fmt: skip
        failures += [f"in layer {layer.index}, {line}" for line in _check_layer(alone)]
    return CheckResult(failures, time.perf_counter() - begun)


def _check_layer(stack: DecoderStack) -> list[str]:
    kept = [parameter.detach().clone() for parameter in stack.parameters]
    generator = torch.Generator(stack.final_norm.device).manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in stack.parameters:
                deviation = parameter.shape[1] ** -0.5
                parameter.normal_(0, deviation, generator=generator)
        return _compare(stack, generator)
    finally:
        with torch.no_grad():
            for parameter, values in zip(stack.parameters, kept, strict=True):
                parameter.copy_(values)


def _compare(stack: DecoderStack, generator: torch.Generator) -> list[str]:
    device, dtype = stack.final_norm.device, stack.final_norm.dtype
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    num_tokens, hidden_size = sum(_LENGTHS), len(stack.final_norm)
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])
    half = stack.layers[0].head_dim // 2
    angles = positions[:, None] * 1e4 ** (-torch.arange(half, device=device, dtype=wide) / half)
    borders = torch.tensor([0, _LENGTHS[0], num_tokens], dtype=torch.int32, device=device)
    rotations = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = Sequences(
        angles.cos().to(rotations), angles.sin().to(rotations), borders, max(_LENGTHS)
    )
    hidden, d_out = torch.randn(
        2, num_tokens, hidden_size, dtype=wide, device=device, generator=generator
    ).to(dtype)

    trained = [parameter for parameter in stack.parameters if parameter.requires_grad]

    def results(out: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(out, [inputs, *trained], d_out.to(out.dtype))
        return [out.detach(), *found]

    def reference(at: torch.dtype) -> list[torch.Tensor]:
        inputs = hidden.to(at).requires_grad_()
        return results(reference_decoder(stack, inputs, sequences, stack.parameters), inputs)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = hidden.clone().requires_grad_()
        actual = results(stack(inputs, sequences), inputs)
        same_dtype, truth = reference(dtype), reference(wide)
    names = ["the output", "the gradient of the input"]
    names += [f"the gradient of adapter matrix {number}" for number in range(len(trained))]
    failures = []
    for name, ours, torchs, true in zip(names, actual, same_dtype, truth, strict=True):
        # of the norm, as the largest error of so many operations depends on chance
        error = (ours.to(wide) - true).norm().item()
        allowed = 2 * (torchs.to(wide) - true).norm().item() + 2.0**-20 * (true.norm().item() + 1)
        # a comparison with NaN is False
        if not error <= allowed:
            failures.append(f"{name} is off by {error:.3g}, {allowed:.3g} are allowed")
    return failures
