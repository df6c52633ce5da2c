"""Plain torch references of `rms_norm`: no casts, so they run in fp64 as well."""

from __future__ import annotations

import torch

from lora_kernels.dropout import Dropout, apply_dropout_reference


def reference_add_rms_norm_forward(
    residual_MK: torch.Tensor,
    delta_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    a_PK: torch.Tensor | None,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `[X | H]` (M, K+P), the sum `residual + delta` (M, K) and its rstd (M,)."""
    v_MK = residual_MK if delta_MK is None else residual_MK + delta_MK
    rstd_M = torch.rsqrt(v_MK.square().mean(1) + eps)
    x_MK = v_MK * rstd_M[:, None] * weight_K
    if a_PK is None:
        return x_MK, v_MK, rstd_M
    h_MP = apply_dropout_reference(x_MK, dropout) @ a_PK.T
    if ones_column is not None:
        h_MP[:, ones_column] = 1
    return torch.cat([x_MK, h_MP], 1), v_MK, rstd_M


def reference_rms_norm_backward(
    dx_MK: torch.Tensor,
    residual_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    d_residual_in: torch.Tensor | None,
    sb_KP: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor, Dropout] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[dV | G]` (M, K+P) and what the adapter saw of the norm's output (M, K)."""
    num_columns = weight_K.shape[0]
    x_MK = residual_MK * rstd_M[:, None] * weight_K
    if adapter is not None:
        g_MP, a_PK, dropout = adapter
        # dropout is linear, so it is its own adjoint
        dx_MK = dx_MK + apply_dropout_reference(g_MP @ a_PK, dropout)
        x_MK = apply_dropout_reference(x_MK, dropout)
    normed_MK = residual_MK * rstd_M[:, None]
    g_MK = dx_MK * weight_K
    d_v_MK = (g_MK - normed_MK * (g_MK * normed_MK).mean(1, keepdim=True)) * rstd_M[:, None]
    if d_residual_in is not None:
        d_v_MK = d_v_MK + d_residual_in[:, :num_columns]
    return (d_v_MK if sb_KP is None else torch.cat([d_v_MK, d_v_MK @ sb_KP], 1)), x_MK
