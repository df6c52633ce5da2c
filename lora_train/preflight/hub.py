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
_COMMIT = re.compile(r"[0-9a-f]{40}")
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


def cached_commit(repository: Path, revision: str | None) -> str | None:
    """Return the commit that a revision stands for, as far as the hub cache knows.

    Args:
        repository: folder of the hub cache, such as models--org--name.
        revision: branch, tag or commit. None: main.

    Returns:
        The commit; it need not have a snapshot. None: a branch or tag that was not fetched.
    """
    revision = revision or "main"
    try:
        return (repository / "refs" / revision).read_text().strip()
    except OSError:
        is_there = (repository / "snapshots" / revision).is_dir()
        return revision if is_there or _COMMIT.fullmatch(revision) else None


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
    try:
        snapshot = folder / "snapshots" / (cached_commit(folder, revision) or "none")
        return snapshot if (snapshot / "config.json").is_file() else None
    except OSError:
        return None


def promised_weights(folder: Path, *, pickled: bool) -> dict[str, set[str]] | None:
    """Return the files that transformers loads a model's weights from, whether they are there.

    Args:
        folder: a folder with config.json.
        pickled: whether .bin files may be loaded, where there are no safetensors.

    Returns:
        File to the tensors that the index finds in it, none without an index. None: no weights.

    Raises:
        ValueError: the index, which the message names, cannot be read.
    """
    for name in ("model.safetensors", *(("pytorch_model.bin",) if pickled else ())):
        # taken before any index, which another version of the model may have left
        if (folder / name).is_file():
            return {name: set()}
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        promised: dict[str, set[str]] = {}
        try:
            for tensor, file in json.loads(index.read_text())["weight_map"].items():
                promised.setdefault(file, set()).add(tensor)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(index.name) from error
        return promised
    return None


def missing_weights(folder: Path, *, pickled: bool = False) -> list[str] | None:
    """Return the weight files that a model folder should hold and does not.

    Args:
        folder: a folder with config.json.
        pickled: whether .bin files may be loaded, where there are no safetensors.

    Returns:
        Names that the index lists; empty: all there. None: no such weights at all.
    """
    try:
        promised = promised_weights(folder, pickled=pickled)
    except ValueError as unreadable:
        return [str(unreadable)]
    if promised is not None:
        return sorted(name for name in promised if not (folder / name).is_file())
    patterns = ("*.safetensors", "*.bin") if pickled else ("*.safetensors",)
    found = any(path.is_file() for pattern in patterns for path in folder.glob(pattern))
    return [] if found else None


def cached_bytes(name: str) -> int:
    """Return how much of a model is in the hub cache, in whichever state."""
    return size_of(hub_cache() / f"models--{name.replace('/', '--')}" / "blobs")


def has_cached_dataset(name: str, subset: str | None, revision: str | None) -> bool:
    """Tell whether `datasets` has tables of a hub dataset, which it finds without network.

    Args:
        name: org/name.
        subset: the dataset's configuration. None: any.
        revision: branch, tag or commit; the library takes the tables that were made last. None:
            any.

    Returns:
        Whether tables of it are there, and of no other revision.
    """
    *namespace, last = name.split("/")
    snake = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", snake).lower()
    folder = datasets_cache() / "___".join([*namespace, snake])
    try:
        found = {file.parent.name for file in folder.glob(f"{subset or '*'}/*/*/dataset_info.json")}
    except OSError:
        return False
    if revision is None:
        return bool(found)
    return found == {cached_commit(hub_cache() / f"datasets--{name.replace('/', '--')}", revision)}


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
