"""Intervals and tests of differences."""

import math

import numpy as np
import pytest

from lora_train.evaluation.intervals import mcnemar, mean_interval, share_interval


def test_the_interval_of_a_share_is_about_that_of_the_normal_distribution():
    values = np.repeat([1.0, 0.0], [120, 280])
    low, high = mean_interval(values, np.ones(400))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)
    assert (low, high) == mean_interval(values, np.ones(400))


def test_weights_are_those_of_the_mean():
    # one long row with a low loss: most draws of the mean lie near it
    sums, weights = np.array([100.0, 30.0, 30.0]), np.array([1000.0, 10.0, 10.0])
    low, high = mean_interval(sums, weights)
    assert low == pytest.approx(0.1) and high == pytest.approx(3.0)


def test_what_is_hard_for_both_cancels():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)
    better, worse = hard + 1.0 + 0.01 * rng.normal(size=300), hard
    low, high = mean_interval(better - worse, np.ones(300))
    assert 0.99 < low < 1.0 < high < 1.01
    alone = mean_interval(better, np.ones(300))
    assert alone[1] - alone[0] > 20 * (high - low)


def test_rows_that_are_alike_tell_no_interval():
    assert mean_interval(np.zeros(8), np.ones(8)) is None
    assert mean_interval(np.array([2.0, 4.0]), np.array([1.0, 2.0])) is None


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # from Wilson's formula with z = 1.96
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilsons_interval(right, count, low, high):
    values = np.repeat([1.0, 0.0], [right, count - right])
    assert share_interval(values) == pytest.approx((low, high), abs=1e-4)


def test_one_row_tells_no_interval():
    assert mean_interval(np.ones(1), np.ones(1)) is None


def test_many_rows_are_drawn_in_parts():
    rng = np.random.default_rng(0)
    values = rng.random(3000)
    low, high = mean_interval(values, np.ones(3000))
    half = 1.96 * values.std() / math.sqrt(3000)
    assert high - low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (4, 4, 1.0),
        (5, 0, 2 / 32),
        # 2 * (1 + 12 + 66) / 2**12
        (10, 2, 158 / 4096),
        (2, 10, 158 / 4096),
    ],
)
def test_mcnemar(gained, lost, p_value):
    assert mcnemar(gained, lost) == pytest.approx(p_value)


def test_mcnemar_of_many_rows():
    # by the normal distribution, with the correction for whole numbers
    z = (abs(2600 - 2400) - 1) / math.sqrt(5000)
    assert mcnemar(2600, 2400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
