"""Curves made smooth and short enough to draw: averages, the points that show, bins of time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_MOST_POINTS = 400
_WIDEST_MEAN = 101


class Binned(NamedTuple):
    """What lies in each bin; each (num_bins,), and NaN in a gap."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Average each value with those around it; NaN counts for nothing.

    Args:
        values: (num_points,).

    Returns:
        (num_points,), and over how many values it goes; 1: too few to smooth.
    """
    width = 2 * (len(values) // 40) + 1 if len(values) >= 80 else 3 if len(values) >= 8 else 1
    if width == 1:
        return values, 1
    width = min(width, _WIDEST_MEAN)
    known = np.isfinite(values)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(float), kernel, mode="same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan), width


def thin_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and the highest point of each stretch, which is what an eye would see.

    Args:
        x: (num_points,).
        y: (num_points,); NaN points go.

    Returns:
        At most `_MOST_POINTS` points, in order.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        kept += sorted({part[np.argmin(y[part])], part[np.argmax(y[part])]})
    return x[kept], y[kept]


def in_bins(x: np.ndarray, y: np.ndarray) -> Binned:
    """Sum points up in bins of equal width, so that a gap between them stays one.

    Args:
        x: (num_points,), in order.
        y: (num_points,); NaN points count for nothing.

    Returns:
        The bins with points in them, and those of gaps.
    """
    num_bins = min(_MOST_POINTS // 2, max(1, len(np.unique(x))))
    edges = np.linspace(x[0], x[-1], num_bins + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, num_bins - 1)
    known = np.isfinite(y)
    centre, mean, low, high = (np.full(num_bins, np.nan) for _ in range(4))
    for each in np.unique(place[known]):
        chosen = (place == each) & known
        centre[each] = x[chosen].mean()
        mean[each], low[each], high[each] = y[chosen].mean(), y[chosen].min(), y[chosen].max()
    kept = np.isfinite(mean)
    # one empty bin comes of the sampling, several are a gap: a point of NaN breaks the line
    gaps = ~kept & ~np.roll(kept, 1) & ~np.roll(kept, -1)
    centre[gaps] = ((edges[1:] + edges[:-1]) / 2)[gaps]
    shown = kept | gaps
    return Binned(centre[shown], mean[shown], low[shown], high[shown])
