"""The first words of the processes of a run with each other, before any collective operation.

Each says in the store where it is, what it computes on and what keeps it from taking part. All hear
the same list, so all go on, or all end with the same message and exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from lora_train.errors import EndedByAnother, LoraTrainError, RunError, UserError
from lora_train.ranks import Ranks, shape_lines

# a container on a node that has not read the image yet takes minutes to start
_GATHERING = timedelta(seconds=300)
_POLL = timedelta(seconds=10)


def open_store(ranks: Ranks) -> Store:
    """Hold the store as process 0, reach it as another.

    Args:
        ranks: the place of this process.

    Returns:
        The store of the run.

    Raises:
        UserError: the port is taken.
        RunError: process 0 cannot be reached.
    """
    host, port = _address(ranks)
    # torchrun holds one already, for all that it starts
    is_holder = ranks.global_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    me = f"rank {ranks.global_rank} on {platform.node()}"
    try:
        store = _named(TCPStore(host, port, None, is_holder, _GATHERING, wait_for_workers=False))
        if ranks.global_rank == 0:
            store.set("owner", _identity())
        store.wait(["owner"], _GATHERING)
        owner = store.get("owner").decode()
    except (DistNetworkError, DistStoreError) as error:
        if ranks.global_rank == 0:
            raise UserError(
                f"{me} cannot listen on port {port}: {_first_line(error)}",
                hint="unset MASTER_PORT"
                if os.environ.get("MASTER_PORT")
                else "export MASTER_PORT=29400 (any free port, the same in all processes)",
            ) from error
        raise RunError(
            f"{me} cannot reach rank 0 at {host}:{port} within {_GATHERING.seconds} s: "
            f"{_first_line(error)}",
            hint="rank 0 did not start (its own message says why), or a firewall is between the "
            "nodes; export MASTER_ADDR=HOST names another address of its node",
        ) from error
    if owner != _identity():
        raise RunError(
            f"{me}: port {port} on {host} belongs to another run ({owner or 'of no job'})",
            hint="unset MASTER_PORT: each step of a job then has a port of its own",
        )
    return store


def connect(ranks: Ranks) -> Store:
    """Return a further connection to the store: each waits for one answer at a time."""
    host, port = _address(ranks)
    return _named(TCPStore(host, port, None, False, _GATHERING, wait_for_workers=False))


def _named(store: Store) -> Store:
    """Keep the keys apart from torchrun's own, and from those of a run that it starts again."""
    return PrefixStore(f"lora-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _identity() -> str:
    """Name the run that this process was started for."""
    names = ["SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"]
    if not os.environ.get("SLURM_STEP_ID"):  # the launcher is another process on each node
        names.append("LORA_LAUNCHER")
    return " ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))


def _address(ranks: Ranks) -> tuple[str, int]:
    variables = ranks.variables()
    return variables["MASTER_ADDR"], int(variables["MASTER_PORT"])


class _Roll(NamedTuple):
    """What all processes know of each other before they begin."""

    nodes: list[Any]
    """Of each node: its host, its processes, how many it takes the run to have, its problem."""
    said: list[Any]
    """Of each process: its host, device and problem; None: it has not come."""


def call_roll(ranks: Ranks, store: Store, device: str, problem: LoraTrainError | None) -> list[str]:
    """Say that this process is there, and hear of all others.

    Args:
        ranks: its place. One that starts processes speaks for them.
        store: what `open_store` returned.
        device: cpu, or the UUID of a GPU.
        problem: why it, or those that it would start, cannot take part.

    Returns:
        The hosts of all processes.

    Raises:
        UserError: `problem`, or that of another process, or nodes with other numbers of GPUs; on
            all processes.
        RunError: some process has not come.
    """
    here = {
        "host": platform.node(),
        "device": device,
        "problem": None if problem is None else [problem.message, problem.hint],
    }
    for rank in range(ranks.global_rank, ranks.global_rank + max(1, ranks.num_to_start)):
        store.set(f"here/{rank}", json.dumps(here))
    roll = _call_roll(ranks, store, here["problem"])
    _judge(ranks, roll, problem)
    return [said["host"] for said in roll.said]


def _call_roll(ranks: Ranks, store: Store, problem: Any) -> _Roll:
    """Wait until every process has said that it is there."""
    # what keeps one process of a node from taking part may keep it from knowing the run's size
    node = [platform.node(), ranks.local_world_size, ranks.world_size if problem is None else -1]
    store.set(f"node/{ranks.node}", json.dumps([*node, problem]))
    if ranks.global_rank > 0:
        return _hear_roll(ranks, store)
    nodes = _gather(store, [f"node/{number}" for number in range(ranks.num_nodes)])
    said = []
    if _same_size(nodes):
        said = _gather(store, [f"here/{rank}" for rank in range(ranks.world_size)])
    store.set("roll", json.dumps([nodes, said]))
    # they read it before this process may end, and the store with it
    readers = [
        f"read/{number}/{local_rank}"
        for number, node in enumerate(nodes)
        if node is not None
        for local_rank in range(node[1])
    ]
    _gather(store, sorted(set(readers) - set(_read_keys(ranks))), _POLL)
    return _Roll(nodes, said)


def _hear_roll(ranks: Ranks, store: Store) -> _Roll:
    try:
        # process 0 may have started later than this one
        store.wait(["roll"], 3 * _GATHERING)
        roll = _Roll(*json.loads(store.get("roll")))
    except (DistNetworkError, DistStoreError) as error:
        raise RunError(
            f"rank {ranks.global_rank} on {platform.node()}: rank 0 has gone, or did not answer "
            f"within {3 * _GATHERING.seconds} s",
            hint="its own message says why",
        ) from error
    for key in _read_keys(ranks):
        store.set(key, "true")
    return roll


def _gather(store: Store, keys: list[str], limit: timedelta = _GATHERING) -> list[Any]:
    """Return what stands under the keys; None where nothing does within the limit."""
    with contextlib.suppress(DistStoreError):
        store.wait(keys, limit)
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _same_size(nodes: list[Any]) -> bool:
    """Whether all nodes that are there take the run to have as many processes."""
    return len({node[2] for node in nodes if node is not None}) == 1


def _read_keys(ranks: Ranks) -> list[str]:
    first = ranks.local_rank
    return [
        f"read/{ranks.node}/{rank}" for rank in range(first, first + max(1, ranks.num_to_start))
    ]


def _judge(ranks: Ranks, roll: _Roll, problem: LoraTrainError | None) -> None:
    """Raise what keeps the run from starting, the same on every process."""
    if problem is not None:
        raise problem
    there = [node for node in roll.nodes if node is not None]
    for host, _, _, theirs in there:
        if theirs is not None:
            raise _for_main(ranks, UserError(f"{host}: {theirs[0]}", hint=theirs[1]))
    if not _same_size(roll.nodes):
        counts = ", ".join(f"{count} on {host}" for host, count, *_ in there)
        raise _for_main(
            ranks,
            UserError(
                f"the job has other numbers of GPUs on its nodes: {counts}",
                hint=shape_lines(ranks.num_nodes, min(count for _, count, *_ in there)),
            ),
        )
    missing = [str(rank) for rank, said in enumerate(roll.said) if said is None]
    hosts = sorted({said["host"] for said in roll.said if said is not None})
    if missing:
        raise _for_main(
            ranks,
            RunError(
                f"rank {', '.join(missing)} of {ranks.world_size} did not come within "
                f"{_GATHERING.seconds} s; on {', '.join(hosts)} all is well",
                hint="the log of the missing task says why it did not start; "
                "#SBATCH --exclude=NODE leaves a node out",
            ),
        )
    without = sorted({said["host"] for said in roll.said if said["device"] == "cpu"})
    if without and len(roll.said) > sum(said["device"] == "cpu" for said in roll.said):
        raise _for_main(
            ranks,
            UserError(
                f"some processes have a GPU, and those on {', '.join(without)} have none",
                hint="#SBATCH --gpus-per-node=N gives every node its own, in place of --gpus "
                f"or --gres; or #SBATCH --exclude={','.join(without)}",
            ),
        )
    found = [(said["host"], said["device"]) for said in roll.said if said["device"] != "cpu"]
    shared = sorted({each for each in found if found.count(each) > 1})
    if shared:
        host, device = shared[0]
        raise _for_main(
            ranks,
            UserError(
                f"{found.count(shared[0])} processes on {host} have the same GPU, {device}: each "
                "needs a whole one of its own",
                hint="#SBATCH --ntasks-per-node=1, and lora-train starts a process for each GPU",
            ),
        )


def _for_main(ranks: Ranks, error: LoraTrainError) -> LoraTrainError:
    """Let the main process alone say what all of them know."""
    return error if ranks.global_rank == 0 else EndedByAnother(error.exit_status)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
