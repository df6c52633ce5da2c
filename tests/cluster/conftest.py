"""Jobs of a real Slurm, which these tests start on this machine: `make test-slurm`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import DAEMONS, USER, Cluster
from tiny_run import LONG, Run, make_assets


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes; skipped, and why, where Slurm is not there (`tests/cluster/install_tools.sh`)."""
    if os.getuid() != 0:
        pytest.skip("starting Slurm's daemons needs root")
    tools = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
    missing = [tool for tool in tools if shutil.which(tool, path=DAEMONS) is None]
    if missing or subprocess.run(["id", USER], capture_output=True).returncode != 0:
        what = ", ".join(missing) or f"user {USER}"
        pytest.skip(f"no {what}: tests/cluster/install_tools.sh has not run here")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine gives no mount namespace")
    started = Cluster()
    try:
        started.start()
        yield started
    finally:
        started.end()


@pytest.fixture(scope="session")
def assets(cluster: Cluster) -> Path:
    """Model and data of the runs."""
    folder = cluster.folder / "assets"
    make_assets(folder)
    return folder


@pytest.fixture
def work(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """The user's folder for this test."""
    return cluster.work_folder(f"{request.module.__name__}-{request.node.name}")


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, assets: Path) -> Run:
    """The long run on two ranks, in one go."""
    run = Run(assets, cluster.work_folder("uninterrupted"), **LONG)
    options = ("--ntasks-per-node=2", "--gpus-per-node=2")
    ended = cluster.finish(cluster.sbatch(f"srun {run.command}", run.work, *options))
    assert ended.status == 0, ended.output
    return run
