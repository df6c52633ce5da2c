"""Numbers as people read them, with their units; `-` for what is not known."""

from __future__ import annotations

import math

UNKNOWN = "-"


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def fixed(value: float | None, places: int, unit: str = "") -> str:
    """Return a number with so many places, thousands apart, such as 12,345.6 tok/s."""
    if value is None or not _is_known(value):
        return UNKNOWN
    return f"{value:,.{places}f}{' ' if unit else ''}{unit}"


def percent(value: float | None, places: int = 1) -> str:
    """Return a share as percent: 0.412 is 41.2 %."""
    return fixed(None if value is None else 100 * value, places, "%")


def loss(value: float | None) -> str:
    """Return a loss, in nats."""
    return fixed(value, 4)


def rate(value: float | None) -> str:
    """Return tokens a second: whole ones where there are many."""
    if value is None or not _is_known(value):
        return UNKNOWN
    return fixed(value, 0 if value >= 100 else 1, "tok/s")


def small(value: float | None) -> str:
    """Return a learning rate or a norm, in three digits."""
    if value is None or not _is_known(value):
        return UNKNOWN
    return f"{value:.3g}"


def gibibytes(value: float | None) -> str:
    """Return bytes as Slurm writes them: 256G is 256 * 2^30."""
    if value is None or not _is_known(value):
        return UNKNOWN
    gib = value / 2**30
    return f"{gib:.0f}G" if gib >= 9.95 else f"{gib:.1f}G"


def duration(seconds: float | None) -> str:
    """Return a time in up to two units: 28 ms, 9.4 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds is None or not _is_known(seconds):
        return UNKNOWN
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
