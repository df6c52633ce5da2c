"""`lora-train sbatch`: the batch script for a run on this cluster, printed or submitted."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_train import exit_status
from lora_train.batch_split import gradient_accumulation_steps
from lora_train.cli import parse_command_line
from lora_train.commands import nemo
from lora_train.commands.cluster import SINFO, read_cluster, read_sinfo
from lora_train.commands.job_paths import check_files, check_output, folders_to_bind
from lora_train.commands.job_request import Request
from lora_train.commands.job_script import JobScript
from lora_train.commands.placement import Placement, place, place_blindly
from lora_train.commands.sbatch_options import parse, split
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.metrics import check_trackers
from lora_train.preflight.machine import Machine

_SECONDS = 15


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train sbatch`.

    Returns:
        The exit status.

    Raises:
        UserError: the run's words, or a job that this cluster cannot run.
    """
    own, words = split(argv)
    options = parse(own, words)
    if options.requeue:
        words = [*words, "resume.requeue=true"]
    config = _resolve(words)
    # without words it is a script that gets them from sbatch's line
    notes = check_files(config, _is_in_image()) if words else []
    check_output(options.output)
    placement = _place(options, config, argv)
    if words:
        _check_shape(config, placement)
    image, program = _what_runs(options.sif)
    script = JobScript(
        introduction=[f"Written by: {shlex.join(['lora-train', 'sbatch', *argv])}"],
        nodes=placement.nodes,
        gpus_per_node=placement.gpus,
        cpus_per_node=placement.cpus_per_node,
        memory_per_node=placement.memory_per_node,
        seconds=placement.seconds,
        name=options.name or re.sub(r"[^\w.-]+", "_", config.log.name or "lora-train"),
        output=options.output,
        partition=placement.partition,
        account=options.account,
        constraint=placement.constraint,
        image=image,
        program=program,
        binds=folders_to_bind(config, words) if words and image else [],
        words=words,
    ).text()
    for note in [*notes, *placement.notes]:
        _say(f"note: {note}")
    if options.submit:
        print(_submit(script, argv))
    else:
        print(script, end="")
        sys.stdout.flush()
        _ask_slurm(script)
    return exit_status.OK


def _resolve(words: list[str]) -> Config:
    """Check the words as `lora-train` does at its start."""
    found: list[Config] = []

    def resolve(words: Sequence[str]) -> int:
        found.append(parse_command_line(words).resolve())
        return exit_status.OK

    if words[:1] == ["nemo"]:
        nemo.run(words[1:], resolve)
    else:
        resolve(words)
    if not found:
        raise UserError(f"{shlex.join(words)}: trains nothing")
    check_trackers(found[0])
    return found[0]


def _place(options: argparse.Namespace, config: Config, argv: Sequence[str]) -> Placement:
    kind, gpus = options.gpus
    request = Request(
        gpus=gpus,
        kind=kind,
        nodes=options.nodes,
        seconds=options.time,
        partition=options.partition,
        constraint=options.constraint,
        memory=options.mem,
        takes_old=config.trainer.precision == "fp32" and config.kernels.fused == "off",
    )
    text = read_sinfo() if options.sinfo is None else _read(options.sinfo)
    if text is not None:
        return place(request, read_cluster(text))
    placement = place_blindly(request)
    line = f"{shlex.join(SINFO)} | "
    note = (
        "there is no answer from sinfo here: partition and kind of GPU are Slurm's defaults, CPUs "
        f"and memory are guesses ({placement.cpus_per_node} and {placement.memory_per_node} a "
        "node)"
    )
    if _is_in_image():
        note += f"; what fits this cluster:\n  {line}{_started_as(['--sinfo', '-', *argv])}"
    return dataclasses.replace(placement, notes=[note])


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--sinfo {file}: {error}", hint=f"{shlex.join(SINFO)} > {shlex.quote(file)}"
        ) from None


def _check_shape(config: Config, placement: Placement) -> None:
    """Refuse a run that divides otherwise than the job, before it has waited for its GPUs."""
    trainer, nodes, each = config.trainer, placement.nodes, placement.gpus_per_node
    if trainer.devices not in ("auto", each) or trainer.num_nodes not in ("auto", nodes):
        devices = each if trainer.devices == "auto" else trainer.devices
        num_nodes = nodes if trainer.num_nodes == "auto" else trainer.num_nodes
        raise UserError(
            f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}, and the "
            f"job has {nodes} node(s) with {each} GPU(s)",
            hint=f"--gpus {devices * num_nodes} --nodes {num_nodes}, or leave out trainer.devices "
            "and trainer.num_nodes: the run takes what the job has",
        )
    gradient_accumulation_steps(config, nodes * each)


def _what_runs(sif: Path | None) -> tuple[Path | None, Path | None]:
    """The image, or the program of this installation, by absolute path."""
    if sif is None:
        named = _own_image() or os.environ.get("LORA_SIF")
        if named:
            if not _is_in_image() and not Path(named).exists():
                raise UserError(
                    f"LORA_SIF={named}: there is no such file",
                    hint="LORA_SIF=/path/to/lora.sif, or --sif FILE; `make sif` makes one",
                )
            return Path(named).absolute(), None
        if not Path("lora.sif").exists():
            if _is_in_image():
                raise UserError(
                    "which image the job runs is not known in this container",
                    hint="--sif FILE, the image as a .sif file; `make sif` makes one",
                )
            program = Path(sys.executable).with_name("lora-train").absolute()
            _say(f"note: no --sif and no lora.sif here: the job starts {program}")
            return None, program
        sif = Path("lora.sif")
    # a container may not see it
    if not _is_in_image() and not sif.exists():
        raise UserError(f"--sif {sif}: there is no such file", hint="`make sif` makes lora.sif")
    return sif.absolute(), None


def _ask_slurm(script: str) -> None:
    """Say what Slurm would do with the script."""
    if shutil.which("sbatch") is None:
        return
    try:
        done = _sbatch(["--test-only"], script)
    except subprocess.TimeoutExpired:
        return _say(f"warning: `sbatch --test-only` did not answer within {_SECONDS} s")
    said = " ".join(re.sub(r"^(sbatch: )?(error: )?", "", x) for x in done.stderr.splitlines())
    if done.returncode == 0:
        return _say(f"note: Slurm: {said}")
    return _say(f"warning: Slurm would not take this script: {said}")


def _submit(script: str, argv: Sequence[str]) -> str:
    """Submit the script; return the job's number."""
    if _is_in_image() or shutil.which("sbatch") is None:
        words = [word for word in argv if word != "--submit"]
        where = "in a container" if _is_in_image() else "there is no sbatch"
        raise UserError(
            f"--submit: a job cannot be submitted from here: {where}",
            hint=f"{_started_as(words)} | sbatch",
        )
    try:
        done = _sbatch(["--parsable"], script)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch did not answer within {_SECONDS} s: the job may be queued, or not",
            hint="`squeue --me` shows it",
        ) from None
    if done.returncode != 0:
        raise UserError(
            f"Slurm did not take the job: {done.stderr.strip()}",
            hint="without --submit the script is printed, to be looked at",
        )
    # a site's own sbatch may say more; behind the number may stand ;CLUSTER
    match = re.search(r"(\d+)(?:;\S+)?\s*$", done.stdout)
    number = match[1] if match else done.stdout.strip()
    if done.stderr.strip():
        _say(f"note: Slurm: {done.stderr.strip()}")
    _say(f"note: submitted; its script: scontrol write batch_script {number} -")
    return number


def _sbatch(options: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", *options]
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=_SECONDS)


def _started_as(argv: Sequence[str]) -> str:
    """How this command is given, in its container from outside."""
    if image := _own_image():
        return shlex.join(["singularity", "run", image, "sbatch", *argv])
    return shlex.join(["lora-train", "sbatch", *argv])


def _own_image() -> str | None:
    """The SIF that this runs in."""
    return os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")


def _is_in_image() -> bool:
    return _own_image() is not None or Machine().in_image


def _say(text: str) -> None:
    print(text, file=sys.stderr)
