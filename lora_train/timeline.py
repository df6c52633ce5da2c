"""What a run's time goes into: `timeline.jsonl` in the run directory, for the report.

One line for each piece of time, of all starts of the run. Unlike metrics.jsonl, from which the
steps after a checkpoint are taken back when the run goes on from it, nothing is ever taken away
here: work that was lost shows as such.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from lora_train import exit_status
from lora_train.errors import LoraTrainError
from lora_train.job_usage import measure_usage
from lora_train.walltime import slurm_job

log = logging.getLogger(__name__)

FILE = "timeline.jsonl"
# what a kill takes from the record; a line is a hundred bytes
_SECONDS_BETWEEN_LINES = 30.0
# a validation without data, a checkpoint that is there already
_SHORTEST_SECONDS = 0.001
_USAGE_SECONDS = 2.0


class Timeline:
    """Appends a line for each piece of time, with `kind`, `begin` and `end` (seconds since 1970).

    It records nothing before `started`, which is for the main process alone; and it never fails a
    run: a line that cannot be written is one warning.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._has_failed = False
        # one clock for a whole start, which an adjustment of the system's does not move
        self._zero = time.time() - time.monotonic()
        self._begin: float | None = None
        self._num_steps = 0
        self.step = 0
        """Steps done, of the whole run."""

    @property
    def has_started(self) -> bool:
        """Whether it records."""
        return self._file is not None

    def started(
        self, folder: Path, step: int, *, seconds_left: float = math.inf, **facts: Any
    ) -> None:
        """Record a start that has loaded all and now goes on to train.

        Args:
            folder: the run directory.
            step: steps done before.
            seconds_left: until the job ends; infinite where no end is known.
            **facts: what the report is to know about this start.
        """
        self._file, self.step = folder / FILE, step
        self._mend()
        now = self._now()
        job_end = now + seconds_left if math.isfinite(seconds_left) else None
        self._write(
            "start", process_start(), now,
            job=slurm_job(), job_end=job_end, host=platform.node(), **facts,
        )  # fmt: skip

    def step_done(self, step: int, seconds: float) -> None:
        """Record a step; the lines hold several.

        Args:
            step: steps done.
            seconds: what it took, until now.
        """
        if self._begin is None:
            self._begin = self._now() - seconds
        self._num_steps += 1
        self.step = step
        if self._now() - self._begin >= _SECONDS_BETWEEN_LINES:
            self._flush()

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Record what the block takes, also when it fails.

        Args:
            kind: `validation`, `checkpoint` or `answers`.
        """
        self._flush()
        begin = self._now()
        try:
            yield
        finally:
            if self._now() - begin >= _SHORTEST_SECONDS:
                self._write(kind, begin, self._now())

    def ended(self, reason: str, error: BaseException | None = None) -> None:
        """Record the end of this start, and what its processes have used.

        Args:
            reason: as in restarts.json; `failed`.
            error: what it failed of.
        """
        if self._file is None:
            return
        self._flush()
        now = self._now()
        failure: dict[str, Any] = {}
        if isinstance(error, LoraTrainError):
            failure = {"message": error.message, "hint": error.hint, "status": error.exit_status}
        elif error is not None:
            failure = {"message": f"{type(error).__name__}: {error}", "status": exit_status.FAILED}
        self._write("end", now, now, reason=reason, usage=_usage(), **failure)

    def _flush(self) -> None:
        if self._begin is not None:
            self._write("steps", self._begin, self._now(), num_steps=self._num_steps)
        self._begin, self._num_steps = None, 0

    def _mend(self) -> None:
        """End a line that a kill has cut off, or the next would be lost with it."""
        assert self._file is not None
        with contextlib.suppress(OSError), self._file.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")

    def _now(self) -> float:
        return self._zero + time.monotonic()

    def _write(self, kind: str, begin: float, end: float, **more: Any) -> None:
        if self._file is None:
            return
        line = {"kind": kind, "begin": round(begin, 3), "end": round(end, 3), "step": self.step}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, **more}) + "\n")
        except OSError as error:
            if not self._has_failed:
                log.warning("cannot write %s: %s; the report will lack it", self._file, error)
            self._has_failed = True


def process_start() -> float:
    """When this run's process was started, or the one that started all processes of the run.

    Returns:
        Seconds since 1970.
    """
    # a sandbox may show neither the one nor the other
    for number in (os.environ.get("LORA_LAUNCHER", ""), os.getpid()):
        with contextlib.suppress(Exception):
            return float(psutil.Process(int(number)).create_time())
    return time.time()


def _usage() -> dict[str, Any] | None:
    """What the processes have used; None when the kernel does not answer at once."""
    found: list[dict[str, Any]] = []

    def measure() -> None:
        with contextlib.suppress(Exception):  # processes come and go
            found.append(measure_usage())

    # reading of a process that hangs may hang as well
    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(_USAGE_SECONDS)
    return found[0] if found else None
