"""Whether a run that went on ended as one without a break: all that both left, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_train.checkpoint import Checkpoint
from lora_train.metrics import read_metrics
from lora_train.replay.run_comparison import (
    Part,
    compare_adapters,
    compare_checkpoints,
    compare_curves,
)

__all__ = ["Part", "compare_ends", "print_ends"]

# other data in a step, or the same in another order, shows in the loss and in the counts
_METRICS = (
    "loss", "grad_norm", "learning_rate", "epoch", "tokens", "supervised_tokens", "val_loss",
)  # fmt: skip


def compare_ends(straight: Path, resumed: Path, num_steps: int, after_step: int) -> list[Part]:
    """Compare what two runs of the same steps left.

    Args:
        straight: run directory of the run in one piece.
        resumed: that of the run which went on.
        num_steps: steps of both.
        after_step: the step after which the second went on.

    Returns:
        The parts of the last checkpoint, the metrics of the steps after the break, and the
        finished adapter; each with its first difference.
    """
    checkpoints = [
        Checkpoint(run / "checkpoints" / f"step-{num_steps:06d}", num_steps)
        for run in (straight, resumed)
    ]
    return [
        *compare_checkpoints(checkpoints[0], checkpoints[1]),
        Part(f"losses and data of steps to {num_steps}", _metrics(straight, resumed, after_step)),
        Part("finished adapter", compare_adapters(straight / "adapter", resumed / "adapter")),
    ]


def _metrics(straight: Path, resumed: Path, after_step: int) -> str | None:
    rows = [
        [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > after_step]
        for run in (straight, resumed)
    ]
    steps = [{row["step"] for row in some if "loss" in row} for some in rows]
    if steps[0] != steps[1] or not steps[0]:
        return f"steps {sorted(steps[0])} and {sorted(steps[1])} were recorded"
    wrong = [curve for curve in compare_curves(rows[0], rows[1], _METRICS) if not curve.is_same]
    if not wrong:
        return None
    first = min(wrong, key=lambda curve: curve.first_step or 0)
    return (
        f"step {first.first_step}: {first.metric}; the largest difference {first.largest:.3g} at "
        f"step {first.largest_step}"
    )


def print_ends(console: Console, columns: Mapping[str, Sequence[Part]], num_steps: int) -> None:
    """Show what `compare_ends` found as a table, with each difference and the verdict below.

    Args:
        console: where to.
        columns: how a run was broken -> its parts.
        num_steps: steps of the run in one piece.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"against {num_steps} steps without a break")
    for title in columns:
        table.add_column(title)
    for parts in zip(*columns.values(), strict=True):
        cells = ["differs" if part.difference else "same bits" for part in parts]
        table.add_row(parts[0].name, *cells)
    console.print(table)
    wrong = [
        f"{title}: {part.name}: {part.difference}"
        for title, parts in columns.items()
        for part in parts
        if part.difference
    ]
    for line in wrong:
        console.print(line, markup=False, soft_wrap=True)
    verdict = (
        "a run that goes on does NOT end with the bits of one in one piece"
        if wrong
        else "the same bits, whether the run is stopped or not"
    )
    console.print(f"verdict: {verdict}", soft_wrap=True)
