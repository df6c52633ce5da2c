"""Adapter starts that come from the base weights: PiSSA, OLoRA and LoftQ.

W: base weight (N, K). A: (R, K), B: (N, R). scaling: alpha / R, or alpha / sqrt(R) with rsLoRA.

PiSSA and OLoRA take a first product out of the frozen weight, W' = W - scaling * B0 A0, and train
from A0, B0. PEFT 0.21.2 has both, but rounds A0 and B0 to the base's type after it has subtracted
their fp32 product, so that a bf16 model does not start where it was; here they stay fp32. What is
saved is the difference to the original base, a plain LoRA of twice the rank:

    W' + scaling * B A = W + scaling * [B, -B0] [A; A0]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from lora_train.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name of the only adapter."""

MUTATING_INITS = ("pissa", "olora")

# power iterations of the randomized SVD; PEFT's documentation calls 16 as good as exact
_SVD_ITERATIONS = 16

# layer name -> (A0, B0)
InitialFactors = dict[str, tuple[Tensor, Tensor]]


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that carry the adapter, with their names in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def split_off_factors(model: PeftModel, init: str) -> InitialFactors:
    """Start the adapter from its own base weights, and take that product out of them.

    Args:
        model: adapter attached, base weights as loaded.
        init: pissa or olora.

    Returns:
        The factors taken out, on the CPU; `subtract_factors` with them gives the same base weights.

    Raises:
        UserError: a layer has no plain weight matrix, or the rank is more than its smaller side.
    """
    factors: InitialFactors = {}
    for name, layer in lora_layers(model):
        weight = _plain_weight(name, layer, init)
        rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
        if init == "pissa":
            a, b = _principal_factors(weight, rank, scaling)
        else:
            # the first columns of Q depend on the first columns of W alone
            b, _ = torch.linalg.qr(weight.float()[:, :rank])
            a = b.T @ weight.float()
        factors[name] = (a.cpu(), b.cpu())
        _set_factors(layer, a, b)
    subtract_factors(model, factors)
    return factors


@torch.no_grad()
def subtract_factors(model: PeftModel, factors: InitialFactors) -> None:
    """Take scaling * B0 A0 out of the base weight of every layer, in fp32.

    Args:
        model: adapter attached, base weights as loaded.
        factors: what `split_off_factors` returned when the run began.
    """
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        # contiguous: the layout chooses the GPU's kernel, and with it the rounding
        a, b = (factor.to(weight.device).contiguous() for factor in factors[name])
        weight.data = (weight.float() - (layer.scaling[ADAPTER] * b) @ a).to(weight.dtype)


@torch.no_grad()
def compensate_quantization(model: PeftModel, source: str, revision: str | None) -> None:
    """Start the adapter from the largest part of what nf4 lost (LoftQ with one iteration).

    The base stays the usual nf4 of its weights, so the adapter loads on it like any other.
    (PEFT 0.21.2 needs a CUDA GPU for this and leaves the adapter's scaling out.)

    Args:
        model: adapter attached to a base in nf4.
        source: folder or hub name that the base was loaded from.
        revision: commit, tag or branch of the hub model.

    Raises:
        UserError: the original weights are not in safetensors under the layers' names.
    """
    import bitsandbytes

    files = _weight_files(source, revision)
    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        key = f"{name}.weight"
        if key not in files or not hasattr(base.weight, "quant_state"):
            raise UserError(
                f"peft.init=loftq finds no safetensors weight {key} in {source} to compare with",
                hint="set peft.init=default",
            )
        with safe_open(files[key], framework="pt") as file:
            original = file.get_tensor(key).to(base.weight.device, torch.float32)
        quantized = bitsandbytes.functional.dequantize_4bit(base.weight, base.weight.quant_state)
        lost = original - quantized.float()
        _set_factors(layer, *_principal_factors(lost, layer.r[ADAPTER], layer.scaling[ADAPTER]))


def _principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B, fp32, with scaling * B A the best approximation of that rank."""
    devices = [weight.device] if weight.is_cuda else []
    # the same random projections on every rank and in every run, and none drawn from the run's own
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.float(), q=rank, niter=_SVD_ITERATIONS)
    root = (s / scaling).sqrt()
    return root[:, None] * v.T, u * root


def _set_factors(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    # copies: the caller keeps the originals while these are trained in place
    layer.lora_A[ADAPTER].weight.data = a.clone(memory_format=torch.contiguous_format)
    layer.lora_B[ADAPTER].weight.data = b.clone(memory_format=torch.contiguous_format)


def _plain_weight(name: str, layer: LoraLayer, init: str) -> Tensor:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise UserError(
            f"peft.init={init} needs linear layers, {name} is {type(base).__name__}",
            hint="set peft.init=default",
        )
    if layer.r[ADAPTER] > min(base.weight.shape):
        raise UserError(
            f"peft.init={init} takes rank {layer.r[ADAPTER]} from {name}, which is only "
            f"{' x '.join(map(str, base.weight.shape))}",
            hint=f"set peft.dim={min(base.weight.shape)} or less, or peft.init=default",
        )
    return base.weight.data


def _weight_files(source: str, revision: str | None) -> dict[str, Path]:
    """Return the safetensors file of every weight of a model that has been loaded before."""
    if Path(source).is_dir():
        folder = Path(source)
    else:
        config_file = cached_file(source, "config.json", revision=revision, local_files_only=True)
        folder = Path(config_file).parent
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files
