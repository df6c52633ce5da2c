"""Tiny random models, saved as folders, made once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lora_train.config import Config, DataConfig, ModelConfig, PeftConfig

VOCAB_SIZE = 128

_ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    # layer 0 attends to all, layer 1 through a window
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": 4}),
}


@pytest.fixture(autouse=True)
def _one_thread():
    # other processes share the cores, and these tensors are tiny
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Any]:
    def make(architecture: str) -> Any:
        config_class, options = _ARCHITECTURES[architecture]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config_class(
                vocab_size=VOCAB_SIZE,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **options,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # at the default 0.02 every score is near zero and every mask looks right
                if parameter.ndim == 2:
                    parameter.mul_(4)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a ChatML-like template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)]
    tokens = ["<|endoftext|>", "<s>", "<|im_end|>", "<|im_start|>", *characters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|im_start|>"]})
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("models") / architecture
            make_model(architecture).save_pretrained(made[architecture])
            tokenizer.save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.fixture
def make_config(model_folder: Callable[[str], Path]) -> Callable[..., Config]:
    def make(
        architecture: str = "llama", *, quantization: str | None = None, **peft: Any
    ) -> Config:
        return Config(
            model=ModelConfig(path=str(model_folder(architecture)), quantization=quantization),
            data=DataConfig(path="examples.jsonl"),
            peft=PeftConfig(**{"dim": 4, "alpha": 8.0, **peft}),
        )

    return make
