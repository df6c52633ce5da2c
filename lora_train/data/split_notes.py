"""Which files of a folder make which split, noted when all of them were there.

A folder that was cut off while it was fetched or copied looks like a smaller dataset; beside these
notes it does not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.paths import atomic_file

# in a folder of data
NOTES = "lora_splits.json"
_FORMAT = 1
# of a `datasets.BuilderConfig`: what says nothing of how files are read
_ONLY_NAMING = {"name", "version", "data_dir", "data_files", "description", "features"}


@dataclass(frozen=True)
class SplitNotes:
    """Which files make which split."""

    name: str
    """The dataset's name on the hub, or where its files came from."""
    commit: str | None
    """The commit that they are of; None: they are of no hub."""
    subset: str | None
    """The configuration that was asked for."""
    splits: dict[str, list[str]]
    """Split to paths in the folder, in the order that they are read."""
    sizes: dict[str, int]
    """Path to bytes."""
    needs_card: bool
    """Whether the dataset's card tells how to read them, such as by another separator."""

    def write(self, file: Path) -> None:
        """Write the notes; the file appears whole or not at all."""
        with atomic_file(file) as unfinished:
            unfinished.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    def damaged(self, folder: Path) -> list[str]:
        """Return the files of a folder that are missing or of another size, in words."""
        found = []
        for path, size in sorted(self.sizes.items()):
            try:
                there = (folder / path).stat().st_size
            except OSError:
                found.append(f"{path} is missing")
            else:
                if there != size:
                    found.append(f"{path} has {there} bytes instead of {size}")
        return found

    def files(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        """Return the files of each split."""
        return {
            split: tuple(folder / path for path in paths) for split, paths in self.splits.items()
        }


def needs_card(config: Any) -> bool:
    """Tell whether a dataset's card changes how its files are read.

    Args:
        config: the `datasets.BuilderConfig` that was made of the card.

    Returns:
        False: its card names files, and types at most, which our own readers leave as written.
    """
    plain = type(config)()
    told_apart = {each.name for each in fields(config)} - _ONLY_NAMING
    return any(getattr(config, name) != getattr(plain, name) for name in told_apart)


def read_notes(file: Path) -> SplitNotes | None:
    """Read what `SplitNotes.write` wrote.

    Args:
        file: where it should be.

    Returns:
        The notes; None if there are none.

    Raises:
        UserError: the file is there, and is not what was written.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError("another format")
        return SplitNotes(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as the list of a dataset's files: {error}",
            hint="fetch the data again with lora-train prefetch, or copy it again",
        ) from error
