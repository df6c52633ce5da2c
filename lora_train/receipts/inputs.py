"""Which files a run is made of, base model and data, and what they hold. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.config import Config, DataConfig, ModelConfig
from lora_train.preflight.assets import find_data, find_model
from lora_train.receipts.file_hashes import FileHash

if TYPE_CHECKING:
    from lora_train.data.sources import Sources

Hash = Callable[[Path], FileHash]

_TOKENIZER_AND_CONFIG = (
    "config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*",
)  # fmt: skip
_INDEX = ".index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# hf://datasets/org/name@COMMIT/file, and the hub cache
_COMMIT_OF_DATA = re.compile(
    r"hf://datasets/[^@]+@([0-9a-f]{40})(?:/|$)|/datasets--[^/]+/snapshots/([0-9a-f]{40})/"
)


def base_folder(config: ModelConfig) -> Path | None:
    """Return the folder, or the GGUF file, of the base model; None: it is not here."""
    return find_model(config).folder


def base_commit(folder: Path | None) -> str | None:
    """Return the commit of a hub model, whose snapshot is named by it; None: not of the hub."""
    if folder is None or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return None
    return folder.name


def base_files(config: ModelConfig, folder: Path) -> dict[str, Path]:
    """Return the files of the base model that a run reads.

    Args:
        config: the section that names the model.
        folder: what `base_folder` returned.

    Returns:
        Name -> file, sorted by name: weights, config, tokenizer, and code that may be run.
    """
    if folder.is_file():
        return {folder.name: folder}
    patterns = [*_TOKENIZER_AND_CONFIG, *(["*.py"] if config.trust_remote_code else [])]
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    files += _weights(folder, "model", "safetensors") or (
        _weights(folder, "pytorch_model", "bin") if config.allow_pickle else []
    )
    return {file.name: file for file in sorted(files) if file.is_file()}


def _weights(folder: Path, stem: str, ending: str) -> list[Path]:
    """The weight files that transformers reads: one, those of the index, or whatever there is."""
    single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}{_INDEX}"
    if single.is_file():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index, *(folder / name for name in names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return list(folder.glob(f"*.{ending}"))


def model_config(folder: Path | None) -> dict[str, Any] | None:
    """Return the content of the model's config.json; None where there is none (GGUF)."""
    if folder is None:
        return None
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def hash_base(config: ModelConfig, hash_of: Hash) -> dict[str, FileHash | dict[str, str]]:
    """Hash the base model.

    Args:
        config: the section that names it.
        hash_of: returns size and SHA-256 of a file.

    Returns:
        Name -> size and SHA-256, or `error`.
    """
    folder = base_folder(config)
    files = {} if folder is None else base_files(config, folder)
    return {name: hash_or_error(file, hash_of) for name, file in files.items()}


def hash_or_error(file: Path, hash_of: Hash) -> FileHash | dict[str, str]:
    """Hash a file, or say why it cannot be; never fails for the file."""
    try:
        return hash_of(file)
    except OSError as error:
        return {"error": error.strerror or str(error)}


def data_files(config: Config, sources: Sources) -> dict[str, Path]:
    """Return the files that the examples are read from, and a chat template of the user's.

    Args:
        config: the run.
        sources: its training and validation rows.

    Returns:
        Name -> file: as configured; of data from a cache (hub, NeMo, embedded) below `data.path`.
    """
    splits = [sources.train, *([sources.validation] if sources.validation is not None else [])]
    files = [file for split in splits for file in split.files]
    if config.model.chat_template is not None:
        files.append(Path(config.model.chat_template).expanduser())
    folder = _cache(config.data)
    return {_recorded_name(config.data, folder, file): file for file in files}


def _recorded_name(config: DataConfig, cache: Path | None, file: Path) -> str:
    # a cache lies elsewhere on another machine, and holds the same files
    if cache is not None and file.is_relative_to(cache):
        return f"{config.path}/{file.relative_to(cache)}"
    return str(file)


def recorded_files(config: DataConfig, names: Iterable[str]) -> dict[str, Path | None]:
    """Find the files that a receipt names as `data_files` does.

    Args:
        config: the data section, with the commit of the receipt; the current folder is the run's.
        names: of the files.

    Returns:
        Name -> file, which need not exist; None: it is of a cache, and not here yet.
    """
    cache, prefix = _cache(config), f"{config.path}/"
    is_cached = find_data(config).kind != "local"
    found: dict[str, Path | None] = {}
    for name in names:
        found[name] = Path(name)
        if is_cached and name.startswith(prefix):
            file = None if cache is None else cache / name.removeprefix(prefix)
            found[name] = file if file is not None and file.is_file() else None
    return found


def _cache(config: DataConfig) -> Path | None:
    """The folder of data that is not the user's own file or folder; None: it has none."""
    found = find_data(config)
    return None if found.kind == "local" else found.folder


def data_commit(sources: Sources) -> str | None:
    """Return the commit of a data set of the hub; None: it is of no hub, or not known."""
    for split in (sources.train, sources.validation):
        if split is None:
            continue
        origins = [] if split.table is None else [*(split.table.info.download_checksums or {})]
        for origin in [*map(str, split.files), *map(str, origins)]:
            if found := _COMMIT_OF_DATA.search(origin):
                return found[1] or found[2]
    return None


def data_tables(sources: Sources) -> dict[str, dict[str, Any]]:
    """Return what names the content of tables that only `datasets` can read.

    Args:
        sources: training and validation rows.

    Returns:
        Name of the split -> fingerprint, rows.
    """
    return {
        split.name: {"fingerprint": split.table._fingerprint, "rows": len(split.table)}
        for split in (sources.train, sources.validation)
        if split is not None and split.table is not None
    }
