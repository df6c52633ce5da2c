"""How the decoders of transformers' Llama family differ, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_kernels.rope import HeadNorms


def _no_window(attention: Any) -> int | None:
    return None


@dataclass(frozen=True)
class Family:
    """What a decoder has beyond Llama's: names of modules are the same in all."""

    has_head_norms: bool = False
    """RMSNorm of each query and key head, `q_norm` and `k_norm`."""
    window: Callable[[Any], int | None] = _no_window
    """Sliding window of an attention layer, in tokens; None: it sees all earlier ones."""

    def head_norms(self, attention: Any) -> HeadNorms | None:
        """Return the head norms of an attention layer."""
        if not self.has_head_norms:
            return None
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return HeadNorms(q_norm.weight.data, k_norm.weight.data, q_norm.variance_epsilon)


FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family(window=lambda attention: attention.config.sliding_window),
    "Qwen2Model": Family(window=lambda attention: attention.sliding_window),
    "Qwen3Model": Family(has_head_norms=True, window=lambda attention: attention.sliding_window),
}
"""Families by the class that holds embedding, layers and final norm."""
