"""Where the examples are: a file, a folder, NeMo's SQuAD, the embedded data or a hub dataset."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.config import DataConfig
from lora_train.data.nemo_squad import prepared_squad
from lora_train.data.row_files import RowFile, read_rows
from lora_train.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
_SPLIT_OF_STEM = {"train": "train", "training": "train", **{n: n for n in _VALIDATION_NAMES}}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Split:
    """Rows that are not read yet: local files, or a table of the `datasets` library."""

    name: str
    """What messages call it."""
    files: tuple[Path, ...] = ()
    """Files, in the order they are read."""
    table: Dataset | None = None
    """Set instead of `files` for what only `datasets` can read."""

    def content_hash(self) -> str:
        """Return a hash of all that the rows are made of: file contents, or the fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        if self.table is not None:
            digest.update(self.table._fingerprint.encode())
        for file in self.files:
            digest.update(file.suffix.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
        return digest.hexdigest()

    def read(self) -> Iterator[RowFile]:
        """Read the rows, file by file.

        Yields:
            The rows of each file.

        Raises:
            UserError: a file cannot be read or holds nothing.
        """
        if self.table is not None:
            yield _table_rows(self.name, self.table)
        for file in self.files:
            if file.suffix.lower() == ".parquet":
                yield _table_rows(str(file), _load_parquet(file))
            else:
                yield read_rows(file)


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
    splits = _splits(data, seed)
    train = _chosen(splits, data.train_split, "data.train_split", data.path)
    if data.validation_path is not None:
        file = Path(data.validation_path).expanduser()
        _check_file(file, "data.validation_path")
        return Sources(train, Split(str(file), (file,)), 0.0)
    if data.validation_split is not None:
        validation = _chosen(splits, data.validation_split, "data.validation_split", data.path)
        return Sources(train, validation, 0.0)
    for name in _VALIDATION_NAMES:
        if name in splits and name != data.train_split:
            return Sources(train, splits[name], 0.0)
    return Sources(train, None, data.validation_size)


def _splits(data: DataConfig, seed: int) -> dict[str, Split]:
    if data.path.startswith("embedded:"):
        from lora_train.quickstart import embedded_path

        return _folder_splits(embedded_path(data.path), None)
    path = Path(data.path).expanduser()
    if path.is_dir():
        return _folder_splits(path, data.subset)
    if path.exists():
        _check_file(path, "data.path")
        return {data.train_split: Split(str(path), (path,))}
    if data.path == "squad":
        return _folder_splits(_squad_folder(seed), None)
    if _looks_local(data.path):
        _check_file(path, "data.path")
    return _hub_splits(data.path, data.subset, data.revision)


def _chosen(splits: Mapping[str, Split], name: str, key: str, where: str) -> Split:
    found = splits.get(_SPLIT_OF_STEM.get(name, name)) or splits.get(name)
    if found is not None:
        return found
    raise UserError(
        f"{key}: {where} has no split {name!r}; it has {', '.join(sorted(splits)) or 'none'}",
        hint=f"{key}={(difflib.get_close_matches(name, splits, n=1) or sorted(splits))[0]}",
    )


def _looks_local(reference: str) -> bool:
    if reference.lower().endswith(_ENDINGS) or not HUB_NAME.fullmatch(reference):
        return True
    parent, _, _ = reference.rpartition("/")
    return bool(parent) and Path(parent).is_dir()


def _check_file(file: Path, key: str) -> None:
    """Refuse a file that is missing, a folder or of an unknown kind."""
    if file.is_dir():
        raise UserError(f"{key}: {file} is a folder; expected a file {' '.join(_ENDINGS)}")
    if file.exists():
        if file.suffix.lower() not in _ENDINGS:
            raise UserError(
                f"{key}: {file} has an unknown ending; expected {' '.join(_ENDINGS)}",
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
    data = [name for name in names if name.lower().endswith(_ENDINGS)]
    shown = ", ".join(data[:10]) or f"no file {' '.join(_ENDINGS)}"
    raise UserError(
        f"{key}: {file} does not exist; {folder.absolute()} holds {shown}",
        hint=f"{key}=FILE with a file that exists",
    )


def _folder_splits(folder: Path, subset: str | None) -> dict[str, Split]:
    """Find the splits of a local folder: by their file names, else as `datasets` finds them."""
    named: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _ENDINGS and file.stem in _SPLIT_OF_STEM and file.is_file():
            named.setdefault(_SPLIT_OF_STEM[file.stem], []).append(file)
    for name, files in named.items():
        if len(files) > 1:
            raise UserError(
                f"data.path: several files for the split {name}: {', '.join(map(str, files))}",
                hint=f"data.path={files[0]}",
            )
    if "train" in named and subset is None:
        return {name: Split(str(files[0]), tuple(files)) for name, files in named.items()}
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        import datasets

        return _tables(datasets.load_from_disk(str(folder)), str(folder))
    return _folder_by_datasets(folder, subset)


def _folder_by_datasets(folder: Path, subset: str | None) -> dict[str, Split]:
    import datasets
    from datasets.data_files import EmptyDatasetError

    try:
        builder = datasets.load_dataset_builder(str(folder), name=subset)
        files_by_split = {
            str(split): tuple(Path(file) for file in files)
            for split, files in (builder.config.data_files or {}).items()
        }
        every_file = [file for files in files_by_split.values() for file in files]
        if every_file and all(file.suffix.lower() in _ENDINGS for file in every_file):
            return {
                name: Split(f"{folder} ({name})", files) for name, files in files_by_split.items()
            }
        return _tables(datasets.load_dataset(str(folder), name=subset), str(folder))
    except EmptyDatasetError:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise UserError(
            f"data.path: no data in the folder {folder}; looked for train, training, validation or"
            f" test with {' '.join(_ENDINGS)}, and for a hub dataset's folder; it holds {held}",
            hint="data.path=FILE names a single file",
        ) from None
    except Exception as error:
        raise UserError(
            f"data.path: datasets cannot read the folder {folder}: {_first_line(error)}",
            hint="data.subset=NAME"
            if "BuilderConfig" in str(error) or "Config name" in str(error)
            else "data.path=FILE names a single file",
        ) from error


def _squad_folder(seed: int) -> Path:
    def load() -> Mapping[str, Any]:
        try:
            return _load_hub("rajpurkar/squad", None, None)
        except UserError as error:
            raise UserError(
                f"data.path=squad: no training.jsonl in NeMo's folder, and {error.message}",
                hint="set NEMO_DATASETS_CACHE to a folder that has squad/training.jsonl,"
                " or run once where the hub can be reached",
            ) from error

    try:
        return prepared_squad(load, seed)
    except OSError as error:
        raise UserError(
            f"data.path=squad: cannot write NeMo's files: {error}",
            hint="set NEMO_DATASETS_CACHE to a folder that can be written",
        ) from error


def _hub_splits(name: str, subset: str | None, revision: str | None) -> dict[str, Split]:
    return _tables(_load_hub(name, subset, revision), name)


def _load_hub(name: str, subset: str | None, revision: str | None) -> Mapping[str, Any]:
    import datasets

    try:
        return datasets.load_dataset(name, name=subset, revision=revision)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        offline = [f"{key}={os.environ[key]}" for key in _OFFLINE_VARIABLES if os.environ.get(key)]
        what = f"not found offline ({', '.join(offline)})" if offline else _first_line(error)
        raise UserError(
            f"data.path: {name} is no file or folder here, and as a hub dataset: {what}",
            hint="offline a hub dataset is found by its name only in the cache of the datasets"
            " library (HF_DATASETS_CACHE), and a downloaded snapshot is not in it; name its folder:"
            " data.path=<snapshot folder>, which `hf download --repo-type dataset` prints",
        ) from error
    except Exception as error:
        available = re.search(r"Available: (\[.*\])|: (\[.*\])", str(error), re.DOTALL)
        hint = (
            f"data.subset= one of {available.group(1) or available.group(2)}" if available else None
        )
        raise UserError(
            f"data.path: the hub dataset {name} cannot be loaded: {_first_line(error)}", hint=hint
        ) from error


def _tables(loaded: Any, name: str) -> dict[str, Split]:
    if not isinstance(loaded, Mapping):
        return {"train": Split(name, table=loaded)}
    return {str(split): Split(f"{name} ({split})", table=table) for split, table in loaded.items()}


def _load_parquet(file: Path) -> Dataset:
    import datasets

    try:
        return datasets.Dataset.from_parquet(str(file))
    except Exception as error:
        raise UserError(f"cannot read {file} as Parquet: {_first_line(error)}") from error


def _table_rows(name: str, table: Dataset) -> RowFile:
    rows = table.to_list()
    if not rows:
        raise UserError(f"{name} holds no rows")
    return RowFile(name, rows, list(range(1, len(rows) + 1)), from_table=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
