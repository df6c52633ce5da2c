"""`lora-train preflight`: check this machine for a run, and run nothing."""

from __future__ import annotations

import sys

from lora_train import exit_status
from lora_train.cli import parse_command_line
from lora_train.preflight.findings import has_errors
from lora_train.preflight.machine import this_machine
from lora_train.preflight.report import print_findings, summary, to_json
from lora_train.preflight.runner import run_checks


def run(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `lora-train preflight`: those of the run, and --json.

    Returns:
        The exit status: 2 if the run would fail.

    Raises:
        UserError: the words make no valid configuration.
    """
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
