"""The arithmetic of a merge, and the writing of the merged weights.

W: weight (N outputs, K inputs) of the base. A: (R, K), B: (N, R).

    W' = W + scaling * B A                             LoRA
    W' = m / |W + scaling * B A| (W + scaling * B A)   DoRA; |.| and m over each output

In fp32, rounded once to the base's type, a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_train.errors import UserError
from lora_train.merge.plan import MergePlan, PlannedTensor
from lora_train.merge.tensor_files import DTYPE_BYTES, NewTensor, StoredTensor, write_model

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""torch's types by the names of the safetensors format."""

# of a block in fp32 32 MiB: of the 8B shapes none is slower for it than whole
_BLOCK_ELEMENTS = 8 * 2**20


@dataclass
class Rounding:
    """How much of the update is left when the sums are rounded to the base's type.

    An update below half the step between two numbers of that type is lost wholly: with the
    quickstart after 12 steps 2 % of it, all weights together.
    """

    asked: float = 0.0
    """Squared length of the update, all weights as one vector."""
    along: float = 0.0
    """Of what was written, the part in that direction."""

    def add(self, base: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count some rows of a weight, fp32 each but the last."""
        update = exact - base
        self.asked += float(update.square().sum())
        self.along += float(((rounded.float() - base) * update).sum())

    @property
    def share_kept(self) -> float | None:
        """1: all; None: there is no update."""
        return self.along / self.asked if self.asked else None


def write_merged(plan: MergePlan, folder: Path, report: Callable[[int], None]) -> Rounding:
    """Write the weights of the merged model.

    Args:
        plan: what they are.
        folder: where to.
        report: called with 1 when a tensor is written.

    Returns:
        What rounding left of the update.

    Raises:
        UserError: a merged weight is not finite.
        OSError: the disk is full, or not writable.
    """
    rounding = Rounding()
    tensors = [
        NewTensor(
            each.name, each.base.dtype, each.base.shape, each.base.num_bytes,
            _pieces_of(each, rounding),
        )
        for each in plan.tensors
    ]  # fmt: skip
    write_model(tensors, folder, report)
    return rounding


def read_rows(tensor: StoredTensor, begin: int, end: int) -> Tensor:
    """Read some rows of a stored tensor.

    Args:
        tensor: of at least one dimension; a row is all that has the same first index.
        begin: first row.
        end: row after the last.

    Returns:
        The rows, in the type they are stored in.
    """
    row = math.prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
    buffer = bytearray((end - begin) * row)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + begin * row)
        if stream.readinto(buffer) != len(buffer):
            raise UserError(f"{tensor.file} ends in the middle of {tensor.name}")
    shape = (end - begin, *tensor.shape[1:])
    if not buffer:
        return torch.empty(shape, dtype=DTYPES[tensor.dtype])
    return torch.frombuffer(buffer, dtype=DTYPES[tensor.dtype]).view(shape)


def _pieces_of(
    planned: PlannedTensor, rounding: Rounding
) -> Callable[[], Iterator[bytes | memoryview]]:
    if not planned.is_changed:
        return planned.base.chunks
    return lambda: (_bytes_of(block) for block in _blocks(planned, rounding))


def _bytes_of(block: Tensor) -> memoryview:
    return block.contiguous().view(torch.uint8).numpy().data.cast("B")


@torch.no_grad()
def _blocks(planned: PlannedTensor, rounding: Rounding) -> Iterator[Tensor]:
    """Yield the merged tensor in blocks of rows, in the base's type."""
    dtype = DTYPES[planned.base.dtype]
    scale = _row_scale(planned)
    for rows in _row_ranges(planned.base):
        block = _sum(planned, rows)
        if scale is not None:
            block *= scale[None] if planned.is_transposed else scale[rows.start : rows.stop, None]
        rounded = block.to(dtype)
        if not rounded.isfinite().all():
            raise UserError(
                f"the merged {planned.name} is not finite in {planned.base.dtype}",
                hint="the adapter holds NaN or infinity, or numbers too large for that type",
            )
        base = read_rows(planned.base, rows.start, rows.stop).float()
        rounding.add(base, block, rounded)
        yield rounded


def _row_ranges(tensor: StoredTensor) -> list[range]:
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    num_rows = tensor.shape[0]
    return [range(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]


def _sum(planned: PlannedTensor, rows: range) -> Tensor:
    """Return some rows of base plus update (or what replaces the base), in fp32."""
    source = planned.base if planned.replacement is None else planned.replacement
    block = read_rows(source, rows.start, rows.stop).float()
    if planned.bias_of is not None and planned.bias_of.bias is not None:
        bias = read_rows(planned.bias_of.bias, rows.start, rows.stop).float()
        block += bias * planned.bias_of.scaling
    update = planned.update
    if update is not None:
        a, b = update.a, update.b
        if planned.is_transposed:
            # the columns of A are the rows of the weight
            left = read_rows(a, 0, a.shape[0]).float()[:, rows.start : rows.stop].T
            right = read_rows(b, 0, b.shape[0]).float().T
        else:
            left = read_rows(b, rows.start, rows.stop).float()
            right = read_rows(a, 0, a.shape[0]).float()
        block += (left @ right) * update.scaling
    return block


def _row_scale(planned: PlannedTensor) -> Tensor | None:
    """Return DoRA's factor for each output, (N,) fp32; None for plain LoRA."""
    if planned.update is None or planned.update.magnitude is None:
        return None
    magnitude = planned.update.magnitude
    outputs = magnitude.shape[0]
    squares = torch.zeros(outputs)
    for rows in _row_ranges(planned.base):
        block = _sum(planned, rows).square()
        if planned.is_transposed:
            squares += block.sum(0)
        else:
            squares[rows.start : rows.stop] = block.sum(1)
    return read_rows(magnitude, 0, outputs).float().flatten() / squares.sqrt()
