"""The report that a run writes when it ends, in a process of its own: it cannot fail the run."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from lora_train.errors import RunError, UserError
from lora_train.run_directory import RunDirectory

log = logging.getLogger(__name__)

# a page takes 2 s, and more where the libraries come from a slow disk
_SECONDS = 30.0
# the job may be at its end: Slurm grants 30 s between SIGTERM and SIGKILL
_SECONDS_OF_STOPPED = 10.0


class EndOfRun:
    """Records how a run ends and has its report written; for the main process.

    It does nothing until `directory` is set, and with LORA_REPORT=off it writes no report.
    """

    def __init__(self) -> None:
        self.directory: RunDirectory | None = None

    def failed(self, error: BaseException) -> None:
        """Record a failure, and report; a run that was refused leaves its directory as it was.

        Args:
            error: what ended the run.
        """
        with _nothing_matters():
            if self.directory is not None and self._record(self.directory, error):
                self._write(_SECONDS_OF_STOPPED)

    def failed_elsewhere(self, end: dict[str, Any]) -> None:
        """Record the failure of another process, and report.

        Args:
            end: what the watch tells of it: host, rank, message, hint and status.
        """
        error = RunError(f"rank {end['rank']} on {end['host']}: {end['message']}", hint=end["hint"])
        error.exit_status = end["status"]
        self.failed(error)

    def ended(self, *, is_complete: bool) -> None:
        """Report on a run that did not fail, on stderr too.

        Args:
            is_complete: whether the last step is done; else it was stopped.
        """
        with _nothing_matters():
            text = self._write(_SECONDS if is_complete else _SECONDS_OF_STOPPED)
            print(text, end="", file=sys.stderr, flush=True)

    @staticmethod
    def _record(directory: RunDirectory, error: BaseException) -> bool:
        """Record a failure; tell whether it is worth a report."""
        timeline = directory.timeline
        if not timeline.has_started:
            is_refusal = isinstance(error, UserError | KeyboardInterrupt)
            if is_refusal or not (directory.path / "config.yaml").is_file():
                return False
            step = 0 if directory.checkpoint is None else directory.checkpoint.step
            timeline.started(directory.path, step)
        if isinstance(error, KeyboardInterrupt):  # for the second time: who is in such a hurry
            timeline.ended("interrupted")
            return False
        timeline.ended("failed", error)
        return True

    def _write(self, seconds: float) -> str:
        """Write the report; return what a terminal shows of it, empty when there is none."""
        is_off = os.environ.get("LORA_REPORT", "").lower() in ("off", "0", "no", "false")
        if self.directory is None or is_off or not self.directory.timeline.has_started:
            return ""
        path = str(self.directory.path)
        width = min(100, shutil.get_terminal_size().columns)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_train", "report", path],
            env=os.environ | {"COLUMNS": str(width), "PYTHONIOENCODING": _encoding()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a signal that comes now is for the run
            process_group=0,
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            # and no wait: what waits for a hung file system cannot be ended
            process.kill()
            problem = "stopped"
            if isinstance(error, subprocess.TimeoutExpired):
                problem = f"not done in {seconds:.0f} s"
            elif not isinstance(error, KeyboardInterrupt):
                raise
        else:
            if process.returncode == 0:
                return output.decode(_encoding(), "replace")
            lines = errors.decode(_encoding(), "replace").strip().splitlines()
            # ours is `error: ...`; the last line of a traceback says as much
            lines += [f"status {process.returncode}"] if not lines else []
            problem = next((line for line in lines if line.startswith("error: ")), lines[-1])
        log.warning("no report: %s (`lora-train report %s` writes it)", problem, shlex.quote(path))
        return ""


@contextlib.contextmanager
def _nothing_matters() -> Iterator[None]:
    """Keep what goes wrong here from changing how the run ends: it is one warning."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(Exception):  # the terminal itself may be gone
            log.warning("no report: %s: %s", type(error).__name__, error)


def _encoding() -> str:
    """Of stderr, where the text is shown."""
    return getattr(sys.stderr, "encoding", None) or "utf-8"
