"""Dockerfile and Singularity.def are two doors to one recipe, with one set of defaults."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
DEFINITION = (REPOSITORY / "Singularity.def").read_text()


def section(name: str) -> str:
    """The lines below %name in the definition file."""
    found = re.search(rf"^%{name}\b.*\n((?:[ \t]+.*\n|\n)*)", DEFINITION, re.MULTILINE)
    assert found, name
    return found[1]


def default(name: str) -> str:
    """A build argument's default, which the Dockerfile alone holds."""
    [value] = re.findall(rf"^ARG {name}=(.+)$", DOCKERFILE, re.MULTILINE)
    return str(value)


def test_both_set_the_same_environment() -> None:
    docker = dict(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=(\S+)", DOCKERFILE, re.MULTILINE))
    sif = dict(re.findall(r"([A-Z_]+)=(\S+)", section("environment")))
    # what the NVIDIA container runtime reads; Apptainer has --nv
    assert {name: docker[name] for name in docker if not name.startswith("NVIDIA_")} == sif
    assert len(sif) == 5


def test_both_run_the_same_steps() -> None:
    steps = re.findall(r"^RUN setup/install_image\.sh (\w+)$", DOCKERFILE, re.MULTILINE)
    assert len(steps) == 2
    assert steps == re.findall(r"setup/install_image\.sh (\w+)", section("post"))


def test_defaults_are_pinned_and_stand_in_one_place() -> None:
    assert re.search(r"@sha256:[0-9a-f]{64}$", default("BASE_IMAGE"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", default("TORCH_VERSION"))
    assert default("TORCH_CUDA").startswith("cu12")
    for name in ("BASE_IMAGE", "TORCH_VERSION", "TORCH_CUDA", "TORCH_INDEX"):
        assert f"{{{{ {name} }}}}" in DEFINITION
        assert default(name) not in DEFINITION
        assert f"$(call default_of,{name})" in MAKEFILE
        assert f"{name} ?= {default(name)}" not in MAKEFILE


def test_the_image_is_given_no_more_than_it_installs() -> None:
    allowed = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    copied = [line.split()[0] for line in section("files").splitlines() if line.strip()]
    assert sorted(allowed) == sorted(copied)
