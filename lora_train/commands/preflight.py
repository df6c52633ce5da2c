"""`lora-train preflight`: check this machine for a run, and run nothing."""

from __future__ import annotations

import sys

from lora_train import exit_status
from lora_train.cli import parse_command_line
from lora_train.preflight.findings import has_errors
from lora_train.preflight.machine import this_machine
from lora_train.preflight.report import print_findings, summary, to_json
from lora_train.preflight.runner import run_checks

_HELP = """\
usage: lora-train preflight [the words of a run] [--json]

Check this machine for a run, and run nothing: GPU, driver, container, imports, caches, disks,
quotas, locks, processes, model and data. Each finding says what was seen, why it matters and the
line that mends it. The exit status is 2 if the run would fail, so it can guard a submission:

  lora-train preflight --factory llama31_8b && sbatch job.slurm

`lora-train --help` lists the words of a run.
"""


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train preflight`: those of the run, and --json.

    Returns:
        The exit status: 2 if the run would fail.

    Raises:
        UserError: the words make no valid configuration.
    """
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return exit_status.OK
    words = [word for word in argv if word != "--json"]
    if words[:1] == ["train"]:
        words = words[1:]
    config = parse_command_line(words).resolve()
    findings = run_checks(this_machine(tuple(words), run_follows=False), config)
    if "--json" in argv:
        print(to_json(findings))
    else:
        print_findings(findings, sys.stdout)
        print(summary(findings))
    return exit_status.USAGE if has_errors(findings) else exit_status.OK
