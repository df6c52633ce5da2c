"""Room in host memory: what the control groups leave, and what all processes of a node take."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kernels import offload

MIB = 2**20


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(offload, "_CGROUPS", tmp_path)
    monkeypatch.setattr(offload, "_OWN_CGROUPS", tmp_path / "self")
    return tmp_path


def limit(group: Path, allowed: int | str, used: int, pages: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (allowed, used), strict=True):
        (group / name).write_text(f"{value}\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(
        f"anon 1\nactive_file {'7' if prefix else pages}\n{prefix}inactive_file 0\n"
        + (f"total_active_file {pages}\n" if prefix else "")
    )


def test_the_smallest_limit_on_the_way_to_the_root_counts(cgroups: Path) -> None:
    (cgroups / "self").write_text("0::/slurm/job_1/step_0/task_0\n")
    limit(cgroups / "slurm/job_1", 100 * MIB, 60 * MIB, 20 * MIB)
    limit(cgroups / "slurm/job_1/step_0", "max", 60 * MIB, 20 * MIB)
    # the task's own is not there, as in a container
    assert offload.free_host_bytes() == 60 * MIB
    limit(cgroups / "slurm/job_1/step_0", 70 * MIB, 60 * MIB, 20 * MIB)
    assert offload.free_host_bytes() == 30 * MIB
    limit(cgroups, 50 * MIB, 60 * MIB, 20 * MIB)
    assert offload.free_host_bytes() == 10 * MIB


def test_control_groups_of_version_1(cgroups: Path) -> None:
    (cgroups / "self").write_text("9:name=systemd:/x\n4:cpu,memory:/slurm/job_1\n0::/\n")
    limit(cgroups / "memory/slurm", 40 * MIB, 30 * MIB, 5 * MIB, version=1)
    limit(cgroups / "memory/slurm/job_1", 2**63 - 4096, 30 * MIB, 5 * MIB, version=1)
    limit(cgroups / "slurm/job_1", MIB, 0, 0)
    assert offload.free_host_bytes() == 15 * MIB


def test_all_processes_of_the_node_put_as_much_there(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cgroups / "self").write_text("0::/job\n")
    limit(cgroups / "job", 256 * MIB, 0, 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert offload.has_room(8, 8 * MIB)
    # rounded up to 16 MiB each
    assert not offload.has_room(7, 9 * MIB)
    assert not offload.has_room(0, 8 * MIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert not offload.has_room(8, 8 * MIB)
    assert offload.has_room(1, 8 * MIB)
