"""What a person sees of a run: one live line on a terminal, plain lines in a job's log file."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

# a job's log file: often enough to follow with tail -f, seldom enough for a week's run
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Reports steps and validations on stderr.

    Args:
        console: where to; a live line if it is a terminal.
        first_step: steps done before (of an earlier part of the run).
        max_steps: steps of the whole run.
        quiet: report nothing (all processes but the main one).
    """

    def __init__(
        self, console: Console, *, first_step: int, max_steps: int, quiet: bool = False
    ) -> None:
        self._console = console
        self._first_step = first_step
        self._max_steps = max_steps
        self._quiet = quiet
        self._val_loss: float | None = None
        self._last_line = float("-inf")
        self._steady_seconds: list[float] = []
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._quiet:
            self._live = RichProgress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
            )
            self._live.start()
            self._task = self._live.add_task(
                "compiling and warming up", total=self._max_steps, completed=self._first_step
            )
            self._live.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Report one optimizer step.

        Args:
            step: steps done.
            values: loss, learning_rate, grad_norm, tokens_per_second, step_time_seconds.
        """
        if self._quiet:
            return
        self._steady_seconds = [*self._steady_seconds[-19:], values["step_time_seconds"]]
        text = self._text(step, values)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, description=text)
            self._live.refresh()
        now = time.perf_counter()
        ends = (self._first_step + 1, self._max_steps)
        if step in ends or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            # a terminal has the live line; train.log gets these all the same
            level = logging.INFO if self._live is None else logging.DEBUG
            log.log(level, "step %d/%d  %s", step, self._max_steps, text)

    def validated(self, step: int, val_loss: float) -> None:
        """Report a validation."""
        if self._quiet:
            return
        before = "" if self._val_loss is None else f" (before {self._val_loss:.4f})"
        self._val_loss = val_loss
        log.info("step %d: validation loss %.4f%s", step, val_loss, before)

    def _text(self, step: int, values: dict[str, Any]) -> str:
        # the median of the last steps: one slow step (a save, a busy node) does not swing the
        # estimate
        typical = sorted(self._steady_seconds)[len(self._steady_seconds) // 2]
        left = (self._max_steps - step) * typical
        return (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tok/s  "
            f"ETA {format_seconds(left)}"
        )


def format_seconds(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
