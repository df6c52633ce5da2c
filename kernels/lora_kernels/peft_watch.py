"""Watch whether a model is still what was fused: modules, parameters, hooks, adapters.

The fused path stands in for the calls of a thousand modules. Whatever is done to one of them later
(another adapter under the same name, a weight loaded in place of the old, a hook that steers a
layer) has to count, so the whole list is gone through at each pass: a millisecond at 32 layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_kernels.peft_obstacles import is_altered


class ModelWatch:
    """The modules that the fused path stands in for, and their parameters, as they were.

    Args:
        decoder: the decoder that is fused.
        adapter: name of the adapter.
        lora_layers: the adapted linears.
    """

    def __init__(self, decoder: Any, adapter: str, lora_layers: list[Any]) -> None:
        self._decoder = decoder
        self._adapter = adapter
        self._lora_layers = lora_layers
        self._num_layers = decoder.config.num_hidden_layers
        self._attentions = [layer.self_attn for layer in decoder.layers]
        # where each module stands, and it
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        # likewise, and where its memory is if that must not change
        self._parameters: list[tuple[dict[str, Any], str, torch.Tensor, int | None]] = []
        others = set()
        for layer in lora_layers:
            for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                others |= {id(module) for name, module in part.items() if name != adapter}
        for root in ("layers", "norm"):
            self._add(decoder._modules, root, others)

    def _add(self, owner: dict[str, Any], name: str, others: set[int]) -> None:
        module = owner[name]
        if module is None or id(module) in others:
            return
        self._modules.append((owner, name, module))
        for key, parameter in module._parameters.items():
            # FSDP2 exchanges shard and whole; what stands there is read whenever it is needed
            if parameter is not None and not isinstance(parameter, DTensor):
                # dense weights of the projections are moved and taken back by the fused decoder;
                # those of adapters may move, as each pass looks where they are
                may_move = parameter.ndim == 2 and not hasattr(parameter, "quant_state")
                pointer = None if may_move else parameter.data_ptr()
                self._parameters.append((module._parameters, key, parameter, pointer))
        for child in module._modules:
            self._add(module._modules, child, others)

    def obstacle(self) -> str | None:
        """Return what has changed since, as a sentence without its end; None if nothing has."""
        if self._decoder.config.num_hidden_layers != self._num_layers:
            return "the number of layers was changed"
        if not all(attention.is_causal for attention in self._attentions):
            return "the attention of a layer is not causal"
        for layer in self._lora_layers:
            if layer.disable_adapters:
                return "adapters are disabled"
            if layer.merged:
                return "adapters are merged"
            if layer.active_adapters != [self._adapter]:
                return f"the active adapters are {layer.active_adapters}, not {self._adapter!r}"
        for owner, name, module in self._modules:
            if owner.get(name) is not module:
                return f"a module {name} was replaced after the model was fused"
            if is_altered(module):
                return f"a module {name} has hooks or another forward"
        for owner, name, parameter, pointer in self._parameters:
            if owner.get(name) is not parameter:
                return f"a parameter {name} was replaced after the model was fused"
            if pointer is not None and parameter.data_ptr() != pointer:
                return "the model was cast or moved after it was fused"
        return None
