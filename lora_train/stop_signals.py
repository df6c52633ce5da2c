"""Signals that ask the run to stop: noted at once, acted on at the next step boundary."""

from __future__ import annotations

import os
import signal
from types import FrameType

# SIGTERM: scancel, preemption, the time limit. SIGINT: Ctrl-C. SIGUSR1: sbatch --signal=USR1@300.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Context in which the stop signals set `requested` instead of ending the process.

    Before `wait_for_step` there is nothing to save, and a signal raises KeyboardInterrupt at once;
    so does a second Ctrl-C later. The handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._is_waiting = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait_for_step(self) -> None:
        """From now on a signal waits for the end of the step."""
        self._is_waiting = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._is_waiting or (self.requested is signal.SIGINT and number == signal.SIGINT):
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)
            at_once = " (Ctrl-C again: at once, without)" if number == signal.SIGINT else ""
            text = f"{self.requested.name}: stopping after this step, with a checkpoint{at_once}\n"
            # not through logging: the signal may have come while it was writing
            os.write(2, text.encode())
