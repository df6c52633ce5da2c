"""Whether the run directory and the caches can be written, and whether there is room for the run.

A quota does not show in the free space that the system reports. `fallocate` asks for the bytes
themselves, which a full quota refuses at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lora_train.config import Config
from lora_train.model_size import checkpoint_bytes, count_trainable
from lora_train.paths import dangling_link
from lora_train.preflight.assets import model_config
from lora_train.preflight.caches import caches_written
from lora_train.preflight.findings import Finding, Level, in_bytes
from lora_train.preflight.folders import (
    existing_parent,
    file_system,
    free_bytes,
    free_files,
    room,
    size_of,
)
from lora_train.preflight.machine import Machine

# metrics, logs and trackers of a long run
_LOGS_BYTES = 16 * 2**20
_FILES = 64
_FILES_PER_CHECKPOINT = 8
# asking for more takes long on some servers
_PROBE_BYTES = 2**30
# in memory: what is asked for is taken, and no quota is on it
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Place:
    """A folder that the run writes to."""

    purpose: str
    path: Path
    needed: int
    """Bytes."""
    num_files: int
    mend: str
    level: Level = "error"
    """How bad it is when it cannot be written."""


def check_storage(machine: Machine, config: Config) -> list[Finding]:
    """Write to every folder that the run will write to, and compare its room with the need."""
    findings = []
    # folders on one file system share its room
    claimed: dict[int, tuple[int, int]] = {}
    for place in _places(machine, config):
        folder = existing_parent(place.path)
        try:
            link = dangling_link(place.path)
            if link is not None:
                findings.append(_dangling(machine, place, link))
                continue
            _write(folder)
            device = folder.stat().st_dev
            num_bytes, num_files = claimed.get(device, (0, 0))
            claimed[device] = (num_bytes + place.needed, num_files + place.num_files)
            shortage = _shortage(machine, folder, *claimed[device])
        except OSError as error:
            findings.append(_unwritable(machine, place, folder, error))
            continue
        if shortage is None:
            findings.append(_judged_quota(machine, place, folder))
            findings += _volatile(machine, place, folder)
        else:
            findings.append(
                Finding(
                    "storage", place.level,
                    f"{place.purpose} {place.path}: {shortage}",
                    "the run would stop when it is full", place.mend,
                )
            )  # fmt: skip
    return findings


def _checkpoint_bytes(config: Config) -> int:
    """What `checkpoint_bytes` says of the run; 0 where the model is not known well enough."""
    content = model_config(config.model)
    trainable = count_trainable(content, config.peft) if content is not None else None
    return 0 if trainable is None else checkpoint_bytes(trainable, config)


def _places(machine: Machine, config: Config) -> list[Place]:
    run = Path(os.path.expanduser(config.log.log_dir)) / (config.log.name or "run")
    kept = config.log.ckpt.keep_last + 1
    there = size_of(run / "checkpoints") if config.resume.mode == "auto" else 0
    output = Place(
        "run directory",
        run,
        max(0, _checkpoint_bytes(config) - there) + _LOGS_BYTES,
        _FILES + kept * _FILES_PER_CHECKPOINT,
        "log.log_dir=/path/on/scratch",
    )
    caches = [
        Place(
            f"cache {cache.variable}", cache.path, cache.needed, _FILES, cache.mend,
            "error" if cache.is_required else "warning",
        )
        for cache in caches_written(machine, config)
    ]  # fmt: skip
    return [output, *caches]


def _write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x" * 4096)
        probe.flush()
        os.fsync(probe.fileno())


def _shortage(machine: Machine, folder: Path, num_bytes: int, num_files: int) -> str | None:
    free, files = free_bytes(folder), free_files(folder)
    kind = file_system(machine.root, folder)
    if free is not None and free < num_bytes:
        return f"{in_bytes(free)} free ({kind}), and this run writes {in_bytes(num_bytes)}"
    if files is not None and files < num_files:
        return f"{files} more files can be made ({kind}), and this run makes about {num_files}"
    return None


def _judged_quota(machine: Machine, place: Place, folder: Path) -> Finding:
    asked = min(place.needed, _PROBE_BYTES)
    if asked and file_system(machine.root, folder) not in _IN_MEMORY:
        refused = _refused(folder, asked)
        if refused is not None:
            return Finding(
                "storage", place.level,
                f"{place.purpose} {place.path}: {in_bytes(asked)} were refused "
                f"({os.strerror(refused)}), although the file system has {room(folder)}",
                f"a quota is full: this run writes {in_bytes(place.needed)}",
                f"{place.mend}; `quota -s` or `lfs quota -h -u $USER "
                f"{shlex.quote(str(folder))}` shows the quota",
            )  # fmt: skip
    needs = f", {in_bytes(place.needed)} needed" if place.needed else ""
    return Finding("storage", "ok", f"{place.purpose} {place.path}: {room(folder)}{needs}")


def _volatile(machine: Machine, place: Place, folder: Path) -> list[Finding]:
    """Warn of results that end with the container: no folder of the host is bound there."""
    kind = file_system(machine.root, folder)
    if place.purpose != "run directory" or machine.container is None:
        return []
    if kind not in (*_IN_MEMORY, "overlay", "fuse.fuse-overlayfs"):
        return []
    bound = '--bind "$PWD" --pwd "$PWD"'
    if machine.container == "docker":
        bound = '-v "$PWD":/workspace'
    return [
        Finding(
            "storage", "warning",
            f"run directory {place.path} lies inside the container ({kind})",
            "results and checkpoints are lost when the container ends",
            _with_options(machine, bound),
        )
    ]  # fmt: skip


def _refused(folder: Path, num_bytes: int) -> int | None:
    """Ask the file system for bytes; return the error that says no, or None.

    The system call, not os.posix_fallocate: that writes zeros where the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        result = libc.fallocate(
            probe.fileno(), 0, ctypes.c_longlong(0), ctypes.c_longlong(num_bytes)
        )
        code = ctypes.get_errno()
    return code if result != 0 and code in (errno.EDQUOT, errno.ENOSPC) else None


def _unwritable(machine: Machine, place: Place, folder: Path, error: OSError) -> Finding:
    mend = place.mend
    if error.errno == errno.EROFS and machine.container == "apptainer":
        mend += f", or bind it: {_bound(machine, folder)}"
    full = error.errno in (errno.EDQUOT, errno.ENOSPC)
    return Finding(
        "storage",
        place.level,
        f"{place.purpose} {place.path} cannot be written: {error.strerror or error} ({folder})",
        "a quota or the disk is full" if full else "the run writes there",
        mend,
    )


def _dangling(machine: Machine, place: Place, link: Path) -> Finding:
    target = link.parent / os.readlink(link)
    mend = place.mend
    if machine.container is not None:
        mend += f", or bind it: {_bound(machine, target)}"
    return Finding(
        "storage", place.level,
        f"{place.purpose} {place.path}: {link} is a link to {target}, which does not exist",
        "the run writes there; inside a container only bound folders are seen", mend,
    )  # fmt: skip


def _bound(machine: Machine, folder: Path) -> str:
    """Return the line that starts this run with one more folder of the host."""
    option = f"-v {shlex.quote(f'{folder}:{folder}')}"
    if machine.container == "apptainer":
        option = f"--bind {shlex.quote(str(folder))}"
    return _with_options(machine, option)


def _with_options(machine: Machine, options: str) -> str:
    # Docker starts nothing with GPUs where there are none
    if machine.container == "apptainer" or machine.usable_gpus():
        options = f"{machine.gpu_options} {options}"
    return machine.run_container(options)
