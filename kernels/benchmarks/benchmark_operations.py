"""Every public operation beside torch's own, at the shape of Llama-3.1-8B with 8192 tokens in bf16.

    python kernels/benchmarks/benchmark_operations.py [--only TEXT] [--out FILE]

First each operation is held to the bound of its tests on fewer tokens; if one is off, no figure is
given. Then each is timed beside what torch users run: PEFT's and transformers' operations written
out, flash attention and cuDNN's, bitsandbytes, PEFT's linear layer. The products with augmented
weights are timed beside those without adapters. Prints a table and appends a JSON row for each
figure to results/operations.jsonl.

Rates are of what an operation must read, write and multiply, whatever a provider does beyond that.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from operations import (
    DROPOUT,
    EPS,
    OPERATIONS,
    SCALING,
    Operation,
    Results,
    lora_linear_operation,
)
from shapes import LLAMA_31_8B, Shape, Tensors
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention, silu

RESULTS = Path(__file__).parent / "results" / "operations.jsonl"
TESTS = Path(__file__).parents[2] / "tests" / "ops"
DTYPE = torch.bfloat16
# tokens are what a reference in fp64 has to be spared
FEW_TOKENS = replace(LLAMA_31_8B, num_tokens=256, sequence=128, num_layers=1)

Run = Callable[[], Any]


class Case(NamedTuple):
    """What is measured together."""

    name: str
    operation: Callable[[Shape, Tensors], Operation]
    others: dict[str, Callable[[Shape, Results], Run]]
    """Other providers, on the operation's inputs; one that cannot run here raises."""


def _gradient_of(
    outputs: torch.Tensor, leaves: list[torch.Tensor], d_outputs: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    return partial(torch.autograd.grad, outputs, leaves, d_outputs, retain_graph=True)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _swiglu_forward(shape: Shape, inputs: Results, *, p: float = 0.0) -> Run:
    gate, up = (part.contiguous() for part in inputs["gate_up"].chunk(2, 1))
    a = inputs["a"][: shape.rank].contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        act = silu(gate) * up
        return act, (dropout(act, p) if p else act) @ a.T

    return run


def _swiglu_backward(shape: Shape, inputs: Results) -> Run:
    gate, up = (_leaf(part) for part in inputs["gate_up"].chunk(2, 1))
    n, rank = shape.intermediate, shape.rank
    sb_gate = inputs["sb"][:n, :rank].contiguous()
    sb_up = inputs["sb"][n:, rank : 2 * rank].contiguous()
    gradient = _gradient_of(silu(gate) * up, [gate, up], inputs["dact"].clone())

    def run() -> tuple[torch.Tensor, ...]:
        d_gate, d_up = gradient()
        return d_gate, d_up, d_gate @ sb_gate, d_up @ sb_up

    return run


def _llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm of transformers."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _add_rms_norm_forward(shape: Shape, inputs: Results, *, p: float = 0.0) -> Run:
    residual, delta, weight, a = inputs.values()
    a = a[: 2 * shape.rank].contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        v = residual + delta
        x = _llama_norm(v, weight)
        return x, v, (dropout(x, p) if p else x) @ a.T

    return run


def _rms_norm_backward(shape: Shape, inputs: Results) -> Run:
    residual, d_residual = _leaf(inputs["residual"]), inputs["d_residual"]
    sb = inputs["sb"][:, : shape.rank].contiguous()
    gradient = _gradient_of(
        _llama_norm(residual, inputs["weight"]), [residual], inputs["dx"].clone()
    )

    def run() -> tuple[torch.Tensor, ...]:
        d_v = gradient()[0] + d_residual
        return d_v, d_v @ sb

    return run


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """apply_rotary_pos_emb of transformers."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _of_both_halves(inputs: Results) -> list[torch.Tensor]:
    return [torch.cat([inputs[name]] * 2, 1).to(DTYPE)[None, None] for name in ("cos", "sin")]


def _rope_forward(shape: Shape, inputs: Results) -> Run:
    heads = inputs["qkv"].unflatten(1, (-1, shape.head_dim)).transpose(0, 1)[None].clone()
    q, k, _ = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    cos, sin = _of_both_halves(inputs)
    return lambda: (_rotated(q, cos, sin), _rotated(k, cos, sin))


def _rope_backward(shape: Shape, inputs: Results) -> Run:
    cos, sin = _of_both_halves(inputs)
    gradients, products = [], []
    row = 0
    for index, name in enumerate(("dq", "dk", "dv")):
        # (1, heads, M, D), as a view of what the product wants
        d_x = inputs[name].clone()
        if name != "dv":
            d_heads = d_x.unflatten(1, (-1, shape.head_dim)).transpose(0, 1)[None]
            x = torch.empty_like(d_heads).requires_grad_()
            gradients.append(_gradient_of(_rotated(x, cos, sin), [x], d_heads))
        columns = slice(index * shape.rank, (index + 1) * shape.rank)
        sb = inputs["sb"][row : row + d_x.shape[1], columns].contiguous()
        products.append((d_x, sb))
        row += d_x.shape[1]

    def run() -> tuple[torch.Tensor, ...]:
        rotated = [gradient()[0] for gradient in gradients]
        return (*rotated, *(d_x @ sb for d_x, sb in products))

    return run


def _flash(shape: Shape, inputs: Results) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    # torch 2.13 asks for it; 2.11 shares key/value heads without being asked
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    device = inputs["q"].device
    borders = torch.arange(
        0, shape.num_tokens + 1, shape.sequence, dtype=torch.int32, device=device
    )
    ends = (borders, borders, shape.sequence, shape.sequence)
    return lambda q, k, v: varlen_attn(q, k, v, *ends, **options)


def _cudnn(shape: Shape, inputs: Results) -> Callable[..., torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        # (sequences, heads, tokens, D), views of what the projections write
        q, k, v = (x.unflatten(0, (-1, shape.sequence)).transpose(1, 2) for x in qkv)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _attention_forward(
    attend_of: Callable[..., Callable[..., torch.Tensor]], shape: Shape, inputs: Results
) -> Run:
    return partial(attend_of(shape, inputs), inputs["q"], inputs["k"], inputs["v"])


def _attention_backward(
    attend_of: Callable[..., Callable[..., torch.Tensor]], shape: Shape, inputs: Results
) -> Run:
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
    return _gradient_of(attend_of(shape, inputs)(*leaves), leaves, inputs["d_out"])


def _project(shape: Shape, inputs: Results, *, p: float = 0.0) -> Run:
    x, a = inputs["x"].contiguous(), inputs["a"][: shape.rank].contiguous()
    return lambda: (dropout(x, p) if p else x) @ a.T


def _add_masked_product(shape: Shape, inputs: Results) -> Run:
    dx, g, a = (tensor.contiguous() for tensor in inputs.values())
    keep = torch.rand(dx.shape, device=dx.device) >= DROPOUT.p

    def run() -> tuple[torch.Tensor, ...]:
        return (dx + torch.ops.aten.native_dropout_backward(g @ a, keep, DROPOUT.scale),)

    return run


def _linear_cross_entropy(shape: Shape, inputs: Results) -> Run:
    hidden, weight = inputs["hidden"].detach().requires_grad_(), inputs["weight"]
    targets = torch.randint(shape.vocabulary, (shape.num_tokens,), device=hidden.device)

    def run() -> tuple[torch.Tensor, ...]:
        logits = hidden @ weight.T
        loss = cross_entropy(logits.float(), targets, reduction="sum")
        return loss, *torch.autograd.grad(loss, hidden)

    return run


def _bitsandbytes(shape: Shape, inputs: Results) -> Run:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, absmax, code, nested_absmax, nested_code, offset = inputs.values()
    k, n = shape.linears["gate_proj"]
    nested = QuantState(nested_absmax, code=nested_code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax, shape=torch.Size([n, k]), code=code, blocksize=64, quant_type="nf4", dtype=DTYPE,
        offset=offset, state2=nested,
    )  # fmt: skip
    out = torch.empty(n, k + shape.rank_columns(2), dtype=DTYPE, device=packed.device)[:, :k]
    # it cannot write with a row stride
    return lambda: out.copy_(dequantize_4bit(packed[:, None], state))


def _refresh(shape: Shape, inputs: Results) -> Run:
    tensors = list(inputs.values())
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))

    def run() -> None:
        for source, target in pairs:
            target.copy_(source * SCALING)

    return run


def _peft(shape: Shape, inputs: Results, *, autocast: bool) -> Run:
    from peft import LoraConfig, get_peft_model

    x, weight, a, b, dy = inputs.values()
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(
        r=shape.rank, lora_alpha=int(SCALING) * shape.rank, target_modules=["linear"]
    )
    model = get_peft_model(torch.nn.Sequential(OrderedDict(linear=linear)), config)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [p.dtype for p in adapter] == [torch.float32] * 2
    with torch.no_grad():
        for parameter, values in zip(adapter, (a, b), strict=True):
            parameter.copy_(values)
    leaves = [x.detach().requires_grad_(), *adapter]

    def run() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cuda", DTYPE, enabled=autocast):
            y = model(leaves[0])
        return y, *torch.autograd.grad(y, leaves, dy)

    return run


def _product(
    group: str, is_forward: bool, rank_columns: int, shape: Shape, make: Tensors
) -> Operation:
    """The cuBLAS product of a projection group, with so many columns or rows beside the weight."""
    k, n, _ = shape.groups[group]
    weight = make.normal(n + rank_columns, k + rank_columns, scale=k**-0.5)
    if is_forward:
        left, right = make.normal(shape.num_tokens, k + rank_columns), weight[:n].T
    else:
        left, right = make.normal(shape.num_tokens, n + rank_columns), weight[:, :k]
    num_bytes = DTYPE.itemsize * (left.numel() + right.numel() + left.shape[0] * right.shape[1])
    # those of the frozen layer: what the rank columns cost is the difference in time
    num_flops = 2 * shape.num_tokens * k * n
    return Operation(lambda: {"y": left @ right}, lambda _: {}, {}, num_bytes, num_flops)


P = DROPOUT.p
EAGER = "torch"
OTHERS: dict[str, dict[str, Callable[[Shape, Results], Run]]] = {
    "attention_forward": {
        "torch, flash varlen": partial(_attention_forward, _flash),
        "torch, cuDNN": partial(_attention_forward, _cudnn),
    },
    "attention_backward": {
        "torch, flash varlen": partial(_attention_backward, _flash),
        "torch, cuDNN": partial(_attention_backward, _cudnn),
    },
    "swiglu_forward": {EAGER: _swiglu_forward},
    "swiglu_forward_dropout": {EAGER: partial(_swiglu_forward, p=P)},
    "swiglu_backward": {EAGER: _swiglu_backward},
    "add_rms_norm_forward": {EAGER: _add_rms_norm_forward},
    "add_rms_norm_forward_dropout": {EAGER: partial(_add_rms_norm_forward, p=P)},
    "rms_norm_backward": {EAGER: _rms_norm_backward},
    "rope_forward": {EAGER: _rope_forward},
    "rope_backward": {EAGER: _rope_backward},
    "project": {EAGER: _project},
    "project_dropout": {EAGER: partial(_project, p=P)},
    "add_masked_product": {EAGER: _add_masked_product},
    "dropped": {EAGER: lambda _, inputs: partial(dropout, inputs["x"], P)},
    "linear_cross_entropy": {EAGER: _linear_cross_entropy},
    "dequantize_nf4": {"bitsandbytes": _bitsandbytes},
    "refresh": {EAGER: _refresh},
}


def cases(shape: Shape) -> Iterator[Case]:
    """Yield everything that is measured but the bare products."""
    for name, operation in OPERATIONS.items():
        # those are timed both ways at once, as PEFT's are
        if not name.startswith("lora_linear"):
            yield Case(name, operation, OTHERS.get(name, {}))
    for linear, (k, n) in shape.linears.items():
        operation = partial(lora_linear_operation, linear=linear)
        yield Case(
            f"lora_linear {k} -> {n}",
            operation,
            {
                "PEFT, bf16 autocast": partial(_peft, autocast=True),
                "PEFT": partial(_peft, autocast=False),
            },
        )
        yield Case(f"lora_linear {k} -> {n}, augmented", partial(operation, is_augmented=True), {})


def failures(chosen: list[Case]) -> list[str]:
    """Hold the operations to the bound of the tests, on few tokens; return what is off."""
    sys.path.insert(0, str(TESTS))
    from truth import assert_close_to_truth

    found = []
    for case in chosen:
        try:
            operation = case.operation(FEW_TOKENS, Tensors(torch.device("cuda"), DTYPE))
            same_dtype, truth = operation.reference(DTYPE), operation.reference(torch.float64)
            for name, result in operation.run().items():
                assert_close_to_truth(result, same_dtype[name], truth[name], name)
        except Exception as error:
            found.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
    return found


def measured(operation: Operation, run: Run) -> dict[str, Any]:
    """Return the times of a provider and the operation's rates."""
    ms, ms_20, ms_80 = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
    return {
        "ms": ms,
        "ms_20": ms_20,
        "ms_80": ms_80,
        "bytes": operation.num_bytes,
        "flops": operation.num_flops or None,
        "gb_per_second": operation.num_bytes / ms / 1e6,
        "tflop_per_second": operation.num_flops / ms / 1e9 if operation.num_flops else None,
    }


def measure(case: Case, shape: Shape) -> Iterator[dict[str, Any]]:
    """Time an operation and the other providers of it."""
    operation = case.operation(shape, Tensors(torch.device("cuda"), DTYPE))
    yield {"operation": case.name, "provider": "ours", **measured(operation, operation.run)}
    for provider, other in case.others.items():
        try:
            times = measured(operation, other(shape, operation.inputs))
        except (ImportError, RuntimeError) as error:
            print(f"{case.name}: {provider} skipped, {str(error)[:100]}", flush=True)
            continue
        yield {"operation": case.name, "provider": provider, **times}


def measure_products(shape: Shape, only: str) -> Iterator[dict[str, Any]]:
    """Time the products with augmented weights beside those of the frozen model."""
    for group, (k, n, p) in shape.groups.items():
        for direction in ("forward", "backward"):
            name = f"product of {group} {direction}, K {k} N {n} P {p}"
            if only not in name:
                continue
            for provider, rank_columns in (("ours, augmented", p), ("torch, no adapter", 0)):
                make = Tensors(torch.device("cuda"), DTYPE)
                operation = _product(group, direction == "forward", rank_columns, shape, make)
                yield {
                    "operation": name,
                    "provider": provider,
                    **measured(operation, operation.run),
                }


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=RESULTS.parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip().partition("\n")[0] or None


def _print_table(rows: list[dict[str, Any]]) -> None:
    heads = f"{'ms':>8} {'20 %':>8} {'80 %':>8} {'rate':>13}  over ours"
    print(f"\n{'operation':46} {'provider':20} {heads}")
    ours: dict[str, float] = {}
    for row in rows:
        ms = row["ms"]
        first = ours.setdefault(row["operation"], ms)
        rate = f"{row['gb_per_second']:6.0f} GB/s"
        if row["tflop_per_second"] is not None:
            rate = f"{row['tflop_per_second']:4.0f} TFLOP/s"
        print(
            f"{row['operation']:46} {row['provider']:20} {ms:8.4f} {row['ms_20']:8.4f}"
            f" {row['ms_80']:8.4f} {rate:>13} {ms / first:9.2f}"
        )


def main() -> None:
    """Check, measure and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="operations whose names hold this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to which rows are added")
    arguments = parser.parse_args()
    shape = LLAMA_31_8B
    chosen = [case for case in cases(shape) if arguments.only in case.name]
    failed = failures(chosen)
    if failed:
        sys.exit("no figures, as results are off:\n" + "\n".join(f"  {line}" for line in failed))
    common = {
        "benchmark": "operations",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "shape": asdict(shape),
        "dtype": str(DTYPE).removeprefix("torch."),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(f"{common['gpu']}: {shape.name}, {shape.num_tokens} tokens, {common['dtype']}")
    rows = [row for case in chosen for row in measure(case, shape)]
    rows += measure_products(shape, arguments.only)
    with arguments.out.open("a") as file:
        for row in rows:
            file.write(json.dumps({**common, **row}) + "\n")
    _print_table(rows)


if __name__ == "__main__":
    main()
