"""The receipt: what made a run, as an entry of environment.json for each of its starts.

What is known at once is written before the first step. Hashing model, data and image goes on in a
thread beside the training, which it neither delays nor fails, and completes the entry.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train.config import Config
from lora_train.config_loading import to_tree
from lora_train.preflight.nvml import read_gpus
from lora_train.receipts.file_hashes import Cancelled, FileHashes
from lora_train.receipts.inputs import (
    base_commit,
    base_folder,
    data_commit,
    data_files,
    data_tables,
    hash_base,
    hash_or_error,
    model_config,
)
from lora_train.receipts.machine import image_file, program, safe_variables, without_secrets

if TYPE_CHECKING:
    from lora_train.data.sources import Sources
    from lora_train.run_directory import RunDirectory

log = logging.getLogger(__name__)

HASHES_COMPLETE = "complete"
"""The value of `hashes` once all files were hashed; else it says why not."""
_RUNNING = "not hashed: the run goes on, or was killed"
# at the end of a complete run, and for a file system that hangs
_WAIT_SECONDS = 5.0
_IDLE = 19


def describe_start(
    config: Config,
    argv: Sequence[str],
    *,
    device: str,
    devices: Sequence[dict[str, Any]],
    step: int,
    tokens_hash: str,
    sources: Sources | None,
) -> dict[str, Any]:
    """Collect what is known at once of a start of a run.

    Args:
        config: the run's configuration.
        argv: the command line.
        device: what the main process computes on, in words.
        devices: what each process computes on, as `machine.device_facts` has it.
        step: steps done before.
        tokens_hash: of the training tokens, labels and packs.
        sources: where the rows came from.

    Returns:
        An entry of environment.json. `base.files`, `data.files` and `image.sif` are filled in by
        `InputHashing`, and `hashes` then says "complete".
    """
    folder = base_folder(config.model)
    entry = {
        "command": list(argv),
        "folder": _current_folder(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        **program(),
        "config": to_tree(config),
        "device": device,
        "devices": list(devices),
        "driver": read_gpus().driver if "capability" in devices[0] else None,
        "host": platform.node(),
        "variables": safe_variables(),
        "model_config": model_config(folder),
        "base": {
            "path": config.model.path,
            "revision": config.model.revision,
            "commit": base_commit(folder),
            "files": {},
        },
        "data": {
            "path": config.data.path,
            "revision": config.data.revision,
            "commit": None if sources is None else data_commit(sources),
            "tokens": tokens_hash,
            "files": {},
            "tables": {} if sources is None else data_tables(sources),
        },
        "hashes": _RUNNING,
    }
    return tree_without_secrets(entry)


def _current_folder() -> str | None:
    """Where relative paths begin; None: it was removed, which nothing else need mind."""
    try:
        return os.getcwd()
    except OSError:
        return None


def tree_without_secrets(tree: Any) -> Any:
    """Return nested dictionaries and lists with `without_secrets` of each text in them."""
    if isinstance(tree, dict):
        return {key: tree_without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [tree_without_secrets(value) for value in tree]
    return without_secrets(tree) if isinstance(tree, str) else tree


class InputHashing:
    """Hashes data, model and image beside the training, on the main process.

    Args:
        directory: the run directory; the newest entry of its environment.json is completed.
        config: the run.
        sources: where the rows came from.
    """

    def __init__(self, directory: RunDirectory, config: Config, sources: Sources | None) -> None:
        self._directory = directory
        self._config = config
        self._sources = sources
        self._cancelled = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="receipt")
        self._thread.start()

    def wait(self) -> None:
        """Wait a little for the hashes, at the end of a complete run."""
        self._thread.join(_WAIT_SECONDS)

    def cancel(self) -> None:
        """Stop; files that were read until now are remembered for the next run."""
        self._cancelled.set()
        self._thread.join(_WAIT_SECONDS)
        # one that hangs in a file system writes nothing any more: the next start may be there
        self._is_over = True

    def _run(self) -> None:
        try:
            # Linux knows a priority of each thread: training needs the cores more
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _IDLE)
            self._hash()
        except Exception as error:  # nothing of this is worth a run
            log.warning("the receipt lacks hashes: %s: %s", type(error).__name__, error)

    def _hash(self) -> None:
        hashes = FileHashes(self._cancelled.is_set)
        found: dict[str, Any] = {}
        state = HASHES_COMPLETE
        try:
            found["data"] = {
                name: hash_or_error(file, hashes.of) for name, file in self._data_files().items()
            }
            found["base"] = hash_base(self._config.model, hashes.of)
            if (sif := image_file()) is not None:
                found["image"] = hash_or_error(sif, hashes.of)
        except Cancelled:
            state = "not hashed: the run ended first"
            log.info("the receipt lacks hashes: the run ended before its files were read")
        hashes.save()
        if self._is_over:
            return
        starts = self._directory.read_json("environment.json")
        starts[-1]["hashes"] = state
        for name in ("base", "data"):
            starts[-1][name]["files"] = found.get(name, {})
        if "image" in found:
            starts[-1]["image"]["sif"] = found["image"]
        self._directory.write_json("environment.json", starts)

    def _data_files(self) -> dict[str, Path]:
        return {} if self._sources is None else data_files(self._config, self._sources)
