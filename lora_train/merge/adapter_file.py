"""An adapter as its two files hold it, sorted by the layer that each tensor belongs to.

Nothing is left over in silence: a tensor or a setting that is not understood is refused. Imports
no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.merge.tensor_files import FLOAT_DTYPES, StoredTensor, read_header

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_B.bias": "bias",
}
_PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
# each makes the adapter something else than a product added to a weight
_OTHER_MATHS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip

_BESIDE = "use it beside its base model, with PEFT"
_COPY_AGAIN = "was it copied in part? copy the adapter's folder again"


@dataclass(frozen=True)
class LayerUpdate:
    """What the adapter adds to the weight W of one layer: scaling * B A."""

    name: str
    """The layer's name in the base model."""
    a: StoredTensor
    """(r, inputs)."""
    b: StoredTensor
    """(outputs, r)."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    rank: int
    magnitude: StoredTensor | None
    """DoRA's lengths of the rows of the sum, (outputs,)."""
    bias: StoredTensor | None
    """Of B, (outputs,); scaled as B A is."""
    is_embedding: bool
    """Its weight is (inputs, outputs): a lookup."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder in PEFT's format."""

    folder: Path
    settings: Mapping[str, Any]
    """adapter_config.json."""
    updates: Mapping[str, LayerUpdate] = field(default_factory=dict)
    """By the layer's name."""
    replaced: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Weights that were trained in full, by the name of the base model's tensor."""

    @property
    def tensors(self) -> list[StoredTensor]:
        """All of its tensors."""
        parts = [
            part
            for update in self.updates.values()
            for part in (update.a, update.b, update.magnitude, update.bias)
            if part is not None
        ]
        return [*parts, *self.replaced.values()]

    @property
    def ranks(self) -> list[int]:
        """The different ranks, the lowest first."""
        return sorted({update.rank for update in self.updates.values()})

    @property
    def scalings(self) -> list[float]:
        """The different scalings, the lowest first."""
        return sorted({update.scaling for update in self.updates.values()})


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter's settings, and which tensors it holds for what.

    Args:
        folder: in PEFT's format.

    Returns:
        The adapter; its tensors are not read yet.

    Raises:
        UserError: it is no LoRA, has a setting or a tensor that cannot be merged, or its settings
            contradict its tensors.
    """
    file = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {file}: {error}", hint=_COPY_AGAIN) from error
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder} holds a {settings.get('peft_type')} adapter; only LORA is merged here",
            hint=_BESIDE,
        )
    other = [name for name in _OTHER_MATHS if settings.get(name)]
    if other:
        raise UserError(
            f"{file}: {', '.join(other)} makes this adapter more than a product added to a weight, "
            "which cannot be merged",
            hint=_BESIDE,
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors", hint=_COPY_AGAIN)
    parts: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    embeddings = set()
    for key, tensor in read_header(folder / "adapter_model.safetensors").items():
        name = key.removeprefix(_PREFIX)
        match = _PART.fullmatch(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{tensor.file} holds {key} as {tensor.dtype}, which is not merged here",
                hint=_BESIDE,
            )
        if not key.startswith(_PREFIX) or (match is None and "lora_" in name):
            raise UserError(
                f"{tensor.file} holds {key}, which is no part of a LoRA that is known", hint=_BESIDE
            )
        if match is None:
            replaced[name.replace(".base_layer.", ".")] = tensor
            continue
        layer, part = match.groups()
        parts.setdefault(layer, {})[_PARTS[part]] = tensor
        if "embedding" in part:
            embeddings.add(layer)
    updates = {
        layer: _update(layer, found, settings, layer in embeddings, folder)
        for layer, found in parts.items()
    }
    if not updates and not replaced:
        raise UserError(f"{folder} holds no tensors: there is nothing to merge", hint=_COPY_AGAIN)
    return AdapterFile(folder, settings, updates, replaced)


def _update(
    layer: str,
    parts: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
    is_embedding: bool,
    folder: Path,
) -> LayerUpdate:
    needed = {"a": "lora_A", "b": "lora_B"}
    if settings.get("use_dora"):
        needed["magnitude"] = "lora_magnitude_vector"
    missing = {text for part, text in needed.items() if part not in parts}
    if missing:
        raise UserError(
            f"{folder}: the adapter of {layer} lacks its {', '.join(sorted(missing))}",
            hint=_COPY_AGAIN,
        )
    rank = int(_of_layer(layer, settings["r"], settings.get("rank_pattern")))
    a, b = parts["a"], parts["b"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        # the scaling follows the rank that is told: with another, every weight would be wrong
        raise UserError(
            f"{folder}: A of {layer} is {_extents(a)}, B is {_extents(b)}, and adapter_config.json "
            f"says that the rank is {rank}",
            hint="the two files of the adapter belong to different runs",
        )
    alpha = float(_of_layer(layer, settings["lora_alpha"], settings.get("alpha_pattern")))
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    magnitude, bias = parts.get("magnitude"), parts.get("bias")
    return LayerUpdate(layer, a, b, scaling, rank, magnitude, bias, is_embedding)


def _of_layer(layer: str, common: Any, pattern: Mapping[str, Any] | None) -> Any:
    for name, value in (pattern or {}).items():
        # as PEFT matches it
        if re.match(rf"(.*\.)?({name})$", layer):
            return value
    return common


def _extents(tensor: StoredTensor) -> str:
    return " x ".join(map(str, tensor.shape))
