"""A dataset of the hub as the files of its splits, the same with network and without.

`datasets.load_dataset("org/name")` finds nothing offline but its own tables, those made last,
whatever the revision; and a snapshot that was cut off in the middle looks like a smaller dataset.
So the files of each split are noted beside a snapshot once they are all there, and what is noted is
read.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_train.data.split_notes import SplitNotes, needs_card, read_notes
from lora_train.errors import UserError
from lora_train.paths import atomic_file
from lora_train.preflight.hub import cached_commit, has_cached_dataset, hub_cache, offline_variable

logger = logging.getLogger(__name__)

# what `datasets` reads besides the rows
CARD_FILES = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_NAMED = 5
# huggingface_hub by itself waits for ever, on a node whose network swallows what it sends
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Snapshot:
    """A dataset of the hub in the hub cache."""

    folder: Path
    notes: SplitNotes | None
    """None: another program fetched it, all of its files."""


def notes_file(name: str, commit: str, subset: str | None) -> Path:
    """Return where the hub cache holds the notes on a snapshot.

    Args:
        name: org/name.
        commit: of the snapshot.
        subset: the configuration. None: the default one.

    Returns:
        A file that need not exist.
    """
    # beside `snapshots`, which hold the repository's own files only
    return _repository(name) / "lora-train" / commit / f"{subset or 'default'}.json"


def cached_snapshot(name: str, subset: str | None, revision: str | None) -> Snapshot | None:
    """Look for a dataset in the hub cache, without network.

    Args:
        name: org/name.
        subset: the configuration. None: the default one.
        revision: branch, tag or commit. None: main.

    Returns:
        A snapshot that is whole; None if there is none.
    """
    commit = cached_commit(_repository(name), revision)
    folder = _repository(name) / "snapshots" / (commit or "none")
    if commit is None or not folder.is_dir():
        return None
    notes = read_notes(notes_file(name, commit, subset))
    if notes is not None:
        return None if notes.damaged(folder) else Snapshot(folder, notes)
    return Snapshot(folder, None) if _has_whole_tree(name, commit, folder) else None


def find_snapshot(name: str, subset: str | None, revision: str | None) -> Snapshot | None:
    """Find a dataset in the hub cache, and fetch it first where that is possible and needed.

    Args:
        name: org/name.
        subset: the configuration. None: the default one.
        revision: branch, tag or commit. None: the newest of main, offline the one last fetched.

    Returns:
        A snapshot; None: it is not to be had, except perhaps as tables of `datasets`.

    Raises:
        UserError: the hub refuses it, or its files make no dataset.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        found = cached_snapshot(name, subset, revision)
        if found is not None:  # a commit never changes
            return found
    if offline_reason() is None:
        try:
            return _fetch(name, subset, revision)
        except Exception as error:
            found = cached_snapshot(name, subset, revision)
            is_here = found is not None or has_cached_dataset(name, subset, revision)
            if not is_here or not is_unreachable(error):
                raise dataset_error(error, name, revision) from error
            what = first_line(error)
            logger.warning("the hub cannot be reached (%s): taking %s from the cache", what, name)
            return found
    return cached_snapshot(name, subset, revision)


def load_tables(name: str, subset: str | None, revision: str | None) -> Mapping[str, Any]:
    """Load a dataset that is no snapshot: tables that `datasets` made, or what only it can fetch.

    Args:
        name: org/name.
        subset: the configuration. None: the default one.
        revision: branch, tag or commit. None: main.

    Returns:
        Its splits as tables.

    Raises:
        UserError: it is not to be had, or the tables are of another revision.
    """
    import datasets

    offline = offline_reason()
    try:
        # offline the library takes the tables that were made last, whichever revision is asked for
        if offline and revision and not has_cached_dataset(name, subset, revision):
            raise ConnectionError("no tables of this revision")
        loaded: Mapping[str, Any] = datasets.load_dataset(name, name=subset, revision=revision)
        return loaded
    except Exception as error:
        raise dataset_error(error, name, revision) from error


def splits_on_hub(name: str, subset: str | None, commit: str) -> SplitNotes | None:
    """Ask the hub which files make which split.

    Args:
        name: org/name.
        subset: the configuration. None: the default one.
        commit: whole hash.

    Returns:
        Paths in the repository, without sizes; None: some files are not in the repository.

    Raises:
        Exception: whatever the libraries raise; `dataset_error` says what it means.
    """
    import datasets

    builder = datasets.load_dataset_builder(name, name=subset, revision=commit)
    found = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    prefix = f"hf://datasets/{name}@{commit}/"
    if not found or any(not file.startswith(prefix) for files in found.values() for file in files):
        return None
    paths = {split: [file.removeprefix(prefix) for file in files] for split, files in found.items()}
    return SplitNotes(name, commit, subset, paths, {}, needs_card(builder.config))


def keep_reference(name: str, revision: str | None, commit: str, *, kind: str = "dataset") -> None:
    """Note in the hub cache which commit a branch stands for, once its snapshot is whole.

    Args:
        name: org/name.
        revision: as asked for. None: main.
        commit: what the hub said that it stands for.
        kind: dataset or model.
    """
    file = _repository(name, kind) / "refs" / (revision or "main")
    if revision == commit or cached_commit(_repository(name, kind), revision) == commit:
        return
    try:
        with atomic_file(file) as unfinished:
            unfinished.write_text(commit)
    except OSError as error:  # such as a group's cache that others may only read
        why = error.strerror or error
        logger.warning("%s: offline %s will not mean %s: %s", file, name, commit, why)


def _fetch(name: str, subset: str | None, revision: str | None) -> Snapshot | None:
    from huggingface_hub import HfApi, snapshot_download

    commit = HfApi().dataset_info(name, revision=revision, timeout=ANSWER_SECONDS).sha
    assert commit is not None
    found = cached_snapshot(name, subset, commit)
    if found is None:
        notes = splits_on_hub(name, subset, commit)
        if notes is None:
            return None
        paths = [path for files in notes.splits.values() for path in files]
        folder = Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=commit,
                allow_patterns=[*map(glob.escape, paths), *CARD_FILES],
            )
        )
        notes = replace(notes, sizes={path: (folder / path).stat().st_size for path in paths})
        notes.write(notes_file(name, commit, subset))
        found = Snapshot(folder, notes)
    keep_reference(name, revision, commit)
    return found


def offline_reason() -> str | None:
    """Return the variable that turns the network off for datasets, as NAME=value, or None."""
    return offline_variable("HF_DATASETS_OFFLINE") or offline_variable(
        "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
    )


def is_unreachable(error: BaseException) -> bool:
    """Tell whether an error of the libraries means that the hub gives no answer now."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    for link in _chain(error):
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code >= 500
        if isinstance(link, ConnectionError | TimeoutError | httpx.TransportError):
            return True
    return False


def dataset_error(error: Exception, name: str, revision: str | None) -> UserError:
    """Return what a failure to fetch or load a dataset of the hub means to the user."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, UserError):
        return error
    chain = list(_chain(error))
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    where = f"data.path: the hub dataset {name}"
    if any(isinstance(link, GatedRepoError) for link in chain) or "gated dataset" in str(error):
        page = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/datasets/{name}"
        return UserError(
            f"{where} is gated, and {token}", hint=f"accept its terms on {page}, then give HF_TOKEN"
        )
    if any(isinstance(link, RevisionNotFoundError) for link in chain):
        return UserError(
            f"{where} has no revision {revision!r}",
            hint="data.revision is a branch, a tag or a whole commit hash",
        )
    neither = f"data.path: {name} is no file or folder here, and as a hub dataset"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return UserError(
            f"{neither} there is none that can be seen; {token}",
            hint="check the name (org/name); a private one needs HF_TOKEN",
        )
    offline = offline_reason()
    if is_unreachable(error) or "doesn't exist on the Hub" in str(error):
        seen = f"the hub cannot be reached ({first_line(error)})"
        what = f"not found offline ({offline})" if offline else seen
        return UserError(
            f"{neither}: {what}{_what_is_damaged(name, revision)}",
            hint="on a node with network, once and with the same HF_HOME: HF_HUB_OFFLINE=0"
            " lora-train prefetch, then the words of this run",
        )
    available = re.search(r": (\['.*'\])", str(error), re.DOTALL)
    hint = f"data.subset= one of {available[1]}" if available else None
    return UserError(f"{where} cannot be loaded: {first_line(error)}", hint=hint)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _what_is_damaged(name: str, revision: str | None) -> str:
    """Name what a fetched snapshot has lost since."""
    commit = cached_commit(_repository(name), revision)
    folder = _repository(name) / "snapshots" / (commit or "none")
    damaged = [
        line
        for file in (_repository(name) / "lora-train" / (commit or "none")).glob("*.json")
        for line in getattr(read_notes(file), "damaged", lambda _: [])(folder)
    ]
    return f"; in {folder} {', '.join(damaged[:_MOST_NAMED])}" if damaged else ""


def _has_whole_tree(name: str, commit: str, folder: Path) -> bool:
    """Whether a snapshot that another program fetched holds all files of the repository."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(
            name, repo_type="dataset", revision=commit, cache_dir=hub_cache()
        )
    except CachedRepoTreeNotFoundError:
        return False
    return all((folder / file.path).is_file() for file in tree)


def _repository(name: str, kind: str = "dataset") -> Path:
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
