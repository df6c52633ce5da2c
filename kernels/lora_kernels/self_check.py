"""Prove on this GPU, with the first layer, that the fused decoder computes what torch does."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import Sequences
from lora_kernels.reference_decoder import reference_decoder

# two sequences, one of them no multiple of any block
_LENGTHS = (93, 163)


class CheckResult(NamedTuple):
    """What the check found."""

    failures: list[str]
    """One line per result outside of the bound; empty: all are within it."""
    seconds: float
    """Time it took, compiling included."""


def check_decoder(stack: DecoderStack) -> CheckResult:
    """Compare output and every gradient of the first layer with torch's.

    The error against fp32 may be twice that of the same formulas computed by torch in the stack's
    dtype. Adapters are random for the check and put back after it: at the start lora_B is zero,
    and nothing would be seen.

    Args:
        stack: the stack as it will be trained.

    Returns:
        What is outside of the bound, and the time it took.
    """
    begun = time.perf_counter()
    first = DecoderStack(stack.layers[:1], stack.final_norm, stack.final_norm_eps)
    kept = [parameter.detach().clone() for parameter in first.parameters]
    generator = torch.Generator(stack.final_norm.device).manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in first.parameters:
                deviation = parameter.shape[1] ** -0.5
                parameter.normal_(0, deviation, generator=generator)
        failures = _compare(first, generator)
    finally:
        with torch.no_grad():
            for parameter, values in zip(first.parameters, kept, strict=True):
                parameter.copy_(values)
    return CheckResult(failures, time.perf_counter() - begun)


def _compare(stack: DecoderStack, generator: torch.Generator) -> list[str]:
    device, dtype = stack.final_norm.device, stack.final_norm.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_tokens, hidden_size = sum(_LENGTHS), len(stack.final_norm)
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])
    half = stack.layers[0].head_dim // 2
    angles = positions[:, None] * 1e4 ** (-torch.arange(half, device=device, dtype=wide) / half)
    borders = torch.tensor([0, _LENGTHS[0], num_tokens], dtype=torch.int32, device=device)
    sequences = Sequences(angles.cos(), angles.sin(), borders, max(_LENGTHS))
    hidden, d_out = torch.randn(
        2, num_tokens, hidden_size, dtype=wide, device=device, generator=generator
    ).to(dtype)

    def results(out: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(out, [inputs, *stack.parameters], d_out.to(out.dtype))
        return [out.detach(), *found]

    def reference(at: torch.dtype) -> list[torch.Tensor]:
        inputs = hidden.to(at).requires_grad_()
        return results(reference_decoder(stack, inputs, sequences, stack.parameters), inputs)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = hidden.clone().requires_grad_()
        actual = results(stack(inputs, sequences), inputs)
        same_dtype, truth = reference(dtype), reference(wide)
    names = ["the output", "the gradient of the input"]
    names += [f"the gradient of adapter matrix {number}" for number in range(len(stack.parameters))]
    failures = []
    for name, ours, torchs, true in zip(names, actual, same_dtype, truth, strict=True):
        # of the norm, as the largest error of so many operations depends on chance
        error = (ours.to(wide) - true).norm().item()
        allowed = 2 * (torchs.to(wide) - true).norm().item() + 2.0**-20 * (true.norm().item() + 1)
        # a comparison with NaN is False
        if not error <= allowed:
            failures.append(f"{name} is off by {error:.3g}, {allowed:.3g} are allowed")
    return failures
