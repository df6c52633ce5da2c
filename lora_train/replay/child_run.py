"""A run in a process of its own, for commands that start runs and look at what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lora_train import exit_status
from lora_train.launcher import end_with_parent
from lora_train.stop_signals import signals_to_catch

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class ChildEnd:
    """How the run ended."""

    status: int
    """Its exit status; 1 where it was killed."""
    was_ended: bool
    """Whether `should_end` said so, and the child was sent SIGTERM."""
    signal: signal.Signals | None
    """The stop signal that this process got meanwhile, and passed on."""


def run_child(
    words: Sequence[str],
    *,
    should_end: Callable[[], bool] = lambda: False,
    log_file: Path | None = None,
) -> ChildEnd:
    """Run `lora-train` with these words, pass stop signals on, and wait.

    Under srun or torchrun the child is the rank that this process stands for: the variables that
    say so are inherited.

    Args:
        words: the command line, without the program's name.
        should_end: asked many times a second; once it is true the child gets SIGTERM.
        log_file: gets the child's output; None: this process's stdout and stderr.

    Returns:
        How it ended.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    before = {each: signal.signal(each, forward) for each in signals_to_catch()}
    output = None if log_file is None else log_file.open("ab")
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_train", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            # as in launcher.py: Ctrl-C would come twice, and a killed parent could not pass it on
            process_group=0,
            preexec_fn=end_with_parent,
        )
        for number in received:  # came while it was being started
            child.send_signal(number)
        was_ended = False
        while child.poll() is None:
            if not was_ended and should_end():
                child.send_signal(signal.SIGTERM)
                was_ended = True
            time.sleep(_POLL_SECONDS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if output is not None:
            output.close()
    status = child.returncode
    if status < 0:
        killer = signal.Signals(-status)
        memory = "; often for memory: #SBATCH --mem" if killer is signal.SIGKILL else ""
        print(f"error: the run was killed by {killer.name}{memory}", file=sys.stderr, flush=True)
        status = exit_status.FAILED
    first = signal.Signals(received[0]) if received else None
    return ChildEnd(status, was_ended, first)


class StepCounter:
    """Tells how far a run has come, from its metrics.jsonl, of which only what is new is read.

    Args:
        file: metrics.jsonl; need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read = 0
        self._step = 0

    def step(self) -> int:
        """Return the newest step in the file; 0: none yet."""
        try:
            if os.stat(self._file).st_size > self._read:
                with self._file.open("rb") as stream:
                    stream.seek(self._read)
                    self._count(stream.read())
        except FileNotFoundError:
            pass
        return self._step

    def _count(self, grown: bytes) -> None:
        lines, _, _ = grown.rpartition(b"\n")  # the rest is being written
        for line in filter(None, lines.split(b"\n")):
            self._read += len(line) + 1
            row = json.loads(line)
            if "loss" in row:
                self._step = row["step"]
