"""Files of a job: whether they are where it looks for them, and what its container must show."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from lora_train.config import Config
from lora_train.errors import UserError

_IMAGE = "/opt/lora"
# In place of the image's own these would hide what it consists of.
_OF_THE_IMAGE = (
    "bin", "boot", "dev", "etc", "lib", "lib64", "opt", "proc", "root", "run", "sbin", "sys", "tmp",
    "usr", "var",
)  # fmt: skip


def check_files(config: Config, in_image: bool) -> list[str]:
    """Look for the files of the run that are named by absolute paths.

    Args:
        config: the run's.
        in_image: whether this runs in a container, which may not show what the job's shows.

    Returns:
        Notes on those that a container does not show.

    Raises:
        UserError: one is not there.
    """
    notes: list[str] = []
    for key, value in _files(config).items():
        path = Path(value)
        if not path.is_absolute() or path.exists():
            continue
        problem = f"{key}={path}: there is no such file or folder"
        if in_image:
            notes.append(f"{problem} in this container")
            continue
        nearest = next(folder for folder in path.parents if folder.exists())
        raise UserError(
            f"{problem} on {socket.gethostname()}",
            hint=f"ls {shlex.quote(str(nearest))} shows what is there, as far as the path goes",
        )
    return notes


def check_output(output: str) -> None:
    """Refuse an output file without its folder: Slurm ends such a job without a word.

    Args:
        output: the file, with Slurm's % in it.

    Raises:
        UserError: its folder does not exist.
    """
    folder = Path(output).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise UserError(
            f"--output {output}: there is no folder {folder}, and Slurm makes none",
            hint=f"mkdir -p {shlex.quote(str(folder))}",
        )


def folders_to_bind(config: Config, words: Sequence[str]) -> list[Path]:
    """Find the folders outside of $HOME and the current folder, which a container may not show.

    Args:
        config: the run's.
        words: the run's, which may name more.

    Returns:
        The first folders of the run's absolute paths, such as /scratch; below /opt and the like the
        path's own folder.
    """
    named = [word.partition("=")[2] if "=" in word else word for word in words]
    found: dict[Path, None] = {}
    for path in map(Path, [*_files(config).values(), config.log.log_dir, *named]):
        shown = [Path.cwd(), *map(Path, filter(None, [os.environ.get("HOME")]))]
        if not path.is_absolute() or any(map(path.is_relative_to, shown)):
            continue
        first = Path(*path.parts[:2])
        folder = first
        if first.name in _OF_THE_IMAGE:
            folder = path if path.is_dir() else path.parent
            if folder == first or path.is_relative_to(_IMAGE):
                continue
        # a comma and a colon are the syntax of --bind
        if folder.is_dir() and not set(",:") & set(str(folder)):
            found[folder] = None
    return list(found)


def _files(config: Config) -> dict[str, str]:
    """What the run reads, by key."""
    files = {
        "model.path": config.model.path,
        "model.chat_template": config.model.chat_template,
        "data.path": config.data.path,
        "data.validation_path": config.data.validation_path,
    }
    return {key: path for key, path in files.items() if path is not None}
