"""A shape of job that cannot work is refused by every task, with lines with which it works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster
from tiny_run import Run, expected_members, members

pytestmark = pytest.mark.slow

# what the message tells to replace: the job's lines on tasks and GPUs
_SHAPE = re.compile(r"--(nodes|ntasks|ntasks-per-node|gpus|gpus-per-\w+|gres)=")
_LINE = re.compile(r"^#SBATCH (--\S+)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "num_tasks"),
    [
        ("--ntasks=3 --gpus-per-node=2", 3),
        ("--ntasks=2 --gpus-per-task=2", 2),
        # a task on each node, and two GPUs on one, one on the other
        ("--nodes=2 --ntasks-per-node=1 --gpus=3", 2),
    ],
)
def test_refused_and_mended(
    options: str, num_tasks: int, cluster: Cluster, assets: Path, work: Path
) -> None:
    run = Run(assets, work)
    words = ["--constraint=a100", *options.split()]
    told = f"srun bash -c '{run.command}; echo \"exit status $?\"'"
    refused = cluster.finish(cluster.sbatch(told, work, *words)).output
    assert refused.count("exit status 2\n") == num_tasks, refused
    assert "error: " in refused
    assert not run.folder.exists()

    lines = list(dict.fromkeys(_LINE.findall(refused)))
    assert lines, refused
    shape = dict(line.split("=") for line in lines)
    num_ranks = int(shape["--nodes"]) * int(shape["--gpus-per-node"])
    kept = [word for word in words if not _SHAPE.match(word)]
    ended = cluster.finish(cluster.sbatch(f"srun {run.command}", work, *kept, *lines))
    assert ended.status == 0, f"{lines}: {ended.output}"
    assert members(ended.output) == expected_members(num_ranks), ended.output
