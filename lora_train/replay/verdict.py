"""What a repeated run says about the first one: the same bits, the same curve, or neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lora_train.errors import RunError
from lora_train.metrics import read_metrics
from lora_train.paths import sha256_of
from lora_train.receipts.differences import Difference
from lora_train.replay.run_comparison import ADAPTER_FILE, Curve, compare_adapters, compare_curves

_METRICS = ("loss", "grad_norm", "learning_rate", "val_loss")
# another GPU or library adds numbers up in another order; the rounding grows from step to step, and
# stays far below this over hundreds of steps, which another seed or another row of data does not
_TOLERANCE = 0.01

Verdict = Literal["the same bits", "the same curve", "different"]


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same steps."""

    num_steps: int
    """The first ones, which were compared."""
    curves: list[Curve]
    """By metric."""
    adapter: str | None
    """How the adapters differ; None: not at all, or not compared."""
    is_adapter_compared: bool
    """Whether both runs are whole."""
    differences: list[Difference]
    """What was not the same around the two."""
    has_receipt: bool
    """Whether what was around the first is known."""

    @property
    def verdict(self) -> Verdict:
        """The same curve is accepted only where the same bits cannot be expected."""
        if all(curve.is_same for curve in self.curves) and self.adapter is None:
            return "the same bits"
        if not self.expects_same_bits and self.loss.mean_relative <= _TOLERANCE:
            return "the same curve"
        return "different"

    @property
    def expects_same_bits(self) -> bool:
        """Whether nothing is known to be different that could change a bit."""
        return self.has_receipt and not any(each.may_change_bits for each in self.differences)

    @property
    def loss(self) -> Curve:
        """The curve that the tolerance is for."""
        return self.curves[0]

    def to_dict(self) -> dict[str, Any]:
        """Return what replay.json holds."""
        return {
            "verdict": self.verdict,
            "steps": self.num_steps,
            "expects_same_bits": self.expects_same_bits,
            "tolerance": _TOLERANCE,
            "curves": [dataclasses.asdict(curve) for curve in self.curves],
            "adapter": (self.adapter or "the same bits") if self.is_adapter_compared else None,
            "differences": [dataclasses.asdict(each) for each in self.differences],
        }


def compare(
    first: Path,
    second: Path,
    num_steps: int,
    *,
    with_adapters: bool,
    differences: list[Difference],
    has_receipt: bool,
) -> Comparison:
    """Compare a run with its repetition.

    Args:
        first: a run directory.
        second: that of the repetition.
        num_steps: compare the first ones.
        with_adapters: whether both are whole.
        differences: between their receipts.
        has_receipt: whether the first one has a whole one.

    Returns:
        Curves and adapters side by side.

    Raises:
        RunError: they have no step in common.
    """
    rows = [
        [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] <= num_steps]
        for folder in (first, second)
    ]
    curves = compare_curves(rows[0], rows[1], _METRICS)
    if not curves or curves[0].metric != "loss":
        raise RunError(f"{first} and {second} have recorded no step in common")
    adapter = None
    if with_adapters:
        folders = (first / "adapter", second / "adapter")
        # one file is what the other is, in most cases: no need of torch
        if len({sha256_of(folder / ADAPTER_FILE) for folder in folders}) > 1:
            adapter = compare_adapters(*folders) or "other bytes around the same tensors"
    return Comparison(num_steps, curves, adapter, with_adapters, differences, has_receipt)


def print_comparison(console: Console, comparison: Comparison, notes: Sequence[str]) -> None:
    """Show the comparison as a table, then the verdict and why.

    Args:
        console: where to.
        comparison: what `compare` returned.
        notes: what could not be compared, and the like.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("difference of", "steps", "from step", "largest", "mean"):
        table.add_column(name, justify="right" if table.columns else "left", overflow="fold")
    for curve in comparison.curves:
        if curve.is_same:
            table.add_row(curve.metric, str(curve.num_steps), "none", "0", "0")
            continue
        table.add_row(
            curve.metric,
            str(curve.num_steps),
            str(curve.first_step),
            f"{curve.largest:.3g} (step {curve.largest_step})",
            f"{curve.mean:.3g} ({curve.mean_relative:.2%})",
        )
    console.print(table)
    if comparison.is_adapter_compared:
        same = "the same file, byte for byte"
        console.print(f"adapter: {comparison.adapter or same}", markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    verdict = f"verdict: {comparison.verdict}. {_reason(comparison)}"
    console.print(verdict, markup=False, soft_wrap=True)


def _reason(comparison: Comparison) -> str:
    mean = f"the losses differ by {comparison.loss.mean_relative:.2%} on average"
    if comparison.verdict == "the same bits":
        compared = comparison.loss.num_steps
        return (
            f"{compared} steps gave what they gave the first time."
            if compared == comparison.num_steps
            else f"The {compared} of {comparison.num_steps} steps that both recorded gave the same."
        )
    if comparison.expects_same_bits:
        return (
            "Program, packages and hardware are those of the receipt, and so the bits should be: "
            f"{mean}. A fault of a GPU, or an operation without a deterministic form (the log "
            "names it)?"
        )
    why = (
        f"{', '.join(each.what for each in comparison.differences if each.may_change_bits)} changed"
        if comparison.has_receipt
        else "there is no whole receipt"
    )
    if comparison.verdict == "the same curve":
        return (
            f"The same bits cannot be expected, as {why}: sums are made in another order, and "
            f"{mean}, of {_TOLERANCE:.0%} allowed."
        )
    return f"{why[0].upper()}{why[1:]}, and {mean}: more than rounding explains ({_TOLERANCE:.0%})."
