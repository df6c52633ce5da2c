"""Where an evaluation is written, and what is written there already."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lora_train.data.splits import ENDINGS
from lora_train.errors import RunError, UserError
from lora_train.paths import atomic_file
from lora_train.recorded_run import RecordedRun

logger = logging.getLogger(__name__)

# file systems end at 255 bytes; many tasks make a long name
_LONGEST_NAME = 150


class ResultFiles(NamedTuple):
    """What an evaluation writes."""

    rows: Path
    """A JSON line for each row."""
    summary: Path
    """The figures, as a JSON object."""


def name_of(source: str) -> str:
    """Return what names call a file, a folder or something of the hub, in short."""
    path = Path(source)
    return path.stem if path.suffix.lower() in ENDINGS else path.name or source


def result_files(run: RecordedRun | None, name: str, output: Path | None) -> ResultFiles:
    """Return where results go, having seen that they can be written and replace nothing else.

    Args:
        run: the run, whose directory holds them.
        name: of the evaluation.
        output: the file of the rows, .jsonl; None: beside the summary.

    Returns:
        `eval_NAME.jsonl` and `eval_NAME.json` in the run directory, without a run in the current
        folder; with `output` the rows there, and where the run directory cannot be written, or
        there is none, the summary beside them.

    Raises:
        UserError: a folder does not exist or cannot be written, or a file is there that no
            evaluation has written.
    """
    folder = Path() if run is None else run.path
    name = re.sub(r"[^\w.-]+", "-", name)[:_LONGEST_NAME]
    if output is None:
        _check_folder(folder)
        return ResultFiles(folder / f"eval_{name}.jsonl", folder / f"eval_{name}.json")
    _check_folder(output.parent)
    files = ResultFiles(output, output.with_suffix(".json"))
    if any(file.exists() and not _is_result(file) for file in files):
        raise UserError(
            f"--output {output}: it or {files.summary.name} is there, and no evaluation wrote it",
            hint="--output ANOTHER.jsonl",
        )
    if run is None or not os.access(folder, os.W_OK):
        return files
    return ResultFiles(output, folder / f"eval_{name}.json")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} for the results does not exist", hint=f"mkdir -p {folder}"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"results cannot be written into {folder}",
            hint="--output FILE.jsonl in a folder of yours",
        )


def _is_result(file: Path) -> bool:
    """Whether an evaluation wrote a file of rows or a summary."""
    if file.suffix == ".json":
        return "fingerprint" in (read_summary(file) or {})
    try:
        with file.open(encoding="utf-8") as stream:
            return {"place", "prompt", "references"} <= json.loads(stream.readline()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def set_aside(files: Iterable[Path]) -> None:
    """Keep an earlier evaluation of the same name, in place of the one before."""
    for file in files:
        if file.exists():
            aside = file.with_name(f"{file.name}.old")
            file.replace(aside)
            logger.warning("%s was of another evaluation: that is now %s", file, aside.name)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all.

    Args:
        file: replaced if it is there.
        text: its content.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    try:
        with atomic_file(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write {file}: {error.strerror}",
            hint="make room, then give the same command again: what was measured is kept",
        ) from error


def read_summary(file: Path) -> dict[str, Any] | None:
    """Return the summary of an earlier evaluation, or None."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
