"""Plain torch references of `swiglu`: no casts, so they run in fp64 as well."""

from __future__ import annotations

import torch

from lora_kernels.dropout import Dropout, apply_dropout_reference


def reference_swiglu_forward(
    gate_up_M2N: torch.Tensor,
    a_PN: torch.Tensor | None,
    *,
    rank: int,
    rank_columns: int,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> torch.Tensor:
    """Return `[act | H]` (M, N+P); P is `rank_columns`."""
    gate_MN, up_MN = gate_up_M2N.chunk(2, 1)
    act_MN = torch.nn.functional.silu(gate_MN) * up_MN
    h_MP = act_MN.new_zeros(act_MN.shape[0], rank_columns)
    if a_PN is not None:
        h_MP[:, :rank] = apply_dropout_reference(act_MN, dropout) @ a_PN[:rank].T
    if ones_column is not None:
        h_MP[:, ones_column] = 1
    return torch.cat([act_MN, h_MP], 1)


def reference_swiglu_backward(
    gate_up_M2N: torch.Tensor,
    dact_MN: torch.Tensor,
    sb: torch.Tensor | None,
    *,
    gate_slot: tuple[int, int],
    up_slot: tuple[int, int],
    rank_columns: int,
    adapter: tuple[torch.Tensor, torch.Tensor, Dropout] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[dgate | dup | G]` (M, 2N+P) and what the adapter saw of act (M, N)."""
    gate_MN, up_MN = gate_up_M2N.chunk(2, 1)
    sigmoid_MN = torch.sigmoid(gate_MN)
    act_MN = gate_MN * sigmoid_MN * up_MN
    d_MN = dact_MN
    if adapter is not None:
        g_MR, a_RN, dropout = adapter
        # dropout is linear, so it is its own adjoint
        d_MN = d_MN + apply_dropout_reference(g_MR @ a_RN, dropout)
        act_MN = apply_dropout_reference(act_MN, dropout)
    dgate_MN = d_MN * up_MN * sigmoid_MN * (1 + gate_MN * (1 - sigmoid_MN))
    dup_MN = d_MN * gate_MN * sigmoid_MN
    g_MP = d_MN.new_zeros(d_MN.shape[0], rank_columns)
    if sb is not None:
        sb_gate, sb_up = sb.chunk(2, 0)
        for (first, width), grad, weight in (
            (gate_slot, dgate_MN, sb_gate),
            (up_slot, dup_MN, sb_up),
        ):
            g_MP[:, first : first + width] = grad @ weight[:, first : first + width]
    return torch.cat([dgate_MN, dup_MN, g_MP], 1), act_MN
