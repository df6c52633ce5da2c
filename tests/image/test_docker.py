"""The image from the Dockerfile, run as users of clusters and clouds run it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from container import REPOSITORY, engine_environment, podman

pytestmark = pytest.mark.slow

# as little as shows that a run works from start to end
SHORT = ("--max-steps", "2", "eval.num_generate=0", "trainer.limit_val_batches=1")


def test_its_own_checks_pass(docker_image: str) -> None:
    """`make image-test`: as root, and as another uid with a read-only root."""
    result = subprocess.run(
        ["make", "image-test", f"IMAGE={docker_image}"], cwd=REPOSITORY, env=engine_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok: the packages import") == 2


@pytest.mark.parametrize("user", ["0:0", "12345:54321"])
def test_it_trains_as_any_user_read_only_without_network(
    docker_image: str, tmp_path: Path, user: str
) -> None:
    tmp_path.chmod(0o777)
    options = ("--user", user, "--read-only", "--tmpfs", "/tmp", "-v", f"{tmp_path}:/workspace")
    result = podman(*SHORT, image=docker_image, options=options)
    assert result.returncode == 0, result.stderr
    assert "caches in /workspace/.lora_cache" in result.stderr
    assert "gpu monitor: no NVIDIA GPU here; nothing is recorded" in result.stderr
    run = tmp_path / "runs/quickstart"
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_a_folder_that_cannot_be_written_is_named(docker_image: str) -> None:
    result = podman(*SHORT, image=docker_image, options=("--user", "12345", "--read-only"))
    assert result.returncode == 2
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_environment_holds_without_the_entrypoint(docker_image: str) -> None:
    """pyxis runs no entrypoint: the commands of the image lead to it."""
    command = "command -v lora-train nemo hf python; lora-train --version; hf env | grep HUB_CACHE"
    result = podman("-c", command, image=docker_image, options=("--entrypoint", "bash"))
    assert result.returncode == 0, result.stderr
    *paths, version, cache = result.stdout.splitlines()
    assert paths == [
        "/opt/lora/bin/lora-train", "/opt/lora/bin/nemo", "/opt/lora/bin/hf",
        "/opt/lora/venv/bin/python",
    ]  # fmt: skip
    assert version.startswith("lora-train ")
    assert "/workspace/.lora_cache/huggingface/hub" in cache


def test_no_secret_and_no_leftover(docker_image: str) -> None:
    """Nothing of the build is left: no settings of pip, no caches, no git, no source tree."""
    # a mount point of the build may be left, with nothing in it
    names = " -o ".join(f"-name {name}" for name in (".netrc", "pip.conf", "token", ".git"))
    found = f"find / -xdev -size +0 \\( {names} \\)"
    folders = "ls -d /opt/lora/src /root/.cache /root/.config /root/.triton /root/.nv"
    lists = "ls -A /tmp /var/tmp /var/lib/apt/lists | grep -v :"
    for command in (found, folders, lists):
        result = podman("-c", command, image=docker_image, options=("--entrypoint", "bash"))
        assert result.stdout.split() == [], command


def test_one_file_holds_what_it_is_made_of(docker_image: str) -> None:
    result = podman("cat", "/opt/lora/image.json", image=docker_image)
    facts = json.loads(result.stdout)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True)
    assert facts["commit"].removesuffix("-dirty") == commit.strip()
    assert facts["torch"] == "2.13.0+cpu"
    locked = (REPOSITORY / "requirements.lock").read_text()
    for package in facts["packages"]:
        name, _, version = package.partition("==")
        if name not in ("lora-hpc", "torch"):
            assert f"\n{name.lower().replace('_', '-').replace('.', '-')}=={version}" in (
                locked.replace("_", "-").replace("ruamel.", "ruamel-")
            ), package
