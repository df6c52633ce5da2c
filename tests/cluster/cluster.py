"""A real Slurm on this machine, for as long as the process that started it lives.

munged, slurmctld and a slurmd for each node, on loopback, everything in one folder. What runs there
sees the nodes' names and this checkout, in mount namespaces that nothing else on the machine is in.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import guard
from slurm_configuration import NODES, configure

USER = "lora-tester"
# where Debian keeps the daemons
DAEMONS = "/usr/sbin:/usr/bin:/sbin:/bin"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def wait_until(condition: Callable[[], object], what: object, seconds: float = 120) -> None:
    """Look at a condition until it holds; the test fails, and says on what, where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    status: int
    output: str


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    number: str
    file: Path

    def __str__(self) -> str:
        return f"job {self.number}, which has written:\n{self.output}"

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.file.read_text(errors="replace") if self.file.exists() else ""


class Cluster:
    """Slurm in a folder of its own."""

    def __init__(self) -> None:
        # MUNGE's socket needs a short path, and nobody else may write on the way to it
        self.folder = Path(tempfile.mkdtemp(prefix="lora-slurm-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        self._user = pwd.getpwnam(USER)
        # process whose mount namespace it is -> of a node, or of all that is not on one
        self._namespaces: dict[str, int] = {}
        for name in ("state", "log", "munge", "work"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        # ends everything when this process is gone, however it went
        self._guard = subprocess.Popen(
            [sys.executable, guard.__file__, str(self.folder)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        configure(self.folder)

    def __str__(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        ends = [f"{log.name}:\n{log.read_text(errors='replace')[-1000:]}" for log in logs]
        return "the nodes; the daemons have written\n" + "\n".join(ends)

    # --- start and end --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemons and wait for the nodes."""
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        enter = ["unshare", "--mount", "--propagation", "private", "sh", str(self.folder / "enter")]
        self._namespaces[""] = self._daemon(
            "munged", *enter, "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_until((munge / "socket").exists, "munged", 20)
        self._daemon("slurmctld", *self._inside(), "slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        self.wait_for_nodes()

    def start_node(self, name: str) -> None:
        """Start a node's daemon, with a host name and mounts of its own."""
        host = ["unshare", "--mount", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        self._namespaces[name] = self._daemon(
            f"slurmd-{name}", *self._inside(), *host, "env", f"SLURMD_NODENAME={name}",
            "slurmd", "-D", "-N", name,
        )  # fmt: skip

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its daemon and everything of its jobs."""
        guard.kill(f"SLURMD_NODENAME={name}")

    def wait_for_nodes(self) -> None:
        """Wait until every node takes jobs."""
        sinfo = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        wait_until(lambda: len(self._ask(*sinfo).split()) == len(NODES), self, 60)

    def end(self) -> None:
        """End the jobs and the daemons, and leave nothing behind."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        assert self._guard.wait(timeout=60) == 0

    def _daemon(self, name: str, *command: str) -> int:
        with (self.folder / "log" / f"{name}.out").open("a") as log:
            return subprocess.Popen(
                command, env={"PATH": DAEMONS, "SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            ).pid  # fmt: skip

    def _inside(self, node: str = "") -> list[str]:
        return ["nsenter", f"--target={self._namespaces[node]}", "--mount"]

    # --- what its user does ---------------------------------------------------------------------

    def work_folder(self, name: str) -> Path:
        """A folder that belongs to the user."""
        folder = self.folder / "work" / re.sub(r"\W+", "-", name)
        folder.mkdir()
        shutil.chown(folder, USER, USER)
        return folder

    @contextlib.contextmanager
    def mounted(self, node: str, folder: Path, options: str) -> Iterator[Path]:
        """A small file system over a folder of one node; yields where the tests see it."""
        inside = self._inside(node)
        subprocess.run(
            [*inside, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True
        )
        try:
            yield Path(f"/proc/{self._namespaces[node]}/root{folder}")
        finally:
            subprocess.run([*inside, "umount", folder], check=True)

    def shell(self, command: str, work: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a line of the user's shell in a folder, on the machine that the nodes are on."""
        user = self._user
        return subprocess.run(
            [
                *self._inside(), "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}",
                "--init-groups", "env", f"--chdir={work}", "bash", "-c", command,
            ],
            env={
                "PATH": self.path,
                "HOME": user.pw_dir,
                "USER": USER,
                "SLURM_CONF": str(self.folder / "slurm.conf"),
                # a rank is a process on the CPU, of which this machine has few
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "LORA_CACHE_DIR": str(work / "cache"),
                **variables,
            },
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def sbatch(self, lines: str, work: Path, *options: str) -> Job:
        """Submit lines of a batch script."""
        script = work / f"job-{len(list(work.glob('job-*')))}"
        script.write_text(f"#!/bin/bash\n{lines}\n")
        return self.submit(script, (), *options)

    def submit(self, script: Path, words: Sequence[str], *options: str, **variables: str) -> Job:
        """Submit a batch script, with words of its own, from its folder; two jobs run at a time."""
        output = script.with_suffix(".out")
        standing = ["--parsable", "--licenses=place:1", "--open-mode=append", f"--output={output}"]
        line = shlex.join(["sbatch", *standing, *options, script.name, *words])
        result = self.shell(line, script.parent, **variables)
        assert result.returncode == 0, result.stderr
        return Job(result.stdout.strip(), output)

    def wait_during(self, job: Job, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, which it must do before the end of a job."""

        def holds() -> bool:
            if condition():
                return True
            assert self.told(job, "JobState") not in _ENDED, str(job)
            return False

        wait_until(holds, job)

    def finish(self, job: Job, seconds: float = 240) -> Ended:
        """Wait for the end of a job. (`sbatch --wait` looks at ever longer intervals.)"""
        wait_until(lambda: self.told(job, "JobState") in _ENDED, job, seconds)
        status, _, number = self.told(job, "ExitCode").partition(":")
        # a signal counts as a shell counts it
        status = int(status) or (128 + int(number) if int(number) else 0)
        return Ended(self.told(job, "JobState"), status, job.output)

    def told(self, job: Job, key: str) -> str:
        """What Slurm says of a job."""
        text = self._ask("scontrol", "--oneliner", "show", "job", job.number)
        match = re.search(rf"\b{key}=(\S+)", text)
        return match[1] if match else ""

    def root(self, *command: str) -> None:
        """Do what root may: scancel, scontrol."""
        self._ask(*command)

    def _ask(self, *command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout
