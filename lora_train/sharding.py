"""`trainer.strategy=fsdp2`: the frozen base sharded over the GPUs, read part by part.

torch's FSDP2 holds the matrices of every decoder layer as rows, a share on each GPU, and gathers a
layer when it is needed. Embedding, output layer, norms and biases are whole on every GPU, and so is
the adapter, of which FSDP2 knows nothing. Each process reads its own rows from the safetensors
files onto its GPU: no process ever holds the model, nor a whole matrix, in host memory.

transformers can load into FSDP2 as well (`from_pretrained(distributed_config=...)`), but shards
embedding, head and norms too, which the fused decoder reads without a call of their module.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lora_train.config import Config, ModelConfig
from lora_train.errors import UserError
from lora_train.gathering import gather_from_all
from lora_train.model_size import count_parameters, linear_shapes
from lora_train.model_source import loading_error, read_config_dict, resolve_model

logger = logging.getLogger(__name__)

# of a GPU's memory, at most, for weights that are sharded over the GPUs of one node alone; the rest
# is for activations
_SHARE_FOR_WEIGHTS = 0.6
# saved by old conversions; computed from config.json nowadays
_COMPUTED = ".rotary_emb.inv_freq"
_MOST_GPUS = 1024


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


class Member(NamedTuple):
    """What a process tells the others, before they decide together."""

    host: str
    dtype: torch.dtype
    """Of the weights."""
    memory: int
    """Bytes that its GPU has; 0 for a CPU."""


def check_shardable(config: Config) -> None:
    """Refuse early, by names alone, a model whose weights are not read as they are stored.

    transformers renames and merges weights of some models as it loads them, such as those of the
    experts of a mixture: a process that reads its own rows of each weight cannot.

    Args:
        config: the run; `trainer.strategy` and `model` are read.

    Raises:
        UserError: fsdp2 would read such a model; or the model cannot be found or read.
    """
    if config.trainer.strategy != "fsdp2" or _world_size() == 1:
        return
    source = resolve_model(config.model)
    model_config = read_config_dict(source, config.model)
    names = _stored_names(source, config.model)
    for part in (model_config, model_config.get("text_config") or {}):
        kind = part.get("model_type")
        for transform in get_checkpoint_conversion_mapping(kind) or ():
            for name in names:
                loaded, _ = transform.rename_source_key(name)
                if loaded != name:
                    raise _unsuitable(
                        config.model,
                        f"a model of type {kind!r} is not read as it is stored: transformers makes "
                        f"{loaded} of {name}",
                    )


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
        UserError: the model cannot be found or read, its weights do not fit, or the processes do
            not compute in one dtype; on all of them.
    """
    if config.trainer.strategy != "fsdp2":
        return None
    world = _world_size()
    if world == 1:
        logger.warning("trainer.strategy=fsdp2 on one device: there is nothing to share, as ddp")
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # FSDP2 takes the current one
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    members = gather_from_all(Member(platform.node(), dtype, memory))
    source = resolve_model(config.model)
    num_shards = choose_num_shards(members, read_config_dict(source, config.model), config.model)
    if num_shards < world:
        shape, names = (world // num_shards, num_shards), ("node", "device")
        return init_device_mesh("cuda", shape, mesh_dim_names=names)["device"]
    return init_device_mesh(device.type, (world,))


def choose_num_shards(
    members: Sequence[Member], model_config: Mapping[str, Any], config: ModelConfig
) -> int:
    """Decide how many processes share the base model, from what all of them know.

    Args:
        members: all processes, in order.
        model_config: the content of config.json.
        config: the section that names the model.

    Returns:
        The processes of a node, where the model fits on each node; otherwise all.

    Raises:
        UserError: they do not compute in one dtype, or the weights do not fit.
    """
    hosts: dict[torch.dtype, list[str]] = {}
    for member in members:
        hosts.setdefault(member.dtype, []).append(member.host)
    if len(hosts) > 1:
        found = "; ".join(
            f"{str(dtype).removeprefix('torch.')} on {', '.join(dict.fromkeys(names))}"
            for dtype, names in hosts.items()
        )
        raise UserError(
            f"trainer.strategy=fsdp2 shares weights of one dtype, these GPUs differ: {found}",
            hint="trainer.precision=fp32, or GPUs of one kind, such as #SBATCH --constraint=a100",
        )
    world, itemsize = len(members), members[0].dtype.itemsize
    memory = min(member.memory for member in members)
    plan = planned_bytes(model_config, itemsize, world)
    if plan is None or memory == 0:
        return world
    if plan.weights > memory:
        raise _too_large(plan, model_config, config, itemsize, memory, world)
    per_node = {len(list(group)) for _, group in groupby(members, lambda member: member.host)}
    local = per_node.pop() if len(per_node) == 1 else world
    plan = planned_bytes(model_config, itemsize, local)
    assert plan is not None
    return local if local > 1 and sum(plan) <= _SHARE_FOR_WEIGHTS * memory else world


def _too_large(
    plan: PlannedBytes,
    model_config: Mapping[str, Any],
    config: ModelConfig,
    itemsize: int,
    memory: int,
    world: int,
) -> UserError:
    hints = []
    for more in range(world + 1, _MOST_GPUS):
        share = planned_bytes(model_config, itemsize, more)
        if share is not None and sum(share) < memory:
            hints.append(f"ask Slurm for {more} such GPUs or more")
            break
    # 4 bits of each weight: as if so many shared it
    nf4 = planned_bytes(model_config, itemsize, 2 * itemsize)
    if nf4 is not None and sum(nf4) < memory:
        gib = nf4.weights / 2**30
        hints.append(f"trainer.strategy=ddp model.quantization=nf4 takes about {gib:.0f} GiB")
    return UserError(
        f"model.path={config.path}: trainer.strategy=fsdp2 over {world} GPUs puts "
        f"{plan.weights / 2**30:.1f} GiB of weights on each, and the smallest has "
        f"{memory / 2**30:.1f} GiB",
        hint="; or ".join(hints) or "ask Slurm for GPUs with more memory",
    )


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


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
        # in fp32, as transformers does: what a model computes itself (GPT-J's positions) would be
        # rounded to the dtype of its weights
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, attn_implementation=attention
        )
    for weight in model.state_dict(keep_vars=True).values():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
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
    index = _index_file(source, config)
    try:
        if index is None:
            return [cached_file(source, SAFE_WEIGHTS_NAME, revision=config.revision)]
        files, _ = get_checkpoint_shard_files(source, index, revision=config.revision)
    except Exception as error:
        raise loading_error(error, config) from error
    return list(files)


def _index_file(source: str, config: ModelConfig) -> str | None:
    try:
        return cached_file(
            source,
            SAFE_WEIGHTS_INDEX_NAME,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except Exception as error:
        raise loading_error(error, config) from error


def _stored_names(source: str, config: ModelConfig) -> list[str]:
    """Return the names of the weights, without fetching any."""
    index = _index_file(source, config)
    if index is not None:
        return list(json.loads(Path(index).read_text())["weight_map"])
    file = Path(source, SAFE_WEIGHTS_NAME)
    if not file.is_file():  # of a hub model; with one file it is small
        return []
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _decoder_layers(model: PreTrainedModel, config: ModelConfig) -> list[torch.nn.Module]:
    # transformers names the classes that must not be split over devices
    classes = set(model._no_split_modules or ())
    layers: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        # Mamba names its block and the mixer within
        is_within = any(name.startswith(f"{outer}.") for outer in layers)
        if type(module).__name__ in classes and not is_within:
            layers[name] = module
    if not layers:
        raise _unsuitable(config, f"{type(model).__name__} does not say which its layers are")
    return list(layers.values())


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
                    if isinstance(targets[name], DTensor):
                        weights[name] = _read_rows(part, targets[name], device)
                    else:  # whole, because a slice of a scalar is none
                        weights[name] = stored.get_tensor(name).to(device, targets[name].dtype)
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


def _read_rows(stored: Any, target: DTensor, device: torch.device) -> DTensor:
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
        hint="trainer.strategy=ddp, which holds the model whole on every GPU; "
        "model.quantization=nf4 makes its linear layers smaller",
    )
