"""`trainer.strategy=fsdp2`: the frozen base sharded over the GPUs, read part by part.

torch's FSDP2 holds the matrices of every decoder layer as rows, a share on each GPU, and gathers a
layer when it is needed. Embedding, output layer, norms and biases are whole on every GPU, and so is
the adapter, of which FSDP2 knows nothing. Each process reads its own rows from the safetensors
files onto its GPU: no process ever holds the model, nor a whole matrix, in host memory.

transformers can load into FSDP2 as well (`from_pretrained(distributed_config=...)`), but shards
embedding, head and norms too, which the fused decoder reads without a call of their module.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lora_train.config import Config, ModelConfig
from lora_train.errors import UserError
from lora_train.model_size import count_parameters, linear_shapes
from lora_train.model_source import loading_error, read_config_dict, resolve_model

logger = logging.getLogger(__name__)

# of a GPU's memory, at most, for weights that are sharded over the GPUs of one node alone; the rest
# is for activations
_SHARE_FOR_WEIGHTS = 0.6
# saved by old conversions; computed from config.json nowadays
_COMPUTED = ".rotary_emb.inv_freq"


class PlannedBytes(NamedTuple):
    """Memory that the weights take on each GPU."""

    weights: int
    """All the time: the shards, and what is whole on every GPU."""
    working: int
    """While training: the layer in use, the one being gathered, and the fused kernels' buffers."""


def planned_bytes(
    model_config: Mapping[str, Any], itemsize: int, num_shards: int
) -> PlannedBytes | None:
    """Compute the memory that a sharded base model takes on each GPU.

    Args:
        model_config: the content of config.json.
        itemsize: bytes of a weight.
        num_shards: GPUs that share a layer.

    Returns:
        Bytes, exact but for rows that do not divide evenly; None for a model of another kind.
    """
    shapes, total = linear_shapes(model_config), count_parameters(model_config)
    if shapes is None or total is None:
        return None
    layer = sum(inputs * outputs for inputs, outputs in shapes.values())
    matrices = layer * int(model_config["num_hidden_layers"])
    weights = total - matrices + -(-matrices // num_shards)
    return PlannedBytes(weights * itemsize, 3 * layer * itemsize)


def make_mesh(config: Config, device: torch.device, dtype: torch.dtype) -> DeviceMesh | None:
    """Say which processes share the base model; a collective call.

    On several nodes the GPUs of each node share a model of their own where it fits: between nodes
    every layer would be gathered over the network, twice or three times a micro-batch.

    Args:
        config: the run; `trainer.strategy` and `model` are read.
        device: of this process.
        dtype: of the weights.

    Returns:
        One dimension, those that this process shares with; None: the base model is whole in each
        process.

    Raises:
        UserError: the model cannot be found or read.
    """
    if config.trainer.strategy != "fsdp2":
        return None
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        logger.warning("trainer.strategy=fsdp2 on one device: there is nothing to share, as ddp")
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP2 takes the current one
    hosts = [""] * world
    distributed.all_gather_object(hosts, socket.gethostname())
    per_node = {len(list(processes)) for _, processes in groupby(hosts)}
    local = per_node.pop() if len(per_node) == 1 else world
    if 1 < local < world and device.type == "cuda":
        source = resolve_model(config.model)
        plan = planned_bytes(read_config_dict(source, config.model), dtype.itemsize, local)
        room = _SHARE_FOR_WEIGHTS * torch.cuda.get_device_properties(device).total_memory
        if plan is not None and sum(plan) <= room:
            shape, names = (world // local, local), ("node", "device")
            return init_device_mesh("cuda", shape, mesh_dim_names=names)["device"]
    return init_device_mesh(device.type, (world,))


def load_sharded(
    source: str,
    model_config: PreTrainedConfig,
    attention: str,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh,
) -> PreTrainedModel:
    """Load a base model whose decoder layers are sharded over the mesh.

    Args:
        source: what `resolve_model` returned.
        model_config: its configuration.
        attention: name of the implementation.
        config: the section that names the model.
        dtype: of the weights.
        device: of this process.
        mesh: what `make_mesh` returned.

    Returns:
        The model, frozen, in evaluation mode as transformers loads it.

    Raises:
        UserError: it has no safetensors, or these do not hold its parameters by their names.
    """
    files = _weight_files(source, config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=attention
        )
    model.requires_grad_(False).eval()
    layers = _decoder_layers(model, config)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    for layer in layers:
        # norms and biases are a thousandth of it
        narrow = {parameter for parameter in layer.parameters() if parameter.ndim < 2}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=narrow)
    # holds nothing itself; lets FSDP2 gather the next layer while it computes one
    fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.base_model.parameters()))
    weights = _read_weights(model, files, config, device)
    # strict: names were compared
    model.load_state_dict(weights, strict=False, assign=True)
    del weights
    model.tie_weights()
    model.to(device)  # what is left are buffers
    unread = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unread, unread
    _log_memory(model_config, dtype, device, mesh, before)
    return model


def _log_memory(
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh,
    before: int,
) -> None:
    plan = planned_bytes(model_config.to_dict(), dtype.itemsize, mesh.size())
    planned = "" if plan is None else f": {plan.weights / 2**30:.1f} GiB on each as planned"
    found = ""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device) - before
        found = f", {allocated / 2**30:.1f} GiB allocated"
    working = "" if plan is None else f"; {plan.working / 2**30:.1f} GiB more while training"
    logger.info(
        "the base model is sharded over %d devices%s%s%s", mesh.size(), planned, found, working
    )


def _weight_files(source: str, config: ModelConfig) -> list[str]:
    """Return the safetensors files of a folder or a hub model, fetched if they are not here."""
    try:
        index = cached_file(
            source,
            SAFE_WEIGHTS_INDEX_NAME,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if index is None:
            return [cached_file(source, SAFE_WEIGHTS_NAME, revision=config.revision)]
        files, _ = get_checkpoint_shard_files(source, index, revision=config.revision)
    except Exception as error:
        raise loading_error(error, config) from error
    return list(files)


def _decoder_layers(model: PreTrainedModel, config: ModelConfig) -> list[torch.nn.Module]:
    # transformers names the classes that must not be split over devices
    classes = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    if not layers:
        raise _unsuitable(config, f"{type(model).__name__} does not say which its layers are")
    return layers


def _read_weights(
    model: PreTrainedModel, files: list[str], config: ModelConfig, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read this process's part of every weight, onto its device."""
    targets = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    weights: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for file in files:
        try:
            # mapped, one file at a time: the backend `pread` reads whole weights for a part of them
            with safe_open(file, framework="pt") as stored:
                for name in stored.offset_keys():
                    if name in tied or name.endswith(_COMPUTED):
                        continue
                    if name not in targets:
                        unknown.append(name)
                        continue
                    part = stored.get_slice(name)
                    if tuple(part.get_shape()) != tuple(targets[name].shape):
                        raise _unsuitable(
                            config,
                            f"{name} is {part.get_shape()} in {file}, config.json means "
                            f"{list(targets[name].shape)}",
                        )
                    weights[name] = _read(part, targets[name], device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"model.path={config.path}: its share does not fit on {device}: {error}",
                hint="ask Slurm for more GPUs, or set trainer.strategy=ddp and "
                "model.quantization=nf4",
            ) from error
    missing = sorted(set(targets) - set(weights) - tied)
    if unknown or missing:
        found = []
        if missing:
            found.append(f"{len(missing)} of its parameters have no weights, first {missing[0]}")
        if unknown:
            found.append(f"{len(unknown)} weights have no parameter, first {sorted(unknown)[0]}")
        raise _unsuitable(config, "; ".join(found))
    return weights


def _read(stored: Any, target: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not isinstance(target, DTensor):
        return stored[:].to(device, target.dtype)
    mesh = target.device_mesh
    assert target.placements == (Shard(0),)
    # as torch.chunk divides: the last processes may have fewer rows, or none
    num_rows = -(-target.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * num_rows, target.shape[0])
    local_shape = target.to_local().shape
    if local_shape[0] == 0:
        local = torch.empty(local_shape, dtype=target.dtype, device=device)
    else:
        rows = stored[first : min(first + num_rows, target.shape[0])]
        local = rows.to(device, target.dtype)
    assert local.shape == local_shape
    return DTensor.from_local(
        local, mesh, target.placements, shape=target.shape, stride=target.stride()
    )


def _unsuitable(config: ModelConfig, reason: str) -> UserError:
    return UserError(
        f"trainer.strategy=fsdp2 with model.path={config.path}: {reason}",
        hint="trainer.strategy=ddp with model.quantization=nf4 loads any model of transformers",
    )
