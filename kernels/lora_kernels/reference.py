"""Plain torch references of every operation: the truth of tests, benchmarks and the self-check.

No casts, so they run in fp64 as well. Letters and arguments are those of the operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lora_kernels.arguments import statistics_dtype
from lora_kernels.dropout import Dropout, apply_dropout_reference
from lora_kernels.refresh import Copy
from lora_kernels.rope import HeadNorms


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


def reference_rope_forward(
    qkv_MN: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Return the rotated `[q | k]` (M, (Hq+Hkv) D)."""
    heads = qkv_MN.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    if norms is not None:
        q = q * _rstd(q, norms.eps) * norms.q_weight
        k = k * _rstd(k, norms.eps) * norms.k_weight
    x = torch.cat([q, k], 1)
    return (x * _of_both_halves(cos) + _rotate_half(x) * _of_both_halves(sin)).flatten(1)


def reference_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sb: torch.Tensor | None,
    *,
    slots: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    rank_columns: int,
    norms: HeadNorms | None = None,
    qkv_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `[dq' | dk' | dv | G]` (M, N+P); P is `rank_columns`."""
    head_columns = 2 * cos.shape[1]
    parts = []
    for grad in (dq, dk):
        d = grad.unflatten(1, (-1, head_columns))
        g = d * _of_both_halves(cos) - _rotate_half(d) * _of_both_halves(sin)
        parts.append(g)
    if norms is not None and qkv_MN is not None:
        raw_parts = qkv_MN.split([dq.shape[1], dk.shape[1], dv.shape[1]], 1)
        weights = (norms.q_weight, norms.k_weight)
        for index, weight in enumerate(weights):
            x = raw_parts[index].unflatten(1, (-1, head_columns))
            rstd = _rstd(x, norms.eps)
            normed = x * rstd
            g = parts[index] * weight
            parts[index] = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    parts = [part.flatten(1) for part in parts] + [dv]
    g_MP = dq.new_zeros(dq.shape[0], rank_columns)
    if sb is not None:
        sb_parts = sb.split([part.shape[1] for part in parts])
        for (first, width), part, weight in zip(slots, parts, sb_parts, strict=True):
            g_MP[:, first : first + width] = part @ weight[:, first : first + width]
    return torch.cat([*parts, g_MP], 1)


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    x_1, x_2 = x.chunk(2, -1)
    return torch.cat([-x_2, x_1], -1)


def _of_both_halves(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles, angles], 1)[:, None]


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p (H, L, L) and lse (H, L), in units of log 2, of one sequence."""
    distance = torch.arange(q.shape[0], device=q.device)
    distance = distance[:, None] - distance[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, -1), torch.logsumexp(scores, -1) / math.log(2)


def reference_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (M, Hq, D) and lse (Hq, M), in units of log 2; k and v are (M, Hkv, D)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # of no tokens, so that there is something to concatenate
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0)]
    starts = cu_seqlens.tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        p, lse = _probabilities(q[start:end], k[start:end], scale, window)
        outs.append(torch.einsum("hij,jhd->ihd", p, v[start:end]))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def reference_attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq (M, Hq, D), dk and dv (M, Hkv, D)."""
    num_key_heads = k.shape[1]
    group = q.shape[1] // num_key_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    starts = cu_seqlens.tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        part = slice(start, end)
        p, _ = _probabilities(q[part], k[part], scale, window)
        dv[part] = torch.einsum("hij,ihd->jhd", p, d_out[part])
        dp = torch.einsum("ihd,jhd->hij", d_out[part], v[part])
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        dq[part] = torch.einsum("hij,jhd->ihd", ds, k[part]) * scale
        dk[part] = torch.einsum("hij,ihd->jhd", ds, q[part]) * scale
    # the query heads of a group share their key head
    shape = (k.shape[0], num_key_heads, group, k.shape[2])
    return dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)


def reference_project(
    x_MK: torch.Tensor,
    a_PK: torch.Tensor,
    dropout: Dropout | None = None,
    ones_column: int | None = None,
) -> torch.Tensor:
    """Return `[x | H]` (M, K+P)."""
    h_MP = apply_dropout_reference(x_MK, dropout) @ a_PK.T
    if ones_column is not None:
        h_MP[:, ones_column] = 1
    return torch.cat([x_MK, h_MP], 1)


def reference_add_masked_product(
    dx_MK: torch.Tensor, g_MR: torch.Tensor, a_RK: torch.Tensor, dropout: Dropout
) -> torch.Tensor:
    """Return `dx + drop(g @ a)` (M, K)."""
    # dropout is linear, so it is its own adjoint
    return dx_MK + apply_dropout_reference(g_MR @ a_RK, dropout)


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


def reference_linear_cross_entropy(
    hidden_TK: torch.Tensor,
    weight_VK: torch.Tensor,
    targets_T: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of the cross entropies, differentiable; logits are rounded, sums are not."""
    logits_TV = hidden_TK @ weight_VK.T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logits_TV = logits_TV.to(statistics_dtype(logits_TV.dtype))
    return torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")


def reference_refresh(copies: Sequence[Copy]) -> None:
    """Write all copies, one after the other."""
    with torch.no_grad():
        for source, target, scale in copies:
            target.copy_(source * scale)


def reference_lora_linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    lora_a_RK: torch.Tensor,
    lora_b_NR: torch.Tensor,
    scaling: float,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return `x W^T + b + s (drop(x) A^T) B^T` (..., N), differentiable in every tensor."""
    x_MK = x.reshape(-1, x.shape[-1])
    y_MN = x_MK @ weight_NK.T
    if bias_N is not None:
        y_MN = y_MN + bias_N
    h_MR = apply_dropout_reference(x_MK, dropout) @ lora_a_RK.T
    y_MN = y_MN + scaling * (h_MR @ lora_b_NR.T)
    return y_MN.view(*x.shape[:-1], y_MN.shape[1])
