"""All that a report says of a run, worked out once for the page, the terminal and --json."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_train.report import formats
from lora_train.report.evaluations import Evaluation, read_evaluations
from lora_train.report.gpu_log import GpuSeries, read_gpu_logs, starved_share
from lora_train.report.job import Job, judge_job
from lora_train.report.records import Record, number, read_record
from lora_train.report.speed import Speed, measure_speed
from lora_train.report.state import State, find_state
from lora_train.report.time_split import TimeSplit, busy_intervals, split_time


@dataclass(frozen=True)
class Findings:
    """A run directory and what follows from it."""

    record: Record
    state: State
    speed: Speed
    time: TimeSplit | None
    gpus: list[GpuSeries]
    job: Job
    evaluations: list[Evaluation]

    @property
    def name(self) -> str:
        """What tables and plots call the run."""
        return self.record.run.name

    @property
    def losses(self) -> np.ndarray:
        """(num_rows,) float: training loss of each row; NaN where it was none."""
        return np.array([number(row, "loss") for row in self.record.steps], dtype=float)

    @property
    def val_losses(self) -> dict[int, float]:
        """Validation loss by step, of those that are numbers."""
        found = {row["step"]: number(row, "val_loss") for row in self.record.validations}
        return {step: value for step, value in found.items() if math.isfinite(value)}

    @property
    def peak_memory_bytes(self) -> float | None:
        """Most that torch held on any GPU."""
        rows = self.record.steps
        found = [number(row, "max_memory_allocated_bytes") for row in rows]
        return max((value for value in found if math.isfinite(value)), default=None)

    @functools.cached_property
    def energy(self) -> tuple[float, float] | None:
        """KWh of all GPUs, and the GPU-hours of which it was measured; None without any."""
        found = [gpu.energy() for gpu in self.gpus]
        hours = sum(each[1] for each in found)
        return (sum(each[0] for each in found), hours) if hours else None

    @functools.cached_property
    def starved(self) -> float | None:
        """Share of the GPUs' samples during steps below half utilization."""
        return starved_share(self.gpus, busy_intervals(self.record.starts, "steps"))

    @property
    def mean_utilization(self) -> float | None:
        """Of all GPUs over all samples, as a share."""
        known = [gpu.mean("utilization") / 100 for gpu in self.gpus]
        known = [value for value in known if math.isfinite(value)]
        return sum(known) / len(known) if known else None

    def exact_match(self, when: str) -> float | None:
        """Share of the held-out answers that were right, `before` or `after` training."""
        figures = (self.record.summary or {}).get(when)
        value = number(figures, "exact_match") if isinstance(figures, dict) else math.nan
        return value if math.isfinite(value) else None


def find_all(folder: Path) -> Findings:
    """Read a run directory and work out what follows.

    Args:
        folder: the run directory.

    Returns:
        The findings.

    Raises:
        UserError: it is no run directory.
    """
    record = read_record(folder)
    return Findings(
        record=record,
        state=find_state(record),
        speed=measure_speed(record),
        time=split_time(record),
        gpus=read_gpu_logs(folder, record.timezone),
        job=judge_job(record),
        evaluations=read_evaluations(record.run),
    )


@dataclass(frozen=True)
class Figure:
    """One number of a run: its key in --json, what readers call it, and how it is found."""

    key: str
    label: str
    value: Callable[[Findings], float | None]
    text: Callable[[float | None], str]


def _first(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[0]) if len(known) else None


def _last(values: np.ndarray) -> float | None:
    return _first(values[::-1])


def _time(run: Findings, name: str) -> float | None:
    return None if run.time is None else getattr(run.time, name)


def _tokens(run: Findings) -> float | None:
    known = run.speed.tokens[np.isfinite(run.speed.tokens)]
    is_complete = run.record.run.config.trainer.log_every_n_steps == 1
    return float(known.sum()) if len(known) and is_complete else None


def _share_of_energy(run: Findings) -> float | None:
    return None if run.energy is None else run.energy[0]


def _best(run: Findings) -> float | None:
    return min(run.val_losses.values(), default=None)


FIGURES = (
    Figure("steps", "steps", lambda run: run.record.num_steps, lambda x: formats.fixed(x, 0)),
    Figure("first_loss", "training loss, first", lambda run: _first(run.losses), formats.loss),
    Figure("last_loss", "training loss, last", lambda run: _last(run.losses), formats.loss),
    Figure(
        "first_val_loss", "validation loss, first",
        lambda run: next(iter(run.val_losses.values()), None), formats.loss,
    ),
    Figure(
        "last_val_loss", "validation loss, last",
        lambda run: next(reversed(run.val_losses.values()), None), formats.loss,
    ),
    Figure("best_val_loss", "validation loss, lowest", _best, formats.loss),
    Figure(
        "exact_match_before", "exact match, before",
        lambda run: run.exact_match("before"), formats.percent,
    ),
    Figure(
        "exact_match_after", "exact match, after",
        lambda run: run.exact_match("after"), formats.percent,
    ),
    Figure("tokens", "tokens trained on", _tokens, lambda x: formats.fixed(x, 0)),
    Figure(
        "tokens_per_second", "speed",
        lambda run: run.speed.typical(run.speed.tokens_per_second), formats.rate,
    ),
    Figure(
        "step_seconds_p50", "step time, median",
        lambda run: run.speed.step_percentile(50), formats.duration,
    ),
    Figure(
        "step_seconds_p95", "step time, 95 of 100",
        lambda run: run.speed.step_percentile(95), formats.duration,
    ),
    Figure(
        "mfu", "MFU (LoRA's operations)",
        lambda run: run.speed.typical(run.speed.mfu), formats.percent,
    ),
    Figure(
        "hfu", "HFU (with recomputation)",
        lambda run: run.speed.typical(run.speed.hfu), formats.percent,
    ),
    Figure("wall_seconds", "wall time", lambda run: _time(run, "wall_seconds"), formats.duration),
    Figure("goodput", "goodput", lambda run: _time(run, "goodput"), formats.percent),
    Figure(
        "gpu_hours", "GPU-hours", lambda run: run.job.gpu_hours, lambda x: formats.fixed(x, 2)
    ),
    Figure(
        "peak_memory_bytes", "GPU memory, most",
        lambda run: run.peak_memory_bytes, formats.gibibytes,
    ),
    Figure(
        "gpu_utilization", "GPU utilization, mean",
        lambda run: run.mean_utilization, formats.percent,
    ),
    Figure(
        "starved", "samples in steps below 50 % utilization",
        lambda run: run.starved, formats.percent,
    ),
    Figure("energy_kwh", "energy of the GPUs", _share_of_energy, lambda x: _kwh(x)),
)  # fmt: skip


def _kwh(value: float | None) -> str:
    return formats.fixed(value, 3 if value is not None and value < 1 else 2, "kWh")


def figure_texts(run: Findings) -> dict[str, str]:
    """Return the figures of a run as text, by their keys."""
    return {figure.key: figure.text(figure.value(run)) for figure in FIGURES}


def to_json(run: Findings) -> dict[str, Any]:
    """Return all figures of a run for a program to read.

    Args:
        run: what was found.

    Returns:
        Plain numbers in the units that their keys name, shares from 0 to 1; None for what is not
        known.
    """
    time = run.time
    return {
        "name": run.name,
        "run_directory": str(run.record.run.path),
        "state": run.state.kind,
        "state_text": run.state.title,
        "error": run.state.text if run.state.kind == "failed" else None,
        "max_steps": run.record.max_steps,
        "num_starts": len(run.record.starts) or len(run.record.environments),
        **{figure.key: figure.value(run) for figure in FIGURES},
        "why_no_mfu": run.speed.why_no_mfu,
        "time_seconds": None if time is None else time.seconds,
        "num_lost_steps": None if time is None else time.num_lost_steps,
        "gpus": [
            {
                "name": gpu.name,
                **{f"mean_{quantity}": _known(gpu.mean(quantity)) for quantity in gpu.values},
                "most_memory_mib": _known(gpu.most("memory")),
                "energy_kwh": gpu.energy()[0],
                "throttled": gpu.throttles(),
            }
            for gpu in run.gpus
        ],
        "asked": [
            {"what": each.what, "asked": each.asked, "used": each.used, "share": each.share}
            for each in run.job.table
        ],
        "sbatch_lines": run.job.lines,
        "evaluations": {
            each.name: _plain(
                {key: each.content.get(key) for key in ("num_rows", "results", "difference")}
            )
            for each in run.evaluations
        },
    }


def _plain(tree: Any) -> Any:
    """The same without NaN and infinity, which are no JSON."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return _known(tree) if isinstance(tree, float) else tree


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
