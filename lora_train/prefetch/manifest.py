"""What was fetched, as JSON beside it: every file with size and hash; and checking it later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.paths import atomic_file, sha256_of

# of a bundle, in its folder
NAME = "manifest.json"
_FORMAT = 1
_MOST_NAMED = 50


@dataclass(frozen=True)
class FileEntry:
    """One file."""

    path: str
    """Relative to the folder that it was fetched into."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Fetched:
    """The model, the data, or a file beside them."""

    role: str
    """model, data, validation or chat_template."""
    kind: str
    """hub, squad, embedded, local, or gguf: a file that was converted."""
    name: str
    """As configured; of the hub, org/name."""
    requested: str | None
    """Branch, tag or commit that was asked for. None: main, or no revision at all."""
    commit: str | None
    """What it stood for. None: not of the hub."""
    folder: str
    """Where the files are; in a bundle relative to the manifest."""
    path: str
    """What the run's key is set to; in a bundle relative to the manifest."""
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """All that one prefetch fetched."""

    version: str
    """Of lora-train."""
    words: tuple[str, ...]
    """The words of the run, as given."""
    is_bundle: bool
    """Whether paths are relative to the manifest."""
    fetched: tuple[Fetched, ...]

    def write(self, file: Path) -> None:
        """Write it; the file appears whole or not at all."""
        content = {"format_version": _FORMAT, **asdict(self)}
        with atomic_file(file) as unfinished:
            text = json.dumps({**content, "sha256": _own_hash(content)}, indent=1)
            unfinished.write_text(text + "\n")


def read_manifest(file: Path) -> Manifest:
    """Read a manifest.

    Args:
        file: manifest.json of a bundle, or what a prefetch into the hub cache wrote.

    Returns:
        What was fetched.

    Raises:
        UserError: it is not there, or not as it was written.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        written = content.pop("sha256")
        version = content.pop("format_version")
    except FileNotFoundError:
        raise UserError(
            f"there is no {file}",
            hint="`lora-train prefetch` writes it last: give the command again that was to make it",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no manifest of lora-train prefetch: {error}",
                        hint="copy it again") from error  # fmt: skip
    if version != _FORMAT:
        raise UserError(
            f"{file} has format version {version}, this lora-train reads {_FORMAT}",
            hint=f"use lora-train {content.get('version')}, or fetch again",
        )
    if written != _own_hash({"format_version": version, **content}):
        raise UserError(
            f"{file} was changed since it was written: its hash is another",
            hint="copy it again from where it was made",
        )
    try:
        return _as_manifest(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no manifest of lora-train prefetch: {error}") from error


def folder_of(fetched: Fetched, place: Path) -> Path:
    """Return where the files are.

    Args:
        fetched: what was fetched.
        place: the folder of the manifest.

    Returns:
        Their folder; in a bundle below `place`.
    """
    return place / fetched.folder  # an absolute one stays as it is


def check_files(manifest: Manifest, place: Path) -> list[str]:
    """Compare every file with its hash; reads all of them.

    Args:
        manifest: what was fetched.
        place: the folder of the manifest.

    Returns:
        Each file that is missing, cut off, changed or one too many, in words; empty: all is well.
    """
    found = []
    for fetched in manifest.fetched:
        folder = folder_of(fetched, place)
        for file in fetched.files:
            wrong = _size_problem(folder / file.path, file.size)
            if wrong is None and sha256_of(folder / file.path) != file.sha256:
                wrong = "was changed: its sha256 is another"
            if wrong is not None:
                found.append(f"{folder / file.path} {wrong}")
        if manifest.is_bundle:
            known = {file.path for file in fetched.files}
            # a weight file too many may be loaded in place of the others
            found += [f"{folder / path} does not belong there" for path in paths_in(folder, known)]
    return found


def is_manifest(file: Path) -> bool:
    """Tell whether a file is a manifest, and no other program's file of that name."""
    try:
        read_manifest(file)
    except UserError:
        return False
    return True


def of_bundle(folder: Path) -> Fetched | None:
    """Return what a folder of a bundle holds.

    Args:
        folder: perhaps the folder `model` or `data` of a bundle.

    Returns:
        What was fetched into it; None: it is in no bundle.
    """
    try:
        manifest = read_manifest(folder.absolute().parent / NAME)
    except UserError:
        return None
    held = (each for each in manifest.fetched if each.folder == folder.absolute().name)
    return next(held, None) if manifest.is_bundle else None


def quick_problems(folder: Path) -> list[str]:
    """Compare the sizes of the files in a folder of a bundle, in milliseconds.

    Args:
        folder: perhaps the folder `model` or `data` of a bundle.

    Returns:
        Files that are missing or of another size, in words; empty as well where there is no bundle.
    """
    fetched = of_bundle(folder)
    return [
        f"{file.path} {wrong}"
        for file in (fetched.files if fetched else ())
        if (wrong := _size_problem(folder / file.path, file.size))
    ]


def refuse_damaged(problems: list[str], where: Path, mend: str) -> None:
    """Refuse files that are not what was fetched, all of them by name.

    Args:
        problems: what is wrong, in words.
        where: the bundle or manifest.
        mend: the line that mends it.

    Raises:
        UserError: there is at least one.
    """
    if problems:
        lines = problems[:_MOST_NAMED]
        if len(problems) > len(lines):
            lines.append(f"and {len(problems) - len(lines)} more")
        raise UserError(
            f"{len(problems)} files of {where} are not what was fetched:\n  " + "\n  ".join(lines),
            hint=mend,
        )


def paths_in(folder: Path, known: set[str]) -> list[str]:
    """Return the files below a folder that are not known, less hidden ones."""
    return sorted(
        path
        for path in _walk(folder)
        if path not in known and not any(part.startswith(".") for part in Path(path).parts)
    )


def _walk(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield str((Path(root) / name).relative_to(folder))


def _size_problem(file: Path, size: int) -> str | None:
    try:
        there = file.stat().st_size
    except OSError:
        return "is missing"
    if there == size:
        return None
    return f"is {'cut off' if there < size else 'too long'}: {there} bytes instead of {size}"


def _own_hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _as_manifest(content: dict[str, Any]) -> Manifest:
    fetched = tuple(
        Fetched(**{**each, "files": tuple(FileEntry(**file) for file in each["files"])})
        for each in content["fetched"]
    )
    return Manifest(**{**content, "words": tuple(content["words"]), "fetched": fetched})
