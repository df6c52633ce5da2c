"""One run, from a validated configuration to a finished adapter, in the order of what happens.

What can be refused is refused first: devices and batch split, run directory, data and labels, then
the model.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from logging.handlers import MemoryHandler
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from rich.console import Console

from lora_train import exit_status
from lora_train.adapter import attach_adapter, save_adapter, trainable_summary
from lora_train.answers import AnswerReport, answer_held_out
from lora_train.assembly import (
    calibration_batches,
    check_room,
    describe_run,
    make_accelerator,
    make_trainer,
    open_metrics,
    settle_settings,
)
from lora_train.attention import check_isolation
from lora_train.config import Config
from lora_train.data.audit import audit
from lora_train.data.held_out import HeldOutExample, held_out_examples
from lora_train.data.prepared import prepare_data
from lora_train.device import (
    PrecisionChoice,
    compute_deterministically,
    describe_device,
    select_precision,
)
from lora_train.errors import LoraTrainError, RunError, UserError
from lora_train.fusion import check_device, fuse_model
from lora_train.logs import keep_log, start_log
from lora_train.merge.model_card import write_adapter_card
from lora_train.model import describe_model, load_base_model, load_tokenizer
from lora_train.model_source import download_model, max_positions
from lora_train.optimizer import warmup_steps
from lora_train.progress import Progress
from lora_train.ranks import Ranks
from lora_train.receipts.machine import device_facts
from lora_train.receipts.start import InputHashing, describe_start
from lora_train.rendezvous import Group, is_consequence, join
from lora_train.report.at_end import EndOfRun
from lora_train.requeue import (
    TIME_LIMIT,
    Restarts,
    job_to_requeue,
    request_requeue,
    stays_ended,
)
from lora_train.run_directory import (
    RunDirectory,
    is_finished,
    open_run_directory,
    publish_run_directory,
)
from lora_train.sharding import check_shardable, make_mesh
from lora_train.stop_signals import StopSignals
from lora_train.summary import make_summary, print_summary
from lora_train.trainer import Trainer, memory_hint
from lora_train.walltime import Walltime, job_end

log = logging.getLogger(__name__)


def run(
    config: Config, argv: Sequence[str], ranks: Ranks | None = None, is_refused: bool = False
) -> int:
    """Do the run that the configuration describes, from wherever its run directory stands.

    Args:
        config: the validated configuration.
        argv: the command line, for the record.
        ranks: the place of this process among those of the run; None: it is alone.
        is_refused: whether the node is not fit for the run, which the others must hear.

    Returns:
        Exit status: complete, or stopped on request.

    Raises:
        UserError: the input is wrong; nothing was trained.
        RunError: the run failed; the last good checkpoint stays.
    """
    problem = UserError("preflight refused this node; its findings stand above")
    group = join(ranks or Ranks(), problem if is_refused else None)
    end_of_run = EndOfRun()
    try:
        end = _run_together(config, argv, group, end_of_run)
    except BaseException as error:
        group.fail(error)
        end_of_run.failed(error)
        raise
    group.leave()
    if end.job is None:  # else Slurm may end this before the job is queued again
        end_of_run.ended(is_complete=end.status == exit_status.OK)
    if end.summary is not None:
        print_summary(Console(), end.summary)
    # with everything closed: where it works, Slurm ends the job at once
    return request_requeue(end.job) if end.job is not None else end.status


class _End(NamedTuple):
    """How a run ended that did not fail."""

    status: int
    job: str | None = None
    """The Slurm job that is to be queued again, on the main process."""
    summary: dict[str, Any] | None = None
    """Of a complete run, on the main process."""


def _run_together(config: Config, argv: Sequence[str], group: Group, end_of_run: EndOfRun) -> _End:
    """Turn whatever goes wrong into an error that says how to go on."""
    console = Console(stderr=True)
    backlog = start_log(console, quiet=not group.is_main)
    directory = _open_together(config, group)
    if group.is_main:
        end_of_run.directory = directory
        if group.watch is not None:
            group.watch.before_end = end_of_run.failed_elsewhere
    try:
        with StopSignals() as stop:
            return _run(config, argv, directory, stop, console, backlog, group)
    except LoraTrainError:
        raise
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory before the first step: {error}",
            hint=memory_hint(config, group.world_size),
        ) from error
    except Exception as error:
        if is_consequence(error):
            group.wait_for_cause()
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
    group: Group,
) -> _End:
    summary = group.from_main(directory.read_json("summary.json"))
    if summary is not None and group.from_main(is_finished(config, directory, summary)):
        log.info("%s is complete; --resume never trains a new one beside it", directory.path)
        return _End(exit_status.OK, summary=summary if group.is_main else None)

    # data before the model: a mistake in it shows in seconds, a model may take minutes to load
    accelerator = make_accelerator(config, directory, group)
    check_device(config, accelerator.device)
    check_shardable(config)
    precision = select_precision(config.trainer.precision, accelerator.device)
    log.info("device: %s; %s", describe_device(accelerator.device), precision.reason)
    _check_precision(group, precision)
    mesh = make_mesh(config, accelerator.device, precision.dtype)
    if group.world_size > 1:  # or all would download at once
        with group.main_first():
            download_model(config.model)
    config = settle_settings(config, accelerator.device, group, directory, mesh)
    tokenizer = load_tokenizer(config.model)
    with group.main_first():
        data = prepare_data(config, tokenizer, max_positions=max_positions(config.model))
    log.info("%s", data.report.text())
    labels = audit(data, tokenizer, config)
    if group.is_main and directory.checkpoint is None:
        console.print(labels if console.is_terminal else labels.text(), markup=False)

    examples = []
    if group.is_main:
        examples = held_out_examples(config, tokenizer, config.eval.num_generate)
        if config.eval.num_generate and not examples:
            log.warning("no held-out examples to answer: eval.num_generate has no effect")
    compute_deterministically()
    set_seed(config.trainer.seed)
    base = load_base_model(config.model, precision.dtype, accelerator.device, mesh)
    log.info("model: %s", describe_model(base))
    model = attach_adapter(
        base,
        config,
        calibration_batches=calibration_batches(data, base),
        resume_from=directory.checkpoint.adapter if directory.checkpoint else None,
    )
    if config.trainer.gradient_checkpointing is True:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    log.info("adapter: %s", trainable_summary(model))
    fusion = fuse_model(model, config, accelerator.device)
    with accelerator.autocast():
        check_isolation(
            model, model.get_input_embeddings().num_embeddings, accelerator.device,
            is_fused=fusion is not None and fusion.decoder is not None,
        )  # fmt: skip

    walltime = Walltime(job_end() if group.is_main else None)
    trainer = make_trainer(config, model, data, accelerator, fusion, group, walltime)
    log.info("run: %s", describe_run(config, trainer))
    if warmup_steps(config.optim.lr_scheduler, trainer.max_steps) >= trainer.max_steps:
        log.warning("warm-up takes all of the steps: the learning rate never reaches optim.lr")
    check_room(directory, trainer)
    if directory.checkpoint is not None:
        trainer.restore(directory.checkpoint.read_state())
        log.info("going on from %s", directory.checkpoint.path)
    trainer.check_alike()
    devices = group.gather(device_facts(accelerator.device))
    restarts = job = hashing = None
    with group.main_first():  # the others read metrics.jsonl as it is then
        if group.is_main:
            receipt = describe_start(
                config, argv, device=describe_device(accelerator.device), devices=devices,
                step=trainer.step, tokens_hash=trainer.data_hash, sources=data.sources,
            )  # fmt: skip
            directory.record_start(config, receipt)
            hashing = InputHashing(directory, config, data.sources)
            keep_log(backlog, directory.path / "train.log")
            restarts = Restarts(directory)
            restarts.started(trainer.step)
            job = job_to_requeue() if config.resume.requeue else None
            walltime.log_start()
            directory.timeline.started(
                directory.path,
                trainer.step,
                max_steps=trainer.max_steps,
                num_processes=group.world_size,
                num_nodes=group.ranks.num_nodes,
                seconds_left=walltime.seconds_left,
            )
    publish_run_directory(directory.path)
    stop.wait_for_step()
    try:
        is_done = _train_and_evaluate(
            config, directory, trainer, tokenizer, examples, stop, console
        )
        end = _end(config, directory, trainer, restarts, job, is_done=is_done)
        if hashing is not None and is_done:  # whoever stops a run waits for its end
            hashing.wait()
        return end
    finally:
        # not end_training(): it would wait for a group that may be broken
        for tracker in accelerator.trackers:
            tracker.finish()
        if hashing is not None:
            hashing.cancel()


def _check_precision(group: Group, precision: PrecisionChoice) -> None:
    """Refuse GPUs that would compute in different precision, each in its own best."""
    found = group.gather(str(precision.dtype).removeprefix("torch."))
    if len(set(found)) > 1:
        seen = sorted(
            {f"{dtype} on {host}" for dtype, host in zip(found, group.hosts, strict=True)}
        )
        raise UserError(
            f"the processes have GPUs of different kinds: {', '.join(seen)}",
            hint="#SBATCH --constraint=a100 (`sinfo -o '%G %f'` lists what there is), or "
            "trainer.precision=fp32",
        )


def _train_and_evaluate(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    tokenizer: Any,
    examples: list[HeldOutExample],
    stop: StopSignals,
    console: Console,
) -> bool:
    """Train and answer; tell whether all is done, or a stop came between."""
    accelerator, group = trainer.accelerator, trainer.group
    metrics = open_metrics(config, directory, trainer)
    # each has read the file, which another node may see as it was
    metrics.validated = group.from_main(metrics.validated)

    def answers(when: str) -> AnswerReport | None:
        """Answer the held-out examples once; a run that goes on reads what it answered before."""
        kept = _kept_answers(config, directory, when, examples)
        if kept is not None:
            return kept
        if not examples:  # the others have none
            return None
        log.info("answering %d held-out examples (%s training)", len(examples), when)
        with directory.timeline.phase("answers"), accelerator.autocast():
            report = answer_held_out(
                trainer.model, tokenizer, examples,
                max_new_tokens=config.eval.max_new_tokens, batch_size=config.eval.batch_size,
                should_stop=_until(stop, trainer), console=console,
            )  # fmt: skip
        if report is not None:
            asked = _asked(config, examples)
            directory.write_json(f"answers_{when}.json", report.to_dict() | {"asked": asked})
        return report

    progress = Progress(
        console,
        first_step=trainer.step,
        max_steps=trainer.max_steps,
        quiet=not group.is_main,
    )
    try:
        if trainer.step == 0:
            with group.main_first():
                answers("before")
        with progress:
            finished = trainer.fit(directory, metrics, progress, stop)
        with group.main_first():
            after = answers("after") if finished else None
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of GPU memory outside of training steps: {error}",
            hint="eval.batch_size=4 for answers, data.micro_batch_size=1 for validation",
        ) from error
    finally:
        metrics.close()
    # the main process alone answers, and so it alone knows
    is_done, trainer.stop_reason = group.from_main(
        (finished and (after is not None or not examples), trainer.stop_reason)
    )
    if is_done and group.is_main:
        _finish(config, directory, trainer, examples, after)
    return is_done


def _until(stop: StopSignals, trainer: Trainer) -> Callable[[], bool]:
    """Tell between two batches of answers whether to stop: asked to, or the job ends."""
    begun, slowest = time.monotonic(), 0.0

    def should_stop() -> bool:
        nonlocal begun, slowest
        slowest, begun = max(slowest, time.monotonic() - begun), time.monotonic()
        if stop.requested is not None:
            trainer.stop_reason = stop.requested.name
        elif trainer.step > 0 and trainer.walltime.is_due(slowest):
            trainer.stop_reason = TIME_LIMIT
        return trainer.stop_reason is not None

    return should_stop


def _end(
    config: Config,
    directory: RunDirectory,
    trainer: Trainer,
    restarts: Restarts | None,
    job: str | None,
    *,
    is_done: bool,
) -> _End:
    """Record how the run ended; when it was stopped, say how it goes on."""
    if is_done:
        if restarts is not None:
            restarts.ended(trainer.step, "complete", requeued=False)
        directory.timeline.ended("complete")
        is_main = trainer.group.is_main
        return _End(
            exit_status.OK, summary=directory.read_json("summary.json") if is_main else None
        )
    log.warning(
        "stopped (%s, %d/%d steps done); the same command goes on from %s%s",
        trainer.stop_reason,
        trainer.step,
        trainer.max_steps,
        directory.path,
        ""
        if config.resume.mode == "auto"
        else f", with log.name={directory.path.name} and without --resume never",
    )
    asks = False
    if restarts is not None:
        reason = str(trainer.stop_reason)
        if job is not None:
            asks, why = restarts.may_requeue(trainer.step, reason)
            if asks and stays_ended(job):
                asks, why = False, "not queued again: cancelled, or Slurm does it by itself"
            log.info("%s", f"the job is queued again: {why}" if asks else f"the job is {why}")
        restarts.ended(trainer.step, reason, asks)
        directory.timeline.ended(reason)
    asks = trainer.group.from_main(asks)  # srun tells the status of any task
    return _End(exit_status.REQUEUE if asks else exit_status.STOPPED, job if asks else None)


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
    """Write the adapter and the summary."""
    unfinished = directory.path / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_adapter(trainer.model, unfinished)
    write_adapter_card(unfinished, config, directory.path)
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


def _open_together(config: Config, group: Group) -> RunDirectory:
    """Open the run directory on the main process; the others follow it.

    Args:
        config: the run's configuration.
        group: all processes.

    Returns:
        The same directory everywhere, locked on the main process.

    Raises:
        UserError: see `open_run_directory`; on the main process, with which the others end.
    """
    opened = open_run_directory(config) if group.is_main else None
    # the lock is an open file of the main process
    shared = group.from_main(opened and dataclasses.replace(opened, lock=None))
    found = opened or shared
    assert found is not None
    is_seen = group.gather((found.path / ".lock").exists())
    if not all(is_seen):
        blind = group.hosts[is_seen.index(False)]
        raise UserError(
            f"{blind} does not see {found.path}, which {group.hosts[0]} has opened",
            hint="log.log_dir=FOLDER must be one that all nodes share",
        )
    return found
