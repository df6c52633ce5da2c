"""Every shape of job that works trains the same: as many ranks as it has GPUs, the same losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, Job
from tiny_run import Run, expected_members, members

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Shape:
    """How a job asks for tasks and GPUs and starts the run, and the ranks that it has to have."""

    options: str
    num_ranks: int = 2
    start: str = "srun"


SHAPES = [
    Shape("--ntasks-per-node=2 --gpus-per-node=2"),
    Shape("--ntasks-per-node=1 --gpus-per-node=2"),
    Shape("--ntasks=2 --gpus-per-node=2"),
    Shape("--ntasks=2 --gpus-per-task=1"),
    Shape("--gres=gpu:2"),
    Shape("--ntasks=2 --gres=gpu:a100:2"),
    Shape("--gpus-per-node=a100:2"),
    Shape("--gpus-per-node=2", start=""),
    Shape("--ntasks-per-node=2 --gpus-per-node=2", start=""),
    Shape(
        "--gpus-per-node=2",
        start="torchrun --standalone --nproc-per-node 2 --no-python",
    ),
    Shape("--nodes=2 --ntasks-per-node=2 --gpus-per-node=2", num_ranks=4),
    Shape("--nodes=2 --ntasks-per-node=1 --gpus-per-node=2", num_ranks=4),
    Shape("--nodes=2 --ntasks-per-node=1 --gpus-per-node=1"),
    # tasks 0 and 2 on one node, 1 and 3 on the other
    Shape("--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --distribution=cyclic", num_ranks=4),
    # a step that takes less than the job has
    Shape(
        "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2",
        start="srun --nodes=1 --ntasks=2",
    ),
]


@pytest.fixture(scope="module")
def jobs(
    cluster: Cluster, assets: Path, request: pytest.FixtureRequest
) -> dict[Shape, tuple[Run, Job]]:
    """All the shapes that are tested in this session, submitted at once."""
    submitted = {}
    for item in request.session.items:
        shape = getattr(item, "callspec", None) and item.callspec.params.get("shape")
        if item.module is request.module and shape:
            work = cluster.work_folder(f"shape-{item.name}")
            run = Run(assets, work)
            options = f"--constraint=a100 {shape.options}".split()
            submitted[shape] = run, cluster.sbatch(f"{shape.start} {run.command}", work, *options)
    return submitted


@pytest.fixture(scope="module")
def alone(cluster: Cluster, assets: Path) -> Run:
    """The run in one process, without Slurm."""
    run = Run(assets, cluster.work_folder("alone"))
    result = cluster.shell(run.command, run.work)
    assert result.returncode == 0, result.stderr
    return run


def name_of(shape: Shape) -> str:
    return f"{shape.start or 'no srun'} {shape.options}"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shape(
    shape: Shape, jobs: dict[Shape, tuple[Run, Job]], alone: Run, cluster: Cluster
) -> None:
    run, job = jobs[shape]
    ended = cluster.finish(job)
    assert ended.status == 0, ended.output
    assert members(ended.output) == expected_members(shape.num_ranks), ended.output
    assert run.losses == pytest.approx(alone.losses, abs=1e-4)


def test_srun_from_a_shell(cluster: Cluster, assets: Path, work: Path, alone: Run) -> None:
    run = Run(assets, work)
    result = cluster.shell(f"srun --ntasks=2 --gpus-per-node=2 {run.command}", work)
    assert result.returncode == 0, result.stderr
    assert members(result.stderr) == expected_members(2), result.stderr
    assert run.losses == pytest.approx(alone.losses, abs=1e-4)
