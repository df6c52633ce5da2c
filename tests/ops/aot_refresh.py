"""Compilations of the refresh of working copies at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels.refresh import Copy, WorkingCopies

K, N, P = 4096, 14336, 64


def aot_cases(capability: int) -> Iterator[AotCase]:
    # ranks that units of 16, 8 and 1 elements divide
    for rank in (16, 8, 1):
        for source in (torch.float32, torch.bfloat16):
            yield from recorded(capability, functools.partial(_refresh, rank, source))


def _refresh(rank: int, source: torch.dtype) -> None:
    buffer = torch.empty(N + P, K + P, dtype=torch.bfloat16)
    WorkingCopies(
        [
            Copy(torch.empty(rank, K, dtype=source), buffer[N : N + rank, :K]),
            Copy(torch.empty(N, rank, dtype=source), buffer[:N, K : K + rank], 2.0),
        ]
    ).refresh()
