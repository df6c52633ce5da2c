"""Bringing files into the hub cache or a bundle: what is whole stays, every hash is checked."""

from __future__ import annotations

import contextlib
import errno
import glob
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from lora_train.config import Config
from lora_train.data.hub_dataset import dataset_error, keep_reference, notes_file
from lora_train.data.split_notes import NOTES
from lora_train.errors import UserError
from lora_train.model_source import loading_error
from lora_train.paths import atomic_file, sha256_of
from lora_train.prefetch.contents import ROLES, Part, RemoteFile, unreachable_or
from lora_train.prefetch.manifest import NAME, Fetched, FileEntry, is_manifest, paths_in
from lora_train.preflight.findings import in_bytes
from lora_train.preflight.folders import existing_parent, free_bytes
from lora_train.preflight.hub import hub_cache

_LOCK = ".prefetch.lock"
# what Hugging Face's library leaves in a folder that it downloads into
_LIBRARY_FOLDER = ".cache"


@dataclass
class _Survey:
    """What is there of a part, and what is not."""

    part: Part
    folder: Path
    whole: dict[str, FileEntry] = field(default_factory=dict)
    missing: list[RemoteFile] = field(default_factory=list)
    uncopied: list[str] = field(default_factory=list)

    @property
    def missing_bytes(self) -> int:
        return sum(file.size for file in self.missing) + sum(
            self.part.local[path].stat().st_size for path in self.uncopied
        )


def open_bundle(folder: Path) -> None:
    """Make the folder of a bundle, or take one that is there.

    Args:
        folder: what `--bundle` names.

    Raises:
        UserError: it holds something else, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in folder.iterdir())
        # what is in a bundle and is not fetched is removed: never out of a folder of another kind
        if held and _LOCK not in held and not is_manifest(folder / NAME):
            raise UserError(
                f"--bundle {folder} is no bundle: it holds {', '.join(held[:4])}",
                hint="name a folder that is empty or does not exist yet",
            )
        (folder / _LOCK).touch()
    except OSError as error:
        raise UserError(
            f"--bundle {folder} cannot be made or written: {error.strerror or error}",
            hint="--bundle DIR with a folder on project or scratch storage",
        ) from error


@contextlib.contextmanager
def one_at_a_time(bundle: Path | None, name: str) -> Iterator[None]:
    """Let the prefetches into one place go one after another, where its file system has locks.

    Where it has none, two fetch the same twice: each file appears by renaming.

    Args:
        bundle: the bundle. None: the hub cache.
        name: of what is fetched into the hub cache.
    """
    file = bundle / _LOCK if bundle else hub_cache() / ".locks" / f"lora-train-{name}.lock"
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(
            f"another prefetch holds {file}: waiting for its end; if none runs, remove that file",
            file=sys.stderr,
        )
        lock.acquire()
    except OSError as error:
        print(f"going on without a lock: {file}: {error.strerror or error}", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def fetch(parts: Sequence[Part], config: Config, bundle: Path | None) -> list[Fetched]:
    """Fetch what is not there yet, and check every file by its hash.

    Args:
        parts: what is to be there.
        config: the run, for messages.
        bundle: where to. None: the hub cache; what is here already stays where it is.

    Returns:
        What is there now.

    Raises:
        UserError: too little room; the hub refuses or fails; a file is not what the hub lists.
    """
    surveys = [_survey(part, bundle) for part in parts]
    _check_room(surveys, bundle)
    with _explained():
        if bundle is not None:
            _clear(surveys, bundle)
        for survey in surveys:
            _download(survey, config, bundle)
            for path in survey.uncopied:
                survey.whole[path] = _copy(survey.part.local[path], survey.folder / path, path)
            _note_splits(survey, bundle)
    return [_fetched(survey, bundle) for survey in surveys]


def _survey(part: Part, bundle: Path | None) -> _Survey:
    if bundle is None and part.local:
        path, file = next(iter(part.local.items()))
        survey = _Survey(part, file.absolute().parents[len(Path(path).parts) - 1])
        for path, file in part.local.items():
            survey.whole[path] = FileEntry(path, file.stat().st_size, sha256_of(file))
        return survey
    survey = _Survey(part, bundle / part.role if bundle else _snapshot(part))
    if any((survey.folder / remote.path).is_file() for remote in part.remote):
        print(f"{part.name}: comparing what is there with the hub's hashes", file=sys.stderr)
    for remote in part.remote:
        file = survey.folder / remote.path
        if file.is_file():
            entry, wrong = remote.read(file)
            if wrong is None:
                survey.whole[remote.path] = entry
                continue
            print(f"{file} is fetched again: {wrong}", file=sys.stderr)
        survey.missing.append(remote)
    for path, source in part.local.items():
        file = survey.folder / path
        if file.is_file() and file.stat().st_size == source.stat().st_size:
            digest = sha256_of(source)
            if sha256_of(file) == digest:
                survey.whole[path] = FileEntry(path, file.stat().st_size, digest)
                continue
        survey.uncopied.append(path)
    return survey


def _check_room(surveys: Sequence[_Survey], bundle: Path | None) -> None:
    needed: dict[int, int] = defaultdict(int)
    for survey in surveys:
        needed[existing_parent(survey.folder).stat().st_dev] += survey.missing_bytes
    for survey in surveys:
        place = existing_parent(survey.folder)
        need, free = needed[place.stat().st_dev], free_bytes(place)
        if free is not None and free < need:
            mend = "--bundle DIR on" if bundle else "export HF_HOME=/path/on"
            raise UserError(
                f"too little room: {in_bytes(need)} are to be fetched into "
                f"{bundle or hub_cache()}, and {in_bytes(free)} are free there",
                hint=f"{mend} a file system with room",
            )


def _clear(surveys: Sequence[_Survey], bundle: Path) -> None:
    """Take from a bundle what is of an earlier one; an unfinished bundle has no manifest."""
    (bundle / NAME).unlink(missing_ok=True)
    for role in ROLES:
        keep = next((survey for survey in surveys if survey.part.role == role), None)
        known = {file.path for file in keep.part.remote} | set(keep.part.local) if keep else set()
        for path in paths_in(bundle / role, known):
            (bundle / role / path).unlink()


def _download(survey: _Survey, config: Config, bundle: Path | None) -> None:
    part = survey.part
    for file in survey.missing:  # the library would take a damaged one for whole
        _remove(survey.folder / file.path)
    if survey.missing:
        try:
            snapshot_download(
                part.name,
                repo_type=part.repository_kind,
                revision=part.commit,
                allow_patterns=[glob.escape(file.path) for file in survey.missing],
                local_dir=survey.folder if bundle else None,
                cache_dir=hub_cache(),
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _explain(error, part, config) from error
        except Exception as error:
            raise _explain(error, part, config) from error
        size = in_bytes(sum(file.size for file in survey.missing))
        print(f"{part.name}: comparing {size} with the hashes of the hub", file=sys.stderr)
    problems = []
    for file in survey.missing:
        there = survey.folder / file.path
        if not there.is_file():
            problems.append(f"{file.path}: did not come")
            continue
        survey.whole[file.path], wrong = file.read(there)
        if wrong is not None:
            _remove(there)
            problems.append(f"{file.path}: {wrong}")
    if problems:
        raise UserError(
            f"{part.name}: what the hub gave is not what it lists, and was removed:\n  "
            + "\n  ".join(problems),
            hint="give the same command again; if it stays so, a proxy or mirror on the way "
            "changes files: ask who runs it",
        )
    if bundle is not None:
        shutil.rmtree(survey.folder / _LIBRARY_FOLDER, ignore_errors=True)


def _explain(error: Exception, part: Part, config: Config) -> UserError:
    return unreachable_or(
        error,
        part.name,
        lambda other: (
            loading_error(other, config.model)
            if part.role == "model"
            else dataset_error(other, part.name, part.requested)
        ),
    )


def _note_splits(survey: _Survey, bundle: Path | None) -> None:
    part = survey.part
    if bundle is None and part.commit is not None and part.remote:
        keep_reference(part.name, part.requested, part.commit, kind=part.repository_kind)
    if part.notes is None or (bundle is None and not part.remote):
        return
    paths = [path for files in part.notes.splits.values() for path in files]
    notes = replace(part.notes, sizes={path: survey.whole[path].size for path in paths})
    if bundle is None:
        assert part.commit is not None
        notes.write(notes_file(part.name, part.commit, notes.subset))
        return
    file = survey.folder / NOTES
    notes.write(file)
    survey.whole[NOTES] = FileEntry(NOTES, file.stat().st_size, sha256_of(file))


def _fetched(survey: _Survey, bundle: Path | None) -> Fetched:
    part = survey.part
    files = tuple(entry for _, entry in sorted(survey.whole.items()))
    if bundle is None:
        path = part.name if part.kind != "squad" else "squad"
        folder = str(survey.folder.absolute())
    else:
        is_file = part.role not in ("model", "data")
        path = f"{part.role}/{files[0].path}" if is_file else part.role
        folder = part.role
    return Fetched(
        part.role, part.kind, part.name, part.requested, part.commit, folder, path, files
    )


def _snapshot(part: Part) -> Path:
    repository = f"{part.repository_kind}s--{part.name.replace('/', '--')}"
    return hub_cache() / repository / "snapshots" / (part.commit or "")


def _copy(source: Path, destination: Path, path: str) -> FileEntry:
    with atomic_file(destination) as unfinished:
        shutil.copyfile(source, unfinished)
    return FileEntry(path, destination.stat().st_size, sha256_of(destination))


def _remove(file: Path) -> None:
    """Remove a file; of the hub cache, also the blob that it is a link to."""
    content = file.resolve()
    file.unlink(missing_ok=True)
    if content.parent.name == "blobs":
        content.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"cannot write {error.filename or 'what is fetched'}: {error.strerror or error}",
            hint="free some room, or name another place; the same command goes on: complete files "
            "are kept"
            if full
            else "--bundle DIR, or export HF_HOME=DIR, with a folder that can be written",
        ) from error
