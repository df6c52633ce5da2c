"""What a run loads, file by file: of the hub with the hashes it lists, or where it lies here."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from lora_train.config import Config, DataConfig, ModelConfig
from lora_train.data.hub_dataset import (
    ANSWER_SECONDS,
    CARD_FILES,
    dataset_error,
    first_line,
    is_unreachable,
    splits_on_hub,
)
from lora_train.data.nemo_squad import SQUAD_ON_HUB, nemo_squad_folder
from lora_train.data.sources import find_sources, find_splits
from lora_train.data.split_notes import SplitNotes
from lora_train.errors import UserError
from lora_train.model_source import check_listed, file_patterns, loading_error, resolve_model
from lora_train.prefetch.manifest import FileEntry
from lora_train.preflight.assets import Asset, find_data
from lora_train.preflight.hub import hub_cache, hub_problem, offline_variable

ROLES = ("model", "data", "validation", "chat_template", "config")
# terms that travel with what they are on
_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it."""

    path: str
    size: int
    """Bytes."""
    sha256: str | None
    """Of its content, where git-lfs or Xet holds it."""
    blob: str
    """git's hash of its content, where git holds it."""

    def read(self, file: Path) -> tuple[FileEntry, str | None]:
        """Hash a copy of the file.

        Args:
            file: the copy.

        Returns:
            What it is; and what is wrong with it, in words, or None.
        """
        size = file.stat().st_size
        content, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                content.update(chunk)
                if self.sha256 is None:
                    blob.update(chunk)
        entry = FileEntry(self.path, size, content.hexdigest())
        if size != self.size:
            return entry, f"{size} bytes, the hub lists {self.size}"
        if self.sha256 is not None and entry.sha256 != self.sha256:
            return entry, f"sha256 {entry.sha256}, the hub lists {self.sha256}"
        if self.sha256 is None and blob.hexdigest() != self.blob:
            return entry, f"git hash {blob.hexdigest()}, the hub lists {self.blob}"
        return entry, None


@dataclass(frozen=True)
class Part:
    """The model, the data, or a file beside them, before it is fetched."""

    role: str
    """model, data, validation, chat_template or config."""
    kind: str
    """hub, squad, embedded, local or gguf."""
    name: str
    """As configured; of the hub, org/name."""
    requested: str | None = None
    """Branch, tag or commit that was asked for."""
    commit: str | None = None
    """What it stands for."""
    remote: tuple[RemoteFile, ...] = ()
    """Files of the hub."""
    local: Mapping[str, Path] = field(default_factory=dict)
    """Files that are here: path in the folder to where it lies."""
    notes: SplitNotes | None = None
    """Of data: which paths make which split, where files make them; without sizes."""

    @property
    def repository_kind(self) -> str:
        """What the hub calls it."""
        return "model" if self.role == "model" else "dataset"


def model_part(config: ModelConfig) -> Part:
    """Find out what the model consists of; prepares the embedded one, and converts a GGUF file.

    Args:
        config: the section that names it.

    Returns:
        Its files.

    Raises:
        UserError: it does not exist, may not be seen, or cannot be loaded as configured.
    """
    source = resolve_model(config)
    loaded, unwanted = file_patterns(config)
    wanted = [*loaded, *_TERMS]
    if Path(source).is_dir():
        names = [file.name for file in Path(source).iterdir() if file.is_file()]
        names = list(filter_repo_objects(names, allow_patterns=wanted, ignore_patterns=unwanted))
        kind = "embedded" if config.path.startswith("embedded:") else "local"
        kind = "gguf" if config.path.endswith(".gguf") else kind
        return Part(
            "model", kind, config.path, local={name: Path(source, name) for name in sorted(names)}
        )

    def ask() -> Part:
        commit, listed = _listing("model", source, config.revision)
        names = filter_repo_objects(listed, allow_patterns=wanted, ignore_patterns=unwanted)
        remote = tuple(listed[name] for name in sorted(names))
        check_listed([file.path for file in remote], config)
        return Part("model", "hub", source, config.revision, commit, remote)

    return _of_hub(ask, source, lambda error: loading_error(error, config))


def data_part(config: Config) -> Part:
    """Find out what the data consist of; prepares the embedded ones.

    Args:
        config: the run.

    Returns:
        Its files. SQuAD's are those of the hub, where NeMo's are not made yet.

    Raises:
        UserError: they do not exist, may not be seen, or make no dataset.
    """
    data, asset = config.data, find_data(config.data)
    if data.path == "squad" and (nemo_squad_folder() / "training.jsonl").is_file():
        return squad_part(config, None)
    if asset.kind == "hub":
        return _hub_data(asset, data)
    splits = find_splits(data, config.trainer.seed)
    find_sources(data, config.trainer.seed)  # refuses splits that are not there
    kind = "embedded" if data.path.startswith("embedded:") else "local"
    every_file = [file for split in splits.values() for file in split.files]
    folder = Path(data.path).expanduser()
    if any(split.table is not None for split in splits.values()):  # only `datasets` reads it
        local = {
            str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()
        }
        return Part("data", kind, data.path, local=local)
    common = Path(os.path.commonpath([file.absolute().parent for file in every_file]))
    paths = {
        name: [str(file.absolute().relative_to(common)) for file in split.files]
        for name, split in splits.items()
    }
    local = {str(file.absolute().relative_to(common)): file for file in every_file}
    notes = SplitNotes(data.path, None, data.subset, paths, {}, needs_card=False)
    return Part("data", kind, data.path, local=local, notes=notes)


def squad_part(config: Config, raw: Part | None) -> Part:
    """Return NeMo's files of SQuAD, and make them first where they are not there.

    Args:
        config: the run.
        raw: SQuAD of the hub, once it is in the hub cache. None: NeMo's files are there.

    Returns:
        Those three files.

    Raises:
        UserError: they cannot be made or read.
    """
    splits = find_splits(config.data, config.trainer.seed)
    paths = {name: [file.name for file in split.files] for name, split in splits.items()}
    local = {file.name: file for split in splits.values() for file in split.files}
    commit = raw.commit if raw is not None else None
    notes = SplitNotes(SQUAD_ON_HUB, commit, None, paths, {}, needs_card=False)
    return Part("data", "squad", SQUAD_ON_HUB, None, commit, local=local, notes=notes)


def file_part(role: str, path: str | Path) -> Part:
    """Return a single file that a run reads beside model and data.

    Args:
        role: validation, chat_template or config.
        path: the file, as configured.

    Returns:
        The part that holds it alone.

    Raises:
        UserError: it does not exist.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{role}: {file} does not exist", hint="name a file that exists")
    return Part(role, "local", str(path), local={file.name: file})


def _hub_data(asset: Asset, data: DataConfig) -> Part:
    name = asset.name
    subset, revision = (None, None) if data.path == "squad" else (data.subset, data.revision)

    def ask() -> Part:
        commit, listed = _listing("dataset", name, revision)
        notes = splits_on_hub(name, subset, commit)
        if notes is None:
            raise UserError(
                f"data.path: the rows of the hub dataset {name} lie outside of its repository",
                hint="load it once where there is network, save it as .jsonl, and name that file",
            )
        terms = filter_repo_objects(listed, allow_patterns=list(_TERMS))
        rows = [path for files in notes.splits.values() for path in files]
        wanted = [*CARD_FILES, *terms, *rows]
        remote = tuple(listed[path] for path in dict.fromkeys(wanted) if path in listed)
        kind = "squad" if data.path == "squad" else "hub"
        return Part("data", kind, name, revision, commit, remote, notes=notes)

    return _of_hub(ask, name, lambda error: dataset_error(error, name, revision))


def _of_hub(ask: Callable[[], Part], name: str, explain: Callable[[Exception], UserError]) -> Part:
    offline = offline_variable("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = offline or offline_variable("HF_DATASETS_OFFLINE")
    if offline:
        raise UserError(
            f"{name} is to be fetched, and {offline} turns the network off",
            hint=f"unset {offline.partition('=')[0]}, on a node with network",
        )
    _refuse_read_only(hub_cache())
    problem = hub_problem()
    if problem is not None and problem.is_certain:
        raise UserError(
            f"{name} is to be fetched, and the hub does not answer: {problem.text}",
            hint="prefetch where there is network, such as a login node; behind a proxy: "
            "export https_proxy=http://HOST:PORT; from a mirror: export HF_ENDPOINT=https://HOST",
        )
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:
        raise unreachable_or(error, name, explain) from error


def _refuse_read_only(cache: Path) -> None:
    """Refuse a hub cache that cannot be written; the libraries also need it for a bundle."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise UserError(
            f"the hub cache {cache} cannot be written: {error.strerror or error}",
            hint="export HF_HOME=DIR, with a folder on project or scratch storage",
        ) from error


def unreachable_or(
    error: Exception, name: str, explain: Callable[[Exception], UserError]
) -> UserError:
    """Tell a hub that stopped answering from whatever else its error means.

    Args:
        error: what the library raised.
        name: of the repository.
        explain: says what any other error means.

    Returns:
        The error to raise.
    """
    if is_unreachable(error):
        return UserError(
            f"the hub stopped answering over {name}: {first_line(error)}",
            hint="give the same command again: complete files are kept",
        )
    return explain(error)


def _listing(kind: str, name: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Ask the hub for the commit that a revision stands for, and for its files."""
    api = HfApi()
    info: Any = api.repo_info(name, repo_type=kind, revision=revision, timeout=ANSWER_SECONDS)
    tree: Iterable[Any] = api.list_repo_tree(
        name, recursive=True, revision=info.sha, repo_type=kind
    )
    files = {
        each.path: RemoteFile(
            each.path, each.size, each.lfs.sha256 if each.lfs else None, each.blob_id
        )
        for each in tree
        if isinstance(each, RepoFile)
    }
    return str(info.sha), files
