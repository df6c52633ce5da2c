"""What keeps a PEFT model from the whole-decoder path, told before anything of it is changed."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_kernels.families import GROUPS, Family, family_of
from lora_kernels.sharded import is_sharded, sharding_hook

# whatever attends causally over all earlier tokens gives what the kernels do
ATTENTIONS = {
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", "lora_varlen",
}  # fmt: skip
_HEAD_DIMS = range(16, 257, 2)
_LORA_CLASSES = {"Linear", "Linear4bit"}


def decoder_obstacle(model: PeftModel) -> str | None:
    """Return why a model cannot take the whole-decoder path; None if it can.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned.

    Returns:
        The reason, as a sentence without its end.
    """
    decoder = decoder_of(model)
    family = family_of(decoder)
    if family is None:
        return f"{type(decoder).__name__} is not of the Llama family"
    return (
        _device_obstacle(decoder.norm.weight)
        or _adapter_obstacle(model, decoder)
        or _architecture_obstacle(decoder, family)
        or _weights_obstacle(decoder)
    )


def attention_obstacle(decoder: Any) -> str | None:
    """Return what a decoder's configuration asks for that the kernels do not attend like."""
    config = decoder.config
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if config._attn_implementation not in ATTENTIONS:
        return f"its attention is {config._attn_implementation}"
    return None


def decoder_of(model: PeftModel) -> Any:
    """Return what holds embedding, layers and final norm (`LlamaModel`)."""
    base = model.get_base_model()
    return getattr(base, base.base_model_prefix, base)


def linear_of(module: nn.Module) -> Any:
    """Return the frozen linear layer of a module that may have an adapter."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def is_nf4(base: nn.Module) -> bool:
    """Whether a linear layer's weight is held by bitsandbytes in nf4."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs at a module's call beside its forward; FSDP2's gathering aside."""
    return any(
        not sharding_hook(module, hook)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def is_altered(module: nn.Module) -> bool:
    """Whether a module's call is more or other than its class's forward."""
    return has_hooks(module) or "forward" in vars(module)


def _device_obstacle(weight: torch.Tensor) -> str | None:
    # in Triton's interpreter the kernels run on a CPU, and in any dtype
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}, and the kernels need a GPU"
    if weight.element_size() != 2:
        return f"its weights are {weight.dtype}, and the kernels are made for bf16 and fp16"
    return None


def _architecture_obstacle(decoder: Any, family: Family) -> str | None:
    if "forward" in vars(decoder):
        return "another library has replaced the decoder's forward"
    if decoder.config.hidden_act != "silu":
        return f"its MLP computes {decoder.config.hidden_act}, not silu"
    if getattr(decoder.config, "attention_dropout", 0.0):
        return "attention weights are dropped"
    obstacle = attention_obstacle(decoder)
    if obstacle is not None:
        return obstacle
    for number, layer in enumerate(decoder.layers):
        parts = {
            "DecoderLayer": layer, "Attention": layer.self_attn, "MLP": layer.mlp,
            "RMSNorm": layer.input_layernorm,
        }  # fmt: skip
        for name, part in parts.items():
            if not family.is_own(part, name):
                return f"layer {number} has a {type(part).__name__} of {type(part).__module__}"
        if not layer.self_attn.is_causal:
            return f"the attention of layer {number} is not causal"
        if layer.self_attn.head_dim not in _HEAD_DIMS:
            return f"its heads are {layer.self_attn.head_dim} wide"
    for name, module in (*decoder.layers.named_modules(prefix="layers"), ("norm", decoder.norm)):
        if is_altered(module):
            return f"{name} has hooks or another forward, which would not be called"
    return None


def _adapter_obstacle(model: PeftModel, decoder: Any) -> str | None:
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    [adapter] = model.active_adapters
    projections = {path for paths in GROUPS.values() for path in paths}
    found = False
    for name, module in decoder.layers.named_modules():
        if type(module).__name__ == "ModulesToSaveWrapper":
            return f"layers.{name} is trained in full"
        if not isinstance(module, LoraLayer):
            continue
        is_known = type(module).__name__ in _LORA_CLASSES
        if not is_known or type(module).__module__.split(".")[:3] != ["peft", "tuners", "lora"]:
            return f"the adapter of layers.{name} is a {type(module).__name__}"
        # NUMBER.self_attn.q_proj
        if name.partition(".")[2] not in projections:
            return f"layers.{name} has an adapter"
        if adapter not in module.lora_A:
            continue
        found = True
        if adapter in module.lora_variant:
            return f"layers.{name} is a {type(module.lora_variant[adapter]).__name__}"
        if module.lora_bias[adapter]:
            return f"lora_B of layers.{name} has a bias"
        if module.merged:
            return f"the adapter of layers.{name} is merged"
        if isinstance(module, Linear) and module.fan_in_fan_out:
            return f"layers.{name} is transposed"
    return None if found else "no layer has an adapter"


def _weights_obstacle(decoder: Any) -> str | None:
    dtype, device = decoder.norm.weight.dtype, decoder.norm.weight.device
    seen: set[int] = set()
    are_sharded = isinstance(decoder.layers[0], FSDPModule)
    for number, layer in enumerate(decoder.layers):
        if isinstance(layer, FSDPModule) != are_sharded:
            return f"layer {number} and layer 0 are not both sharded"
        for paths in GROUPS.values():
            bases = [linear_of(layer.get_submodule(path)) for path in paths]
            if len({is_nf4(base) for base in bases}) > 1:
                return f"{' and '.join(paths)} are not all nf4"
            if any(is_sharded(base) != are_sharded for base in bases):
                return f"{' and '.join(paths)} are not sharded as their layer is, by rows"
            for path, base in zip(paths, bases, strict=True):
                if id(base.weight) in seen:
                    return f"several layers share the weight of {path}"
                seen.add(id(base.weight))
                if not is_nf4(base) and type(base) is not nn.Linear:
                    return f"{path} is a {type(base).__name__}"
                if not is_nf4(base) and base.weight.dtype != dtype:
                    return f"{path} is {base.weight.dtype}, the norms are {dtype}"
    for name, parameter in decoder.layers.named_parameters():
        if isinstance(parameter, DTensor) and parameter.ndim < 2:
            return f"layers.{name} is sharded"
        if parameter.device != device:
            return f"layers.{name} is on {parameter.device}, the last norm on {device}"
        if parameter.requires_grad and "lora_" not in name:
            return f"layers.{name} is trained"
    return None
