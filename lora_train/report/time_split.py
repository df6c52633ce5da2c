"""Where the time of a run went, over all its starts: goodput and what it is lost to."""

from __future__ import annotations

from dataclasses import dataclass

from lora_train.report.records import Record, Start

# kind -> what readers call it, in the order of tables and bars
NAMES = {
    "steps": "training steps that count",
    "lost": "steps lost and done again",
    "loading": "loading and preparing",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "answers": "answers",
    "waiting": "waiting between starts (queue)",
    "other": "other",
}


@dataclass(frozen=True)
class TimeSplit:
    """The wall time of a run from its first start to its end, in seconds.

    Between a complete run and a start that has it do more steps it stands still.
    """

    seconds: dict[str, float]
    """By the kinds of `NAMES`; they add up to `wall_seconds`."""
    wall_seconds: float
    up_seconds: float
    """Of it, when the run was up: not waiting between starts."""
    num_lost_steps: int

    @property
    def goodput(self) -> float:
        """Share of the wall time that went into steps that count."""
        return self.seconds["steps"] / self.wall_seconds if self.wall_seconds else 0.0


def split_time(record: Record) -> TimeSplit | None:
    """Split the wall time of a run.

    Args:
        record: of the run.

    Returns:
        The split; None when nothing recorded its time (an earlier lora-train).
    """
    starts = record.starts
    if not starts:
        return None
    seconds = dict.fromkeys(NAMES, 0.0)
    num_lost = 0
    for place, start in enumerate(starts):
        later = [other.first.step for other in starts[place + 1 :]]
        kept = min(later, default=None)
        counted = lost = 0.0
        for span in start.spans:
            if span.kind != "steps":
                seconds[span.kind] += span.seconds
                continue
            num_steps = max(1, int(span.facts.get("num_steps") or 1))
            undone = 0 if kept is None else min(num_steps, max(0, span.step - kept))
            num_lost += undone
            lost += span.seconds * undone / num_steps
            counted += span.seconds * (1 - undone / num_steps)
        seconds["steps"] += counted
        seconds["lost"] += lost
        seconds["loading"] += start.first.seconds
        known = start.first.seconds + sum(span.seconds for span in start.spans)
        seconds["other"] += max(0.0, start.seconds - known)
        # what was asked of it was done: who lets it do more later has not waited for it
        is_complete = start.last is not None and start.last.facts.get("reason") == "complete"
        if place + 1 < len(starts) and not is_complete:
            seconds["waiting"] += max(0.0, starts[place + 1].first.begin - start.end)
    wall = sum(seconds.values())
    return TimeSplit(seconds, wall, wall - seconds["waiting"], num_lost)


def busy_intervals(starts: list[Start], kind: str) -> list[tuple[float, float]]:
    """Return when something of a kind was going on.

    Args:
        starts: of the run.
        kind: of the pieces of time.

    Returns:
        (begin, end) in seconds since 1970, in their order.
    """
    spans = [span for start in starts for span in start.spans if span.kind == kind]
    return [(span.begin, span.end) for span in spans]
