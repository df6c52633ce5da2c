"""Parameters of a model and of an adapter on it, counted from config.json alone. Imports no torch.

Exact for decoders built like Llama; other models are not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_train.config import Config, PeftConfig

# built of q, k, v, o, gate, up and down projections and RMSNorm, and nothing else
DECODERS = ("llama", "mistral", "qwen2", "qwen3")

NEMO_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj", "gate_up_proj"),
    "linear_fc2": ("down_proj",),
}
"""NeMo's names of the linear layers -> those of them that a model may have."""
# 8B, 0.5B, 135m as a part of a name; not the 4b of 4bit, nor the 6b of 1_6b
_SIZE_IN_NAME = re.compile(
    r"(?<![A-Za-z0-9.])(?<!\d_)(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE
)


def checkpoint_bytes(trainable: int, config: Config) -> int:
    """Compute what the checkpoints and the adapter of a run take on the disk at most.

    Args:
        trainable: number of trained parameters.
        config: the run.

    Returns:
        Bytes: of each checkpoint fp32 weights and Adam's two moments, one checkpoint more than kept
        while it is written, and the adapter.
    """
    every, steps = config.log.ckpt.every_n_train_steps, config.trainer.max_steps
    kept = config.log.ckpt.keep_last + 1
    if steps is not None:  # a short run writes fewer
        kept = min(kept, 1 + (steps // every if every else 0))
    return kept * trainable * 3 * 4 + trainable * 4


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    """Return the linear layers of one decoder layer, name -> (inputs, outputs).

    Args:
        config: the content of config.json.

    Returns:
        Names such as `self_attn.q_proj`; None for a model of another kind, or one whose sizes
        cannot be read.
    """
    if config.get("model_type") not in DECODERS:
        return None
    try:
        hidden, inner, heads, layers = (
            int(config[name])
            for name in (
                "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
            )
        )  # fmt: skip
        head = int(config.get("head_dim") or (128 if _is_qwen3(config) else hidden // heads))
        queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return None
    if min(hidden, inner, heads, layers, head, keys) < 1:
        return None
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def attention_width(config: Mapping[str, Any]) -> int:
    """Return heads times their width: what q_proj puts out.

    Args:
        config: the content of config.json, of a model that `linear_shapes` knows.

    Returns:
        Columns.
    """
    shapes = linear_shapes(config)
    assert shapes is not None
    return shapes["self_attn.q_proj"][1]


def count_parameters(config: Mapping[str, Any]) -> int | None:
    """Count the parameters of the base model.

    Args:
        config: the content of config.json.

    Returns:
        All of them, a tied output layer once; None for a model of another kind.
    """
    shapes, vocabulary = linear_shapes(config), _vocabulary(config)
    if shapes is None or vocabulary == 0:
        return None
    hidden = int(config["hidden_size"])
    layer = sum(inputs * outputs for inputs, outputs in shapes.values()) + 2 * hidden
    qkv = [shapes[f"self_attn.{name}_proj"][1] for name in "qkv"]
    if config["model_type"] == "qwen2":
        layer += sum(qkv)
    elif config.get("attention_bias") and config["model_type"] != "mistral":
        layer += sum(qkv) + hidden
    if config["model_type"] == "llama" and config.get("mlp_bias"):
        layer += 2 * int(config["intermediate_size"]) + hidden
    if _is_qwen3(config):  # norms of queries and keys
        layer += 2 * int(config.get("head_dim") or 128)
    matrices = 1 if config.get("tie_word_embeddings") else 2
    num_layers = int(config["num_hidden_layers"])
    return matrices * vocabulary * hidden + num_layers * layer + hidden


def linear_ranks(config: Mapping[str, Any], peft: PeftConfig) -> list[dict[str, int]] | None:
    """Return the rank of each linear layer's adapter.

    Args:
        config: the content of config.json.
        peft: the adapter.

    Returns:
        For each decoder layer the names of `linear_shapes` with their ranks, 0 without an adapter;
        None for a model of another kind, or targets that it does not have.
    """
    shapes = linear_shapes(config)
    if shapes is None:
        return None
    targets: list[str] | None = None
    if peft.target_modules != "all-linear":
        known = [*shapes, "lm_head"]
        targets = []
        for module in peft.target_modules:
            candidates = NEMO_NAMES.get(module, (module,))
            found = [each for each in candidates if any(_ends_with(name, each) for name in known)]
            if not found:
                return None
            targets += found
    return [
        {
            name: _rank(f"model.layers.{layer}.{name}", peft)
            if targets is None or any(_ends_with(name, target) for target in targets)
            else 0
            for name in shapes
        }
        for layer in range(int(config["num_hidden_layers"]))
    ]


def count_trainable(config: Mapping[str, Any], peft: PeftConfig) -> int | None:
    """Count the parameters that are trained.

    Args:
        config: the content of config.json.
        peft: the adapter.

    Returns:
        The adapter's and those trained in full; None where they cannot be told.
    """
    shapes = linear_shapes(config)
    if shapes is None:
        return None
    ranks = linear_ranks(config, peft)
    if ranks is None:
        return None
    total = 0
    for layer in ranks:
        for name, rank in layer.items():
            inputs, outputs = shapes[name]
            total += rank * (inputs + outputs) + (outputs if peft.use_dora and rank else 0)
    hidden, vocabulary = int(config["hidden_size"]), _vocabulary(config)
    if vocabulary == 0:
        return None
    if peft.target_modules != "all-linear" and any(
        _ends_with("lm_head", target) for target in peft.target_modules
    ):
        total += _rank("lm_head", peft) * (hidden + vocabulary)
        total += vocabulary if peft.use_dora else 0
    for name in peft.modules_to_save:
        if name not in ("lm_head", "embed_tokens"):
            return None
        total += hidden * vocabulary
    return total


def parameters_by_name(name: str) -> int | None:
    """Read the size that a model carries in its name, such as Llama-3.1-8B.

    Args:
        name: hub name or path.

    Returns:
        Parameters, rounded as the name is; None when it says nothing, or two things.
    """
    sizes = set(_SIZE_IN_NAME.findall(name.rpartition("/")[2].lower()))
    if len(sizes) != 1:
        return None
    number, unit = sizes.pop()
    return round(float(number) * (10**9 if unit == "b" else 10**6))


def _vocabulary(config: Mapping[str, Any]) -> int:
    """Tokens of the embedding; 0: it cannot be read."""
    try:
        return max(0, int(config["vocab_size"]))
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return 0


def _is_qwen3(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen3"


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _rank(name: str, peft: PeftConfig) -> int:
    for pattern, rank in peft.rank_pattern.items():
        for each in NEMO_NAMES.get(pattern, (pattern,)):
            # as PEFT matches it
            if re.match(rf"(.*\.)?({each})$", name):
                return rank
    return peft.dim
