"""The cache folders that the libraries will use, and whether they lie in a small home folder."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from lora_train.config import Config
from lora_train.paths import cache_dir
from lora_train.preflight.assets import find_data, find_model, squad_folder
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.folders import existing_parent, file_system, home, room
from lora_train.preflight.hub import datasets_cache, hub_cache
from lora_train.preflight.machine import Machine

# three files of 100,000 contexts with their questions
_NEMO_SQUAD_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Cache:
    """A folder that this run will write to besides its run directory."""

    variable: str
    """The variable that moves it."""
    path: Path
    """Where it is now; it need not exist."""
    needed: int = 0
    """Bytes that this run will put there, as far as they can be told."""
    is_required: bool = True
    """Whether the run ends where it cannot be written."""

    @property
    def mend(self) -> str:
        """The line that puts it elsewhere."""
        return f"export {self.variable}=/path/on/scratch"


def caches_written(machine: Machine, config: Config) -> list[Cache]:
    """Return the caches that this run will write to.

    Args:
        machine: tells whether kernels will be compiled.
        config: the run.

    Returns:
        Its own, and those of the hub and of Triton where they will be written.
    """
    model, data = find_model(config.model), find_data(config.data)
    made = model.bytes_to_make + data.bytes_to_make
    # prepared data alone is kept in memory where it cannot be written
    caches = [Cache("LORA_CACHE_DIR", cache_dir(), made, is_required=made > 0)]
    if model.kind == "hub" and not model.is_here:
        caches.append(Cache(_hub_variable(), hub_cache(), model.bytes_to_fetch))
    if data.kind == "hub" and not data.is_here:
        variable = "HF_DATASETS_CACHE" if os.environ.get("HF_DATASETS_CACHE") else "HF_HOME"
        caches.append(Cache(variable, datasets_cache()))
    squad = squad_folder() if config.data.path == "squad" else None
    if squad is not None and data.folder != squad:
        variable = "NEMO_DATASETS_CACHE" if os.environ.get("NEMO_DATASETS_CACHE") else "NEMO_HOME"
        caches.append(Cache(variable, squad, _NEMO_SQUAD_BYTES))
    if machine.usable_gpus() and config.kernels.fused != "off":
        caches.append(Cache("TRITON_CACHE_DIR", triton_cache()))
    if machine.in_image:  # its entrypoint puts those that the user did not set into the first
        caches = [
            dataclasses.replace(cache, variable="LORA_CACHE_DIR")
            if cache.path.is_relative_to(cache_dir())
            else cache
            for cache in caches
        ]
    return caches


def triton_cache() -> Path:
    """Return the folder where Triton keeps what it compiles; it need not exist."""
    default = os.path.join(os.environ.get("TRITON_HOME", "~"), ".triton", "cache")
    return Path(os.path.expanduser(os.environ.get("TRITON_CACHE_DIR") or default))


def check_home(machine: Machine, config: Config) -> list[Finding]:
    """Name the caches below the home folder, which is small on a cluster and small nowhere else."""
    home_folder = home()
    if home_folder is None or not (machine.in_job or machine.container == "apptainer"):
        return []
    inside = [
        cache
        for cache in caches_written(machine, config)
        if cache.path.resolve().is_relative_to(home_folder.resolve())
    ]
    if not inside:
        return [Finding("home", "ok", f"no cache grows in {home_folder}")]
    variables = list(dict.fromkeys(cache.variable for cache in inside))
    grows = sum(cache.needed for cache in inside)
    parent = existing_parent(home_folder)
    return [
        Finding(
            "home",
            "warning",
            f"{', '.join(variables)} {'lies' if len(variables) == 1 else 'lie'} in the home folder "
            f"{home_folder} ({file_system(machine.root, parent)}, {room(parent)})",
            (f"this run puts {in_bytes(grows)} there; " if grows else "")
            + "homes on clusters have a small quota on bytes and files, which `df` does not show",
            "export " + " ".join(f"{name}=/path/on/scratch" for name in variables),
        )
    ]


def _hub_variable() -> str:
    # the older name is outdone by the newer
    is_given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return "HF_HUB_CACHE" if is_given else "HF_HOME"
