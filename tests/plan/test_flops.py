"""Operations counted from config.json, against those that torch counts in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lora_train.config import PeftConfig
from lora_train.flops import forward_flops, step_flops

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_hidden_layers": 2,
}
TOKENS, SUPERVISED = 24, 7
# the counter takes attention as not causal
KEYS = TOKENS * TOKENS


def adapted(kind: str, peft: PeftConfig, **sizes: int) -> Any:
    model_config = AutoConfig.for_model(kind, **SIZES, **sizes)
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=peft.dim, target_modules=peft.target_modules,
        modules_to_save=peft.modules_to_save or None,
    )  # fmt: skip
    return get_peft_model(model, lora)


def run_step(model: Any, *, backward: bool) -> int:
    ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        kept = torch.arange(SUPERVISED)
        logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "peft", "sizes"),
    [
        ("llama", PeftConfig(), {}),
        ("qwen3", PeftConfig(dim=4), {"head_dim": 32}),
        ("llama", PeftConfig(dim=4, target_modules=["down_proj"]), {}),
        ("llama", PeftConfig(dim=4, target_modules=["o_proj", "up_proj"]), {}),
        ("llama", PeftConfig(dim=4, modules_to_save=["lm_head"]), {}),
        ("llama", PeftConfig(dim=4, modules_to_save=["embed_tokens"]), {}),
        ("llama", PeftConfig(dim=4, target_modules=["q_proj", "k_proj", "v_proj", "lm_head"]), {}),
    ],
    ids=["all", "wide heads", "last", "some", "head in full", "embedding in full", "head adapted"],
)
def test_a_step_is_what_torch_counts(kind: str, peft: PeftConfig, sizes: dict[str, int]) -> None:
    counted = run_step(adapted(kind, peft, **sizes), backward=True)
    model = {"model_type": kind, **SIZES, **sizes}
    ours = step_flops(
        model, peft, tokens=TOKENS, supervised_tokens=SUPERVISED, attended_keys=KEYS
    )  # fmt: skip
    assert ours == counted


def test_what_is_recomputed_is_the_decoders_forward() -> None:
    model = adapted("llama", PeftConfig()).unload()
    head = 2 * SUPERVISED * SIZES["vocab_size"] * SIZES["hidden_size"]
    ours = forward_flops({"model_type": "llama", **SIZES}, tokens=TOKENS, attended_keys=KEYS)
    assert ours == run_step(model, backward=False) - head
