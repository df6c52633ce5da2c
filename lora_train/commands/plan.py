"""`lora-train plan`: will a run fit, and how long will it take, without a GPU and weights."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console

from lora_train import exit_status
from lora_train.cli import parse_command_line
from lora_train.errors import UserError
from lora_train.gpu_specs import gpu_spec
from lora_train.plan.model_sizes import find_sizes
from lora_train.plan.planning import Target, make_plan
from lora_train.plan.show import print_plan
from lora_train.preflight.machine import this_machine
from lora_train.preflight.nvml import OLDEST
from lora_train.ranks import planned_ranks

_DESCRIPTION = """\
Say what a run will need and how long it will take, from its configuration and the model's
config.json alone: GPU memory at the peak and what it consists of, whether that fits an A100-40, an
A100-80, an H100-80 and the GPU here, the largest micro-batch on each, tokens/s, the time of the run
and its GPU-hours. Nothing is loaded, downloaded (but a config.json) or started. Exit status 2: the
run fits none of them.

  lora-train plan --factory llama31_8b --max-steps 250
  lora-train plan --factory llama31_8b data.seq_length=16384 model.quantization=nf4
  lora-train plan --factory llama31_70b_fsdp2 --gpus 4
  lora-train plan --factory llama31_8b --probe
      with a GPU: also run steps of these sizes on random weights, and say how far off the plan was

The words of the run are those of `lora-train`; `lora-train --help` lists them. Sequences count as
full (data.seq_length) and all of their tokens as learned: a real run needs as much or less. Memory
and times are held against runs on an H100 and an H200; times of other GPUs are scaled by their data
sheets. data.micro_batch_size=auto and trainer.gradient_checkpointing=auto choose by the same plan.
"""
_GPUS = ("A100-40", "A100-80", "H100-80")


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train plan`.

    Returns:
        The exit status: 2 if the run fits none of the GPUs.

    Raises:
        UserError: the words make no valid configuration, or no plan is known for the model.
    """
    parser = argparse.ArgumentParser(
        prog="lora-train plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lora-train plan [the words of a run] [--gpus N] [--probe] [--json]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of the run (default: trainer.devices x nodes)"
    )
    parser.add_argument("--probe", action="store_true", help="run real steps on the GPU here")
    parser.add_argument("--json", action="store_true", help="for scripts, on stdout")
    options, words = parser.parse_known_args(argv)
    config = parse_command_line(words).resolve()
    num_gpus = planned_ranks(config).world_size if options.gpus is None else options.gpus
    if num_gpus < 1:
        raise UserError(f"--gpus {num_gpus}: expected at least 1")
    if options.probe and num_gpus > 1:
        raise UserError(
            f"--probe runs on one GPU, the run has {num_gpus}",
            hint="--gpus 1 with data.global_batch_size of one GPU's share",
        )
    if options.probe and config.trainer.precision == "fp32":
        raise UserError("--probe computes in bf16, and the run has trainer.precision=fp32")
    here = _gpu_here()
    if options.probe and here is None:
        raise UserError(
            "--probe: no NVIDIA GPU here",
            hint="leave it out, or in a job: srun --gpus=1 lora-train plan ... --probe",
        )
    model = find_sizes(config.model)
    plan = make_plan(config, model, num_gpus, [*map(_target, _GPUS), *([here] if here else [])])
    if options.probe:
        from lora_train.plan.probing import probe_plan  # imports torch, only now

        assert here is not None
        plan = probe_plan(plan, here)
    if options.json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        print_plan(plan, Console(file=sys.stdout, highlight=False))
    return exit_status.OK if plan.fits_any else exit_status.USAGE


def _target(name: str) -> Target:
    spec = gpu_spec(name)
    assert spec is not None
    return Target(spec.name, spec, round(spec.memory_gib * 2**30))


def _gpu_here() -> Target | None:
    """The first GPU that this process may use, if a run could; with what it leaves to torch."""
    usable = this_machine((), run_follows=False).usable_gpus()
    if not usable or usable[0].memory == 0 or (usable[0].capability or OLDEST) < OLDEST:
        return None
    gpu, spec = usable[0], gpu_spec(usable[0].name)
    # NVML counts what the driver keeps for itself, the data sheets here do not
    memory = gpu.memory if spec is None else min(gpu.memory, round(spec.memory_gib * 2**30))
    return Target(f"{gpu.name} (here)", spec, memory, is_here=True)
