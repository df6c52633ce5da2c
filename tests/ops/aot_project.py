"""Compilations of o_proj's helpers at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels import project
from lora_kernels.dropout import Dropout

K = 4096
M = 256
DROPOUT = Dropout(0.1, 12345, 6)


def aot_cases(capability: int) -> Iterator[AotCase]:
    for rank in (16, 32, 64, 256):
        yield from recorded(capability, functools.partial(_add_masked_product, rank))
    # whatever PRODUCT the table names: the other one may be chosen for another GPU
    for in_kernel in (True, False):
        with mock.patch.object(project, "_in_kernel", lambda *_, choice=in_kernel: choice):
            for rank_columns in (64, 128):
                yield from recorded(capability, functools.partial(_project, rank_columns))


def _empty(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.bfloat16)


def _project(rank_columns: int) -> None:
    x, out = _empty(M, K), _empty(M, K + rank_columns)
    # part of the augmented weights
    a = _empty(rank_columns, K + rank_columns)[:, :K]
    for dropout in (None, DROPOUT):
        project.project(out[:, :K], a, out, dropout=dropout)
        project.project(x, a, out, dropout=dropout)
    project.dropped(out[:, :K], DROPOUT, x)


def _add_masked_product(rank: int) -> None:
    g = _empty(M, K + rank)[:, K:]
    a = _empty(rank, K + rank)[:, :K]
    project.add_masked_product(_empty(M, K), g, a, DROPOUT)
