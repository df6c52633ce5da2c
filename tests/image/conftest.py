"""The image by both doors, built here from a base without a registry: `make test-image`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import BUILT_SIF, FOLDER, REPOSITORY, Sif, engine_environment

PASSTHROUGH = Path(__file__).parent / "pip_passthrough.py"
# `make` is told: a CPU build of torch, which is all that this machine can run
CPU = ["TORCH_CUDA=cpu", "IMAGE=localhost/lora-test"]


def passthrough(kind: str, folder: Path) -> list[str]:
    """What makes pip inside a build use this machine's sources."""
    command = [sys.executable, str(PASSTHROUGH), kind, str(folder)]
    return subprocess.check_output(command, text=True).split("\n")[:-1]


def make(log: Path, *words: str, **variables: str) -> None:
    """Run make, its output in a log; shown if it fails."""
    with log.open("w") as stream:
        result = subprocess.run(
            ["make", *words], cwd=REPOSITORY, env={**engine_environment(), **variables},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert result.returncode == 0, log.read_text()[-4000:]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """Skip, and say why, where the tools are not there (`tests/image/install_tools.sh`)."""
    if os.getuid() != 0:
        pytest.skip("building images in these tests needs root")
    path = engine_environment()["PATH"]
    missing = [tool for tool in ("podman", "apptainer") if shutil.which(tool, path=path) is None]
    if missing or not (FOLDER / "base.oci.tar").exists():
        what = ", ".join(missing) or "base image"
        pytest.skip(f"no {what}: tests/image/install_tools.sh has not run here")


@pytest.fixture(scope="session")
def docker_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image that `make image` makes; its name."""
    folder = tmp_path_factory.mktemp("image")
    options = ["--isolation", "chroot", "--format", "docker", *passthrough("buildah", folder)]
    make(
        folder / "log", "image", *CPU, "BASE_IMAGE=localhost/lora-base",
        f"IMAGE_OPTIONS={' '.join(options)}",
    )  # fmt: skip
    return "localhost/lora-test"


@pytest.fixture(scope="session")
def sif(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sif]:
    """The SIF that `make sif` makes from Singularity.def, or that LORA_TEST_SIF names."""
    folder = Path(f"/var/tmp/lora-sif-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    if built := os.environ.get("LORA_TEST_SIF"):
        yield Sif(Path(built), folder)
        shutil.rmtree(folder, ignore_errors=True)
        return
    variables = dict(line.split("=", 1) for line in passthrough("apptainer", folder / "pip"))
    # stays, for the jobs of tests/cluster
    BUILT_SIF.unlink(missing_ok=True)
    make(
        tmp_path_factory.mktemp("sif") / "log", "sif", *CPU, f"SIF={BUILT_SIF}",
        "BOOTSTRAP=oci-archive", f"BASE_IMAGE={FOLDER}/base.oci.tar", **variables,
    )  # fmt: skip
    shutil.rmtree(folder / "pip", ignore_errors=True)
    yield Sif(BUILT_SIF, folder)
    shutil.rmtree(folder, ignore_errors=True)
