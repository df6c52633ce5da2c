"""Rank products of a linear whose input no kernel of ours makes: o_proj's comes from attention.

    project             out_aug = [ x | H ],  H = drop(x) @ a^T
    add_masked_product  dx += drop(g @ a), where dropout was on
    dropped             out = drop(x), what the adapter saw: dA is a product with it

Letters: M tokens, K features, P padded rank columns, R rank columns in use. Tensors are bf16, fp16,
fp32 or fp64; sums are kept in fp32 (fp64 for fp64), every output is rounded once. The dropout mask
is recomputed from its counter.

All are bound by memory. H is made one of two ways, the entry PRODUCT of the launch table:

    "mm"      a cuBLAS product. With dropout it costs an [M, K] tensor, which holds drop(x).
    "kernel"  a program walks over the columns of BLOCK_M rows, and makes the product on the tiles.
              Every program reads all of `a`, so P <= 128. bf16 and fp16 only.

`add_masked_product` makes its tiles of the product from the few columns of g and rows of a, and
adds them at once: dx is read and written, nothing else of that size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import accumulator, check_matrix, stride
from lora_kernels.dropout import Dropout, draw, drop

# seeds change with every step and M may: neither is worth another compilation
_CHANGING = ["num_rows", "seed", "stream", "threshold"]
# widths of tl.dot; what is wider takes "mm"
_RANK_COLUMNS_IN_KERNEL = (16, 32, 64, 128)
# wider elements take "mm" too: exact products of theirs use no tensor cores
_BYTES_IN_KERNEL = 2
# rank columns that a tile of `add_masked_product` takes in at once
_MAX_BLOCK_R = 64


@triton.jit(do_not_specialize=_CHANGING)
def _dropped(
    x_ptr,
    copy_ptr,
    out_ptr,
    stride_x,
    stride_copy,
    stride_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # 64 bits once per program: within a tile 32 bits reach
    first_row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * BLOCK_M
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    columns = tl.program_id(0) % NUM_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < num_rows)[:, None] & (columns < K)[None, :]

    x_ptr += first_row * stride_x
    x = tl.load(x_ptr + (tile_rows[:, None] * stride_x + columns[None, :]), inside, 0.0)
    if copy_ptr is not None:
        copy_ptr += first_row * stride_copy
        tl.store(copy_ptr + (tile_rows[:, None] * stride_copy + columns[None, :]), x, inside)
    x = drop(x.to(ACC), seed, stream, threshold, rows, columns, ACC)
    out_ptr += first_row * stride_out
    out_ptrs = out_ptr + (tile_rows[:, None] * stride_out + columns[None, :])
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_CHANGING)
def _project(
    x_ptr,
    a_ptr,
    out_ptr,
    stride_x,
    stride_a,
    stride_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    P: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 64 bits once per program: within a tile 32 bits reach
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    x_ptr += first_row * stride_x
    out_ptr += first_row * stride_out
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    in_rows = (rows < num_rows)[:, None]
    ranks = tl.arange(0, P)
    dtype = out_ptr.dtype.element_ty

    h = tl.zeros([BLOCK_M, P], ACC)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        in_columns = (columns < K)[None, :]
        inside = in_rows & in_columns
        x = tl.load(x_ptr + (tile_rows[:, None] * stride_x + columns[None, :]), inside, 0.0)
        if not IN_PLACE:
            tl.store(out_ptr + (tile_rows[:, None] * stride_out + columns[None, :]), x, inside)
        if HAS_DROPOUT:
            x = drop(x.to(ACC), seed, stream, threshold, rows, columns, ACC).to(dtype)
        a_offsets = ranks[:, None] * stride_a + columns[None, :]
        a = tl.load(a_ptr + a_offsets, in_columns, 0.0, eviction_policy="evict_last")
        h = tl.dot(x, tl.trans(a), h, input_precision="ieee", out_dtype=ACC)
    h = tl.where((ranks == ONES_COLUMN)[None, :], 1.0, h)
    h_offsets = tile_rows[:, None] * stride_out + (K + ranks)[None, :]
    tl.store(out_ptr + h_offsets, h.to(dtype), in_rows)


@triton.jit(do_not_specialize=_CHANGING)
def _add_masked_product(
    dx_ptr,
    g_ptr,
    a_ptr,
    stride_dx,
    stride_g,
    stride_a,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # 64 bits once per program: within a tile 32 bits reach
    first_row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * BLOCK_M
    dx_ptr += first_row * stride_dx
    g_ptr += first_row * stride_g
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    columns = tl.program_id(0) % NUM_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows = (rows < num_rows)[:, None]
    in_columns = (columns < K)[None, :]
    dx_ptrs = dx_ptr + (tile_rows[:, None] * stride_dx + columns[None, :])
    dx = tl.load(dx_ptrs, in_rows & in_columns, 0.0, eviction_policy="evict_first")

    term = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        in_g = in_rows & (ranks < R)[None, :]
        g = tl.load(g_ptr + (tile_rows[:, None] * stride_g + ranks[None, :]), in_g, 0.0)
        in_a = (ranks < R)[:, None] & in_columns
        a = tl.load(a_ptr + (ranks[:, None] * stride_a + columns[None, :]), in_a, 0.0)
        term = tl.dot(g, a, term, input_precision="ieee", out_dtype=ACC)
    total = dx.to(ACC) + drop(term, seed, stream, threshold, rows, columns, ACC)
    tl.store(dx_ptrs, total.to(dx_ptr.dtype.element_ty), in_rows & in_columns)


def project(
    x_MK: torch.Tensor,
    a_PK: torch.Tensor,
    out_aug: torch.Tensor,
    *,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> None:
    """Write `[x | H]`; the formulas are above.

    All tensors have one dtype; rows may have any stride.

    Args:
        x_MK: (M, K); may be the first K columns of `out_aug`, which then stay as they are.
        a_PK: (P, K), rows of unused rank columns are zero.
        out_aug: (M, K+P), output.
        dropout: what the adapter sees of x is dropped so.
        ones_column: this column of H is set to 1 (a bias stands in the weights there).

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = x_MK.shape
    rank_columns = a_PK.shape[0]
    dtype, device = x_MK.dtype, x_MK.device
    check_matrix("x_MK", x_MK, dtype, num_rows, num_columns)
    check_matrix("a_PK", a_PK, dtype, rank_columns, num_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, num_columns + rank_columns)
    if ones_column is not None and not 0 <= ones_column < rank_columns:
        raise ValueError(f"ones_column {ones_column} is not one of {rank_columns} rank columns")
    if num_rows == 0:
        return

    in_place = x_MK.data_ptr() == out_aug.data_ptr()
    if _in_kernel(dropout, x_MK, rank_columns):
        config = launch.launch_config("project_tiles", device, num_columns)
        with launch.on_device(x_MK):
            _project[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
                x_MK, a_PK, out_aug, stride(x_MK), stride(a_PK), stride(out_aug), num_rows,
                *draw(dropout), K=num_columns, P=rank_columns, IN_PLACE=in_place,
                HAS_DROPOUT=dropout is not None,
                ONES_COLUMN=-1 if ones_column is None else ones_column, ACC=accumulator(dtype),
                **config,
            )  # fmt: skip
        return
    seen_MK = x_MK
    if dropout is not None:
        seen_MK = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        _launch_dropped(x_MK, dropout, seen_MK, None if in_place else out_aug)
    elif not in_place:
        out_aug[:, :num_columns].copy_(x_MK)
    # cuBLAS writes with a row stride: no copy
    torch.mm(seen_MK, a_PK.T, out=out_aug[:, num_columns:])
    if ones_column is not None:
        out_aug[:, num_columns + ones_column].fill_(1)


def add_masked_product(
    dx_MK: torch.Tensor, g_MR: torch.Tensor, a_RK: torch.Tensor, dropout: Dropout
) -> None:
    """Add `drop(g @ a)` to dx, the adapter's part in the gradient of what was dropped.

    All tensors have one dtype; rows may have any stride.

    Args:
        dx_MK: (M, K), in and output.
        g_MR: (M, R), gradient of H.
        a_RK: (R, K).
        dropout: of the group's input.

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = dx_MK.shape
    rank = a_RK.shape[0]
    dtype = dx_MK.dtype
    check_matrix("dx_MK", dx_MK, dtype, num_rows, num_columns)
    check_matrix("g_MR", g_MR, dtype, num_rows, rank)
    check_matrix("a_RK", a_RK, dtype, rank, num_columns)
    if num_rows == 0 or rank == 0:
        return
    config = launch.launch_config("add_masked_product", dx_MK.device, num_columns)
    with launch.on_device(dx_MK):
        _add_masked_product[_tiles(config, num_rows, num_columns)](
            dx_MK, g_MR, a_RK, stride(dx_MK), stride(g_MR), stride(a_RK), num_rows,
            *draw(dropout), K=num_columns, R=rank,
            BLOCK_R=min(_MAX_BLOCK_R, max(16, triton.next_power_of_2(rank))),
            ACC=accumulator(dtype), **config,
        )  # fmt: skip


def dropped(x_MK: torch.Tensor, dropout: Dropout, out: torch.Tensor) -> None:
    """Write `drop(x)`.

    Args:
        x_MK: (M, K), rows may have any stride.
        dropout: the mask.
        out: (M, K), output, in x's dtype; rows may have any stride; may be `x_MK`.

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    check_matrix("x_MK", x_MK, x_MK.dtype, *x_MK.shape)
    check_matrix("out", out, x_MK.dtype, *x_MK.shape)
    if x_MK.shape[0] > 0:
        _launch_dropped(x_MK, dropout, out, None)


def _launch_dropped(
    x_MK: torch.Tensor, dropout: Dropout, out_MK: torch.Tensor, copy: torch.Tensor | None
) -> None:
    num_rows, num_columns = x_MK.shape
    config = launch.launch_config("dropped", x_MK.device, num_columns)
    with launch.on_device(x_MK):
        _dropped[_tiles(config, num_rows, num_columns)](
            x_MK, copy, out_MK, stride(x_MK), stride(copy), stride(out_MK), num_rows,
            *draw(dropout), K=num_columns, ACC=accumulator(x_MK.dtype), **config,
        )  # fmt: skip


def _tiles(config: dict[str, int], num_rows: int, num_columns: int) -> tuple[int]:
    rows, columns = config["BLOCK_M"], config["BLOCK_K"]
    return (triton.cdiv(num_rows, rows) * triton.cdiv(num_columns, columns),)


def _in_kernel(dropout: Dropout | None, tensor: torch.Tensor, rank_columns: int) -> bool:
    """Whether the tiles make H; "mm" costs more with dropout, hence its own entry."""
    name = "project" if dropout is None else "project_dropout"
    config = launch.launch_config(name, tensor.device, tensor.shape[1])
    return (
        config["PRODUCT"] == "kernel"
        and tensor.element_size() <= _BYTES_IN_KERNEL
        and rank_columns in _RANK_COLUMNS_IN_KERNEL
    )
