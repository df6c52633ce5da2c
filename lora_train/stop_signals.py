"""Signals that ask the run to stop: noted at once, acted on at the next step boundary."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# SIGTERM: scancel, preemption, the time limit. SIGINT: Ctrl-C. SIGUSR1: sbatch --signal=USR1@300.
# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# one Ctrl-C may come twice, from Slurm and from the process that started this one
_SAME_SECONDS = 1.0


def signals_to_catch() -> list[signal.Signals]:
    """Return the stop signals, less a hang-up that is to be ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or not is_ignored]


class StopSignals:
    """Context in which the stop signals set `requested` instead of ending the process.

    Before `wait_for_step` there is nothing to save, and a signal raises KeyboardInterrupt at once;
    so does a second Ctrl-C later. The handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._is_waiting = False
        self._noted = 0.0
        # asked now: one that was closed is none any more
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in signals_to_catch():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait_for_step(self) -> None:
        """From now on a signal waits for the end of the step."""
        self._is_waiting = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        is_again = self.requested is signal.SIGINT and number == signal.SIGINT
        if not self._is_waiting or (is_again and time.monotonic() - self._noted > _SAME_SECONDS):
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested, self._noted = signal.Signals(number), time.monotonic()
            at_once = " (Ctrl-C again: at once, without)" if number == signal.SIGINT else ""
            text = f"{self.requested.name}: stopping after this step, with a checkpoint{at_once}\n"
            # not through logging: the signal may have come while it was writing
            os.write(2, text.encode())

    def _leave_terminal(self) -> None:
        """Write to nowhere from now on: each line to a closed terminal would be an error."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in self._terminals:
            os.dup2(nowhere, stream)
