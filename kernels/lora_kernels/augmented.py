"""One matrix per projection group: frozen weights, biases and adapters in a single buffer.

    W_aug [N+P, K+P] = [[ W, s B ],     forward   Y  = [X | H] W_aug[:N]^T     H = drop(X) A^T
                        [ A,  0  ]]     backward  dX = [dY | G] W_aug[:, :K]   G = dY (s B)

The linears of a group read the same input: query, key and value; gate and up; or one alone. Their
weights stand one below the other. Each adapter has a slot among the P rank columns, as wide as its
rank rounded up to 16; s B is block diagonal. Biases are one further column, whose H is 1 and whose
row of A is 0. So a linear with its adapter is one cuBLAS product each way, and Y and dX are written
once. What stands in `s B` and `A` are working copies, rounded from PEFT's fp32 parameters.

With dropout the adapter's term of dX is masked, so dX = dY W, and who consumes dX adds drop(G A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lora_kernels.refresh import Copy

# cuBLAS on H100, M = 8192, 8B shapes: 64 further columns cost -2 to +7 %, 16 or 48 up to +20 %
_RANK_COLUMNS_MULTIPLE = 64
# widths of tl.dot operands
_SLOT_MULTIPLE = 16


class OnDemandWeight(Protocol):
    """A frozen weight, quantized or sharded, that is written out dense whenever it is needed."""

    shape: tuple[int, int]

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out`, (N, K) with any row stride."""


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear layer of a group, as its owner holds it."""

    weight: torch.Tensor | OnDemandWeight
    """Frozen, (N, K)."""
    bias: torch.Tensor | None = None
    """Frozen, (N,)."""
    lora_a: torch.Tensor | None = None
    """Trained, (R, K), any float dtype; None: no adapter."""
    lora_b: torch.Tensor | None = None
    """Trained, (N, R)."""
    scaling: float = 1.0
    """s at first, such as alpha / rank; `AugmentedGroup.scalings` is what counts."""


@dataclass(frozen=True)
class Slot:
    """Where a linear stands in its group."""

    rows: slice
    """Its output features, rows of W."""
    first: int
    """Its first rank column."""
    rank: int
    """Rank columns in use; 0 without an adapter."""

    @property
    def width(self) -> int:
        """Rank columns that it takes."""
        return _round_up(self.rank, _SLOT_MULTIPLE)

    @property
    def span(self) -> tuple[int, int]:
        """First rank column and width, as the kernels take it."""
        return self.first, self.width


class AugmentedGroup:
    """W_aug of one projection group.

    Args:
        linears: the group's linear layers, all (*, K), all dense or all on demand.
        dtype: of the working copies and the products.
        device: where the buffer lies.
        scratch: dense buffers of groups with weights on demand, by shape; groups share them.
    """

    def __init__(
        self,
        linears: Sequence[AdaptedLinear],
        dtype: torch.dtype,
        device: torch.device,
        *,
        scratch: dict[tuple[int, int, int], torch.Tensor] | None = None,
    ) -> None:
        self.linears = list(linears)
        # of the adapted linears; like the probability of dropout, they are those of a pass
        self.scalings = [linear.scaling for linear in linears if linear.lora_a is not None]
        self.dropout_p = 0.0
        self.num_in = linears[0].weight.shape[1]
        self.slots: list[Slot] = []
        row = column = 0
        for linear in linears:
            num_rows = linear.weight.shape[0]
            rank = 0 if linear.lora_a is None else linear.lora_a.shape[0]
            slot = Slot(slice(row, row + num_rows), column, rank)
            self.slots.append(slot)
            row += num_rows
            column += slot.width
        self.num_out = row
        self.rank_used = column
        has_bias = any(linear.bias is not None for linear in linears)
        self.ones_column = column if has_bias else None
        self.rank_columns = _round_up(column + has_bias, _RANK_COLUMNS_MULTIPLE)

        n, k, p = self.num_out, self.num_in, self.rank_columns
        self.is_on_demand = not isinstance(linears[0].weight, torch.Tensor)
        if self.is_on_demand:
            assert scratch is not None
            if (n, k, p) not in scratch:
                scratch[n, k, p] = torch.zeros(n + p, k + p, dtype=dtype, device=device)
            self._buffer = scratch[n, k, p]
            self.a = torch.zeros(p, k, dtype=dtype, device=device)
            self.sb = torch.zeros(n, p, dtype=dtype, device=device)
        else:
            self._buffer = torch.zeros(n + p, k + p, dtype=dtype, device=device)
            self.a, self.sb = self._buffer[n:, :k], self._buffer[:n, k:]
        for index, (linear, slot) in enumerate(zip(linears, self.slots, strict=True)):
            if isinstance(linear.weight, torch.Tensor):
                view = self.weight_view(slot)
                view.copy_(linear.weight)
                # or the original would live on
                self.linears[index] = replace(linear, weight=view)

    def weight_view(self, slot: Slot) -> torch.Tensor:
        """Return the place of a linear's frozen weight in the buffer, (N_j, K)."""
        return self._buffer[slot.rows, : self.num_in]

    def buffer(self) -> torch.Tensor:
        """Return W_aug, (N+P, K+P); one on demand is valid until the next call on any group."""
        if self.is_on_demand:
            n, k = self.num_out, self.num_in
            for linear, slot in zip(self.linears, self.slots, strict=True):
                assert not isinstance(linear.weight, torch.Tensor)
                linear.weight.write(self.weight_view(slot))
            self._buffer[n:, :k].copy_(self.a)
            self._buffer[:n, k:].copy_(self.sb)
        return self._buffer

    @property
    def has_adapter(self) -> bool:
        """Whether any linear of the group has an adapter."""
        return self.rank_used > 0

    @property
    def a_or_none(self) -> torch.Tensor | None:
        """A of the group, (P, K); None without rank columns."""
        return self.a if self.rank_columns else None

    @property
    def sb_or_none(self) -> torch.Tensor | None:
        """Scaled B of the group, (N, P); None without adapters, when no gradient needs it."""
        return self.sb if self.rank_columns else None

    def parameters(self) -> list[torch.Tensor]:
        """Return the trained parameters: A and B of each adapted linear, in this order."""
        found: list[torch.Tensor] = []
        for linear in self.linears:
            if linear.lora_a is not None and linear.lora_b is not None:
                found += [linear.lora_a, linear.lora_b]
        return found

    def copies(self) -> list[Copy]:
        """Return what keeps the working copies equal to the rounded parameters and biases."""
        found = []
        scalings = iter(self.scalings)
        for linear, slot in zip(self.linears, self.slots, strict=True):
            if linear.bias is not None:
                assert self.ones_column is not None
                column = slice(self.ones_column, self.ones_column + 1)
                found.append(Copy(linear.bias[:, None], self.sb[slot.rows, column]))
            if linear.lora_a is None or linear.lora_b is None:
                continue
            columns = slice(slot.first, slot.first + slot.rank)
            found.append(Copy(linear.lora_a, self.a[columns]))
            found.append(Copy(linear.lora_b, self.sb[slot.rows, columns], next(scalings)))
        return found

    def forward(self, x_aug: torch.Tensor) -> torch.Tensor:
        """Return Y, (M, N), of `[X | H]`, (M, K+P)."""
        return torch.mm(x_aug, self.buffer()[: self.num_out].T)

    def backward(self, dy_aug: torch.Tensor, *, is_dropped: bool) -> torch.Tensor:
        """Return dX, (M, K), of `[dY | G]`, (M, N+P); with dropout without the adapters' term."""
        rows = self.num_out if is_dropped else self.num_out + self.rank_columns
        return torch.mm(dy_aug[:, :rows], self.buffer()[:rows, : self.num_in])

    def gradients(
        self, dy_MN: torch.Tensor, h_MP: torch.Tensor, da_PK: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the gradients of `parameters()`, in their dtypes.

        Args:
            dy_MN: (M, N), gradient of the output.
            h_MP: (M, P), the forward's H.
            da_PK: (rank_used, K), G^T drop(X) in the accumulation dtype.

        Returns:
            dA (R, K) and dB = s dY^T H (N_j, R) of each adapted linear.
        """
        if not self.has_adapter:
            return []
        db_NP = thin_product(dy_MN, h_MP[:, : self.rank_used])
        found = []
        scalings = iter(self.scalings)
        for linear, slot in zip(self.linears, self.slots, strict=True):
            if linear.lora_a is None or linear.lora_b is None:
                continue
            columns = slice(slot.first, slot.first + slot.rank)
            found.append(da_PK[columns].to(linear.lora_a.dtype))
            found.append((db_NP[slot.rows, columns] * next(scalings)).to(linear.lora_b.dtype))
        return found


def thin_product(left_MP: torch.Tensor, right_MQ: torch.Tensor) -> torch.Tensor:
    """Return left^T right, (P, Q), in fp32 (fp64 for fp64): a gradient is not rounded to bf16."""
    if left_MP.is_cuda and left_MP.element_size() == 2 and len(left_MP) > 0:
        return torch.mm(left_MP.T, right_MQ, out_dtype=torch.float32)
    return torch.mm(left_MP.T, right_MQ)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
