"""A plan as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_train.plan.planning import Plan
from lora_train.progress import format_seconds


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan.

    Args:
        plan: what `make_plan` returned.
        console: where to.
    """
    shape, config = plan.step.shape, plan.config
    console.print(
        f"{config.model.path}: {_count(shape.total)} parameters"
        f"{' in 4 bit' if plan.step.is_quantized else ''}, {shape.num_layers} layers; "
        f"{_count(shape.trained)} trained ({shape.trained / shape.total:.2%})",
        markup=False,
    )
    console.print(_how(plan))
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_activations(plan))
    console.print()
    console.print(_fits(plan))
    for on in plan.gpus:
        if on.mend:  # not broken: it may be pasted
            console.print(f"{on.target.name}: {on.mend}", soft_wrap=True, markup=False)
    console.print()
    if any(on.time for on in plan.gpus):
        console.print(_times(plan))
        console.print()
    for line in _notes(plan):
        console.print(line, style="dim")
    if plan.probed is not None:
        console.print()
        console.print(_probe(plan))
        if plan.step.is_fused and not plan.probed.is_fused:
            console.print("The kernels could not run here: PEFT's forward did, as the log says.")


def _how(plan: Plan) -> str:
    step, data = plan.step, plan.config.data
    gpus = f"{plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''}"
    return (
        f"a step{_where(plan)}: {data.global_batch_size} sequences of {data.seq_length} tokens = "
        f"{step.num_sequences} per micro-batch x {step.accumulation} accumulated x {gpus}; "
        f"{'fused kernels' if step.is_fused else 'PEFT forward'}, "
        f"{'with' if step.checkpointing else 'no'} checkpointing"
    )


def _where(plan: Plan) -> str:
    """On which GPU, where they differ."""
    is_same = all(on.fit.step == plan.step for on in plan.gpus)
    return "" if is_same else f" on {plan.shown.target.name}"


def _memory(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"GPU memory at the peak ({plan.moment})")
    table.add_column("GiB", justify="right")
    for part, size in plan.parts.items():
        table.add_row(f"  {part}", _gib(size))
    peak = sum(plan.parts.values())
    table.add_row("  tensors in all", Text(_gib(peak), style="bold"))
    needed = plan.shown.fit.needed_bytes
    table.add_row("  with CUDA context and what the allocator cannot use", _gib(needed))
    return table


def _activations(plan: Plan) -> Table:
    step = plan.step
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("activations kept for the backward pass")
    table.add_column("GiB", justify="right")
    table.add_column("KB a token and layer", justify="right")
    for (fused, checkpointing), size in plan.ways.items():
        name = f"  {'fused' if fused else 'PEFT forward'}{', checkpointing' * checkpointing}"
        is_taken = (fused, checkpointing) == (step.is_fused, step.checkpointing)
        each = size / step.tokens / step.shape.num_layers / 1e3
        table.add_row(name, _gib(size), f"{each:.1f}", style="bold" if is_taken else "")
    return table


def _fits(plan: Plan) -> Table:
    table = _table("GPU", "GiB", "needs", "fits", "micro-batch", "most", "most, ckpt")
    for on in plan.gpus:
        verdict = Text("yes", style="green")
        if not on.is_fitting:
            verdict = Text("no", "red") if on.is_hopeless else Text("hardly", "yellow")
        step = on.fit.step
        table.add_row(
            on.target.name,
            _gib(on.target.memory_bytes),
            _gib(on.fit.needed_bytes),
            verdict,
            f"{step.num_sequences}{' ckpt' * step.checkpointing}",
            str(on.largest[False] or "-"),
            str(on.largest[True] or "-"),
        )
    return table


def _times(plan: Plan) -> Table:
    steps = plan.config.trainer.max_steps
    of_run = () if steps is None else (f"{steps} steps", "GPU-hours")
    table = _table("GPU", "a step", "tokens/s", *of_run)
    for on in plan.gpus:
        if on.time is None:
            continue
        seconds = on.time.seconds
        row = [on.target.name, _seconds(seconds), f"{plan.tokens_per_step / seconds:,.0f}"]
        if steps is not None:
            hours = steps * seconds * plan.num_gpus / 3600
            row += [format_seconds(steps * seconds), f"{hours:.2f}"]
        table.add_row(*row)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _notes(plan: Plan) -> list[str]:
    step = plan.step
    notes = [
        "needs: GiB of each GPU, for full sequences all of whose tokens are learned; hardly: more "
        "than there is, by less than the plan may be off; most: sequences of the largest "
        "micro-batch that fits; ckpt: with gradient checkpointing.",
        "Memory and times are held against an H100 and an H200; times of other GPUs are scaled by "
        "their data sheets. Loading, validation and answers do not count.",
    ]
    if plan.config.trainer.max_steps is None and any(on.time for on in plan.gpus):
        notes.append("trainer.max_steps=N also plans the time of the run.")
    if plan.num_gpus > 1:
        notes.append(
            "What GPUs exchange was measured between two of one node: between nodes it takes "
            "longer" + (", and each node may hold the base for itself." if step.is_sharded else ".")
        )
    if any(on.time is not None and on.time.is_host_bound for on in plan.gpus):
        notes.append(
            "The host bounds the time of a step (it launches small kernels), which differs by a "
            "quarter from host to host: larger micro-batches cost hardly more."
        )
    weights = 2 * step.shape.total
    notes.append(
        f"On disk: {weights / 1e9:.1f} GB of weights (bf16), up to "
        f"{plan.checkpoint_bytes / 1e9:.2f} GB of checkpoints in the run directory."
    )
    if plan.host_bytes:
        notes.append(
            f"Checkpointing keeps {plan.host_bytes / 2**30:.1f} GiB a GPU in host memory; where "
            "four times as much is not free, it stays on the GPU."
        )
    if plan.caveat:
        notes.append(f"Never measured with {plan.caveat}: take the figures as a guess.")
    return notes


def _probe(plan: Plan) -> Table:
    probed = plan.probed
    here = next(on for on in plan.gpus if on.target.is_here)
    assert probed is not None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("probe: real steps here", "planned", "measured", "off by"):
        table.add_column(name, justify="left" if name.startswith("probe") else "right")
    table.add_row(
        "  peak of tensors (GiB)", _gib(here.fit.peak_bytes), _gib(probed.peak_bytes),
        f"{here.fit.peak_bytes / probed.peak_bytes - 1:+.1%}",
    )  # fmt: skip
    planned = None if here.time is None else here.time.seconds
    table.add_row(
        "  a step", "-" if planned is None else _seconds(planned), _seconds(probed.step_seconds),
        "-" if planned is None else f"{planned / probed.step_seconds - 1:+.1%}",
    )  # fmt: skip
    table.add_row("  taken from the driver (GiB)", "", _gib(probed.reserved_bytes), "")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 0.95 * 2**30 else f"{size / 2**30:.2f}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else format_seconds(seconds)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"
