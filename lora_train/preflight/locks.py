"""Whether file locks hold: two processes ask for one, and only one may get it.

Some network file systems grant a lock to everybody, refuse it to everybody, or never answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_train.config import Config
from lora_train.preflight.assets import find_model
from lora_train.preflight.findings import Finding
from lora_train.preflight.folders import existing_parent, file_system
from lora_train.preflight.hub import hub_cache
from lora_train.preflight.machine import Machine

_SECONDS = 2.0
_HELD, _GRANTED, _REFUSED = 10, 11, 12

# Locks as filelock does. The first process starts the second, which gets no source to go on with.
# An interpreter without site-packages: 20 ms each.
_SOURCE = f"""
import fcntl, subprocess, sys
file, rest = open(sys.argv[1], "a"), sys.argv[2:]
if rest:
    print("started", flush=True)
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit({_HELD})
except OSError as error:
    print(error.errno, flush=True)
    sys.exit({_REFUSED})
if not rest:
    sys.exit({_GRANTED})
second = [sys.executable, "-I", "-S", "-c", rest[0], sys.argv[1]]
sys.exit(subprocess.run(second).returncode)
"""


def check_locks(machine: Machine, config: Config) -> list[Finding]:
    """Try a lock where the run directory will be, and in the hub cache if it will be written."""
    folders = {
        "run directory": existing_parent(Path(os.path.expanduser(config.log.log_dir))),
    }
    model = find_model(config.model)
    if model.kind == "hub" and not model.is_here:
        cache = existing_parent(hub_cache())
        if cache.stat().st_dev != folders["run directory"].stat().st_dev:
            folders["hub cache"] = cache
    return [
        finding
        for purpose, folder in folders.items()
        for finding in _try_lock(machine, purpose, folder)
    ]


def _try_lock(machine: Machine, purpose: str, folder: Path) -> list[Finding]:
    try:
        descriptor, name = tempfile.mkstemp(prefix=".lora-lock-", dir=folder)
    except OSError:
        return []  # `storage` says so
    os.close(descriptor)
    try:
        status, code = _two_processes(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    where = f"{purpose}: locks in {folder} ({file_system(machine.root, folder)})"
    mend = (
        "log.log_dir=/path/on/another/file/system"
        if purpose == "run directory"
        else "export HF_HOME=/path/on/another/file/system"
    )
    if status == _HELD:
        return [Finding("locks", "ok", f"{where} hold")]
    if status == _GRANTED:
        return [
            Finding(
                "locks", "warning", f"{where} do not hold: two processes got the same one",
                "two runs in one directory would not notice each other, and mix their files",
                f"start one run per log.name, or {mend}",
            )
        ]  # fmt: skip
    if status is None:
        return [
            Finding(
                "locks", "warning", f"{where} did not answer within {_SECONDS:.0f} s",
                "the run would hang when it opens its directory", mend,
            )
        ]  # fmt: skip
    if status == _REFUSED and code == errno.ENOSYS:
        return [
            Finding(
                "locks", "warning", f"{where} are not supported ({os.strerror(code)})",
                "a marker file stands in, which a killed run leaves behind on another node",
                f"rm .lock in the run directory after a kill, or {mend}",
            )
        ]  # fmt: skip
    if status == _REFUSED:
        return [
            Finding(
                "locks", "error", f"{where} are refused ({os.strerror(code)})",
                "the run locks its directory before it starts",
                f"{mend}; on Lustre it is the mount option flock",
            )
        ]  # fmt: skip
    return [Finding("locks", "skipped", f"{where} could not be tried")]


def _two_processes(name: str) -> tuple[int | None, int]:
    """Let two processes lock a file.

    Args:
        name: the file.

    Returns:
        How the deciding one ended and its error number; None: no answer in time.
    """
    command = [sys.executable, "-I", "-S", "-c", _SOURCE, name, _SOURCE]
    # unbuffered: a second line that came with the first would be lost to communicate
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    # starting an interpreter from a busy file system may take longer than a lock
    process.stdout.readline()
    try:
        output, _ = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: a lock that hangs may keep it from dying
        return None, 0
    return process.returncode, int(output.strip() or 0)
