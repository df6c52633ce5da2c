"""What a run writes down of its time and its use of the node."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_train.errors import RunError
from lora_train.job_usage import measure_usage
from lora_train.timeline import Timeline


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def test_a_timeline(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.started(tmp_path, 10, seconds_left=3600.0, max_steps=20)
    for step in (11, 12, 13):
        timeline.step_done(step, 0.5)
    with timeline.phase("checkpoint"):
        subprocess.run(["sleep", "0.01"], check=True)
    timeline.step_done(14, 0.5)
    timeline.ended("SIGTERM")
    start, steps, checkpoint, more, end = lines(tmp_path)
    assert start["kind"] == "start" and start["step"] == 10 and start["max_steps"] == 20
    assert start["begin"] < start["end"]
    assert start["job_end"] == pytest.approx(start["end"] + 3600, abs=1)
    assert (steps["kind"], steps["step"], steps["num_steps"]) == ("steps", 13, 3)
    assert (checkpoint["kind"], checkpoint["step"]) == ("checkpoint", 13)
    assert steps["end"] <= checkpoint["begin"] < checkpoint["end"]
    assert (more["step"], more["num_steps"]) == (14, 1)
    assert end["reason"] == "SIGTERM" and end["usage"]["peak_rss_bytes"] > 10 << 20


def test_a_failure_is_recorded_with_its_hint(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.started(tmp_path, 0)
    timeline.ended("failed", RunError("loss nan", hint="a lower optim.lr"))
    end = lines(tmp_path)[-1]
    assert (end["message"], end["hint"], end["status"]) == ("loss nan", "a lower optim.lr", 1)


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "timeline.jsonl").write_text('{"kind": "start"}\n{"kind": "ste')
    Timeline().started(tmp_path, 5)
    text = (tmp_path / "timeline.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["step"] == 5 and text.count("\n") == 3


def test_nothing_is_recorded_before_the_start(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.step_done(1, 0.1)
    with timeline.phase("validation"):
        pass
    timeline.ended("complete")
    assert not timeline.has_started and list(tmp_path.iterdir()) == []


def test_a_line_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    handler = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("lora_train.timeline")
    logger.addHandler(handler)
    try:
        timeline = Timeline()
        timeline.started(tmp_path, 0)
        (tmp_path / "timeline.jsonl").unlink()
        (tmp_path / "timeline.jsonl").mkdir()
        for _ in range(3):
            with timeline.phase("checkpoint"):
                subprocess.run(["sleep", "0.01"], check=True)
        timeline.ended("complete")
    finally:
        logger.removeHandler(handler)
    (record,) = handler.buffer
    assert record.levelname == "WARNING" and "timeline.jsonl" in record.getMessage()


def fake_process(proc: Path, number: int, job: str, peak_kib: int) -> None:
    """A process as the kernel shows it."""
    folder = proc / str(number)
    folder.mkdir(parents=True)
    (folder / "environ").write_bytes(b"HOME=/root\0SLURM_JOB_ID=" + job.encode() + b"\0")
    (folder / "status").write_text(f"Name:\tpython\nVmHWM:\t {peak_kib} kB\nVmRSS:\t 1 kB\n")


def test_usage_of_a_job(tmp_path: Path) -> None:
    """Its processes are those with its number, whoever started them; and Slurm's cgroup."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    other = subprocess.Popen(["sleep", "60"])
    try:
        fake_process(proc, os.getpid(), "47", 1000)
        fake_process(proc, other.pid, "47", 500)
        fake_process(proc, 1, "471", 9_000_000)
        (proc / "self").mkdir()
        (proc / "self/cgroup").write_text("0::/system.slice/slurmstepd.scope/job_47/step_0/user\n")
        folder = cgroup / "system.slice/slurmstepd.scope/job_47"
        folder.mkdir(parents=True)
        (folder / "memory.peak").write_text("123456789\n")
        usage = measure_usage({"SLURM_JOB_ID": "47"}, proc, cgroup)
    finally:
        other.kill()
        other.wait()
    assert usage["num_processes"] == 2
    assert usage["peak_rss_bytes"] == 1500 * 1024
    assert usage["cgroup_peak_bytes"] == 123456789
    assert usage["cpu_seconds"] > 0.1


def test_cgroups_of_the_first_kind(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(
        "4:cpu:/slurm/uid_0/job_9/step_0\n3:memory:/slurm/uid_0/job_9/step_0/task_0\n"
    )
    folder = tmp_path / "cgroup/memory/slurm/uid_0/job_9"
    folder.mkdir(parents=True)
    (folder / "memory.max_usage_in_bytes").write_text("77\n")
    usage = measure_usage({"SLURM_JOB_ID": "9"}, tmp_path / "proc", tmp_path / "cgroup")
    assert usage["cgroup_peak_bytes"] == 77


def test_the_real_peak_of_this_process_and_its_children() -> None:
    """A child that holds 200 MiB counts, also when it has given them back."""
    code = "x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096]); del x; print(flush=True)"
    before = measure_usage({})
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdin is not None
    child.stdout.readline()
    usage = measure_usage({})
    child.communicate(b"\n")
    assert usage["num_processes"] == before["num_processes"] + 1
    assert usage["peak_rss_bytes"] - before["peak_rss_bytes"] > 200 << 20
