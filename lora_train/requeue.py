"""The Slurm job queued again when its time is up, and what every start of the run came to.

`restarts.json` in the run directory holds one entry per start. A run that does no step in two
starts of a job does not ask again: it would wait in the queue and repeat that, for ever.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from lora_train import exit_status
from lora_train.walltime import slurm_job

if TYPE_CHECKING:
    from lora_train.run_directory import RunDirectory

log = logging.getLogger(__name__)

TIME_LIMIT = "time limit"
"""Why a run ended that saw its job's end coming; else it is the name of a signal."""

_FILE = "restarts.json"
_SCONTROL_SECONDS = 20
_SHOWN = re.compile(r"^\s*JobState=(?P<state>\w+) Reason=(?P<reason>\w+)", re.MULTILINE)
_PREEMPTED = re.compile(r"\bPreemptTime=\d")


@dataclass
class Start:
    """One start of the run, as restarts.json keeps it."""

    job: str | None
    restart_count: int
    """SLURM_RESTART_COUNT: how often Slurm has queued this job again."""
    host: str
    started: str
    first_step: int
    last_step: int | None = None
    """None until the end of the run, or until the next start sees how far this one came."""
    reason: str | None = None
    requeued: bool = False
    """Whether it asked for its job to be queued again."""


_STARTS = TypeAdapter(list[Start])


class Restarts:
    """The starts of a run; for the main process alone.

    Args:
        directory: the run directory.
        environment: variables of the process.
    """

    def __init__(
        self, directory: RunDirectory, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._directory = directory
        self._environment = environment
        self._starts: list[Start] = []
        try:
            self._starts = _STARTS.validate_python(directory.read_json(_FILE) or [])
        except (OSError, ValueError) as error:
            log.warning(
                "%s cannot be read, the record of the run's starts begins anew: %s",
                directory.path / _FILE,
                str(error).splitlines()[0],
            )

    @property
    def num_restarts(self) -> int:
        """How often the run was started after its first start."""
        return max(0, len(self._starts) - 1)

    def started(self, step: int) -> None:
        """Record this start; after `RunDirectory.record_start`, which makes it a run directory.

        Args:
            step: steps done before it, which is the step of the newest checkpoint.
        """
        if self._starts and self._starts[-1].last_step is None:
            self._starts[-1].last_step = step
            self._starts[-1].reason = "failed or killed"
        count = self._environment.get("SLURM_RESTART_COUNT", "")
        self._starts.append(
            Start(
                job=slurm_job(self._environment),
                restart_count=int(count) if count.isdecimal() else 0,
                host=platform.node(),
                started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                first_step=step,
            )
        )
        self._write()

    def may_requeue(self, step: int, reason: str) -> tuple[bool, str]:
        """Tell whether this job may ask to be queued again.

        A finished or failed run does not ask; a stopped one does, unless a person stopped it or it
        gets nowhere.

        Args:
            step: steps done now, and saved.
            reason: `TIME_LIMIT`, or the name of the signal that stopped the run.

        Returns:
            Whether, and why or why not, for the log.
        """
        if reason == signal.SIGINT.name:
            return False, "not queued again after Ctrl-C"
        this, before = self._starts[-1], self._starts[-2] if self.num_restarts else None
        if step > this.first_step:
            return True, f"{step - this.first_step} steps done in this start"
        # another job is another try, of a person who may have changed something
        if before is None or before.job != this.job or _made_progress(before):
            return True, "no step done in this start; a second one without a step would be the last"
        return False, (
            f"not queued again: two starts in a row of job {this.job} did no step after step "
            f"{step}, and another would do the same; "
            "what helps: a longer --time in the batch script, eval.num_generate=0 or "
            "trainer.limit_val_batches=10 for less work beside the steps, "
            "log.ckpt.every_n_train_steps=10 where the job was killed between two checkpoints"
        )

    def ended(self, step: int, reason: str, requeued: bool) -> None:
        """Record how this start ended.

        Args:
            step: steps done and saved.
            reason: why it ended.
            requeued: whether it asks for its job to be queued again.
        """
        this = self._starts[-1]
        this.last_step, this.reason, this.requeued = step, reason, requeued
        self._write()

    def _write(self) -> None:
        try:
            self._directory.write_json(_FILE, [asdict(start) for start in self._starts])
        except OSError as error:
            log.warning("cannot write %s: %s", self._directory.path / _FILE, error.strerror)


def _made_progress(start: Start) -> bool:
    return start.last_step is not None and start.last_step > start.first_step


def job_to_requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Find the job that resume.requeue=true would queue again; warn outside of one.

    Args:
        environment: variables of the process.

    Returns:
        The job for `request_requeue`; None outside of a job.
    """
    job = slurm_job(environment)
    if job is None:
        log.warning("resume.requeue=true has no effect here: this is no Slurm job")
    return job


def request_requeue(job: str) -> int:
    """Have Slurm queue this job again, or leave that to the batch script.

    The very last thing of a run, on the main process, with all files closed: where it works, Slurm
    ends the job at once.

    Args:
        job: what `job_to_requeue` found.

    Returns:
        The exit status to end with. REQUEUE: not possible here, as in a container without
        scontrol; the batch script does it. STOPPED: nothing is left to do.
    """
    if (shown := _show(job)) is None:
        return exit_status.REQUEUE
    if _is_cancelled(shown):
        log.warning("job %s was cancelled, or Slurm queues it again by itself: not asked for", job)
        return exit_status.STOPPED
    log.info("asking Slurm to queue job %s again", job)
    return exit_status.REQUEUE if _scontrol("requeue", job) is None else exit_status.STOPPED


def stays_ended(job: str) -> bool:
    """Tell whether Slurm is ending this job for good; before all processes agree on their end.

    Args:
        job: what `job_to_requeue` found.

    Returns:
        Whether; False where Slurm cannot be asked.
    """
    shown = _show(job)
    return shown is not None and _is_cancelled(shown)


def _is_cancelled(shown: str) -> bool:
    """Tell what `scontrol show job` says of a job that is being ended.

    scancel sends its SIGTERM to the tasks like the time limit and preemption do, and Slurm (22.05,
    tried) does queue a cancelled job again when asked: nobody could stop a run with it. A job that
    is being ended shows as COMPLETING, with Reason=TimeLimit or a PreemptTime where it was not a
    person. A preempted job in its grace time, and one that stops by itself, is RUNNING.
    """
    state = _SHOWN.search(shown)
    assert state is not None
    is_ending = state["state"] in ("COMPLETING", "CANCELLED")
    return is_ending and state["reason"] != "TimeLimit" and _PREEMPTED.search(shown) is None


def _show(job: str) -> str | None:
    """What Slurm says about a job; None where there is no scontrol, or it says nothing we know."""
    shown = _scontrol("show", "job", job)
    return shown if shown is not None and _SHOWN.search(shown) else None


def _scontrol(*words: str) -> str | None:
    """What scontrol answers; None when there is none or it refuses, which is a warning."""
    try:
        answer = subprocess.run(
            ["scontrol", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
        )
    except FileNotFoundError:
        return None
    except subprocess.CalledProcessError as error:
        # --no-requeue jobs and sites that forbid it, interactive jobs: only the reason is news
        log.warning("scontrol %s: %s", " ".join(words), error.stderr.strip())
        return None
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("scontrol %s: %s", " ".join(words), error)
        return None
    return answer.stdout
