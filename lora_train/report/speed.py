"""Tokens a second, and the share of the GPUs' arithmetic that went into LoRA's own operations."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_train.flops import forward_flops, step_flops
from lora_train.gpu_specs import gpu_spec
from lora_train.report.records import Record, gpus_of, number


@dataclass(frozen=True)
class Speed:
    """What the steps took, the first of each start apart: it compiles kernels and fills caches."""

    steps: np.ndarray
    """(num_rows,) int: the step of each row of metrics.jsonl, in order."""
    tokens_per_second: np.ndarray
    """(num_rows,) float; NaN where a row does not tell, here and below."""
    mfu: np.ndarray
    """(num_rows,) float: share of the GPUs' dense bf16 peak, recomputation not counted."""
    hfu: np.ndarray
    """(num_rows,) float: the same with recomputed activations; equal without checkpointing."""
    is_warm: np.ndarray
    """(num_rows,) bool: not the first step of a start."""
    step_seconds: np.ndarray
    """(num_rows,) float."""
    tokens: np.ndarray
    """(num_rows,) float: tokens of the step, those that are not supervised included."""
    why_no_mfu: str | None
    """What is missing for MFU; None where it is counted."""
    peaks_tflops: tuple[float, ...]
    """Of all GPUs together, dense bf16, in 10^12 operations a second; several after a change."""

    def typical(self, values: np.ndarray) -> float | None:
        """Mean of a rate over the time of the warm steps; None without any."""
        chosen = self._chosen() & np.isfinite(values) & (self.step_seconds > 0)
        if not chosen.any():
            return None
        return float(np.average(values[chosen], weights=self.step_seconds[chosen]))

    def step_percentile(self, percent: float) -> float | None:
        """Seconds that so many percent of the warm steps took at most; None without any."""
        chosen = self._chosen() & np.isfinite(self.step_seconds)
        return float(np.percentile(self.step_seconds[chosen], percent)) if chosen.any() else None

    def _chosen(self) -> np.ndarray:
        return self.is_warm if self.is_warm.any() else np.ones_like(self.is_warm)


def measure_speed(record: Record) -> Speed:
    """Work out the speed of a run's steps.

    Args:
        record: of the run.

    Returns:
        Its speed; arrays are empty for a run without a step.
    """
    rows = record.steps
    steps = np.array([row["step"] for row in rows], dtype=int)
    first = [start.first.step + 1 for start in record.starts] or steps[:1].tolist()
    seconds = _column(rows, "step_time_seconds")
    peaks, is_recomputed = _machines(record, steps)
    needed, recomputed = _flops(record)
    with np.errstate(divide="ignore", invalid="ignore"):
        available = seconds * peaks * 1e12
        mfu = needed / available
        hfu = (needed + np.where(is_recomputed, recomputed, 0.0)) / available
    return Speed(
        steps=steps,
        tokens_per_second=_column(rows, "tokens_per_second"),
        mfu=mfu,
        hfu=hfu,
        is_warm=~np.isin(steps, first),
        step_seconds=seconds,
        tokens=_column(rows, "tokens"),
        why_no_mfu=None if np.isfinite(mfu).any() else _why_no_mfu(record),
        peaks_tflops=tuple(np.unique(peaks[np.isfinite(mfu)]).tolist()),
    )


def _machines(record: Record, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the steps were done with, which may be another with each start.

    Args:
        record: of the run.
        steps: (num_rows,) int.

    Returns:
        The peak of all GPUs in TFLOP/s, (num_rows,) float, NaN where it is not known; and whether
        activations were computed again, (num_rows,) bool.
    """
    peaks = np.full(len(steps), np.nan)
    is_recomputed = np.full(len(steps), record.run.config.trainer.gradient_checkpointing is True)
    for environment in record.environments:
        # a step counts as the newest start that came by it has done it
        done = ~(steps <= number(environment, "step"))
        specs = [gpu_spec(str(gpu.get("name"))) for gpu in gpus_of(environment)]
        peaks[done] = sum(spec.bf16_tflops if spec else math.nan for spec in specs) or math.nan
        with contextlib.suppress(LookupError, TypeError):
            config = environment["config"]["trainer"]["gradient_checkpointing"]
            is_recomputed[done] = config is True
    return peaks, is_recomputed


def _why_no_mfu(record: Record) -> str:
    gpus = gpus_of(record.environment)
    unknown = [str(gpu.get("name")) for gpu in gpus if gpu_spec(str(gpu.get("name"))) is None]
    if record.is_on_cpu:
        return "it ran on a CPU"
    if not record.environment:
        return "environment.json is missing"
    if not gpus:
        return "the GPUs were not recorded"
    if unknown:
        return f"the peak of {unknown[0]} is not known here"
    if model_config(record) is None:
        return "the model's config.json was not recorded"
    return "the layers of this model are not known here, or its steps were not counted"


def model_config(record: Record) -> Mapping[str, Any] | None:
    """Find the content of the base model's config.json.

    Args:
        record: of the run.

    Returns:
        As environment.json has it, else the model's folder if it is still there; or None.
    """
    for environment in reversed(record.environments):
        if isinstance(environment.get("model_config"), dict):
            found = environment["model_config"]
            return found.get("text_config", found)
    with contextlib.suppress(OSError, ValueError):
        file = Path(record.run.config.model.path).expanduser() / "config.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        return found.get("text_config", found) if isinstance(found, dict) else None
    return None


def _flops(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Count the operations of each step.

    Args:
        record: of the run.

    Returns:
        What it needs, and what is done again where activations are recomputed; (num_rows,) float
        each, NaN where it is not known.
    """
    model, peft = model_config(record), record.run.config.peft
    tokens, supervised, keys = (
        _column(record.steps, key) for key in ("tokens", "supervised_tokens", "attended_keys")
    )
    nothing = np.full(len(tokens), np.nan)
    if model is None:
        return nothing, nothing

    def needed_by(tokens: int = 0, supervised: int = 0, keys: int = 0) -> float:
        found = step_flops(
            model, peft, tokens=tokens, supervised_tokens=supervised, attended_keys=keys
        )
        return math.nan if found is None else found

    def recomputed_by(tokens: int = 0, keys: int = 0) -> float:
        found = forward_flops(model, tokens=tokens, attended_keys=keys)
        return math.nan if found is None else found

    try:
        # both are sums of so much for each: a call for each step takes minutes of a long run
        return (
            needed_by(tokens=1) * tokens
            + needed_by(supervised=1) * supervised
            + needed_by(keys=1) * keys,
            recomputed_by(tokens=1) * tokens + recomputed_by(keys=1) * keys,
        )
    except (LookupError, TypeError, ValueError):  # a config.json that is not one
        return nothing, nothing


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([number(row, key) for row in rows], dtype=float)
