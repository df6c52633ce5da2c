"""What a run directory holds, read as it is: cut off, half there, of a run that goes on.

What cannot be read is left out and told; nothing here raises for it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

from lora_train import timeline
from lora_train.recorded_run import RecordedRun, read_run

_KINDS = ("start", "steps", "validation", "checkpoint", "answers", "end")


@dataclass(frozen=True)
class Span:
    """A piece of the run's time, in seconds since 1970."""

    kind: str
    begin: float
    end: float
    step: int
    """Steps done at its end."""
    facts: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(0.0, self.end - self.begin)


@dataclass(frozen=True)
class Start:
    """One start of the run: its pieces of time, and how it ended where it could still say so."""

    first: Span
    spans: list[Span]
    last: Span | None
    environment: dict[str, Any] = field(default_factory=dict)
    """What environment.json tells of it; of the one before where it failed too early for that."""

    @property
    def came_to_train(self) -> bool:
        """Whether all was loaded."""
        return "num_processes" in self.first.facts

    @property
    def end(self) -> float:
        """When it ended, or when it was last heard of; seconds since 1970."""
        return max([self.first.end, *(span.end for span in self.spans)] + self._ends())

    def _ends(self) -> list[float]:
        return [] if self.last is None else [self.last.end]

    @property
    def seconds(self) -> float:
        """How long it was up."""
        return self.end - self.first.begin


@dataclass(frozen=True)
class Record:
    """All that a run directory tells."""

    run: RecordedRun
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl with a loss, one a step."""
    validations: list[dict[str, Any]]
    starts: list[Start]
    num_unreadable: int
    """Lines of metrics.jsonl and timeline.jsonl that are no whole rows."""
    is_locked: bool
    """Whether a process on this node has the run directory in use."""
    environments: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None

    @property
    def environment(self) -> dict[str, Any]:
        """What environment.json tells of the newest start in it; empty when it tells nothing."""
        return self.environments[-1] if self.environments else {}

    @property
    def trained(self) -> Start | None:
        """The newest start that came to train."""
        return next((start for start in reversed(self.starts) if start.came_to_train), None)

    @property
    def num_steps(self) -> int:
        """Steps done, as far as anything tells."""
        known = [int(row["step"]) for row in self.steps + self.validations]
        if self.starts:
            latest = self.starts[-1]
            known += [span.step for span in (latest.first, *latest.spans)]
        return max(known, default=0)

    @property
    def max_steps(self) -> int | None:
        """Steps of the whole run."""
        told = self.trained.first.facts.get("max_steps") if self.trained else None
        return told if isinstance(told, int) else self.run.config.trainer.max_steps

    @property
    def is_on_cpu(self) -> bool:
        """Whether the newest start computed on a CPU; False when nothing tells."""
        return str(self.environment.get("device")).startswith("CPU")

    @property
    def num_gpus(self) -> int | None:
        """GPUs that the newest start computed on. None: on a CPU, or nothing tells."""
        return len(gpus_of(self.environment)) or None

    @functools.cached_property
    def timezone(self) -> tzinfo:
        """Of the machine that the run was on; that of this one when nothing tells."""
        with contextlib.suppress(LookupError, TypeError, ValueError):
            return _parse_time(self.environment["started"]).tzinfo or UTC
        return datetime.now().astimezone().tzinfo or UTC

    def local_time(self, seconds: float) -> str:
        """A time as the run's machine shows it, such as 2026-11-26 12:13."""
        return datetime.fromtimestamp(seconds, self.timezone).strftime("%Y-%m-%d %H:%M")


def read_record(folder: Path) -> Record:
    """Read a run directory for its report.

    Args:
        folder: the run directory.

    Returns:
        What it tells.

    Raises:
        UserError: it is none, see `read_run`.
    """
    run = read_run(folder)
    metrics, bad_metrics = read_rows(folder / "metrics.jsonl")
    lines, bad_lines = read_rows(folder / timeline.FILE)
    rows = {"loss": {}, "val_loss": {}}  # type: dict[str, dict[int, dict[str, Any]]]
    for row in metrics:
        for kind, found in rows.items():
            # a step twice: the later one counts
            if kind in row and isinstance(row.get("step"), int):
                found[row["step"]] = row
    environments, restarts = (
        _dicts(run.read_json(name)) for name in ("environment.json", "restarts.json")
    )
    summary = run.read_json("summary.json")
    return Record(
        run=run,
        steps=[row for _, row in sorted(rows["loss"].items())],
        validations=[row for _, row in sorted(rows["val_loss"].items())],
        starts=_starts([span for span in map(_span, lines) if span is not None], environments),
        num_unreadable=bad_metrics + bad_lines,
        is_locked=_is_locked(folder / ".lock"),
        environments=environments,
        restarts=restarts,
        summary=summary if isinstance(summary, dict) else None,
    )


def read_rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON objects, one a line.

    Args:
        file: it need not be there.

    Returns:
        The objects, and the number of lines that are none.
    """
    rows, bad = [], 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def number(row: dict[str, Any], key: str) -> float:
    """A number of a row; NaN when it has none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _span(line: dict[str, Any]) -> Span | None:
    begin, end, step = (number(line, key) for key in ("begin", "end", "step"))
    if line.get("kind") not in _KINDS or not all(map(math.isfinite, (begin, end, step))):
        return None
    return Span(line["kind"], begin, end, int(step), line)


def gpus_of(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The GPUs that a start computed on: name, memory_bytes, host; one a process, none on a CPU."""
    return [each for each in _dicts(environment.get("devices")) if "capability" in each]


def variables_of(environment: dict[str, Any]) -> dict[str, str]:
    """The recorded variables of a start."""
    found = environment.get("variables")
    return found if isinstance(found, dict) else {}


def _starts(spans: list[Span], environments: list[dict[str, Any]]) -> list[Start]:
    """Sort the pieces of time under the starts that they belong to."""
    starts: list[Start] = []
    for span in spans:
        if span.kind == "start":
            starts.append(Start(span, [], None, _environment_of(span, environments)))
        elif starts and span.kind == "end":
            starts[-1] = replace(starts[-1], last=span)
        elif starts:
            starts[-1].spans.append(span)
    return starts


def _environment_of(first: Span, environments: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest entry that was there when a start had loaded all."""
    known = environments[:1]
    for environment in environments:
        with contextlib.suppress(LookupError, TypeError, ValueError):
            # they tell whole seconds
            if _parse_time(environment["started"]).timestamp() <= first.end + 1:
                known.append(environment)
    return known[-1] if known else {}


def _parse_time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")


def _is_locked(file: Path) -> bool:
    """Ask the kernel; to try the lock would refuse a run that starts in this very moment."""
    try:
        inode = file.stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return re.search(rf"FLOCK .*:{inode} ", locks) is not None


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
