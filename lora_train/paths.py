"""The cache folder; files and folders that appear whole or not at all; hashes; dead links."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Return the folder for downloads and conversions; it need not exist yet.

    Returns:
        `$LORA_CACHE_DIR` if set and not empty, else `.lora_cache` in the current folder; absolute.
    """
    configured = os.environ.get("LORA_CACHE_DIR", "")
    return Path(configured or ".lora_cache").expanduser().absolute()


def dangling_link(path: Path) -> Path | None:
    """Return the link on the way to a folder that leads nowhere, or None.

    Args:
        path: a folder that need not exist.

    Returns:
        The nearest one, going up.

    Raises:
        OSError: a folder on the way may not be entered.
    """
    path = path.absolute()
    return next(
        (each for each in (path, *path.parents) if each.is_symlink() and not each.exists()), None
    )


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    Args:
        file: to be read whole.

    Returns:
        64 digits.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path to write, which becomes `destination` when the block ends without an error.

    Args:
        destination: the file to make or to replace; its folder is made too.

    Yields:
        A hidden sibling of `destination`, of this process alone.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = destination.with_name(
        f".{destination.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    )
    try:
        yield unfinished
        unfinished.replace(destination)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield a new empty folder that becomes `destination` when the block ends without an error.

    The new folder is a hidden sibling of `destination`, so the last step is one rename: a kill in
    the middle leaves no half-filled `destination`. When two processes fill the same `destination`,
    the first to end wins and the other drops its copy. After an error the new folder is removed.

    Args:
        destination: the folder to make; its parents are made too. An empty folder may stand there.

    Yields:
        The folder to fill.

    Raises:
        OSError: the parent folder cannot be made or written, or the disk is full.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.tmp-"
    _remove_stale(destination.parent, prefix)
    work = Path(tempfile.mkdtemp(prefix=f"{prefix}{socket.gethostname()}-", dir=destination.parent))
    try:
        # mkdtemp gives 0700; a cache shared by a group needs what mkdir would have given
        work.chmod(0o777 & ~_umask())
        yield work
        try:
            work.rename(destination)
        except OSError:
            if not _is_filled(destination):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _umask() -> int:
    # the only portable way to read it is to set it; nothing else runs between the two calls
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove what killed processes left; a living one writes files, so its folder is young."""
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
