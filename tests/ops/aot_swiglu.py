"""Compilations of SwiGLU at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels.dropout import Dropout
from lora_kernels.swiglu import swiglu_backward, swiglu_forward

K, N = 4096, 14336
# a multiple of every BLOCK_M
M = 256
# the second is the widest with products in the kernels
RANK_COLUMNS = {16: 64, 64: 128, 128: 256}
DROPOUT = Dropout(0.1, 12345, 6)


def aot_cases(capability: int) -> Iterator[AotCase]:
    yield from recorded(capability, functools.partial(_without_adapter, M))
    for rank in RANK_COLUMNS:
        yield from recorded(capability, functools.partial(_with_adapter, M, rank))
    # where masks are needed
    yield from recorded(capability, functools.partial(_with_adapter, M - 1, 16))


def _empty(num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.bfloat16)


def _without_adapter(num_rows: int) -> None:
    gate_up, act = _empty(num_rows, 2 * N), _empty(num_rows, N)
    swiglu_forward(gate_up, act, None, rank=0)
    swiglu_backward(
        gate_up, act, torch.empty_like(gate_up), None,
        gate_slot=(0, 0), up_slot=(0, 0), act_out=None,
    )  # fmt: skip


def _with_adapter(num_rows: int, rank: int) -> None:
    rank_columns = RANK_COLUMNS[rank]
    gate_up, out = _empty(num_rows, 2 * N), _empty(num_rows, 2 * N + rank_columns)
    act, dact = _empty(num_rows, N + rank_columns), _empty(num_rows, N)
    # parts of the augmented weights of down, and of gate and up
    a = _empty(rank_columns, N + rank_columns)[:, :N]
    sb = _empty(2 * N, K + rank_columns)[:, K:]
    for dropout in (None, DROPOUT):
        swiglu_forward(gate_up, act, a, rank=rank, dropout=dropout)
        adapter = None if dropout is None else (act[:, N : N + rank], a[:rank], dropout)
        for act_out in (None, dact):
            swiglu_backward(
                gate_up, dact, out, sb, gate_slot=(0, rank), up_slot=(rank, rank),
                act_out=act_out, adapter=adapter,
            )  # fmt: skip
