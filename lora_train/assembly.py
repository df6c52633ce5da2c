"""What a run is put together from: accelerator, trainer, metrics, and what is known of it then."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch.distributed.device_mesh import DeviceMesh

from lora_train.attention import packing_kwargs
from lora_train.batch_split import gradient_accumulation_steps, micro_batch_size
from lora_train.config import Config
from lora_train.config_loading import flatten, read_yaml, to_tree
from lora_train.data.batches import BatchSchedule, collate
from lora_train.data.prepared import PreparedData
from lora_train.device import select_device, select_precision, set_cpu_threads
from lora_train.errors import UserError
from lora_train.metrics import MetricsLog, keep_trackers_offline
from lora_train.model_size import checkpoint_bytes
from lora_train.model_source import read_config_dict, resolve_model
from lora_train.optimizer import make_optimizer, make_scheduler
from lora_train.plan.settling import Settings, has_auto, settle
from lora_train.ranks import Ranks
from lora_train.rendezvous import Group
from lora_train.run_directory import RunDirectory
from lora_train.trainer import Trainer
from lora_train.walltime import Walltime

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion

# PEFT keeps them all on the device; EVA's directions settle within far fewer
_CALIBRATION_PACKS = 256


def make_accelerator(config: Config, directory: RunDirectory, group: Group) -> Accelerator:
    """Return accelerate's view of this process: device, precision, trackers."""
    set_cpu_threads(group.ranks.local_world_size, share=group.ranks.shares_cores)
    device = select_device(group.ranks.local_rank)
    bf16 = select_precision(config.trainer.precision, device).dtype == torch.bfloat16
    if not config.log.online:
        keep_trackers_offline(directory.path)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(directory.path), logging_dir=str(directory.path / "trackers")
        ),
    )


def settle_settings(
    config: Config,
    device: torch.device,
    group: Group,
    directory: RunDirectory,
    mesh: DeviceMesh | None = None,
) -> Config:
    """Decide what the configuration leaves to the GPUs' memory; everywhere the same.

    Args:
        config: the run, whose model is here.
        device: of this process.
        group: all processes.
        directory: of the run; what an earlier part of it decided is kept.
        mesh: those that share the base model, if they do.

    Returns:
        The run without `auto` in its micro-batch and its checkpointing.

    Raises:
        UserError: nothing fits.
    """
    if not has_auto(config):
        return config
    memory, name = 0, "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory, name = properties.total_memory, properties.name
    memory, name = min(group.gather((memory, name)))
    settled = config
    if group.is_main:
        before = None
        if directory.checkpoint is not None:
            before = Settings.recorded(read_yaml(directory.path / "config.yaml"))
        settled = settle(
            config,
            read_config_dict(resolve_model(config.model), config.model),
            num_gpus=group.world_size,
            memory_bytes=memory or None,
            gpu_name=name,
            num_shards=None if mesh is None else mesh.size(),
            before=before,
        )
    return group.from_main(settled)


def make_trainer(
    config: Config,
    model: Any,
    data: PreparedData,
    accelerator: Accelerator,
    fusion: Fusion | None = None,
    group: Group | None = None,
    walltime: Walltime | None = None,
) -> Trainer:
    """Put a trainer together, at step 0.

    Args:
        config: the run's configuration.
        model: what `attach_adapter` returned.
        data: the prepared data.
        accelerator: device and precision.
        fusion: what of the model the kernels run.
        group: the processes of the run; None: it has one, or its processes do not watch each other.
        walltime: knows when the job ends; None: it does not.

    Returns:
        The trainer, with its optimizer and schedule.
    """
    schedule = BatchSchedule(
        len(data.train_packs), config.data.global_batch_size, config.trainer.seed
    )
    max_steps = config.trainer.max_steps or schedule.num_steps(config.trainer.max_epochs)
    if accelerator.mixed_precision == "bf16":
        _let_autocast_cast(model)
    optimizer = make_optimizer(model, config.optim)
    # every process drops other activations
    torch.manual_seed(config.trainer.seed + accelerator.process_index)
    return Trainer(
        config=config,
        model=model,
        data=data,
        schedule=schedule,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config.optim, max_steps),
        accelerator=accelerator,
        max_steps=max_steps,
        fusion=fusion,
        group=group or Group(Ranks()),
        walltime=walltime or Walltime(None),
    )


def _let_autocast_cast(model: Any) -> None:
    """Keep PEFT from widening each adapter's input to fp32, only for autocast to narrow it again.

    The values are the same to the bit (bf16 -> fp32 -> bf16); the copy per layer is saved.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def open_metrics(config: Config, directory: RunDirectory, trainer: Trainer) -> MetricsLog:
    """Open the run's metrics at the trainer's step, and the trackers."""
    accelerator = trainer.accelerator
    if config.log.trackers:
        flat = {dotted: str(value) for dotted, value in flatten(to_tree(config))}
        accelerator.init_trackers(
            "lora-train",
            config=flat,
            # what a killed run logged after the checkpoint is taken back
            init_kwargs={"tensorboard": {"purge_step": trainer.step + 1}},
        )
    return MetricsLog(
        directory.path / "metrics.jsonl",
        step=trainer.step,
        accelerator=accelerator if config.log.trackers else None,
        write=trainer.group.is_main,
    )


def describe_run(config: Config, trainer: Trainer) -> str:
    """Return one line: steps, epochs, and how the global batch is split."""
    data, processes = config.data, trainer.accelerator.num_processes
    accumulate = gradient_accumulation_steps(config, processes)
    return (
        f"{trainer.max_steps} steps = {trainer.schedule.epoch(trainer.max_steps):.2f} epochs; "
        f"{data.global_batch_size} sequences per step = {micro_batch_size(config)} per micro-batch "
        f"x {accumulate} accumulated x {processes} process{'es' if processes > 1 else ''}"
    )


def check_room(directory: RunDirectory, trainer: Trainer) -> None:
    """Refuse a disk that the checkpoints will not fit on.

    Args:
        directory: the run directory.
        trainer: knows the trainable parameters.

    Raises:
        UserError: less free than what the checkpoints of this run take.
    """
    trainable = sum(parameter.numel() for parameter in trainer.trainable.values())
    there = sum(path.stat().st_size for path in directory.checkpoints.rglob("*") if path.is_file())
    needed = max(0, checkpoint_bytes(trainable, trainer.config) - there)
    room = shutil.disk_usage(directory.path)
    # some network file systems tell no sizes at all
    if room.total and room.free < needed:
        raise UserError(
            f"{directory.path}: {room.free / 2**20:,.0f} MiB free, the checkpoints take "
            f"{needed / 2**20:,.0f} MiB",
            hint="log.log_dir=FOLDER on a larger file system, or log.ckpt.keep_last=1",
        )


def calibration_batches(data: PreparedData, model: Any) -> Iterator[dict[str, Any]]:
    """Training batches as arguments of the model, for peft.init=eva."""
    attention = model.config._attn_implementation
    for pack in range(min(len(data.train_packs), _CALIBRATION_PACKS)):
        batch = collate(data.train, data.train_packs, [pack]).to(model.device)
        yield {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            **packing_kwargs(attention, batch.cu_seqlens, batch.max_seqlen),
        }
