"""What the launchers of all kernels do with their arguments: checks, strides and dtypes."""

from __future__ import annotations

import torch
import triton.language as tl


def check_matrix(
    name: str, tensor: torch.Tensor | None, dtype: torch.dtype, num_rows: int, num_columns: int
) -> None:
    """Refuse a matrix that a kernel would read wrongly; None passes.

    Args:
        name: of the argument, for the message.
        tensor: rows may have any stride, their elements stand side by side.
        dtype: expected.
        num_rows: expected.
        num_columns: expected.

    Raises:
        ValueError: shape, dtype or strides differ.
    """
    if tensor is None:
        return
    if tensor.shape != (num_rows, num_columns) or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {(num_rows, num_columns)} {dtype},"
            f" got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if num_columns > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: rows must be contiguous, strides are {tensor.stride()}")


def check_vector(name: str, tensor: torch.Tensor, dtype: torch.dtype, length: int) -> None:
    """Refuse a vector that is not contiguous or differs in length or dtype.

    Args:
        name: of the argument, for the message.
        tensor: the vector.
        dtype: expected.
        length: expected.

    Raises:
        ValueError: it is not as said.
    """
    if tensor.shape != (length,) or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {(length,)} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if length > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name}: must be contiguous")


def stride(tensor: torch.Tensor | None) -> int:
    """Return the elements from one row to the next; 0 without a tensor."""
    return 0 if tensor is None else tensor.stride(0)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's type for sums over tensors of a dtype: fp32, for fp64 fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return torch's type for row statistics of a dtype: fp32, for fp64 fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
