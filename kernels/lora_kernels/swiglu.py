"""SwiGLU, forward and backward, each with the rank products that ride on it.

    forward    act = silu(gate) * up                out_aug = [ act | drop(act) @ a^T ]
    backward   d = dact + drop(G @ A)               (drop(G @ A): only where dropout was on)
               dgate = d * up * s * (1 + gate * (1 - s)),  s = sigmoid(gate)
               dup = d * silu(gate)                 out_aug = [ dgate | dup | G of gate | G of up ]
               G of gate = dgate @ sb[:N],  G of up = dup @ sb[N:],  each in the slot of its module

Letters: M tokens, N features of gate and of up, R rank columns of one module, P padded rank columns
of the group (0 without an adapter). Tensors are bf16, fp16, fp32 or fp64; sums are kept in fp32
(fp64 for fp64), every output is rounded once. Only gate and up are saved by the forward: act and
the dropout mask are recomputed from them.

Both operations are bound by memory: three [M, N] tensors forward, six backward. A program walks
over BLOCK_M rows of one of NUM_SPLITS ranges of columns, in tiles, and multiplies each tile by its
part of `a` or `sb` while it is in registers. Those parts come out of L2 once per block of rows, so
it should be tall (32 to 128). The ranges are there for enough programs to fill the GPU; their
partial products, in fp32, are added in a fixed order by a second, small kernel, which also
writes the padding. Consecutive programs take the ranges of the same rows: what is under way at one
time is then a compact piece of memory.

Slots wider than 64 columns would fill the registers with accumulators. There, and without an
adapter, a program makes one tile elementwise, and the products are left to cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import (
    accumulator,
    check_matrix,
    stride,
)
from lora_kernels.dropout import Dropout, draw, drop

# seeds change with every step and M may: neither is worth another compilation
_CHANGING = ["num_rows", "seed", "stream", "threshold"]
# what is wider is left to cuBLAS
_MAX_COLUMNS_IN_KERNEL = 64


@triton.jit
def _sigmoid(x, one):
    # 1 as an argument: if all but loaded values were constants, the compiler would bring these to
    # the layout that tl.dot wants, and compute everything once more there beside that of the stores
    return one / (one + tl.exp(-x))


@triton.jit(do_not_specialize=_CHANGING)
def _swiglu_forward(
    gate_up_ptr,
    a_ptr,
    out_ptr,
    dropped_ptr,
    partial_ptr,
    stride_gate_up,
    stride_a,
    stride_out,
    num_rows,
    one,
    seed,
    stream,
    threshold,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    COLUMNS_PER_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0) % NUM_SPLITS
    # 64 bits once per program: within a tile 32 bits reach
    first_row = (tl.program_id(0) // NUM_SPLITS).to(tl.int64) * BLOCK_M
    gate_up_ptr += first_row * stride_gate_up
    out_ptr += first_row * stride_out
    if dropped_ptr is not None:
        dropped_ptr += first_row * N
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    dtype = out_ptr.dtype.element_ty
    ranks = tl.arange(0, RANK_BLOCK)

    h = tl.zeros([BLOCK_M, RANK_BLOCK], ACC)
    first_column = split * COLUMNS_PER_SPLIT
    for start in range(first_column, tl.minimum(first_column + COLUMNS_PER_SPLIT, N), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        if EVEN:
            inside = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
            in_columns = tl.full([1, BLOCK_N], True, tl.int1)
        else:
            in_columns = (columns < N)[None, :]
            inside = (rows < num_rows)[:, None] & in_columns
        gate_ptrs = gate_up_ptr + (tile_rows[:, None] * stride_gate_up + columns[None, :])
        gate = tl.load(gate_ptrs, inside, 0.0, eviction_policy="evict_first").to(ACC)
        up = tl.load(gate_ptrs + N, inside, 0.0, eviction_policy="evict_first").to(ACC)
        act = gate * _sigmoid(gate, one) * up
        out_offsets = tile_rows[:, None] * stride_out + columns[None, :]
        tl.store(out_ptr + out_offsets, act.to(dtype), inside)
        if HAS_DROPOUT:
            act = drop(act, seed, stream, threshold, rows, columns, ACC)
        if dropped_ptr is not None:
            offsets = tile_rows[:, None] * N + columns[None, :]
            tl.store(dropped_ptr + offsets, act.to(dtype), inside)
        if RANK > 0:
            a_offsets = ranks[:, None] * stride_a + columns[None, :]
            in_a = in_columns & (ranks < RANK)[:, None]
            a = tl.load(a_ptr + a_offsets, in_a, 0.0, eviction_policy="evict_last")
            h = tl.dot(act.to(dtype), tl.trans(a), h, input_precision="ieee", out_dtype=ACC)

    if RANK > 0:
        offsets = (split * num_rows.to(tl.int64) + rows)[:, None] * RANK + ranks[None, :]
        in_h = (rows < num_rows)[:, None] & (ranks < RANK)[None, :]
        tl.store(partial_ptr + offsets, h, in_h)


@triton.jit(do_not_specialize=_CHANGING)
def _swiglu_backward(
    gate_up_ptr,
    dact_ptr,
    adapter_dact_ptr,
    g_ptr,
    a_ptr,
    sb_ptr,
    out_ptr,
    act_out_ptr,
    partial_ptr,
    stride_gate_up,
    stride_dact,
    stride_g,
    stride_a,
    stride_sb,
    stride_out,
    stride_act_out,
    num_rows,
    one,
    seed,
    stream,
    threshold,
    N: tl.constexpr,
    ADAPTER_RANK: tl.constexpr,
    ADAPTER_BLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    UP_FIRST: tl.constexpr,
    UP_WIDTH: tl.constexpr,
    UP_BLOCK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    COLUMNS_PER_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0) % NUM_SPLITS
    # 64 bits once per program: within a tile 32 bits reach
    first_row = (tl.program_id(0) // NUM_SPLITS).to(tl.int64) * BLOCK_M
    gate_up_ptr += first_row * stride_gate_up
    dact_ptr += first_row * stride_dact
    out_ptr += first_row * stride_out
    if act_out_ptr is not None:
        act_out_ptr += first_row * stride_act_out
    if adapter_dact_ptr is not None:
        adapter_dact_ptr += first_row * N
    tile_rows = tl.arange(0, BLOCK_M)
    rows = first_row + tile_rows
    dtype = out_ptr.dtype.element_ty
    gate_ranks = tl.arange(0, GATE_BLOCK)
    up_ranks = tl.arange(0, UP_BLOCK)
    adapter_ranks = tl.arange(0, ADAPTER_BLOCK)
    if ADAPTER_RANK > 0:
        g_offsets = tile_rows[:, None] * stride_g + adapter_ranks[None, :]
        in_g = (rows < num_rows)[:, None] & (adapter_ranks < ADAPTER_RANK)[None, :]
        g = tl.load(g_ptr + first_row * stride_g + g_offsets, in_g, 0.0)

    gate_acc = tl.zeros([BLOCK_M, GATE_BLOCK], ACC)
    up_acc = tl.zeros([BLOCK_M, UP_BLOCK], ACC)
    first_column = split * COLUMNS_PER_SPLIT
    for start in range(first_column, tl.minimum(first_column + COLUMNS_PER_SPLIT, N), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        if EVEN:
            inside = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
            in_columns = tl.full([BLOCK_N], True, tl.int1)
        else:
            in_columns = columns < N
            inside = (rows < num_rows)[:, None] & in_columns[None, :]
        dact_offsets = tile_rows[:, None] * stride_dact + columns[None, :]
        dact = tl.load(dact_ptr + dact_offsets, inside, 0.0, eviction_policy="evict_first")
        d = dact.to(ACC)
        if adapter_dact_ptr is not None:
            offsets = tile_rows[:, None] * N + columns[None, :]
            term = tl.load(adapter_dact_ptr + offsets, inside, 0.0, eviction_policy="evict_first")
            d += drop(term.to(ACC), seed, stream, threshold, rows, columns, ACC)
        if ADAPTER_RANK > 0:
            a_offsets = adapter_ranks[:, None] * stride_a + columns[None, :]
            in_a = (adapter_ranks < ADAPTER_RANK)[:, None] & in_columns[None, :]
            a = tl.load(a_ptr + a_offsets, in_a, 0.0, eviction_policy="evict_last")
            term = tl.dot(g, a, input_precision="ieee", out_dtype=ACC)
            d += drop(term, seed, stream, threshold, rows, columns, ACC)

        gate_ptrs = gate_up_ptr + (tile_rows[:, None] * stride_gate_up + columns[None, :])
        gate = tl.load(gate_ptrs, inside, 0.0, eviction_policy="evict_first").to(ACC)
        up = tl.load(gate_ptrs + N, inside, 0.0, eviction_policy="evict_first").to(ACC)
        s = _sigmoid(gate, one)
        silu = gate * s
        d_gate = (d * up * (s + silu * (1 - s))).to(dtype)
        d_up = (d * silu).to(dtype)
        out_ptrs = out_ptr + (tile_rows[:, None] * stride_out + columns[None, :])
        tl.store(out_ptrs, d_gate, inside)
        tl.store(out_ptrs + N, d_up, inside)
        if act_out_ptr is not None:
            act = silu * up
            if HAS_DROPOUT:
                act = drop(act, seed, stream, threshold, rows, columns, ACC)
            if IN_PLACE:
                # another thread may have read what this one overwrites: an element that depends
                # on what was in its place cannot come first (a barrier would end the pipelining)
                act = tl.where(d == d, act, float("nan"))
            offsets = tile_rows[:, None] * stride_act_out + columns[None, :]
            tl.store(act_out_ptr + offsets, act.to(dtype), inside)

        # N * stride can pass 2^31
        sb_rows = columns.to(tl.int64)[:, None]
        if GATE_WIDTH > 0:
            offsets = sb_rows * stride_sb + (GATE_FIRST + gate_ranks)[None, :]
            in_sb = in_columns[:, None] & (gate_ranks < GATE_WIDTH)[None, :]
            sb = tl.load(sb_ptr + offsets, in_sb, 0.0, eviction_policy="evict_last")
            gate_acc = tl.dot(d_gate, sb, gate_acc, input_precision="ieee", out_dtype=ACC)
        if UP_WIDTH > 0:
            offsets = (sb_rows + N) * stride_sb + (UP_FIRST + up_ranks)[None, :]
            in_sb = in_columns[:, None] & (up_ranks < UP_WIDTH)[None, :]
            sb = tl.load(sb_ptr + offsets, in_sb, 0.0, eviction_policy="evict_last")
            up_acc = tl.dot(d_up, sb, up_acc, input_precision="ieee", out_dtype=ACC)

    partial_rows = (split * num_rows.to(tl.int64) + rows)[:, None] * (GATE_WIDTH + UP_WIDTH)
    if GATE_WIDTH > 0:
        in_acc = (rows < num_rows)[:, None] & (gate_ranks < GATE_WIDTH)[None, :]
        tl.store(partial_ptr + partial_rows + gate_ranks[None, :], gate_acc, in_acc)
    if UP_WIDTH > 0:
        in_acc = (rows < num_rows)[:, None] & (up_ranks < UP_WIDTH)[None, :]
        tl.store(partial_ptr + partial_rows + (GATE_WIDTH + up_ranks)[None, :], up_acc, in_acc)


@triton.jit(do_not_specialize=_CHANGING)
def _swiglu_sum_splits(
    partial_ptr,
    out_ptr,
    stride_out,
    num_rows,
    P: tl.constexpr,
    P_BLOCK: tl.constexpr,
    FIRST_0: tl.constexpr,
    WIDTH_0: tl.constexpr,
    FIRST_1: tl.constexpr,
    WIDTH_1: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    ACC: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, P_BLOCK)
    in_rows = (rows < num_rows)[:, None]
    in_0 = (columns >= FIRST_0) & (columns < FIRST_0 + WIDTH_0)
    in_1 = (columns >= FIRST_1) & (columns < FIRST_1 + WIDTH_1)
    source = tl.where(in_0, columns - FIRST_0, columns - FIRST_1 + WIDTH_0)
    offsets = rows[:, None] * (WIDTH_0 + WIDTH_1) + source[None, :]
    in_partial = in_rows & (in_0 | in_1)[None, :]

    total = tl.zeros([BLOCK_M, P_BLOCK], ACC)
    # unrolled: no load waits for another
    for _ in tl.static_range(NUM_SPLITS):
        total += tl.load(partial_ptr + offsets, in_partial, 0.0)
        partial_ptr += num_rows.to(tl.int64) * (WIDTH_0 + WIDTH_1)
    total = tl.where((columns == ONES_COLUMN)[None, :], 1.0, total)
    out_ptrs = out_ptr + rows[:, None] * stride_out + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), in_rows & (columns < P)[None, :])


def swiglu_forward(
    gate_up_M2N: torch.Tensor,
    out_aug: torch.Tensor,
    a_PN: torch.Tensor | None,
    *,
    rank: int,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> None:
    """Write `[act | H]`; the formulas are above.

    All tensors have one dtype; rows may have any stride.

    Args:
        gate_up_M2N: (M, 2N), gate beside up.
        out_aug: (M, N+P), output.
        a_PN: (P, N), of the linear that consumes act; None without an adapter.
        rank: columns of H that are the product, the first ones; the others are zero.
        dropout: what the adapter sees of act is dropped so.
        ones_column: column of H that is 1, for a bias.

    Raises:
        ValueError: shapes, strides, dtypes or slots are not as said.
    """
    num_rows, num_columns = gate_up_M2N.shape[0], gate_up_M2N.shape[1] // 2
    rank_columns = out_aug.shape[1] - num_columns
    dtype, device = gate_up_M2N.dtype, gate_up_M2N.device
    check_matrix("gate_up_M2N", gate_up_M2N, dtype, num_rows, 2 * num_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, num_columns + rank_columns)
    check_matrix("a_PN", a_PN, dtype, rank_columns, num_columns)
    _check_slot("rank", (0, rank), rank_columns, has_adapter=a_PN is not None)
    if ones_column is not None and not rank <= ones_column < rank_columns:
        raise ValueError(f"ones_column {ones_column}: columns {rank} to {rank_columns} are free")
    if num_rows == 0:
        return

    in_kernel = 0 < rank <= _MAX_COLUMNS_IN_KERNEL
    with_mm = rank > _MAX_COLUMNS_IN_KERNEL
    if rank == 0:
        dropout = None
    config = _launch_parameters("swiglu_forward", in_kernel, device, num_rows, num_columns)
    partial = dropped_MN = None
    if in_kernel:
        partial = _empty_partial(config["NUM_SPLITS"], num_rows, rank, gate_up_M2N)
    if with_mm and dropout is not None:
        dropped_MN = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
    rank_in_kernel = rank if in_kernel else 0
    with launch.on_device(gate_up_M2N):
        _swiglu_forward[_grid(config, num_rows)](
            gate_up_M2N, a_PN, out_aug, dropped_MN, partial, stride(gate_up_M2N), stride(a_PN),
            stride(out_aug), num_rows, 1.0, *draw(dropout), N=num_columns, RANK=rank_in_kernel,
            RANK_BLOCK=_dot_block(rank_in_kernel), HAS_DROPOUT=dropout is not None,
            ACC=accumulator(dtype), **config,
        )  # fmt: skip
        if in_kernel:
            ones = -1 if ones_column is None else ones_column
            _sum_splits(
                partial, out_aug[:, num_columns:], (0, rank), (0, 0), ones, config["NUM_SPLITS"]
            )
            return
    if rank_columns > rank:
        out_aug[:, num_columns + rank :].zero_()
    if ones_column is not None:
        out_aug[:, num_columns + ones_column].fill_(1)
    if with_mm and a_PN is not None:
        x_MN = out_aug[:, :num_columns] if dropped_MN is None else dropped_MN
        # cuBLAS writes with a row stride: no copy
        torch.mm(x_MN, a_PN[:rank].T, out=out_aug[:, num_columns : num_columns + rank])


def swiglu_backward(
    gate_up_M2N: torch.Tensor,
    dact_MN: torch.Tensor,
    out_aug: torch.Tensor,
    sb: torch.Tensor | None,
    *,
    gate_slot: tuple[int, int],
    up_slot: tuple[int, int],
    act_out: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, Dropout] | None = None,
) -> None:
    """Write `[dgate | dup | G]`, and on request what the adapter saw of act.

    All tensors have one dtype; rows may have any stride. The formulas are above.

    Args:
        gate_up_M2N: (M, 2N), gate beside up.
        dact_MN: (M, N), gradient of act.
        out_aug: (M, 2N+P), output.
        sb: (2N, P), of the linears that made gate and up; None without an adapter.
        gate_slot: first column and width of gate's part of G; the columns of no slot are zero.
        up_slot: likewise for up.
        act_out: (M, N), output: drop(act), without `adapter` act; may be `dact_MN`, whose NaN
            then stay NaN.
        adapter: G (M, R), A (R, N) and the dropout of the linear that consumed act, where its
            `drop(G @ A)` is not in `dact_MN` yet.

    Raises:
        ValueError: shapes, strides, dtypes or slots are not as said.
    """
    num_rows, num_columns = dact_MN.shape
    rank_columns = out_aug.shape[1] - 2 * num_columns
    dtype, device = dact_MN.dtype, dact_MN.device
    g_MR, a_RN, dropout = (None, None, None) if adapter is None else adapter
    adapter_rank = 0 if a_RN is None else a_RN.shape[0]
    check_matrix("gate_up_M2N", gate_up_M2N, dtype, num_rows, 2 * num_columns)
    check_matrix("dact_MN", dact_MN, dtype, num_rows, num_columns)
    check_matrix("out_aug", out_aug, dtype, num_rows, 2 * num_columns + rank_columns)
    check_matrix("sb", sb, dtype, 2 * num_columns, rank_columns)
    check_matrix("act_out", act_out, dtype, num_rows, num_columns)
    check_matrix("G of adapter", g_MR, dtype, num_rows, adapter_rank)
    check_matrix("A of adapter", a_RN, dtype, adapter_rank, num_columns)
    _check_slot("gate_slot", gate_slot, rank_columns, has_adapter=sb is not None)
    _check_slot("up_slot", up_slot, rank_columns, has_adapter=sb is not None)
    slots = [gate_slot, up_slot]
    if all(width for _, width in slots) and not (
        sum(gate_slot) <= up_slot[0] or sum(up_slot) <= gate_slot[0]
    ):
        raise ValueError(f"slots overlap: {gate_slot} and {up_slot}")
    if num_rows == 0:
        return

    widths = [width for _, width in slots]
    in_kernel = 0 < max(widths) <= _MAX_COLUMNS_IN_KERNEL
    adapter_dact_MN = None
    if g_MR is not None and a_RN is not None and adapter_rank > _MAX_COLUMNS_IN_KERNEL:
        adapter_dact_MN = torch.mm(g_MR, a_RN)
        g_MR = a_RN = None
        adapter_rank = 0
    config = _launch_parameters(
        "swiglu_backward" if adapter_rank == 0 else "swiglu_backward_adapter",
        in_kernel or adapter_rank > 0, device, num_rows, num_columns,
    )  # fmt: skip
    partial = None
    if in_kernel:
        partial = _empty_partial(config["NUM_SPLITS"], num_rows, sum(widths), dact_MN)
    gate_width, up_width = widths if in_kernel else (0, 0)
    in_place = act_out is not None and act_out.data_ptr() == dact_MN.data_ptr()
    with launch.on_device(dact_MN):
        _swiglu_backward[_grid(config, num_rows)](
            gate_up_M2N, dact_MN, adapter_dact_MN, g_MR, a_RN, sb, out_aug, act_out, partial,
            stride(gate_up_M2N), stride(dact_MN), stride(g_MR), stride(a_RN), stride(sb),
            stride(out_aug), stride(act_out), num_rows, 1.0, *draw(dropout), N=num_columns,
            ADAPTER_RANK=adapter_rank, ADAPTER_BLOCK=_dot_block(adapter_rank),
            GATE_FIRST=gate_slot[0], GATE_WIDTH=gate_width, GATE_BLOCK=_dot_block(gate_width),
            UP_FIRST=up_slot[0], UP_WIDTH=up_width, UP_BLOCK=_dot_block(up_width),
            HAS_DROPOUT=dropout is not None, IN_PLACE=in_place, ACC=accumulator(dtype), **config,
        )  # fmt: skip
        if in_kernel:
            _sum_splits(
                partial, out_aug[:, 2 * num_columns :], gate_slot, up_slot, -1, config["NUM_SPLITS"]
            )
            return
    if rank_columns > 0:
        out_aug[:, 2 * num_columns :].zero_()
    if sb is None:
        return
    for index, (first, width) in enumerate(slots):
        if width > 0:
            part = slice(index * num_columns, (index + 1) * num_columns)
            start = 2 * num_columns + first
            # cuBLAS writes with a row stride: no copy
            torch.mm(
                out_aug[:, part], sb[part, first : first + width],
                out=out_aug[:, start : start + width],
            )  # fmt: skip


def _sum_splits(
    partial: torch.Tensor | None,
    out_MP: torch.Tensor,
    slot_0: tuple[int, int],
    slot_1: tuple[int, int],
    ones_column: int,
    num_splits: int,
) -> None:
    """Write the rank columns: the sums over the splits in their slots, elsewhere zero."""
    num_rows, rank_columns = out_MP.shape
    config = launch.launch_config("swiglu_sum_splits", out_MP.device, rank_columns)
    _swiglu_sum_splits[(triton.cdiv(num_rows, config["BLOCK_M"]),)](
        partial, out_MP, stride(out_MP), num_rows, P=rank_columns,
        P_BLOCK=triton.next_power_of_2(rank_columns), FIRST_0=slot_0[0], WIDTH_0=slot_0[1],
        FIRST_1=slot_1[0], WIDTH_1=slot_1[1], ONES_COLUMN=ones_column,
        ACC=accumulator(out_MP.dtype), NUM_SPLITS=num_splits, **config,
    )  # fmt: skip


def _launch_parameters(
    operation: str, in_kernel: bool, device: torch.device, num_rows: int, num_columns: int
) -> dict[str, Any]:
    """Return the entry of the table, with the splits fitted to the columns there are."""
    name = operation if in_kernel else f"{operation}_elementwise"
    config = launch.launch_config(name, device, num_columns)
    num_tiles = triton.cdiv(num_columns, config["BLOCK_N"])
    # one tile for each program where nothing is summed
    tiles_per_split = triton.cdiv(num_tiles, config["NUM_SPLITS"]) if in_kernel else 1
    config["NUM_SPLITS"] = triton.cdiv(num_tiles, tiles_per_split)
    config["COLUMNS_PER_SPLIT"] = tiles_per_split * config["BLOCK_N"]
    config["EVEN"] = num_rows % config["BLOCK_M"] == 0 and num_columns % config["BLOCK_N"] == 0
    return config


def _grid(config: dict[str, Any], num_rows: int) -> tuple[int]:
    return (triton.cdiv(num_rows, config["BLOCK_M"]) * config["NUM_SPLITS"],)


def _empty_partial(num_splits: int, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(num_splits, num_rows, width, dtype=dtype, device=like.device)


def _dot_block(width: int) -> int:
    """Columns of a tile that holds `width`; tl.dot wants 16 at least and powers of two."""
    return max(16, triton.next_power_of_2(width))


def _check_slot(name: str, slot: tuple[int, int], rank_columns: int, has_adapter: bool) -> None:
    first, width = slot
    if width % 16 != 0 or not 0 <= first <= first + width <= rank_columns:
        raise ValueError(f"{name} {slot}: not a multiple of 16 within {rank_columns} columns")
    if width > 0 and not has_adapter:
        raise ValueError(f"{name} {slot}: there is no adapter")
