"""The training loop: one step sums over micro-batches and divides by all supervised tokens.

    loss = sum over supervised tokens of the global batch of -log p(token) / number of those tokens

The number is known before the forward passes (the schedule is a function of the step), so every
micro-batch is divided by it at once and the gradients of any split, over micro-batches or
processes, simply add up.
"""

from __future__ import annotations

import functools
import logging
import math
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_train.adapter import save_adapter
from lora_train.batch_split import micro_batch_size
from lora_train.checkpoint import delete_old, write_checkpoint
from lora_train.config import Config
from lora_train.data.batches import Batch, BatchSchedule, collate
from lora_train.data.prepared import PreparedData
from lora_train.errors import RunError, UserError
from lora_train.gradient_sum import GradientSum
from lora_train.kernel_cache import log_count
from lora_train.loss import loss_sum
from lora_train.metrics import MetricsLog
from lora_train.progress import Progress
from lora_train.rendezvous import Group
from lora_train.requeue import TIME_LIMIT
from lora_train.run_directory import RunDirectory
from lora_train.stop_signals import StopSignals
from lora_train.training_state import (
    check_alike,
    hash_of_data,
    random_state,
    restore_optimizer,
    set_random_state,
)
from lora_train.walltime import Walltime

if TYPE_CHECKING:
    from lora_kernels.peft_bridge import Fusion

log = logging.getLogger(__name__)

# why a run stops, the reason that counts most last: whoever presses Ctrl-C means it
_STOP_REASONS = (
    "", TIME_LIMIT, *(each.name for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)),
    signal.SIGINT.name,
)  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    attended_keys: int
    """Over all tokens, the keys that each attends to."""
    max_memory_allocated_bytes: int
    """Most on any GPU since the start, in whole MiB; 0 on CPUs."""


class Trainer:
    """Trains the adapter of one model on prepared data, from any step to the last.

    Args:
        config: the run's configuration.
        model: a PEFT model on the accelerator's device; parameters that require a gradient are
            trained.
        data: tokenized and packed examples.
        schedule: which packs each step sees.
        optimizer: over the trainable parameters.
        scheduler: learning rate, stepped once per optimizer step.
        accelerator: precision, devices, trackers.
        max_steps: optimizer steps of the whole run.
        fusion: what of the model the kernels run; None: nothing.
        group: the processes of the run.
        walltime: knows when the job ends, on the main process.
    """

    def __init__(
        self,
        *,
        config: Config,
        model: nn.Module,
        data: PreparedData,
        schedule: BatchSchedule,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        accelerator: Accelerator,
        max_steps: int,
        fusion: Fusion | None = None,
        group: Group,
        walltime: Walltime,
    ) -> None:
        self.config = config
        self.model = model
        self.data = data
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accelerator = accelerator
        self.max_steps = max_steps
        self.fusion = fusion
        self.group = group
        self.walltime = walltime
        self.stop_reason: str | None = None
        self.step = 0
        self._next_batches: tuple[int, list[Batch]] | None = None
        self.train_seconds = 0.0
        self.schedule = schedule
        self.trainable = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        decoder = None if fusion is None else fusion.decoder
        self._gradients = GradientSum(
            list(self.trainable.values()),
            num_extra=1 + accelerator.num_processes,
            decoder=None if decoder is None else decoder.stack,
        )

    # --- one step -------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """Do one optimizer step on the next global batch.

        Raises:
            RunError: loss or gradients are not finite (the weights are left as they were), or a
                lora_B got no gradient in the first step.

        Returns:
            Loss, gradient norm before clipping, and token counts, over all processes.
        """
        parameters = list(self.trainable.values())
        batches = self._global_batch(self.step)
        supervised = sum(batch.num_supervised for batch in batches)
        self._gradients.zero()
        total = torch.zeros((), device=self.accelerator.device)
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        for batch in mine:
            with self.accelerator.autocast():
                loss = loss_sum(self.model, batch.to(self.accelerator.device), self.fusion)
                loss = loss / supervised
            with self._gradients.overlapping(batch is mine[-1]):
                self.accelerator.backward(loss)
            total += loss.detach()
        with self.group.waiting():
            sums = self._gradients.finish(torch.cat([total[None], self._memory()]))
        total = sums[0]
        if self.step == 0:
            self._check_gradients_flow()
        clip = self.config.trainer.gradient_clip_val
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        if isinstance(self.optimizer, torch.optim.AdamW):
            # before the loss is read, for which the GPU would wait: the fused optimizer does
            # nothing where found_inf is not zero
            is_finite = torch.isfinite(total) & torch.isfinite(norm)
            self.optimizer.found_inf = 1 - is_finite.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self._next_batches = (self.step + 1, self._global_batch(self.step + 1))
        attended_keys = sum(batch.attended_keys for batch in batches)
        with self.group.waiting():
            norm_value, loss_value, *mebibytes = torch.cat([norm[None], sums]).tolist()
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            raise RunError(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}: not finite",
                hint="the same command with a lower optim.lr goes on from the newest checkpoint; "
                "if it is not finite there either, remove that checkpoint's folder to go on from "
                "the one before",
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return StepResult(
            loss=loss_value,
            grad_norm=norm_value,
            learning_rate=learning_rate,
            tokens=tokens,
            supervised_tokens=supervised,
            attended_keys=attended_keys,
            max_memory_allocated_bytes=round(max(mebibytes)) << 20,
        )

    def _global_batch(self, step: int) -> list[Batch]:
        """The micro-batches of all processes, on the CPU: each process counts all the tokens."""
        # laid out while the GPU was still at the step before
        if self._next_batches is not None and self._next_batches[0] == step:
            return self._next_batches[1]
        pack_ids = self.schedule.pack_ids(step)
        size = micro_batch_size(self.config)
        return [
            collate(self.data.train, self.data.train_packs, pack_ids[start : start + size])
            for start in range(0, len(pack_ids), size)
        ]

    def _memory(self) -> Tensor:
        """MiB in use at most so far, of this process in its place among all."""
        device = self.accelerator.device
        memory = torch.zeros(self.accelerator.num_processes, device=device)
        if device.type == "cuda":
            memory[self.accelerator.process_index] = torch.cuda.max_memory_allocated() / 2**20
        return memory

    def _check_gradients_flow(self) -> None:
        """Refuse to go on when the first backward pass left a lora_B without a gradient."""
        silent = [
            name
            for name, parameter in self.trainable.items()
            if ".lora_B." in name and parameter.grad is not None and not parameter.grad.any()
        ]
        if silent:
            raise RunError(
                f"no gradient reaches {len(silent)} of the adapter's matrices, first {silent[0]}",
                hint="these would never learn: leave modules that the forward pass does not use "
                "out of peft.target_modules",
            )

    # --- validation -----------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, stop: StopSignals | None = None) -> dict[str, float] | None:
        """Mean loss per supervised token of the validation packs, normalized as in training.

        Args:
            stop: gives up between two micro-batches when a stop was requested.

        Returns:
            `val_loss` in nats, `val_perplexity`, `val_tokens`; None when there is nothing to
            validate on or a stop was requested.
        """
        packs, examples = self.data.validation_packs, self.data.validation
        if packs is None or examples is None or self.config.trainer.limit_val_batches == 0:
            return None
        accelerator, size = self.accelerator, micro_batch_size(self.config)
        ids = np.arange(len(packs))
        rows = [ids[start : start + size] for start in range(0, len(ids), size)]
        if self.config.trainer.limit_val_batches is not None:
            rows = rows[: self.config.trainer.limit_val_batches * accelerator.num_processes]
        self.model.eval()
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        tokens = 0
        # as many forward passes on every process, which a sharded model gathers together
        for start in range(0, len(rows), accelerator.num_processes):
            if stop is not None and self._stop_agreed(stop):
                self.model.train()
                return None
            turn = rows[start : start + accelerator.num_processes]
            is_idle = accelerator.process_index >= len(turn)
            batch = collate(examples, packs, turn[0 if is_idle else accelerator.process_index])
            with accelerator.autocast():
                loss = loss_sum(self.model, batch.to(accelerator.device), self.fusion)
            if not is_idle:
                total += loss
                tokens += batch.num_supervised
        self.model.train()
        sums = torch.tensor([total.item(), tokens], dtype=torch.float64)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(sums)
        if sums[1] == 0:
            return None
        mean = float(sums[0] / sums[1])
        return {
            "val_loss": mean,
            "val_perplexity": math.exp(min(mean, 700.0)),
            "val_tokens": int(sums[1]),
        }

    # --- the run --------------------------------------------------------------------------------

    def fit(
        self,
        run_directory: RunDirectory,
        metrics: MetricsLog,
        progress: Progress,
        stop: StopSignals,
    ) -> bool:
        """Train up to `max_steps`, validating and saving on the way.

        Args:
            run_directory: where checkpoints go.
            metrics: gets every step and validation.
            progress: shows them.
            stop: asked between steps, and between the batches of a validation.

        Returns:
            Whether the last step was reached; False: stopped on request, with a checkpoint written.

        Raises:
            RunError: see `train_step`, and a checkpoint that could not be written.
        """
        trainer = self.config.trainer
        validate_every = trainer.val_check_interval or max(1, round(self.max_steps / 10))
        save_every = self.config.log.ckpt.every_n_train_steps
        self.model.train()
        while True:
            due = self.step % validate_every == 0 or self.step == self.max_steps
            if due and self.step not in metrics.validated:
                with run_directory.timeline.phase("validation"):
                    validation = self.validate(stop)
                if validation is not None:
                    metrics.write(self.step, validation)
                    progress.validated(self.step, validation["val_loss"])
            # after the last step, too, a stop in its validation counts: the next start does it
            is_stopped = self.stop_reason is not None
            if self.step >= self.max_steps and not is_stopped:
                return True
            if is_stopped or self._stop_agreed(stop):
                if self.stop_reason == TIME_LIMIT and self.group.is_main:
                    log.info("%s", self.walltime.describe_stop())
                self.save(run_directory)
                return False

            random_before = random_state()
            begun = time.perf_counter()
            try:
                result = self.train_step()
            except torch.OutOfMemoryError as error:
                # the weights are still those after the last good step; the other processes are not
                # there to save with
                if self.step > 0 and self.accelerator.num_processes == 1:
                    self.save(run_directory, random_before)
                raise RunError(
                    f"out of GPU memory in step {self.step + 1}: {error}",
                    hint=memory_hint(self.config, self.accelerator.num_processes),
                ) from error
            seconds = time.perf_counter() - begun
            self.train_seconds += seconds
            self.walltime.step_done(seconds)
            run_directory.timeline.step_done(self.step, seconds)
            self._report(result, seconds, metrics, progress)
            log_count()  # after the first step of this process, once
            if (save_every and self.step % save_every == 0) or self.step == self.max_steps:
                self.save(run_directory)

    def _report(
        self, result: StepResult, seconds: float, metrics: MetricsLog, progress: Progress
    ) -> None:
        values: dict[str, Any] = {
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "epoch": self.schedule.epoch(self.step),
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "attended_keys": result.attended_keys,
            "step_time_seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
        }
        if self.accelerator.device.type == "cuda":
            values["max_memory_allocated_bytes"] = result.max_memory_allocated_bytes
        every = self.config.trainer.log_every_n_steps
        if self.step % every == 0 or self.step in (1, self.max_steps):
            metrics.write(self.step, values)
        progress.step(self.step, values)

    def _stop_agreed(self, stop: StopSignals) -> bool:
        """Whether any process was asked to stop, or the job ends; all get the same answer."""
        reason = ""
        if stop.requested is not None:
            reason = stop.requested.name
        elif self.walltime.is_due():
            reason = TIME_LIMIT
        code = torch.tensor(_STOP_REASONS.index(reason))
        if self.accelerator.num_processes > 1:
            # on the CPU, through gloo: the GPU goes on meanwhile
            torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX)
        self.stop_reason = _STOP_REASONS[code] or None
        return self.stop_reason is not None

    # --- state ----------------------------------------------------------------------------------

    def save(
        self, run_directory: RunDirectory, random_before: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint of the current step, then delete the ones too many.

        Args:
            run_directory: where it goes.
            random_before: of this process when the step began; None: as it is now.

        Raises:
            RunError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        from accelerate.utils import gather_object

        begun = time.perf_counter()
        self.check_alike()
        random_states = gather_object([random_before or random_state()])
        with (
            run_directory.timeline.phase("checkpoint"),
            self.group.saving(),
            self.group.main_first(),
        ):
            if self.group.is_main:
                self._write(run_directory, random_states)
        self.walltime.save_done(time.perf_counter() - begun)

    def check_alike(self) -> None:
        """Refuse to go on when processes have other data or other adapter weights than the first.

        Raises:
            RunError: they differ; names the processes.
        """
        check_alike(self.group, self.step, self.data_hash, list(self.trainable.values()))

    def _write(self, run_directory: RunDirectory, random_states: list[dict[str, Any]]) -> None:
        state = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "optimizer": self.optimizer.state_dict(),
            "random": random_states,
            "data": self.data_hash,
        }
        try:
            newest = write_checkpoint(
                run_directory.checkpoints,
                self.step,
                state=state,
                save_adapter=lambda folder: save_adapter(self.model, folder),
            )
        except OSError as error:
            kept = run_directory.path / "checkpoints"
            raise RunError(
                f"cannot write the checkpoint of step {self.step}: {error.strerror or error}",
                hint=f"the earlier checkpoints in {kept} are whole; make room, then give the same "
                "command again",
            ) from error
        delete_old(newest, self.config.log.ckpt.keep_last)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the optimizer, schedule, random numbers and data position that `save` wrote.

        The weights come back when the adapter is attached (`attach_adapter(resume_from=...)`).
        Learning rates and other settings of the optimizer are this configuration's.

        Args:
            state: `Checkpoint.read_state()`.

        Raises:
            UserError: the checkpoint was trained on other examples or packs.
        """
        if state["data"] != self.data_hash:
            raise UserError(
                f"the training data is not what the checkpoint of step {state['step']} was "
                "trained on: rows, tokenizer or packing changed",
                hint="put the data back, or --resume never starts over in a new directory",
            )
        restore_optimizer(self.optimizer, self.scheduler, state["optimizer"], state["step"])
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        random_states = state["random"]
        if len(random_states) == self.accelerator.num_processes:
            set_random_state(random_states[self.accelerator.process_index])
        elif self.config.peft.dropout > 0:
            log.warning(
                "%d processes went before, now %d: dropout draws other numbers",
                len(random_states),
                self.accelerator.num_processes,
            )

    @functools.cached_property
    def data_hash(self) -> str:
        """Hash of the training tokens, labels and packs."""
        return hash_of_data(self.data)


def memory_hint(config: Config, num_processes: int) -> str:
    """Say what makes a run need less memory of a GPU.

    Args:
        config: the run that ran out of it.
        num_processes: of the run.

    Returns:
        What to add to the command line.
    """
    options = []
    is_sharded = config.trainer.strategy == "fsdp2"
    if micro_batch_size(config) > 1:
        options.append("data.micro_batch_size=1 (the same result, less memory)")
    if config.trainer.gradient_checkpointing is not True:
        options.append("trainer.gradient_checkpointing=true")
    if config.model.quantization is None:
        if num_processes > 1 and not is_sharded:
            options.append("trainer.strategy=fsdp2")
        ddp = "trainer.strategy=ddp " if is_sharded else ""
        options.append(f"{ddp}model.quantization=nf4 (a new run)")
    options.append(f"data.seq_length={config.data.seq_length // 2} (a new run)")
    return "the same command with one of: " + "; ".join(options)
