"""Residual add + RMSNorm, forward and backward, each with the rank products that ride on it.

    forward    v = residual + delta                 rstd = rsqrt(mean_k(v^2) + eps)
               x = v * rstd * weight                out_aug = [ x | H ],  H = drop(x) @ a^T
    backward   g = (dx + drop(G @ a)) * weight      (drop(G @ a): only where dropout was on)
               dv = rstd * (g - n * mean_k(g * n)) + d_residual_in,  n = v * rstd
               out_aug = [ dv | dv @ sb ]

Letters: M tokens, K features, P padded rank columns (0 without an adapter). Tensors are bf16, fp16,
fp32 or fp64; sums are kept in fp32 (fp64 for fp64), every output is rounded once. `v` is saved in
its dtype and rstd beside it: n, x and the dropout mask are recomputed from them.

Both operations move four [M, K] tensors and compute next to nothing, so what counts is how often a
row comes from memory. Its statistics are needed before its output, which leaves two ways:

    "mm"      a program holds whole rows in registers: one pass. H or G is a cuBLAS product that
              reads [M, K] once more, partly out of L2. Works for every P. With dropout it costs
              another [M, K] tensor, which holds drop(x) or G @ a.
    "kernel"  a program walks twice over 16 or 32 rows, small enough that the second walk finds
              them in L2, and makes the products on the tiles. Every program reads all of `a` or
              `sb`, so it wants more rows, and P <= 128 for the accumulator to fit in registers.
              bf16 and fp16 only.

Which one runs is the entry PRODUCT of the launch table. Without products the rows are walked once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import (
    accumulator,
    check_matrix,
    check_vector,
    statistics_dtype,
    stride,
)
from lora_kernels.dropout import Dropout, draw, drop

# seeds change with every step and M may: neither is worth another compilation
_CHANGING = ["num_rows", "seed", "stream", "threshold"]
# widths of tl.dot; what is wider takes "mm"
_RANK_COLUMNS_IN_KERNEL = (16, 32, 64, 128)
# wider elements take "mm" too: exact products of theirs use no tensor cores, and the tiles spill
_BYTES_IN_KERNEL = 2


@triton.jit(do_not_specialize=_CHANGING)
def _add_rms_norm_rows(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    dropped_ptr,
    residual_out_ptr,
    rstd_ptr,
    stride_residual,
    stride_delta,
    stride_out,
    stride_residual_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inside = (rows < num_rows)[:, None] & (columns < K)[None, :]
    weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")

    offsets = rows[:, None] * stride_residual + columns[None, :]
    v = tl.load(residual_ptr + offsets, inside, 0.0, eviction_policy="evict_first").to(ACC)
    if delta_ptr is not None:
        offsets = rows[:, None] * stride_delta + columns[None, :]
        v += tl.load(delta_ptr + offsets, inside, 0.0, eviction_policy="evict_first").to(ACC)
        rounded = v.to(residual_out_ptr.dtype.element_ty)
        offsets = rows[:, None] * stride_residual_out + columns[None, :]
        tl.store(residual_out_ptr + offsets, rounded, inside)
        v = rounded.to(ACC)

    rstd = tl.rsqrt(tl.sum(v * v, 1) / K + EPS)
    tl.store(rstd_ptr + rows, rstd, rows < num_rows)
    x = v * rstd[:, None] * weight.to(ACC)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], x.to(dtype), inside)
    if dropped_ptr is not None:
        dropped = drop(x, seed, stream, threshold, rows, columns, ACC)
        tl.store(dropped_ptr + rows[:, None] * K + columns[None, :], dropped.to(dtype), inside)


@triton.jit(do_not_specialize=_CHANGING)
def _add_rms_norm_tiles(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    a_ptr,
    out_ptr,
    residual_out_ptr,
    rstd_ptr,
    stride_residual,
    stride_delta,
    stride_a,
    stride_out,
    stride_residual_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, P)
    dtype = out_ptr.dtype.element_ty
    in_rows = (rows < num_rows)[:, None]

    squares = tl.zeros([BLOCK_M], ACC)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = in_rows & (columns < K)[None, :]
        offsets = rows[:, None] * stride_residual + columns[None, :]
        v = tl.load(residual_ptr + offsets, inside, 0.0).to(ACC)
        if delta_ptr is not None:
            offsets = rows[:, None] * stride_delta + columns[None, :]
            v += tl.load(delta_ptr + offsets, inside, 0.0, eviction_policy="evict_first").to(ACC)
            rounded = v.to(dtype)
            offsets = rows[:, None] * stride_residual_out + columns[None, :]
            tl.store(residual_out_ptr + offsets, rounded, inside)
            v = rounded.to(ACC)
        squares += tl.sum(v * v, 1)
    rstd = tl.rsqrt(squares / K + EPS)
    tl.store(rstd_ptr + rows, rstd, rows < num_rows)

    if delta_ptr is not None:
        v_ptr = residual_out_ptr
        stride_v = stride_residual_out
        # what one thread wrote above another may read below
        tl.debug_barrier()
    else:
        v_ptr = residual_ptr
        stride_v = stride_residual
    h = tl.zeros([BLOCK_M, P], ACC)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        in_columns = (columns < K)[None, :]
        inside = in_rows & in_columns
        v = tl.load(v_ptr + rows[:, None] * stride_v + columns[None, :], inside, 0.0).to(ACC)
        weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")
        x = v * rstd[:, None] * weight.to(ACC)[None, :]
        tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], x.to(dtype), inside)
        if HAS_DROPOUT:
            x = drop(x, seed, stream, threshold, rows, columns, ACC)
        a_offsets = ranks[:, None] * stride_a + columns[None, :]
        a = tl.load(a_ptr + a_offsets, in_columns, 0.0, eviction_policy="evict_last")
        h = tl.dot(x.to(dtype), tl.trans(a), h, input_precision="ieee", out_dtype=ACC)
    h = tl.where((ranks == ONES_COLUMN)[None, :], 1.0, h)
    h_offsets = rows[:, None] * stride_out + (K + ranks)[None, :]
    tl.store(out_ptr + h_offsets, h.to(dtype), in_rows)


@triton.jit(do_not_specialize=_CHANGING)
def _rms_norm_backward_rows(
    dx_ptr,
    adapter_dx_ptr,
    residual_ptr,
    rstd_ptr,
    weight_ptr,
    d_residual_ptr,
    out_ptr,
    x_out_ptr,
    stride_dx,
    stride_residual,
    stride_d_residual,
    stride_out,
    stride_x_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inside = (rows < num_rows)[:, None] & (columns < K)[None, :]
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")
    rstd = tl.load(rstd_ptr + rows, rows < num_rows, 0.0)[:, None]

    offsets = rows[:, None] * stride_dx + columns[None, :]
    g = tl.load(dx_ptr + offsets, inside, 0.0, eviction_policy="evict_first").to(ACC)
    if adapter_dx_ptr is not None:
        offsets = rows[:, None] * K + columns[None, :]
        adapter_dx = tl.load(adapter_dx_ptr + offsets, inside, 0.0, eviction_policy="evict_first")
        g += drop(adapter_dx.to(ACC), seed, stream, threshold, rows, columns, ACC)
    g *= weight.to(ACC)[None, :]
    offsets = rows[:, None] * stride_residual + columns[None, :]
    v = tl.load(residual_ptr + offsets, inside, 0.0, eviction_policy="evict_first")
    normed = v.to(ACC) * rstd
    d_v = rstd * (g - normed * (tl.sum(g * normed, 1) / K)[:, None])
    if d_residual_ptr is not None:
        offsets = rows[:, None] * stride_d_residual + columns[None, :]
        d_residual = tl.load(d_residual_ptr + offsets, inside, 0.0, eviction_policy="evict_first")
        d_v += d_residual.to(ACC)
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], d_v.to(dtype), inside)
    if x_out_ptr is not None:
        # loaded again, as registers are scarcer than cached loads
        weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")
        x = normed * weight.to(ACC)[None, :]
        if adapter_dx_ptr is not None:
            x = drop(x, seed, stream, threshold, rows, columns, ACC)
        # it may be dx: all threads have read theirs
        tl.debug_barrier()
        tl.store(x_out_ptr + rows[:, None] * stride_x_out + columns[None, :], x.to(dtype), inside)


@triton.jit
def _load_g(
    dx_ptr,
    a_ptr,
    weight,
    g_rank,
    rows,
    columns,
    inside,
    stride_dx,
    stride_a,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    ADAPTER_P: tl.constexpr,
    ACC: tl.constexpr,
    EVICTION: tl.constexpr,
):
    offsets = rows[:, None] * stride_dx + columns[None, :]
    g = tl.load(dx_ptr + offsets, inside, 0.0, eviction_policy=EVICTION).to(ACC)
    if a_ptr is not None:
        offsets = tl.arange(0, ADAPTER_P)[:, None] * stride_a + columns[None, :]
        a = tl.load(a_ptr + offsets, (columns < K)[None, :], 0.0, eviction_policy="evict_last")
        adapter_dx = tl.dot(g_rank, a, input_precision="ieee", out_dtype=ACC)
        g += drop(adapter_dx, seed, stream, threshold, rows, columns, ACC)
    return g * weight


@triton.jit(do_not_specialize=_CHANGING)
def _rms_norm_backward_tiles(
    dx_ptr,
    g_rank_ptr,
    a_ptr,
    residual_ptr,
    rstd_ptr,
    weight_ptr,
    d_residual_ptr,
    sb_ptr,
    out_ptr,
    x_out_ptr,
    stride_dx,
    stride_g_rank,
    stride_a,
    stride_residual,
    stride_d_residual,
    stride_sb,
    stride_out,
    stride_x_out,
    num_rows,
    seed,
    stream,
    threshold,
    K: tl.constexpr,
    P: tl.constexpr,
    ADAPTER_P: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = out_ptr.dtype.element_ty
    in_rows = (rows < num_rows)[:, None]
    rstd = tl.load(rstd_ptr + rows, rows < num_rows, 0.0)[:, None]
    g_rank = None
    if a_ptr is not None:
        rank_offsets = rows[:, None] * stride_g_rank + tl.arange(0, ADAPTER_P)[None, :]
        g_rank = tl.load(g_rank_ptr + rank_offsets, in_rows, 0.0)

    products = tl.zeros([BLOCK_M], ACC)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = in_rows & (columns < K)[None, :]
        weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")
        weight = weight.to(ACC)[None, :]
        g = _load_g(
            dx_ptr, a_ptr, weight, g_rank, rows, columns, inside, stride_dx, stride_a,
            seed, stream, threshold, K, ADAPTER_P, ACC, "",
        )  # fmt: skip
        offsets = rows[:, None] * stride_residual + columns[None, :]
        v = tl.load(residual_ptr + offsets, inside, 0.0).to(ACC)
        products += tl.sum(g * (v * rstd), 1)
    mean = (products / K)[:, None]

    if sb_ptr is not None:
        h = tl.zeros([BLOCK_M, P], ACC)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = in_rows & (columns < K)[None, :]
        weight = tl.load(weight_ptr + columns, columns < K, 0.0, eviction_policy="evict_last")
        weight = weight.to(ACC)[None, :]
        g = _load_g(
            dx_ptr, a_ptr, weight, g_rank, rows, columns, inside, stride_dx, stride_a,
            seed, stream, threshold, K, ADAPTER_P, ACC, "evict_first",
        )  # fmt: skip
        offsets = rows[:, None] * stride_residual + columns[None, :]
        v = tl.load(residual_ptr + offsets, inside, 0.0, eviction_policy="evict_first")
        normed = v.to(ACC) * rstd
        d_v = rstd * (g - normed * mean)
        if d_residual_ptr is not None:
            offsets = rows[:, None] * stride_d_residual + columns[None, :]
            d_residual = tl.load(
                d_residual_ptr + offsets, inside, 0.0, eviction_policy="evict_first"
            )
            d_v += d_residual.to(ACC)
        rounded = d_v.to(dtype)
        tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], rounded, inside)
        if x_out_ptr is not None:
            x = normed * weight
            if a_ptr is not None:
                x = drop(x, seed, stream, threshold, rows, columns, ACC)
            # it may be dx: all threads have read theirs
            tl.debug_barrier()
            offsets = rows[:, None] * stride_x_out + columns[None, :]
            tl.store(x_out_ptr + offsets, x.to(dtype), inside)
        if sb_ptr is not None:
            sb_offsets = columns[:, None] * stride_sb + tl.arange(0, P)[None, :]
            in_columns = (columns < K)[:, None]
            sb = tl.load(sb_ptr + sb_offsets, in_columns, 0.0, eviction_policy="evict_last")
            h = tl.dot(rounded, sb, h, input_precision="ieee", out_dtype=ACC)
    if sb_ptr is not None:
        h_offsets = rows[:, None] * stride_out + (K + tl.arange(0, P))[None, :]
        tl.store(out_ptr + h_offsets, h.to(dtype), in_rows)


def add_rms_norm_forward(
    residual_MK: torch.Tensor,
    delta_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    out_aug: torch.Tensor,
    a_PK: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    rstd_M: torch.Tensor,
    *,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> None:
    """Write `[x | H]`, the new residual and its rstd; the formulas are above.

    All tensors but `rstd_M` have one dtype; rows may have any stride.

    Args:
        residual_MK: (M, K).
        delta_MK: (M, K), added to the residual; None: `residual_MK` is normed as it is.
        weight_K: (K,), of the norm.
        eps: of the norm.
        out_aug: (M, K+P), output; (M, K) without `a_PK`.
        a_PK: (P, K), rows of unused rank columns are zero.
        residual_out: (M, K), output, residual + delta; may be `residual_MK` or `delta_MK`; None
            exactly when `delta_MK` is.
        rstd_M: (M,), output, fp32 (fp64 when the others are).
        dropout: of the group that consumes x; it concerns H alone.
        ones_column: this column of H is set to 1 (a bias stands in the weights there).

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = residual_MK.shape
    rank_columns = 0 if a_PK is None else a_PK.shape[0]
    if (delta_MK is None) != (residual_out is None):
        raise ValueError("residual_out is given exactly when delta_MK is")
    if ones_column is not None and not 0 <= ones_column < rank_columns:
        raise ValueError(f"ones_column {ones_column} is not one of {rank_columns} rank columns")
    dtype = residual_MK.dtype
    check_matrix("residual_MK", residual_MK, dtype, num_rows, num_columns)
    check_matrix("delta_MK", delta_MK, dtype, num_rows, num_columns)
    check_matrix("residual_out", residual_out, dtype, num_rows, num_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, num_columns + rank_columns)
    check_matrix("a_PK", a_PK, dtype, rank_columns, num_columns)
    check_vector("weight_K", weight_K, dtype, num_columns)
    check_vector("rstd_M", rstd_M, statistics_dtype(dtype), num_rows)
    if num_rows == 0:
        return

    mask = draw(dropout)
    device = residual_MK.device
    in_kernel = a_PK is not None and _in_kernel(
        "add_rms_norm_forward", dropout, residual_MK, [rank_columns]
    )
    with launch.on_device(residual_MK):
        if in_kernel:
            config = launch.launch_config("add_rms_norm_tiles", device, num_columns)
            _add_rms_norm_tiles[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
                residual_MK, delta_MK, weight_K, a_PK, out_aug, residual_out, rstd_M,
                stride(residual_MK), stride(delta_MK), stride(a_PK), stride(out_aug),
                stride(residual_out), num_rows, *mask,
                K=num_columns, P=rank_columns, EPS=eps, HAS_DROPOUT=dropout is not None,
                ONES_COLUMN=-1 if ones_column is None else ones_column, ACC=accumulator(dtype),
                **config,
            )  # fmt: skip
            return
        dropped_MK = None
        if a_PK is not None and dropout is not None:
            dropped_MK = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        config = launch.launch_config("add_rms_norm_rows", device, num_columns)
        _add_rms_norm_rows[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
            residual_MK, delta_MK, weight_K, out_aug, dropped_MK, residual_out, rstd_M,
            stride(residual_MK), stride(delta_MK), stride(out_aug), stride(residual_out),
            num_rows, *mask, K=num_columns, EPS=eps, ACC=accumulator(dtype),
            BLOCK_K=triton.next_power_of_2(num_columns), **config,
        )  # fmt: skip
    if a_PK is not None:
        x_MK = out_aug[:, :num_columns] if dropped_MK is None else dropped_MK
        # cuBLAS writes with a row stride: no copy
        torch.mm(x_MK, a_PK.T, out=out_aug[:, num_columns:])
        if ones_column is not None:
            out_aug[:, num_columns + ones_column].fill_(1)


def rms_norm_backward(
    dx_MK: torch.Tensor,
    residual_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    d_residual_in: torch.Tensor | None,
    out_aug: torch.Tensor,
    sb_KP: torch.Tensor | None,
    *,
    adapter: tuple[torch.Tensor, torch.Tensor, Dropout] | None = None,
    x_out: torch.Tensor | None = None,
) -> None:
    """Write `[dv | G]`, and on request what the adapter saw of x; the formulas are above.

    All tensors but `rstd_M` have one dtype; rows may have any stride.

    Args:
        dx_MK: (M, K), gradient of the norm's output.
        residual_MK: (M, K), what was normed.
        rstd_M: (M,), from the forward.
        weight_K: (K,), of the norm.
        d_residual_in: (M, K or more), gradient of `residual_MK` from elsewhere; its first K
            columns count.
        out_aug: (M, K+P), output; may be `d_residual_in`; (M, K) without `sb_KP`.
        sb_KP: (K, P), of the linear that made the last summand of the residual.
        adapter: G (M, P'), A (P', K) and the dropout of the group that consumed x, where its
            `drop(G @ A)` is not in `dx_MK` yet.
        x_out: (M, K), output: drop(x), without `adapter` x; may be `dx_MK`.

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = dx_MK.shape
    rank_columns = 0 if sb_KP is None else sb_KP.shape[1]
    dtype = dx_MK.dtype
    g_MP, a_PK, dropout = (None, None, None) if adapter is None else adapter
    adapter_columns = 0 if a_PK is None else a_PK.shape[0]
    check_matrix("dx_MK", dx_MK, dtype, num_rows, num_columns)
    check_matrix("residual_MK", residual_MK, dtype, num_rows, num_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, num_columns + rank_columns)
    check_matrix("sb_KP", sb_KP, dtype, num_columns, rank_columns)
    check_matrix("G of adapter", g_MP, dtype, num_rows, adapter_columns)
    check_matrix("A of adapter", a_PK, dtype, adapter_columns, num_columns)
    check_matrix("x_out", x_out, dtype, num_rows, num_columns)
    if d_residual_in is not None:
        d_residual_in = d_residual_in[:, :num_columns]
        check_matrix("d_residual_in", d_residual_in, dtype, num_rows, num_columns)
    check_vector("weight_K", weight_K, dtype, num_columns)
    check_vector("rstd_M", rstd_M, statistics_dtype(dtype), num_rows)
    if num_rows == 0:
        return

    mask = draw(dropout)
    device = dx_MK.device
    widths = [columns for columns in (rank_columns, adapter_columns) if columns]
    in_kernel = bool(widths) and _in_kernel("rms_norm_backward", dropout, dx_MK, widths)
    with launch.on_device(dx_MK):
        if in_kernel:
            config = launch.launch_config("rms_norm_backward_tiles", device, num_columns)
            _rms_norm_backward_tiles[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
                dx_MK, g_MP, a_PK, residual_MK, rstd_M, weight_K, d_residual_in, sb_KP, out_aug,
                x_out, stride(dx_MK), stride(g_MP), stride(a_PK), stride(residual_MK),
                stride(d_residual_in), stride(sb_KP), stride(out_aug), stride(x_out), num_rows,
                *mask, K=num_columns, P=rank_columns, ADAPTER_P=adapter_columns,
                ACC=accumulator(dtype), **config,
            )  # fmt: skip
            return
        adapter_dx_MK = None if g_MP is None or a_PK is None else torch.mm(g_MP, a_PK)
        config = launch.launch_config("rms_norm_backward_rows", device, num_columns)
        _rms_norm_backward_rows[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
            dx_MK, adapter_dx_MK, residual_MK, rstd_M, weight_K, d_residual_in, out_aug, x_out,
            stride(dx_MK), stride(residual_MK), stride(d_residual_in), stride(out_aug),
            stride(x_out), num_rows, *mask, K=num_columns, ACC=accumulator(dtype),
            BLOCK_K=triton.next_power_of_2(num_columns), **config,
        )  # fmt: skip
    if sb_KP is not None:
        # cuBLAS writes with a row stride: no copy
        torch.mm(out_aug[:, :num_columns], sb_KP, out=out_aug[:, num_columns:])


def _in_kernel(
    operation: str, dropout: Dropout | None, tensor: torch.Tensor, rank_columns: list[int]
) -> bool:
    """Whether the tiles make the products; "mm" costs more with dropout, hence its own entry."""
    name = operation if dropout is None else f"{operation}_dropout"
    config = launch.launch_config(name, tensor.device, tensor.shape[1])
    return (
        config["PRODUCT"] == "kernel"
        and tensor.element_size() <= _BYTES_IN_KERNEL
        and all(columns in _RANK_COLUMNS_IN_KERNEL for columns in rank_columns)
    )
