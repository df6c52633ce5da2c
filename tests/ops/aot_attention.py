"""Compilations of attention at the shapes of Llama-3.1-8B, and with other heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels.attention import attention_backward, attention_forward

M = 256
PADDED_RANK = 64


def aot_cases(capability: int) -> Iterator[AotCase]:
    for head_dim, num_heads, num_key_heads in (
        (128, 32, 8), (128, 28, 4), (128, 32, 32), (64, 32, 8), (80, 32, 8), (96, 32, 8),
        (256, 16, 8),
    ):  # fmt: skip
        for window in (None, 128):
            yield from recorded(
                capability, functools.partial(_launch, head_dim, num_heads, num_key_heads, window)
            )
    # the other way to list the blocks
    yield from recorded(capability, functools.partial(_launch, 128, 32, 8, None, 200))


def _launch(
    head_dim: int, num_heads: int, num_key_heads: int, window: int | None, num_sequences: int = 4
) -> None:
    qkv = _rows((num_heads + 2 * num_key_heads) * head_dim)
    q, k, v = _heads(qkv, head_dim, num_heads, num_key_heads)
    (out,) = _heads(_rows(num_heads * head_dim + PADDED_RANK), head_dim, num_heads)
    d_out = torch.empty_like(out)
    d_qkv = _rows(qkv.shape[1] + PADDED_RANK)
    cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int32)
    options = {"scale": head_dim**-0.5, "window": window}
    lse = attention_forward(q, k, v, cu_seqlens, M, out, **options)
    attention_backward(
        d_out, q, k, v, out, lse, cu_seqlens, M,
        *_heads(d_qkv, head_dim, num_heads, num_key_heads), **options,
    )  # fmt: skip


def _rows(width: int) -> torch.Tensor:
    return torch.empty(M, width, dtype=torch.bfloat16)


def _heads(
    rows: torch.Tensor, head_dim: int, num_heads: int, num_key_heads: int | None = None
) -> list[torch.Tensor]:
    """Views of the first columns: queries, then keys and values where there are any."""
    counts = [num_heads] if num_key_heads is None else [num_heads, num_key_heads, num_key_heads]
    parts = rows[:, : sum(counts) * head_dim].unflatten(1, (-1, head_dim))
    return list(parts.split(counts, 1))
