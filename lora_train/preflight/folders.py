"""Facts on folders: which file system, how much room, who may write."""

from __future__ import annotations

import os
from pathlib import Path

from lora_train.preflight.findings import in_bytes


def home() -> Path | None:
    """Return the user's home folder, or None where the system knows none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def existing_parent(path: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists.

    Args:
        path: a folder that may not exist, nor be allowed to be looked at.

    Returns:
        An absolute path.
    """
    path = path.absolute()
    while path != path.parent:
        try:
            if path.exists():
                return path
        except OSError:  # a folder above may not be entered
            pass
        path = path.parent
    return path


def file_system(root: Path, path: Path) -> str:
    """Return the type of the file system that a folder is on, such as ext4, nfs4 or lustre.

    Args:
        root: where proc is looked for.
        path: an existing folder.

    Returns:
        Its type; `unknown file system` when /proc does not say.
    """
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown file system"
    resolved, best, found = path.resolve(), Path(), "unknown file system"
    for line in lines:
        mount, separator, source = line.partition(" - ")
        fields = mount.split()
        if not separator or len(fields) < 5:
            continue
        # blanks in a path are octal escapes
        point = Path(fields[4].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, found = point, source.split()[0]
    return found


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 where they cannot be listed."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def free_bytes(path: Path) -> int | None:
    """Return the bytes that a user may still write; a quota does not show in it.

    Args:
        path: an existing folder.

    Returns:
        Bytes; None where the file system does not say, as some in user space (FUSE).
    """
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def room(path: Path) -> str:
    """Say how much room a file system has left."""
    free = free_bytes(path)
    return "free space not known" if free is None else f"{in_bytes(free)} free"


def free_files(path: Path) -> int | None:
    """Return how many files may still be made; None where the file system does not count them."""
    status = os.statvfs(path)
    return status.f_favail if status.f_files else None
