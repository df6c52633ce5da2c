"""The end of a run as a person reads it: what was gained, where it lies, what to try next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lora_train.answers import AnswerReport
from lora_train.data.held_out import HeldOutExample
from lora_train.evaluation.scores import is_exact_match
from lora_train.metrics import read_metrics
from lora_train.progress import format_seconds

_SAMPLES = 3


def make_summary(
    *,
    name: str,
    run_directory: Path,
    examples: list[HeldOutExample],
    before: AnswerReport | None,
    after: AnswerReport | None,
    train_seconds: float,
) -> dict[str, Any]:
    """Collect what `summary.json` holds.

    Args:
        name: the run's name.
        run_directory: its metrics.jsonl is read.
        examples: the held-out examples that were answered.
        before: answers of the untrained model, if any.
        after: answers of the trained model, if any.
        train_seconds: time in training steps.

    Returns:
        Figures before and after, and the answers side by side.
    """
    rows = read_metrics(run_directory / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    val_losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    samples = []
    if before is not None and after is not None:
        samples = [
            {
                "prompt": example.prompt,
                "reference": example.reference,
                "before": before.answers[n],
                "after": after.answers[n],
                "after_is_exact": is_exact_match(after.answers[n], example.reference),
            }
            for n, example in enumerate(examples)
        ]
    return {
        "name": name,
        "run_directory": str(run_directory),
        "steps": rows[-1]["step"],
        "train_seconds": train_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "before": {
            "val_loss": val_losses.get(0),
            "exact_match": before.exact_match if before else None,
        },
        "after": {
            "val_loss": val_losses.get(rows[-1]["step"]),
            "exact_match": after.exact_match if after else None,
        },
        "num_generate": len(examples),
        "system": next((example.system for example in examples if example.system), None),
        "samples": samples,
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary that `summary.json` holds.

    Args:
        console: where to.
        summary: what `make_summary` returned.
    """
    parts: list[Any] = [_figures(summary)]
    samples = summary["samples"][:_SAMPLES]
    if samples:
        parts += [Text(), Text("held-out examples", style="bold"), *map(_sample, samples)]
    parts += [Text(), _next_steps(summary)]
    title = (
        f"{summary['name']}: {summary['steps']} steps in {format_seconds(summary['train_seconds'])}"
    )
    console.print(
        Panel(Group(*parts), title=title, title_align="left", expand=False, padding=(1, 2))
    )


def _figures(summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = summary["before"], summary["after"]
    if after.get("val_loss") is not None:
        table.add_row("held-out loss", _number(before.get("val_loss")), _number(after["val_loss"]))
    if after.get("exact_match") is not None:
        count = summary["num_generate"]
        table.add_row(
            f"exact match ({count} held-out)",
            _percent(before.get("exact_match")),
            _percent(after["exact_match"]),
        )
    table.add_row("training loss", _number(summary["first_loss"]), _number(summary["last_loss"]))
    return table


def _sample(sample: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("  asked", Text(sample["prompt"]))
    table.add_row("  before", Text(_shorten(sample["before"])))
    good = sample["after_is_exact"]
    table.add_row("  after", Text(_shorten(sample["after"]), style="green" if good else "yellow"))
    if not good:
        table.add_row("  right", Text(_shorten(sample["reference"])))
    table.add_row()
    return table


def _next_steps(summary: dict[str, Any]) -> Table:
    run, program = shlex.quote(summary["run_directory"]), _program()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("adapter", f"{summary['run_directory']}/adapter  (plain PEFT format)")
    if (Path(summary["run_directory"]) / "report.html").is_file():
        table.add_row("report", f"{summary['run_directory']}/report.html  (open in a browser)")
    table.add_row("try it", Text(f"{program} generate {run}", style="bold"))
    if summary["name"] == "quickstart":
        table.add_row("your data", f"{program} data.path=chats.jsonl log.name=mine")
        table.add_row("a large model", f"{program} --factory llama31_8b --max-steps 250")
    return table


def _program() -> str:
    """How this user calls the program: by name where it is on the PATH, else by its place."""
    if shutil.which("lora-train") or Path(sys.argv[0]).name != "lora-train":
        return "lora-train"
    return os.path.relpath(sys.argv[0])


def _shorten(text: str, limit: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
