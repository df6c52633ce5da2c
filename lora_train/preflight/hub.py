"""What is in the Hugging Face caches, read from their folders; and whether the hub answers.

`huggingface_hub` says the same, but reads the variables once, when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from lora_train.preflight.deadline import start

_TRUE = ("1", "ON", "YES", "TRUE")
_CONNECT_SECONDS = 2.0


def hub_home() -> Path:
    """Return the effective HF_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    return _path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface")))


def hub_cache() -> Path:
    """Return the effective HF_HUB_CACHE, the folder of models--org--name."""
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", str(hub_home() / "hub"))
    return _path(os.environ.get("HF_HUB_CACHE", older))


def datasets_cache() -> Path:
    """Return the effective HF_DATASETS_CACHE, where `datasets` keeps its tables."""
    return _path(os.environ.get("HF_DATASETS_CACHE", str(hub_home() / "datasets")))


def offline_variable(*names: str) -> str | None:
    """Return the first of the variables that turns the network off, as NAME=value, or None."""
    for name in names:
        value = os.environ.get(name, "")
        if value.upper() in _TRUE:
            return f"{name}={value}"
    return None


def cached_model(cache: Path, name: str, revision: str | None) -> Path | None:
    """Return the folder of a downloaded model.

    Args:
        cache: a hub cache.
        name: org/name.
        revision: branch, tag or commit. None: main.

    Returns:
        Its snapshot, with config.json in it; None if there is none.
    """
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    try:
        reference = folder / "refs" / commit
        if reference.is_file():
            commit = reference.read_text().strip()
        snapshot = folder / "snapshots" / commit
        return snapshot if (snapshot / "config.json").is_file() else None
    except OSError:
        return None


def missing_weights(folder: Path) -> list[str] | None:
    """Return the weight files that a model folder should hold and does not.

    Args:
        folder: a folder with config.json.

    Returns:
        Names that the index lists; empty: all there. None: there are no safetensors at all.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(name for name in named if not (folder / name).is_file())
    return [] if any(path.is_file() for path in folder.glob("*.safetensors")) else None


def has_cached_dataset(name: str, subset: str | None) -> bool:
    """Tell whether `datasets` finds a hub dataset without network.

    It reads its own tables only: a snapshot that `hf download` made is not found.

    Args:
        name: org/name.
        subset: the dataset's configuration. None: any.

    Returns:
        Whether a table of it is there.
    """
    *namespace, last = name.split("/")
    snake = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", snake).lower()
    folder = datasets_cache() / "___".join([*namespace, snake])
    try:
        return any(folder.glob(f"{subset or '*'}/*/*/dataset_info.json"))
    except OSError:
        return False


def unreachable_hub() -> str | None:
    """Try one connection to the hub, or to the proxy that leads there.

    Returns:
        Which host does not answer, and how; None: it answers.
    """
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        if os.environ.get(name):
            address = os.environ[name]
            break
    url = urlsplit(address if "://" in address else f"http://{address}")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)

    def connect() -> None:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()

    try:
        # a thread: looking up the name takes as long as the resolver likes
        start(connect).result(timeout=_CONNECT_SECONDS)
    except TimeoutError:
        return f"{host}:{port} does not answer within {_CONNECT_SECONDS:.0f} s"
    except OSError as error:
        return f"{host}:{port} cannot be reached ({error.strerror or error})"
    return None


def _path(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(text)))
