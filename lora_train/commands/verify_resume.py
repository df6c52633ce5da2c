"""`lora-train verify-resume`: prove N + N = 2N steps on the user's own run, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lora_train import exit_status
from lora_train.cli import parse_command_line
from lora_train.config import Config, TrainerConfig
from lora_train.config_loading import to_yaml
from lora_train.errors import LoraTrainError, RunError, UserError
from lora_train.metrics import read_metrics
from lora_train.preflight.machine import this_machine
from lora_train.ranks import Ranks, find_ranks
from lora_train.replay.child_run import ChildEnd, StepCounter
from lora_train.replay.resume_comparison import Part, compare_ends, print_ends
from lora_train.replay.turns import Turns, follow, job_key

_DESCRIPTION = """\
Prove that a run of yours which is stopped and goes on ends with the same bits as one that is not:
with your model, your data, your options, on this machine.

  straight   2N steps without a break, with a checkpoint at step N
  halves     a new process goes on from that checkpoint, N more steps
  stopped    a run that gets SIGTERM in its midst, and the same command again

Adapter, optimizer state, learning rate, random numbers, data order and losses of the last two must
be those of the first, to the bit. Exit status 0: they are; 1: they are not, and the first tensor,
its step and the size of the difference are shown; or the status of the run, if that fails.

  lora-train verify-resume
      the embedded example
  lora-train verify-resume --factory llama31_8b data.path=chats.jsonl
      the words of a run as you would start it; the schedule is that of 2N steps
  srun singularity run --nv lora.sif verify-resume --factory llama31_8b --steps 10
      in a job, on all of its GPUs

The runs lie in a folder below log.log_dir, which goes when all is well; without answers, trackers
and requeueing, and with one validation batch.
"""
_DEFAULT_STEPS = 3
_ATTEMPTS = 3
_SHOWN_LINES = 30


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train verify-resume`: its own options, and those of a run.

    Returns:
        The exit status, see above.

    Raises:
        UserError: the words make no valid configuration.
        RunError: no run could be stopped before its end.
    """
    options, words = _parse(argv)
    parsed = parse_command_line(words)
    if parsed.dry_run:
        parsed.problems.append("--dry-run: verify-resume runs what it verifies")
    config = parsed.resolve()
    machine = this_machine(("verify-resume", *argv), run_follows=True)
    ranks = find_ranks(config, machine.count_devices)
    parent = Path(options.workdir or config.log.log_dir).expanduser().absolute()
    # the GPU monitor of the image would write into a run directory that goes
    os.environ.pop("LORA_STATE_DIR", None)
    num_tasks = ranks.world_size // max(1, ranks.num_to_start)
    if num_tasks > 1 and job_key() is None:
        raise UserError(
            f"{num_tasks} processes were started, and not by srun: the runs after the first would "
            "not find each other",
            hint="start it with srun, or once: it starts a process for each GPU itself",
        )
    if num_tasks > 1 and not ranks.speaks_for_run:
        log_file = _shared(parent) / f"rank-{ranks.global_rank}.log"
        return follow(_shared(parent), log_file)
    work = _make_folder(parent, is_shared=num_tasks > 1)
    print(f"the runs and their logs: {work}", file=sys.stderr)
    turns = Turns(work, is_followed=num_tasks > 1)
    status = exit_status.FAILED
    try:
        status = _Verification(config, options.steps, work, turns, ranks).run()
    except LoraTrainError as error:
        status = error.exit_status
        raise
    except KeyboardInterrupt:
        print("stopped: nothing is verified, and the runs are removed", file=sys.stderr)
        status = exit_status.STOPPED
    finally:
        turns.end(status)
        if status in (exit_status.OK, exit_status.STOPPED, exit_status.USAGE):
            shutil.rmtree(work, ignore_errors=True)
        else:
            print(f"the runs and their logs are kept in {work}", file=sys.stderr)
    return status


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="lora-train verify-resume",
        usage="lora-train verify-resume [the words of a run] [--steps N] [--workdir DIR]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # --step is not short for --steps: the other words are the run's
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps", type=int, default=_DEFAULT_STEPS, metavar="N",
        help=f"optimizer steps of each half (default {_DEFAULT_STEPS})",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the runs are made (default: log.log_dir)"
    )
    options, words = parser.parse_known_args(argv)
    if options.steps < 2:
        parser.error(f"--steps: {options.steps} is not at least 2")
    return options, words


def _shared(parent: Path) -> Path:
    return parent / f"verify-resume-{job_key()}"


def _make_folder(parent: Path, *, is_shared: bool) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not is_shared:
            return Path(tempfile.mkdtemp(prefix="verify-resume-", dir=parent))
        shutil.rmtree(_shared(parent), ignore_errors=True)
        _shared(parent).mkdir()
        return _shared(parent)
    except OSError as error:
        raise UserError(
            f"cannot make a folder in {parent}: {error.strerror}",
            hint="--workdir DIR names one on project or scratch storage",
        ) from error


class _Failed(Exception):
    """A run that did not end as it should."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


@dataclass(frozen=True)
class _Verification:
    config: Config
    num_steps: int
    """Of each half."""
    work: Path
    turns: Turns
    ranks: Ranks

    def run(self) -> int:
        """Do the runs and compare them; returns the exit status."""
        total = 2 * self.num_steps
        try:
            self._do("straight", f"{total} steps without a break")
            self._copy_half()
            self._do("halves", f"from the checkpoint of step {self.num_steps} to {total}")
            stopped_at = self._stop_in_the_midst()
            self._do("stopped", f"from step {stopped_at} to {total}")
        except _Failed as failed:
            return failed.status
        columns = {
            f"{self.num_steps} + {self.num_steps} steps": self._compare("halves", self.num_steps),
            f"stopped at step {stopped_at}": self._compare("stopped", stopped_at),
        }
        print_ends(Console(), columns, total)
        is_same = not any(part.difference for parts in columns.values() for part in parts)
        return exit_status.OK if is_same else exit_status.FAILED

    def _do(self, name: str, what: str) -> None:
        """Do a run to its end."""
        print(f"{name}: {what}", file=sys.stderr, flush=True)
        end = self.turns.run(self._words(name), self._log(name))
        self._expect(name, end, exit_status.OK)

    def _stop_in_the_midst(self) -> int:
        """Start a run, send it SIGTERM after its first step; returns where it stopped."""
        folder = self.work / "stopped"
        for _ in range(_ATTEMPTS):
            print("stopped: until SIGTERM", file=sys.stderr, flush=True)
            end = self.turns.run(
                self._words("stopped"), self._log("stopped"), _has_begun(folder / "metrics.jsonl")
            )
            if end.status != exit_status.OK:
                self._expect("stopped", end, exit_status.STOPPED)
                if (step := _newest_step(folder)) < 2 * self.num_steps:
                    return step
            # its steps are faster than a signal
            shutil.rmtree(folder)
        raise RunError(
            f"{2 * self.num_steps} steps were done before SIGTERM reached the run, {_ATTEMPTS} "
            "times",
            hint=f"--steps {10 * self.num_steps}",
        )

    def _expect(self, name: str, end: ChildEnd, status: int) -> None:
        if end.signal is not None:
            raise KeyboardInterrupt
        if end.status == status:
            return
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-_SHOWN_LINES:]), file=sys.stderr)
        print(f"error: the run `{name}` ended with exit status {end.status}", file=sys.stderr)
        raise _Failed(end.status or exit_status.FAILED)

    def _words(self, name: str) -> list[str]:
        """Write the configuration of a run; return the words that give it."""
        config, num_steps = self.config, self.num_steps
        most = config.trainer.limit_val_batches
        changed = dataclasses.replace(
            config,
            trainer=dataclasses.replace(
                config.trainer,
                max_steps=2 * num_steps,
                max_epochs=TrainerConfig.max_epochs,
                val_check_interval=num_steps,
                limit_val_batches=1 if most is None else min(1, most),
                log_every_n_steps=1,
            ),
            eval=dataclasses.replace(config.eval, num_generate=0),
            log=dataclasses.replace(
                config.log,
                log_dir=str(self.work),
                name=name,
                trackers=[],
                ckpt=dataclasses.replace(
                    config.log.ckpt, every_n_train_steps=num_steps, keep_last=3
                ),
            ),
            resume=dataclasses.replace(config.resume, mode="auto", requeue=False),
        )
        file = self.work / f"{name}.yaml"
        file.write_text(to_yaml(changed), encoding="utf-8")
        return ["--config", str(file)]

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _copy_half(self) -> None:
        """Make of `straight` the directory that it was when its first half was saved."""
        source, copy = self.work / "straight", self.work / "halves"
        (copy / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "environment.json"):
            shutil.copy2(source / name, copy)
        checkpoint = f"step-{self.num_steps:06d}"
        shutil.copytree(source / "checkpoints" / checkpoint, copy / "checkpoints" / checkpoint)
        rows = read_metrics(source / "metrics.jsonl")
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.num_steps]
        (copy / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")

    def _compare(self, name: str, after_step: int) -> list[Part]:
        return compare_ends(
            self.work / "straight", self.work / name, 2 * self.num_steps, after_step
        )


def _has_begun(metrics: Path) -> Callable[[], bool]:
    counter = StepCounter(metrics)
    return lambda: counter.step() >= 1


def _newest_step(folder: Path) -> int:
    from lora_train.checkpoint import newest_complete

    checkpoint = newest_complete(folder / "checkpoints")
    if checkpoint is None:
        raise RunError(f"the run was stopped and left no checkpoint in {folder}")
    return checkpoint.step
