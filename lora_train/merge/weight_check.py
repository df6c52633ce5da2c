"""Merged weights, read back from disk and held against PEFT's own merge in fp64.

What the adapter does to which layer is asked of PEFT: the base model is built without weights, and
PEFT puts the adapter on it. Then some outputs of each layer get their weights, and PEFT merges
them. Each number that was written must be the nearest of its type to that: a layer left out, taken
twice or scaled 2 % too high is found, which hardly shows in what the model answers.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_train.errors import RunError, UserError
from lora_train.merge.adapter_file import AdapterFile
from lora_train.merge.base_model import BaseModel
from lora_train.merge.plan import MergePlan, PlannedTensor
from lora_train.merge.tensor_files import FLOAT_DTYPES, StoredTensor, read_folder
from lora_train.merge.weights import DTYPES, read_rows
from lora_train.model_source import loading_error

_ADAPTER = "default"
# of each tensor, the first and the last among them; a fault of one layer is in all of its rows
_MAX_ROWS = 16
_SHOWN = 3


@dataclass(frozen=True)
class WeightCheck:
    """What was compared, without a difference."""

    num_layers: int
    """Adapted layers, each of which was merged once."""
    num_values: int
    """Numbers compared with base plus update in fp64, or with the base where nothing is added."""


def adapted_layers(base: BaseModel, adapter: AdapterFile) -> dict[str, Any]:
    """Let PEFT say what the adapter changes in the base.

    Args:
        base: the base model; its config.json alone is read.
        adapter: the adapter.

    Returns:
        PEFT's layers without weights, by their names in the base model.

    Raises:
        UserError: the adapter's file holds another set of layers.
    """
    code = base.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=code)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
            settings = LoraConfig.from_pretrained(str(adapter.folder))
            peft_model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    except Exception as error:
        raise loading_error(error, base.model) from error
    named = peft_model.get_base_model().named_modules()
    layers = {name: module for name, module in named if isinstance(module, LoraLayer)}
    missing = sorted(set(layers) - set(adapter.updates))
    if missing:
        raise UserError(
            f"{base.folder} has {len(missing)} layers that the adapter targets and holds nothing "
            f"for: {', '.join(missing[:_SHOWN])}",
            hint="it is a larger model than the one that the adapter was trained on",
        )
    unknown = sorted(set(adapter.updates) - set(layers))
    if unknown:
        raise UserError(
            f"{adapter.folder} holds tensors of {', '.join(unknown[:_SHOWN])}, which its own "
            "adapter_config.json does not target",
            hint="the two files of the adapter belong to different runs",
        )
    return layers


@torch.no_grad()
def check_weights(plan: MergePlan, layers: Mapping[str, Any], folder: Path) -> WeightCheck:
    """Compare what was written with PEFT's merge, for some rows of every tensor.

    Args:
        plan: the merge.
        layers: what `adapted_layers` returned.
        folder: of the merged model.

    Returns:
        How much was compared.

    Raises:
        RunError: a tensor or a layer is left out or there twice, or a number is not the nearest.
    """
    written = read_folder(folder)
    names = [planned.name for planned in plan.tensors]
    merged = [planned.update.name for planned in plan.tensors if planned.update is not None]
    if sorted(written) != sorted(names) or sorted(merged) != sorted(layers):
        raise RunError(
            f"{folder} holds {len(written)} tensors and {len(merged)} merged layers, which should "
            f"be {len(names)} and {len(layers)}",
            hint="this is a fault of lora-train: please report it",
        )
    num_values = 0
    for planned in plan.tensors:
        if planned.base.dtype not in FLOAT_DTYPES:
            continue
        found, exact, slack = _compared(planned, layers, written[planned.name])
        spacing = _spacing(exact, DTYPES[planned.base.dtype])
        error = (found - exact).abs()
        wrong = ~(error <= spacing / 2 + slack)  # also where it is not a number
        if bool(wrong.any()):
            raise RunError(
                f"{planned.name}: {int(wrong.sum())} of {wrong.numel()} numbers that were looked "
                f"at are not base plus update, as PEFT merges them in fp64; off by up to "
                f"{float((error / spacing).max()):.3g} times the distance of two numbers",
                hint="the file system returned other bytes than were written, or this is a fault "
                "of lora-train: try --output on another file system, and report it",
            )
        num_values += error.numel()
    return WeightCheck(len(layers), num_values)


def _compared(
    planned: PlannedTensor, layers: Mapping[str, Any], written: StoredTensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers that were written, what they should be, and what fp32 may have changed."""
    source, update = planned.replacement or planned.base, planned.update or planned.bias_of
    if update is None:
        rows = _sample(written.shape[0] if written.shape else 1)
        found, exact = _rows(written, rows), _rows(source, rows)
        return found, exact, torch.zeros_like(exact)
    layer = layers[update.name]
    is_linear = not update.is_embedding
    # weights of Conv1D are (inputs, outputs): whole, for a sample of outputs
    are_columns = is_linear and planned.update is not None and bool(layer.fan_in_fan_out)
    outputs = _sample(written.shape[1] if are_columns else written.shape[0])

    def pick(tensor: StoredTensor) -> Tensor:
        return _whole(tensor)[:, outputs] if are_columns else _rows(tensor, outputs)

    base, scaling = pick(source), layer.scaling[_ADAPTER]
    if planned.update is None:
        assert update.bias is not None
        exact = base + _rows(update.bias, outputs) * scaling
        terms = base.abs() + exact.abs()
    else:
        a, b = _whole(update.a), _whole(update.b)
        a, b = (a, b[outputs]) if is_linear else (a[:, outputs], b)
        lengths = None if update.magnitude is None else _whole(update.magnitude).flatten()[outputs]
        exact = _merged_by_peft(layer, base, a, b, lengths)
        terms, total = b.abs() @ a.abs() * abs(scaling), b @ a * scaling
        if are_columns or update.is_embedding:
            terms, total = terms.T, total.T
        terms, total = terms + base.abs(), total + base
        if lengths is not None:  # DoRA scales each output
            inputs = 0 if are_columns else 1
            terms *= exact.norm(dim=inputs, keepdim=True) / total.norm(dim=inputs, keepdim=True)
    # the fp32 sum of base and rank products; with DoRA also a sum of squares over the inputs
    return pick(written), exact, (update.rank + 64) * 2.0**-24 * terms


def _merged_by_peft(
    layer: Any, base: Tensor, a: Tensor, b: Tensor, lengths: Tensor | None
) -> Tensor:
    """Give some outputs of one of PEFT's layers their weights, and let it merge them."""
    layer.get_base_layer().weight = nn.Parameter(base.clone(), requires_grad=False)
    if _ADAPTER in layer.lora_embedding_A:
        layer.lora_embedding_A[_ADAPTER] = nn.Parameter(a, requires_grad=False)
        layer.lora_embedding_B[_ADAPTER] = nn.Parameter(b, requires_grad=False)
    else:
        layer.lora_A[_ADAPTER].weight = nn.Parameter(a, requires_grad=False)
        layer.lora_B[_ADAPTER].weight = nn.Parameter(b, requires_grad=False)
        # of lora_bias: checked with the base's bias
        layer.lora_bias[_ADAPTER] = False
    if lengths is not None:
        layer.lora_magnitude_vector[_ADAPTER].weight = nn.Parameter(lengths, requires_grad=False)
    layer.merge(adapter_names=[_ADAPTER])
    return layer.get_base_layer().weight.data


def _sample(num_rows: int) -> list[int]:
    """Return at most `_MAX_ROWS` rows at even distances, the first and the last among them."""
    count = min(num_rows, _MAX_ROWS)
    return sorted({row * (num_rows - 1) // max(1, count - 1) for row in range(count)})


def _rows(tensor: StoredTensor, rows: list[int]) -> Tensor:
    if not tensor.shape:
        tensor = dataclasses.replace(tensor, shape=(1,))
    if not rows:
        return _whole(tensor)
    return torch.cat([read_rows(tensor, row, row + 1) for row in rows]).double()


def _whole(tensor: StoredTensor) -> Tensor:
    return read_rows(tensor, 0, tensor.shape[0]).double()


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of a type around these, fp64."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(limits.smallest_normal))
    return torch.ldexp(torch.full_like(values, limits.eps), exponent - 1)
