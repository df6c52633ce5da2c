"""Dequantize an NF4 weight of bitsandbytes into a view of a dense matrix.

    weight[n, k] = code[nibble] * absmax[block],  block = (n * K + k) // block_size
    absmax[block] = nested.code[absmax8[block]] * nested.absmax[block // 256] + nested.offset

The second line holds for double quantization, where the blocks' maxima are quantized themselves.
Letters: N out_features, K in_features. Every product and sum is rounded to fp32, in bitsandbytes'
order and without fused multiply-adds, and the result once more to the output's dtype: the bits are
those of `bitsandbytes.functional.dequantize_4bit`, which cannot write with a row stride.

The kernel is bound by memory: 0.5 bytes in, 2 out (bf16) for an element. A tile is [units, bytes of
a unit], where a unit is a run of up to 64 elements that lies in one row and one block: row, column
and maximum are found once for it. The code tables stay in the L1 cache. With 8 elements for each
thread, 4 bytes are loaded and 16 (bf16) stored at once, and nothing moves between threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import check_matrix, check_vector

_LARGEST_UNIT = 64


class NestedMaxima(NamedTuple):
    """What turns the codes of double quantization into maxima."""

    absmax: torch.Tensor
    """(ceil(blocks / block_size),) fp32."""
    code: torch.Tensor
    """(256,) fp32."""
    offset: torch.Tensor
    """() fp32, on the GPU: it is not read here."""
    block_size: int
    """Maxima that share a maximum: 256."""


class Nf4Arguments(NamedTuple):
    """A quantized weight as plain tensors, all contiguous."""

    packed: torch.Tensor
    """(N * K / 2,) uint8, row by row, the first of two elements in the high nibble."""
    absmax: torch.Tensor
    """(ceil(N * K / block_size),) fp32; with `nested` uint8 codes."""
    code: torch.Tensor
    """(16,) fp32."""
    block_size: int
    """Elements that share a maximum: 64, or another power of two."""
    shape: tuple[int, int]
    """(N, K); K is even."""
    nested: NestedMaxima | None = None
    """With double quantization."""


@triton.jit
def _dequantize_nf4(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    stride_out,
    num_units,
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    units = tl.program_id(0) * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
    in_weight = units < num_units
    inside = in_weight[:, None]
    offsets = (units.to(tl.int64) * (UNIT // 2))[:, None] + tl.arange(0, UNIT // 2)[None, :]
    packed = tl.load(packed_ptr + offsets, inside, 0, eviction_policy="evict_first")

    blocks = units // (BLOCK_SIZE // UNIT)
    absmax = tl.load(absmax_ptr + blocks, in_weight, 0)
    if nested_code_ptr is not None:
        nested_code = tl.load(nested_code_ptr + absmax.to(tl.int32))
        nested_absmax = tl.load(nested_absmax_ptr + blocks // NESTED_BLOCK_SIZE, in_weight, 0.0)
        absmax = nested_code * nested_absmax + tl.load(offset_ptr)

    high = tl.load(code_ptr + (packed >> 4).to(tl.int32)) * absmax[:, None]
    low = tl.load(code_ptr + (packed & 15).to(tl.int32)) * absmax[:, None]
    row = (units // (K // UNIT)).to(tl.int64)
    first_column = units % (K // UNIT) * UNIT
    offsets = (row * stride_out + first_column)[:, None] + tl.arange(0, UNIT)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + offsets, tl.interleave(high.to(dtype), low.to(dtype)), inside)


def dequantize_nf4(weight: Nf4Arguments, out_NK: torch.Tensor) -> None:
    """Write a quantized weight into a matrix; nothing waits for the GPU.

    Args:
        weight: on the device of `out_NK`.
        out_NK: (N, K), output, bf16, fp16 or fp32; rows may have any stride.

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = weight.shape
    nested, block_size = weight.nested, weight.block_size
    check_matrix("out_NK", out_NK, out_NK.dtype, num_rows, num_columns)
    if not out_NK.is_floating_point() or out_NK.dtype == torch.float64:
        raise ValueError(f"out_NK: expected bf16, fp16 or fp32, got {out_NK.dtype}")
    if num_columns % 2 != 0:
        raise ValueError(f"K is {num_columns}: a byte would hold elements of two rows")
    if block_size < 2 or block_size & (block_size - 1) != 0:
        raise ValueError(f"block_size {block_size} is not a power of two")
    num_blocks = triton.cdiv(num_rows * num_columns, block_size)
    check_vector("packed", weight.packed, torch.uint8, num_rows * num_columns // 2)
    check_vector("code", weight.code, torch.float32, 16)
    check_vector("absmax", weight.absmax, torch.uint8 if nested else torch.float32, num_blocks)
    if nested is not None:
        num_nested = triton.cdiv(num_blocks, nested.block_size)
        check_vector("nested.absmax", nested.absmax, torch.float32, num_nested)
        check_vector("nested.code", nested.code, torch.float32, 256)
        check_vector("nested.offset", nested.offset.reshape(-1), torch.float32, 1)
    if out_NK.numel() == 0:
        return

    unit = math.gcd(_LARGEST_UNIT, num_columns, block_size)
    num_units = num_rows * num_columns // unit
    config = launch.launch_config("dequantize_nf4", out_NK.device, unit)
    with launch.on_device(out_NK):
        _dequantize_nf4[(triton.cdiv(num_units, config["BLOCK"] // unit),)](
            weight.packed, weight.absmax, weight.code, nested and nested.absmax,
            nested and nested.code, nested and nested.offset, out_NK, out_NK.stride(0), num_units,
            K=num_columns, BLOCK_SIZE=block_size,
            NESTED_BLOCK_SIZE=nested.block_size if nested else 1, UNIT=unit,
            # bitsandbytes rounds the product before the offset is added
            enable_fp_fusion=False, **config,
        )  # fmt: skip


def nf4_arguments(weight: Any) -> Nf4Arguments:
    """Return the tensors behind a `Params4bit` of bitsandbytes, which is not imported for that.

    Args:
        weight: quantized, of any storage dtype.

    Returns:
        The tensors themselves, no copies, and what describes them.

    Raises:
        ValueError: it is not an NF4 matrix in the layout of GPUs.
    """
    state = getattr(weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        found = "no quantized weight" if state is None else state.quant_type
        raise ValueError(f"expected nf4, got {found}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("the weight was re-packed for a CPU kernel")
    if len(state.shape) != 2:
        raise ValueError(f"expected a matrix, got the shape {tuple(state.shape)}")
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedMaxima(inner.absmax, inner.code, state.offset, inner.blocksize)
    num_rows, num_columns = state.shape
    # (N * K / 2, 1), or wider elements where they are sharded as such
    packed = weight.data.view(torch.uint8).reshape(-1)
    return Nf4Arguments(
        packed, state.absmax, state.code, state.blocksize, (num_rows, num_columns), nested
    )


class Nf4Weight:
    """A frozen weight that is written out dense whenever it is needed.

    Args:
        weight: a `Params4bit` of bitsandbytes, quantized, on the device where it stays.

    Raises:
        ValueError: it is not an NF4 matrix in the layout of GPUs.
    """

    def __init__(self, weight: Any) -> None:
        self._arguments = nf4_arguments(weight)
        self.shape = self._arguments.shape

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out`, (N, K) with any row stride."""
        dequantize_nf4(self._arguments, out)
