"""How sure a mean over rows is, and the difference of two models on the same rows.

95 % intervals by the bootstrap: rows are drawn again with replacement, and the figure computed
anew. Of two models the differences row by row are drawn, so what is hard for both cancels. The
draws are seeded: the same rows give the same interval. Shares of right answers get Wilson's
interval, which does not shrink to a point where all are right, or none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_NUM_DRAWS = 2000
_SEED = 1234
_PERCENTILES = (2.5, 97.5)
_Z = 1.959964
# rows drawn at once, over all draws: 32 MB of indexes
_AT_ONCE = 4_000_000


def mean_interval(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of a weighted mean; of a difference, where sums are differences.

    Args:
        sums: each row's value times its weight, (rows,) float.
        weights: each row's weight, such as its tokens, (rows,) float, above 0.

    Returns:
        Its ends; None where rows say nothing of how far others lie: fewer than two, or all alike.
    """
    if len(sums) < 2 or np.ptp(sums / weights) == 0:
        return None
    drawn = [sums[rows].sum(axis=1) / weights[rows].sum(axis=1) for rows in _draws(len(sums))]
    low, high = np.percentile(np.concatenate(drawn), _PERCENTILES)
    return float(low), float(high)


def share_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return Wilson's 95 % interval of a share.

    Args:
        values: 1 for each row that counts, 0 for the others, (rows,) float.

    Returns:
        Its ends, 0 to 1; None for fewer than two rows.
    """
    count = len(values)
    if count < 2:
        return None
    share, per_row = float(values.mean()), _Z**2 / count
    middle = share + per_row / 2
    half = math.sqrt(per_row * share * (1 - share) + (per_row / 2) ** 2)
    ends = [(middle + each) / (1 + per_row) for each in (-half, half)]
    return max(0.0, ends[0]), min(1.0, ends[1])


def _draws(num_rows: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(_SEED)
    at_once = max(1, _AT_ONCE // num_rows)
    for start in range(0, _NUM_DRAWS, at_once):
        count = min(at_once, _NUM_DRAWS - start)
        yield generator.integers(0, num_rows, size=(count, num_rows))


def mcnemar(gained: int, lost: int) -> float:
    """Return the p-value of McNemar's exact test.

    Args:
        gained: rows that only the first model has right.
        lost: rows that only the second has right.

    Returns:
        The probability of a split at least as uneven were both equally good, 0 to 1.
    """
    total = gained + lost
    tail = 0
    ways = 1  # total over k, built up
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (total - k) // (k + 1)
    if tail == 0:
        return 1.0
    # integers of many digits: the quotient of their logarithms does not overflow
    return min(1.0, 2 * math.exp(math.log(tail) - total * math.log(2)))
