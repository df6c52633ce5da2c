"""What is in the Hugging Face caches, read from their folders; and whether the hub answers.

`huggingface_hub` says the same, but reads the variables once, when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lora_train.preflight.deadline import start
from lora_train.preflight.folders import size_of

_TRUE = ("1", "ON", "YES", "TRUE")
_CONNECT_SECONDS = 2.0
# of any other scheme, SOCKS that is: 1080
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Problem:
    """Why the hub gives no answer."""

    text: str
    is_certain: bool
    """False: it may only be slow."""


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
    """Return the variable that turns the network off, as NAME=value; the first that is set decides.

    Args:
        *names: the variables.

    Returns:
        None where the network is not turned off.
    """
    given = [(name, os.environ[name]) for name in names if os.environ.get(name)]
    return "=".join(given[0]) if given and given[0][1].upper() in _TRUE else None


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
    # taken before any index, which another version of the model may have left
    if (folder / "model.safetensors").is_file():
        return []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(name for name in named if not (folder / name).is_file())
    return [] if any(path.is_file() for path in folder.glob("*.safetensors")) else None


def cached_bytes(name: str) -> int:
    """Return how much of a model is in the hub cache, in whichever state."""
    return size_of(hub_cache() / f"models--{name.replace('/', '--')}" / "blobs")


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


def hub_problem() -> Problem | None:
    """Try one connection to the hub, or to the proxy that leads there; None: it answers."""
    endpoint = _with_scheme(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        url = urlsplit(endpoint)
        proxies = {} if proxy_bypass(url.hostname or "") else getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if proxy:
            url = urlsplit(_with_scheme(proxy))
        host, port = url.hostname or "", url.port or _PORTS.get(url.scheme, 1080)
    except ValueError as error:
        return Problem(f"the address of the hub or of its proxy is none ({error})", True)

    def connect() -> None:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()

    try:
        # a thread: looking up the name takes as long as the resolver likes
        start(connect).result(timeout=_CONNECT_SECONDS)
    except TimeoutError:
        return Problem(f"{host}:{port} does not answer within {_CONNECT_SECONDS:.0f} s", False)
    except OSError as error:
        return Problem(f"{host}:{port} cannot be reached ({error.strerror or error})", True)
    return None


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def _path(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(text)))
