"""How a run ended, in a line, and how it goes on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from lora_train.report.records import Record
from lora_train.requeue import TIME_LIMIT

_REASONS = {
    TIME_LIMIT: "in time before the end of its job",
    "SIGINT": "by Ctrl-C",
    "SIGTERM": "by SIGTERM (scancel, preemption or the time limit)",
    "SIGUSR1": "by SIGUSR1",
    "SIGHUP": "by SIGHUP (its terminal was closed)",
    "interrupted": "by Ctrl-C, twice: at once and without a checkpoint",
}
_GOES_ON = "The same command goes on from the newest complete checkpoint:"


@dataclass(frozen=True)
class State:
    """How far a run is."""

    kind: Literal["complete", "running", "stopped", "failed", "lost"]
    title: str
    text: str = ""
    hint: str | None = None
    command: str | None = None
    """What to give again."""


def find_state(record: Record) -> State:
    """Tell how a run ended, or that it still runs.

    Args:
        record: of the run.

    Returns:
        Its state.
    """
    done, total = record.num_steps, record.max_steps
    count = f"{done} of {total} steps" if total else f"{done} steps"
    told = record.environment.get("command")
    command = shlex.join(map(str, told)) if isinstance(told, list) else None
    end = record.starts[-1].last if record.starts else None
    reason = end.facts.get("reason") if end is not None else None
    if end is None and record.restarts and not record.starts:  # of an earlier lora-train
        reason = record.restarts[-1].get("reason")
    if record.summary is not None or reason == "complete":
        steps = (record.summary or {}).get("steps", done)
        failure = end.facts.get("message") if end is not None else None
        text = f"A later start failed: {failure}" if failure else ""
        return State("complete", f"Complete: {steps} steps", text)
    if end is not None and reason == "failed":
        return State(
            "failed",
            f"Failed after {count}",
            str(end.facts.get("message") or "no message was recorded"),
            hint=end.facts.get("hint"),
            command=command,
        )
    if record.is_locked:
        return State("running", f"Running: {count} so far")
    if reason is not None and reason != "failed or killed":
        how = _REASONS.get(str(reason), f"({reason})")
        queued = record.restarts and record.restarts[-1].get("requeued")
        text = "Its job was queued again, and goes on by itself." if queued else _GOES_ON
        return State(
            "stopped", f"Stopped {how}: {count} done", text, command=None if queued else command
        )
    return State(
        "lost",
        f"No end was recorded: {count} done",
        "It was killed without a word (out of host memory, the time limit, a lost node), or still "
        f"runs on another node. {_GOES_ON}",
        command=command,
    )
