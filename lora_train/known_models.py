"""Sizes of the models that recipes name: known before anything is downloaded. Imports no torch."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "embedded:smollm2-135m-instruct": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "num_hidden_layers": 30,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "num_hidden_layers": 16,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5,
    },
    "meta-llama/Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "num_hidden_layers": 80,
        "rms_norm_eps": 1e-5,
    },
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        "num_hidden_layers": 36,
        "rms_norm_eps": 1e-6, "head_dim": 128, "max_position_embeddings": 40960,
    },
}  # fmt: skip
"""What of their config.json decides about sizes and kernels, by `model.path`."""
