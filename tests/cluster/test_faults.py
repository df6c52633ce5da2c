"""A fault on one rank ends all of them with its name and host; the same command then goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from cluster import Cluster, Job
from guard import processes
from tiny_run import LONG, Run, assert_same

pytestmark = pytest.mark.slow

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--nodelist=a100-[1-2]")
ONE_NODE = ("--ntasks-per-node=2", "--gpus-per-node=2", "--nodelist=a100-1")
ONE_TASK = ("--ntasks-per-node=1", "--gpus-per-node=2", "--nodelist=a100-1")


def signal_rank(job: Job, variable: str, number: signal.Signals) -> None:
    """Send a signal to the lora-train that has this NAME=VALUE."""
    [pid] = [
        pid
        for pid in set(processes(f"SLURM_JOB_ID={job.number}")) & set(processes(variable))
        if any(
            word.endswith(b"/lora-train")
            for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        )
    ]
    os.kill(pid, number)


def submit(
    cluster: Cluster, run: Run, options: tuple[str, ...] = TWO_NODES, srun: str = "srun"
) -> Job:
    """A job that says how each of its tasks ended."""
    script = f"{srun} bash -c '{run.command}; echo \"task $SLURM_PROCID: status $?\"; exit 1'"
    return cluster.sbatch(script, run.work, *options)


def statuses(output: str) -> list[int]:
    """How the tasks ended, in the order of their numbers."""
    return [int(status) for _, status in sorted(re.findall(r"task (\d): status (\d+)", output))]


def assert_goes_on(
    cluster: Cluster, run: Run, uninterrupted: Run, options: tuple[str, ...] = TWO_NODES
) -> None:
    """The same command, given again, ends with what a run without the fault has."""
    ended = cluster.finish(cluster.sbatch(f"srun {run.command}", run.work, *options))
    assert ended.status == 0, ended.output
    assert "skipping broken checkpoint" not in ended.output
    assert_same(run, uninterrupted)


def test_a_killed_rank(cluster: Cluster, assets: Path, work: Path, uninterrupted: Run) -> None:
    """The first, which holds what the others talk to."""
    run = Run(assets, work, **LONG)
    job = submit(cluster, run)
    cluster.wait_during(job, lambda: run.reached(12))
    signal_rank(job, "SLURM_PROCID=0", signal.SIGKILL)
    output = cluster.finish(job).output
    assert statuses(output) == [137, 1], output
    assert "rank 0 on a100-1" in output
    assert_goes_on(cluster, run, uninterrupted)


def test_a_killed_rank_of_our_own_start(
    cluster: Cluster, assets: Path, work: Path, uninterrupted: Run
) -> None:
    run = Run(assets, work, **LONG)
    job = submit(cluster, run, ONE_TASK)
    cluster.wait_during(job, lambda: run.reached(12))
    signal_rank(job, "RANK=1", signal.SIGKILL)
    output = cluster.finish(job).output
    assert statuses(output) == [1], output
    assert "rank 1 on a100-1 was killed by SIGKILL" in output
    assert_goes_on(cluster, run, uninterrupted, ONE_TASK)


def test_a_rank_that_hangs(cluster: Cluster, assets: Path, work: Path, uninterrupted: Run) -> None:
    run = Run(assets, work, **LONG)
    job = submit(
        cluster, run, srun="srun --kill-on-bad-exit=1 --export=ALL,LORA_SILENCE_SECONDS=15"
    )
    cluster.wait_during(job, lambda: run.reached(12))
    signal_rank(job, "SLURM_PROCID=1", signal.SIGSTOP)
    ended = cluster.finish(job)
    assert ended.status != 0
    assert statuses(ended.output)[0] == 1, ended.output
    assert "rank 1 on a100-2: has given no sign of life" in ended.output
    assert_goes_on(cluster, run, uninterrupted)


def test_a_full_disk(cluster: Cluster, assets: Path, work: Path, uninterrupted: Run) -> None:
    """It is rank 0 that writes, and all that end."""
    run = Run(assets, work, **LONG)
    disk = work / "runs"
    disk.mkdir()
    with cluster.mounted("a100-1", disk, "size=64m,mode=777") as seen:
        there = Run(assets, work, **LONG, seen=seen)
        job = submit(cluster, run, ONE_NODE)
        cluster.wait_during(job, lambda: there.reached(12))
        with pytest.raises(OSError), (seen / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 16))
        output = cluster.finish(job).output
        assert statuses(output) == [1, 1], output
        assert "error: rank 0 on a100-1: No space left on device: runs/tiny" in output, output
        assert "rank 1 on a100-1 ends, because rank 0 has failed" in output
        (seen / "filler").unlink()
        assert_goes_on(cluster, there, uninterrupted, ONE_NODE)


def test_a_checkpoint_that_one_node_does_not_see(
    cluster: Cluster, assets: Path, work: Path, uninterrupted: Run
) -> None:
    run = Run(assets, work, **LONG)
    job = cluster.sbatch(f"srun {run.command}", work, *TWO_NODES)
    cluster.wait_during(job, lambda: run.reached(12))
    cluster.root("scancel", "--signal=TERM", job.number)
    assert cluster.finish(job).status == 75
    with cluster.mounted("a100-2", run.folder / "checkpoints", "size=1m"):
        output = cluster.finish(submit(cluster, run)).output
    assert all(statuses(output)) and len(statuses(output)) == 2, output
    assert "rank 1 on a100-2: " in output
    assert_goes_on(cluster, run, uninterrupted)


def test_a_model_that_one_node_does_not_see(cluster: Cluster, assets: Path, work: Path) -> None:
    run = Run(assets, work)
    with cluster.mounted("a100-2", assets, "size=1m"):
        output = cluster.finish(submit(cluster, run)).output
    assert statuses(output) == [2, 2], output
    assert "a100-2" in output and f"{assets}/model" in output
    assert not run.folder.exists()
