"""Medians, percentiles and bootstrap intervals: facts about them, and how often an interval holds the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.bench import statistics
from qwen3fast.bench.statistics import estimate, ratio

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8)


def test_estimate_of_known_values():
    e = estimate([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (e.median, e.p10, e.p90, e.n) == (3.0, 1.4, 4.6, 5)
    assert e.low is not None and e.high is not None and 1 <= e.low < 3 < e.high <= 5


def test_estimate_of_an_even_number_of_values_takes_the_middle():
    assert estimate([1.0, 2.0, 4.0, 100.0]).median == 3.0


def test_estimate_of_one_value_has_no_interval():
    e = estimate([7.0])
    assert (e.median, e.p10, e.p90, e.low, e.high, e.n, e.spread) == (7.0, 7.0, 7.0, None, None, 1, 0.0)


def test_estimate_of_equal_values_is_sure():
    e = estimate([2.0] * 4)
    assert (e.low, e.high, e.spread) == (2.0, 2.0, 0.0)


def test_estimate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="an estimate needs at least one value"):
        estimate([])


def test_estimate_spread_is_half_the_interval_over_the_median():
    e = estimate([1.0, 2.0, 3.0])
    assert e.spread == pytest.approx((e.high - e.low) / 2 / 2.0)
    assert estimate([-1.0, 0.0, 1.0]).spread == 0.0


@given(POSITIVE)
def test_estimate_repeats_and_is_in_order(values):
    e = estimate(values)
    statistics._estimate.cache_clear()
    statistics._places.cache_clear()
    assert e == estimate(values)
    assert min(values) <= e.low <= e.high <= max(values)
    assert e.p10 <= e.median <= e.p90


@given(POSITIVE, st.integers(-8, 8))
def test_estimate_scales_with_its_values(values, power):
    factor = 2.0**power
    e, scaled = estimate(values), estimate([v * factor for v in values])
    assert (scaled.median, scaled.low, scaled.high) == pytest.approx(
        (e.median * factor, e.low * factor, e.high * factor)
    )


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.66, 0.84), (20, 0.9, 0.99)])
def test_estimate_interval_holds_the_true_median_this_often(n, least, most):
    # Of three values no interval within them can hold it more often than 3 times in 4: each side is missed 1 in 8.
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.exponential(size=n)) for _ in range(300)]
    held = np.mean([e.low <= np.log(2) <= e.high for e in intervals])
    assert least <= held <= most


def test_estimate_interval_takes_little_notice_of_one_outlier():
    values = [1.0 + 0.01 * i for i in range(11)]
    calm, wild = estimate(values), estimate([*values[:-1], 1000.0])
    assert (wild.median, wild.low) == (calm.median, calm.low)
    assert wild.high == pytest.approx(calm.high, rel=0.03)


def test_ratio_of_known_values():
    e = ratio([4.0, 4.0, 4.0], [2.0, 2.0])
    assert (e.median, e.low, e.high, e.n) == (2.0, 2.0, 2.0, 2)


def test_ratio_interval_of_three_against_three_is_that_of_the_extremes():
    e = ratio([10.0, 11.0, 12.0], [5.0, 5.5, 6.0])
    assert e.median == 2.0
    assert (e.low, e.high) == pytest.approx((10 / 6, 12 / 5))


def test_ratio_resamples_both_sides_apart():
    # The same values on both sides still leave the ratio unsure.
    e = ratio([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert e.median == 1.0 and e.low < 0.6 and e.high > 1.6


def test_ratio_of_one_value_has_no_interval():
    e = ratio([3.0], [1.0, 1.0, 1.0])
    assert (e.median, e.low, e.high, e.n) == (3.0, None, None, 1)


@pytest.mark.parametrize(("new", "old"), [([], [1.0]), ([1.0], []), ([0.0], [1.0]), ([1.0], [2.0, -1.0])])
def test_ratio_refuses_what_is_not_positive(new, old):
    with pytest.raises(ValueError, match="a ratio needs positive values on both sides"):
        ratio(new, old)


def test_ratio_interval_holds_the_true_ratio_this_often():
    rng = np.random.default_rng(1)
    intervals = [ratio(rng.normal(20, 2, 15), rng.normal(10, 1, 15)) for _ in range(200)]
    assert 0.9 <= np.mean([e.low <= 2 <= e.high for e in intervals]) <= 1.0
