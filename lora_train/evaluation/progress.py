"""How far an evaluation is: a live line on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_train.progress import format_seconds

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Countdown:
    """Reports the share of a piece of work that is done, with the time that is left.

    Args:
        console: where a live line goes, if it is a terminal.
        what: the work, such as `answers`.
        total: its units.
        done: units that an earlier call did.
    """

    def __init__(self, console: Console, what: str, *, total: int, done: int) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._begun = self._last_line = time.monotonic()
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self._task = self._live.add_task(what, total=total, completed=done)

    def __enter__(self) -> Countdown:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, units: int) -> None:
        """Report that so many more units are done."""
        self._done += units
        if self._live is not None:
            self._live.advance(self._task, units)
            return
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last_line = now
        each = (now - self._begun) / max(1, self._done - self._before)
        left = format_seconds((self._total - self._done) * each)
        logger.info("%s: %d of %d, ETA %s", self._what, self._done, self._total, left)
