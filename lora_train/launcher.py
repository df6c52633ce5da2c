"""Starts the processes of a run on this node, one for each device, and stays until all have ended.

Not torchrun's: that one ends a process that is told to stop with SIGKILL after 30 s, in the middle
of a checkpoint, and turns every exit status into 1.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from lora_train import exit_status
from lora_train.ranks import Ranks
from lora_train.stop_signals import signals_to_catch

# how long the others get after the first that failed: they end by themselves when they have seen it
# (watch.py), a main process in the middle of a checkpoint later
_SECONDS_TO_END = 60.0
_SECONDS_TO_KILL = 5.0
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1
# loaded here: between fork and exec nothing may be
_LIBC = ctypes.CDLL(None)


def launch(ranks: Ranks, words: Sequence[str]) -> int:
    """Start the processes, forward signals to them, and wait.

    Args:
        ranks: what is started here.
        words: the command line, without the program's name.

    Returns:
        0 when all ended with 0; else the exit status of the first that did not, 1 if it was killed.
    """
    return _Launch(ranks, words).wait()


class _Launch:
    def __init__(self, ranks: Ranks, words: Sequence[str]) -> None:
        self._ranks = ranks
        self._children: list[subprocess.Popen[bytes]] = []
        self._signal: int | None = None
        for stop_signal in signals_to_catch():
            signal.signal(stop_signal, self._forward)
        variables = {"MASTER_PORT": str(_free_port())} if ranks.port is None else {}
        for number in range(ranks.num_to_start):
            self._children.append(
                subprocess.Popen(
                    [sys.executable, "-P", *_program(), *words],
                    env={
                        **os.environ,
                        **ranks.variables(number),
                        **variables,
                        "LORA_LAUNCHER": str(os.getpid()),
                    },
                    # a question to the terminal would stop a process in the background for good
                    stdin=subprocess.DEVNULL,
                    # a process group of its own: Ctrl-C reaches the terminal's group, so a child
                    # would get it twice
                    process_group=0,
                    preexec_fn=end_with_parent,
                )
            )
        if self._signal is not None:  # came while they were being started
            self._forward(self._signal, None)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self) -> int:
        """Wait for all; end the others when one has failed."""
        first: int | None = None
        deadline = float("inf")
        # a list: every one of them must be looked at
        while None in [child.poll() for child in self._children]:
            failed = [rank for rank, child in enumerate(self._children) if child.returncode]
            if failed and first is None:
                first = failed[0]
                self._tell(first)
                deadline = time.monotonic() + _SECONDS_TO_END
            if time.monotonic() > deadline:
                self._end_all()
                break
            time.sleep(_POLL_SECONDS)
        failed = [number for number, child in enumerate(self._children) if child.returncode]
        if not failed:
            return exit_status.OK
        if first is None:
            first = failed[0]
            self._tell(first)
        status = self._children[first].returncode
        return status if status > 0 else exit_status.FAILED

    def _tell(self, number: int) -> None:
        """Say what nobody else does: that a process was killed."""
        status = self._children[number].returncode
        if status >= 0:
            return
        killer = signal.Signals(-status)
        memory = "; often for memory: #SBATCH --mem" if killer is signal.SIGKILL else ""
        print(
            f"error: rank {self._ranks.global_rank + number} on {platform.node()} was killed by "
            f"{killer.name}{memory}\n"
            "hint: the same command goes on from the newest checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )

    def _end_all(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [child for child in self._children if child.poll() is None]
            for child in running:
                child.send_signal(number)
            deadline = time.monotonic() + _SECONDS_TO_KILL
            while time.monotonic() < deadline and None in [child.poll() for child in running]:
                time.sleep(_POLL_SECONDS)
        for child in self._children:
            child.wait()


def _program() -> list[str]:
    """What the user started, so that the summary names it; a test may have started none."""
    started = sys.argv[0]
    return [started] if started.endswith("/lora-train") else ["-m", "lora_train"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_with_parent() -> None:
    """Have the kernel stop this child when its parent is killed, as no handler could."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
