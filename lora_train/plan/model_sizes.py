"""The config.json of a run's base model, from wherever it can be had. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_train.config import ModelConfig
from lora_train.errors import UserError
from lora_train.known_models import MODELS
from lora_train.preflight.assets import read_model_config


def known_sizes(config: ModelConfig) -> dict[str, Any] | None:
    """Return what is known without network.

    Args:
        config: the section that names the model.

    Returns:
        The content of config.json; of a recipe's model what of it decides about sizes; None: the
        model is not here.
    """
    return read_model_config(config) or MODELS.get(config.path)


def find_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json; fetches that file alone where it is not here.

    Args:
        config: the section that names the model.

    Returns:
        As `known_sizes`.

    Raises:
        UserError: there is no such model, it cannot be fetched, or no run can take it.
    """
    # takes 0.15 s, which preflight does without
    from lora_train.model_source import read_config_dict, refuse_quantized, resolve_model

    known = known_sizes(config)
    if known is None:
        file = Path(config.path).expanduser() / "config.json"
        if file.is_file():
            raise UserError(
                f"model.path={config.path}: its config.json cannot be read, or is none",
                hint=f"fetch the model again; python -m json.tool {file} says where it breaks",
            )
        return read_config_dict(resolve_model(config), config)
    refuse_quantized(known, config)
    return known
