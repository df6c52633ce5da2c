"""Shapes of models and random tensors, shared by tuning and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A micro-batch of a decoder of the Llama family, and its adapters."""

    name: str
    num_tokens: int
    sequence: int
    """Tokens of each packed sequence."""
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    num_layers: int
    rank: int
    """Of each linear, a multiple of 16."""

    @property
    def num_qkv(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def modules(self) -> dict[str, tuple[int, list[int]]]:
        """Input features of each projection group and the output features of its linears."""
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, [wide, narrow, narrow]),
            "o": (wide, [self.hidden]),
            "gate_up": (self.hidden, [self.intermediate, self.intermediate]),
            "down": (self.intermediate, [self.hidden]),
        }

    @property
    def groups(self) -> dict[str, tuple[int, int, int]]:
        """K, N and P of each projection group."""
        return {
            name: (num_in, sum(rows), self.rank_columns(len(rows)))
            for name, (num_in, rows) in self.modules.items()
        }

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """K and N of the linear layers, each shape once."""
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, wide),
            "k_proj": (self.hidden, narrow),
            "gate_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def rank_columns(self, num_modules: int) -> int:
        """P of a group of so many linears."""
        return -(-num_modules * self.rank // 64) * 64


LLAMA_31_8B = Shape(
    "Llama-3.1-8B", num_tokens=8192, sequence=2048, hidden=4096, intermediate=14336, num_heads=32,
    num_kv_heads=8, head_dim=128, vocabulary=128256, num_layers=32, rank=16,
)  # fmt: skip
# for Triton's interpreter
TINY = Shape(
    "tiny", num_tokens=24, sequence=12, hidden=64, intermediate=96, num_heads=2, num_kv_heads=1,
    head_dim=32, vocabulary=300, num_layers=2, rank=16,
)  # fmt: skip


class Tensors:
    """Makes random tensors, the same ones in the same order."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Normally distributed."""
        make = {"dtype": dtype or self.dtype, "device": self.device}
        return torch.randn(*shape, generator=self._generator, **make).mul_(scale)

    def integers(self, end: int, num: int, dtype: torch.dtype) -> torch.Tensor:
        """Any of [0, end)."""
        make = {"dtype": dtype, "device": self.device}
        return torch.randint(end, (num,), generator=self._generator, **make)

    def unwritten(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Full of NaN."""
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device)

    def rank_rows(self, num_columns: int, num_ranks: int, used: int) -> torch.Tensor:
        """A of a group, (P, K), as it stands in the augmented weights; unused rows are zero."""
        rows = self.normal(num_ranks, num_columns + num_ranks, scale=num_columns**-0.5)
        rows[used:] = 0
        return rows[:, :num_columns]

    def rank_columns(
        self, num_in: int, num_ranks: int, blocks: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Scaled B of a group, (N, P): rows and rank of the modules on its block diagonal."""
        num_out = sum(rows for rows, _ in blocks)
        wide = torch.zeros(num_out, num_in + num_ranks, dtype=self.dtype, device=self.device)
        row = column = 0
        for rows, rank in blocks:
            part = wide[row : row + rows, num_in + column : num_in + column + rank]
            part.copy_(self.normal(rows, rank, scale=0.1))
            row, column = row + rows, column + rank
        return wide[:, num_in:]
