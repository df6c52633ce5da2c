"""Compilations of RoPE at the shapes of Llama-3.1-8B, with and without Qwen3's norms."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from ahead_of_time import AotCase, recorded

from lora_kernels import rope
from lora_kernels.rope import HeadNorms, rope_backward, rope_forward

NUM_HEADS, NUM_KV_HEADS = 32, 8
K = 4096
M = 256


def aot_cases(capability: int) -> Iterator[AotCase]:
    for head_columns in (80, 128):
        for with_norms in (False, True):
            yield from recorded(
                capability, functools.partial(_elementwise, head_columns, with_norms)
            )
    # whatever PRODUCT the table names: the other one may be chosen for another GPU
    with mock.patch.object(rope, "_in_kernel", lambda *_: True):
        for head_columns, rank in ((80, 16), (128, 16), (128, 64)):
            for with_norms in (False, True):
                yield from recorded(
                    capability, functools.partial(_product, head_columns, rank, with_norms)
                )


def _elementwise(head_columns: int, with_norms: bool) -> None:
    qkv = _empty(M, (NUM_HEADS + 2 * NUM_KV_HEADS) * head_columns)
    norms, cos, sin = _arguments(head_columns, with_norms)
    out_qk = None
    if with_norms:
        out_qk = _empty(M, (NUM_HEADS + NUM_KV_HEADS) * head_columns)
    rope_forward(
        qkv, cos, sin, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, norms=norms, out_qk=out_qk
    )
    for gradients in (qkv, torch.empty_like(qkv)):
        rope_backward(
            *_modules(gradients, head_columns), qkv, cos, sin, None, slots=((0, 0),) * 3,
            norms=norms, qkv_MN=qkv if with_norms else None,
        )  # fmt: skip


def _product(head_columns: int, rank: int, with_norms: bool) -> None:
    num_columns = (NUM_HEADS + 2 * NUM_KV_HEADS) * head_columns
    rank_columns = triton.cdiv(3 * rank, 64) * 64
    qkv, out = _empty(M, num_columns), _empty(M, num_columns + rank_columns)
    # part of the augmented weights
    sb = _empty(num_columns, K + rank_columns)[:, K:]
    norms, cos, sin = _arguments(head_columns, with_norms)
    for gradients in (out[:, :num_columns], qkv):
        rope_backward(
            *_modules(gradients, head_columns), out, cos, sin, sb,
            slots=((0, rank), (rank, rank), (2 * rank, rank)),
            norms=norms, qkv_MN=qkv if with_norms else None,
        )  # fmt: skip


def _empty(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.bfloat16)


def _arguments(
    head_columns: int, with_norms: bool
) -> tuple[HeadNorms | None, torch.Tensor, torch.Tensor]:
    weight = _empty(1, head_columns)[0]
    angles = torch.empty(M, head_columns // 2)
    return HeadNorms(weight, weight, 1e-6) if with_norms else None, angles, angles


def _modules(qkv: torch.Tensor, head_columns: int) -> tuple[torch.Tensor, ...]:
    widths = [heads * head_columns for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    return qkv.split(widths, 1)
