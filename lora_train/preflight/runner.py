"""All checks, each in a thread of its own: together they take as long as the slowest."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.preflight.asset_checks import check_assets
from lora_train.preflight.caches import check_home
from lora_train.preflight.deadline import start
from lora_train.preflight.driver import check_driver, check_toolchain
from lora_train.preflight.findings import Finding, errors_first, has_errors
from lora_train.preflight.gpu import check_container, check_gpu
from lora_train.preflight.installation import check_imports
from lora_train.preflight.locks import check_locks
from lora_train.preflight.machine import Machine
from lora_train.preflight.memory import check_memory
from lora_train.preflight.processes import check_batch, check_ranks, check_shm
from lora_train.preflight.report import print_findings
from lora_train.preflight.storage import check_storage
from lora_train.ranks import Ranks
from lora_train.run_directory import RunDirectory, is_finished

Check = Callable[[Machine, Config], list[Finding]]

CHECKS: dict[str, Check] = {
    "gpu": check_gpu,
    "container": check_container,
    "driver": check_driver,
    "toolchain": check_toolchain,
    "imports": check_imports,
    "home": check_home,
    "storage": check_storage,
    "locks": check_locks,
    "processes": check_ranks,
    "shm": check_shm,
    "assets": check_assets,
    "batch": check_batch,
    "memory": check_memory,
}
# what they find on a login node may be otherwise on the node of a job
_OF_THIS_NODE = ("gpu", "container", "driver", "toolchain", "memory")
_SECONDS = 5.0


def run_checks(machine: Machine, config: Config) -> list[Finding]:
    """Run every check, and wait a few seconds for their findings.

    Args:
        machine: this node.
        config: the run.

    Returns:
        Findings, errors first. A check that does not answer is a warning; one that fails itself is
        skipped, and stops no run; so is an error that is this node's alone, on a login node.
    """
    end = time.monotonic() + _SECONDS
    started = {
        name: start(lambda check=check: check(machine, config))  # type: ignore[misc]
        for name, check in CHECKS.items()
    }
    findings: list[Finding] = []
    for name, future in started.items():
        try:
            findings += future.result(timeout=max(0.0, end - time.monotonic()))
        except TimeoutError:
            findings.append(
                Finding(
                    name, "warning", f"no answer within {_SECONDS:.0f} s",
                    "a file system or a driver hangs, and the run may hang as well",
                    "`df` and `nvidia-smi` show which one hangs",
                )
            )  # fmt: skip
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, "skipped", f"the check itself failed: {reason}"))
    if machine.is_login_node:
        findings = [_unless_elsewhere(finding) for finding in findings]
    return errors_first(findings)


def _unless_elsewhere(finding: Finding) -> Finding:
    if finding.level != "error" or finding.check not in _OF_THIS_NODE:
        return finding
    seen = f"{finding.seen} (on this node; a job may get another)"
    return dataclasses.replace(finding, level="skipped", seen=seen)


def is_ready(config: Config, machine: Machine, ranks: Ranks) -> bool:
    """Check the machine before a run; print what is wrong to stderr.

    Args:
        config: the run.
        machine: this node.
        ranks: the place of this process in the run; one of each node checks it.

    Returns:
        Whether the run may go on; one that is finished only shows its summary.
    """
    if not ranks.speaks_for_node or _is_finished(config):
        return True
    findings = run_checks(machine, config)
    wrong = [finding for finding in findings if finding.level in ("error", "warning")]
    print_findings(wrong, sys.stderr, is_brief=not has_errors(wrong))
    return not has_errors(findings)


def _is_finished(config: Config) -> bool:
    if config.resume.mode == "never":
        return False
    directory = RunDirectory(
        Path(config.log.log_dir).expanduser() / (config.log.name or "run"), None, None
    )
    try:
        summary = directory.read_json("summary.json")
        return summary is not None and is_finished(config, directory, summary)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, UserError):
        return False  # the run says what is wrong with its directory
