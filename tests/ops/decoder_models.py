"""Tiny models of the Llama family under PEFT, with adapters that are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 96
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    # biases; layer 1 attends through a window
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
}
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def make_model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    num_layers: int = 2,
    hidden_size: int = 48,
    intermediate_size: int = 80,
    **lora: Any,
) -> PeftModel:
    """Make a model and its adapter, always the same; every lora_B is random.

    `llama-8b` has the sizes of Llama-3.1-8B's layers.
    """
    torch.manual_seed(0)
    if family == "llama-8b":
        config_class, sizes = LlamaConfig, LLAMA_8B
    else:
        config_class, options = FAMILIES[family]
        sizes = {
            "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        } | options  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=num_layers,
            max_position_embeddings=64,
            use_cache=False,
            **sizes,
        ),
        attn_implementation="sdpa",
    )
    model = model.to(dtype=dtype, device=device)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEARS} | lora
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.ndim == 2:
                # at the default 0.02 every score of a small model is near zero, and every mask
                # looks right
                parameter.normal_(0, 0.02 if family == "llama-8b" else 0.15)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
            if parameter.requires_grad:
                parameter.data = parameter.data.to(
                    torch.float64 if dtype == torch.float64 else torch.float32
                )
    return peft_model.train()


def make_row(lengths: Sequence[int] = (7, 1, 11), device: str = "cpu") -> dict[str, Any]:
    """Make a packed row of random tokens, as arguments of `model(...)`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": tokens.to(device),
        "position_ids": positions.to(device),
        "cu_seq_lens_q": borders.to(device),
        "cu_seq_lens_k": borders.to(device),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def adapter_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the gradients of all adapters, by name."""
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    assert found
    return found
