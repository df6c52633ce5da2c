"""The base model that an adapter is merged into: found, and known to be the right one.

Imports no torch, except for a base that must be fetched or converted first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_train.config import ModelConfig
from lora_train.errors import UserError
from lora_train.merge.tensor_files import weight_files
from lora_train.preflight.assets import find_model
from lora_train.receipts.file_hashes import FileHashes
from lora_train.receipts.inputs import base_commit
from lora_train.recorded_run import RecordedRun

log = logging.getLogger(__name__)

_WEIGHT_ENDINGS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    folder: Path
    """A Hugging Face folder with unquantized safetensors."""
    model: ModelConfig
    """Loads it, not quantized."""
    config: Mapping[str, Any]
    """Its config.json."""
    commit: str | None
    """Of the hub, if known."""
    identity: str
    """How it is known to be the run's base, as one line."""


def find_base(run: RecordedRun, other: str | None) -> BaseModel:
    """Find the base of a run and check that it is the one that the adapter was trained on.

    Args:
        run: the run.
        other: another copy of it: a folder, hub name or GGUF file; None: what the run names.

    Returns:
        The base.

    Raises:
        UserError: it is not here, is quantized, or differs from what the run recorded.
    """
    recorded = _recorded_base(run)
    model = replace(run.config.model, quantization=None)
    if other is not None:
        if other.endswith(".gguf") and not model.path.endswith(".gguf"):
            raise quantized_target(
                f"--base {other} is a GGUF file, the run was made on {model.path}"
            )
        model = replace(model, path=other, revision=None)
    elif recorded.get("commit") and find_model(model).kind == "hub":
        # the branch may have moved on since
        model = replace(model, revision=recorded["commit"])
    try:
        folder = _folder(model)
    except UserError as error:
        if other is not None:
            message = error.message.replace("model.path=", "--base ")
        else:
            message = f"the base of the run: {error.message}"
        hint = error.hint or "--base FOLDER names a copy of the run's base model"
        raise UserError(message, hint=hint) from error
    config = _read_config(folder)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method")
        raise quantized_target(f"the base {folder} is quantized ({method})")
    commit = base_commit(folder)
    gguf_file = Path(model.path).expanduser()
    is_gguf = gguf_file.suffix == ".gguf" and gguf_file.is_file()
    files = [gguf_file] if is_gguf else weight_files(folder)
    identity = _compare(recorded, {file.name: file for file in files}, commit)
    loadable = replace(model, path=str(folder), revision=None)
    return BaseModel(folder, loadable, config, commit, identity)


def _recorded_base(run: RecordedRun) -> dict[str, Any]:
    """Return what the newest start that knows its base's files tells of it."""
    known = [start["base"] for start in run.starts if isinstance(start.get("base"), dict)]
    hashed = [base for base in known if isinstance(base.get("files"), dict) and base["files"]]
    return dict((hashed or known or [{}])[-1])


def _folder(model: ModelConfig) -> Path:
    asset = find_model(model)
    if asset.kind == "hub" and asset.folder is not None:
        return asset.folder
    from lora_train.model_source import download_model, resolve_model

    source = Path(resolve_model(model))
    if source.is_dir():
        return source
    download_model(model)  # says what to do where there is no network
    folder = find_model(model).folder
    if folder is None:
        raise UserError(f"the base model {model.path} is not in the hub cache")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {file}: {error}", hint="fetch the model again") from error


def quantized_target(what: str) -> UserError:
    """Return the refusal to merge into few bits.

    Args:
        what: what was asked for.

    Returns:
        The error to raise.
    """
    return UserError(
        f"{what}: rounding the sum of base and adapter to so few bits throws most of the adapter "
        "away, whose entries are far smaller than the steps between such weights",
        hint="serve the quantized base with the adapter beside it; or merge into the unquantized "
        "model (--base FOLDER) and quantize the result with a tool that calibrates (llm-compressor,"
        " AutoAWQ, llama.cpp's imatrix)",
    )


def _compare(recorded: Mapping[str, Any], files: Mapping[str, Path], commit: str | None) -> str:
    """Refuse a base that is not the recorded one; return how they were compared."""
    if commit is not None and commit == recorded.get("commit"):
        return f"the run's own commit {commit[:12]}"
    entries = {
        name: entry
        for name, entry in (recorded.get("files") or {}).items()
        if name.endswith(_WEIGHT_ENDINGS)
    }
    if any(_sha256(entry) for entry in entries.values()):
        _compare_hashes(entries, files)
        return "weights with the SHA-256 that the run recorded"
    if commit is not None and recorded.get("commit"):
        raise UserError(
            f"{next(iter(files.values())).parent} is commit {commit[:12]}, the run was made on "
            f"{recorded['commit'][:12]}",
            hint=f"hf download {recorded.get('path')} --revision {recorded['commit']}, and name "
            "that snapshot with --base",
        )
    return "names and shapes of the weights (the run recorded no hashes of its base)"


def _compare_hashes(recorded: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    if set(files) != set(recorded):
        raise UserError(
            f"the base holds {', '.join(sorted(files))}; the run was made on "
            f"{', '.join(sorted(recorded))}",
            hint="--base names a copy of the run's own base model",
        )
    hashes = FileHashes()
    for name, file in files.items():
        expected = _sha256(recorded[name])
        if expected is None:  # it could not be read when the run began
            continue
        log.info("comparing %s with what the run recorded", name)
        found = hashes.of(file)["sha256"]
        if found != expected:
            raise UserError(
                f"{file} has sha256 {found[:12]}..., the run was made on {expected[:12]}...: "
                "the adapter was trained on other weights",
                hint="--base names a copy of the run's own base model",
            )
    hashes.save()


def _sha256(entry: Any) -> str | None:
    """Return the hash of a recorded file; None where there was none to be had."""
    found = entry.get("sha256") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
