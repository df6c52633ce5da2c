"""What the GPU monitor has seen: the rows of gpu_memory_log*.csv, however they were cut off."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path

import numpy as np

from lora_train.gpu_samples import COLUMNS

QUANTITIES = ("utilization", "memory", "power", "temperature")
_COLUMN_OF = {
    "utilization": "utilization.gpu [%]",
    "memory": "memory.used [MiB]",
    "power": "power.draw [W]",
    "temperature": "temperature.gpu",
}
_REASONS = "clocks_event_reasons.active"
# longer than this many intervals, the monitor or the run was not there: nobody knows what was drawn
_GAP_INTERVALS = 5
_STARVED_PERCENT = 50.0
# NVML's bits (nvmlClocksEventReasons), less idle and those that a user has asked for
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown (heat or power supply)",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake of the server",
}


@dataclass(frozen=True)
class GpuSeries:
    """The samples of one GPU, in the order of time; NaN where the driver told nothing."""

    name: str
    """Its number, with the node where there are several."""
    times: np.ndarray
    """(num_samples,) float, seconds since 1970."""
    values: dict[str, np.ndarray]
    """By `QUANTITIES`, each (num_samples,): percent, MiB, W, degrees Celsius."""
    memory_total_mib: float
    reasons: np.ndarray
    """(num_samples,) int: NVML's bits; 0 where there are none."""

    @property
    def interval(self) -> float:
        """Seconds from one sample to the next, commonly; 0 for a single sample."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0

    def energy(self) -> tuple[float, float]:
        """Integrate the power over time; gaps are left out.

        Returns:
            kWh, and the hours that were integrated.
        """
        power, times = self.values["power"], self.times
        known = np.isfinite(power)
        power, times = power[known], times[known]
        steps = np.diff(times)
        is_seen = (steps > 0) & (steps <= _GAP_INTERVALS * self.interval)
        joules = (steps * (power[1:] + power[:-1]) / 2)[is_seen].sum()
        return float(joules) / 3.6e6, float(steps[is_seen].sum()) / 3600

    def mean(self, quantity: str) -> float:
        """Mean over the samples; NaN where there are none."""
        known = self.values[quantity][np.isfinite(self.values[quantity])]
        return float(known.mean()) if len(known) else math.nan

    def most(self, quantity: str) -> float:
        """Highest of the samples; NaN where there are none."""
        known = self.values[quantity][np.isfinite(self.values[quantity])]
        return float(known.max()) if len(known) else math.nan

    def throttles(self) -> dict[str, float]:
        """Why the clock was held down -> share of the samples, of reasons that were seen."""
        if not len(self.reasons):
            return {}
        shares = {name: float((self.reasons & bit > 0).mean()) for bit, name in _THROTTLES.items()}
        return {name: share for name, share in shares.items() if share > 0}

    def during(self, intervals: list[tuple[float, float]]) -> np.ndarray:
        """Mark the samples in some intervals of time.

        Args:
            intervals: (begin, end) in seconds since 1970, in order and apart.

        Returns:
            (num_samples,) bool.
        """
        begins = np.array([begin for begin, _ in intervals])
        ends = np.array([end for _, end in intervals])
        place = np.searchsorted(begins, self.times, side="right") - 1
        if not len(begins):
            return np.zeros(len(self.times), dtype=bool)
        return (place >= 0) & (self.times <= ends[np.maximum(place, 0)])


def starved_share(gpus: list[GpuSeries], intervals: list[tuple[float, float]]) -> float | None:
    """Tell how often the GPUs had little to do while steps were made.

    Args:
        gpus: their samples.
        intervals: when steps were made, see `GpuSeries.during`.

    Returns:
        Share of the samples below half utilization; None without such samples.
    """
    during = [gpu.values["utilization"][gpu.during(intervals)] for gpu in gpus]
    seen = np.concatenate(during) if during else np.zeros(0)
    seen = seen[np.isfinite(seen)]
    return float((seen < _STARVED_PERCENT).mean()) if len(seen) else None


def read_gpu_logs(folder: Path, zone: tzinfo) -> list[GpuSeries]:
    """Read what the monitor wrote of every GPU of every node.

    Args:
        folder: the run directory.
        zone: of the machine that wrote it.

    Returns:
        The GPUs, in the order of their nodes and numbers; none without a file.
    """
    files = sorted(folder.glob("gpu_memory_log*.csv"))
    found: list[GpuSeries] = []
    for file in files:
        node = file.stem.removeprefix("gpu_memory_log").lstrip("-")
        found += _read_file(file, node if len(files) > 1 else "", zone)
    return found


def _read_file(file: Path, node: str, zone: tzinfo) -> list[GpuSeries]:
    place = {column: n for n, column in enumerate(COLUMNS)}
    rows: dict[str, list[list[float]]] = {}
    names: dict[str, str] = {}
    wanted = [place[_COLUMN_OF[quantity]] for quantity in QUANTITIES]
    wanted.append(place["memory.total [MiB]"])
    try:
        lines = file.read_text(encoding="ascii", errors="replace").replace("\0", "").splitlines()
    except OSError:
        return []
    for row in csv.reader(lines, skipinitialspace=True):
        if len(row) != len(COLUMNS) or row[0] == COLUMNS[0]:
            continue  # cut off, or the header of a further start
        try:
            time = datetime.fromisoformat(row[0].replace("/", "-")).replace(tzinfo=zone)
        except ValueError:
            continue
        gpu = row[place["uuid"]] or row[place["index"]]
        names.setdefault(gpu, row[place["index"]])
        values = [_float(row[column]) for column in wanted]
        rows.setdefault(gpu, []).append([time.timestamp(), *values, _bits(row[place[_REASONS]])])
    for gpu in [each for each in rows if any(_is_cut(each, other) for other in rows)]:
        del rows[gpu], names[gpu]
    is_ambiguous = len(set(names.values())) < len(names)  # each task counts its GPUs from 0
    series = []
    for number, (gpu, samples) in enumerate(rows.items()):
        table = np.array(samples)
        table = table[np.argsort(table[:, 0], kind="stable")]
        name = f"GPU {number if is_ambiguous else names[gpu]}"
        totals = table[:, -2][np.isfinite(table[:, -2])]
        series.append(
            GpuSeries(
                name=f"{node} {name}".strip(),
                times=table[:, 0],
                values={quantity: table[:, n + 1] for n, quantity in enumerate(QUANTITIES)},
                memory_total_mib=float(totals.max()) if len(totals) else math.nan,
                reasons=table[:, -1].astype(int),
            )
        )
    return sorted(series, key=lambda each: (len(each.name), each.name))


def _is_cut(uuid: str, other: str) -> bool:
    """Whether a UUID is what a line that was cut off has left of another one."""
    return uuid != other and uuid.startswith("GPU-"[: len(uuid)]) and other.startswith(uuid)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A], of a MIG slice or an old driver
        return math.nan


def _bits(text: str) -> float:
    try:
        return float(int(text, 16))
    except ValueError:
        return 0.0
