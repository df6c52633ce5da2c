"""What the daemons of a Slurm on one machine are told."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from guard import CGROUPS

REPOSITORY = Path(__file__).parents[2]
# node -> type and number of its GPUs
NODES = {"a100-1": ("a100", 4), "a100-2": ("a100", 4), "v100-1": ("v100", 2), "cpu-1": ("cpu", 0)}


def configure(folder: Path) -> None:
    """Write what the daemons read, and `enter`: a script that sets their mount namespace up."""
    host = os.uname().nodename.partition(".")[0]
    # version 1, which needs no systemd; without it a signal reaches every process of a step
    is_held = all(os.access(folder, os.W_OK) for folder in CGROUPS)
    port, nodes, gpus = _free_ports(len(NODES) + 1), [], []
    for number, (name, (kind, count)) in enumerate(NODES.items(), 1):
        gres = f"Gres=gpu:{kind}:{count}" if count else ""
        nodes.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} "
            f"CPUs=64 RealMemory=64000 Feature={kind} {gres}"
        )
        (folder / "dev" / name).mkdir(parents=True)
        for index in range(count):
            # the number of a real one: opening it finds no driver
            file = folder / "dev" / name / f"nvidia{index}"
            os.mknod(file, 0o20666, os.makedev(195, index))
        if count:
            files = folder / "dev" / name / f"nvidia[0-{count - 1}]"
            gpus.append(f"NodeName={name} Name=gpu Type={kind} File={files}")
    constrain = "ConstrainDevices=yes" if is_held else ""
    files = {
        "gres.conf": "\n".join(gpus),
        "cgroup.conf": f"CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n{constrain}\n",
        "hosts": Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n",
        "enter": "\n".join(_enter(folder, is_held)),
        "slurm.conf": "\n".join([*_settings(folder, host, port, is_held), *nodes]) + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def _settings(folder: Path, host: str, port: int, is_held: bool) -> list[str]:
    return [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        # a job that is queued again may start once its first credential has expired
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld",
        f"SlurmdLogFile={folder}/log/slurmd-%n",
        f"ProctrackType=proctrack/{'cgroup' if is_held else 'linuxproc'}",
        f"TaskPlugin=task/{'cgroup' if is_held else 'none'}",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerNode=4000",
        "GresTypes=gpu",
        "Licenses=place:2",
        # the nodes claim more than this machine has
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "KillWait=15",
        "MinJobAge=3600",
        "SlurmdTimeout=20",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,"
        "bf_interval=1",
        f"PartitionName=gpu Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]


def _free_ports(number: int) -> int:
    """Return the first of so many ports that are free here."""
    for first in range(17400, 18400, 10):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("ports 17400 to 18399 are in use")


def _enter(folder: Path, is_held: bool) -> Iterator[str]:
    """Lines of a shell script that sets the mount namespace up."""
    yield f"set -e\nmount --bind {folder}/hosts /etc/hosts"
    # a part of its own: another Slurm on the machine may have nodes and jobs of the same names
    for cgroup in CGROUPS if is_held else ():
        own = cgroup / folder.name
        yield f"mkdir {own}; mount --bind {own} {cgroup}"
    # an interpreter or a checkout in a home that others may not enter, such as root's
    closed: dict[Path, list[Path]] = {}
    for path in (Path(sys.base_prefix), REPOSITORY):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    for parent, paths in closed.items():
        for number, path in enumerate(paths):
            yield f"mkdir {folder}/shown-{number}"
            yield f"mount --bind {path} {folder}/shown-{number}"
        yield f"mount -t tmpfs -o mode=755 tmpfs {parent}"
        for number, path in enumerate(paths):
            yield f"mkdir -p {path}; mount --move {folder}/shown-{number} {path}"
            yield f"rmdir {folder}/shown-{number}"
    yield 'exec "$@"'
