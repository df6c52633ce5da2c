"""Where the entrypoint points the caches, and what it says of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_image import Image

# what the libraries use below their own homes, unless it is set
BASED = {
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "NEMO_HOME": "nemo",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb/cache",
    "WANDB_CONFIG_DIR": "wandb/config",
    "WANDB_DATA_DIR": "wandb/data",
    "XDG_CACHE_HOME": "xdg",
}
ON_THE_NODE = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB with few inodes."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_everything_lies_in_the_base_or_on_the_node(image: Image, tmp_path: Path) -> None:
    base = tmp_path / "base dir"
    image.run("--max-steps=1", LORA_CACHE_DIR=str(base), TMPDIR="unset")
    assert {name: image.seen[name] for name in BASED} == {
        name: str(base / folder) for name, folder in BASED.items()
    }
    node = f"/tmp/lora-train-{os.getuid()}"
    assert {name: image.seen[name] for name in ON_THE_NODE} == {
        name: f"{node}/{folder}" for name, folder in ON_THE_NODE.items()
    }
    assert image.seen["TMPDIR"] == f"{node}/tmp"
    assert not any(
        str(image.home) in value for value in image.seen.values() if value != str(image.home)
    )


def test_the_libraries_follow(image: Image, tmp_path: Path) -> None:
    """hub, datasets, xet and token have no variable of their own here: they follow HF_HOME."""
    import sys

    image.run("--max-steps=1", LORA_CACHE_DIR=str(tmp_path / "base"))
    code = (
        "from huggingface_hub import constants as c; import datasets.config as d, numpy;"
        "print(c.HF_HUB_CACHE, c.HF_XET_CACHE, c.HF_ASSETS_CACHE, c.HF_TOKEN_PATH,"
        " d.HF_DATASETS_CACHE, d.HF_MODULES_CACHE, sep='\\n')"
    )
    paths = subprocess.check_output([sys.executable, "-c", code], env=image.seen, text=True)
    assert len(paths.split()) == 6
    for path in paths.splitlines():
        assert path.startswith(str(tmp_path / "base/huggingface/")), path


def test_what_is_set_stays(image: Image) -> None:
    mine = {"HF_HOME": "/mine/hf", "TRITON_CACHE_DIR": str(image.tmp / "t"), "NEMO_HOME": "/n"}
    result = image.run("--max-steps=1", **mine)
    assert {name: image.seen[name] for name in mine} == mine
    assert result.stderr.count("(set by you)") == 4  # TMPDIR too
    assert image.seen["XDG_CACHE_HOME"].startswith(str(image.work))


@pytest.mark.parametrize("name", ["PROJECT", "WORK", "SCRATCH", "PSCRATCH", "GROUP_SCRATCH"])
def test_storage_of_the_site_is_recognized(image: Image, tmp_path: Path, name: str) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    result = image.run("--max-steps=1", **{name: str(storage)})
    assert image.seen["LORA_CACHE_DIR"] == f"{storage}/lora-train"
    assert f"(${name})" in result.stderr


def test_a_name_is_no_folder(image: Image) -> None:
    """PROJECT is also what people call their project; and $WORK may lie in the home."""
    result = image.run("--max-steps=1", PROJECT="thesis", WORK=f"{image.home}/work")
    assert image.seen["LORA_CACHE_DIR"] == f"{image.work}/.lora_cache"
    assert "no project or scratch storage was recognized" in result.stderr


def test_storage_that_the_container_does_not_see_is_named(image: Image) -> None:
    result = image.run("--max-steps=1", SCRATCH="/proc/nowhere", APPTAINER_CONTAINER="/x.sif")
    assert result.returncode == 0
    assert "SCRATCH=/proc/nowhere is not used" in result.stderr
    assert "--bind /proc/nowhere" in result.stderr


def test_storage_that_is_not_there_is_not_made(image: Image, tmp_path: Path) -> None:
    """In a container it would be a folder of the container, gone with it."""
    result = image.run("--max-steps=1", SCRATCH=str(tmp_path / "scratch"))
    assert f"SCRATCH={tmp_path}/scratch is not used for caches: there is no such" in result.stderr
    assert not (tmp_path / "scratch").exists()


def test_a_group_shares_its_storage(image: Image, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o777)
    os.chown(storage, 12345, 12345)
    image.run("--max-steps=1", PROJECT=str(storage), USER="ada")
    assert image.seen["LORA_CACHE_DIR"] == f"{storage}/ada/lora-train"


def test_a_base_that_cannot_be_written_is_refused(image: Image) -> None:
    result = image.run("--max-steps=1", LORA_CACHE_DIR="/proc/nowhere")
    assert result.returncode == 2
    assert "error: LORA_CACHE_DIR=/proc/nowhere cannot be written" in result.stderr
    assert "hint: " in result.stderr and "LORA_CACHE_DIR=FOLDER" in result.stderr
    assert not (image.out / "argv").exists()
    # what may tell why is answered
    assert image.run("preflight", "--json", LORA_CACHE_DIR="/proc/nowhere").returncode == 0


@pytest.mark.parametrize("path", ["relative/cache", "~/cache"])
def test_a_path_that_no_shell_has_completed(image: Image, path: str) -> None:
    result = image.run("--max-steps=1", HF_HOME=path, LORA_CACHE_DIR=path)
    assert result.returncode == 0
    where = image.home if path.startswith("~") else image.work
    assert image.seen["LORA_CACHE_DIR"] == str(where / path.removeprefix("~/"))


def test_a_question_leaves_nothing(image: Image) -> None:
    image.run("--help")
    image.run("preflight")
    assert list(image.work.iterdir()) == []


def test_a_disk_that_runs_no_code_is_not_for_kernels(image: Image, tmp_path: Path) -> None:
    """Triton loads a library from its cache."""
    disk = tmp_path / "noexec"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g,noexec", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a file system")
    try:
        image.run("--max-steps=1", TMPDIR=str(disk), SLURM_TMPDIR=str(image.tmp))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert image.seen["TRITON_CACHE_DIR"].startswith(f"{image.tmp}/")


def test_a_tmpdir_of_the_node_that_is_not_here(image: Image) -> None:
    result = image.run("--max-steps=1", TMPDIR="/proc/slurm.7", SLURM_TMPDIR=str(image.tmp))
    assert "TMPDIR=/proc/slurm.7 is not there" in result.stderr
    assert image.seen["TMPDIR"].startswith(f"{image.tmp}/")


def test_a_full_cache_disk_is_told(image: Image, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(b"x" * (1 << 20))
    result = image.run("--max-steps=1", LORA_CACHE_DIR=str(small_disk))
    # a folder can be made, and what is too small for this run is for preflight to say
    assert result.returncode == 0
    row = next(line for line in result.stderr.splitlines() if "HF_HOME" in line)
    assert row.split()[1:3] == ["tmpfs", "0"]


def test_a_disk_without_inodes_is_refused(image: Image, small_disk: Path) -> None:
    base = small_disk / "base"
    base.mkdir()
    for number in range(64):
        try:
            (small_disk / str(number)).touch()
        except OSError:
            break
    result = image.run("--max-steps=1", LORA_CACHE_DIR=str(base))
    assert result.returncode == 2
    assert f"LORA_CACHE_DIR={base} cannot be written" in result.stderr


def test_a_login_survives_the_move(image: Image) -> None:
    token = image.home / ".cache/huggingface/token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret")
    result = image.run("--max-steps=1")
    assert image.seen["HF_TOKEN_PATH"] == str(token)
    assert "hf_secret" not in result.stderr
    image.run("--max-steps=1", HF_TOKEN="hf_other")
    assert "HF_TOKEN_PATH" not in image.seen
    image.run("--max-steps=1", HF_HOME=str(image.home / ".cache/huggingface"))
    assert "HF_TOKEN_PATH" not in image.seen


@pytest.mark.parametrize("home", ["unset", "/nonexistent", ""])
def test_without_a_home_there_is_one(image: Image, home: str) -> None:
    result = image.run("--max-steps=1", HOME=home)
    assert result.returncode == 0
    assert Path(image.seen["HOME"]).is_dir()
    assert image.seen["HOME"].startswith(str(image.tmp))


def test_the_current_folder_may_be_read_only(image: Image, tmp_path: Path) -> None:
    image.work = Path("/proc")
    result = image.run("--max-steps=1")
    assert result.returncode == 0
    assert image.seen["LORA_CACHE_DIR"] == f"{image.tmp}/lora-train-{os.getuid()}/cache"
    assert "lost with the node" in result.stderr


def test_one_line_when_quiet_and_on_the_other_processes(image: Image) -> None:
    loud = image.run("--max-steps=1").stderr
    assert all(name in loud for name in [*BASED, *ON_THE_NODE, "TMPDIR"])
    for variable in ({"LORA_QUIET": "1"}, {"SLURM_PROCID": "3"}):
        lines = image.run("--max-steps=1", **variable).stderr.splitlines()
        assert len([line for line in lines if "caches" in line]) == 1
        assert len(lines) == 3


def test_another_users_folder_in_tmp_is_not_taken(image: Image) -> None:
    taken = image.tmp / f"lora-train-{os.getuid()}"
    taken.symlink_to(image.home)
    image.run("--max-steps=1")
    chosen = Path(image.seen["TRITON_CACHE_DIR"]).parent
    assert chosen != taken and chosen.parent == image.tmp
    assert not list(image.home.iterdir())
