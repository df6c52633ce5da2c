"""Where a base model comes from: a folder, the hub, a GGUF file, or the embedded one.

Everything that can be wrong with it and shows without loading weights is refused here.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_train.config import ModelConfig
from lora_train.errors import UserError

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFE_WEIGHTS = ("*.safetensors",)
_PICKLED_WEIGHTS = ("pytorch_model*.bin",)
# the same weights once more: in Mistral's own format, in another precision
_DUPLICATES = ("consolidated*", "model.*.safetensors", "model.*.safetensors.index.json")


def resolve_model(config: ModelConfig) -> str:
    """Return the local folder, or the hub name, that transformers is to load from.

    A GGUF file is converted once, into the cache folder under its own hash.

    Args:
        config: the section that names it.

    Returns:
        What `from_pretrained` takes as its first argument.

    Raises:
        UserError: `model.path` is a path, and nothing usable stands there.
    """
    reference = config.path
    if reference.startswith("embedded:"):
        from lora_train.quickstart import embedded_path

        return str(embedded_path(reference))
    path = Path(reference).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        _check_folder(path, config)
        return str(path)
    if path.is_file():
        raise UserError(
            f"model.path={reference} is a file that is not .gguf",
            hint=f"name its folder: model.path={path.parent}",
        )
    is_path = reference.startswith((".", "/", "~")) or path.suffix == ".gguf"
    # `models/llama` beside a folder `models` is a path with a typo, not an organization
    is_path = is_path or (path.parent != Path(".") and path.parent.is_dir())
    if is_path or not _HUB_NAME.fullmatch(reference):
        raise UserError(f"model.path={reference}: no such file or folder{_nearest(path)}")
    return reference


def download_model(config: ModelConfig) -> None:
    """Fetch a hub model into the cache, or convert a GGUF file, where that is not done yet.

    Args:
        config: the section that names it.

    Raises:
        UserError: as `resolve_model`; or the hub does not give it.
    """
    source = resolve_model(config)
    if Path(source).is_dir():
        return
    wanted, unwanted = file_patterns(config)
    try:
        snapshot_download(
            source,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    except Exception as error:
        raise loading_error(error, config) from error


def file_patterns(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Return which files of a model's repository a run loads.

    Args:
        config: the section that names it.

    Returns:
        Patterns of the files that are wanted, and of those that are not although they match.
    """
    weights = [*_SAFE_WEIGHTS, *(_PICKLED_WEIGHTS if config.allow_pickle else ())]
    wanted = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", *weights]
    return wanted, ["*/*", *_DUPLICATES]


def check_listed(names: Collection[str], config: ModelConfig) -> None:
    """Refuse a repository that holds no model which can be loaded.

    Args:
        names: those of its files that `file_patterns` wants.
        config: the section that names it.

    Raises:
        UserError: there is no config.json, or there are no weights that may be loaded.
    """
    where = f"model.path={config.path}"
    if "config.json" not in names:
        raise UserError(f"{where} has no config.json", hint="name a model in Hugging Face's format")
    kinds = ("model.safetensors", *(("pytorch_model.bin",) if config.allow_pickle else ()))
    if any(kind in names or f"{kind}.index.json" in names for kind in kinds):
        return
    if any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{where} has *.safetensors, and none that transformers loads: neither "
            "model.safetensors nor model.safetensors.index.json",
            hint="take another model, or another model.revision",
        )
    raise _pickle_error(where)


def read_config_dict(source: str, config: ModelConfig) -> dict[str, Any]:
    """Return the model's config.json, without running any code.

    Args:
        source: what `resolve_model` returned.
        config: the section that names it.

    Returns:
        The content of config.json.

    Raises:
        UserError: there is none, or it names a model that cannot be loaded as configured.
    """
    # imports torch, which a download needs not
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    try:
        found, _ = PreTrainedConfig.get_config_dict(source, revision=config.revision)
    except Exception as error:
        raise loading_error(error, config) from error
    model_type = found.get("model_type")
    known = model_type in CONFIG_MAPPING
    if "auto_map" in found and not known and not config.trust_remote_code:
        raise UserError(
            f"model.path={config.path} brings its own Python code "
            f"({', '.join(sorted(map(str, found['auto_map'].values())))})",
            hint="read that code, then set model.trust_remote_code=true to run it",
        )
    if not known and "auto_map" not in found:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        meant = f"; the nearest it knows is {close[0]}" if close else ""
        raise UserError(
            f"model.path={config.path}: transformers {__version__} knows no model type "
            f"{model_type!r}{meant}",
            hint="choose another model, or an image with a newer transformers",
        )
    refuse_quantized(found, config)
    return found


def refuse_quantized(found: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuse a model whose weights are quantized as they are stored.

    Args:
        found: the content of its config.json.
        config: the section that names it.

    Raises:
        UserError: they are.
    """
    quantization = found.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method")
        raise UserError(
            f"model.path={config.path} is already quantized ({method})",
            hint="name the unquantized model, and set model.quantization=nf4 for 4 bit",
        )


def max_positions(config: ModelConfig) -> int | None:
    """Look up the longest sequence that the model was made for.

    Args:
        config: the section that names the model.

    Returns:
        Its length in tokens; None if the model says nothing.

    Raises:
        UserError: as `resolve_model` and `read_config_dict`.
    """
    found = read_config_dict(resolve_model(config), config)
    return found.get("text_config", found).get("max_position_embeddings")


def loading_error(error: BaseException, config: ModelConfig) -> UserError:
    """Return what a failure to fetch or read the model means to the user."""
    where = f"model.path={config.path}"
    chain = list(_chain(error))
    kinds = tuple(type(link) for link in chain)

    def raised(*types: type[BaseException]) -> bool:
        return any(issubclass(kind, types) for kind in kinds)

    if raised(GatedRepoError) or "access a gated repo" in str(error):
        return UserError(
            f"{where} is a gated repository, and {_token_state()}",
            hint=f"accept its terms on https://huggingface.co/{config.path}, then give HF_TOKEN",
        )
    if raised(RevisionNotFoundError):
        return UserError(
            f"{where} has no revision {config.revision!r}",
            hint="model.revision is a branch, a tag or a whole commit hash",
        )
    if raised(RepositoryNotFoundError, HFValidationError):
        return UserError(
            f"{where} is neither a folder here nor a repository on the hub that can be seen; "
            f"{_token_state()}",
            hint="check the name (org/name); a private repository needs HF_TOKEN",
        )
    if raised(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError) or (
        "couldn't connect" in str(error) or "offline mode" in str(error)
    ):
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        hub_cache = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        whole = "whole " if raised(IncompleteSnapshotError) else ""
        return UserError(
            f"{where} is not {whole}in the hub cache ({hub_cache}), and {why}",
            hint="on a node with network, once and with the same HF_HOME: HF_HUB_OFFLINE=0 "
            "lora-train prefetch, then the words of this run",
        )
    if not config.allow_pickle and (
        raised(EntryNotFoundError) or "safetensors" in str(error).lower()
    ):
        return _pickle_error(where)
    last = chain[-1]
    return UserError(f"{where} cannot be loaded: {type(last).__name__}: {last}")


def _chain(error: BaseException | None) -> Any:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _token_state() -> str:
    return "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"


def _check_folder(folder: Path, config: ModelConfig) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model.path={folder} holds an adapter, not a base model",
                hint="name the base model in model.path",
            )
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"model.path={gguf[0]}" if gguf else "name the folder that holds config.json"
        raise UserError(f"model.path={folder} has no config.json", hint=hint)
    weights = [file for pattern in _SAFE_WEIGHTS for file in folder.glob(pattern)]
    unreadable = [file for file in weights if not os.access(file, os.R_OK)]
    if unreadable:  # safetensors makes files that their owner alone may read
        raise UserError(
            f"model.path={folder}: {unreadable[0].name} may not be read by this user",
            hint=f"its owner can mend it: chmod -R a+rX {folder}",
        )
    if weights:
        return
    pickled = any(any(folder.glob(pattern)) for pattern in _PICKLED_WEIGHTS)
    if not pickled:
        raise UserError(
            f"model.path={folder} has no weights (*.safetensors)",
            hint="was the download cut short? fetch the model again",
        )
    if not config.allow_pickle:
        raise _pickle_error(f"model.path={folder}")


def _pickle_error(where: str) -> UserError:
    return UserError(
        f"{where} has no safetensors, only pickled weights (.bin), which can run code when loaded",
        hint="if you trust where they come from, set model.allow_pickle=true",
    )


def _nearest(path: Path) -> str:
    """Return `; did you mean ...` for the sibling whose name is nearest, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        existing = next((folder for folder in parent.parents if folder.is_dir()), parent)
        return f"; {existing} exists, {parent} does not"
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""


@functools.cache
def _converted(gguf_file: Path) -> Path:
    """Return the Hugging Face folder made from a GGUF file, making it if absent."""
    from lora_train.gguf_conversion import gguf_to_hf
    from lora_train.paths import atomic_folder, cache_dir, sha256_of

    folder = cache_dir() / "gguf" / sha256_of(gguf_file)
    if not folder.is_dir():
        logger.info("converting %s to bf16 safetensors in %s", gguf_file, folder)
        try:
            with atomic_folder(folder) as work:
                gguf_to_hf(gguf_file, work)
        except ValueError as error:
            raise UserError(f"model.path={gguf_file}: {error}") from error
    return folder
