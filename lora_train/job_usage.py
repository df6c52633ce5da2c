"""What the processes of a run have used of this node: host memory and CPU time, for the report."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


def measure_usage(
    environment: Mapping[str, str] = os.environ, proc: Path = _PROC, cgroup: Path = _CGROUP
) -> dict[str, Any]:
    """Measure what the processes of this job, or of this run, have used on this node so far.

    Args:
        environment: variables of the process.
        proc: where the kernel tells about processes.
        cgroup: where the kernel tells about cgroups.

    Returns:
        num_processes; peak_rss_bytes: the sum of each process's own peak, which is at least their
        common peak; cpu_seconds: of them and of those that have ended; cgroup_peak_bytes: what
        Slurm's cgroup saw, files in memory included, or None.
    """
    peak, cpu, count = 0, 0.0, 0
    for process in _processes(environment, proc):
        with contextlib.suppress(OSError, psutil.Error):
            found = _PEAK.search((proc / str(process) / "status").read_text())
            times = psutil.Process(process).cpu_times()
            cpu += times.user + times.system + times.children_user + times.children_system
            peak += int(found[1]) << 10 if found else 0
            count += 1
    return {
        "num_processes": count,
        "peak_rss_bytes": peak,
        "cpu_seconds": round(cpu, 1),
        "cgroup_peak_bytes": _cgroup_peak(environment, proc, cgroup),
    }


def _processes(environment: Mapping[str, str], proc: Path) -> Iterator[int]:
    """Yield the processes that carry this job's, or this launcher's, number in their variables."""
    for name in ("SLURM_JOB_ID", "LORA_LAUNCHER"):
        if environment.get(name):
            mark = f"{name}={environment[name]}".encode()
            break
    else:
        this = psutil.Process()
        yield this.pid
        yield from (child.pid for child in this.children(recursive=True))
        return
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # another user's, or it has ended
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def _cgroup_peak(environment: Mapping[str, str], proc: Path, cgroup: Path) -> int | None:
    """The most memory that the job's cgroup held, in bytes; None where the kernel does not say."""
    if not environment.get("SLURM_JOB_ID"):
        return None
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            is_v1 = "memory" in controllers.split(",")
            if controllers and not is_v1:
                continue
            parts = Path(path).parts[1:]
            job = next((n for n, part in enumerate(parts) if part.startswith("job_")), None)
            if job is None:
                continue
            folder = cgroup.joinpath(*(["memory"] if is_v1 else []), *parts[: job + 1])
            file = folder / ("memory.max_usage_in_bytes" if is_v1 else "memory.peak")
            return int(file.read_text())
    return None
