"""Loss of a frozen head: the sum of cross entropies, without all logits at once.

    logits = hidden @ weight^T + bias           loss = sum_t(logsumexp(logits_t) - logits_t[target])
    d_logits = softmax(logits) - onehot         d_hidden = d_logits @ weight

Letters: T labelled tokens, K features, V vocabulary. Tensors are bf16, fp16, fp32 or fp64; logits
and d_logits are rounded to their dtype, as torch rounds them; statistics are kept in fp32 (fp64 for
fp64).

Rows are taken in chunks, as [T, V] would be gigabytes. Each chunk is a cuBLAS product into one
buffer, a kernel that turns the logits there into their gradient, and a cuBLAS product from it. So
the gradient of hidden is made in the forward pass, for a loss whose own gradient is 1, and only
scaled in the backward pass. The head gets no gradient: it is frozen.

The kernel walks twice over a row, which is too long for registers; the second walk finds most of it
in L2. A row is walked in blocks of [DEPTH, LANES], with a running maximum and sum for each lane:
when LANES is what the threads load at once, the first walk needs no exchange between threads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels import launch
from lora_kernels.arguments import accumulator, check_matrix, check_vector, statistics_dtype

# elements that the logits' row stride divides by: cuBLAS and the kernel want aligned rows
_STRIDE_MULTIPLE = 64
# chunks are whole tiles of cuBLAS
_ROWS_MULTIPLE = 128
# most probabilities are below fp16's normal range, 6e-5; what is scaled is at most 1
_FP16_GRADIENT_SCALE = 1024.0


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, columns, V: tl.constexpr, ACC: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """Load a block of a row; what lies beyond the row is -inf."""
    if IS_WHOLE:
        x = tl.load(logits_ptr + columns).to(ACC)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns, eviction_policy="evict_last").to(ACC)
    else:
        x = tl.load(logits_ptr + columns, columns < V, float("-inf")).to(ACC)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns, columns < V, 0.0).to(ACC)
    return x


@triton.jit
def _accumulate(x, maxima, sums):
    """Return the running maxima and sums of exponentials of the lanes with another block."""
    higher = tl.maximum(maxima, tl.max(x, 0))
    return higher, sums * tl.exp(maxima - higher) + tl.sum(tl.exp(x - higher[None, :]), 0)


@triton.jit
def _gradient(x, columns, target, maximum, factor, SCALE: tl.constexpr):
    """Return SCALE times softmax - onehot; `factor` is SCALE over the sum of exponentials."""
    gradient = tl.exp(x - maximum) * factor
    return tl.where(columns == target, gradient - SCALE, gradient)


@triton.jit
def _cross_entropy_rows(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    losses_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * STRIDE
    block = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    target = tl.load(targets_ptr + row)
    # any other target makes the loss and the gradient of its row NaN
    is_target = (target >= 0) & (target < V)
    # 32 bits, as every column is compared with it
    target = target.to(tl.int32)
    target_logit = tl.load(logits_ptr + target, is_target, float("nan")).to(ACC)
    if bias_ptr is not None:
        target_logit += tl.load(bias_ptr + target, is_target, 0.0).to(ACC)

    # blocks without masks, and one that the row's end cuts
    BLOCK: tl.constexpr = DEPTH * LANES
    WHOLE: tl.constexpr = V // BLOCK * BLOCK
    # finite, as -inf - -inf is NaN
    maxima = tl.full([LANES], -3.0e38, ACC)
    sums = tl.zeros([LANES], ACC)
    for start in range(0, WHOLE, BLOCK):
        x = _load_logits(logits_ptr, bias_ptr, start + block, V, ACC, True)
        maxima, sums = _accumulate(x, maxima, sums)
    if WHOLE < V:
        x = _load_logits(logits_ptr, bias_ptr, WHOLE + block, V, ACC, False)
        maxima, sums = _accumulate(x, maxima, sums)
    maximum = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp(maxima - maximum), 0)
    tl.store(losses_ptr + row, tl.log(total) + (maximum - target_logit))

    if HAS_GRADIENT:
        # what one thread read above another overwrites below
        tl.debug_barrier()
        dtype = logits_ptr.dtype.element_ty
        factor = tl.where(is_target, SCALE / total, float("nan"))
        for start in range(0, WHOLE, BLOCK):
            columns = start + block
            x = _load_logits(logits_ptr, bias_ptr, columns, V, ACC, True)
            gradient = _gradient(x, columns, target, maximum, factor, SCALE)
            tl.store(logits_ptr + columns, gradient.to(dtype))
        if WHOLE < V:
            columns = WHOLE + block
            x = _load_logits(logits_ptr, bias_ptr, columns, V, ACC, False)
            gradient = _gradient(x, columns, target, maximum, factor, SCALE)
            tl.store(logits_ptr + columns, gradient.to(dtype), columns < V)


def linear_cross_entropy(
    hidden_TK: torch.Tensor,
    weight_VK: torch.Tensor,
    targets_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of the cross entropies of a linear head; the formulas are above.

    Only `hidden_TK` gets a gradient. It is computed here, where gradients are enabled, and scaled
    in place by backward, which therefore runs once. Autocast changes nothing: the dtypes are those
    of the tensors. Nothing waits for the GPU.

    Args:
        hidden_TK: (T, K), the rows that have a label; rows may have any stride; bf16, fp16, fp32
            or fp64.
        weight_VK: (V, K), of its dtype; rows may have any stride; frozen.
        targets_T: (T,) int64 in [0, V); any other makes the loss NaN.
        bias_V: (V,), of its dtype; frozen.

    Returns:
        Scalar, fp32 (fp64 when the others are); 0 without rows.

    Raises:
        ValueError: shapes, strides or dtypes are not as said, or the head is not frozen.
    """
    num_rows, num_columns = hidden_TK.shape
    vocabulary, dtype = weight_VK.shape[0], hidden_TK.dtype
    check_matrix("hidden_TK", hidden_TK, dtype, num_rows, num_columns)
    check_matrix("weight_VK", weight_VK, dtype, vocabulary, num_columns)
    check_vector("targets_T", targets_T, torch.int64, num_rows)
    if bias_V is not None:
        check_vector("bias_V", bias_V, dtype, vocabulary)
    if torch.is_grad_enabled():
        for name, tensor in (("weight_VK", weight_VK), ("bias_V", bias_V)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, and the head must be frozen")
    with_gradient = torch.is_grad_enabled() and hidden_TK.requires_grad
    return _LinearCrossEntropy.apply(hidden_TK, weight_VK, targets_T, bias_V, with_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps d_hidden, of a loss whose gradient is 1, from forward to backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TK: torch.Tensor,
        weight_VK: torch.Tensor,
        targets_T: torch.Tensor,
        bias_V: torch.Tensor | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        ctx.is_spent = False
        ctx.gradient_scale = _FP16_GRADIENT_SCALE if hidden_TK.dtype == torch.float16 else 1.0
        d_hidden_TK = None
        if with_gradient:
            d_hidden_TK = torch.empty(
                hidden_TK.shape, dtype=hidden_TK.dtype, device=hidden_TK.device
            )
            ctx.save_for_backward(d_hidden_TK)
        with torch.autocast(hidden_TK.device.type, enabled=False):
            losses_T = _losses(
                hidden_TK, weight_VK, targets_T, bias_V, d_hidden_TK, ctx.gradient_scale
            )
        return losses_T.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        if ctx.is_spent:
            raise RuntimeError(
                "backward through linear_cross_entropy a second time: the first one has scaled the"
                " gradient in place"
            )
        (d_hidden_TK,) = ctx.saved_tensors
        ctx.is_spent = True
        # of two dimensions: a scalar would be rounded to the dtype of the gradient first
        factor = (d_loss / ctx.gradient_scale).reshape(1, 1)
        torch.mul(d_hidden_TK, factor, out=d_hidden_TK)
        return d_hidden_TK, None, None, None, None


def _losses(
    hidden_TK: torch.Tensor,
    weight_VK: torch.Tensor,
    targets_T: torch.Tensor,
    bias_V: torch.Tensor | None,
    d_hidden_TK: torch.Tensor | None,
    gradient_scale: float,
) -> torch.Tensor:
    """Return the loss of each row, (T,), and write `gradient_scale` times d_hidden if given."""
    num_rows, vocabulary = hidden_TK.shape[0], weight_VK.shape[0]
    dtype, device = hidden_TK.dtype, hidden_TK.device
    losses_T = torch.empty(num_rows, dtype=statistics_dtype(dtype), device=device)
    if num_rows == 0:
        return losses_T
    config = launch.launch_config("cross_entropy_rows", device, vocabulary)
    chunk_rows = _chunk_rows(num_rows, config.pop("CHUNK_ROWS"))
    stride = triton.cdiv(vocabulary, _STRIDE_MULTIPLE) * _STRIDE_MULTIPLE
    buffer = torch.empty(chunk_rows, stride, dtype=dtype, device=device)
    with launch.on_device(hidden_TK):
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            # cuBLAS writes and reads with a row stride: no copy
            logits = buffer[: rows.stop - start, :vocabulary]
            torch.mm(hidden_TK[rows], weight_VK.T, out=logits)
            _cross_entropy_rows[(logits.shape[0],)](
                logits, bias_V, targets_T[rows], losses_T[rows], V=vocabulary, STRIDE=stride,
                HAS_GRADIENT=d_hidden_TK is not None, SCALE=gradient_scale,
                ACC=accumulator(dtype), **config,
            )  # fmt: skip
            if d_hidden_TK is not None:
                torch.mm(logits, weight_VK, out=d_hidden_TK[rows])
    return losses_T


def _chunk_rows(num_rows: int, most: int) -> int:
    """Return the rows of a chunk: at most the table's, and about the same for every chunk."""
    even = triton.cdiv(num_rows, triton.cdiv(num_rows, most))
    return min(num_rows, triton.cdiv(even, _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
