"""Every public operation at the shape of a model, on random tensors: what is tuned and measured.

An operation is built on the same tensors each time, with outputs full of NaN; where training hands
it views of wider buffers or works in place, so does this. Letters: M tokens, K input features, N
output features (of the MLP: its width), P padded rank columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from shapes import Shape, Tensors

from lora_kernels.attention import attention_backward, attention_forward
from lora_kernels.cross_entropy import linear_cross_entropy
from lora_kernels.dropout import Dropout, apply_dropout_reference
from lora_kernels.lora_linear import AugmentedWeight, lora_linear
from lora_kernels.nf4 import NestedMaxima, Nf4Arguments, dequantize_nf4
from lora_kernels.project import add_masked_product, dropped, project
from lora_kernels.reference import (
    reference_add_masked_product,
    reference_add_rms_norm_forward,
    reference_attention_backward,
    reference_attention_forward,
    reference_linear_cross_entropy,
    reference_lora_linear,
    reference_project,
    reference_rms_norm_backward,
    reference_rope_backward,
    reference_rope_forward,
    reference_swiglu_backward,
    reference_swiglu_forward,
)
from lora_kernels.refresh import Copy, WorkingCopies
from lora_kernels.rms_norm import add_rms_norm_forward, rms_norm_backward
from lora_kernels.rope import rope_backward, rope_forward
from lora_kernels.swiglu import swiglu_backward, swiglu_forward

DROPOUT = Dropout(0.05, 12345, 6)
SCALING = 2.0
EPS = 1e-5

Results = dict[str, torch.Tensor]


class Operation(NamedTuple):
    """One public operation on its arguments."""

    run: Callable[[], Results]
    """Calls it and returns what it wrote; what it works on in place differs from then on."""
    reference: Callable[[torch.dtype], Results]
    """What it should write, computed in a dtype by plain torch; to be called before `run`."""
    inputs: Results
    """By the names of its arguments."""
    num_bytes: int
    """The fewest that it can move: every input read once, every output written once."""
    num_flops: int = 0
    """Of its matrix products, where these and not the bytes take the time."""


def _num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cast(inputs: Results, dtype: torch.dtype) -> list[torch.Tensor]:
    return [tensor.to(dtype) for tensor in inputs.values()]


def _parts(name: str, out_aug: torch.Tensor, num_columns: int) -> Results:
    """Name what stands left of the rank columns, and these."""
    return {name: out_aug[:, :num_columns], "rank columns": out_aug[:, num_columns:]}


def _swiglu_forward(
    shape: Shape, make: Tensors, *, dropout: Dropout | None = None, has_adapter: bool = True
) -> Operation:
    m, n = shape.num_tokens, shape.intermediate
    p, rank = (shape.rank_columns(1), shape.rank) if has_adapter else (0, 0)
    inputs = {"gate_up": make.normal(m, 2 * n)}
    if has_adapter:
        inputs["a"] = make.rank_rows(n, p, rank)
    out = make.unwritten(m, n + p)

    def run() -> Results:
        swiglu_forward(inputs["gate_up"], out, inputs.get("a"), rank=rank, dropout=dropout)
        return _parts("act", out, n)

    def reference(dtype: torch.dtype) -> Results:
        gate_up, *a = _cast(inputs, dtype)
        a_or_none = a[0] if a else None
        expected = reference_swiglu_forward(
            gate_up, a_or_none, rank=rank, rank_columns=p, dropout=dropout
        )
        return _parts("act", expected, n)

    return Operation(run, reference, inputs, _num_bytes(out, *inputs.values()))


def _swiglu_backward(
    shape: Shape, make: Tensors, *, dropout: Dropout | None = None, has_adapter: bool = True
) -> Operation:
    m, n, rank = shape.num_tokens, shape.intermediate, shape.rank
    p = shape.rank_columns(2) if has_adapter else 0
    slots = {"gate_slot": (0, rank), "up_slot": (rank, rank)}
    inputs = {"gate_up": make.normal(m, 2 * n), "dact": make.normal(m, n)}
    if has_adapter:
        inputs["sb"] = make.rank_columns(shape.hidden, p, [(n, rank), (n, rank)])
    else:
        slots = {"gate_slot": (0, 0), "up_slot": (0, 0)}
    adapter = None
    if dropout is not None:
        g, a = make.normal(m, rank), make.rank_rows(n, shape.rank_columns(1), rank)[:rank]
        adapter = (g, a, dropout)
    out = make.unwritten(m, 2 * n + p)
    # as in training: the gradient is of no further use
    act_out = inputs["dact"] if has_adapter else None

    def run() -> Results:
        gate_up, dact = inputs["gate_up"], inputs["dact"]
        swiglu_backward(
            gate_up, dact, out, inputs.get("sb"), **slots, act_out=act_out, adapter=adapter
        )
        written = {} if act_out is None else {"act": act_out}
        return _parts("d_gate_up", out, 2 * n) | written

    def reference(dtype: torch.dtype) -> Results:
        gate_up, dact, *sb = _cast(inputs, dtype)
        seen = adapter and (adapter[0].to(dtype), adapter[1].to(dtype), adapter[2])
        expected, act = reference_swiglu_backward(
            gate_up, dact, sb[0] if sb else None, **slots, rank_columns=p, adapter=seen
        )
        return _parts("d_gate_up", expected, 2 * n) | ({} if act_out is None else {"act": act})

    num_bytes = _num_bytes(out, *inputs.values(), *(() if act_out is None else (act_out,)))
    return Operation(run, reference, inputs, num_bytes)


def _add_rms_norm_forward(
    shape: Shape, make: Tensors, *, dropout: Dropout | None = None
) -> Operation:
    m, k = shape.num_tokens, shape.hidden
    _, _, p = shape.groups["gate_up"]
    inputs = {
        "residual": make.normal(m, k),
        "delta": make.normal(m, k),
        "weight": make.normal(k),
        "a": make.rank_rows(k, p, 2 * shape.rank),
    }
    out, residual_out = make.unwritten(m, k + p), make.unwritten(m, k)
    rstd = make.unwritten(m, dtype=torch.float32)

    def run() -> Results:
        residual, delta, weight, a = inputs.values()
        add_rms_norm_forward(
            residual, delta, weight, EPS, out, a, residual_out, rstd, dropout=dropout
        )
        return _parts("x", out, k) | {"residual": residual_out, "rstd": rstd}

    def reference(dtype: torch.dtype) -> Results:
        residual, delta, weight, a = _cast(inputs, dtype)
        expected, v, rstd = reference_add_rms_norm_forward(
            residual, delta, weight, EPS, a, dropout=dropout
        )
        return _parts("x", expected, k) | {"residual": v, "rstd": rstd}

    num_bytes = _num_bytes(out, residual_out, rstd, *inputs.values())
    return Operation(run, reference, inputs, num_bytes)


def _rms_norm_backward(shape: Shape, make: Tensors, *, dropout: Dropout | None = None) -> Operation:
    m, k = shape.num_tokens, shape.hidden
    wide, _, p = shape.groups["o"]
    dx, residual = make.normal(m, k), make.normal(m, k)
    inputs = {
        "dx": dx,
        "residual": residual,
        "rstd": torch.rsqrt(residual.float().square().mean(1) + EPS),
        "weight": make.normal(k),
        "d_residual": make.normal(m, k),
        "sb": make.rank_columns(wide, p, [(k, shape.rank)]),
    }
    adapter = None
    if dropout is not None:
        _, _, p_above = shape.groups["gate_up"]
        used = 2 * shape.rank
        g = torch.zeros(m, p_above, dtype=make.dtype, device=make.device)
        g[:, :used] = make.normal(m, used)
        adapter = (g, make.rank_rows(k, p_above, used), dropout)
    out = make.unwritten(m, k + p)
    # as in training: dA wants what was dropped, and can have it nowhere else
    x_out = None if dropout is None else inputs["dx"]

    def run() -> Results:
        dx, residual, rstd, weight, d_residual, sb = inputs.values()
        rms_norm_backward(
            dx, residual, rstd, weight, d_residual, out, sb, adapter=adapter, x_out=x_out
        )
        return _parts("d_residual", out, k) | ({} if x_out is None else {"x": x_out})

    def reference(dtype: torch.dtype) -> Results:
        seen = adapter and (adapter[0].to(dtype), adapter[1].to(dtype), adapter[2])
        expected, x = reference_rms_norm_backward(*_cast(inputs, dtype), adapter=seen)
        return _parts("d_residual", expected, k) | ({} if x_out is None else {"x": x})

    num_bytes = _num_bytes(out, *inputs.values(), *(() if x_out is None else (x_out,)))
    return Operation(run, reference, inputs, num_bytes)


def _angles(shape: Shape, make: Tensors) -> Results:
    angles = make.normal(shape.num_tokens, shape.head_dim // 2, scale=3.0, dtype=torch.float32)
    return {"cos": angles.cos(), "sin": angles.sin()}


def _rope_forward(shape: Shape, make: Tensors) -> Operation:
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    inputs = {"qkv": make.normal(shape.num_tokens, shape.num_qkv), **_angles(shape, make)}
    rotated = inputs["qkv"][:, : shape.num_qkv - shape.num_kv_heads * shape.head_dim]

    def run() -> Results:
        rope_forward(*inputs.values(), **heads)
        return {"qk": rotated}

    def reference(dtype: torch.dtype) -> Results:
        return {"qk": reference_rope_forward(*_cast(inputs, dtype), **heads)}

    angles = inputs["cos"], inputs["sin"]
    return Operation(run, reference, inputs, 2 * _num_bytes(rotated) + _num_bytes(*angles))


def _rope_backward(shape: Shape, make: Tensors) -> Operation:
    m, rank = shape.num_tokens, shape.rank
    k, n, p = shape.groups["qkv"]
    widths = [
        heads * shape.head_dim
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    slots = ((0, rank), (rank, rank), (2 * rank, rank))
    out = make.unwritten(m, n + p)
    out[:, :n] = make.normal(m, n)
    # as in training: attention's backward writes there
    dq, dk, dv = out[:, :n].split(widths, 1)
    inputs = {
        "dq": dq, "dk": dk, "dv": dv, **_angles(shape, make),
        "sb": make.rank_columns(k, p, [(width, rank) for width in widths]),
    }  # fmt: skip

    def run() -> Results:
        rope_backward(dq, dk, dv, out, inputs["cos"], inputs["sin"], inputs["sb"], slots=slots)
        return _parts("d_qkv", out, n)

    def reference(dtype: torch.dtype) -> Results:
        expected = reference_rope_backward(*_cast(inputs, dtype), slots=slots, rank_columns=p)
        return _parts("d_qkv", expected, n)

    # nothing is to be done to v, only its product
    num_bytes = _num_bytes(out, *inputs.values()) - _num_bytes(dv)
    return Operation(run, reference, inputs, num_bytes)


def _project(shape: Shape, make: Tensors, *, dropout: Dropout | None = None) -> Operation:
    m = shape.num_tokens
    k, _, p = shape.groups["o"]
    out = make.unwritten(m, k + p)
    out[:, :k] = make.normal(m, k)
    inputs = {"x": out[:, :k], "a": make.rank_rows(k, p, shape.rank)}

    def run() -> Results:
        project(inputs["x"], inputs["a"], out, dropout=dropout)
        return {"rank columns": out[:, k:]}

    def reference(dtype: torch.dtype) -> Results:
        expected = reference_project(*_cast(inputs, dtype), dropout=dropout)
        return {"rank columns": expected[:, k:]}

    return Operation(run, reference, inputs, _num_bytes(out[:, k:], *inputs.values()))


def _add_masked_product(shape: Shape, make: Tensors) -> Operation:
    m, rank = shape.num_tokens, shape.rank
    k, n, p = shape.groups["o"]
    inputs = {
        "dx": make.normal(m, k),
        "g": make.normal(m, n + p)[:, n : n + rank],
        "a": make.rank_rows(k, p, rank)[:rank],
    }

    def run() -> Results:
        add_masked_product(*inputs.values(), DROPOUT)
        return {"dx": inputs["dx"]}

    def reference(dtype: torch.dtype) -> Results:
        return {"dx": reference_add_masked_product(*_cast(inputs, dtype), DROPOUT)}

    return Operation(run, reference, inputs, _num_bytes(inputs["dx"], *inputs.values()))


def _dropped(shape: Shape, make: Tensors) -> Operation:
    k, _, p = shape.groups["o"]
    inputs = {"x": make.normal(shape.num_tokens, k + p)[:, :k]}
    out = make.unwritten(shape.num_tokens, k)

    def run() -> Results:
        dropped(inputs["x"], DROPOUT, out)
        return {"out": out}

    def reference(dtype: torch.dtype) -> Results:
        return {"out": apply_dropout_reference(inputs["x"].to(dtype), DROPOUT)}

    return Operation(run, reference, inputs, _num_bytes(out, *inputs.values()))


def _attention_inputs(shape: Shape, make: Tensors) -> tuple[Results, torch.Tensor]:
    """Return q, k, v, views of one product's output, and the borders of the sequences."""
    m, d = shape.num_tokens, shape.head_dim
    heads = make.normal(m, shape.num_qkv).view(m, -1, d)
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    borders = torch.arange(0, m + 1, shape.sequence, dtype=torch.int32, device=make.device)
    return {"q": q, "k": k, "v": v}, borders


def _attention_forward(shape: Shape, make: Tensors) -> Operation:
    inputs, borders = _attention_inputs(shape, make)
    scale = shape.head_dim**-0.5
    wide = shape.num_heads * shape.head_dim
    # its consumer's rank columns stand beside it
    out = make.unwritten(shape.num_tokens, wide + shape.rank_columns(1))
    out = out[:, :wide].unflatten(1, (-1, shape.head_dim))

    def run() -> Results:
        attention_forward(*inputs.values(), borders, shape.sequence, out, scale=scale)
        return {"out": out}

    def reference(dtype: torch.dtype) -> Results:
        expected, _ = reference_attention_forward(*_cast(inputs, dtype), borders, scale=scale)
        return {"out": expected}

    # two products, of whose scores the causal half counts
    num_flops = 2 * shape.num_tokens * shape.sequence * wide
    return Operation(run, reference, inputs, _num_bytes(out, *inputs.values()), num_flops)


def _attention_backward(shape: Shape, make: Tensors) -> Operation:
    inputs, borders = _attention_inputs(shape, make)
    forward = list(inputs.values())
    out = make.unwritten(*inputs["q"].shape)
    scale = shape.head_dim**-0.5
    lse = attention_forward(*forward, borders, shape.sequence, out, scale=scale)
    inputs["d_out"] = make.normal(*out.shape)
    _, n, p = shape.groups["qkv"]
    d_qkv = make.unwritten(shape.num_tokens, n + p)[:, :n].unflatten(1, (-1, shape.head_dim))
    parts = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    gradients = dict(zip(("dq", "dk", "dv"), d_qkv.split(parts, 1), strict=True))

    def run() -> Results:
        attention_backward(
            inputs["d_out"], *forward, out, lse, borders, shape.sequence, *gradients.values(),
            scale=scale,
        )  # fmt: skip
        return gradients

    def reference(dtype: torch.dtype) -> Results:
        q, k, v, d_out = _cast(inputs, dtype)
        found = reference_attention_backward(d_out, q, k, v, borders, scale=scale)
        return dict(zip(gradients, found, strict=True))

    num_bytes = _num_bytes(out, *inputs.values(), *gradients.values())
    # five products, of whose scores the causal half counts
    num_flops = 5 * shape.num_tokens * shape.sequence * shape.num_heads * shape.head_dim
    return Operation(run, reference, inputs, num_bytes, num_flops)


def _cross_entropy(shape: Shape, make: Tensors) -> Operation:
    m, k, vocabulary = shape.num_tokens, shape.hidden, shape.vocabulary
    targets = make.integers(vocabulary, m, torch.int64)
    inputs = {"hidden": make.normal(m, k), "weight": make.normal(vocabulary, k, scale=k**-0.5)}

    def gradient(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Results:
        hidden, weight = tensors
        hidden = hidden.detach().requires_grad_()
        loss = function(hidden, weight, targets)
        (d_hidden,) = torch.autograd.grad(loss, hidden)
        return {"loss": loss.detach(), "d_hidden": d_hidden}

    def run() -> Results:
        return gradient(linear_cross_entropy, *inputs.values())

    def reference(dtype: torch.dtype) -> Results:
        return gradient(reference_linear_cross_entropy, *_cast(inputs, dtype))

    num_bytes = _num_bytes(inputs["hidden"], *inputs.values())
    return Operation(run, reference, inputs, num_bytes, 4 * m * k * vocabulary)


def _dequantize_nf4(shape: Shape, make: Tensors) -> Operation:
    k, n = shape.linears["gate_proj"]
    block, nested_block = 64, 256
    num_blocks = n * k // block
    single = {"dtype": torch.float32}
    inputs = {
        "packed": make.integers(256, n * k // 2, torch.uint8),
        "absmax": make.integers(256, num_blocks, torch.uint8),
        "code": make.normal(16, **single),
        "nested absmax": make.normal(-(-num_blocks // nested_block), **single).abs_(),
        "nested code": make.normal(256, **single),
        "offset": make.normal(1, **single)[0],
    }
    packed, absmax, code, nested_absmax, nested_code, offset = inputs.values()
    nested = NestedMaxima(nested_absmax, nested_code, offset, nested_block)
    weight = Nf4Arguments(packed, absmax, code, block, (n, k), nested)
    out = make.unwritten(n, k + shape.rank_columns(2))[:, :k]

    def run() -> Results:
        dequantize_nf4(weight, out)
        return {"out": out}

    def reference(dtype: torch.dtype) -> Results:
        wide = torch.promote_types(dtype, torch.float32)
        maxima = nested_absmax.to(wide).repeat_interleave(nested_block)[:num_blocks]
        maxima = nested_code.to(wide)[absmax.long()] * maxima + offset
        nibbles = torch.stack([packed >> 4, packed & 15], 1).view(num_blocks, block)
        return {"out": (code[nibbles.long()] * maxima[:, None]).to(dtype).view(n, k)}

    return Operation(run, reference, inputs, _num_bytes(out, *inputs.values()))


def _refresh(shape: Shape, make: Tensors) -> Operation:
    copies = []
    for _ in range(shape.num_layers):
        for k, rows_of in shape.modules.values():
            n, p = sum(rows_of), shape.rank_columns(len(rows_of))
            # what is the weights' stays as it is
            buffer = torch.empty(n + p, k + p, dtype=make.dtype, device=make.device)
            row = column = 0
            for rows in rows_of:
                a, b = (
                    make.normal(*size, dtype=torch.float32)
                    for size in ((shape.rank, k), (rows, shape.rank))
                )
                ranks = slice(column, column + shape.rank)
                copies.append(Copy(a, buffer[n:, :k][ranks]))
                copies.append(Copy(b, buffer[row : row + rows, k:][:, ranks], SCALING))
                row, column = row + rows, column + shape.rank
    working = WorkingCopies(copies)
    # enough to tell right from wrong
    shown = copies[: len(copies) // shape.num_layers]

    def run() -> Results:
        working.refresh()
        return {f"copy {index}": copy.target for index, copy in enumerate(shown)}

    def reference(dtype: torch.dtype) -> Results:
        return {
            f"copy {index}": (copy.source.double() * copy.scale).to(dtype)
            for index, copy in enumerate(shown)
        }

    inputs = {
        f"{name} {index}": tensor
        for index, copy in enumerate(copies)
        for name, tensor in (("source", copy.source), ("target", copy.target))
    }
    return Operation(run, reference, inputs, _num_bytes(*inputs.values()))


def lora_linear_operation(
    shape: Shape,
    make: Tensors,
    *,
    linear: str = "gate_proj",
    dropout: Dropout | None = None,
    passes: str = "both",
    is_augmented: bool = False,
) -> Operation:
    """Build a linear layer with its adapter.

    Args:
        shape: of the model.
        make: the tensors.
        linear: one of `shape.linears`.
        dropout: of the adapter's input.
        passes: forward, backward or both.
        is_augmented: whether the weight is an `AugmentedWeight`.

    Returns:
        The operation; its gradients are those of x and of the adapter.
    """
    k, n = shape.linears[linear]
    m, rank = shape.num_tokens, shape.rank
    inputs = {
        "x": make.normal(m, k),
        "weight": make.normal(n, k, scale=k**-0.5),
        "lora_a": make.normal(rank, k, scale=k**-0.5, dtype=torch.float32),
        "lora_b": make.normal(n, rank, scale=0.1, dtype=torch.float32),
        "dy": make.normal(m, n),
    }
    names = ("x", "lora_a", "lora_b")

    def leaves(dtype: torch.dtype | None) -> Results:
        return {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_(name in names)
            for name, tensor in inputs.items()
        }

    def y_of(function: Callable[..., torch.Tensor], weight: Any, tensors: Results) -> torch.Tensor:
        x, a, b = (tensors[name] for name in names)
        return function(x, weight, None, a, b, SCALING, dropout)

    def gradients(y: torch.Tensor, tensors: Results) -> Results:
        wanted = [tensors[name] for name in names]
        found = torch.autograd.grad(y, wanted, tensors["dy"], retain_graph=passes == "backward")
        return {f"d_{name}": gradient for name, gradient in zip(names, found, strict=True)}

    own = leaves(None)
    weight = AugmentedWeight(own["weight"], rank) if is_augmented else own["weight"]
    kept_y = y_of(lora_linear, weight, own) if passes == "backward" else None

    def run() -> Results:
        y = y_of(lora_linear, weight, own) if kept_y is None else kept_y
        results = {} if passes == "backward" else {"y": y.detach()}
        return results if passes == "forward" else results | gradients(y, own)

    def reference(dtype: torch.dtype) -> Results:
        tensors = leaves(dtype)
        y = y_of(reference_lora_linear, tensors["weight"], tensors)
        found = {"y": y.detach()} | gradients(y, tensors)
        if passes == "both":
            return found
        return {name: found[name] for name in found if (name == "y") == (passes == "forward")}

    forward, backward = 2 * m * (n * k + rank * (n + k)), 2 * m * (n * k + 2 * rank * (n + k))
    num_flops = {"forward": forward, "backward": backward, "both": forward + backward}[passes]
    # x, W and dy read, y and dx written: what is small is left out
    num_bytes = 2 * _num_bytes(inputs["x"], inputs["dy"]) + _num_bytes(inputs["weight"])
    return Operation(run, reference, inputs, num_bytes, num_flops)


OPERATIONS: dict[str, Callable[[Shape, Tensors], Operation]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "swiglu_forward": _swiglu_forward,
    "swiglu_forward_dropout": partial(_swiglu_forward, dropout=DROPOUT),
    "swiglu_forward_no_adapter": partial(_swiglu_forward, has_adapter=False),
    "swiglu_backward": _swiglu_backward,
    "swiglu_backward_dropout": partial(_swiglu_backward, dropout=DROPOUT),
    "swiglu_backward_no_adapter": partial(_swiglu_backward, has_adapter=False),
    "add_rms_norm_forward": _add_rms_norm_forward,
    "add_rms_norm_forward_dropout": partial(_add_rms_norm_forward, dropout=DROPOUT),
    "rms_norm_backward": _rms_norm_backward,
    "rms_norm_backward_dropout": partial(_rms_norm_backward, dropout=DROPOUT),
    "rope_forward": _rope_forward,
    "rope_backward": _rope_backward,
    "project": _project,
    "project_dropout": partial(_project, dropout=DROPOUT),
    "add_masked_product": _add_masked_product,
    "dropped": _dropped,
    "linear_cross_entropy": _cross_entropy,
    "dequantize_nf4": _dequantize_nf4,
    "refresh": _refresh,
    "lora_linear_forward": partial(lora_linear_operation, passes="forward"),
    "lora_linear_forward_dropout": partial(
        lora_linear_operation, passes="forward", dropout=DROPOUT
    ),
    "lora_linear_backward": partial(lora_linear_operation, passes="backward"),
    "lora_linear_backward_dropout": partial(
        lora_linear_operation, passes="backward", dropout=DROPOUT
    ),
}
