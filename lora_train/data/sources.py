"""Where the examples are: a file, a folder, NeMo's SQuAD, the embedded data or a hub dataset."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.config import DataConfig
from lora_train.data.hub_dataset import find_snapshot, load_tables
from lora_train.data.nemo_squad import SQUAD_ON_HUB, prepared_squad
from lora_train.data.splits import (
    ENDINGS,
    SPLIT_OF_STEM,
    VALIDATION_NAMES,
    Split,
    folder_by_datasets,
    folder_splits,
    noted_splits,
    tables,
)
from lora_train.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Sources:
    """What to train on and what to validate on."""

    train: Split
    """Rows to train on."""
    validation: Split | None
    """Rows to validate on, if the data has its own."""
    held_out_fraction: float
    """Fraction of the training rows to hold out instead, 0..1; 0 if there is a validation split."""


def find_sources(data: DataConfig, seed: int) -> Sources:
    """Find the training and the validation rows.

    Args:
        data: the data section.
        seed: seed of SQuAD's split, when NeMo's files must be made first.

    Returns:
        Splits that are not read yet.

    Raises:
        UserError: something does not exist or cannot be reached; says what was looked for.
    """
    splits = find_splits(data, seed)
    train = _chosen(splits, data.train_split, "data.train_split", data.path)
    if data.validation_path is not None:
        file = Path(data.validation_path).expanduser()
        _check_file(file, "data.validation_path")
        return Sources(train, Split(str(file), (file,)), 0.0)
    if data.validation_split is not None:
        validation = _chosen(splits, data.validation_split, "data.validation_split", data.path)
        return Sources(train, validation, 0.0)
    for name in VALIDATION_NAMES:
        if name in splits and name != data.train_split:
            return Sources(train, splits[name], 0.0)
    return Sources(train, None, data.validation_size)


def find_split(data: DataConfig, name: str | None, seed: int) -> Split:
    """Find the rows to evaluate on.

    Args:
        data: the data section; `path`, `subset` and `revision` are read.
        name: the split. None: test, else a validation split, else the only one there is.
        seed: seed of SQuAD's split, when NeMo's files must be made first.

    Returns:
        A split that is not read yet.

    Raises:
        UserError: something does not exist or cannot be reached, or there are several splits and
            none of these names.
    """
    splits = find_splits(data, seed)
    if name is None:
        usual = [each for each in ("test", *VALIDATION_NAMES) if each in splits]
        if not usual and len(splits) > 1:
            raise UserError(
                f"{data.path} has the splits {', '.join(sorted(splits))}, and none is a test or "
                "validation split",
                hint=f"--split {sorted(splits)[0]}",
            )
        name = next(iter(usual or splits))
    return _chosen(splits, name, "--split", data.path)


def find_splits(data: DataConfig, seed: int) -> dict[str, Split]:
    """Find all splits of `data.path`, by name.

    Args:
        data: the data section; `path`, `subset` and `revision` are read.
        seed: seed of SQuAD's split, when NeMo's files must be made first.

    Returns:
        Splits that are not read yet.

    Raises:
        UserError: something does not exist or cannot be reached.
    """
    if data.path.startswith("embedded:"):
        from lora_train.quickstart import embedded_path

        return folder_splits(embedded_path(data.path), None)
    path = Path(data.path).expanduser()
    if path.is_dir():
        return folder_splits(path, data.subset)
    if path.exists():
        _check_file(path, "data.path")
        return {data.train_split: Split(str(path), (path,))}
    if data.path == "squad":
        return folder_splits(_squad_folder(seed), None)
    if _looks_local(data.path):
        _check_file(path, "data.path")
    return _hub_splits(data.path, data.subset, data.revision)


def _chosen(splits: Mapping[str, Split], name: str, key: str, where: str) -> Split:
    found = splits.get(SPLIT_OF_STEM.get(name, name)) or splits.get(name)
    if found is not None:
        return found
    raise UserError(
        f"{key}: {where} has no split {name!r}; it has {', '.join(sorted(splits)) or 'none'}",
        hint=f"{key}={(difflib.get_close_matches(name, splits, n=1) or sorted(splits))[0]}",
    )


def _looks_local(reference: str) -> bool:
    if reference.lower().endswith(ENDINGS) or not HUB_NAME.fullmatch(reference):
        return True
    parent, _, _ = reference.rpartition("/")
    return bool(parent) and Path(parent).is_dir()


def _check_file(file: Path, key: str) -> None:
    """Refuse a file that is missing, a folder or of an unknown kind."""
    if file.is_dir():
        raise UserError(f"{key}: {file} is a folder; expected a file {' '.join(ENDINGS)}")
    if file.exists():
        if file.suffix.lower() not in ENDINGS:
            raise UserError(
                f"{key}: {file} has an unknown ending; expected {' '.join(ENDINGS)}",
                hint=f"if it holds one JSON object per line, name it {file.with_suffix('.jsonl')}",
            )
        return
    folder = file.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != file.parent:
        raise UserError(
            f"{key}: {file} does not exist; its folder neither, only {folder.absolute()} does",
            hint="inside a container only bound folders are seen: apptainer --bind, docker -v",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(file.name, names, n=1)
    if near:
        raise UserError(f"{key}: {file} does not exist", hint=f"did you mean {folder / near[0]}?")
    data = [name for name in names if name.lower().endswith(ENDINGS)]
    shown = ", ".join(data[:10]) or f"no file {' '.join(ENDINGS)}"
    raise UserError(
        f"{key}: {file} does not exist; {folder.absolute()} holds {shown}",
        hint=f"{key}=FILE with a file that exists",
    )


def _squad_folder(seed: int) -> Path:
    def load() -> Mapping[str, Any]:
        try:
            return _load_hub(SQUAD_ON_HUB, None, None)
        except UserError as error:
            raise UserError(
                f"data.path=squad: no training.jsonl in NeMo's folder, and {error.message}",
                hint="set NEMO_DATASETS_CACHE to a folder that has squad/training.jsonl, or on a"
                " node with network: HF_HUB_OFFLINE=0 lora-train prefetch, then this run's words",
            ) from error

    try:
        return prepared_squad(load, seed)
    except OSError as error:
        raise UserError(
            f"data.path=squad: cannot write NeMo's files: {error}",
            hint="set NEMO_DATASETS_CACHE to a folder that can be written",
        ) from error


def _hub_splits(name: str, subset: str | None, revision: str | None) -> dict[str, Split]:
    snapshot = find_snapshot(name, subset, revision)
    if snapshot is None:
        return tables(load_tables(name, subset, revision), name)
    if snapshot.notes is None:
        return folder_by_datasets(snapshot.folder, subset)
    return noted_splits(snapshot.folder, snapshot.notes, name)


def _load_hub(name: str, subset: str | None, revision: str | None) -> Mapping[str, Any]:
    """Load a hub dataset as tables, whatever its files are."""
    import datasets

    snapshot = find_snapshot(name, subset, revision)
    if snapshot is None:
        return load_tables(name, subset, revision)
    files = snapshot.notes.splits if snapshot.notes else None
    loaded: Mapping[str, Any] = datasets.load_dataset(
        str(snapshot.folder), name=subset, data_files=files
    )
    return loaded
