"""The srun step that this process is a task of, as Slurm's variables describe it. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_train.errors import UserError

# Ports that the kernel gives to outgoing connections must not be used; most services listen lower.
_PORTS = range(10000, 30000)
# up to a comma outside of brackets
_FIRST = re.compile(r"(?:[^,[]|\[[^]]*\])*")
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# steps of one job get ports far apart, jobs of neighbouring numbers neighbouring ones
_PORTS_BETWEEN_STEPS = 1009


@dataclass(frozen=True)
class SlurmStep:
    """One task of a step. Seen by `srun` alone: in a batch script there is none."""

    task: int
    """SLURM_PROCID."""
    local_task: int
    """SLURM_LOCALID, from 0 on each node."""
    node: int
    """Number of this node in the step, from 0."""
    tasks_per_node: tuple[int, ...]
    """Tasks of each node, in order."""
    gpus_on_node: int | None
    """GPUs that the job has on this node, also those that other tasks see; None: not told."""
    has_own_gpus: bool
    """Whether each task sees GPUs of its own (--gpus-per-task)."""
    asked_for_gpus: bool
    """Whether the job asked for GPUs, here or on another node."""
    nodes: str
    """The nodes, as Slurm writes them: a100-[1-2]."""
    job: int
    """Number of the job."""
    step: int
    """Number of the step in its job."""

    @property
    def num_tasks(self) -> int:
        """Tasks of the whole step."""
        return sum(self.tasks_per_node)

    @property
    def tasks_here(self) -> int:
        """Tasks on this node."""
        return self.tasks_per_node[self.node]

    @property
    def first_host(self) -> str:
        """The host of task 0."""
        from ClusterShell.NodeSet import NodeSet

        # the first as Slurm counts: a NodeSet sorts
        first = re.sub(r"\[([^],-]+)[^]]*\]", r"[\1]", _FIRST.match(self.nodes)[0])  # type: ignore[index]
        return str(NodeSet(first)[0])

    @property
    def port(self) -> int:
        """Return a port for the step: the same for all its tasks, another one for other jobs."""
        low, high = _ephemeral_ports()
        free = [port for port in _PORTS if not low <= port <= high] or list(_PORTS)
        return free[(self.job + _PORTS_BETWEEN_STEPS * self.step) % len(free)]


def read_step() -> SlurmStep | None:
    """Read the variables that srun sets for its tasks.

    Returns:
        The step; None outside of one, as in a batch script, which looks like task 0 of 1 otherwise.

    Raises:
        UserError: the variables contradict each other.
    """
    # a shell of `srun --pty` looks like task 0 of a step whose other tasks do nothing
    if not os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_PTY_PORT"):
        return None
    tasks_per_node = _expand(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    num_tasks, node = _number("SLURM_STEP_NUM_TASKS", 1), _number("SLURM_NODEID", 0)
    if sum(tasks_per_node) != num_tasks or node >= len(tasks_per_node):
        text = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={num_tasks} and SLURM_STEP_TASKS_PER_NODE={text} on node {node} "
            "contradict each other",
            hint="srun --het-group=0 starts a run on one part of a heterogeneous job"
            if os.environ.get("SLURM_HET_SIZE")
            else "unset what a script or a container set of SLURM_STEP_*, SLURM_NODEID",
        )
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    # 22.05 tells of --gpus-per-task in a variable of its own, 24.11 in this one
    per_task = os.environ.get("SLURM_GPUS_PER_TASK") or (
        "gres/gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    )
    asked = ("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_SOCKET", "SLURM_JOB_GPUS")
    return SlurmStep(
        task=_number("SLURM_PROCID", 0),
        local_task=_number("SLURM_LOCALID", 0),
        node=node,
        tasks_per_node=tasks_per_node,
        gpus_on_node=int(gpus) if gpus.isdecimal() else None,
        has_own_gpus=bool(per_task),
        asked_for_gpus=bool(per_task) or gpus not in ("", "0") or any(map(os.environ.get, asked)),
        nodes=os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", ""),
        job=_number("SLURM_JOB_ID", 0),
        step=_number("SLURM_STEP_ID", 0),
    )


def _expand(text: str) -> tuple[int, ...]:
    """Return the counts of `2(x3),1`: 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return tuple(counts)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _ephemeral_ports() -> tuple[int, int]:
    try:
        low, high = _EPHEMERAL.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999  # Linux's own
