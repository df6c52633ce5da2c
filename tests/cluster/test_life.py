"""A job that is stopped, queued again or loses a node goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from slurm_configuration import REPOSITORY
from tiny_run import LONG, Run, assert_same

pytestmark = pytest.mark.slow

TWO = ("--ntasks-per-node=2", "--gpus-per-node=2", "--constraint=a100")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--nodelist=a100-[1-2]")


@pytest.mark.parametrize(
    ("signal", "options"),
    [
        # the job ends with it
        ((), TWO),
        # what `sbatch --signal=USR1@60` sends
        (("--signal=USR1",), TWO),
        # one task, which starts the ranks and passes the signal on
        (("--signal=TERM",), ("--gpus-per-node=2", "--constraint=a100")),
    ],
    ids=["scancel", "USR1", "TERM to our own start"],
)
def test_signal_stops_with_a_checkpoint_and_the_same_line_goes_on(
    signal: tuple[str, ...], options: tuple[str, ...], cluster: Cluster, assets: Path, work: Path,
    uninterrupted: Run,
) -> None:  # fmt: skip
    # a cancelled job must not come back
    more = () if signal else ("resume.requeue=true",)
    run = Run(assets, work, **LONG, more=more)
    job = cluster.sbatch(f"srun {run.command}", work, *options)
    cluster.wait_during(job, lambda: run.reached(3))
    cluster.root("scancel", *signal, job.number)
    ended = cluster.finish(job)
    assert ended.state == ("FAILED" if signal else "CANCELLED"), ended.output
    assert ended.status == 75 or not signal, ended.output
    assert not (run.folder / "adapter").exists()
    checkpoint = run.checkpoints[-1].name
    assert checkpoint == f"step-{run.steps[-1]['step']:06d}"

    ended = cluster.finish(cluster.sbatch(f"srun {run.command}", work, *options))
    assert ended.status == 0, ended.output
    assert f"going on from runs/tiny/checkpoints/{checkpoint}" in ended.output
    assert_same(run, uninterrupted)


# stands in for a container: without scontrol, and with squeue nothing can be asked either
CONTAINER = """#!/bin/bash
while [ "$1" != lora.sif ]; do shift; done
shift
PATH={programs} exec {programs}/lora-train "$@"
"""
BARE = """#!/bin/bash
#SBATCH --requeue
srun lora-train "$@"
"""


@pytest.mark.parametrize("is_container", [True, False], ids=["container", "no container"])
def test_the_end_of_the_jobs_time(
    is_container: bool, cluster: Cluster, assets: Path, work: Path, uninterrupted: Run
) -> None:
    """The run stops before; the script queues the job again where lora-train itself cannot."""
    run = Run(assets, work, **LONG, more=("resume.requeue=true",))
    script = work / "job.slurm"
    script.write_text(BARE)
    if is_container:
        shutil.copy(REPOSITORY / "slurm/single_gpu.slurm", script)
        singularity = work / "singularity"
        singularity.write_text(CONTAINER.format(programs=Path(sys.executable).parent))
        singularity.chmod(0o755)
        (work / "lora.sif").touch()
    # two minutes: a step and a checkpoint just do not fit before what lora-train keeps free
    options = ["--time=2", "--signal=TERM@10", "--gpus-per-node=2", "--constraint=a100"]
    job = cluster.submit(script, run.words, *options, PATH=f"{work}:{cluster.path}")
    wait_until(lambda: cluster.told(job, "Restarts") == "1", job)
    cluster.root("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    ended = cluster.finish(job)
    assert ended.state == "COMPLETED", ended.output
    assert ("exit status 85" in ended.output) == is_container
    assert "saving and stopping in time" in ended.output
    assert ended.output.count("going on from runs/tiny/checkpoints/") == 1, ended.output
    assert_same(run, uninterrupted)


def test_a_node_that_goes_down(
    cluster: Cluster, assets: Path, work: Path, uninterrupted: Run
) -> None:
    run = Run(assets, work, **LONG)
    job = cluster.sbatch(f"srun {run.command}", work, *TWO_NODES, "--no-requeue")
    cluster.wait_during(job, lambda: run.reached(12))
    cluster.kill_node("a100-2")
    try:
        wait_until(lambda: "error: rank 1 on a100-2: " in job.output, job, 60)
        # srun waits for a node until Slurm takes it for down
        ended = cluster.finish(job)
    finally:
        cluster.start_node("a100-2")
        cluster.wait_for_nodes()
    assert ended.status != 0
    assert "the same command goes on from the newest checkpoint" in ended.output
    assert "--exclude=a100-2" in ended.output
    assert run.checkpoints

    ended = cluster.finish(cluster.sbatch(f"srun {run.command}", work, *TWO_NODES))
    assert ended.status == 0, ended.output
    assert_same(run, uninterrupted)
