"""One run, from a validated configuration to a finished adapter, in the order of what happens.

What can be refused is refused first: devices and batch split, run directory, data and labels, then
the model.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from rich.console import Console

from lora_train import exit_status
from lora_train.adapter import attach_adapter, save_adapter, trainable_summary
from lora_train.answers import AnswerReport, answer_held_out
from lora_train.attention import check_isolation, packing_kwargs
from lora_train.config import Config
from lora_train.config_loading import flatten, to_tree
from lora_train.data.audit import audit
from lora_train.data.batches import BatchSchedule, collate
from lora_train.data.held_out import HeldOutExample, held_out_examples
from lora_train.data.prepared import PreparedData, prepare_data
from lora_train.device import (
    compute_deterministically,
    describe_device,
    select_device,
    select_precision,
    set_cpu_threads,
)
from lora_train.distributed import gradient_accumulation_steps, world_size
from lora_train.errors import LoraTrainError, RunError, UserError
from lora_train.fusion import check_device, fuse_model
from lora_train.logs import keep_log, start_log
from lora_train.metrics import MetricsLog, keep_trackers_offline
from lora_train.model import describe_model, load_base_model, load_tokenizer
from lora_train.model_size import checkpoint_bytes
from lora_train.model_source import max_positions
from lora_train.optimizer import make_optimizer, make_scheduler, warmup_steps
from lora_train.progress import Progress
from lora_train.run_directory import (
    RunDirectory,
    is_finished,
    open_run_directory,
    publish_run_directory,
)
from lora_train.stop_signals import StopSignals
from lora_train.summary import make_summary, print_summary
from lora_train.trainer import Trainer

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion

log = logging.getLogger(__name__)

# PEFT keeps them all on the device; EVA's directions settle within far fewer
_CALIBRATION_PACKS = 256


def run(config: Config, argv: Sequence[str]) -> int:
    """Do the run that the configuration describes, from wherever its run directory stands.

    Args:
        config: the validated configuration.
        argv: the command line, for the record.

    Returns:
        Exit status: complete, or stopped on request.

    Raises:
        UserError: the input is wrong; nothing was trained.
        RunError: the run failed; the last good checkpoint stays.
    """
    on_cpu = not torch.cuda.is_available()
    # the others wait while the main process prepares data or answers held-out examples
    processes = PartialState(cpu=on_cpu, timeout=timedelta(hours=2))
    if processes.num_processes != world_size():
        raise UserError(
            f"WORLD_SIZE={world_size()}, but this process was started alone",
            hint="start it with torchrun, or unset WORLD_SIZE",
        )
    console = Console(stderr=True)
    backlog = start_log(console, quiet=not processes.is_main_process)
    directory = _open_together(config, processes)
    try:
        with StopSignals() as stop:
            return _run(config, argv, directory, stop, console, backlog)
    except LoraTrainError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{error.strerror}: {error.filename or directory.path}",
                hint="make room, then give the same command again",
            ) from error
        log.exception("a fault in the program or its libraries")
        raise RunError(
            f"{type(error).__name__}: {error}",
            hint="the same command goes on from the newest checkpoint, if there is one",
        ) from error
    finally:
        directory.close()


def _run(
    config: Config,
    argv: Sequence[str],
    directory: RunDirectory,
    stop: StopSignals,
    console: Console,
    backlog: MemoryHandler,
) -> int:
    summary = directory.read_json("summary.json")
    if summary is not None and is_finished(config, directory, summary):
        log.info("%s is complete; --resume never trains a new one beside it", directory.path)
        print_summary(Console(), summary)
        return exit_status.OK

    # data before the model: a mistake in it shows in seconds, a model may take minutes to load
    accelerator = _make_accelerator(config, directory)
    check_device(config, accelerator.device)
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = prepare_data(config, tokenizer, max_positions=max_positions(config.model))
    log.info("%s", data.report.text())
    labels = audit(data, tokenizer, config)
    if accelerator.is_main_process and directory.checkpoint is None:
        console.print(labels if console.is_terminal else labels.text(), markup=False)

    examples = []
    if accelerator.is_main_process:
        examples = held_out_examples(config, tokenizer, config.eval.num_generate)
        if config.eval.num_generate and not examples:
            log.warning("no held-out examples to answer: eval.num_generate has no effect")
    compute_deterministically()
    set_seed(config.trainer.seed)
    precision = select_precision(config.trainer.precision, accelerator.device)
    log.info("device: %s; %s", describe_device(accelerator.device), precision.reason)
    base = load_base_model(config.model, precision.dtype, accelerator.device)
    log.info("model: %s", describe_model(base))
    model = attach_adapter(
        base,
        config,
        calibration_batches=_calibration_batches(data, base),
        resume_from=directory.checkpoint.adapter if directory.checkpoint else None,
    )
    if config.trainer.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    log.info("adapter: %s", trainable_summary(model))
    fusion = fuse_model(model, config, accelerator.device)
    with accelerator.autocast():
        check_isolation(
            model, model.get_input_embeddings().num_embeddings, accelerator.device,
            is_fused=fusion is not None and fusion.decoder is not None,
        )  # fmt: skip

    trainer = make_trainer(config, model, data, accelerator, fusion)
    log.info("run: %s", _describe_run(config, trainer))
    if warmup_steps(config.optim.lr_scheduler, trainer.max_steps) >= trainer.max_steps:
        log.warning("warm-up takes all of the steps: the learning rate never reaches optim.lr")
    _check_room(directory, trainer)
    if directory.checkpoint is not None:
        trainer.restore(directory.checkpoint.read_state())
        log.info("going on from %s", directory.checkpoint.path)
    if accelerator.is_main_process:
        directory.record_start(config, argv, describe_device(accelerator.device))
        keep_log(backlog, directory.path / "train.log")
    accelerator.wait_for_everyone()  # the others read metrics.jsonl as it is now
    publish_run_directory(directory.path)
    stop.wait_for_step()
    try:
        return _train_and_evaluate(config, directory, trainer, tokenizer, examples, stop, console)
    finally:
        accelerator.end_training()


def _train_and_evaluate(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    tokenizer: Any,
    examples: list[HeldOutExample],
    stop: StopSignals,
    console: Console,
) -> int:
    accelerator, model = trainer.accelerator, trainer.model
    metrics = _open_metrics(config, directory, trainer)

    def answers(when: str) -> AnswerReport | None:
        """Answer the held-out examples once; a run that goes on reads what it answered before."""
        kept = _kept_answers(config, directory, when, examples)
        if kept is not None:
            return kept
        if not examples or not accelerator.is_main_process:
            return None
        log.info("answering %d held-out examples (%s training)", len(examples), when)
        with accelerator.autocast():
            report = answer_held_out(
                model, tokenizer, examples,
                max_new_tokens=config.eval.max_new_tokens, batch_size=config.eval.batch_size,
                stop=stop, console=console,
            )  # fmt: skip
        if report is not None:
            asked = _asked(config, examples)
            directory.write_json(f"answers_{when}.json", report.to_dict() | {"asked": asked})
        return report

    progress = Progress(
        console,
        first_step=trainer.step,
        max_steps=trainer.max_steps,
        quiet=not accelerator.is_main_process,
    )
    try:
        if trainer.step == 0:
            answers("before")
        with progress:
            finished = trainer.fit(directory, metrics, progress, stop)
        after = answers("after") if finished else None
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory outside of training steps: {error}",
            hint="eval.batch_size=4 for answers, data.micro_batch_size=1 for validation",
        ) from error
    finally:
        metrics.close()
    # the main process alone answers, and so it alone knows
    [is_stopped] = broadcast_object_list([not finished or (after is None and bool(examples))])
    if is_stopped:
        done = f"{trainer.step}/{trainer.max_steps} steps done"
        log.warning(
            "stopped (%s); the same command goes on from %s%s",
            done,
            directory.path,
            ""
            if config.resume.mode == "auto"
            else f", with log.name={directory.path.name} and without --resume never",
        )
        return exit_status.STOPPED
    if accelerator.is_main_process:
        _finish(config, directory, trainer, examples, after)
    accelerator.wait_for_everyone()
    return exit_status.OK


def _asked(config: Config, examples: list[HeldOutExample]) -> list[Any]:
    """What an answer depends on besides the weights."""
    return [[example.prompt for example in examples], config.eval.max_new_tokens]


def _kept_answers(
    config: Config, directory: RunDirectory, when: str, examples: list[HeldOutExample]
) -> AnswerReport | None:
    """The answers that an earlier part of the run kept, if it was asked the same."""
    kept = directory.read_json(f"answers_{when}.json")
    if kept is None or kept["asked"] != _asked(config, examples):
        return None
    return AnswerReport.from_dict(kept)


def _finish(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    examples: list[HeldOutExample],
    after: AnswerReport | None,
) -> None:
    """Write the adapter and the summary, and show it."""
    unfinished = directory.path / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_adapter(trainer.model, unfinished)
    shutil.rmtree(directory.adapter, ignore_errors=True)
    unfinished.rename(directory.adapter)
    summary = make_summary(
        name=str(config.log.name),
        run_directory=directory.path,
        examples=examples,
        before=_kept_answers(config, directory, "before", examples),
        after=after,
        train_seconds=trainer.train_seconds,
    )
    directory.write_json("summary.json", summary)
    print_summary(Console(), summary)


def _open_together(config: Config, processes: PartialState) -> RunDirectory:
    """Open the run directory on the main process; the others follow it, or fail with it.

    Args:
        config: the run's configuration.
        processes: accelerate's state of all processes.

    Returns:
        The same directory everywhere, locked on the main process.

    Raises:
        UserError: see `open_run_directory`; on every process.
    """
    opened: Any = None
    if processes.is_main_process:
        try:
            opened = open_run_directory(config)
        except UserError as error:
            opened = error
    if processes.num_processes > 1:
        # the lock is an open file of the main process
        is_open = isinstance(opened, RunDirectory)
        [shared] = broadcast_object_list(
            [dataclasses.replace(opened, lock=None) if is_open else opened]
        )
        opened = opened if processes.is_main_process else shared
    if isinstance(opened, UserError):
        raise opened
    return opened


def _make_accelerator(config: Config, directory: RunDirectory) -> Accelerator:
    state = PartialState()
    set_cpu_threads(state.num_processes)
    device = select_device(state.local_process_index)
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


def make_trainer(
    config: Config,
    model: Any,
    data: PreparedData,
    accelerator: Accelerator,
    fusion: Fusion | None = None,
) -> Trainer:
    """Put a trainer together, at step 0.

    Args:
        config: the run's configuration.
        model: what `attach_adapter` returned.
        data: the prepared data.
        accelerator: device and precision.
        fusion: what of the model the kernels run.

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
    )


def _let_autocast_cast(model: Any) -> None:
    """Keep PEFT from widening each adapter's input to fp32, only for autocast to narrow it again.

    The values are the same to the bit (bf16 -> fp32 -> bf16); the copy per layer is saved.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def _open_metrics(config: Config, directory: RunDirectory, trainer: Trainer) -> MetricsLog:
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
        write=accelerator.is_main_process,
    )


def _describe_run(config: Config, trainer: Trainer) -> str:
    data, accumulate = config.data, gradient_accumulation_steps(config)
    processes = trainer.accelerator.num_processes
    return (
        f"{trainer.max_steps} steps = {trainer.schedule.epoch(trainer.max_steps):.2f} epochs; "
        f"{data.global_batch_size} sequences per step = {data.micro_batch_size} per micro-batch x "
        f"{accumulate} accumulated x {processes} process{'es' if processes > 1 else ''}"
    )


def _check_room(directory: RunDirectory, trainer: Trainer) -> None:
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


def _calibration_batches(data: PreparedData, model: Any) -> Iterator[dict[str, Any]]:
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
