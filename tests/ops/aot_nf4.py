"""Compilations of the dequantization at the shapes of Llama-3.1-8B."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from ahead_of_time import AotCase, recorded

from lora_kernels.nf4 import NestedMaxima, Nf4Arguments, dequantize_nf4

P = 64


def aot_cases(capability: int) -> Iterator[AotCase]:
    # the last has units of 32 elements
    for num_rows, num_columns in ((1024, 4096), (4096, 14336), (512, 4128)):
        for is_nested in (True, False):
            yield from recorded(
                capability, functools.partial(_dequantize, num_rows, num_columns, is_nested)
            )


def _dequantize(num_rows: int, num_columns: int, is_nested: bool) -> None:
    buffer = torch.empty(num_rows, num_columns + P, dtype=torch.bfloat16)
    num_blocks = num_rows * num_columns // 64
    nested = None
    if is_nested:
        maxima = torch.empty(-(-num_blocks // 256))
        nested = NestedMaxima(maxima, torch.empty(256), torch.empty(()), 256)
    absmax = torch.empty(num_blocks, dtype=torch.uint8 if is_nested else torch.float32)
    packed = torch.empty(num_rows * num_columns // 2, dtype=torch.uint8)
    weight = Nf4Arguments(packed, absmax, torch.empty(16), 64, (num_rows, num_columns), nested)
    dequantize_nf4(weight, buffer[:, :num_columns])
