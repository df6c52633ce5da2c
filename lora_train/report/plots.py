"""What the plots of a report show, as numbers; `drawing` and `terminal` draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lora_train.report.curves import in_bins, smooth, thin_out
from lora_train.report.findings import Findings
from lora_train.report.records import number
from lora_train.report.time_split import NAMES, busy_intervals

# more GPUs than this are shown as their mean and range
_MOST_LINES = 4
# more validations or checkpoints would cover the curves, and make megabytes of drawing
_MOST_MARKS = 60
_GPU_PLOTS = {
    "utilization": ("GPU utilization", "%", 100.0),
    "memory": ("GPU memory in use", "GiB", None),
    "power": ("GPU power", "W", None),
    "temperature": ("GPU temperature", "\N{DEGREE SIGN}C", None),
}


@dataclass(frozen=True)
class Line:
    """One curve; points whose y is NaN are gaps."""

    x: np.ndarray
    y: np.ndarray
    series: int
    """Which colour."""
    label: str = ""
    style: str = "line"
    """line; raw: faint, behind; points: a line with a dot at each point."""
    low: np.ndarray | None = None
    """With `high`, the range around y."""
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Plot:
    """Curves over one axis."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    top: float | None = None
    """End of the y axis; None: as the curves need it."""
    from_zero: bool = False
    is_log: bool = False
    level: tuple[float, str] | None = None
    """A value worth a dashed line, and what it is."""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Validations, on the x axis."""
    marks: list[float] = field(default_factory=list)
    """Checkpoints, on the x axis."""


@dataclass(frozen=True)
class Bars:
    """The time split of each run, as a bar of 100 %."""

    name: str
    title: str
    runs: list[str]
    shares: dict[str, list[float]]
    """Kind of time -> its share for each run."""


def make_plots(runs: list[Findings]) -> list[Plot]:
    """Return the plots over steps of one run, or of several laid over each other.

    Args:
        runs: at least one.

    Returns:
        Those for which there is anything to show.
    """
    is_one = len(runs) == 1
    plots = [_loss(runs[0])] if is_one else _losses(runs)
    plots.append(
        Plot(
            "learning_rate", "Learning rate", "step", "learning rate",
            _curves(runs, "learning_rate", is_smooth=False), from_zero=True,
        )
    )  # fmt: skip
    norms = _curves(runs, "grad_norm")
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in norms] or [np.zeros(0)])
    positive = values[values > 0]
    clips = {run.record.run.config.trainer.gradient_clip_val for run in runs}
    clip = clips.pop() if len(clips) == 1 else None
    plots.append(
        Plot(
            "grad_norm", "Gradient norm, before clipping", "step", "norm", norms,
            from_zero=True,
            is_log=len(positive) > 0 and positive.max() > 20 * np.median(positive),
            level=(clip, "clipped above") if clip and len(values) and values.max() > clip / 2
            else None,
        )
    )  # fmt: skip
    plots.append(
        Plot(
            "tokens_per_second", "Speed", "step", "tokens/s",
            _curves(runs, "tokens_per_second", is_warm=True), from_zero=True,
        )
    )  # fmt: skip
    plots.append(_utilization(runs))
    return [plot for plot in plots if any(np.isfinite(line.y).any() for line in plot.lines)]


def make_gpu_plots(run: Findings) -> list[Plot]:
    """Return what the GPU monitor saw over time; none without its file.

    Args:
        run: one run.

    Returns:
        Plots over the time since its first start.
    """
    if not run.gpus:
        return []
    starts = run.record.starts
    zero = min(gpu.times[0] for gpu in run.gpus)
    if starts:
        zero = min(zero, starts[0].first.begin)
    last = max(gpu.times[-1] for gpu in run.gpus)
    unit, scale = next(
        (unit, scale)
        for unit, scale, limit in (("s", 1, 180), ("min", 60, 10_800), ("h", 3600, math.inf))
        if last - zero < limit
    )
    spans, marks = (
        [
            ((begin - zero) / scale, (end - zero) / scale)
            for begin, end in busy_intervals(starts, kind)
        ]
        for kind in ("validation", "checkpoint")
    )
    plots = []
    for quantity, (title, y_label, top) in _GPU_PLOTS.items():
        lines = _gpu_lines(run, quantity, zero, scale, 1 / 1024 if quantity == "memory" else 1.0)
        totals = {round(gpu.memory_total_mib / 1024, 1) for gpu in run.gpus}
        is_memory = quantity == "memory" and len(totals) == 1
        total = totals.pop() if is_memory else math.nan
        plots.append(
            Plot(
                f"gpu_{quantity}", title, f"time since the first start ({unit})", y_label, lines,
                top=top, from_zero=True,
                level=(total, "all of it") if math.isfinite(total) else None,
                spans=spans if len(spans) <= _MOST_MARKS else [],
                marks=[begin for begin, _ in marks] if len(marks) <= _MOST_MARKS else [],
            )
        )  # fmt: skip
    return [plot for plot in plots if any(np.isfinite(line.y).any() for line in plot.lines)]


def make_bars(runs: list[Findings]) -> Bars | None:
    """Return the time split of the runs of which it is known; None without any."""
    known = [(run.name, run.time) for run in runs if run.time is not None and run.time.wall_seconds]
    if not known:
        return None
    shares = {kind: [time.seconds[kind] / time.wall_seconds for _, time in known] for kind in NAMES}
    return Bars("time", "Where the time went", [name for name, _ in known], shares)


def _loss(run: Findings) -> Plot:
    steps, losses = run.speed.steps.astype(float), run.losses
    smoothed, width = smooth(losses)
    lines = [Line(*thin_out(steps, losses), 0, "each step", "raw")]
    if width > 1:
        lines.append(Line(*thin_out(steps, smoothed), 0, f"mean of {width} steps"))
    elif len(losses):
        lines = [Line(*thin_out(steps, losses), 0, "training", "points")]
    validation = run.val_losses
    if validation:
        x, y = np.array(list(validation), dtype=float), np.array(list(validation.values()))
        lines.append(Line(x, y, 1, "validation", "points"))
    return Plot("loss", "Training and validation loss", "step", "nats per token", lines)


def _losses(runs: list[Findings]) -> list[Plot]:
    validation = [
        Line(
            np.array(list(run.val_losses), dtype=float), np.array(list(run.val_losses.values())),
            place, run.name, "points",
        )
        for place, run in enumerate(runs)
    ]  # fmt: skip
    return [
        Plot("loss", "Training loss, smoothed", "step", "nats per token", _curves(runs, "loss")),
        Plot("val_loss", "Validation loss", "step", "nats per token", validation),
    ]


def _curves(
    runs: list[Findings], key: str, *, is_smooth: bool = True, is_warm: bool = False
) -> list[Line]:
    """One quantity of metrics.jsonl: each run's curve, of a single one its raw points as well."""
    lines = []
    for place, run in enumerate(runs):
        steps = run.speed.steps.astype(float)
        values = np.array([number(row, key) for row in run.record.steps], dtype=float)
        chosen = np.where(run.speed.is_warm, values, np.nan) if is_warm else values
        smoothed, width = smooth(chosen) if is_smooth else (values, 1)
        if width > 1 and len(runs) == 1:
            lines.append(Line(*thin_out(steps, values), place, "each step", "raw"))
        label = run.name if len(runs) > 1 else f"mean of {width} steps" if width > 1 else ""
        lines.append(Line(*thin_out(steps, smoothed), place, label))
    return lines


def _utilization(runs: list[Findings]) -> Plot:
    lines = []
    for place, run in enumerate(runs):
        steps = run.speed.steps.astype(float)
        for values, name, series in ((run.speed.mfu, "MFU", 0), (run.speed.hfu, "HFU", 1)):
            if name == "HFU" and (
                len(runs) > 1 or run.record.run.config.trainer.gradient_checkpointing is not True
            ):
                continue
            y = smooth(100 * np.where(run.speed.is_warm, values, np.nan))[0]
            label = run.name if len(runs) > 1 else name
            lines.append(Line(*thin_out(steps, y), place if len(runs) > 1 else series, label))
    return Plot(
        "mfu", "MFU, LoRA's own operations", "step", "% of bf16 peak", lines, from_zero=True
    )


def _gpu_lines(
    run: Findings, quantity: str, zero: float, scale: float, factor: float
) -> list[Line]:
    series = [(gpu, gpu.values[quantity] * factor) for gpu in run.gpus]
    if len(series) <= _MOST_LINES:
        return [
            Line(*in_bins((gpu.times - zero) / scale, values)[:2], place, gpu.name)
            for place, (gpu, values) in enumerate(series)
        ]
    x = np.concatenate([(gpu.times - zero) / scale for gpu, _ in series])
    y = np.concatenate([values for _, values in series])
    order = np.argsort(x, kind="stable")
    bins = in_bins(x[order], y[order])
    label = f"{len(series)} GPUs, mean and range"
    return [Line(bins.x, bins.mean, 0, label, low=bins.low, high=bins.high)]
