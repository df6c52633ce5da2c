"""Counts from config.json alone, against transformers and PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lora_train import adapter, model_size
from lora_train.config import PeftConfig
from lora_train.model_size import count_parameters, count_trainable, parameters_by_name

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_CONFIGS = {
    "llama": LlamaConfig(**_SHAPE),
    "llama, tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_SHAPE, head_dim=24),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=32),
    "qwen3, biases": Qwen3Config(**_SHAPE, head_dim=32, attention_bias=True),
}


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config", _CONFIGS.values(), ids=_CONFIGS.keys())
def test_all_parameters(config):
    assert count_parameters(config.to_dict()) == model_of(config).num_parameters()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize(
    "peft",
    [
        PeftConfig(),
        PeftConfig(dim=4, target_modules=["q_proj", "down_proj"], use_dora=True),
        PeftConfig(target_modules="all-linear"),
        PeftConfig(dim=4, rank_pattern={"v_proj": 8, r"layers\.1\..*o_proj": 2}),
        PeftConfig(target_modules=["k_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["default", "two, DoRA", "all-linear", "pattern", "in full"],
)
def test_trained_parameters(name, peft):
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.dim,
        target_modules=peft.target_modules,
        rank_pattern=peft.rank_pattern,
        modules_to_save=peft.modules_to_save or None,
        use_dora=peft.use_dora,
    )
    with torch.device("meta"):
        model = get_peft_model(model_of(_CONFIGS[name]), lora)
    expected = model.get_nb_trainable_parameters()[0]
    assert count_trainable(_CONFIGS[name].to_dict(), peft) == expected


def test_nemo_names_are_the_adapters():
    assert adapter.NEMO_NAMES is model_size.NEMO_NAMES
    nemo = PeftConfig(target_modules=list(model_size.NEMO_NAMES))
    config = _CONFIGS["llama"].to_dict()
    assert count_trainable(config, nemo) == count_trainable(config, PeftConfig())


def test_what_cannot_be_told():
    assert count_parameters({"model_type": "gpt2", "n_embd": 8}) is None
    assert count_trainable({"model_type": "gpt2"}, PeftConfig()) is None
    llama = _CONFIGS["llama"].to_dict()
    assert count_trainable(llama, PeftConfig(target_modules=["c_attn"])) is None
    assert count_trainable(llama, PeftConfig(modules_to_save=["score"])) is None


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-3.1-8B", 8_000_000_000),
        ("Qwen/Qwen2.5-0.5B-Instruct", 500_000_000),
        ("embedded:smollm2-135m-instruct", 135_000_000),
        ("/models/llama-70b/", None),
        ("models/mixtral-8x7B", None),
        ("org/model-4bit", None),
        ("stabilityai/stablelm-2-1_6b", None),
        ("org/llama_8b", 8_000_000_000),
        ("org/distil-7B-to-1B", None),
        ("gpt2", None),
    ],
)
def test_size_in_a_name(name, size):
    assert parameters_by_name(name) == size
