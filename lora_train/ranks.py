"""Which processes a run has, and which of them this one is, from any shape of job. No torch.

torchrun, our own start     the variables say it: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
srun, a task for each GPU   each task is a process of the run
srun, a task for each node  each task starts a process for each GPU of its node
no srun (batch script, workstation)   likewise, on this node alone
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

from lora_train.batch_split import micro_batch_size
from lora_train.config import Config
from lora_train.errors import UserError
from lora_train.gpu_sign import wants_cpu
from lora_train.slurm_step import SlurmStep, read_step

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LOCAL_HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among those of the run, or which ones it has to start."""

    global_rank: int = 0
    """Its number, from 0; of the first one that it starts."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Its number on this node, from 0."""
    local_world_size: int = 1
    """Processes on this node."""
    node: int = 0
    """Number of this node in the run, from 0."""
    num_nodes: int = 1
    """Nodes of the run."""
    num_to_start: int = 0
    """Processes that this one starts on its node; 0: it is one of the run's itself."""
    host: str = _LOCAL_HOST
    """Where process 0 listens."""
    port: int | None = None
    """Its port; None: any free one, as all processes are started here."""
    shares_cores: bool = True
    """Whether the processes of this node have its cores in common, as tasks of srun may not."""
    warning: str | None = None
    """What is odd about the shape of the job, and how to mend it."""

    @property
    def is_alone(self) -> bool:
        """Whether no process elsewhere waits for this one, or for one that it starts."""
        return self.world_size == max(1, self.num_to_start)

    @property
    def speaks_for_node(self) -> bool:
        """Whether it checks its node; the others there would say the same."""
        return self.local_rank == 0 and not os.environ.get("LORA_LAUNCHER")

    @property
    def speaks_for_run(self) -> bool:
        """Whether it says what holds for the whole run."""
        return self.speaks_for_node and self.global_rank == 0

    def variables(self, number: int = 0) -> dict[str, str]:
        """Return the environment of a process, as torch, accelerate and NCCL read it.

        Args:
            number: of the process among those that are started here.

        Returns:
            Variables, to be set before torch is asked.
        """
        return {
            "RANK": str(self.global_rank + number),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank + number),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR") or self.host,
            "MASTER_PORT": os.environ.get("MASTER_PORT") or str(self.port),
        }


def find_ranks(config: Config, count_devices: Callable[[], int]) -> Ranks:
    """Find out what this process is, from torchrun's variables, Slurm's, or the GPUs it sees.

    Args:
        config: the run; `trainer.devices`, `trainer.num_nodes` and the batch sizes are read.
        count_devices: counts the GPUs that this process sees.

    Returns:
        Its ranks.

    Raises:
        UserError: the shape of the job cannot work, or is not what the configuration says; every
            task of the job says so at once.
    """
    found = _given()
    if found is None:
        step = read_step()
        found = (
            _alone(config, count_devices())
            if step is None
            else _of_step(config, step, count_devices())
        )
    _compare(config, found)
    return found


def shape_lines(num_nodes: int, num_gpus: int) -> str:
    """Return the lines of a batch script with which a run starts.

    Args:
        num_nodes: of the job.
        num_gpus: of each node.

    Returns:
        Lines, after one that says what they replace.
    """
    return (
        "in place of the job's lines on tasks and GPUs (and of srun's own):\n"
        f"#SBATCH --nodes={num_nodes}\n"
        f"#SBATCH --ntasks-per-node={num_gpus}\n"
        f"#SBATCH --gpus-per-node={num_gpus}"
    )


def place_in_step() -> Ranks | None:
    """Say where this task stands among those of several nodes, as far as Slurm alone tells.

    Returns:
        What is enough to tell the others why this one cannot take part; None on a single node,
        where all see the same.
    """
    step = read_step() if _given() is None else None
    if step is None or len(step.tasks_per_node) == 1:
        return None
    return _of_task(step)


def planned_ranks(config: Config) -> Ranks:
    """Return the ranks of a run that starts elsewhere or later: what the configuration says."""
    asked, nodes = config.trainer.devices, config.trainer.num_nodes
    each, num_nodes = 1 if asked == "auto" else asked, 1 if nodes == "auto" else nodes
    return Ranks(world_size=each * num_nodes, local_world_size=each, num_nodes=num_nodes)


def _given() -> Ranks | None:
    """What torchrun, accelerate or our own launcher announced, or None."""
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if not given:
        _refuse_mpi()
        return None
    if "RANK" not in given and os.environ.get("SLURM_STEP_NUM_TASKS"):
        return None  # a script has set WORLD_SIZE for a trainer that wants it; srun says all
    values = {name: os.environ.get(name, "") for name in _VARIABLES}
    seen = " ".join(f"{name}={value}" for name, value in values.items() if value)
    if len(given) < len(_VARIABLES) or not all(map(str.isdecimal, values.values())):
        raise UserError(
            f"{seen}, and not all of {', '.join(_VARIABLES)} as numbers",
            hint=f"unset {' '.join(given)}; lora-train starts its processes itself",
        )
    rank, world_size, local_rank = (int(values[name]) for name in _VARIABLES)
    if rank >= world_size:
        raise UserError(f"{seen}: a rank is below the number of processes", hint=f"unset {seen}")
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    local = int(text) if text.isdecimal() and int(text) > 0 else world_size
    return Ranks(
        global_rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local,
        node=rank // local,
        num_nodes=-(-world_size // local),
        host=os.environ.get("MASTER_ADDR") or _LOCAL_HOST,
        port=_port() if world_size > 1 else None,
    )


def _refuse_mpi() -> None:
    """Refuse to be one of many that know nothing of each other."""
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1" and not os.environ.get("SLURM_STEP_NUM_TASKS"):
        raise UserError(
            f"mpirun has started {size} of these",
            hint="start it with srun, or once, without mpirun: it starts a process for each GPU",
        )


def _port() -> int:
    text = os.environ.get("MASTER_PORT", "")
    if not text.isdecimal():
        raise UserError(
            f"MASTER_PORT={text!r} is no port",
            hint="unset MASTER_PORT RANK WORLD_SIZE LOCAL_RANK; lora-train starts its processes "
            "itself, and finds a port",
        )
    return int(text)


def _alone(config: Config, num_devices: int) -> Ranks:
    """One process that starts a process for each device of this node, if there are several."""
    num_processes = _num_to_start(config, num_devices, num_nodes=1)
    warning = None
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if os.environ.get("SLURM_JOB_ID") and nodes not in ("", "1"):
        warning = (
            f"the job has {nodes} nodes, and this run is on {platform.node()} alone: start it with "
            "`srun --ntasks-per-node=1 singularity run --nv lora.sif ...`"
        )
    if num_processes == 1:
        return Ranks(warning=warning)
    return Ranks(
        world_size=num_processes,
        local_world_size=num_processes,
        num_to_start=num_processes,
        warning=warning,
    )


def _of_step(config: Config, step: SlurmStep, num_devices: int) -> Ranks:
    """What a task of a step is; the same decision on every task, from what all of them know."""
    num_nodes = len(step.tasks_per_node)
    if num_devices == 0 and step.asked_for_gpus and not wants_cpu():
        raise UserError(
            f"{step.tasks_here} task(s) on {platform.node()}, where the job has no GPU",
            hint=shape_lines(num_nodes, step.gpus_on_node or 1),
        )
    if os.environ.get("MASTER_PORT"):
        _port()
    if set(step.tasks_per_node) == {1}:
        num_processes = _num_to_start(config, num_devices, num_nodes)
        if num_processes == num_nodes == 1:
            return Ranks()
        return Ranks(
            global_rank=step.node * num_processes,
            world_size=num_nodes * num_processes,
            local_world_size=num_processes,
            node=step.node,
            num_nodes=num_nodes,
            num_to_start=num_processes if num_processes > 1 else 0,
            host=_main_host(step),
            port=step.port if num_nodes > 1 else None,
        )
    return _of_task(step, warning=_judge_tasks(step, num_devices))


def _of_task(step: SlurmStep, warning: str | None = None) -> Ranks:
    """The place of a task that is one process of the run."""
    return Ranks(
        global_rank=step.task,
        world_size=step.num_tasks,
        local_rank=step.local_task,
        local_world_size=step.tasks_here,
        node=step.node,
        num_nodes=len(step.tasks_per_node),
        host=_main_host(step),
        port=step.port,
        shares_cores=False,
        warning=warning,
    )


def _main_host(step: SlurmStep) -> str:
    return _LOCAL_HOST if len(step.tasks_per_node) == 1 else step.first_host


def _judge_tasks(step: SlurmStep, num_devices: int) -> str | None:
    """Refuse several tasks on a node that cannot have a device each; return a warning or None."""
    num_nodes, here = len(step.tasks_per_node), step.tasks_here
    if not num_devices:
        return None  # CPU
    on_node = max(step.gpus_on_node or 0, num_devices)
    # with --gpus-per-task a task sees its own GPU alone, of those that the node has
    available = on_node if num_devices == 1 else num_devices
    if here > available:
        raise UserError(
            f"{here} tasks on {platform.node()}, where the job has {on_node} GPU(s) and each task "
            f"sees {num_devices}: each process needs one of its own",
            hint=shape_lines(num_nodes, on_node),
        )
    # what each sees is its own, and not all that there is (as with --gpu-bind=none)
    if step.has_own_gpus and num_devices > 1 and here * num_devices <= on_node:
        raise UserError(
            f"each task has {num_devices} GPUs of its own, and a process takes one",
            hint=shape_lines(num_nodes, on_node),
        )
    if available > here:
        return (
            f"{available - here} of the job's {available} GPUs on {platform.node()} stay idle: "
            f"#SBATCH --ntasks-per-node={available}, or --ntasks-per-node=1, "
            "where lora-train starts a process for each"
        )
    return None


def _num_to_start(config: Config, num_devices: int, num_nodes: int) -> int:
    """How many processes to start on this node."""
    asked = config.trainer.devices
    if asked != "auto":
        if 0 < num_devices < asked:
            raise UserError(
                f"trainer.devices={asked}, and {num_devices} GPU(s) are visible on "
                f"{platform.node()}",
                hint=f"trainer.devices={num_devices}, trainer.devices=auto, or\n"
                + shape_lines(num_nodes, asked),
            )
        return asked
    data = config.data
    for count in range(num_devices, 1, -1):
        if data.global_batch_size % (micro_batch_size(config) * count * num_nodes) == 0:
            return count
    return 1


def _compare(config: Config, ranks: Ranks) -> None:
    """Refuse a configuration that speaks of other processes than those that were started."""
    trainer = config.trainer
    if trainer.devices != "auto" and trainer.devices != ranks.local_world_size:
        raise UserError(
            f"trainer.devices={trainer.devices}, and {ranks.local_world_size} process(es) were "
            f"started on {platform.node()}",
            hint="trainer.devices=auto takes what was started; or\n"
            + shape_lines(ranks.num_nodes, trainer.devices),
        )
    if trainer.num_nodes != "auto" and trainer.num_nodes != ranks.num_nodes:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}, and the run was started on {ranks.num_nodes}",
            hint="trainer.num_nodes=auto; or, started with srun,\n"
            + shape_lines(trainer.num_nodes, ranks.local_world_size),
        )
