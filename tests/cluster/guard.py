"""Ends a cluster when the tests that started it are gone, in whatever way: run as a program.

    guard.py FOLDER     reads standard input to its end, which is the tests' end, and cleans up

Imports nothing of ours: under PYTHONSAFEPATH a program does not see the files beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

CGROUPS = [Path("/sys/fs/cgroup") / name for name in ("freezer", "devices")]


def processes(variable: str) -> list[int]:
    """The processes that were started with this NAME=VALUE in their environment."""
    wanted, found = variable.encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill(variable: str) -> None:
    """SIGKILL to every such process, until there is none."""
    while pids := processes(variable):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _clean_up(folder: Path) -> None:
    # daemons, jobs and all they started have it
    kill(f"SLURM_CONF={folder}/slurm.conf")
    for cgroup in CGROUPS:
        deadline = time.monotonic() + 5  # the last of its processes leaves it a moment later
        while (cgroup / folder.name).exists() and time.monotonic() < deadline:
            for left, _, _ in os.walk(cgroup / folder.name, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(left)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()
    _clean_up(Path(sys.argv[1]))
