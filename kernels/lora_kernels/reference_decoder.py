"""Plain torch reference of the decoder stack: no casts, so it runs in fp64 as well."""

from __future__ import annotations

import torch

from lora_kernels.augmented import AugmentedGroup
from lora_kernels.decoder import DecoderStack
from lora_kernels.decoder_layer import DecoderLayer, Sequences, draw_dropout
from lora_kernels.dropout import Dropout, apply_dropout_reference


def reference_decoder(
    stack: DecoderStack,
    hidden_MK: torch.Tensor,
    sequences: Sequences,
    parameters: list[torch.Tensor],
    *,
    rows: torch.Tensor | None = None,
    dropout_seed: int | None = None,
) -> torch.Tensor:
    """Return what `stack` returns, (M', K), computed by autograd's own operations.

    Args:
        stack: its frozen weights are used, in the dtype of `hidden_MK`.
        hidden_MK: (M, K), embedded tokens.
        sequences: which tokens see which, and their rotations.
        parameters: A and B of all adapters, in the order of `stack.parameters`.
        rows: tokens that are read; None: all.
        dropout_seed: of the pass; None: nothing is dropped.

    Returns:
        The normed hidden states.
    """
    remaining = list(parameters)
    for layer in stack.layers:
        groups = []
        for group in layer.groups:
            count = len(group.parameters())
            groups.append((group, remaining[:count]))
            del remaining[:count]
        read = rows if layer is stack.layers[-1] else None
        hidden_MK = _layer(layer, groups, hidden_MK, sequences, read, dropout_seed)
    return _norm(hidden_MK, stack.final_norm, stack.final_norm_eps)


def _layer(
    layer: DecoderLayer,
    groups: list[tuple[AugmentedGroup, list[torch.Tensor]]],
    residual: torch.Tensor,
    sequences: Sequences,
    rows: torch.Tensor | None,
    dropout_seed: int | None,
) -> torch.Tensor:
    dropout = draw_dropout(layer, dropout_seed)
    x = _norm(residual, layer.input_norm, layer.norm_eps)
    qkv = _project(*groups[0], x, dropout.qkv).unflatten(1, (-1, layer.head_dim))
    q, k, v = qkv.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 1)
    if layer.head_norms is not None:
        q = _norm(q, layer.head_norms.q_weight, layer.head_norms.eps)
        k = _norm(k, layer.head_norms.k_weight, layer.head_norms.eps)
    q, k = _rotate(q, sequences), _rotate(k, sequences)
    att = _attend(layer, q, k, v, sequences.cu_seqlens.tolist()).flatten(1)
    if rows is not None:
        att, residual = att[rows], residual[rows]
    residual = residual + _project(*groups[1], att, dropout.o)
    x = _norm(residual, layer.post_attention_norm, layer.norm_eps)
    gate, up = _project(*groups[2], x, dropout.gate_up).chunk(2, 1)
    act = torch.nn.functional.silu(gate) * up
    return residual + _project(*groups[3], act, dropout.down)


def _project(
    group: AugmentedGroup,
    parameters: list[torch.Tensor],
    x_MK: torch.Tensor,
    dropout: Dropout | None,
) -> torch.Tensor:
    dtype = x_MK.dtype
    buffer = group.buffer()
    seen_MK = apply_dropout_reference(x_MK, dropout)
    remaining, scalings = list(parameters), iter(group.scalings)
    outputs = []
    for linear, slot in zip(group.linears, group.slots, strict=True):
        y_MN = x_MK @ buffer[slot.rows, : group.num_in].to(dtype).T
        if linear.bias is not None:
            y_MN = y_MN + linear.bias.to(dtype)
        if linear.lora_a is not None:
            a, b = remaining.pop(0).to(dtype), remaining.pop(0).to(dtype)
            y_MN = y_MN + ((seen_MK @ a.T) @ b.T) * next(scalings)
        outputs.append(y_MN)
    return torch.cat(outputs, 1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd * weight.to(x.dtype)


def _rotate(x_MHD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    cos, sin = (half.to(x_MHD.dtype)[:, None] for half in (sequences.cos, sequences.sin))
    first, second = x_MHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attend(
    layer: DecoderLayer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: list[int],
) -> torch.Tensor:
    outputs = []
    repeats = layer.num_heads // layer.num_kv_heads
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        places = torch.arange(end - start, device=q.device)
        distance = places[:, None] - places[None, :]
        hidden = distance < 0
        if layer.window is not None:
            hidden |= distance >= layer.window
        keys = k[start:end].repeat_interleave(repeats, 1)
        values = v[start:end].repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * layer.attention_scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)
