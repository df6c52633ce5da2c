"""Checkpoints that are either complete or visibly not, verified when they are read.

A checkpoint is `checkpoints/step-000050/` with `adapter/` (plain PEFT format), `state.pt` (what
else the trainer needs to go on) and, written last, `complete.json`: the size and SHA-256 of every
other file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.paths import sha256_of

log = logging.getLogger(__name__)

_STEP = re.compile(r"^step-(\d{6,})$")
_COMPLETE = "complete.json"
_STATE = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int

    @property
    def adapter(self) -> Path:
        """Folder in PEFT's format."""
        return self.path / "adapter"

    def read_state(self) -> dict[str, Any]:
        """What `write_checkpoint` was given as `state`; tensors on the CPU."""
        import torch

        return torch.load(self.path / _STATE, map_location="cpu", weights_only=True)


def write_checkpoint(
    root: Path, step: int, *, state: dict[str, Any], save_adapter: Callable[[Path], None]
) -> Checkpoint:
    """Write one checkpoint; a kill or a full disk at any moment leaves the earlier ones alone.

    Args:
        root: the run's `checkpoints` folder; made when missing.
        step: optimizer steps done.
        state: tensors, numbers, strings, and lists and dicts of them (loaded with weights_only).
        save_adapter: writes the adapter into the folder it is given.

    Returns:
        The checkpoint, complete on disk.

    Raises:
        OSError: the disk is full or the folder not writable. What was written so far is removed.
    """
    import torch

    final = root / f"step-{step:06d}"
    if _fault(final) is None:
        return Checkpoint(final, step)  # stopped right after a periodic save
    root.mkdir(parents=True, exist_ok=True)
    for torn in root.glob(".writing-*"):  # of a run that was killed in mid-save
        shutil.rmtree(torn, ignore_errors=True)
    unfinished = root / f".writing-{final.name}"
    try:
        unfinished.mkdir()
        save_adapter(unfinished / "adapter")
        torch.save(state, unfinished / _STATE)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {
            str(path.relative_to(unfinished)): {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
            for path in files
        }
        marker = unfinished / _COMPLETE
        marker.write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        for path in [*files, marker, unfinished / "adapter", unfinished]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)  # a broken one of that name: it was skipped by name when resuming
        unfinished.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Checkpoint(final, step)


def newest_complete(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole and unchanged; broken ones are named in the log.

    Args:
        root: the run's `checkpoints` folder; need not exist.

    Returns:
        The checkpoint; None when there is none to go on from.
    """
    steps = sorted(_steps(root), key=lambda checkpoint: checkpoint.step, reverse=True)
    for checkpoint in steps:
        fault = _fault(checkpoint.path)
        if fault is None:
            return checkpoint
        log.warning("skipping broken checkpoint %s: %s", checkpoint.path, fault)
    return None


def complete_at(root: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, whole and unchanged.

    Args:
        root: the run's `checkpoints` folder; need not exist.
        step: optimizer steps done.

    Returns:
        The checkpoint.

    Raises:
        UserError: there is none, or it is broken; says which steps there are.
    """
    steps = sorted(_steps(root), key=lambda checkpoint: checkpoint.step)
    wanted = next((each for each in steps if each.step == step), None)
    fault = "there is none" if wanted is None else _fault(wanted.path)
    if wanted is not None and fault is None:
        return wanted
    there = ", ".join(str(each.step) for each in steps) or "none"
    raise UserError(
        f"checkpoint of step {step} in {root}: {fault}",
        hint=f"checkpoints kept: {there}; log.ckpt.keep_last=N of a run keeps more",
    )


def delete_old(newest: Checkpoint, keep_last: int) -> None:
    """Delete the checkpoints that a new one makes superfluous.

    Args:
        newest: the checkpoint just written. Any of a later step beside it is a broken one that was
            skipped when the run went on.
        keep_last: how many to keep, the newest included.
    """
    beside = sorted(_steps(newest.path.parent), key=lambda checkpoint: checkpoint.step)
    earlier = [checkpoint for checkpoint in beside if checkpoint.step <= newest.step]
    later = [checkpoint for checkpoint in beside if checkpoint.step > newest.step]
    for checkpoint in [*earlier[:-keep_last], *later]:
        try:
            shutil.rmtree(checkpoint.path)
        except OSError as error:  # a file that another node still holds open on NFS
            log.warning("cannot delete the old checkpoint %s: %s", checkpoint.path, error)


def _steps(root: Path) -> list[Checkpoint]:
    if not root.is_dir():
        return []
    matches = ((path, _STEP.match(path.name)) for path in root.iterdir() if path.is_dir())
    return [Checkpoint(path, int(match[1])) for path, match in matches if match]


def _fault(path: Path) -> str | None:
    """Why the checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((path / _COMPLETE).read_text())["files"]
    except FileNotFoundError:
        return f"no {_COMPLETE}: it was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_COMPLETE} cannot be read ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} was changed after it was written (SHA-256 differs)"
    return None


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that the rename never arrives before the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
