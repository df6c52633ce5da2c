"""`lora-train replay`: repeat a run from its receipt, and compare the curves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_train import exit_status
from lora_train.config import Config
from lora_train.config_loading import to_yaml
from lora_train.errors import UserError
from lora_train.preflight.machine import Machine, this_machine
from lora_train.ranks import Ranks, find_ranks
from lora_train.receipts.differences import Difference, differences
from lora_train.receipts.file_hashes import FileHashes
from lora_train.receipts.machine import cpu_model, program
from lora_train.recorded_run import read_run
from lora_train.replay.child_run import ChildEnd, StepCounter, run_child
from lora_train.replay.plan import ReplayPlan, check_inputs, enter_folder, plan_replay
from lora_train.replay.verdict import compare, print_comparison
from lora_train.run_directory import RunDirectory

_DESCRIPTION = """\
Repeat a run into a new run directory beside it, and compare. RUN is a run directory: its
environment.json is the receipt of what made the run.

First it says what is not what it was: packages, GPU, number of processes, the code of lora-train,
the image. These are warnings. Data or a base model that changed, or is missing, is refused: that
would be another run. Then the run is repeated, and its losses, gradient norms and adapter are
compared with the first ones:

  the same bits    every value and the adapter are the same; expected where nothing changed
  the same curve   on other hardware or packages: the losses differ by 1 % or less on average
  different        anything else; exit status 1

  lora-train replay runs/quickstart
      the whole run, into runs/quickstart-replay; the table is also in its replay.json
  lora-train replay runs/mine --steps 20
      its first 20 steps, with the schedule of the whole run: minutes tell what hours would
  lora-train replay /project/colleague/runs/best --output runs/best-again
      of a run directory that may only be read
  srun singularity run --nv lora.sif replay runs/mine --steps 20
      in a job of the same shape
"""
_MAX_SHOWN = 12


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train replay`.

    Returns:
        The exit status: 1 if the runs are different; that of the repeated run if it fails.

    Raises:
        UserError: RUN is no run, or what it was made of is not there any more.
    """
    options = _parse(argv)
    folder = Path(os.path.abspath(options.run))  # `..` too has a name then
    recorded = read_run(folder)
    output = _unused(folder, options.output)
    plan = plan_replay(recorded, options.steps)
    enter_folder(plan)
    machine = this_machine(("replay", *argv), run_follows=True)
    ranks = find_ranks(plan.config, machine.count_devices)
    plan = _check(plan, machine, ranks)
    child = dataclasses.replace(
        plan.config,
        log=dataclasses.replace(
            plan.config.log, log_dir=str(output.parent), name=output.name, trackers=[]
        ),
        resume=dataclasses.replace(plan.config.resume, mode="auto", requeue=False),
    )
    if not plan.is_whole:  # their answers are those of another adapter
        child = dataclasses.replace(child, eval=dataclasses.replace(child.eval, num_generate=0))
    if not ranks.speaks_for_run:
        end = _run(child, None)
        # the processes stop together, and the main one alone is told to
        return exit_status.OK if _was_cut(plan, end) else end.status
    watch = _Watch(plan, output)
    end = _run(child, watch)
    if watch.has_other_tokens:
        raise UserError(
            f"{output}: the data gives other tokens than it gave {folder}, although its files are "
            "what they were, or are not in the receipt",
            hint="another tokenizer, chat template or version of the data set; the log says where "
            "the data came from",
        )
    status = exit_status.OK if end.was_ended and _was_cut(plan, end) else end.status
    if status == exit_status.STOPPED and watch.num_steps:
        plan = plan.up_to(
            watch.num_steps,
            f"the repetition was stopped after {watch.num_steps} of {plan.num_steps} steps; given "
            "again, replay starts over: --steps N for fewer",
        )
    elif status != exit_status.OK:
        return status
    return _conclude(plan, folder, output) or status


def _was_cut(plan: ReplayPlan, end: ChildEnd) -> bool:
    """Whether the run may have been stopped because it had done the steps that are compared."""
    return not plan.is_whole and end.status == exit_status.STOPPED and end.signal is None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-train replay",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", metavar="NAME",
        help="name of the new run directory beside RUN (default: RUN-replay), or its path",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="compare the first N steps only, then stop"
    )
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps} is not at least 1")
    return options


def _unused(run: Path, name: str | None) -> Path:
    """The new run directory; on all processes the same, as it is made when all have come."""
    if name is not None and "/" in name:
        first = Path(name).expanduser().absolute()
    else:
        first = run.parent / (name or f"{run.name}-replay")
    candidate, number = first, 1
    while candidate.exists():
        if name is not None:
            raise UserError(
                f"--output {name}: {candidate} exists", hint="leave it out: a free name is taken"
            )
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    if candidate.parent.is_dir() and not os.access(candidate.parent, os.W_OK):
        raise UserError(
            f"{candidate.parent} cannot be written: the repeated run has no place there",
            hint="--output FOLDER/NAME on storage of your own",
        )
    return candidate


def _check(plan: ReplayPlan, machine: Machine, ranks: Ranks) -> ReplayPlan:
    """Say what is not what it was, and refuse what would be another run."""
    if ranks.speaks_for_run:
        print(f"replay: {plan.num_steps} steps are repeated and compared", file=sys.stderr)
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        _print_differences(_differences(plan, _now(machine, ranks)))
        # read once and remembered, as the run itself did; a large base model takes a while
        print("comparing data and base model with the receipt", file=sys.stderr, flush=True)
    hashes = FileHashes()
    checked = check_inputs(plan, hashes.of)
    hashes.save()
    for note in checked.notes[len(plan.notes) :]:
        if ranks.speaks_for_run:
            print(f"note: {note}", file=sys.stderr)
    return checked


def _now(machine: Machine, ranks: Ranks) -> dict[str, Any]:
    """What is known of a receipt before the run starts."""
    names = [gpu.name for gpu in machine.usable_gpus()] or [cpu_model()]
    devices = [
        {"name": names[number % len(names)], "host": number // ranks.local_world_size}
        for number in range(ranks.world_size)
    ]
    return {**program(), "devices": devices, "driver": machine.driver()}


def _differences(plan: ReplayPlan, now: dict[str, Any]) -> list[Difference]:
    """What is not as it was in any of the starts, each once."""
    found = [each for receipt in plan.receipts for each in differences(receipt, now)]
    return list(dict.fromkeys(found))


def _print_differences(found: list[Difference]) -> None:
    """Warn of what is not what it was, on stderr; what may change bits first."""
    for title, some in (
        ("differs from the receipt, and may give other bits", True),
        ("differs from the receipt, without effect on the bits", False),
    ):
        lines = [str(each) for each in found if each.may_change_bits is some]
        for line in lines[:_MAX_SHOWN]:
            print(f"warning: {title}: {line}", file=sys.stderr)
        if len(lines) > _MAX_SHOWN:
            print(f"warning: and {len(lines) - _MAX_SHOWN} more of these", file=sys.stderr)


class _Watch:
    """Tells when the repeated run is to end before its time."""

    def __init__(self, plan: ReplayPlan, output: Path) -> None:
        self._plan = plan
        self._receipt_file = output / "environment.json"
        self._counter = StepCounter(output / "metrics.jsonl")
        self._is_checked = not plan.receipts
        self.has_other_tokens = False

    @property
    def num_steps(self) -> int:
        """Steps done, as far as they are in metrics.jsonl."""
        return self._counter.step()

    def __call__(self) -> bool:
        if not self._is_checked and self._receipt_file.exists():
            self._is_checked = True
            [receipt] = json.loads(self._receipt_file.read_text(encoding="utf-8"))
            tokens = self._plan.receipt["data"]["tokens"]
            self.has_other_tokens = receipt["data"]["tokens"] != tokens
        is_enough = not self._plan.is_whole and self.num_steps >= self._plan.num_steps
        return self.has_other_tokens or is_enough


def _run(config: Config, watch: _Watch | None) -> ChildEnd:
    with tempfile.TemporaryDirectory(prefix="lora-train-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        words = ["--config", str(file)]
        return run_child(words) if watch is None else run_child(words, should_end=watch)


def _conclude(plan: ReplayPlan, run: Path, output: Path) -> int:
    directory = RunDirectory(output, None, None)
    receipt = directory.read_json("environment.json")[-1]
    comparison = compare(
        run,
        output,
        plan.num_steps,
        with_adapters=plan.is_whole,
        differences=_differences(plan, receipt),
        has_receipt=bool(plan.receipts),
    )
    directory.write_json(
        "replay.json", {"of": str(run), **comparison.to_dict(), "notes": plan.notes}
    )
    print(f"\n{run} and {output}, {plan.num_steps} steps:", flush=True)
    print_comparison(Console(), comparison, plan.notes)
    is_accepted = comparison.verdict != "different"
    return exit_status.OK if is_accepted else exit_status.FAILED
