"""How the processes of a run find each other, wait for the main one, and end together.

All of them talk to one store, which process 0 holds (torch's TCPStore). What one of them says
before the first collective operation, such as a fault that only its node has, reaches the others,
and waiting for the main process (which may tokenize for hours) runs into no collective's limit.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from lora_train.device import select_device
from lora_train.errors import EndedByAnother, LoraTrainError, RunError, UserError
from lora_train.ranks import Ranks
from lora_train.watch import Watch

T = TypeVar("T")

# a container on a node that has not read the image yet takes minutes to start
_GATHERING = timedelta(seconds=300)
# of a collective operation; a process that died or hangs is noticed earlier (watch.py)
_COLLECTIVE = timedelta(minutes=30)
_POLL = timedelta(seconds=10)


class Group:
    """The processes of a run, seen from one of them.

    Args:
        ranks: its place.
        store: what all of them talk to; None for a single process.
        hosts: of every process.
    """

    def __init__(
        self, ranks: Ranks, store: Store | None = None, hosts: list[str] | None = None
    ) -> None:
        self.ranks = ranks
        self.rank, self.world_size = ranks.global_rank, ranks.world_size
        self.hosts = hosts or [platform.node()]
        self._store = store
        self._num_turns = 0
        self.watch: Watch | None = None
        if store is not None:
            self.watch = Watch(_connect(ranks), self.rank, self.hosts)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which prepares data and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do something before the others; they wait as long as it takes.

        All processes come to it in the same order.
        """
        self._num_turns += 1
        key = f"done/{self._num_turns}"
        if self._store is not None and not self.is_main:
            self._wait_for(key)
        yield
        if self._store is not None and self.is_main:
            self._store.set(key, "")

    def _wait_for(self, key: str) -> None:
        assert self._store is not None
        while True:
            # a main process that is gone is the watch's to notice
            with contextlib.suppress(DistStoreError):
                self._store.wait([key], _POLL)
                return

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Mark that a checkpoint is being written, which the end of another process waits for."""
        with contextlib.nullcontext() if self.watch is None else self.watch.saving():
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that this process waits for the others, which must all come here."""
        with contextlib.nullcontext() if self.watch is None else self.watch.waiting():
            yield

    def from_main(self, value: T) -> T:
        """Return what the main process gave; everywhere the same."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends; they end too.

        Args:
            error: what ended it.
        """
        if self.watch is None or isinstance(error, EndedByAnother):
            return
        status = error.exit_status if isinstance(error, LoraTrainError) else 1
        message = getattr(error, "message", f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            status, message = 75, "stopped"
        self.watch.announce(status, message, getattr(error, "hint", None))
        # torch would wait for a group that is broken
        atexit.register(_exit_at_once, status)

    def wait_for_cause(self) -> None:
        """Let the process that failed say so first: the watch ends this one when it has."""
        if self.watch is not None:
            self.watch.wait_for_end()

    def leave(self) -> None:
        """End together: process 0, which holds the store, as the last."""
        if self.watch is None:
            return
        # through gloo: torch's barrier would take a GPU
        torch.distributed.all_reduce(torch.zeros(1))
        self.watch.stop()
        torch.distributed.destroy_process_group()


def join(ranks: Ranks, problem: LoraTrainError | None = None) -> Group:
    """Gather all processes of the run, and make torch's process group of them.

    Args:
        ranks: the place of this process. One that starts processes stands in for them.
        problem: why this process, or those it would start, cannot take part.

    Returns:
        The group, of which every process is a part.

    Raises:
        UserError: `problem`, or that of another process, or nodes with and without GPUs; on all.
        RunError: some process has not come.
    """
    if ranks.world_size == 1:
        if problem is not None:
            raise problem
        return Group(ranks)
    os.environ.update(ranks.variables())  # accelerate and NCCL read them
    store = _open_store(ranks)
    device = "none"
    if problem is None:
        try:
            device = str(select_device(ranks.local_rank))
        except UserError as error:
            problem = error
    for rank in _represented(ranks):
        here = {
            "host": platform.node(),
            "device": device.partition(":")[0],
            "problem": None if problem is None else [problem.message, problem.hint],
        }
        store.set(f"here/{rank}", json.dumps(here))
    roll = _call_roll(ranks, store)
    _judge(ranks, roll, problem)
    host = roll[ranks.global_rank]["host"]
    print(
        f"Initializing distributed: GLOBAL_RANK: {ranks.global_rank}, "
        f"MEMBER: {ranks.global_rank + 1}/{ranks.world_size}, {host}, {device}\n",
        end="",
        file=sys.stderr,
        flush=True,
    )
    group = Group(ranks, store, [entry["host"] for entry in roll])
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(torch.device(device))
    torch.distributed.init_process_group(
        # small things between hosts go through gloo, where the GPU need not be waited for
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=PrefixStore("group", _connect(ranks)),
        rank=ranks.global_rank,
        world_size=ranks.world_size,
        timeout=_COLLECTIVE,
    )
    return group


def is_consequence(error: BaseException) -> bool:
    """Whether an error is one of communication, which another process has mostly caused."""
    # gloo's errors have no class of their own
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _open_store(ranks: Ranks) -> Store:
    """Hold the store as process 0, reach it as another."""
    host, port = _address(ranks)
    # torchrun holds one already, for all that it starts
    is_holder = ranks.global_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    me = f"rank {ranks.global_rank} on {platform.node()}"
    try:
        return _named(TCPStore(host, port, None, is_holder, _GATHERING, wait_for_workers=False))
    except (DistNetworkError, DistStoreError) as error:
        if ranks.global_rank == 0:
            raise UserError(
                f"{me} cannot listen on port {port}: {_first_line(error)}",
                hint="export MASTER_PORT=29400 (any free port, the same in all processes)",
            ) from error
        raise RunError(
            f"{me} cannot reach rank 0 at {host}:{port} within {_GATHERING.seconds} s: "
            f"{_first_line(error)}",
            hint="rank 0 did not start (its own message says why), or a firewall is between the "
            "nodes; export MASTER_ADDR=HOST names another address of its node",
        ) from error


def _connect(ranks: Ranks) -> Store:
    """Return a connection of its own: a client waits for one answer at a time."""
    host, port = _address(ranks)
    return _named(TCPStore(host, port, None, False, _GATHERING, wait_for_workers=False))


def _named(store: Store) -> Store:
    """Keep the keys apart from torchrun's own, and from those of a run that it starts again."""
    return PrefixStore(f"lora-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _address(ranks: Ranks) -> tuple[str, int]:
    variables = ranks.variables()
    return variables["MASTER_ADDR"], int(variables["MASTER_PORT"])


def _call_roll(ranks: Ranks, store: Store) -> list[Any]:
    """Wait until every process has said that it is there; return what they said, None: absent."""
    if ranks.global_rank == 0:
        keys = [f"here/{rank}" for rank in range(ranks.world_size)]
        with contextlib.suppress(DistStoreError):
            store.wait(keys, _GATHERING)
        said = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
        store.set("roll", json.dumps(said))
        # they read it before this process may end, and the store with it
        readers = [f"read/{rank}" for rank in range(1, ranks.world_size) if said[rank] is not None]
        with contextlib.suppress(DistStoreError):
            store.wait([key for key in readers if key not in _read_keys(ranks)], _POLL)
        return said
    try:
        # process 0 may have started later than this one
        store.wait(["roll"], 2 * _GATHERING)
        roll: list[Any] = json.loads(store.get("roll"))
    except (DistNetworkError, DistStoreError) as error:
        raise RunError(
            f"rank {ranks.global_rank} on {platform.node()}: rank 0 has gone, or did not answer "
            f"within {2 * _GATHERING.seconds} s",
            hint="its own message says why",
        ) from error
    for key in _read_keys(ranks):
        store.set(key, "")
    return roll


def _read_keys(ranks: Ranks) -> list[str]:
    return [f"read/{rank}" for rank in _represented(ranks)]


def _represented(ranks: Ranks) -> range:
    """The processes that this one speaks for: itself, or those that it does not start."""
    return range(ranks.global_rank, ranks.global_rank + max(1, ranks.num_to_start))


def _judge(ranks: Ranks, roll: list[Any], problem: LoraTrainError | None) -> None:
    """Raise what keeps the run from starting, the same on every process."""
    missing = [str(rank) for rank, said in enumerate(roll) if said is None]
    hosts = sorted({said["host"] for said in roll if said is not None})
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
    wrong = [(rank, said) for rank, said in enumerate(roll) if said["problem"] is not None]
    if wrong:
        if problem is not None:
            raise problem
        rank, said = wrong[0]
        message, hint = said["problem"]
        raise _for_main(ranks, UserError(f"rank {rank} on {said['host']}: {message}", hint=hint))
    if len({said["device"] for said in roll}) > 1:
        without = sorted({said["host"] for said in roll if said["device"] == "cpu"})
        raise _for_main(
            ranks,
            UserError(
                f"some processes have a GPU, and those on {', '.join(without)} have none",
                hint="#SBATCH --gpus-per-node=N gives every node its own, in place of --gpus "
                f"or --gres; or #SBATCH --exclude={','.join(without)}",
            ),
        )


def _for_main(ranks: Ranks, error: LoraTrainError) -> LoraTrainError:
    """Let the main process alone say what all of them know."""
    return error if ranks.global_rank == 0 else EndedByAnother(error.exit_status)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _exit_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
