"""The image in a job: every task starts its own container, or one container starts the ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cluster import Cluster
from container import BUILT_SIF, engine_environment
from tiny_run import Run, expected_members, members

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def container(cluster: Cluster) -> str:
    """`apptainer run FILE`; skipped, and why, where there is no SIF of the image."""
    sif = os.environ.get("LORA_TEST_SIF") or BUILT_SIF
    if not Path(sif).exists():
        pytest.skip("LORA_TEST_SIF=FILE names a SIF; `make test-image` builds one")
    apptainer = shutil.which("apptainer", path=engine_environment()["PATH"])
    if apptainer is None:
        pytest.skip("no apptainer: tests/image/install_tools.sh has not run here")
    if cluster.shell(f"test -r {sif}", cluster.folder).returncode != 0:
        pytest.skip(f"the user of the jobs cannot read {sif}")
    return f"{apptainer} run {sif}"


@pytest.mark.parametrize("options", ["--ntasks-per-node=2 --gpus-per-node=2", "--gpus-per-node=2"])
def test_two_ranks(
    options: str, container: str, cluster: Cluster, assets: Path, work: Path
) -> None:
    run = Run(assets, work)
    command = run.command.removeprefix("lora-train ")
    ended = cluster.finish(cluster.sbatch(f"srun {container} {command}", work, *options.split()))
    assert ended.status == 0, ended.output
    assert members(ended.output) == expected_members(2), ended.output
    assert len(run.losses) == run.num_steps
