"""PEFT's LoRA layers, computed by `lora_linear`: any architecture, layer by layer.

`fuse_linears` gives the layers a subclass that overrides `forward` alone, so that saving, loading,
merging, switching and deleting adapters stay PEFT's; `unfuse_linears` takes it back. Every call
looks at the state of its layer, and leaves to PEFT's own `forward` what `lora_linear` does not
compute. Weights and scaling are read then, too; nothing is kept.

Dropout draws its seed from torch's CPU generator, so `torch.manual_seed`, a restored generator and
activation checkpointing all bring back the same masks. They are others than PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_kernels.dropout import Dropout
from lora_kernels.lora_linear import DTYPES, MAX_RANK, OnDemandWeight, lora_linear
from lora_kernels.peft_obstacles import has_hooks


@dataclass(frozen=True)
class LinearReport:
    """Which adapted layers of a model are computed by `lora_linear`."""

    fused: list[str] = field(default_factory=list)
    """Names of the modules."""
    unfused: dict[str, str] = field(default_factory=dict)
    """Names of the modules that keep PEFT's forward, with the reason."""


class _FusedForward:
    """The forward of a fused layer, in front of PEFT's class."""

    base_type: type[nn.Module]
    keeps_dtype = False
    """Whether the output has the input's dtype under autocast, too."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (
            args
            # adapter_names, offsets of aLoRA, anything for the base layer
            or any(value is not None for value in kwargs.values())
            or self.disable_adapters
            or self.merged
            or state_reason(self) is not None
            or not self._takes(x)
        ):
            # of PEFT's class, which stands behind this one
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        (adapter,) = _adapters(self)
        y = lora_linear(
            x,
            self._frozen_weight(),
            self.base_layer.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            _draw(self.lora_dropout[adapter]),
        )
        return y.to(x.dtype) if self.keeps_dtype else y

    def _takes(self: Any, x: torch.Tensor) -> bool:
        """Whether `lora_linear` computes for this input what PEFT would, in the same dtype."""
        return (
            type(x) in (torch.Tensor, nn.Parameter)
            # without a GPU the kernels are for tests
            and (x.is_cuda or (x.device.type == "cpu" and triton.knobs.runtime.interpret))
            and x.dtype in DTYPES
            and x.shape[-1] == self.in_features
            and (_autocasts(x) or x.dtype == self._base_dtype(x))
        )

    def _base_dtype(self: Any, x: torch.Tensor) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _frozen_weight(self: Any) -> torch.Tensor | OnDemandWeight:
        return self.base_layer.weight


class FusedLinear(_FusedForward, lora.Linear):
    """`peft.tuners.lora.Linear` on a plain `nn.Linear`."""

    base_type = nn.Linear


# PEFT's class -> what takes its place
_FUSED_TYPES: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: FusedLinear}

if is_bnb_4bit_available():
    # PEFT has imported it for its own layers
    import bitsandbytes

    class FusedLinear4bit(_FusedForward, lora.Linear4bit):
        """`peft.tuners.lora.Linear4bit`, whose weight is dequantized forward and backward."""

        base_type = bitsandbytes.nn.Linear4bit
        keeps_dtype = True

        def _takes(self, x: torch.Tensor) -> bool:
            state = getattr(self.base_layer.weight, "quant_state", None)
            return (
                super()._takes(x)
                # sharding takes it away, the base layer's forward puts it back
                and state is not None
                and tuple(state.shape) == (self.out_features, self.in_features)
                # packed for a CPU kernel, which dequantize_4bit does not know
                and not getattr(state, "packing_format_for_cpu", False)
            )

        def _base_dtype(self, x: torch.Tensor) -> torch.dtype:
            # None until the first call, which sets it by its input
            return self.base_layer.compute_dtype or x.dtype

        def _frozen_weight(self) -> OnDemandWeight:
            return _DequantizedWeight(self.base_layer.weight)

    class _DequantizedWeight:
        def __init__(self, weight: Any) -> None:
            self.weight, self.state = weight.data, weight.quant_state
            self.shape: tuple[int, int] = tuple(self.state.shape)

        def write(self, out: torch.Tensor) -> None:
            dequantize = bitsandbytes.functional.dequantize_4bit
            # on a CPU it cannot write into a given tensor
            if out.is_cuda and out.dtype == self.state.dtype and out.is_contiguous():
                dequantize(self.weight, self.state, out=out)
            else:
                out.copy_(dequantize(self.weight, self.state))

    _FUSED_TYPES[lora.Linear4bit] = FusedLinear4bit


def fuse_linears(model: nn.Module) -> LinearReport:
    """Compute the LoRA layers of a model by `lora_linear`, as far as it can.

    May be called again, as after an adapter of another kind was added or made active.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned, or any part of it.

    Returns:
        The layers in their present state. What differs from call to call (adapters disabled or
        merged, CPU tensors, dtypes) is not in it.
    """
    report = LinearReport()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        reason = state_reason(module)
        if reason is not None:
            report.unfused[name] = reason
            continue
        module.__class__ = _FUSED_TYPES.get(type(module), type(module))
        report.fused.append(name)
    return report


def unfuse_linears(model: nn.Module) -> None:
    """Give the layers that `fuse_linears` has changed PEFT's classes back."""
    originals = {fused: original for original, fused in _FUSED_TYPES.items()}
    for module in model.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]


def state_reason(layer: Any) -> str | None:
    """Say what about a layer's present state is not for `lora_linear`.

    Args:
        layer: any of PEFT's layers, fused or not.

    Returns:
        The reason, None if there is none.
    """
    fused_type = _FUSED_TYPES.get(type(layer), type(layer))
    if not issubclass(fused_type, _FusedForward):
        return f"{type(layer).__name__} is no linear layer that can be fused"
    base = layer.base_layer
    if type(base) is not fused_type.base_type:
        return f"base layer {type(base).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    adapters = _adapters(layer)
    if len(adapters) != 1:
        return "several active adapters" if adapters else "no active adapter"
    (adapter,) = adapters
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        return "DoRA" if layer.use_dora.get(adapter) else f"LoRA variant {variant}"
    if layer.lora_bias.get(adapter):
        return "lora_bias"
    return _part_reason(layer, adapter)


def _part_reason(layer: Any, adapter: str) -> str | None:
    """Return what keeps the layer's parts from being read instead of called."""
    base, a, b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    if layer.r[adapter] > MAX_RANK:
        return f"rank {layer.r[adapter]}"
    if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and 0 <= dropout.p < 1)):
        return f"dropout {dropout}"
    if not type(a) is type(b) is nn.Linear:
        return f"adapter of {type(a).__name__} and {type(b).__name__}"
    if base.weight.requires_grad:
        return "trained base weight"
    # a base layer that is no nn.Linear is one whose weight is dequantized
    for part in (base, a, b) if type(base) is nn.Linear else (a, b):
        # quantized or sharded by other libraries
        if type(part.weight) not in (nn.Parameter, torch.Tensor):
            return f"weight of type {type(part.weight).__name__}"
        if part.weight.dtype not in DTYPES:
            return f"weight of {part.weight.dtype}"
    for module in (layer, base, a, b, dropout):
        if "forward" in vars(module):
            return f"replaced forward of {type(module).__name__}"
        # what is not called runs no hooks; the layer itself is
        if module is not layer and has_hooks(module):
            return f"hooks on {type(module).__name__}"
    return None


def _adapters(layer: Any) -> list[str]:
    """Return the active adapters that the layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _autocasts(x: torch.Tensor) -> bool:
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _draw(module: nn.Module) -> Dropout | None:
    """Return the dropout of one call; without one no random number is drawn."""
    if not module.training or not isinstance(module, nn.Dropout) or module.p == 0:
        return None
    # every call of every layer has a seed of its own: one stream does
    return Dropout(module.p, int(torch.randint(2**31, (), device="cpu")), 0)
