"""Metrics of a run: `metrics.jsonl` always, and the trackers that were asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lora_train.config import Config
from lora_train.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trackers(config: Config) -> None:
    """Refuse a tracker whose package is missing.

    Args:
        config: the run; `log.trackers` is read.

    Raises:
        UserError: `log.trackers` names a package that is not installed.
    """
    missing = [name for name in config.log.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"log.trackers: {', '.join(missing)} not installed",
            hint=f"pip install {' '.join(missing)}, or log.trackers=[tensorboard]",
        )


def keep_trackers_offline(run_directory: Path) -> None:
    """Point W&B, MLflow and Trackio at the run directory, unless the user's environment does."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_DIR", str(run_directory))
    os.environ.setdefault("MLFLOW_TRACKING_URI", (run_directory / "mlruns").absolute().as_uri())
    os.environ.setdefault("TRACKIO_DIR", str(run_directory / "trackio"))


class MetricsLog:
    """Appends one JSON object per line; on resume, lines after the checkpoint are taken back.

    Args:
        file: metrics.jsonl of the run.
        step: optimizer steps of the checkpoint; lines of later steps, and a line that a kill cut
            off, go.
        accelerator: logs to its trackers; None: the file only.
        write: whether this process writes the file.
    """

    def __init__(
        self, file: Path, *, step: int, accelerator: Accelerator | None = None, write: bool = True
    ) -> None:
        self._accelerator = accelerator
        self._file: TextIO | None = None
        kept = [row for row in read_metrics(file) if row["step"] <= step]
        self.validated = {row["step"] for row in kept if "val_loss" in row}
        if not write:
            return
        unfinished = file.with_name(f".{file.name}")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        unfinished.replace(file)
        self._file = file.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the values of one step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._accelerator is not None:
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, less a last line that was cut off in the middle."""
    rows: list[dict[str, Any]] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
