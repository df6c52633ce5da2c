"""Compilations of the loss at the vocabulary of Llama-3.1, and at an odd one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels.cross_entropy import linear_cross_entropy

# features are the business of cuBLAS
T, K = 2, 16


def aot_cases(capability: int) -> Iterator[AotCase]:
    for vocabulary in (128256, 50257):
        for dtype in (torch.bfloat16, torch.float16):
            for requires_grad in (True, False):
                yield from recorded(
                    capability, functools.partial(_loss, vocabulary, dtype, requires_grad)
                )


def _loss(vocabulary: int, dtype: torch.dtype, requires_grad: bool) -> None:
    hidden = torch.zeros(T, K, dtype=dtype, requires_grad=requires_grad)
    weight = torch.zeros(vocabulary, K, dtype=dtype)
    targets = torch.zeros(T, dtype=torch.int64)
    for bias in (None, torch.zeros(vocabulary, dtype=dtype)):
        linear_cross_entropy(hidden, weight, targets, bias)
