"""What the merged model will hold: each tensor of the base, and what the adapter does to it.

Everything that shows that adapter and base do not belong together is refused here, from the
headers of their files alone. Imports no torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_train.errors import UserError
from lora_train.merge.adapter_file import AdapterFile, LayerUpdate
from lora_train.merge.tensor_files import FLOAT_DTYPES, StoredTensor

_HEAD = "lm_head"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_SHOWN = 3


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the merged model."""

    name: str
    base: StoredTensor
    """Gives its type and shape, and its values where nothing replaces them."""
    update: LayerUpdate | None = None
    """Added to it, if anything is."""
    is_transposed: bool = False
    """Whether the weight is (inputs, outputs): GPT-2's Conv1D, or an embedding."""
    replacement: StoredTensor | None = None
    """Takes its place: a weight that was trained in full."""
    bias_of: LayerUpdate | None = None
    """The update whose bias is added to it."""

    @property
    def is_changed(self) -> bool:
        """Whether its values differ from the base's."""
        return any(part is not None for part in (self.update, self.replacement, self.bias_of))


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the merged model, and its config.json."""

    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    """What a user should know of it."""
    is_base_tied: bool
    """Whether output layer and embedding of the base are one matrix."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.base.num_bytes for tensor in self.tensors)

    @property
    def num_changed(self) -> int:
        """Tensors whose values differ from the base's."""
        return sum(tensor.is_changed for tensor in self.tensors)

    @property
    def dtypes(self) -> list[str]:
        """Types of the tensors that change, such as BF16."""
        return sorted({tensor.base.dtype for tensor in self.tensors if tensor.is_changed})


def plan_merge(
    adapter: AdapterFile,
    base: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    base_name: str,
) -> MergePlan:
    """Find for each tensor of the adapter the one of the base that it changes.

    Args:
        adapter: the adapter.
        base: the tensors of the base model.
        config: config.json of the base model.
        base_name: what messages call the base.

    Returns:
        The plan; each tensor of the adapter is in it once.

    Raises:
        UserError: the adapter belongs to another model, or what it changes cannot be added to.
    """
    matcher = _Matcher(base, is_tied(base, config), base_name)
    planned = {name: PlannedTensor(name, tensor) for name, tensor in base.items()}
    for layer, update in adapter.updates.items():
        name, tensor = matcher.find(layer, "weight")
        if update.magnitude is not None and update.is_embedding:
            raise UserError(f"the adapter of {layer} is DoRA of an embedding: not merged here")
        is_transposed = _check_update(update, tensor, adapter.settings, base_name)
        planned[name] = PlannedTensor(name, tensor, update=update, is_transposed=is_transposed)
        if update.bias is not None:
            name, tensor = matcher.find(layer, "bias")
            _check_shape(update.bias, tensor, layer, base_name)
            planned[name] = PlannedTensor(name, tensor, bias_of=update)
    for key, replacement in adapter.replaced.items():
        layer, _, part = key.rpartition(".")
        name, tensor = matcher.find(layer, part)
        _check_shape(replacement, tensor, layer, base_name)
        if name in planned and planned[name].is_changed:
            raise UserError(f"{adapter.folder} holds {key} both in full and as an adapter")
        planned[name] = PlannedTensor(name, tensor, replacement=replacement)
    notes: list[str] = []
    merged_config = copy.deepcopy(dict(config))
    for name in ("_name_or_path", "quantization_config"):
        merged_config.pop(name, None)
    if matcher.is_tied:
        _settle_tie(planned, matcher, merged_config, notes)
    return MergePlan(tuple(planned.values()), merged_config, tuple(notes), matcher.is_tied)


def is_tied(base: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> bool:
    """Tell whether a model's output layer is the matrix of its embedding.

    Args:
        base: the tensors of the model.
        config: its config.json.

    Returns:
        Whether it is.
    """
    text_config = config.get("text_config") or {}
    stated = config.get("tie_word_embeddings", text_config.get("tie_word_embeddings"))
    # where config.json is silent the model's class decides, and so did the writer of the weights
    return not any(_layer(name) == _HEAD for name in base) if stated is None else bool(stated)


class _Matcher:
    """Finds the tensor of the base that belongs to a layer of the adapter."""

    def __init__(self, base: Mapping[str, StoredTensor], is_tied: bool, base_name: str) -> None:
        self.base = base
        self.base_name = base_name
        self.embedding = next((name for name in base if _layer(name) in _EMBEDDINGS), None)
        self.is_tied = is_tied and self.embedding is not None
        self.head = next((name for name in base if _layer(name) == _HEAD), f"{_HEAD}.weight")

    def find(self, layer: str, part: str) -> tuple[str, StoredTensor]:
        """Return the name of the tensor in the merged model, and the tensor of the base."""
        name = f"{layer}.{part}"
        # GPT-2's files leave out the `transformer.` that its class puts before all names
        for candidate in (name, name.partition(".")[2]):
            if candidate in self.base:
                return candidate, self.base[candidate]
        if self.is_tied and self.embedding is not None and name == self.head:
            return self.head, self.base[self.embedding]
        ending = ".".join(layer.split(".")[-2:])
        alike = sorted(each for each in self.base if each.endswith(f".{part}") and ending in each)
        shown = f"the nearest it has: {', '.join(alike[:_SHOWN])}" if alike else "nothing is alike"
        raise UserError(
            f"the adapter changes {name}, which {self.base_name} does not have; {shown}",
            hint="is it the model that the adapter was trained on? weights that a file holds fused "
            "or under other names are not merged here",
        )


def _check_update(
    update: LayerUpdate, weight: StoredTensor, settings: Mapping[str, Any], base_name: str
) -> bool:
    """Refuse an update that does not fit; return whether the weight is (inputs, outputs)."""
    _check_dtype(weight, base_name)
    inputs, outputs = update.a.shape[1], update.b.shape[0]
    fan_in_fan_out = bool(settings.get("fan_in_fan_out")) or update.is_embedding
    if weight.shape == (outputs, inputs) and (inputs != outputs or not fan_in_fan_out):
        return False
    if weight.shape == (inputs, outputs) and fan_in_fan_out:
        return True
    raise UserError(
        f"the adapter of {update.name} is for a weight of {outputs} x {inputs}, "
        f"{base_name} has {_extents(weight)} there",
        hint="this is not the model that the adapter was trained on; --base names another",
    )


def _check_dtype(weight: StoredTensor, base_name: str) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise UserError(
            f"{weight.name} of {base_name} is stored as {weight.dtype}: a sum would be rounded to "
            "that, and most of the update with it",
            hint="--base FOLDER with the model in bf16",
        )


def _check_shape(found: StoredTensor, base: StoredTensor, layer: str, base_name: str) -> None:
    _check_dtype(base, base_name)
    if found.shape != base.shape:
        raise UserError(
            f"the adapter holds {layer} as {_extents(found)}, {base_name} has {_extents(base)}",
            hint="was the vocabulary extended? merge into a base with the same number of tokens",
        )


def _settle_tie(
    planned: dict[str, PlannedTensor],
    matcher: _Matcher,
    config: dict[str, Any],
    notes: list[str],
) -> None:
    """Keep output layer and embedding one matrix where they still are; else write both."""
    assert matcher.embedding is not None
    embedding, head = planned[matcher.embedding], planned.get(matcher.head)
    if not embedding.is_changed and (head is None or not head.is_changed):
        return
    if head is not None and _same_values(embedding.replacement, head.replacement):
        # trained as one: transformers ties them again when it loads
        if matcher.head not in matcher.base:
            del planned[matcher.head]
        return
    if head is None or (matcher.head in matcher.base and not head.is_changed):
        # what a file holds of a tied head is not read: the embedding is
        base = matcher.base[matcher.embedding]
        planned[matcher.head] = PlannedTensor(matcher.head, base)
    # an explicit false: the classes' own defaults differ
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
    notes.append(
        "the adapter changes the embedding or the output layer, which the base holds as one "
        "matrix: the merged model holds two (tie_word_embeddings=false)"
    )


def _same_values(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))


def _layer(name: str) -> str:
    """Return the last part of the layer's name that a tensor belongs to."""
    return re.sub(r"\.weight$", "", name).rpartition(".")[2]


def _extents(tensor: StoredTensor) -> str:
    return " x ".join(map(str, tensor.shape))
