"""Every operation once, at a shape that fills no block, while memcheck.sh looks on."""

from __future__ import annotations

import torch
from operations import OPERATIONS
from shapes import Shape, Tensors

# nothing divides by the blocks of the launch tables; strides divide by 16, as cuBLAS likes it
ODD = Shape(
    "odd", num_tokens=333, sequence=111, hidden=720, intermediate=1104, num_heads=6,
    num_kv_heads=2, head_dim=128, vocabulary=5003, num_layers=1, rank=16,
)  # fmt: skip


def main() -> None:
    """Run them, each on tensors of its own."""
    device = torch.device("cuda")
    for name, build in OPERATIONS.items():
        build(ODD, Tensors(device, torch.bfloat16)).run()
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


if __name__ == "__main__":
    main()
