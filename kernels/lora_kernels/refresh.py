"""Working copies of the trained parameters: target = source * scale, rounded once, for all at once.

The parameters of the adapters are fp32 and many: 448 matrices at 8B with all seven linears adapted,
one shape [rank, K] and the other [N, rank]. The copies are views of the augmented weights, in their
dtype. One launch writes them all; torch's own would be two for each.

The kernel finds its matrices in a table of addresses on the GPU, which is made anew when a
parameter has moved. It walks over units: runs of up to 16 elements of one row, as many as divide
all rows, strides and addresses. The units of a matrix are numbered through, so long rows and rows
of 16 elements keep the threads equally busy, and the one division that tells row from column is
made for a unit, not for an element.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import accumulator

# elements: 32 bytes in bf16, so that rows of rank 16 are one unit
_LARGEST_UNIT = 16


class Copy(NamedTuple):
    """One matrix and its working copy."""

    source: torch.Tensor
    """The parameter, (rows, columns), any float dtype; rows may have any stride."""
    target: torch.Tensor
    """What is written, (rows, columns), any float dtype; rows may have any stride."""
    scale: float = 1.0
    """Factor; the product is made in fp32 (fp64 for fp64) and rounded to the target's dtype."""


@triton.jit
def _refresh(
    table_ptr,
    scales_ptr,
    blocks_ptr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    SOURCE_ALIGNMENT: tl.constexpr,
    TARGET_ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.load(blocks_ptr + 2 * tl.program_id(0))
    first_unit = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1)
    table_ptr += 6 * entry
    source_ptr = tl.load(table_ptr).to(tl.pointer_type(SOURCE))
    target_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(TARGET))
    source_ptr = tl.multiple_of(source_ptr, SOURCE_ALIGNMENT)
    target_ptr = tl.multiple_of(target_ptr, TARGET_ALIGNMENT)
    # the rest is counted in units; quotients of 32 bits are cheaper
    num_units = tl.load(table_ptr + 2).to(tl.int32)
    units_per_row = tl.load(table_ptr + 3).to(tl.int32)
    source_stride = tl.load(table_ptr + 4)
    target_stride = tl.load(table_ptr + 5)
    scale = tl.load(scales_ptr + entry).to(ACC)

    units = first_unit + tl.arange(0, BLOCK // UNIT)
    row = (units // units_per_row).to(tl.int64)
    unit_in_row = units % units_per_row
    inside = (units < num_units)[:, None]
    elements = tl.arange(0, UNIT)[None, :]
    offsets = ((row * source_stride + unit_in_row) * UNIT)[:, None] + elements
    x = tl.load(source_ptr + offsets, inside, 0.0, eviction_policy="evict_first").to(ACC)
    offsets = ((row * target_stride + unit_in_row) * UNIT)[:, None] + elements
    tl.store(target_ptr + offsets, (x * scale).to(TARGET), inside)


class WorkingCopies:
    """Copies that follow their parameters.

    Args:
        copies: any number; sources and targets of each are on one device.

    Raises:
        ValueError: shapes or strides of a copy do not fit.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)
        self._sources = [copy.source for copy in self._copies]
        self._build()

    def refresh(self) -> None:
        """Write all copies; nothing waits for the GPU unless a parameter has moved."""
        if self._source_addresses() != self._addresses:
            self._build()
        for table in self._tables:
            table.launch()

    def set_scales(self, scales: Sequence[float]) -> None:
        """Change the scales, for the next refresh.

        Args:
            scales: one for each copy, in their order.

        Raises:
            ValueError: there are more or fewer.
        """
        if len(scales) != len(self._copies):
            raise ValueError(f"{len(scales)} scales for {len(self._copies)} copies")
        if list(scales) == [copy.scale for copy in self._copies]:
            return
        self._copies = [
            copy._replace(scale=scale) for copy, scale in zip(self._copies, scales, strict=True)
        ]
        self._build()

    def _build(self) -> None:
        groups = defaultdict(list)
        for index, copy in enumerate(self._copies):
            _check(index, copy)
            if copy.source.numel() > 0:
                key = (copy.target.device, copy.source.dtype, copy.target.dtype)
                groups[key].append(copy)
        self._tables = [_Table(group) for group in groups.values()]
        self._addresses = self._source_addresses()

    def _source_addresses(self) -> list[int]:
        return [source.data_ptr() for source in self._sources]


class _Table:
    """What one launch needs: copies on one device with one pair of dtypes."""

    def __init__(self, copies: list[Copy]) -> None:
        source, target = copies[0].source, copies[0].target
        unit = math.gcd(_LARGEST_UNIT, *(_unit(copy) for copy in copies))
        config = launch.launch_config("refresh", target.device, unit)
        self._arguments: dict[str, Any] = {
            "SOURCE": _triton_dtype(source.dtype),
            "TARGET": _triton_dtype(target.dtype),
            "SOURCE_ALIGNMENT": unit * source.element_size(),
            "TARGET_ALIGNMENT": unit * target.element_size(),
            "ACC": accumulator(source.dtype),
            "UNIT": unit,
            **config,
        }
        rows, blocks = [], []
        units_per_block = config["BLOCK"] // unit
        for entry, copy in enumerate(copies):
            num_rows, num_columns = copy.source.shape
            num_units = num_rows * num_columns // unit
            rows.append(
                (
                    copy.source.data_ptr(), copy.target.data_ptr(), num_units, num_columns // unit,
                    _row_stride(copy.source) // unit, _row_stride(copy.target) // unit,
                )
            )  # fmt: skip
            first_units = torch.arange(0, num_units, units_per_block, dtype=torch.int32)
            blocks.append(torch.stack([torch.full_like(first_units, entry), first_units], 1))
        self._rows = torch.tensor(rows, dtype=torch.int64).to(target.device)
        self._scales = torch.tensor(
            [copy.scale for copy in copies], dtype=torch.float64, device=target.device
        )
        self._blocks = torch.cat(blocks).to(target.device)

    def launch(self) -> None:
        with launch.on_device(self._blocks):
            _refresh[(self._blocks.shape[0],)](
                self._rows, self._scales, self._blocks, **self._arguments
            )


def _check(index: int, copy: Copy) -> None:
    source, target, _ = copy
    if source.dim() != 2 or source.shape != target.shape:
        raise ValueError(
            f"copy {index}: expected two equal matrices, got {tuple(source.shape)} and"
            f" {tuple(target.shape)}"
        )
    if source.device != target.device:
        raise ValueError(f"copy {index}: from {source.device} to {target.device}")
    for tensor in (source, target):
        if not tensor.is_floating_point():
            raise ValueError(f"copy {index}: {tensor.dtype} is no float")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"copy {index}: rows must be contiguous, strides are {tensor.stride()}"
            )


def _unit(copy: Copy) -> int:
    """Return the most elements that divide rows, strides and addresses of a copy."""
    lengths = [copy.source.shape[1]]
    for tensor in (copy.source, copy.target):
        lengths += [_row_stride(tensor), tensor.data_ptr() // tensor.element_size()]
    return math.gcd(_LARGEST_UNIT, *lengths)


def _row_stride(tensor: torch.Tensor) -> int:
    # of a single row it may be anything, and is not used
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
