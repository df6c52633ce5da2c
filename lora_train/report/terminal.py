"""The short report for a terminal, with small plots; plain ASCII where it shows nothing else."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_train.report import formats
from lora_train.report.comparison import different_settings, run_labels
from lora_train.report.evaluations import evaluation_rows
from lora_train.report.findings import FIGURES, Findings, figure_texts
from lora_train.report.plots import Plot, make_plots
from lora_train.report.time_split import NAMES

_PLOTS = ("loss", "val_loss", "tokens_per_second")
_ROWS = 6
_COLUMNS = 28
_BAR = 24
# of the tables: the widest name of a figure, and what a run takes
_LABEL = 40
_COLUMN = 18
# dots of a Braille character: 2 columns of 4, from above
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_STYLES = {
    "complete": "bold green", "running": "bold blue", "stopped": "bold yellow",
    "lost": "bold yellow", "failed": "bold red",
}  # fmt: skip


def print_report(runs: list[Findings], stream: TextIO | None = None) -> None:
    """Print what matters most of one run, or of several side by side.

    Args:
        runs: at least one.
        stream: where to; None: stdout.
    """
    stream = sys.stdout if stream is None else stream
    is_utf8 = (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    labels = run_labels(runs)
    for run, label in zip(runs, labels, strict=True):
        line = Text(f"{label}: ").append(run.state.title, _STYLES[run.state.kind])
        console.print(line)
        if run.state.kind in ("failed", "complete") and run.state.text:
            console.print(Text(f"  {run.state.text}"))
            if run.state.hint:
                console.print(Text(f"  hint: {run.state.hint}"))
    rows = _figure_rows(runs)
    if len(runs) == 1:
        _print_table(console, None, rows)
    else:
        _print_table(console, ["", *labels], rows)
        if different := [(row["label"], row["texts"]) for row in different_settings(runs)]:
            _print_table(console, ["settings that differ", *labels], different)
    plots = [plot for plot in make_plots(runs) if plot.name in _PLOTS]
    _print_plots(console, plots, is_utf8)
    if len(runs) == 1:
        for text in _time_lines(runs[0], console.width, is_utf8):
            console.print(text)
        for line_ in runs[0].job.lines:
            console.print(Text(f"would do: {line_}"))
        if runs[0].job.replaced:
            console.print(Text(f"  in place of {' and '.join(runs[0].job.replaced)}"))


def draw_text(
    plot: Plot, *, is_utf8: bool, columns: int = _COLUMNS, rows: int = _ROWS
) -> list[str]:
    """Draw curves with characters, all in one ink.

    Args:
        plot: what to draw; raw curves only where there are no others.
        is_utf8: draw with Braille dots; else with one `*` a character.
        columns: width of the drawing, without the numbers of its axis.
        rows: its height.

    Returns:
        Its lines, with the axis's numbers; none when there is nothing to draw.
    """
    lines = [line for line in plot.lines if line.style != "raw"] or plot.lines
    x = np.concatenate([line.x for line in lines] or [np.zeros(0)])
    y = np.concatenate([line.y for line in lines] or [np.zeros(0)])
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if not len(x):
        return []
    low, high = (0.0 if plot.from_zero else float(y.min())), float(y.max())
    across, down = (2, 4) if is_utf8 else (1, 1)
    x_place = _places(x, float(x.min()), float(x.max()), columns * across)
    y_place = rows * down - 1 - _places(y, low, high, rows * down)
    cells = np.zeros((rows, columns), dtype=int)
    for right, below in zip(x_place, y_place, strict=True):
        dot = _DOTS[right % across][below % down] if is_utf8 else 1
        cells[below // down, right // across] |= dot
    text = [
        "".join(" " if not cell else chr(0x2800 + cell) if is_utf8 else "*" for cell in row)
        for row in cells
    ]
    marks = {0: _mark(high), rows - 1: _mark(low)}
    width = max(len(mark) for mark in marks.values())
    axis = "\N{BOX DRAWINGS LIGHT VERTICAL}" if is_utf8 else "|"
    drawn = [f"{marks.get(row, ''):>{width}} {axis}{line}" for row, line in enumerate(text)]
    first, last = f"{x.min():.0f}", f"step {x.max():.0f}"
    gap = max(1, columns - len(first) - len(last))
    return [*drawn, f"{'':>{width}}  {first}{' ' * gap}{last}"]


def _mark(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else formats.small(value)


def _places(values: np.ndarray, low: float, high: float, count: int) -> np.ndarray:
    """The place of each value among so many, from low to high."""
    if high <= low:
        return np.zeros(len(values), dtype=int)
    return np.clip(((values - low) / (high - low) * (count - 1)).round().astype(int), 0, count - 1)


def _print_plots(console: Console, plots: list[Plot], is_utf8: bool) -> None:
    """Two beside each other, where the terminal is wide enough."""
    drawn = []
    for plot in plots:
        title = f"{plot.title} ({plot.y_label})"
        # beside each other, a title must not be wider than its plot
        short = title if len(title) <= _COLUMNS + 6 else plot.title
        drawn.append([short, *draw_text(plot, is_utf8=is_utf8)])
    beside = 2 if console.width >= 2 * (_COLUMNS + 12) else 1
    for start in range(0, len(drawn), beside):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
        for _ in drawn[start : start + beside]:
            table.add_column(no_wrap=True)
        table.add_row(*(Text("\n".join(lines)) for lines in drawn[start : start + beside]))
        console.print(table)


def _figure_rows(runs: list[Findings]) -> list[tuple[str, list[str]]]:
    texts = [figure_texts(run) for run in runs]
    rows = [
        (figure.label, [text[figure.key] for text in texts])
        for figure in FIGURES
        if any(text[figure.key] != formats.UNKNOWN for text in texts)
        and not _is_told(figure.key, texts)
    ]
    evaluations = evaluation_rows([run.evaluations for run in runs])
    return rows + [(row["label"], row["texts"]) for row in evaluations]


def _is_told(key: str, texts: list[dict[str, str]]) -> bool:
    """Whether another row says the same."""
    same = {"hfu": "mfu", "best_val_loss": "last_val_loss"}.get(key)
    return same is not None and all(text[key] == text[same] for text in texts)


def _print_table(
    console: Console, names: list[str] | None, rows: list[tuple[str, list[str]]]
) -> None:
    """Print rows of texts, one for each run; as many runs beside each other as the width takes."""
    num_runs = len(rows[0][1]) if rows else 0
    beside = max(1, (console.width - _LABEL) // _COLUMN)
    for start in range(0, num_runs, beside):
        table = Table(
            box=None, show_header=names is not None, pad_edge=False, padding=(0, 2, 0, 0),
            header_style="bold",
        )  # fmt: skip
        shown = slice(start, start + beside)
        table.add_column(Text(names[0] if names else ""), min_width=_LABEL - 12, overflow="fold")
        for name in (names[1:] if names else [""])[shown]:
            table.add_column(Text(name), justify="right", overflow="fold")
        for label, texts in rows:
            table.add_row(label, *texts[shown])
        console.print(table)
        if num_runs > beside:
            console.print()


def _time_lines(run: Findings, columns: int, is_utf8: bool) -> Iterator[Text]:
    if run.time is None or not run.time.wall_seconds:
        return
    block = "\N{FULL BLOCK}" if is_utf8 else "#"
    width = max(map(len, NAMES.values()))
    # behind name, share and seconds
    longest = min(_BAR, columns - width - 23)
    for kind, name in NAMES.items():
        share = run.time.seconds[kind] / run.time.wall_seconds
        if share > 0:
            bar = block * math.ceil(share * longest)
            seconds = formats.duration(run.time.seconds[kind])
            line = f"{name:<{width}} {formats.percent(share):>7} {seconds:>12} {bar}"
            yield Text(line.rstrip())
