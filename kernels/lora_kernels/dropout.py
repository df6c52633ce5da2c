"""Dropout whose mask is a function of a counter: computed wherever it is needed, stored nowhere.

Element (m, k) of the input of linear group `stream` is kept when 16 bits of

    mix(mix(m, stream) + k, seed)

are at least `threshold = round(p * 65536)`; `mix` is the 32-bit hash `lowbias32` (Wellons 2018,
github.com/skeeto/hash-prospector): two multiplications against Philox's twenty, and the mask has
no cryptography to do. Kept elements are scaled by 1 / (1 - threshold / 65536).

The modules of one group (query, key and value) share a mask, as they share their input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Dropout(NamedTuple):
    """One draw of a dropout mask."""

    p: float
    """Probability of dropping an element, in [0, 1)."""
    seed: int
    """Drawn once per forward pass, in [0, 2^31)."""
    stream: int
    """Which linear group of which layer, so that no two share a mask."""

    @property
    def threshold(self) -> int:
        """What 16 random bits must reach for an element to be kept."""
        return min(65535, round(self.p * 65536))

    @property
    def scale(self) -> float:
        """Factor on the elements that are kept."""
        return 65536 / (65536 - self.threshold)


@triton.jit
def _mix(x):
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(seed, stream, threshold, rows, columns):
    """Return which elements of a tile are kept; `rows` and `columns` broadcast to its shape."""
    rows = rows.to(tl.uint32)
    # integers that happen to be 1 are compile-time constants, which know no dtype
    zero = rows * 0
    row_key = _mix(rows + _mix(zero + stream))
    bits = _mix((row_key + columns.to(tl.uint32)) ^ (zero + seed))
    return (bits >> 16) >= threshold


@triton.jit
def drop(x, seed, stream, threshold, rows, columns, ACC: tl.constexpr):
    """Return a tile with what is dropped zero and the rest scaled; rows and columns are ranges."""
    # the scale is made here: as an argument it would be rounded to fp32
    scale = 65536.0 / (tl.full((), 65536.0, ACC) - threshold)
    keep = keep_mask(seed, stream, threshold, rows[:, None], columns[None, :])
    return tl.where(keep, x * scale, 0.0)


def draw(dropout: Dropout | None) -> tuple[int, int, int]:
    """Return seed, stream and threshold, as arguments of a kernel; zeros without dropout."""
    return (0, 0, 0) if dropout is None else (dropout.seed, dropout.stream, dropout.threshold)


def _mix_reference(x: torch.Tensor) -> torch.Tensor:
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def keep_mask_reference(
    dropout: Dropout, num_rows: int, num_columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return the whole mask that the kernels compute tile by tile.

    Args:
        dropout: the draw.
        num_rows: M, tokens.
        num_columns: K, features.
        device: where the mask is made.

    Returns:
        `(M, K)` bool, True where an element is kept.
    """
    rows = torch.arange(num_rows, dtype=torch.int64, device=device)[:, None]
    columns = torch.arange(num_columns, dtype=torch.int64, device=device)[None, :]
    stream = torch.tensor(dropout.stream, dtype=torch.int64, device=device)
    row_key = _mix_reference(rows + _mix_reference(stream))
    bits = _mix_reference(((row_key + columns) & 0xFFFFFFFF) ^ dropout.seed)
    return (bits >> 16) >= dropout.threshold


def apply_dropout_reference(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return `drop(x)` for `x` of shape `(M, K)`; `x` itself without dropout."""
    if dropout is None:
        return x
    keep = keep_mask_reference(dropout, x.shape[0], x.shape[1], x.device)
    return torch.where(keep, x * dropout.scale, 0)
