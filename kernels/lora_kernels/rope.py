"""Rotary position embedding of queries and keys, forward and backward, with Qwen3's head norms.

    forward    y = rotate(x)  or  y = rotate(n),  n = x * rstd * weight,  for each head of q and k
               rstd = rsqrt(mean_d(x^2) + eps)
               rotate(x) = [ x1 * cos - x2 * sin | x2 * cos + x1 * sin ],  x = [x1 | x2] in halves
    backward   g = transpose of rotate (dy)
               dx = g  or  dx = rstd * (g * weight - m * mean_d(g * weight * m)),  m = x * rstd
               out_aug = [ dxq | dxk | dv | G ],  G of q = dxq @ sb[rows of q], ..., each in the
               slot of its module

Letters: M tokens, D columns of a head, Hq heads of q, Hkv of k and of v, N = (Hq + 2 Hkv) D, P
padded rank columns (0 without an adapter). Tensors are bf16, fp16, fp32 or fp64; the angles and all
sums are in fp32 (fp64 for fp64), every output is rounded once. Nothing is saved: the norms are
recomputed from their input.

All is bound by memory. Elementwise work is cut into BLOCK_M tokens of BLOCK_H heads, which share
their cosines; what is in place wants tiles of no fewer elements than threads, or a second thread
could read what the first wrote. The products are made one of two ways, the entry PRODUCT of the
launch table:

    "mm"      one cuBLAS product with all of sb, block diagonal as it is. It reads [M, N] once more,
              partly out of L2.
    "kernel"  a program walks over all heads of BLOCK_M tokens and multiplies each while it is in
              registers. bf16 and fp16, slots of 64 columns at most: wider elements or accumulators
              fill the registers.
"""

from __future__ import annotations

from typing import NamedTuple

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

# M may change with every step: not worth another compilation
_CHANGING = ["num_rows"]
# what is wider takes "mm"
_MAX_COLUMNS_IN_KERNEL = 64
_BYTES_IN_KERNEL = 2


class HeadNorms(NamedTuple):
    """The RMSNorms of each head of q and of k, before the rotation."""

    q_weight: torch.Tensor
    """(D,), in the dtype of what is normed."""
    k_weight: torch.Tensor
    """(D,), likewise."""
    eps: float
    """Added to the mean of squares."""


@triton.constexpr_function
def _dot_block(width):
    """Columns of a tile that holds `width`; tl.dot wants 16 at least and powers of two."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _load_angles(
    cos_ptr,
    sin_ptr,
    stride_cos,
    stride_sin,
    first_row,
    in_rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile_rows = tl.arange(0, BLOCK_M)[:, None]
    halves = tl.arange(0, _dot_block(D // 2))[None, :]
    inside = in_rows[:, None] & (halves < D // 2)
    cos = tl.load(cos_ptr + first_row * stride_cos + (tile_rows * stride_cos + halves), inside, 0.0)
    sin = tl.load(sin_ptr + first_row * stride_sin + (tile_rows * stride_sin + halves), inside, 0.0)
    return cos, sin


@triton.jit
def _rstd(x_1, x_2, EPS: tl.constexpr, D: tl.constexpr):
    return tl.rsqrt(tl.sum(x_1 * x_1 + x_2 * x_2, -1, keep_dims=True) / D + EPS)


@triton.jit
def _forward_halves(x_1, x_2, cos, sin, weight_1, weight_2, EPS: tl.constexpr, D: tl.constexpr):
    """Return both halves of heads, the last axis, rotated; normed before if weight_1 is a tile."""
    if weight_1 is not None:
        rstd = _rstd(x_1, x_2, EPS, D)
        x_1 = x_1 * rstd * weight_1
        x_2 = x_2 * rstd * weight_2
    return x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin


@triton.jit
def _backward_halves(
    d_1, d_2, cos, sin, x_1, x_2, weight_1, weight_2, EPS: tl.constexpr, D: tl.constexpr
):
    """Return the gradients of x_1 and x_2, which are read where `_forward_halves` normed."""
    g_1 = d_1 * cos + d_2 * sin
    g_2 = d_2 * cos - d_1 * sin
    if weight_1 is not None:
        rstd = _rstd(x_1, x_2, EPS, D)
        m_1 = x_1 * rstd
        m_2 = x_2 * rstd
        g_1 *= weight_1
        g_2 *= weight_2
        mean = tl.sum(g_1 * m_1 + g_2 * m_2, -1, keep_dims=True) / D
        g_1 = rstd * (g_1 - m_1 * mean)
        g_2 = rstd * (g_2 - m_2 * mean)
    return g_1, g_2


@triton.jit
def _elementwise_tile(
    in_ptr,
    raw_ptr,
    weight_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    stride_in,
    stride_raw,
    stride_out,
    stride_cos,
    stride_sin,
    first_row,
    in_rows,
    first_head,
    FIRST_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Take a tile of one module through; its heads come after FIRST_HEAD others in the output."""
    HALF: tl.constexpr = D // 2
    tile_rows = tl.arange(0, BLOCK_M)
    heads = first_head + tl.arange(0, BLOCK_H)
    halves = tl.arange(0, _dot_block(HALF))
    in_half = halves < HALF
    inside = in_rows[:, None, None] & ((heads < NUM_HEADS)[:, None] & in_half[None, :])[None, :, :]
    dtype = out_ptr.dtype.element_ty

    columns = ((heads * D)[:, None] + halves[None, :])[None, :, :]
    in_ptrs = in_ptr + first_row * stride_in + ((tile_rows * stride_in)[:, None, None] + columns)
    x_1 = tl.load(in_ptrs, inside, 0.0)
    x_2 = tl.load(in_ptrs + HALF, inside, 0.0)
    columns += FIRST_HEAD * D
    if ROTATE:
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, stride_cos, stride_sin, first_row, in_rows, D, BLOCK_M
        )
        cos = cos[:, None, :]
        sin = sin[:, None, :]
        x_1 = x_1.to(ACC)
        x_2 = x_2.to(ACC)
        raw_1 = None
        raw_2 = None
        weight_1 = None
        weight_2 = None
        if weight_ptr is not None:
            weight_1 = tl.load(weight_ptr + halves, in_half, 0.0).to(ACC)[None, None, :]
            weight_2 = tl.load(weight_ptr + HALF + halves, in_half, 0.0).to(ACC)[None, None, :]
        if BACKWARD:
            if weight_ptr is not None:
                raw_ptrs = raw_ptr + first_row * stride_raw
                raw_ptrs += (tile_rows * stride_raw)[:, None, None] + columns
                raw_1 = tl.load(raw_ptrs, inside, 0.0).to(ACC)
                raw_2 = tl.load(raw_ptrs + HALF, inside, 0.0).to(ACC)
            x_1, x_2 = _backward_halves(
                x_1, x_2, cos, sin, raw_1, raw_2, weight_1, weight_2, EPS, D
            )
        else:
            x_1, x_2 = _forward_halves(x_1, x_2, cos, sin, weight_1, weight_2, EPS, D)
    out_ptrs = out_ptr + first_row * stride_out
    out_ptrs += (tile_rows * stride_out)[:, None, None] + columns
    tl.store(out_ptrs, x_1.to(dtype), inside)
    tl.store(out_ptrs + HALF, x_2.to(dtype), inside)


@triton.jit(do_not_specialize=_CHANGING)
def _rope_elementwise(
    q_ptr,
    k_ptr,
    v_ptr,
    raw_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_raw,
    stride_out,
    stride_cos,
    stride_sin,
    num_rows,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    QK_BLOCKS: tl.constexpr = Q_BLOCKS + KV_BLOCKS
    NUM_BLOCKS: tl.constexpr = QK_BLOCKS if v_ptr is None else QK_BLOCKS + KV_BLOCKS
    # consecutive programs take the heads of the same rows: a compact piece of memory
    block = tl.program_id(0) % NUM_BLOCKS
    # 64 bits once per program: within a tile 32 bits reach
    first_row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64) * BLOCK_M
    in_rows = first_row + tl.arange(0, BLOCK_M) < num_rows
    if block < Q_BLOCKS:
        _elementwise_tile(
            q_ptr, raw_ptr, q_weight_ptr, out_ptr, cos_ptr, sin_ptr, stride_q, stride_raw,
            stride_out, stride_cos, stride_sin, first_row, in_rows, block * BLOCK_H,
            0, Q_HEADS, True, BACKWARD, D, EPS, ACC, BLOCK_M, BLOCK_H,
        )  # fmt: skip
    elif block < QK_BLOCKS:
        _elementwise_tile(
            k_ptr, raw_ptr, k_weight_ptr, out_ptr, cos_ptr, sin_ptr, stride_k, stride_raw,
            stride_out, stride_cos, stride_sin, first_row, in_rows, (block - Q_BLOCKS) * BLOCK_H,
            Q_HEADS, KV_HEADS, True, BACKWARD, D, EPS, ACC, BLOCK_M, BLOCK_H,
        )  # fmt: skip
    elif v_ptr is not None:
        _elementwise_tile(
            v_ptr, None, None, out_ptr, cos_ptr, sin_ptr, stride_v, stride_raw,
            stride_out, stride_cos, stride_sin, first_row, in_rows, (block - QK_BLOCKS) * BLOCK_H,
            Q_HEADS + KV_HEADS, KV_HEADS, False, BACKWARD, D, EPS, ACC, BLOCK_M, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _backward_module(
    d_ptr,
    raw_ptr,
    weight_ptr,
    out_ptr,
    sb_ptr,
    cos,
    sin,
    stride_d,
    stride_raw,
    stride_out,
    stride_sb,
    in_rows,
    FIRST_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    STORE: tl.constexpr,
    SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Take all heads of one module through, and their product with `sb` into its slot of G."""
    HALF: tl.constexpr = D // 2
    tile_rows = tl.arange(0, BLOCK_M)
    halves = tl.arange(0, _dot_block(HALF))
    ranks = tl.arange(0, _dot_block(WIDTH))
    in_half = halves < HALF
    inside = in_rows[:, None] & in_half[None, :]
    in_ranks = (ranks < WIDTH)[None, :]
    in_sb = in_half[:, None] & in_ranks
    dtype = out_ptr.dtype.element_ty
    weight_1 = None
    weight_2 = None
    if weight_ptr is not None:
        weight_1 = tl.load(weight_ptr + halves, in_half, 0.0).to(ACC)[None, :]
        weight_2 = tl.load(weight_ptr + HALF + halves, in_half, 0.0).to(ACC)[None, :]

    acc = tl.zeros([BLOCK_M, _dot_block(WIDTH)], ACC)
    for head in range(NUM_HEADS):
        columns = head * D + halves
        d_ptrs = d_ptr + (tile_rows[:, None] * stride_d + columns[None, :])
        d_1 = tl.load(d_ptrs, inside, 0.0)
        d_2 = tl.load(d_ptrs + HALF, inside, 0.0)
        columns += FIRST_HEAD * D
        if ROTATE:
            raw_1 = None
            raw_2 = None
            if weight_ptr is not None:
                raw_ptrs = raw_ptr + (tile_rows[:, None] * stride_raw + columns[None, :])
                raw_1 = tl.load(raw_ptrs, inside, 0.0, eviction_policy="evict_first").to(ACC)
                raw_2 = tl.load(raw_ptrs + HALF, inside, 0.0, eviction_policy="evict_first").to(ACC)
            g_1, g_2 = _backward_halves(
                d_1.to(ACC), d_2.to(ACC), cos, sin, raw_1, raw_2, weight_1, weight_2, EPS, D
            )
            d_1 = g_1.to(dtype)
            d_2 = g_2.to(dtype)
        if STORE:
            out_ptrs = out_ptr + (tile_rows[:, None] * stride_out + columns[None, :])
            tl.store(out_ptrs, d_1, inside)
            tl.store(out_ptrs + HALF, d_2, inside)
        if WIDTH > 0:
            # N * stride can pass 2^31
            sb_rows = columns.to(tl.int64)[:, None] * stride_sb
            sb_ptrs = sb_ptr + (sb_rows + (SLOT + ranks)[None, :])
            sb_1 = tl.load(sb_ptrs, in_sb, 0.0, eviction_policy="evict_last")
            sb_2 = tl.load(sb_ptrs + HALF * stride_sb, in_sb, 0.0, eviction_policy="evict_last")
            acc = tl.dot(d_1, sb_1, acc, input_precision="ieee", out_dtype=ACC)
            acc = tl.dot(d_2, sb_2, acc, input_precision="ieee", out_dtype=ACC)
    if WIDTH > 0:
        g_ptrs = out_ptr + (tile_rows[:, None] * stride_out + (N + SLOT + ranks)[None, :])
        tl.store(g_ptrs, acc.to(dtype), in_rows[:, None] & in_ranks)


@triton.jit(do_not_specialize=_CHANGING)
def _rope_backward_product(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    raw_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,
    sb_ptr,
    cos_ptr,
    sin_ptr,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_raw,
    stride_out,
    stride_sb,
    stride_cos,
    stride_sin,
    num_rows,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    P: tl.constexpr,
    Q_SLOT: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_SLOT: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_IN_PLACE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    N: tl.constexpr = (Q_HEADS + 2 * KV_HEADS) * D
    # 64 bits once per program: within a tile 32 bits reach
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    out_ptr += first_row * stride_out
    if raw_ptr is not None:
        raw_ptr += first_row * stride_raw
    tile_rows = tl.arange(0, BLOCK_M)
    in_rows = first_row + tile_rows < num_rows
    cos, sin = _load_angles(
        cos_ptr, sin_ptr, stride_cos, stride_sin, first_row, in_rows, D, BLOCK_M
    )

    _backward_module(
        dq_ptr + first_row * stride_dq, raw_ptr, q_weight_ptr, out_ptr, sb_ptr, cos, sin,
        stride_dq, stride_raw, stride_out, stride_sb, in_rows, 0, Q_HEADS, True, True,
        Q_SLOT, Q_WIDTH, N, D, EPS, ACC, BLOCK_M,
    )  # fmt: skip
    _backward_module(
        dk_ptr + first_row * stride_dk, raw_ptr, k_weight_ptr, out_ptr, sb_ptr, cos, sin,
        stride_dk, stride_raw, stride_out, stride_sb, in_rows, Q_HEADS, KV_HEADS, True, True,
        K_SLOT, K_WIDTH, N, D, EPS, ACC, BLOCK_M,
    )  # fmt: skip
    _backward_module(
        dv_ptr + first_row * stride_dv, None, None, out_ptr, sb_ptr, cos, sin,
        stride_dv, stride_raw, stride_out, stride_sb, in_rows, Q_HEADS + KV_HEADS, KV_HEADS, False,
        not V_IN_PLACE, V_SLOT, V_WIDTH, N, D, EPS, ACC, BLOCK_M,
    )  # fmt: skip

    columns = tl.arange(0, triton.next_power_of_2(P))
    in_q = (columns >= Q_SLOT) & (columns < Q_SLOT + Q_WIDTH)
    in_k = (columns >= K_SLOT) & (columns < K_SLOT + K_WIDTH)
    in_v = (columns >= V_SLOT) & (columns < V_SLOT + V_WIDTH)
    is_free = (columns < P) & ~(in_q | in_k | in_v)
    zeros = tl.zeros([BLOCK_M, triton.next_power_of_2(P)], out_ptr.dtype.element_ty)
    g_ptrs = out_ptr + (tile_rows[:, None] * stride_out + (N + columns)[None, :])
    tl.store(g_ptrs, zeros, in_rows[:, None] & is_free[None, :])


def rope_forward(
    qkv_MN: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
    out_qk: torch.Tensor | None = None,
) -> None:
    """Rotate the heads of q and k: in place, or with `norms` into `out_qk`.

    Rows may have any stride. The formulas are above.

    Args:
        qkv_MN: (M, N), [q | k | v]; without `norms` q and k are overwritten, with them it is only
            read.
        cos: (M, D/2), fp32 (fp64 when `qkv_MN` is), of the angles of each token.
        sin: likewise.
        num_heads: Hq.
        num_kv_heads: Hkv.
        norms: of each head, before the rotation.
        out_qk: (M, (Hq+Hkv) D), output, rotated [q | k]; given exactly when `norms` is.

    Raises:
        ValueError: shapes, strides or dtypes are not as said.
    """
    num_rows, num_columns = qkv_MN.shape
    num_all = num_heads + 2 * num_kv_heads
    head_columns = num_columns // num_all
    if num_columns != num_all * head_columns or head_columns % 2 != 0:
        raise ValueError(f"qkv_MN: {num_columns} columns are not {num_all} heads of even width")
    if (norms is None) != (out_qk is None):
        raise ValueError("out_qk is given exactly when norms are")
    dtype = qkv_MN.dtype
    check_matrix("qkv_MN", qkv_MN, dtype, num_rows, num_columns)
    _check_angles(cos, sin, dtype, num_rows, head_columns)
    _check_norms(norms, dtype, head_columns)
    rotated_columns = (num_heads + num_kv_heads) * head_columns
    check_matrix("out_qk", out_qk, dtype, num_rows, rotated_columns)
    if num_rows == 0:
        return

    q_columns = num_heads * head_columns
    _launch_elementwise(
        "rope_forward", qkv_MN[:, :q_columns], qkv_MN[:, q_columns:rotated_columns], None, None,
        qkv_MN if out_qk is None else out_qk, cos, sin, norms,
    )  # fmt: skip


def rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    out_aug: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sb: torch.Tensor | None,
    *,
    slots: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    norms: HeadNorms | None = None,
    qkv_MN: torch.Tensor | None = None,
) -> None:
    """Write `[dq' | dk' | dv | G]`: the gradients of what was rotated, and their rank products.

    All tensors but the angles have one dtype; rows may have any stride. The formulas are above.

    Args:
        dq: (M, Hq D), gradient of the rotated q; may be its columns of `out_aug`.
        dk: (M, Hkv D), likewise of k.
        dv: (M, Hkv D), gradient of v; may be its columns of `out_aug`.
        out_aug: (M, N+P), output.
        cos: (M, D/2), fp32 (fp64 when the others are), as in the forward.
        sin: likewise.
        sb: (N, P), up to the end of the last slot the rows of each module are zero outside its own;
            columns behind are not read (a bias may stand there). None without an adapter.
        slots: first column and width of the parts of q, k and v in G; the columns of no slot are
            zero.
        norms: as in the forward.
        qkv_MN: (M, N), input of the forward; given exactly when `norms` is.

    Raises:
        ValueError: shapes, strides, dtypes or slots are not as said.
    """
    num_rows, head_columns = dq.shape[0], 2 * cos.shape[1]
    num_heads, num_kv_heads = dq.shape[1] // head_columns, dk.shape[1] // head_columns
    q_columns, kv_columns = num_heads * head_columns, num_kv_heads * head_columns
    num_columns = q_columns + 2 * kv_columns
    rank_columns = out_aug.shape[1] - num_columns
    dtype, device = dq.dtype, dq.device
    if (norms is None) != (qkv_MN is None):
        raise ValueError("qkv_MN is given exactly when norms are")
    check_matrix("dq", dq, dtype, num_rows, q_columns)
    check_matrix("dk", dk, dtype, num_rows, kv_columns)
    check_matrix("dv", dv, dtype, num_rows, kv_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, num_columns + max(0, rank_columns))
    check_matrix("sb", sb, dtype, num_columns, rank_columns)
    check_matrix("qkv_MN", qkv_MN, dtype, num_rows, num_columns)
    _check_angles(cos, sin, dtype, num_rows, head_columns)
    _check_norms(norms, dtype, head_columns)
    _check_slots(slots, rank_columns, has_adapter=sb is not None)
    if num_rows == 0:
        return

    # v has no rotation: where it is in place there is nothing to do
    v_in_place = dv.data_ptr() == out_aug[:, q_columns + kv_columns :].data_ptr()
    (q_slot, q_width), (k_slot, k_width), (v_slot, v_width) = slots
    width = max(q_width, k_width, v_width)
    if sb is not None and _in_kernel(dq, width, num_columns):
        config = launch.launch_config("rope_backward_product", device, num_columns)
        q_weight, k_weight, eps = (None, None, 0.0) if norms is None else norms
        with launch.on_device(dq):
            _rope_backward_product[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
                dq, dk, dv, qkv_MN, q_weight, k_weight, out_aug, sb, cos, sin, stride(dq),
                stride(dk), stride(dv), stride(qkv_MN), stride(out_aug), stride(sb), stride(cos),
                stride(sin), num_rows, Q_HEADS=num_heads, KV_HEADS=num_kv_heads, D=head_columns,
                EPS=eps, P=rank_columns, Q_SLOT=q_slot, Q_WIDTH=q_width, K_SLOT=k_slot,
                K_WIDTH=k_width, V_SLOT=v_slot, V_WIDTH=v_width, V_IN_PLACE=v_in_place,
                ACC=accumulator(dtype), **config,
            )  # fmt: skip
        return
    _launch_elementwise(
        "rope_backward_elementwise", dq, dk, None if v_in_place else dv, qkv_MN, out_aug, cos, sin,
        norms,
    )  # fmt: skip
    used_columns = max(first + width for first, width in slots if width > 0) if width > 0 else 0
    g_MP = out_aug[:, num_columns:]
    if sb is not None and used_columns > 0:
        # cuBLAS writes with a row stride: no copy
        torch.mm(out_aug[:, :num_columns], sb[:, :used_columns], out=g_MP[:, :used_columns])
    if used_columns < rank_columns:
        g_MP[:, used_columns:].zero_()


def _launch_elementwise(
    operation: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    raw: torch.Tensor | None,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
) -> None:
    head_columns = 2 * cos.shape[1]
    num_heads, num_kv_heads = q.shape[1] // head_columns, k.shape[1] // head_columns
    q_weight, k_weight, eps = (None, None, 0.0) if norms is None else norms
    config = launch.launch_config(operation, q.device, q.shape[1] + k.shape[1])
    kv_blocks = triton.cdiv(num_kv_heads, config["BLOCK_H"])
    num_blocks = triton.cdiv(num_heads, config["BLOCK_H"]) + kv_blocks
    if v is not None:
        num_blocks += kv_blocks
    with launch.on_device(q):
        _rope_elementwise[(triton.cdiv(q.shape[0], config["BLOCK_M"]) * num_blocks,)](
            q, k, v, raw, q_weight, k_weight, out, cos, sin, stride(q), stride(k), stride(v),
            stride(raw), stride(out), stride(cos), stride(sin), q.shape[0], Q_HEADS=num_heads,
            KV_HEADS=num_kv_heads, D=head_columns, EPS=eps,
            BACKWARD=operation == "rope_backward_elementwise", ACC=accumulator(q.dtype), **config,
        )  # fmt: skip


def _in_kernel(tensor: torch.Tensor, width: int, num_columns: int) -> bool:
    config = launch.launch_config("rope_backward", tensor.device, num_columns)
    return (
        config["PRODUCT"] == "kernel"
        and tensor.element_size() <= _BYTES_IN_KERNEL
        and 0 < width <= _MAX_COLUMNS_IN_KERNEL
    )


def _check_angles(
    cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, num_rows: int, head_columns: int
) -> None:
    for name, angles in (("cos", cos), ("sin", sin)):
        check_matrix(name, angles, statistics_dtype(dtype), num_rows, head_columns // 2)


def _check_norms(norms: HeadNorms | None, dtype: torch.dtype, head_columns: int) -> None:
    if norms is not None:
        check_vector("q_weight", norms.q_weight, dtype, head_columns)
        check_vector("k_weight", norms.k_weight, dtype, head_columns)


def _check_slots(slots: tuple[tuple[int, int], ...], rank_columns: int, has_adapter: bool) -> None:
    end = 0
    for first, width in sorted(slot for slot in slots if slot[1] != 0):
        if width % 16 != 0 or width < 0 or first < 0 or first + width > rank_columns:
            raise ValueError(f"slots {slots}: not multiples of 16 within {rank_columns} columns")
        if first < end:
            raise ValueError(f"slots {slots}: they overlap")
        if not has_adapter:
            raise ValueError(f"slots {slots}: there is no adapter")
        end = first + width
