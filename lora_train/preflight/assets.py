"""Where the model and the data are, and how large, as far as that shows without network."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_train import quickstart
from lora_train.config import DataConfig, ModelConfig
from lora_train.data.nemo_squad import nemo_squad_folder
from lora_train.model_size import count_parameters, parameters_by_name
from lora_train.paths import cache_dir
from lora_train.preflight.hub import (
    cached_model,
    datasets_cache,
    has_cached_dataset,
    hub_cache,
    missing_weights,
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_NEMO_SQUAD = "rajpurkar/squad"
# what the embedded model takes while it is made, and once it is there
_EMBEDDED_BYTES = 600 * 10**6


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
        return _find_embedded(reference, _EMBEDDED_BYTES)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return Asset("local", reference, path)
    if _is_path(reference) or path.suffix == ".gguf":
        return Asset("local", reference)
    snapshot = cached_model(hub_cache(), reference, config.revision)
    if snapshot is not None and has_weights(snapshot, config):
        return Asset("hub", reference, snapshot)
    # bf16: two bytes a parameter
    return Asset("hub", reference, None, 2 * (parameters_by_name(reference) or 0))


def find_data(config: DataConfig) -> Asset:
    """Look for the examples, without network.

    Args:
        config: the data section.

    Returns:
        What they are. Local ones that do not exist have no folder.
    """
    reference = config.path
    if reference.startswith("embedded:"):
        return _find_embedded(reference, 0)
    path = Path(os.path.expanduser(reference))
    if path.exists():
        return Asset("local", reference, path)
    if reference == "squad":
        try:
            if (nemo_squad_folder() / "training.jsonl").is_file():
                return Asset("hub", _NEMO_SQUAD, nemo_squad_folder())
        except (RuntimeError, OSError):  # no home folder, or one that may not be entered
            pass
        return _find_dataset(_NEMO_SQUAD, None)
    if _is_path(reference) or reference.lower().endswith(_DATA_ENDINGS):
        return Asset("local", reference)
    return _find_dataset(reference, config.subset)


def model_config(config: ModelConfig) -> dict[str, Any] | None:
    """Read the model's config.json, if it is here.

    Args:
        config: the section that names the model.

    Returns:
        Its content, of a model of several kinds the text part; None if it is not to be had.
    """
    asset = find_model(config)
    folder = asset.folder
    if asset.kind == "hub" and folder is None:  # perhaps only its weights are missing
        folder = cached_model(hub_cache(), asset.name, config.revision)
    if folder is None or not folder.is_dir():
        return None
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return dict(content.get("text_config", content))
    except (OSError, ValueError, AttributeError):
        return None


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
    missing = missing_weights(folder)
    if missing is None:
        return config.allow_pickle and any(folder.glob("*.bin"))
    return not missing


def _find_embedded(reference: str, size: int) -> Asset:
    try:
        folder = quickstart.embedded_folder(reference, cache_dir() / "quickstart")
    except OSError:
        folder = None
    return Asset("embedded", reference, folder, 0 if folder else size)


def _find_dataset(name: str, subset: str | None) -> Asset:
    is_here = has_cached_dataset(name, subset)
    return Asset("hub", name, datasets_cache() if is_here else None)


def _is_path(reference: str) -> bool:
    """Whether a reference that does not exist means a path; `models/x` beside `models` does."""
    if reference.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(reference):
        return True
    parent = reference.rpartition("/")[0]
    return bool(parent) and Path(parent).is_dir()
