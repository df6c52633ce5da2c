"""When the Slurm job ends, and whether the run must save now to be done before that.

The end comes from SLURM_JOB_END_TIME (Slurm 23.02 and newer; our batch scripts export it for older
ones), or from squeue where that is at hand. Steps and saves are measured as they go by.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta

log = logging.getLogger(__name__)

# Slurm looks at the limit every 30 s and grants KillWait, 30 s by default, between SIGTERM and
# SIGKILL. Both come after the end, and sites change them: nothing here counts on either. After the
# save the other ranks end, the container shuts down, the batch script asks for a requeue, and the
# clocks of two nodes need not agree.
_MARGIN_SECONDS = 60.0
# until one is measured; a checkpoint is an adapter with its optimizer, seconds on a quiet disk
_FIRST_SAVE_SECONDS = 60.0
_START_SECONDS = 60.0
_NUM_RECENT_STEPS = 20
# a job without a limit ends a year after its start, as Slurm tells it
_UNLIMITED_SECONDS = 300 * 24 * 3600
_NO_END = ("0", "none", "unknown", "n/a", "unlimited", "invalid")
_SQUEUE_SECONDS = 5


def slurm_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name this Slurm job as squeue and scontrol take it.

    Args:
        environment: variables of the process.

    Returns:
        A number, ARRAY_TASK for the array's last task; None outside of a job.
    """
    job = environment.get("SLURM_JOB_ID") or None
    # The last task of an array has the array's own number, by which Slurm would requeue all tasks.
    # Any other task, and a job that inherited an array's variables from the one that submitted it,
    # has a number that means it alone.
    if job is not None and environment.get("SLURM_ARRAY_JOB_ID") == job:
        return f"{job}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return job


def job_end(
    environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.time
) -> float | None:
    """Find out when this Slurm job ends; for the main process alone, as it may ask Slurm.

    A limit that an administrator changes later is not seen: an extended job saves and stops at its
    first end.

    Args:
        environment: variables of the process.
        clock: the time in seconds since 1970.

    Returns:
        Seconds since 1970; None outside of a job, without a limit, or when nothing tells.
    """
    job = slurm_job(environment)
    if job is None:
        return None
    told, source = environment.get("SLURM_JOB_END_TIME", "").strip(), "SLURM_JOB_END_TIME"
    if not told:
        told, source = _ask_squeue(job, environment), "squeue"
    if not told:
        is_array = "SLURM_ARRAY_JOB_ID" in environment
        log.info(
            "nothing tells here when this job ends: the run saves and stops on Slurm's SIGTERM. "
            "In the batch script, before srun: export SLURM_JOB_END_TIME="
            "$(SLURM_TIME_FORMAT=%%s squeue -h -j %s -o %%e)",
            "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if is_array else "$SLURM_JOB_ID",
        )
        return None
    if told.lower() in _NO_END:
        return None
    try:
        end = int(told)
    except ValueError:
        log.warning(
            "%s says that this job ends at %r, which is no number of seconds since 1970: ignored, "
            "the run saves and stops on Slurm's SIGTERM",
            source,
            told,
        )
        return None
    left = end - clock()
    if left <= 0:
        log.warning(
            "%s says that this job ended %s ago (another job's value?): ignored, the run saves "
            "and stops on Slurm's SIGTERM",
            source,
            _duration(-left),
        )
        return None
    return end if left < _UNLIMITED_SECONDS else None


def _ask_squeue(job: str, environment: Mapping[str, str]) -> str:
    """What squeue says about the job's end; empty when there is no squeue or no answer."""
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%e"],
            # %s: seconds since 1970, whatever this process's time zone is
            env={**environment, "SLURM_TIME_FORMAT": "%s"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no answer from squeue: %s", error)
        return ""
    return answer.stdout.strip()


class Walltime:
    """Decides when the run must save and stop, from the job's end and the durations so far.

    Args:
        end: end of the job in seconds since 1970. None: not known, and nothing is ever due; so
            on all processes but the main one, which decides for them.
        clock: the time in seconds since 1970.
    """

    def __init__(self, end: float | None, *, clock: Callable[[], float] = time.time) -> None:
        self._end = end
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=_NUM_RECENT_STEPS)
        self._num_steps = 0
        self._slowest_save: float | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the job ends, negative after it; infinite when no end is known."""
        return math.inf if self._end is None else self._end - self._clock()

    def step_done(self, seconds: float) -> None:
        """Take down what a step took."""
        if self._num_steps == 1:
            self._steps.clear()  # the first one of a process compiles kernels and fills caches
        self._num_steps += 1
        self._steps.append(seconds)

    def save_done(self, seconds: float) -> None:
        """Take down what writing a checkpoint took."""
        self._slowest_save = max(seconds, self._slowest_save or 0.0)

    def is_due(self, next_seconds: float | None = None) -> bool:
        """Tell whether what comes next, a save after it and the margin no longer fit.

        Before the first step of this process no step is due to be left out: to stop there would be
        a start for nothing, and Slurm's SIGTERM still comes.

        Args:
            next_seconds: what the next piece of work takes, of which the slowest so far is a good
                guess (a batch of answers). None: as long as the slowest of the recent steps. That
                is for steps, and for batches of a validation: when no step fits any more, the run
                is over anyway.

        Returns:
            Whether to save and stop now.
        """
        if next_seconds is None:
            if not self._steps:
                return False
            next_seconds = max(self._steps)
        return self.seconds_left < next_seconds + self._save_seconds + _MARGIN_SECONDS

    def log_start(self) -> None:
        """Say once, at the start of the run, when the job ends, and whether that is too soon."""
        if self._end is None:
            return
        log.info(
            "this job ends at %s (in %s); the run will save and stop in time",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(self._end)),
            _duration(self.seconds_left),
        )
        needed = _START_SECONDS + self._save_seconds + _MARGIN_SECONDS
        if self.seconds_left < needed:
            log.warning(
                "this job has %s left; the start, one step and a checkpoint need more than %s, so "
                "it may end with nothing kept. sbatch --time=1:00:00 asks for an hour",
                _duration(self.seconds_left),
                _duration(needed),
            )

    def describe_stop(self) -> str:
        """Why the run stops now, for the log; after `is_due`."""
        step = _duration(max(self._steps)) if self._steps else "not known"
        return (
            f"this job ends in {_duration(self.seconds_left)}: saving and stopping in time "
            f"(slowest recent step {step}, checkpoint {_duration(self._save_seconds)}, "
            f"margin {_duration(_MARGIN_SECONDS)})"
        )

    @property
    def _save_seconds(self) -> float:
        return _FIRST_SAVE_SECONDS if self._slowest_save is None else self._slowest_save


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0.0))))
