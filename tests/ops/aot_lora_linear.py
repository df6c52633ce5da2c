"""Compilations of single LoRA linears at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels import lora_linear
from lora_kernels.dropout import Dropout

# K, N: q and o, gate and up
SHAPES = [(4096, 4096), (4096, 14336)]
# one block of the rank, one that is not full, several
RANKS = [16, 40, 256]
M = 256
DROPOUT = Dropout(0.1, 12345, 6)


def aot_cases(capability: int) -> Iterator[AotCase]:
    # whatever the table names: the other one may be chosen for another GPU
    for implementation in ("addmm", "triton"):
        with mock.patch.object(
            lora_linear, "_implementation", lambda *_, name=implementation: name
        ):
            for k, n in SHAPES:
                for rank in RANKS if (k, n) == SHAPES[0] else RANKS[:1]:
                    yield from recorded(capability, functools.partial(_products, k, n, rank))


def _products(k: int, n: int, rank: int) -> None:
    x, dy = _empty(M, k), _empty(M, n)
    h, g = _empty(M, rank), _empty(M, rank)
    weight, a, sb = _empty(n, k), _empty(rank, k), _empty(n, rank)
    with mock.patch.object(torch, "mm", lambda left, right: _empty(left.shape[0], right.shape[1])):
        for width in (k, 512):
            lora_linear._dropped(x[:, :width], DROPOUT)
        if lora_linear._implementation() == "triton":
            for bias in (None, _empty(1, n)[0]):
                lora_linear.triton_product(x, weight.T, h, sb.T, bias=bias)
        for dropout in (None, DROPOUT):
            lora_linear._dx(dy, weight, g, a, dropout)


def _empty(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
