"""Decoders of transformers' Llama family: which these are, and how they differ, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_kernels.rope import HeadNorms
from lora_kernels.sharded import class_before_sharding

# what may be under FSDP2
_SHARDED_PARTS = ("Model", "DecoderLayer")


def _no_window(attention: Any) -> int | None:
    return None


@dataclass(frozen=True)
class Family:
    """What a decoder has beyond Llama's: names of modules are the same in all."""

    prefix: str
    """Of the names of its classes."""
    has_head_norms: bool = False
    """RMSNorm of each query and key head, `q_norm` and `k_norm`."""
    window: Callable[[Any], int | None] = _no_window
    """Sliding window of an attention layer, in tokens; None: it sees all earlier ones."""

    @property
    def module(self) -> str:
        """Name of the module in transformers that its classes come from."""
        name = self.prefix.lower()
        return f"transformers.models.{name}.modeling_{name}"

    def is_own(self, part: Any, name: str) -> bool:
        """Whether a part of a model is of the family's class of that name, and of no other."""
        # the parts inside of a layer are gathered with it, or not at all
        found = class_before_sharding(part) if name in _SHARDED_PARTS else type(part)
        return (found.__module__, found.__name__) == (self.module, self.prefix + name)

    def head_norms(self, attention: Any) -> HeadNorms | None:
        """Return the head norms of an attention layer."""
        if not self.has_head_norms:
            return None
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return HeadNorms(q_norm.weight.data, k_norm.weight.data, q_norm.variance_epsilon)


FAMILIES = (
    Family("Llama"),
    Family("Mistral", window=lambda attention: attention.config.sliding_window),
    Family("Qwen2", window=lambda attention: attention.sliding_window),
    Family("Qwen3", has_head_norms=True, window=lambda attention: attention.sliding_window),
)
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The linear layers of a decoder layer that share an input, by the name of their group."""


def family_of(decoder: Any) -> Family | None:
    """Return the family of what holds embedding, layers and final norm; None of another."""
    return next((family for family in FAMILIES if family.is_own(decoder, "Model")), None)
