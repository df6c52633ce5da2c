"""One decoder layer of the Llama family, forward and backward by hand.

Letters: M tokens, K hidden size, I intermediate size, H query heads, G key/value heads, D head
width; P rank columns of the projection group that reads a tensor, or whose gradient it is.

    forward                                              backward
    r1 = residual + delta                                dact = [dR | G] W_down
    [x | h] = norm(r1)           qkv = [x | h] W_qkv      [dgate dup | G] = swiglu'(dact)
    q, k = rope(q, k)            [att | h] = attention    dx = [..| G] W_gate_up
    y = [att | h] W_o                                    [dr2 | G] = norm'(dx) + dR
    r2 = r1 + y                                          datt = [dr2 | G] W_o, then attention'
    [x | h] = norm(r2)           gate up = [x | h] W_gu   [dqkv | G] = rope'(dq, dk, dv)
    [act | h] = swiglu           delta = [act | h] W_d    dx = [..| G] W_qkv, [dr1 | G] = norm'(dx)

Only r1, r2, q/k/v, the attention's output and statistics, gate and up, and the narrow h are kept,
93 KB a token at 8B shapes; x and act are recomputed by the backward kernels that walk over what
they are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_kernels.arguments import statistics_dtype
from lora_kernels.attention import attention_backward, attention_forward
from lora_kernels.augmented import AugmentedGroup, thin_product
from lora_kernels.dropout import Dropout
from lora_kernels.project import add_masked_product, dropped, project
from lora_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward
from lora_kernels.rope import HeadNorms, rope_backward, rope_forward
from lora_kernels.swiglu import swiglu_backward, swiglu_forward


class Sequences(NamedTuple):
    """The packed sequences of a micro-batch."""

    cos: torch.Tensor
    """Of the rotary embedding at each token's position, (M, D/2), fp32."""
    sin: torch.Tensor
    """Likewise."""
    cu_seqlens: torch.Tensor
    """Borders of the sequences, (sequences + 1,), int32, from 0 to M."""
    max_seqlen: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True)
class DecoderLayer:
    """The frozen parts and the adapters of one layer."""

    index: int
    """Number of the layer, from 0; no two layers draw the same dropout."""
    qkv: AugmentedGroup
    o: AugmentedGroup
    gate_up: AugmentedGroup
    down: AugmentedGroup
    input_norm: torch.Tensor
    """Weight of the norm before attention, (K,)."""
    post_attention_norm: torch.Tensor
    """Weight of the norm before the MLP, (K,)."""
    norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_scale: float
    """Factor on the attention scores."""
    window: int | None = None
    """Tokens that a token sees, itself included; None: all earlier ones."""
    head_norms: HeadNorms | None = None
    """Norms of each query and key head (Qwen3)."""

    @property
    def groups(self) -> tuple[AugmentedGroup, AugmentedGroup, AugmentedGroup, AugmentedGroup]:
        """The projection groups, in the order in which parameters and gradients are listed."""
        return self.qkv, self.o, self.gate_up, self.down


class LayerDropout(NamedTuple):
    """What the adapters of the four groups drop; None: nothing."""

    qkv: Dropout | None
    o: Dropout | None
    gate_up: Dropout | None
    down: Dropout | None


def draw_dropout(layer: DecoderLayer, seed: int | None) -> LayerDropout:
    """Return the layer's draws of one forward pass; `seed` None: nothing is dropped."""
    draws = [
        None
        if seed is None or group.dropout_p == 0 or not group.has_adapter
        else Dropout(group.dropout_p, seed, 4 * layer.index + number)
        for number, group in enumerate(layer.groups)
    ]
    return LayerDropout(*draws)


class Saved(NamedTuple):
    """What the backward pass of a layer needs."""

    r1: torch.Tensor
    rstd1: torch.Tensor
    h_qkv: torch.Tensor
    qkv: torch.Tensor
    roped_qk: torch.Tensor | None
    att: torch.Tensor
    """Output of the attention, (M, H D)."""
    lse: torch.Tensor
    att_aug: torch.Tensor
    """`[att | h]` of the tokens that are read, (M', H D + P); `att` is a view of it if all are."""
    r2: torch.Tensor
    rstd2: torch.Tensor
    h_gate_up: torch.Tensor
    gate_up: torch.Tensor
    h_down: torch.Tensor


def layer_forward(
    layer: DecoderLayer,
    sequences: Sequences,
    residual: torch.Tensor,
    delta: torch.Tensor | None,
    dropout: LayerDropout,
    *,
    rows: torch.Tensor | None = None,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Saved]:
    """Run one layer.

    Args:
        layer: weights and adapters.
        sequences: which tokens see which, and their rotations.
        residual: (M, K).
        delta: (M, K), the last summand of the residual; None: it is in there.
        dropout: the layer's draws.
        rows: tokens whose output anyone reads, (M',) int64, distinct; None: all. Only the last
            layer may be told so: the others' keys and values are read by all.
        recompute: the output is known already; only `Saved` is wanted.

    Returns:
        Residual and its last summand, (M', K), the latter None with `recompute`; and what the
        backward pass needs.
    """
    num_tokens, hidden = residual.shape
    new = residual.new_empty
    rstd1 = _empty_rstd(residual)
    r1 = residual if delta is None else new(num_tokens, hidden)
    x_aug = new(num_tokens, hidden + layer.qkv.rank_columns)
    add_rms_norm_forward(
        residual, delta, layer.input_norm, layer.norm_eps, x_aug, layer.qkv.a_or_none,
        None if delta is None else r1, rstd1,
        dropout=dropout.qkv, ones_column=layer.qkv.ones_column,
    )  # fmt: skip
    del residual, delta
    qkv = layer.qkv.forward(x_aug)
    h_qkv = _rank_columns(x_aug, layer.qkv)
    del x_aug

    width_q = layer.num_heads * layer.head_dim
    roped_qk = None
    if layer.head_norms is not None:
        roped_qk = new(num_tokens, (layer.num_heads + layer.num_kv_heads) * layer.head_dim)
    rope_forward(
        qkv, sequences.cos, sequences.sin,
        num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads,
        norms=layer.head_norms, out_qk=roped_qk,
    )  # fmt: skip
    att_aug = new(num_tokens, width_q + layer.o.rank_columns)
    lse = attention_forward(
        *_heads(layer, qkv, roped_qk), sequences.cu_seqlens, sequences.max_seqlen,
        att_aug[:, :width_q].unflatten(1, (layer.num_heads, layer.head_dim)),
        scale=layer.attention_scale, window=layer.window,
    )  # fmt: skip
    read_att, read_r1 = att_aug, r1
    if rows is not None:
        read_att, read_r1 = att_aug.index_select(0, rows), r1.index_select(0, rows)
    if layer.o.rank_columns:
        project(
            read_att[:, :width_q], layer.o.a, read_att,
            dropout=dropout.o, ones_column=layer.o.ones_column,
        )  # fmt: skip
    y_o = layer.o.forward(read_att)

    r2, rstd2 = y_o, _empty_rstd(read_r1)
    x_aug = new(len(read_r1), hidden + layer.gate_up.rank_columns)
    add_rms_norm_forward(
        read_r1, y_o, layer.post_attention_norm, layer.norm_eps, x_aug, layer.gate_up.a_or_none,
        r2, rstd2, dropout=dropout.gate_up, ones_column=layer.gate_up.ones_column,
    )  # fmt: skip
    gate_up = layer.gate_up.forward(x_aug)
    h_gate_up = _rank_columns(x_aug, layer.gate_up)
    del x_aug
    act_aug = new(len(r2), layer.down.num_in + layer.down.rank_columns)
    swiglu_forward(
        gate_up, act_aug, layer.down.a_or_none,
        rank=layer.down.rank_used, dropout=dropout.down, ones_column=layer.down.ones_column,
    )  # fmt: skip
    saved = Saved(
        r1, rstd1, h_qkv, qkv, roped_qk, att_aug[:, :width_q], lse, read_att, r2, rstd2,
        h_gate_up, gate_up, _rank_columns(act_aug, layer.down),
    )  # fmt: skip
    return r2, None if recompute else layer.down.forward(act_aug), saved


def layer_backward(
    layer: DecoderLayer,
    below: AugmentedGroup | None,
    sequences: Sequences,
    saved: Saved,
    dr_aug: torch.Tensor,
    dropout: LayerDropout,
    *,
    rows: torch.Tensor | None = None,
    needs_input_grad: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Take the gradient back through one layer.

    Args:
        layer: weights and adapters.
        below: the group whose output is the layer's `delta`; None for the first layer.
        sequences: as in the forward pass.
        saved: what it kept; the caller should hold no other reference.
        dr_aug: (M', K+P), gradient of the layer's output and its G for the down projection.
        dropout: the same draws.
        rows: as in the forward pass.
        needs_input_grad: whether anything below the layer is trained.

    Returns:
        `[dr | G]` (M, K+P) for the layer below, None unless needed; gradients of the groups'
        parameters in the order of `groups`.
    """
    hidden = layer.qkv.num_in
    dact = layer.down.backward(dr_aug, is_dropped=dropout.down is not None)
    num_read, intermediate = dact.shape
    d_gate_up = dact.new_empty(num_read, 2 * intermediate + layer.gate_up.rank_columns)
    gate, up = layer.gate_up.slots
    g_down = dr_aug[:, hidden : hidden + layer.down.rank_used]
    swiglu_backward(
        saved.gate_up, dact, d_gate_up, layer.gate_up.sb if layer.gate_up.has_adapter else None,
        gate_slot=gate.span, up_slot=up.span, act_out=dact if layer.down.has_adapter else None,
        adapter=None
        if dropout.down is None
        else (g_down, layer.down.a[: layer.down.rank_used], dropout.down),
    )  # fmt: skip
    # dact holds drop(act) now
    down_gradients = layer.down.gradients(
        dr_aug[:, :hidden], saved.h_down, thin_product(g_down, dact)
    )
    del dact, g_down

    dx = layer.gate_up.backward(d_gate_up, is_dropped=dropout.gate_up is not None)
    dr2_aug = dx.new_empty(num_read, hidden + layer.o.rank_columns)
    da = _norm_backward(
        layer.gate_up, layer.post_attention_norm, saved.r2, saved.rstd2, dx,
        d_gate_up[:, layer.gate_up.num_out :], dr_aug, dr2_aug, layer.o, dropout.gate_up,
    )  # fmt: skip
    gate_up_gradients = layer.gate_up.gradients(
        d_gate_up[:, : layer.gate_up.num_out], saved.h_gate_up, da
    )
    del dx, d_gate_up, dr_aug

    o_gradients = _o_gradients(layer.o, dr2_aug, saved.att_aug, dropout.o)
    trains_below_o = needs_input_grad or layer.qkv.has_adapter
    if not trains_below_o:
        return None, [*o_gradients, *gate_up_gradients, *down_gradients]
    d_att = layer.o.backward(dr2_aug, is_dropped=dropout.o is not None)
    if dropout.o is not None:
        used = layer.o.rank_used
        add_masked_product(d_att, dr2_aug[:, hidden : hidden + used], layer.o.a[:used], dropout.o)
    if rows is not None:
        d_att = d_att.new_zeros(saved.att.shape).index_copy_(0, rows, d_att)
        dr2_aug = dr2_aug.new_zeros(len(saved.r1), dr2_aug.shape[1]).index_copy_(0, rows, dr2_aug)
    d_qkv = d_att.new_empty(len(saved.r1), layer.qkv.num_out + layer.qkv.rank_columns)
    dq, dk, dv = _split_heads(layer, d_qkv[:, : layer.qkv.num_out])
    attention_backward(
        d_att.unflatten(1, (layer.num_heads, layer.head_dim)),
        *_heads(layer, saved.qkv, saved.roped_qk),
        saved.att.unflatten(1, (layer.num_heads, layer.head_dim)), saved.lse,
        sequences.cu_seqlens, sequences.max_seqlen, dq, dk, dv,
        scale=layer.attention_scale, window=layer.window,
    )  # fmt: skip
    del d_att
    q, k, v = layer.qkv.slots
    rope_backward(
        dq.flatten(1), dk.flatten(1), dv.flatten(1), d_qkv, sequences.cos, sequences.sin,
        layer.qkv.sb_or_none, slots=(q.span, k.span, v.span),
        norms=layer.head_norms, qkv_MN=None if layer.head_norms is None else saved.qkv,
    )  # fmt: skip
    dr1_aug = None
    if needs_input_grad:
        dx = layer.qkv.backward(d_qkv, is_dropped=dropout.qkv is not None)
        width = 0 if below is None else below.rank_columns
        dr1_aug = dx.new_empty(len(saved.r1), hidden + width)
        da = _norm_backward(
            layer.qkv, layer.input_norm, saved.r1, saved.rstd1, dx,
            d_qkv[:, layer.qkv.num_out :], dr2_aug, dr1_aug, below, dropout.qkv,
        )  # fmt: skip
    else:
        da = _first_da(layer, saved, d_qkv, dropout.qkv)
    qkv_gradients = layer.qkv.gradients(d_qkv[:, : layer.qkv.num_out], saved.h_qkv, da)
    return dr1_aug, [*qkv_gradients, *o_gradients, *gate_up_gradients, *down_gradients]


def _norm_backward(
    group: AugmentedGroup,
    weight: torch.Tensor,
    r: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    g_MP: torch.Tensor,
    d_residual: torch.Tensor,
    out_aug: torch.Tensor,
    below: AugmentedGroup | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """Write `[dr | G]` of the group below into `out_aug`; return dA of the group; spends `dx`."""
    adapter = x_out = None
    if dropout is not None:
        adapter, x_out = (g_MP, group.a, dropout), dx
    rms_norm_backward(
        dx, r, rstd, weight, d_residual, out_aug, None if below is None else below.sb_or_none,
        adapter=adapter, x_out=x_out,
    )  # fmt: skip
    g_MP = g_MP[:, : group.rank_used]
    return _da_of_norm(g_MP, r, rstd, weight) if x_out is None else thin_product(g_MP, x_out)


def _da_of_norm(
    g_MP: torch.Tensor, r: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return G^T x, (P, K), of x = r * rstd * weight without making x again."""
    scaled = (g_MP * rstd[:, None]).to(g_MP.dtype)
    return thin_product(scaled, r) * weight


def _first_da(
    layer: DecoderLayer, saved: Saved, d_qkv: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """Return dA of the first layer's qkv group, below which nothing is trained."""
    g_MP = d_qkv[:, layer.qkv.num_out :][:, : layer.qkv.rank_used]
    if dropout is None:
        return _da_of_norm(g_MP, saved.r1, saved.rstd1, layer.input_norm)
    x = torch.empty_like(saved.r1)
    add_rms_norm_forward(
        saved.r1, None, layer.input_norm, layer.norm_eps, x, None, None, saved.rstd1.clone()
    )
    dropped(x, dropout, x)
    return thin_product(g_MP, x)


def _o_gradients(
    o: AugmentedGroup, dr2_aug: torch.Tensor, att_aug: torch.Tensor, dropout: Dropout | None
) -> list[torch.Tensor]:
    if not o.has_adapter:
        return []
    att, h = att_aug[:, : o.num_in], att_aug[:, o.num_in :]
    if dropout is not None:
        seen = torch.empty_like(att)
        dropped(att, dropout, seen)
        att = seen
    da = thin_product(dr2_aug[:, o.num_out : o.num_out + o.rank_used], att)
    return o.gradients(dr2_aug[:, : o.num_out], h, da)


def _heads(
    layer: DecoderLayer, qkv: torch.Tensor, roped_qk: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v as views, (M, heads, D)."""
    q, k, v = _split_heads(layer, qkv)
    if roped_qk is not None:
        q = roped_qk[:, : layer.num_heads * layer.head_dim].view_as(q)
        k = roped_qk[:, layer.num_heads * layer.head_dim :].view_as(k)
    return q, k, v


def _split_heads(
    layer: DecoderLayer, qkv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = qkv.unflatten(1, (-1, layer.head_dim))
    q, k, v = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 1)
    return q, k, v


def _rank_columns(aug: torch.Tensor, group: AugmentedGroup) -> torch.Tensor:
    """Return a copy of the H that the group's gradients need: the wide part can be freed."""
    return aug[:, group.num_in : group.num_in + group.rank_used].clone()


def _empty_rstd(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(len(like), dtype=statistics_dtype(like.dtype))
