"""Floating-point operations of a LoRA step, counted from config.json. Imports no torch.

A frozen linear layer costs its forward product and the gradient of its input, 4 operations per
weight and token; 6 N, which counts the gradient of the weight too, would show a LoRA run at 1.5
times its true use of the GPU. The adapter's A and B cost all three products. An operation is one
addition or one multiplication, as in the GPUs' data sheets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_train.config import PeftConfig
from lora_train.model_size import attention_width, count_trainable, linear_ranks, linear_shapes

# of a decoder layer, in the order of its forward pass; attention comes after the first
_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def step_flops(
    model: Mapping[str, Any],
    peft: PeftConfig,
    *,
    tokens: int,
    supervised_tokens: int,
    attended_keys: int,
) -> float | None:
    """Count what a step must compute, recomputed activations not counted.

    Args:
        model: the content of config.json.
        peft: the adapter.
        tokens: of the step, those that are not supervised included.
        supervised_tokens: those of them that go through the output layer.
        attended_keys: over all tokens, the keys that each attends to; a sequence of n tokens has
            n (n + 1) / 2 with causal attention.

    Returns:
        Operations, those of DoRA's magnitudes not counted; None for a model whose layers are not
        known.
    """
    shapes, ranks = linear_shapes(model), linear_ranks(model, peft)
    trainable = count_trainable(model, dataclasses.replace(peft, use_dora=False))
    if shapes is None or ranks is None or trainable is None:
        return None
    head = int(model["vocab_size"]) * int(model["hidden_size"])
    head_products = 2 if "lm_head" in peft.modules_to_save else 0  # those of its own gradient
    adapter = sum(rank * sum(shapes[name]) for layer in ranks for name, rank in layer.items())
    head_adapter = trainable - adapter - head * len(peft.modules_to_save)
    frozen = len(ranks) * sum(inputs * outputs for inputs, outputs in shapes.values())
    # scores and their product with the values, 4 a key; twice that in the backward pass
    width = attention_width(model)
    attention = 12 * len(ranks) * width
    per_token = 4 * frozen + 6 * adapter
    if "embed_tokens" not in peft.modules_to_save:
        # nobody needs gradients of what stands before the first adapter, nor of its own input
        for group in _GROUPS:
            for name in group:
                inputs, outputs = shapes[name]
                per_token -= 2 * inputs * (outputs + ranks[0][name])
            if any(ranks[0][name] for name in group):
                break
            if group == _GROUPS[0]:
                attention -= 8 * width
    return (
        float(per_token) * tokens
        + float((4 + head_products) * head + 6 * head_adapter) * supervised_tokens
        + float(attention) * attended_keys
    )


def forward_flops(model: Mapping[str, Any], *, tokens: int, attended_keys: int) -> float | None:
    """Count what the decoder's forward pass computes, which checkpointing does once more.

    Args:
        model: the content of config.json.
        tokens: of the step.
        attended_keys: see `step_flops`.

    Returns:
        Operations, the adapter's not counted; None for a model whose layers are not known.
    """
    shapes = linear_shapes(model)
    if shapes is None:
        return None
    layers = int(model["num_hidden_layers"])
    frozen = layers * sum(inputs * outputs for inputs, outputs in shapes.values())
    return 2.0 * frozen * tokens + 4.0 * layers * attention_width(model) * attended_keys
