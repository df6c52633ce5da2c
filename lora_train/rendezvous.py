"""How the processes of a run find each other, wait for the main one, and end together.

All of them talk to one store, which process 0 holds (torch's TCPStore). What one of them says
before the first collective operation, such as a fault that only its node has, reaches the others,
and waiting for the main process (which may tokenize for hours) runs into no collective's limit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import psutil  # type: ignore[import-untyped]
import torch
from torch.distributed import DistStoreError, PrefixStore, Store

from lora_train import exit_status
from lora_train.device import select_device
from lora_train.errors import EndedByAnother, LoraTrainError, UserError
from lora_train.gathering import gather_from_all
from lora_train.lifeline import Lifeline
from lora_train.ranks import Ranks
from lora_train.roll_call import call_roll, connect, open_store
from lora_train.watch import Watch

T = TypeVar("T")

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
            lifeline = Lifeline(store, self.rank, ranks.variables()["MASTER_ADDR"])
            self.watch = Watch(connect(ranks), self.rank, self.hosts, lifeline)

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

    def saving(self) -> AbstractContextManager[None]:
        """Mark that a checkpoint is being written, which the end of another process waits for."""
        return contextlib.nullcontext() if self.watch is None else self.watch.saving()

    def waiting(self) -> AbstractContextManager[None]:
        """Mark that this process waits for the others, which must all come here."""
        return contextlib.nullcontext() if self.watch is None else self.watch.waiting()

    def from_main(self, value: T) -> T:
        """Return what the main process gave; everywhere the same."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return what each process gave, in their order; everywhere the same."""
        return [value] if self.world_size == 1 else gather_from_all(value)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends; they end too.

        Args:
            error: what ended it.
        """
        if self.watch is None or isinstance(error, EndedByAnother):
            return
        status = error.exit_status if isinstance(error, LoraTrainError) else exit_status.FAILED
        message = getattr(error, "message", f"{type(error).__name__}: {error}")
        if isinstance(error, KeyboardInterrupt):
            status, message = exit_status.STOPPED, "stopped"
        self.watch.announce(status, message, getattr(error, "hint", None))
        if isinstance(error, LoraTrainError):
            error.message = f"rank {self.rank} on {self.hosts[self.rank]}: {message}"
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
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)  # or accelerate would look for other processes
        return Group(ranks)
    os.environ.update(ranks.variables())  # accelerate and NCCL read them
    store = open_store(ranks)
    device = "none"
    if problem is None:
        try:
            device = str(select_device(ranks.local_rank))
        except UserError as error:
            problem = error
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(torch.device(device))
    uuid = str(torch.cuda.get_device_properties(device).uuid) if is_cuda else device
    hosts = call_roll(ranks, store, uuid, problem)
    print(
        f"Initializing distributed: GLOBAL_RANK: {ranks.global_rank}, "
        f"MEMBER: {ranks.global_rank + 1}/{ranks.world_size}, {platform.node()}, {device}\n",
        end="",
        file=sys.stderr,
        flush=True,
    )
    group = Group(ranks, store, hosts)
    if ranks.num_nodes > 1:
        _name_interface(ranks.variables()["MASTER_ADDR"])
    torch.distributed.init_process_group(
        # small things between hosts go through gloo, where the GPU need not be waited for
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=PrefixStore("group", connect(ranks)),
        rank=ranks.global_rank,
        world_size=ranks.world_size,
        timeout=_COLLECTIVE,
    )
    return group


def _name_interface(main_host: str) -> None:
    """Tell gloo its network where the host's own name means the loopback, as on Debian."""
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(platform.node()).startswith("127."):
            return
        main = socket.gethostbyname(main_host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # sends nothing; on the main host itself the default route tells
            probe.connect(("10.255.255.255" if main.startswith("127.") else main, 9))
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address == own for each in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def is_consequence(error: BaseException) -> bool:
    """Whether an error is one of communication, which another process has mostly caused."""
    # gloo's errors have no class of their own
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _exit_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
