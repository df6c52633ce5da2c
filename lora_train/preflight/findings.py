"""What a check found: the level, what was seen, why it matters and the line that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "skipped", "ok"]

_ORDER: tuple[Level, ...] = ("error", "warning", "skipped", "ok")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    check: str
    """Name of the check."""
    level: Level
    """error: the run will fail, for certain. warning: it may, or runs worse than it could."""
    seen: str
    """What was found, with its numbers."""
    why: str = ""
    """Why it matters to this run; empty when all is well."""
    mend: str = ""
    """The line that mends it; empty when there is nothing to mend."""


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by level; findings of one level keep their order."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Tell whether a run on this machine would fail."""
    return any(finding.level == "error" for finding in findings)


def in_bytes(number: float) -> str:
    """Write a number of bytes in the unit that suits it."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"
