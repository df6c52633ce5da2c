"""A clean environment, simulated machines, and stand-ins for a driver and for file systems."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_train.cli import parse_command_line
from lora_train.config import Config
from lora_train.preflight.machine import Machine

_OURS = (
    "SLURM_", "CUDA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LORA_", "NEMO_", "TRITON_", "XDG_",
    "APPTAINER_", "SINGULARITY_", "WORLD_SIZE", "LOCAL_", "LD_LIBRARY_PATH", "PYTHONPATH",
    "http", "all_proxy", "no_proxy", "HTTP", "ALL_PROXY", "NO_PROXY", "CC",
)  # fmt: skip
_SOURCES = Path(__file__).parent


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, beside an empty home; no job, no caches, no GPU."""
    for name in list(os.environ):
        if name.startswith(_OURS):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # nothing listens there: the hub cannot be reached, on any machine
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where a simulated machine has its /proc and /dev."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def machine(root: Path) -> Machine:
    """A bare machine, no container, no GPU."""
    return Machine(root=root)


@pytest.fixture
def configured() -> Callable[..., Config]:
    """Return the configuration that words mean."""

    def configured(*words: str) -> Config:
        return parse_command_line(words).resolve()

    return configured


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled stand-ins."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("built")
    for source, library in (
        ("fake_nvml.c", "libnvidia-ml.so.1"),
        ("fake_calls.c", "libcalls.so"),
    ):
        command = ["gcc", "-shared", "-fPIC", "-o", folder / library, _SOURCES / source]
        subprocess.run(command, check=True)
    # no code at all: that it can be loaded is all that is asked
    empty = ["gcc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", folder / "libcuda.so.1"]
    subprocess.run(empty, check=True)
    return folder


@pytest.fixture
def lora_train() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program as a user would, with more variables set."""

    def lora_train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("lora-train"), *words],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return lora_train


@pytest.fixture
def preflight(lora_train: Callable[..., Any]) -> Callable[..., list[dict[str, str]]]:
    """Run `lora-train preflight --json` and return what it found."""

    def preflight(*words: str, **environment: str) -> list[dict[str, str]]:
        done = lora_train("preflight", "--json", *words, **environment)
        assert done.returncode in (0, 2), done.stderr
        found = json.loads(done.stdout)
        assert (done.returncode == 2) == any(each["level"] == "error" for each in found)
        return found

    return preflight


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the given options; skip where that is not permitted."""
    points: list[Path] = []

    def mounted(options: str) -> Path:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", point]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mounted
    for point in points:
        subprocess.run(["umount", point], check=True)
