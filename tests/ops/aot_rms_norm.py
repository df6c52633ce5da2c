"""Compilations of RMSNorm at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels import rms_norm
from lora_kernels.dropout import Dropout

K, N = 4096, 14336
M = 256
DROPOUT = Dropout(0.1, 12345, 6)


def aot_cases(capability: int) -> Iterator[AotCase]:
    # whatever PRODUCT the table names: the other one may be chosen for another GPU
    for in_kernel in (True, False):
        with mock.patch.object(rms_norm, "_in_kernel", lambda *_, choice=in_kernel: choice):
            for rank_columns in (64, 128):
                yield from recorded(capability, functools.partial(_with_adapter, rank_columns))
    # one of each entry in the tables, of whose kernels a program holds whole rows
    for width in (512, 2048, K, 8192, 16384):
        yield from recorded(capability, functools.partial(_without_adapter, width))


def _empty(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.bfloat16)


def _without_adapter(width: int) -> None:
    x, residual, weight = _empty(M, width), _empty(M, width), _empty(1, width)[0]
    rstd = torch.empty(M)
    for delta in (None, x):
        out = None if delta is None else residual
        rms_norm.add_rms_norm_forward(residual, delta, weight, 1e-5, x, None, out, rstd)
        rms_norm.rms_norm_backward(x, residual, rstd, weight, out, x, None)


def _with_adapter(rank_columns: int) -> None:
    residual, weight, rstd = _empty(M, K), _empty(1, K)[0], torch.empty(M)
    x_aug, dx = _empty(M, K + rank_columns), _empty(M, K)
    # parts of the augmented weights of gate and up, and of down
    a = _empty(rank_columns, K + rank_columns)[:, :K]
    sb = _empty(K, N + rank_columns)[:, N:]
    for dropout in (None, DROPOUT):
        for delta in (None, dx):
            rms_norm.add_rms_norm_forward(
                residual, delta, weight, 1e-5, x_aug, a, None if delta is None else residual,
                rstd, dropout=dropout,
            )  # fmt: skip
        adapter = None if dropout is None else (x_aug[:, K:], a, dropout)
        for x_out in (None, dx):
            # below the first linear with an adapter there is none to multiply by
            for below in (sb, None):
                out = x_aug if below is not None else x_aug[:, :K]
                rms_norm.rms_norm_backward(
                    dx, residual, rstd, weight, x_aug, out, below, adapter=adapter, x_out=x_out
                )
