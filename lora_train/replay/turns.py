"""Several runs after each other in one job: each task of srun starts its part of the same run.

The main task says in files of a shared folder what the next run is; the others wait for that. Its
own child and theirs are then the ranks of one run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_train import exit_status
from lora_train.errors import RunError
from lora_train.replay.child_run import ChildEnd, run_child

_POLL_SECONDS = 0.2
# between two runs the main task only compares and copies
_PATIENCE_SECONDS = 600.0


def job_key() -> str | None:
    """Return what the tasks of this step of a Slurm job have in common; None: it is none."""
    step = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    # a job that is queued again has the same two, and the folder of before is no longer true
    return "-".join([*step, os.environ.get("SLURM_RESTART_COUNT") or "0"]) if all(step) else None


class Turns:
    """The main task's side.

    Args:
        folder: shared by all tasks.
        is_followed: whether there are other tasks.
    """

    def __init__(self, folder: Path, *, is_followed: bool) -> None:
        self._folder = folder
        self._is_followed = is_followed
        self._num_turns = 0

    def run(
        self, words: Sequence[str], log_file: Path, should_end: Callable[[], bool] = lambda: False
    ) -> ChildEnd:
        """Do one run, with all tasks; see `run_child`."""
        self._announce({"words": list(words)})
        return run_child(words, should_end=should_end, log_file=log_file)

    def end(self, status: int) -> None:
        """Let the other tasks end."""
        self._announce({"status": status})

    def _announce(self, turn: dict[str, object]) -> None:
        if not self._is_followed:
            return
        file = _file(self._folder, self._num_turns)
        unfinished = file.with_name(f".{file.name}")
        unfinished.write_text(json.dumps(turn), encoding="utf-8")
        unfinished.replace(file)
        self._num_turns += 1


def follow(folder: Path, log_file: Path) -> int:
    """Be one of the other tasks: take part in each run until the main task says that all is done.

    Args:
        folder: the shared folder, which the main task makes.
        log_file: gets the output of this task's runs.

    Returns:
        The exit status that the main task ends with.

    Raises:
        RunError: the main task is gone, or does not see the same folder.
    """
    number = 0
    while True:
        turn = _wait_for(_file(folder, number), is_first=number == 0)
        if turn is None:
            return exit_status.OK
        if "status" in turn:
            return int(turn["status"])
        end = run_child(turn["words"], log_file=log_file)
        if end.signal is not None:
            return end.status
        number += 1


def _file(folder: Path, number: int) -> Path:
    return folder / f"turn-{number:02d}.json"


def _wait_for(file: Path, *, is_first: bool) -> dict[str, Any] | None:
    """Read a turn once it is there; None: the folder is gone, as it goes when all is well."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        # listing makes network file systems look again, which remember that a file was missing
        try:
            os.listdir(file.parent)
        except FileNotFoundError:
            if not is_first:
                return None
        with contextlib.suppress(OSError):
            return dict(json.loads(file.read_text(encoding="utf-8")))
        time.sleep(_POLL_SECONDS)
    raise RunError(
        f"the main task has not said within {_PATIENCE_SECONDS / 60:.0f} minutes how to go on "
        f"({file})",
        hint="log.log_dir=FOLDER must be one that all nodes share; task 0 says what went wrong",
    )
