"""One run, from a validated configuration to a finished adapter, in the order of what happens.

What can be refused is refused first: devices and batch split, run directory, data and labels, then
the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.logging import RichHandler

from lora_train import exit_status
from lora_train.adapter import attach_adapter, save_adapter, trainable_summary
from lora_train.answers import AnswerReport, answer_held_out, is_exact_match
from lora_train.attention import check_isolation, packing_kwargs
from lora_train.config import Config
from lora_train.data.audit import audit
from lora_train.data.batches import BatchSchedule, collate
from lora_train.data.held_out import HeldOutExample, held_out_examples
from lora_train.data.prepared import PreparedData, prepare_data
from lora_train.device import describe_device, select_device, select_precision, set_cpu_threads
from lora_train.distributed import check_devices, gradient_accumulation_steps
from lora_train.errors import RunError, UserError
from lora_train.metrics import MetricsLog, check_trackers, keep_trackers_offline, read_metrics
from lora_train.model import describe_model, load_base_model, load_tokenizer
from lora_train.model_source import read_config_dict, resolve_model
from lora_train.optimizer import make_optimizer, make_scheduler
from lora_train.progress import Progress
from lora_train.run_directory import RunDirectory, open_run_directory
from lora_train.stop_signals import StopSignals
from lora_train.summary import print_summary
from lora_train.trainer import Trainer

log = logging.getLogger(__name__)


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
    check_devices(config)
    gradient_accumulation_steps(config)
    check_trackers(config)
    with StopSignals() as stop:
        return _run(config, argv, stop)


def _run(config: Config, argv: Sequence[str], stop: StopSignals) -> int:
    accelerator = _make_accelerator(config)
    console = Console(stderr=True)
    backlog = _log_to(console, quiet=not accelerator.is_main_process)
    directory = open_run_directory(config, main_process=accelerator.is_main_process)
    try:
        return _run_in(directory, config, argv, stop, accelerator, console, backlog)
    finally:
        directory.lock.release()


def _run_in(
    directory: RunDirectory,
    config: Config,
    argv: Sequence[str],
    stop: StopSignals,
    accelerator: Accelerator,
    console: Console,
    backlog: MemoryHandler,
) -> int:
    summary = directory.read_json("summary.json")
    if summary is not None and _is_finished(config, summary):
        log.info("%s is complete; --resume never trains a new one beside it", directory.path)
        print_summary(Console(), summary)
        return exit_status.OK

    # data before the model: a mistake in it shows in seconds, a model may take minutes to load
    tokenizer = load_tokenizer(config.model)
    with accelerator.main_process_first():
        data = prepare_data(config, tokenizer, max_positions=_max_positions(config))
    log.info("%s", data.report.text())
    labels = audit(data, tokenizer, config)
    if accelerator.is_main_process and directory.checkpoint is None:
        console.print(labels if console.is_terminal else labels.text(), markup=False)

    _compute_deterministically()
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
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    log.info("adapter: %s", trainable_summary(model))
    check_isolation(model, model.get_input_embeddings().num_embeddings, accelerator.device)

    trainer = _make_trainer(config, model, data, accelerator)
    log.info("run: %s", _describe_run(config, trainer))
    _check_room(directory, trainer)
    if directory.checkpoint is not None:
        trainer.restore(directory.checkpoint.read_state())
        log.info("going on from %s", directory.checkpoint.path)
    if accelerator.is_main_process:
        directory.record_start(config, argv, describe_device(accelerator.device))
        backlog.setTarget(_file_handler(directory.path / "train.log"))
        backlog.flush()
    examples = held_out_examples(config, tokenizer, config.eval.num_generate)
    return _train_and_evaluate(config, directory, trainer, tokenizer, examples, stop, console)


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
        kept = directory.read_json(f"answers_{when}.json")
        if kept is not None and len(kept["answers"]) == len(examples):
            return AnswerReport.from_dict(kept)
        if not examples or not accelerator.is_main_process:
            return None
        log.info("answering %d held-out examples (%s training)", len(examples), when)
        with accelerator.autocast():
            report = answer_held_out(
                model, tokenizer, examples,
                max_new_tokens=config.eval.max_new_tokens, batch_size=config.eval.batch_size,
                stop=stop,
            )  # fmt: skip
        if report is not None:
            directory.write_json(f"answers_{when}.json", report.to_dict())
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
            f"out of GPU memory at step {trainer.step + 1}: {error}", hint=_memory_hint(config)
        ) from error
    finally:
        metrics.close()
        accelerator.end_training()
    if not finished or (stop.requested and after is None and examples):
        done = f"{trainer.step}/{trainer.max_steps} steps done"
        log.warning("stopped (%s); the same command goes on from %s", done, directory.path)
        return exit_status.STOPPED
    if accelerator.is_main_process:
        _finish(config, directory, trainer, examples, after)
    return exit_status.OK


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
    rows = read_metrics(directory.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    val_losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    kept = directory.read_json("answers_before.json")
    before = AnswerReport.from_dict(kept) if kept is not None else None
    samples = []
    if before is not None and after is not None:
        samples = [
            {
                "prompt": example.prompt,
                "reference": example.reference,
                "before": before.answers[n],
                "after": after.answers[n],
                "after_is_exact": is_exact_match(after.answers[n], example.reference),
            }
            for n, example in enumerate(examples)
        ]
    summary = {
        "name": config.log.name,
        "run_directory": str(directory.path),
        "steps": trainer.step,
        "train_seconds": sum(row.get("step_time_seconds", 0.0) for row in rows),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "before": {
            "val_loss": val_losses.get(0),
            "exact_match": before.exact_match if before else None,
        },
        "after": {
            "val_loss": val_losses.get(trainer.step),
            "exact_match": after.exact_match if after else None,
        },
        "num_generate": len(examples),
        "system": next((example.system for example in examples if example.system), None),
        "samples": samples,
    }
    directory.write_json("summary.json", summary)
    print_summary(Console(), summary)


def _is_finished(config: Config, summary: dict[str, Any]) -> bool:
    """Whether the run directory's run is complete for this configuration."""
    steps = config.trainer.max_steps
    return steps is None or summary["steps"] >= steps


def _make_accelerator(config: Config) -> Accelerator:
    from accelerate import PartialState
    from accelerate.utils import ProjectConfiguration

    on_cpu = not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    set_cpu_threads(state.num_processes)
    device = select_device(state.local_process_index)
    bf16 = select_precision(config.trainer.precision, device).dtype == torch.bfloat16
    folder = Path(config.log.log_dir) / (config.log.name or "run")
    if not config.log.online:
        keep_trackers_offline(folder)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(folder), logging_dir=str(folder / "trackers")
        ),
    )


def _make_trainer(
    config: Config, model: Any, data: PreparedData, accelerator: Accelerator
) -> Trainer:
    schedule = BatchSchedule(
        len(data.train_packs), config.data.global_batch_size, config.trainer.seed
    )
    max_steps = config.trainer.max_steps or schedule.num_steps(config.trainer.max_epochs)
    if accelerator.mixed_precision == "bf16":
        let_autocast_cast(model)
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
    )


def _compute_deterministically() -> None:
    """Let the same inputs give the same bits, so that a run in two parts equals one in one piece.

    Without it the flash attention kernel adds up gradients of long sequences in any order. With it,
    a training step of Llama-3.1-8B's layers took 0.3 % longer (H200, 4 x 2048 tokens).
    """
    # cuBLAS reads it when CUDA starts, which is later than this
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing here reads memory that was not written: no need to fill it first
    torch.utils.deterministic.fill_uninitialized_memory = False


def let_autocast_cast(model: Any) -> None:
    """Keep PEFT from widening each adapter's input to fp32, only for autocast to narrow it again.

    The values are the same to the bit (bf16 -> fp32 -> bf16); the copy per layer is saved.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def _open_metrics(config: Config, directory: RunDirectory, trainer: Trainer) -> MetricsLog:
    from lora_train.config_loading import to_tree

    accelerator = trainer.accelerator
    if config.log.trackers:
        flat = {
            f"{section}.{key}": str(value)
            for section, keys in to_tree(config).items()
            for key, value in keys.items()
        }
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
    # fp32: the adapter in PEFT's format, the weights again, and Adam's two moments
    each = trainable * 4 * 4
    needed = each * (trainer.config.log.ckpt.keep_last + 1) + trainable * 4
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise UserError(
            f"{directory.path}: {free / 2**20:,.0f} MiB free, the checkpoints take "
            f"{needed / 2**20:,.0f} MiB",
            hint="log.log_dir=FOLDER on a larger file system, or log.ckpt.keep_last=1",
        )


def _memory_hint(config: Config) -> str:
    options = []
    if config.data.micro_batch_size > 1:
        options.append("data.micro_batch_size=1 (the same result, less memory)")
    if not config.trainer.gradient_checkpointing:
        options.append("trainer.gradient_checkpointing=true")
    if config.model.quantization is None:
        options.append("model.quantization=nf4 (a new run)")
    options.append(f"data.seq_length={config.data.seq_length // 2} (a new run)")
    return "the same command with one of: " + "; ".join(options)


def _log_to(console: Console, *, quiet: bool) -> MemoryHandler:
    """Send the log to stderr: through the live line on a terminal, as plain lines elsewhere.

    Args:
        console: stderr.
        quiet: log nothing (all processes but the main one).

    Returns:
        A handler that keeps the log until the run directory has a train.log to hand it to.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=None
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO)
    backlog = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL, flushOnClose=False)
    package = logging.getLogger("lora_train")
    package.propagate = False
    package.handlers[:] = [logging.NullHandler()] if quiet else [handler, backlog]
    package.setLevel(logging.DEBUG)
    return backlog


def _file_handler(file: Path) -> logging.Handler:
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _calibration_batches(data: PreparedData, model: Any) -> Iterator[dict[str, Any]]:
    """Training batches as arguments of the model, for peft.init=eva."""
    attention = model.config._attn_implementation
    for pack in range(len(data.train_packs)):
        batch = collate(data.train, data.train_packs, [pack]).to(model.device)
        yield {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            **packing_kwargs(attention, batch.cu_seqlens, batch.max_seqlen),
        }


def _max_positions(config: Config) -> int | None:
    """The longest sequence that the base model was made for, in tokens."""
    found = read_config_dict(resolve_model(config.model), config.model)
    return found.get("max_position_embeddings")
