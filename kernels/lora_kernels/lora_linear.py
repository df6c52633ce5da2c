"""A frozen linear layer and its LoRA adapter as one differentiable function.

    forward    y  = x W^T + b + H (s B)^T       H = drop(x) A^T
    backward   dx = dy W + drop(G A)            G = dy (s B)
               dA = G^T drop(x),  dB = s dy^T H,  db = sum of dy over the tokens

Letters: M tokens, K in_features, N out_features, R rank (1 to 256), s scaling. x and W have one
dtype, bf16, fp16, fp32 or fp64. A and B may have another, usually fp32: they are rounded to x's for
the products, and their gradients are made in fp32 and never rounded to x's. Under autocast all is
computed in autocast's dtype. x, H and the parameters are saved; the dropout mask, drop(x) and the
rounded A and s B are made again.

What decides is the number of passes over the [M, N] and [M, K] matrices beside the one product with
W that the frozen layer needs anyway. Each of H, G, dA and dB is a thin product that cuBLAS makes in
one pass over x or dy. Three ways are there for the adapter's term of y and dx:

- addmm: added to what cuBLAS has written; y (dx) is read and written once more.
- triton: one further step in depth of a Triton product with W, in registers; no further pass,
  dropout neither. Pays only where Triton's product costs less than cuBLAS's and that pass.
- augmented: one cuBLAS product of [x | H] with [W | s B] ([dy | G] with [W ; A]), the matrix of an
  `AugmentedWeight`. x (dy) is copied beside H (G): fewer bytes than addmm where K < N forward,
  N < K backward. With dropout the backward is that of addmm.

The launch tables choose between addmm and triton, forward by N, backward by K: the width of what
addmm reads and writes again. An `AugmentedWeight` is the caller's own choice.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from lora_kernels import launch
from lora_kernels.arguments import accumulator
from lora_kernels.augmented import OnDemandWeight, thin_product
from lora_kernels.dropout import Dropout, draw, drop
from lora_kernels.project import add_masked_product, dropped

MAX_RANK = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# seeds change with every step and M may: neither is worth another compilation
_CHANGING = ["num_rows", "seed", "stream", "threshold"]
# cuBLAS on H100, M = 8192, 8B shapes: 64 further columns cost -2 to +7 %, 16 or 48 up to +20 %
_RANK_COLUMNS_MULTIPLE = 64


class AugmentedWeight:
    """Frozen weight, bias and a copy of the adapter in one matrix, for the augmented products.

        [N+P, K+P] = [[ W, s B | b ],     P: the rank and the bias's column, rounded up to 64
                      [ A,   0     ]]

    Args:
        weight_NK: frozen.
        rank: of the adapter.
        bias_N: frozen; it stands in the last column, where H is 1.
    """

    def __init__(
        self, weight_NK: torch.Tensor, rank: int, bias_N: torch.Tensor | None = None
    ) -> None:
        n, k = weight_NK.shape
        used = rank + (bias_N is not None)
        p = -(-used // _RANK_COLUMNS_MULTIPLE) * _RANK_COLUMNS_MULTIPLE
        self.rank = rank
        self.has_bias = bias_N is not None
        self.buffer = weight_NK.new_zeros(n + p, k + p)
        self.weight = self.buffer[:n, :k]
        """(N, K), a view: a layer that takes it for its own weight needs no second copy."""
        self.a_PK = self.buffer[n:, :k]
        self.sb_NP = self.buffer[:n, k:]
        self.weight.copy_(weight_NK)
        if bias_N is not None:
            self.sb_NP[:, -1].copy_(bias_N)

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.weight.shape

    def load(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        """Copy the adapter in; done before every product, as what is there may be another's."""
        self.a_PK[: self.rank].copy_(lora_a)
        torch.mul(lora_b, scaling, out=self.sb_NP[:, : self.rank])


@triton.jit(do_not_specialize=_CHANGING)
def _lora_product(
    left_ptr,
    weight_ptr,
    bias_ptr,
    rank_left_ptr,
    rank_right_ptr,
    out_ptr,
    stride_left,
    stride_weight_d,
    stride_weight_c,
    stride_rank_left,
    stride_rank_right_r,
    stride_rank_right_c,
    num_rows,
    seed,
    stream,
    threshold,
    C: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # programs that run at one time share rows of left and columns of weight in L2
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    group_size: tl.constexpr = GROUP_M * ((C + BLOCK_C - 1) // BLOCK_C)
    group = tl.program_id(0) // group_size
    within = tl.program_id(0) % group_size
    group_rows = tl.minimum(num_row_blocks - group * GROUP_M, GROUP_M)
    rows = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // group_rows) * BLOCK_C + tl.arange(0, BLOCK_C)
    # a row that is not there is read as the last one: loads along rows need no mask
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None]
    wide_columns = columns.to(tl.int64)[None, :]
    even_columns: tl.constexpr = C % BLOCK_C == 0
    even_depths: tl.constexpr = D % BLOCK_D == 0
    in_columns = (columns < C)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    # not unrolled and not pipelined: registers and shared memory are the long loop's
    for first in tl.range(0, RANK, RANK_BLOCK, num_stages=1):
        ranks = first + tl.arange(0, RANK_BLOCK)
        offsets = safe_rows * stride_rank_left + ranks[None, :]
        rank_left = tl.load(rank_left_ptr + offsets, (ranks < RANK)[None, :], 0.0)
        offsets = ranks[:, None] * stride_rank_right_r + wide_columns * stride_rank_right_c
        in_right = (ranks < RANK)[:, None] & in_columns
        rank_right = tl.load(rank_right_ptr + offsets, in_right, 0.0)
        acc = tl.dot(rank_left, rank_right, acc, input_precision="ieee", out_dtype=ACC)
    if HAS_DROPOUT:
        acc = drop(acc, seed, stream, threshold, rows, columns, ACC)

    depths = tl.arange(0, BLOCK_D)
    left_ptrs = left_ptr + safe_rows * stride_left + depths[None, :]
    weight_ptrs = weight_ptr + depths[:, None] * stride_weight_d + wide_columns * stride_weight_c
    for start in range(0, D, BLOCK_D):
        if even_depths:
            left = tl.load(left_ptrs)
        else:
            left = tl.load(left_ptrs, (start + depths < D)[None, :], 0.0)
        if even_depths and even_columns:
            weight = tl.load(weight_ptrs)
        else:
            weight = tl.load(weight_ptrs, (start + depths < D)[:, None] & in_columns, 0.0)
        acc = tl.dot(left, weight, acc, input_precision="ieee", out_dtype=ACC)
        left_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D * stride_weight_d

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, columns < C, 0.0).to(ACC)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * C + wide_columns
    inside = (rows < num_rows)[:, None] & in_columns
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), inside)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | OnDemandWeight | AugmentedWeight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return `x W^T + b + s (drop(x) A^T) B^T`; the formulas are above.

    Gradients flow to x, the bias and the adapter, once: there is no second derivative. The kernels
    of triton and of dropout run on a GPU or in Triton's interpreter, the rest on any device.

    Args:
        x: (..., K), any strides.
        weight: (N, K), frozen.
        bias: (N,); None with an `AugmentedWeight`, which holds it.
        lora_a: (R, K).
        lora_b: (N, R).
        scaling: s.
        dropout: one draw of the mask on the adapter's input; rows count through all of x.

    Returns:
        (..., N), contiguous, in x's dtype or, where autocast is on, in autocast's.

    Raises:
        ValueError: shapes or dtypes are not as said, or the weight wants a gradient.
    """
    x = x.to(_compute_dtype(x))
    _check_arguments(x, weight, bias, lora_a, lora_b, dropout)
    return LoraLinearFunction.apply(x, weight, bias, lora_a, lora_b, scaling, dropout)


class LoraLinearFunction(torch.autograd.Function):
    """`lora_linear` behind its checks.

    `custom_fwd` and `custom_bwd` of `torch.amp` are tied to one type of device and keep autocast on
    where no dtype is fixed; here it is simply off, as all operands are cast by hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | OnDemandWeight | AugmentedWeight,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        """Return y and save what the wanted gradients need."""
        x_MK = _matrix(x)
        with _without_autocast(x.device):
            if isinstance(weight, AugmentedWeight):
                weight.load(lora_a, lora_b, scaling)
                y_MN, h_MR = _augmented_forward(x_MK, weight, dropout)
            else:
                a_RK, sb_NR = _working_copies(lora_a, lora_b, scaling, x.dtype)
                h_MR = torch.mm(_dropped(x_MK, dropout), a_RK.T)
                weight_NK = _dense(weight, x_MK)
                bias_N = None if bias is None else bias.to(x.dtype)
                if _implementation("forward", x_MK, weight_NK.shape[0]) == "triton":
                    y_MN = triton_product(x_MK, weight_NK.T, h_MR, sb_NR.T, bias=bias_N)
                else:
                    y_MN = _mm(x_MK, weight_NK.T, bias_N).addmm_(h_MR, sb_NR.T)

        _, _, wants_bias, wants_a, wants_b = ctx.needs_input_grad[:5]
        is_tensor = isinstance(weight, torch.Tensor)
        ctx.save_for_backward(
            x_MK if wants_a else None,
            h_MR if wants_b else None,
            weight if is_tensor else None,
            bias if wants_bias else None,
            lora_a,
            lora_b,
        )
        ctx.other_weight = None if is_tensor else weight
        ctx.scaling, ctx.dropout, ctx.x_shape = scaling, dropout, x.shape
        return y_MN.view(*x.shape[:-1], y_MN.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients that are wanted."""
        x_MK, h_MR, weight, bias, lora_a, lora_b = ctx.saved_tensors
        weight = ctx.other_weight if weight is None else weight
        wants_x, _, _, wants_a, _ = ctx.needs_input_grad[:5]
        dropout = ctx.dropout
        dy_MN = _matrix(d_y)
        dx_MK = g_MR = d_bias = d_a = d_b = None
        with _without_autocast(d_y.device):
            is_augmented = isinstance(weight, AugmentedWeight) and dropout is None
            if wants_x and is_augmented:
                weight.load(lora_a, lora_b, ctx.scaling)
                dx_MK, g_MR = _augmented_backward(dy_MN, weight)
            elif wants_x or wants_a:
                a_RK, sb_NR = _working_copies(lora_a, lora_b, ctx.scaling, d_y.dtype)
                g_MR = torch.mm(dy_MN, sb_NR)
                if wants_x:
                    dx_MK = _dx(dy_MN, _dense(weight, dy_MN), g_MR, a_RK, dropout)
            if bias is not None:
                d_bias = dy_MN.sum(0, dtype=bias.dtype)
            if g_MR is not None and x_MK is not None:
                d_a = thin_product(g_MR, _dropped(x_MK, dropout)).to(lora_a.dtype)
            if h_MR is not None:
                d_b = thin_product(dy_MN, h_MR).mul_(ctx.scaling).to(lora_b.dtype)
        d_x = None if dx_MK is None else dx_MK.view(ctx.x_shape)
        return d_x, None, d_bias, d_a, d_b, None, None


def triton_product(
    left_MD: torch.Tensor,
    weight_DC: torch.Tensor,
    rank_left_MR: torch.Tensor,
    rank_right_RC: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return `left @ weight + drop(rank_left @ rank_right) + bias`, one Triton kernel.

    Args:
        left_MD: (M, D), rows of any stride.
        weight_DC: (D, C), any strides.
        rank_left_MR: (M, R), rows of any stride.
        rank_right_RC: (R, C), any strides.
        bias: (C,), contiguous.
        dropout: of the product of the rank.

    Returns:
        (M, C), in the dtype that all have.
    """
    (num_rows, num_depths), num_columns = left_MD.shape, weight_DC.shape[1]
    out_MC = left_MD.new_empty(num_rows, num_columns)
    if num_rows == 0:
        return out_MC
    rank = rank_left_MR.shape[1]
    # wider elements fill shared memory sooner
    name = "lora_linear_product" if left_MD.element_size() == 2 else "lora_linear_product_wide"
    config = launch.launch_config(name, left_MD.device, num_columns)
    num_blocks = triton.cdiv(num_rows, config["BLOCK_M"])
    with launch.on_device(left_MD):
        _lora_product[(num_blocks * triton.cdiv(num_columns, config["BLOCK_C"]),)](
            left_MD, weight_DC, bias, rank_left_MR, rank_right_RC, out_MC, left_MD.stride(0),
            *weight_DC.stride(), rank_left_MR.stride(0), *rank_right_RC.stride(), num_rows,
            *draw(dropout), C=num_columns, D=num_depths, RANK=rank, RANK_BLOCK=_rank_block(rank),
            HAS_DROPOUT=dropout is not None, ACC=accumulator(left_MD.dtype), **config,
        )  # fmt: skip
    return out_MC


def _dx(
    dy_MN: torch.Tensor,
    weight_NK: torch.Tensor,
    g_MR: torch.Tensor,
    a_RK: torch.Tensor,
    dropout: Dropout | None,
) -> torch.Tensor:
    if _implementation("backward", dy_MN, weight_NK.shape[1]) == "triton":
        return triton_product(dy_MN, weight_NK, g_MR, a_RK, dropout=dropout)
    dx_MK = torch.mm(dy_MN, weight_NK)
    if dropout is None:
        return dx_MK.addmm_(g_MR, a_RK)
    add_masked_product(dx_MK, g_MR, a_RK.contiguous(), dropout)
    return dx_MK


def _augmented_forward(
    x_MK: torch.Tensor, weight: AugmentedWeight, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (M, N) and H (M, R) with the adapter that stands in the weight."""
    n, k = weight.shape
    x_aug = x_MK.new_empty(x_MK.shape[0], weight.buffer.shape[1])
    x_aug[:, :k].copy_(x_MK)
    h_MP = x_aug[:, k:]
    # all P columns: the rows of A that are 0 also clear what is not used
    torch.mm(_dropped(x_MK, dropout), weight.a_PK.T, out=h_MP)
    if weight.has_bias:
        h_MP[:, -1].fill_(1)
    y_MN = torch.mm(x_aug, weight.buffer[:n].T)
    # a view would keep the copy of x alive until the backward
    return y_MN, h_MP[:, : weight.rank].clone(memory_format=torch.contiguous_format)


def _augmented_backward(
    dy_MN: torch.Tensor, weight: AugmentedWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx (M, K) and G (M, R) with the adapter that stands in the weight."""
    n, k = weight.shape
    dy_aug = dy_MN.new_empty(dy_MN.shape[0], weight.buffer.shape[0])
    dy_aug[:, :n].copy_(dy_MN)
    g_MP = dy_aug[:, n:]
    torch.mm(dy_MN, weight.sb_NP, out=g_MP)
    if weight.has_bias:
        # dy b would meet a row of zeros, but may be infinite in fp16
        g_MP[:, -1].zero_()
    return torch.mm(dy_aug, weight.buffer[:, :k]), g_MP[:, : weight.rank]


def _dropped(x_MK: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Return what the adapter sees of x."""
    if dropout is None or x_MK.shape[0] == 0:
        return x_MK
    out_MK = torch.empty_like(x_MK, memory_format=torch.contiguous_format)
    dropped(x_MK, dropout, out_MK)
    return out_MK


def _mm(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def _working_copies(
    lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and s B as the products take them, each rounded once."""
    sb_NR = torch.empty(lora_b.shape, dtype=dtype, device=lora_b.device)
    return lora_a.to(dtype), torch.mul(lora_b, scaling, out=sb_NR)


def _dense(
    weight: torch.Tensor | OnDemandWeight | AugmentedWeight, like: torch.Tensor
) -> torch.Tensor:
    """Return W (N, K) on the device and in the dtype of `like`."""
    if isinstance(weight, torch.Tensor):
        return weight.to(like.dtype)
    if isinstance(weight, AugmentedWeight):
        return weight.weight
    weight_NK = like.new_empty(weight.shape)
    weight.write(weight_NK)
    return weight_NK


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return (..., C) as (M, C) whose rows are contiguous and do not overlap, copied if need be."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    num_rows, num_columns = matrix.shape
    if (num_columns > 1 and matrix.stride(1) != 1) or (
        num_rows > 1 and matrix.stride(0) < num_columns
    ):
        return matrix.contiguous()
    return matrix


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    # fp64 is left alone by autocast
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _implementation(direction: str, tensor: torch.Tensor, width: int) -> str:
    config = launch.launch_config(f"lora_linear_{direction}", tensor.device, width)
    return config["IMPLEMENTATION"]


def _grid(config: dict[str, Any], num_rows: int, num_columns: int) -> tuple[int]:
    blocks = triton.cdiv(num_rows, config["BLOCK_M"]), triton.cdiv(num_columns, config["BLOCK_K"])
    return (blocks[0] * blocks[1],)


def _rank_block(rank: int) -> int:
    # tl.dot takes no less than 16; what is more than 32 goes in steps
    return min(32, max(16, triton.next_power_of_2(rank)))


def _check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor | OnDemandWeight | AugmentedWeight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dropout: Dropout | None,
) -> None:
    num_out, num_in = weight.shape
    rank = lora_a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} is not within 1 and {MAX_RANK}")
    if x.shape[-1] != num_in:
        raise ValueError(f"x: expected (..., {num_in}), got {tuple(x.shape)}")
    for name, tensor, shape in (
        ("bias", bias, (num_out,)),
        ("lora_a", lora_a, (rank, num_in)),
        ("lora_b", lora_b, (num_out, rank)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype} is none of bf16, fp16, fp32 and fp64")
    if dropout is not None and not 0 <= dropout.p < 1:
        raise ValueError(f"dropout: probability {dropout.p} is not within 0 and 1")
    if isinstance(weight, AugmentedWeight):
        if bias is not None:
            raise ValueError("bias: an augmented weight holds its own")
        if rank != weight.rank:
            raise ValueError(f"lora_a: rank {rank}, the augmented weight has {weight.rank}")
    dense = weight.weight if isinstance(weight, AugmentedWeight) else weight
    if isinstance(dense, torch.Tensor):
        if dense.requires_grad:
            raise ValueError("weight: it is taken as frozen, but requires a gradient")
        can_cast = torch.is_autocast_enabled(x.device.type) and dense is weight
        if dense.dtype != x.dtype and not can_cast:
            raise ValueError(f"weight: expected {x.dtype} as x, got {dense.dtype}")
