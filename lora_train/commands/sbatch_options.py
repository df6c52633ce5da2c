"""The options of `lora-train sbatch`, and the words of the run behind them."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_train.commands.cluster import parse_memory_mb, parse_time
from lora_train.errors import UserError

_DESCRIPTION = """\
Print the batch script of a run, fitted to this cluster: partition, kind and number of GPUs per
node, CPUs, memory. The run's own words stand behind `--`, and are checked before anything is
queued. The script goes to stdout and everything else to stderr.

  lora-train sbatch --gpus 4 --time 8:00:00 -- --factory llama31_8b --max-steps 250 > job.slurm
  sbatch job.slurm
      4 GPUs; sbatch's own options win over the lines of the script: sbatch --qos=long job.slurm
  lora-train sbatch --gpus a100:8 --requeue --submit -- --factory llama31_8b
      8 GPUs of one kind, on as many nodes as it takes, submitted at once. When the time is over
      the job saves, queues itself again and goes on, until the run is complete
  sinfo -h -e -o '%P|%G|%f|%D|%m|%c|%l|%a|%T' |
    singularity run lora.sif sbatch --sinfo - --gpus 4 -- --factory llama31_8b | sbatch
      in a container, which has no Slurm

Before it: `lora-train preflight --factory ...` checks model, data and folders on the login node.
"""
# --time 2:00 means two minutes, which nobody wants
_SHORT_SECONDS = 600


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the command's own words from those of the run.

    Args:
        argv: the words after `lora-train sbatch`.

    Returns:
        Those before and those behind `--`, the latter as `lora-train` gets them.

    Raises:
        UserError: a word cannot stand in a batch script.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    words = list(argv[end + 1 :])
    for leading in ("lora-train", "train"):
        if words[:1] == [leading]:
            words = words[1:]
    if any("\n" in word for word in argv):
        raise UserError(
            "a line break in a word of the command line",
            hint="put the value into a file: --config FILE",
        )
    return list(argv[:end]), words


def parse(own: list[str], words: list[str]) -> argparse.Namespace:
    """Read the options.

    Args:
        own: the words before `--`.
        words: those of the run, for a line that mends.

    Returns:
        The options.

    Raises:
        UserError: one is unknown. What is no value of its option is argparse's to refuse.
    """
    parser = argparse.ArgumentParser(
        prog="lora-train sbatch",
        usage="%(prog)s [options] [-- the words of the run]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=_gpus, default=(None, 1), metavar="[KIND:]N",
        help="GPUs of the whole job (default 1): 4, a100:4",
    )  # fmt: skip
    parser.add_argument("--nodes", type=_count, metavar="N", help="default: as few as it takes")
    parser.add_argument(
        "--time", type=_time, metavar="TIME",
        help="limit: hours:minutes:seconds, days-hours, minutes (default 2:00:00)",
    )  # fmt: skip
    parser.add_argument("--partition", type=_word, metavar="NAME", help="default: one that fits")
    parser.add_argument("--account", type=_word, metavar="NAME", help="who is charged")
    parser.add_argument("--constraint", type=_word, metavar="FEATURE", help="such as a100")
    parser.add_argument(
        "--mem", type=_memory, metavar="SIZE",
        help="memory of each node: 120G (default: 60G a GPU, or a GPU's share of the node)",
    )  # fmt: skip
    parser.add_argument(
        "--name", type=_word, metavar="NAME", help="of the job (default: the run's)"
    )
    parser.add_argument(
        "--output", type=_word, default="%x-%j.out", metavar="FILE",
        help="what the job prints, as in sbatch (default %%x-%%j.out: its name and number)",
    )  # fmt: skip
    parser.add_argument(
        "--sif", type=Path, metavar="FILE",
        help="image (default: the one this runs in, $LORA_SIF, lora.sif here; where there is none, "
        "the job starts this installation)",
    )  # fmt: skip
    parser.add_argument(
        "--requeue", action="store_true",
        help="add resume.requeue=true to the run's words: it goes on after the time limit",
    )  # fmt: skip
    parser.add_argument(
        "--sinfo", metavar="FILE",
        help="what sinfo printed as above, where it cannot be run; - reads stdin",
    )  # fmt: skip
    parser.add_argument(
        "--submit", action="store_true", help="submit the script; prints the job's number instead"
    )
    options, unknown = parser.parse_known_args(own)
    if unknown:
        known = [word for word in own if word not in unknown]
        raise UserError(
            f"unknown to `lora-train sbatch`: {shlex.join(unknown)}",
            hint="the words of the run stand behind --: "
            + shlex.join(["lora-train", "sbatch", *known, "--", *unknown, *words]),
        )
    return options


def _gpus(text: str) -> tuple[str | None, int]:
    match = re.fullmatch(r"(?:([\w.-]+):)?(\d+)", text)
    if match is None or int(match[2]) < 1:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a number, or KIND:NUMBER such as a100:4"
        )
    return match[1], int(match[2])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return int(text)


def _time(text: str) -> int:
    try:
        seconds = parse_time(text)
    except ValueError:
        seconds = 0
    if not seconds:
        raise argparse.ArgumentTypeError(
            f"{text}: expected hours:minutes:seconds (2:00:00), days-hours (1-12) or minutes (90)"
        )
    if seconds < _SHORT_SECONDS:
        print(
            f"warning: --time {text} is {seconds / 60:g} minutes; hours are written 2:00:00",
            file=sys.stderr,
        )
    return seconds


def _memory(text: str) -> str:
    try:
        parse_memory_mb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a number with M, G or T: 120G"
        ) from None
    return text


def _word(text: str) -> str:
    if re.search(r"\s|#", text) or not text:
        raise argparse.ArgumentTypeError(f"{text!r}: spaces and # cannot stand in an #SBATCH line")
    return text
