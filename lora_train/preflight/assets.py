"""Where the model and the data are, and how large, as far as that shows without network."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_train import quickstart
from lora_train.config import DataConfig, ModelConfig
from lora_train.data.hub_dataset import cached_snapshot
from lora_train.data.nemo_squad import SQUAD_ON_HUB, nemo_squad_folder
from lora_train.data.sources import HUB_NAME
from lora_train.model_size import count_parameters, parameters_by_name
from lora_train.paths import cache_dir
from lora_train.preflight.hub import (
    cached_bytes,
    cached_model,
    datasets_cache,
    has_cached_dataset,
    hub_cache,
    missing_weights,
)

# as model_source has it, which imports transformers
_MODEL_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LFS_POINTER = b"version https://git-lfs"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_EMBEDDED_DATA_BYTES = 20 * 10**6
# bits of a weight in a file such as model.Q4_K_M.gguf
_QUANTIZATION = re.compile(r"(?:^|[-._])(?:I?Q|B?F)(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Asset:
    """The base model or the data: what it is, and where it is."""

    kind: Literal["embedded", "local", "hub"]
    """Where it comes from."""
    name: str
    """As configured; of a hub dataset, its name on the hub."""
    folder: Path | None = None
    """Its folder or file, if it is here."""
    bytes_to_fetch: int = 0
    """Size of the download still to come; 0: none, or not known."""
    bytes_to_make: int = 0
    """Size of what must first be made of it in LORA_CACHE_DIR; 0: nothing, or not known."""

    @property
    def is_here(self) -> bool:
        """Whether nothing has to be fetched."""
        return self.folder is not None


def find_model(config: ModelConfig) -> Asset:
    """Look for the base model, without network.

    Args:
        config: the section that names it.

    Returns:
        What it is. A local one that does not exist has no folder.
    """
    reference = config.path
    if reference.startswith("embedded:"):
        return _find_embedded(reference, quickstart.MODEL_BYTES)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        is_gguf = path.is_file() and path.suffix == ".gguf"
        made = _converted_bytes(path) if is_gguf else 0
        return Asset("local", reference, path, bytes_to_make=made)
    if _is_path(reference, _MODEL_NAME) or path.suffix == ".gguf":
        return Asset("local", reference)
    snapshot = cached_model(hub_cache(), reference, config.revision)
    if snapshot is not None and has_weights(snapshot, config):
        return Asset("hub", reference, snapshot)
    # bf16: two bytes a parameter
    whole = 2 * (parameters_by_name(reference) or 0)
    return Asset("hub", reference, None, max(0, whole - cached_bytes(reference)))


def find_data(config: DataConfig) -> Asset:
    """Look for the examples, without network.

    Args:
        config: the data section.

    Returns:
        What they are. Local ones that do not exist have no folder.
    """
    reference = config.path
    if reference.startswith("embedded:"):
        return _find_embedded(reference, _EMBEDDED_DATA_BYTES)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return Asset("local", reference, path)
    if reference == "squad":
        folder = squad_folder()
        with contextlib.suppress(OSError):  # it may not be entered
            if folder is not None and (folder / "training.jsonl").is_file():
                return Asset("hub", SQUAD_ON_HUB, folder)
        return _find_dataset(SQUAD_ON_HUB, None, None)
    if _is_path(reference, HUB_NAME) or reference.lower().endswith(_DATA_ENDINGS):
        return Asset("local", reference)
    return _find_dataset(reference, config.subset, config.revision)


def squad_folder() -> Path | None:
    """Return NeMo's folder of SQuAD; None: it depends on a home folder, and there is none."""
    try:
        return nemo_squad_folder()
    except RuntimeError:
        return None


def read_model_config(config: ModelConfig) -> dict[str, Any] | None:
    """Read the model's config.json, if it is here.

    Args:
        config: the section that names the model.

    Returns:
        Its content; None if it is not to be had.
    """
    asset = find_model(config)
    folder = asset.folder
    if asset.kind == "hub" and folder is None:  # perhaps only its weights are missing
        folder = cached_model(hub_cache(), asset.name, config.revision)
    if folder is None or not folder.is_dir():
        return None
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def model_config(config: ModelConfig) -> dict[str, Any] | None:
    """Read what the model's config.json says of its text part, if it is here.

    Args:
        config: the section that names the model.

    Returns:
        The content of config.json, of a model of several kinds the text part; None if it is not
        to be had.
    """
    content = read_model_config(config)
    part = None if content is None else content.get("text_config")
    return part if isinstance(part, dict) else content


def num_parameters(config: ModelConfig) -> int | None:
    """Count the base model's parameters.

    Args:
        config: the section that names the model.

    Returns:
        The number that its config.json means, else the one in its name; None: not known.
    """
    content = model_config(config)
    counted = count_parameters(content) if content is not None else None
    return counted or parameters_by_name(config.path)


def has_weights(folder: Path, config: ModelConfig) -> bool:
    """Tell whether a model folder holds all of its weights, in a form that may be loaded."""
    return missing_weights(folder, pickled=config.allow_pickle) == []


def lfs_pointers(path: Path) -> list[str]:
    """Return the weight files that are pointers of git-lfs, which stand for the weights.

    Args:
        path: a weight file, or a folder of them.

    Returns:
        Their names.
    """
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sorted(file.name for file in files if file.is_file() and _is_lfs_pointer(file))


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a model folder holds any file of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def _find_embedded(reference: str, size: int) -> Asset:
    folder = quickstart.embedded_folder(reference, cache_dir() / "quickstart")
    return Asset("embedded", reference, folder, bytes_to_make=0 if folder else size)


def _converted_bytes(gguf_file: Path) -> int:
    """Estimate the bf16 weights that are made of a GGUF file; 0: they may be there already.

    What is there is named by the file's hash, which takes longer than a check may. Parameters are
    told by the file's name, else by its size and the bits of a weight in its name, else of 4 bits.
    """
    with contextlib.suppress(OSError):
        if any((cache_dir() / "gguf").iterdir()):
            return 0
    parameters = parameters_by_name(gguf_file.stem)
    if parameters is None:
        bits = _QUANTIZATION.search(gguf_file.stem)
        parameters = gguf_file.stat().st_size * 8 // (int(bits[1]) if bits else 4)
    return 2 * parameters


def _find_dataset(name: str, subset: str | None, revision: str | None) -> Asset:
    snapshot = cached_snapshot(name, subset, revision)
    if snapshot is not None:
        return Asset("hub", name, snapshot.folder)
    is_here = has_cached_dataset(name, subset, revision)
    return Asset("hub", name, datasets_cache() if is_here else None)


def _is_path(reference: str, hub_name: re.Pattern[str]) -> bool:
    """Whether a reference that does not exist means a path; `models/x` beside `models` does."""
    if reference.startswith((".", "/", "~")) or not hub_name.fullmatch(reference):
        return True
    parent = reference.rpartition("/")[0]
    return bool(parent) and Path(parent).is_dir()
