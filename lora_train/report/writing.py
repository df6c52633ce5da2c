"""Puts a report's files where they belong, each whole or not at all."""

from __future__ import annotations

from pathlib import Path

from lora_train.errors import UserError
from lora_train.paths import atomic_file
from lora_train.report.drawing import to_png
from lora_train.report.findings import Findings
from lora_train.report.page import render
from lora_train.report.plots import Bars, Plot, make_bars, make_gpu_plots, make_plots


def write_report(runs: list[Findings], folder: Path) -> Path:
    """Write report.html and plots/*.png.

    Args:
        runs: at least one.
        folder: where to; made when missing.

    Returns:
        The page.

    Raises:
        UserError: the folder cannot be written.
    """
    plots: list[Plot | Bars] = [*make_plots(runs)]
    plots += make_gpu_plots(runs[0]) if len(runs) == 1 else []
    bars = make_bars(runs)
    plots += [] if bars is None else [bars]
    page = folder / "report.html"
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        # the page first: of a run that ends, it is what there must be time for
        _write(page, render(runs).encode())
        for plot in plots:
            _write(folder / "plots" / f"{plot.name}.png", to_png(plot))
    except OSError as error:
        raise UserError(
            f"cannot write the report into {folder}: {error.strerror or error}",
            hint="--output DIR names another folder",
        ) from error
    return page


def _write(file: Path, content: bytes) -> None:
    with atomic_file(file) as unfinished:
        unfinished.write_bytes(content)
