"""Causal attention over packed sequences with grouped heads, forward and backward.

    forward    s_ij = scale * q_i . k_j    for the j <= i of i's sequence (window: i - j < window)
               p_ij = exp(s_ij - lse_i),   lse_i = log(sum_j exp(s_ij))
               out_i = sum_j p_ij v_j
    backward   delta_i = dout_i . out_i
               ds_ij = p_ij * (dout_i . v_j - delta_i)
               dq_i = scale * sum_j ds_ij k_j
               dk_j = scale * sum_i ds_ij q_i,     dv_j = sum_i p_ij dout_i

Letters: M tokens, S sequences, Hq query heads, Hkv heads of keys and values, D features of a head.
Query head h reads key head h // (Hq / Hkv). Tensors are bf16, fp16, fp32 or fp64; scores, softmax
and sums are kept in fp32 (fp64 for fp64), p and ds are rounded to the tensors' dtype before they
are multiplied, every output is rounded once. lse is kept in units of log 2, as the GPU computes
powers of 2.

p is stored nowhere: the backward computes it again from lse. One of its kernels owns blocks of
queries and makes dq, and delta from the dout that it holds; the other owns blocks of keys and sums
dk and dv over the query heads that share them. These are seven products per pair of blocks, where a
single kernel would need five, but no two programs add to the same place: two runs give the same
bits. Blocks are counted from the start of a sequence, so its neighbours do not change its bits.

Blocks have very different amounts of work. A small kernel lists them, those that may have the most
first. The grid then depends on the numbers of tokens and sequences (and on their greatest length),
not on the lengths: a CUDA graph can be replayed with others. All heads of a block run side by side,
and find its keys and values in L2.

Only blocks at the diagonal, and at the far edge of the window, need a mask. The entry BRANCH of the
launch table: true makes it behind a branch, false in every block, as behind one Triton does not see
that one product feeds the next, which on sm_80 costs a way through shared memory. There is one loop
for all blocks: a second one would fill its pipeline once more, and on sm_90 ptxas serializes its
products, as they start from sums that the first made.

Strides are constants of the compilation: as variables they take registers that the sums need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import accumulator, check_matrix, check_vector, statistics_dtype

# they change from batch to batch or from layer to layer: not worth another compilation
_CHANGING = ["num_tokens", "num_tiles", "window"]
# what tl.dot multiplies, and what fits beside its sums in registers
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256
_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(float("-inf"))
# below every score of a key that is seen
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit(do_not_specialize=["num_sequences", "num_tiles"])
def _attention_tiles(
    cu_seqlens_ptr,
    tiles_ptr,
    num_sequences,
    num_tiles,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """List all blocks: sequence's first token, its length, first position; high positions first."""
    sequence = tl.program_id(0)
    # the last program marks what is left of the list as empty
    is_last = sequence == num_sequences
    first_token = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1, sequence < num_sequences, 0) - first_token
    num_levels = tl.where(is_last, 1, tl.cdiv(length, BLOCK))
    num_used = num_tiles
    for first_level in range(0, num_levels, LEVELS):
        levels = first_level + tl.arange(0, LEVELS)
        ranks = tl.zeros([LEVELS], tl.int32)
        num_used = 0
        for first in range(0, num_sequences, SEQUENCES):
            others = first + tl.arange(0, SEQUENCES)
            starts = tl.load(cu_seqlens_ptr + others, others < num_sequences, 0)
            ends = tl.load(cu_seqlens_ptr + others + 1, others < num_sequences, 0)
            counts = tl.cdiv(ends - starts, BLOCK)
            num_used += tl.sum(counts, 0)
            higher = tl.maximum(counts[None, :] - levels[:, None] - 1, 0)
            level = (counts[None, :] > levels[:, None]) & (others < sequence)[None, :]
            ranks += tl.sum(higher + level.to(tl.int32), 1)
        inside = (levels < num_levels) & (ranks < num_tiles) & (sequence < num_sequences)
        tl.store(tiles_ptr + ranks, tl.zeros([LEVELS], tl.int32) + first_token, inside)
        tl.store(tiles_ptr + num_tiles + ranks, tl.zeros([LEVELS], tl.int32) + length, inside)
        tl.store(tiles_ptr + 2 * num_tiles + ranks, levels * BLOCK, inside)
    if is_last:
        for first in range(num_used, num_tiles, SEQUENCES):
            tiles = first + tl.arange(0, SEQUENCES)
            lengths_ptr = tiles_ptr + num_tiles
            tl.store(lengths_ptr + tiles, tl.zeros([SEQUENCES], tl.int32), tiles < num_tiles)


@triton.jit
def _load_tile(tiles_ptr, num_tiles, BLOCK: tl.constexpr):
    tile_ptr = tiles_ptr + tl.program_id(1)
    first_token = tl.load(tile_ptr).to(tl.int64)
    length = tl.load(tile_ptr + num_tiles)
    return first_token, length, tl.multiple_of(tl.load(tile_ptr + 2 * num_tiles), BLOCK)


@triton.jit
def _rows_of(ptr, first, length, STRIDE, D: tl.constexpr, BLOCK: tl.constexpr):
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    inside = (first + rows < length)[:, None]
    if D != BLOCK_D:
        inside &= (columns < D)[None, :]
    # 64 bits once: within a tile 32 bits reach
    ptr += tl.cast(first, tl.int64) * STRIDE
    return ptr + (rows[:, None] * STRIDE + columns[None, :]), inside


@triton.jit
def _load_rows(ptr, first, length, STRIDE, D: tl.constexpr, BLOCK: tl.constexpr):
    ptrs, inside = _rows_of(ptr, first, length, STRIDE, D, BLOCK)
    return tl.load(ptrs, inside, 0.0)


@triton.jit
def _store_rows(ptr, x, first, length, STRIDE, D: tl.constexpr, BLOCK: tl.constexpr):
    ptrs, inside = _rows_of(ptr, first, length, STRIDE, D, BLOCK)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), inside)


@triton.jit
def _hide_keys(scores, rows, first_key, window, HAS_WINDOW, BLOCK_N: tl.constexpr):
    # keys count from the block's first: constants, where positions would take registers
    keys = tl.arange(0, BLOCK_N)[None, :]
    last = (rows - first_key)[:, None]
    visible = keys <= last
    if HAS_WINDOW:
        visible &= keys > last - window
    return tl.where(visible, scores, _HIDDEN)


@triton.jit
def _hide_rows(scores, keys, first_row, window, HAS_WINDOW, BLOCK_M: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)[None, :]
    first = (keys - first_row)[:, None]
    visible = rows >= first
    if HAS_WINDOW:
        visible &= rows < first + window
    return tl.where(visible, scores, _HIDDEN)


@triton.jit(do_not_specialize=_CHANGING)
def _attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    num_tokens,
    num_tiles,
    window,
    STRIDE_Q: tl.constexpr,
    STRIDE_Q_HEAD: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_K_HEAD: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_V_HEAD: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    STRIDE_OUT_HEAD: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    first_token, length, first_row = _load_tile(tiles_ptr, num_tiles, BLOCK_M)
    if length == 0:
        return
    head = tl.program_id(0).to(tl.int64)
    key_head = head // GROUP
    k_ptr += first_token * STRIDE_K + key_head * STRIDE_K_HEAD
    v_ptr += first_token * STRIDE_V + key_head * STRIDE_V_HEAD
    q_ptr += first_token * STRIDE_Q + head * STRIDE_Q_HEAD
    out_ptr += first_token * STRIDE_OUT + head * STRIDE_OUT_HEAD
    lse_ptr += head * num_tokens + first_token

    rows = first_row + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, first_row, length, STRIDE_Q, D, BLOCK_M)
    acc = tl.zeros(q.shape, ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_row - window + 1, 0) // BLOCK_N * BLOCK_N
    for first_key in range(begin, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):
        k = _load_rows(k_ptr, first_key, length, STRIDE_K, D, BLOCK_N)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        at_edge = first_key + BLOCK_N - 1 > first_row
        if HAS_WINDOW:
            at_edge |= first_key < first_row + BLOCK_M - window
        if (not BRANCH) or at_edge:
            scores = _hide_keys(scores, rows, first_key, window, HAS_WINDOW, BLOCK_N)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * (SCALE * _LOG2_E))
        if HAS_WINDOW:
            # a row that sees no key of its first blocks: -inf from -inf would be NaN
            new_peak = tl.maximum(new_peak, _LOWEST)
        p = tl.exp2(scores * (SCALE * _LOG2_E) - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _load_rows(v_ptr, first_key, length, STRIDE_V, D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=ACC)
        peak = new_peak
    acc = acc * (1.0 / total)[:, None]
    _store_rows(out_ptr, acc, first_row, length, STRIDE_OUT, D, BLOCK_M)
    tl.store(lse_ptr + rows, peak + tl.log2(total), rows < length)


@triton.jit(do_not_specialize=_CHANGING)
def _attention_backward_queries(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    num_tokens,
    num_tiles,
    window,
    STRIDE_D_OUT: tl.constexpr,
    STRIDE_D_OUT_HEAD: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_Q_HEAD: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_K_HEAD: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_V_HEAD: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    STRIDE_OUT_HEAD: tl.constexpr,
    STRIDE_DQ: tl.constexpr,
    STRIDE_DQ_HEAD: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    first_token, length, first_row = _load_tile(tiles_ptr, num_tiles, BLOCK_M)
    if length == 0:
        return
    head = tl.program_id(0).to(tl.int64)
    key_head = head // GROUP
    k_ptr += first_token * STRIDE_K + key_head * STRIDE_K_HEAD
    v_ptr += first_token * STRIDE_V + key_head * STRIDE_V_HEAD
    q_ptr += first_token * STRIDE_Q + head * STRIDE_Q_HEAD
    d_out_ptr += first_token * STRIDE_D_OUT + head * STRIDE_D_OUT_HEAD
    out_ptr += first_token * STRIDE_OUT + head * STRIDE_OUT_HEAD
    dq_ptr += first_token * STRIDE_DQ + head * STRIDE_DQ_HEAD
    lse_ptr += head * num_tokens + first_token
    delta_ptr += head * num_tokens + first_token

    rows = first_row + tl.arange(0, BLOCK_M)
    d_out = _load_rows(d_out_ptr, first_row, length, STRIDE_D_OUT, D, BLOCK_M)
    out = _load_rows(out_ptr, first_row, length, STRIDE_OUT, D, BLOCK_M)
    q = _load_rows(q_ptr, first_row, length, STRIDE_Q, D, BLOCK_M)
    lse = tl.load(lse_ptr + rows, rows < length, 0.0)
    delta = tl.sum(d_out.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + rows, delta, rows < length)
    dq = tl.zeros(q.shape, ACC)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_row - window + 1, 0) // BLOCK_N * BLOCK_N
    for first_key in range(begin, tl.minimum(first_row + BLOCK_M, length), BLOCK_N):
        k = _load_rows(k_ptr, first_key, length, STRIDE_K, D, BLOCK_N)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        at_edge = first_key + BLOCK_N - 1 > first_row
        if HAS_WINDOW:
            at_edge |= first_key < first_row + BLOCK_M - window
        if (not BRANCH) or at_edge:
            scores = _hide_keys(scores, rows, first_key, window, HAS_WINDOW, BLOCK_N)
        p = tl.exp2(scores * (SCALE * _LOG2_E) - lse[:, None])
        v = _load_rows(v_ptr, first_key, length, STRIDE_V, D, BLOCK_N)
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee", out_dtype=ACC)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=ACC)
    _store_rows(dq_ptr, dq * SCALE, first_row, length, STRIDE_DQ, D, BLOCK_M)


@triton.jit(do_not_specialize=_CHANGING)
def _attention_backward_keys(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    num_tokens,
    num_tiles,
    window,
    STRIDE_D_OUT: tl.constexpr,
    STRIDE_D_OUT_HEAD: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_Q_HEAD: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_K_HEAD: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_V_HEAD: tl.constexpr,
    STRIDE_DK: tl.constexpr,
    STRIDE_DK_HEAD: tl.constexpr,
    STRIDE_DV: tl.constexpr,
    STRIDE_DV_HEAD: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
):
    first_token, length, from_last = _load_tile(tiles_ptr, num_tiles, BLOCK_N)
    if length == 0:
        return
    # the list in the other direction: the first keys have the most work
    first_key = (tl.cdiv(length, BLOCK_N) - 1) * BLOCK_N - from_last
    key_head = tl.program_id(0).to(tl.int64)
    first_head = key_head * GROUP
    k_ptr += first_token * STRIDE_K + key_head * STRIDE_K_HEAD
    v_ptr += first_token * STRIDE_V + key_head * STRIDE_V_HEAD
    dk_ptr += first_token * STRIDE_DK + key_head * STRIDE_DK_HEAD
    dv_ptr += first_token * STRIDE_DV + key_head * STRIDE_DV_HEAD
    q_ptr += first_token * STRIDE_Q + first_head * STRIDE_Q_HEAD
    d_out_ptr += first_token * STRIDE_D_OUT + first_head * STRIDE_D_OUT_HEAD
    lse_ptr += first_head * num_tokens + first_token
    delta_ptr += first_head * num_tokens + first_token

    keys = first_key + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr, first_key, length, STRIDE_K, D, BLOCK_N)
    v = _load_rows(v_ptr, first_key, length, STRIDE_V, D, BLOCK_N)
    dk = tl.zeros(k.shape, ACC)
    dv = tl.zeros(k.shape, ACC)
    begin = first_key // BLOCK_M * BLOCK_M
    end = length
    if HAS_WINDOW:
        end = tl.minimum(length, first_key + BLOCK_N - 1 + window)
    # one loop over blocks and heads, so that its pipeline is filled only once
    for step in range(0, tl.cdiv(end - begin, BLOCK_M) * GROUP):
        first_row = begin + step // GROUP * BLOCK_M
        head = step % GROUP
        # rows past the end: q, dout, lse and delta are 0, and so is what they add
        rows = first_row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr + head * STRIDE_Q_HEAD, first_row, length, STRIDE_Q, D, BLOCK_M)
        lse = tl.load(lse_ptr + head * num_tokens + rows, rows < length, 0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC)
        at_edge = first_row < first_key + BLOCK_N - 1
        if HAS_WINDOW:
            at_edge |= first_row + BLOCK_M > first_key + window
        if (not BRANCH) or at_edge:
            scores = _hide_rows(scores, keys, first_row, window, HAS_WINDOW, BLOCK_M)
        p = tl.exp2(scores * (SCALE * _LOG2_E) - lse[None, :])
        d_out_head_ptr = d_out_ptr + head * STRIDE_D_OUT_HEAD
        d_out = _load_rows(d_out_head_ptr, first_row, length, STRIDE_D_OUT, D, BLOCK_M)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee", out_dtype=ACC)
        # after dv, which leaves it the registers of lse
        delta = tl.load(delta_ptr + head * num_tokens + rows, rows < length, 0.0)
        dp = tl.dot(v, tl.trans(d_out), input_precision="ieee", out_dtype=ACC)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=ACC)
    _store_rows(dk_ptr, dk * SCALE, first_key, length, STRIDE_DK, D, BLOCK_N)
    _store_rows(dv_ptr, dv, first_key, length, STRIDE_DV, D, BLOCK_N)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Write the attention of every query head; the formulas are above.

    q, k, v and out have one dtype; tokens and heads may have any stride.

    Args:
        q: (M, Hq, D), queries, D from 16 to 256.
        k: (M, Hkv, D), keys; Hkv divides Hq.
        v: (M, Hkv, D), values.
        cu_seqlens: (S+1,) int32, where the sequences start, and M; sequences may be empty.
        max_seqlen: no sequence is longer. Not checked, as that needs the GPU's answer: the last
            tokens of a longer one may be left out.
        out: (M, Hq, D), output.
        scale: of the scores, above 0.
        window: how many tokens a token sees, itself and those just before it; None: all.

    Returns:
        (Hq, M) fp32 (fp64 for fp64), log2 of the sum of exp(score) over the keys of each query.

    Raises:
        ValueError: shapes, strides, dtypes or numbers are not as said.
    """
    num_tokens, num_heads, head_dim = q.shape
    _check(q, k, v, cu_seqlens, max_seqlen, scale, window)
    _check_heads("out", out, q.dtype, q.shape)
    lse = torch.empty(num_heads, num_tokens, dtype=statistics_dtype(q.dtype), device=q.device)
    if num_tokens == 0:
        return lse
    config = launch.launch_config(_entry("attention_forward", q), q.device, head_dim)
    with launch.on_device(q):
        tiles = _list_tiles(cu_seqlens, max_seqlen, num_tokens, config["BLOCK_M"])
        _attention_forward[(num_heads, tiles.shape[1])](
            q, k, v, out, lse, tiles, num_tokens, tiles.shape[1],
            **_strides(q=q, k=k, v=v, out=out), **_constants(q, k, scale, window, max_seqlen),
            **config,
        )  # fmt: skip
    return lse


def attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> None:
    """Write the gradients of queries, keys and values; the formulas are above.

    All tensors but `lse` and `cu_seqlens` have one dtype; tokens and heads may have any stride. No
    output may overlap an input.

    Args:
        d_out: (M, Hq, D), gradient of `out`.
        q: (M, Hq, D), as in the forward, like all that follow.
        k: (M, Hkv, D).
        v: (M, Hkv, D).
        out: (M, Hq, D), what the forward wrote.
        lse: (Hq, M), what the forward returned.
        cu_seqlens: (S+1,) int32.
        max_seqlen: no sequence is longer.
        dq: (M, Hq, D), output.
        dk: (M, Hkv, D), output.
        dv: (M, Hkv, D), output.
        scale: of the scores.
        window: how many tokens a token sees; None: all.

    Raises:
        ValueError: shapes, strides, dtypes or numbers are not as said.
    """
    num_tokens, num_heads, head_dim = q.shape
    _check(q, k, v, cu_seqlens, max_seqlen, scale, window)
    for name, tensor, like in (
        ("d_out", d_out, q), ("out", out, q), ("dq", dq, q), ("dk", dk, k), ("dv", dv, k)
    ):  # fmt: skip
        _check_heads(name, tensor, q.dtype, like.shape)
    check_matrix("lse", lse, statistics_dtype(q.dtype), num_heads, num_tokens)
    if num_tokens == 0:
        return
    if not lse.is_contiguous():
        raise ValueError("lse: must be contiguous")
    queries = launch.launch_config(_entry("attention_backward_queries", q), q.device, head_dim)
    keys = launch.launch_config(_entry("attention_backward_keys", q), q.device, head_dim)
    constants = _constants(q, k, scale, window, max_seqlen)
    delta = torch.empty_like(lse)
    with launch.on_device(q):
        tiles = _list_tiles(cu_seqlens, max_seqlen, num_tokens, queries["BLOCK_M"])
        _attention_backward_queries[(num_heads, tiles.shape[1])](
            d_out, q, k, v, out, lse, delta, dq, tiles, num_tokens, tiles.shape[1],
            **_strides(d_out=d_out, q=q, k=k, v=v, out=out, dq=dq), **constants, **queries,
        )  # fmt: skip
        if keys["BLOCK_N"] != queries["BLOCK_M"]:
            tiles = _list_tiles(cu_seqlens, max_seqlen, num_tokens, keys["BLOCK_N"])
        _attention_backward_keys[(k.shape[1], tiles.shape[1])](
            d_out, q, k, v, lse, delta, dk, dv, tiles, num_tokens, tiles.shape[1],
            **_strides(d_out=d_out, q=q, k=k, v=v, dk=dk, dv=dv), **constants, **keys,
        )  # fmt: skip


def _list_tiles(
    cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int, block: int
) -> torch.Tensor:
    """Return the blocks of all sequences, (3, as many as there may be) int32."""
    num_sequences = cu_seqlens.shape[0] - 1
    # each sequence ends with a block that may hold a single token
    num_tiles = min(
        num_sequences * triton.cdiv(max_seqlen, block), num_tokens // block + num_sequences
    )
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=cu_seqlens.device)
    config = launch.launch_config("attention_tiles", cu_seqlens.device, num_sequences)
    _attention_tiles[(num_sequences + 1,)](
        cu_seqlens, tiles, num_sequences, num_tiles, BLOCK=block, **config
    )
    return tiles


def _entry(kernel: str, tensor: torch.Tensor) -> str:
    """Return the name in the launch tables; wider elements need smaller blocks."""
    return kernel if tensor.element_size() == 2 else f"{kernel}_wide"


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    strides = {}
    for name, tensor in tensors.items():
        strides[f"STRIDE_{name.upper()}"] = tensor.stride(0)
        strides[f"STRIDE_{name.upper()}_HEAD"] = tensor.stride(1)
    return strides


def _constants(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None, max_seqlen: int
) -> dict[str, Any]:
    has_window = window is not None and window < max_seqlen
    return {
        "window": window if has_window else 0,
        "D": q.shape[2],
        "GROUP": q.shape[1] // k.shape[1],
        "SCALE": scale,
        "HAS_WINDOW": has_window,
        "ACC": accumulator(q.dtype),
    }


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    if num_key_heads == 0 or num_heads % num_key_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_key_heads} heads of keys")
    if not _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(
            f"head dimension {head_dim} is not within {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}"
        )
    _check_heads("q", q, q.dtype, q.shape)
    for name, tensor in (("k", k), ("v", v)):
        _check_heads(name, tensor, q.dtype, (num_tokens, num_key_heads, head_dim))
    check_vector("cu_seqlens", cu_seqlens, torch.int32, cu_seqlens.numel())
    if (cu_seqlens.numel() - 1) * max_seqlen < num_tokens:
        raise ValueError(
            f"cu_seqlens, max_seqlen: {cu_seqlens.numel() - 1} sequences of at most {max_seqlen}"
            f" tokens do not make {num_tokens}"
        )
    if scale <= 0:
        raise ValueError(f"scale {scale} is not above 0")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees at least itself")


def _check_heads(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {tuple(shape)} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.stride(2) != 1:
        raise ValueError(f"{name}: heads must be contiguous, strides are {tensor.stride()}")
    # the heads of a group are told apart in 32 bits
    if shape[1] * tensor.stride(1) >= 2**31:
        raise ValueError(f"{name}: heads are too far apart, strides are {tensor.stride()}")
