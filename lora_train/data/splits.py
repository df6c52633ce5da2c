"""Rows that are not read yet: of files, of a folder's files, or a table of `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.data.hub_dataset import first_line
from lora_train.data.row_files import RowFile, read_rows
from lora_train.data.split_notes import NOTES, SplitNotes, needs_card, read_notes
from lora_train.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
SPLIT_OF_STEM = {"train": "train", "training": "train", **{n: n for n in VALIDATION_NAMES}}


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


def folder_splits(folder: Path, subset: str | None) -> dict[str, Split]:
    """Find the splits of a folder: as noted, by file names, or as `datasets` finds them.

    Args:
        folder: the folder.
        subset: the dataset's configuration. None: the default one.

    Returns:
        Splits by name.

    Raises:
        UserError: there are none, or files that were noted are not there.
    """
    notes = read_notes(folder / NOTES)
    if notes is not None:
        if subset not in (None, notes.subset):
            raise UserError(
                f"data.subset={subset}: {folder} holds {notes.subset or 'the default one'} only",
                hint="leave data.subset out, or fetch the other one with lora-train prefetch",
            )
        if damaged := notes.damaged(folder):
            raise UserError(
                f"data.path: {folder} is not what was fetched: {', '.join(damaged)}",
                hint="copy it again, or fetch it again with lora-train prefetch",
            )
        return noted_splits(folder, notes, str(folder))
    named: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in ENDINGS and file.stem in SPLIT_OF_STEM and file.is_file():
            named.setdefault(SPLIT_OF_STEM[file.stem], []).append(file)
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

        return tables(datasets.load_from_disk(str(folder)), str(folder))
    return folder_by_datasets(folder, subset)


def folder_by_datasets(folder: Path, subset: str | None) -> dict[str, Split]:
    """Find the splits of a folder as `datasets` does, which reads a dataset's card.

    Args:
        folder: a folder that is laid out as a dataset of the hub.
        subset: the dataset's configuration. None: the default one.

    Returns:
        Splits by name; as files wherever these say all.

    Raises:
        UserError: there is no data, or the library cannot read it.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError

    try:
        builder = datasets.load_dataset_builder(str(folder), name=subset)
        files_by_split = {
            str(split): tuple(Path(file) for file in files)
            for split, files in (builder.config.data_files or {}).items()
        }
        every_file = [file for files in files_by_split.values() for file in files]
        if every_file and _are_plain(every_file) and not needs_card(builder.config):
            return {
                name: Split(f"{folder} ({name})", files) for name, files in files_by_split.items()
            }
        return tables(datasets.load_dataset(str(folder), name=subset), str(folder))
    except EmptyDatasetError:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise UserError(
            f"data.path: no data in the folder {folder}; looked for train, training, validation or"
            f" test with {' '.join(ENDINGS)}, and for a hub dataset's folder; it holds {held}",
            hint="data.path=FILE names a single file",
        ) from None
    except Exception as error:
        raise UserError(
            f"data.path: datasets cannot read the folder {folder}: {first_line(error)}",
            hint="data.subset=NAME"
            if "BuilderConfig" in str(error) or "Config name" in str(error)
            else "data.path=FILE names a single file",
        ) from error


def noted_splits(folder: Path, notes: SplitNotes, name: str) -> dict[str, Split]:
    """Return the splits that the notes on a folder tell.

    Args:
        folder: where the files are.
        notes: which files make which split.
        name: what messages call the dataset.

    Returns:
        Splits by name.
    """
    files_by_split = notes.files(folder)
    every_file = [file for files in files_by_split.values() for file in files]
    if _are_plain(every_file) and not notes.needs_card:
        return {split: Split(f"{name} ({split})", files) for split, files in files_by_split.items()}
    import datasets

    loaded = datasets.load_dataset(str(folder), name=notes.subset, data_files=notes.splits)
    return tables(loaded, name)


def tables(loaded: Any, name: str) -> dict[str, Split]:
    """Return what `datasets` loaded, one table or several by name, as splits."""
    if not isinstance(loaded, Mapping):
        return {"train": Split(name, table=loaded)}
    return {str(split): Split(f"{name} ({split})", table=table) for split, table in loaded.items()}


def _are_plain(files: Iterable[Path]) -> bool:
    """Whether our own readers know these files."""
    return all(file.suffix.lower() in ENDINGS for file in files)


def _load_parquet(file: Path) -> Dataset:
    import datasets

    try:
        return datasets.Dataset.from_parquet(str(file))
    except Exception as error:
        raise UserError(f"cannot read {file} as Parquet: {first_line(error)}") from error


def _table_rows(name: str, table: Dataset) -> RowFile:
    rows = table.to_list()
    if not rows:
        raise UserError(f"{name} holds no rows")
    return RowFile(name, rows, list(range(1, len(rows) + 1)), from_table=True)
