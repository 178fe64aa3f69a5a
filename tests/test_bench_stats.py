"""Intervals hold what they promise, and verdicts follow from them."""

from __future__ import annotations

import random
import statistics

import pytest

from fastnn.bench.stats import Ratio, interval_of_median, percentile, ratio_of, summary
from fastnn.bench.verdict import FLOOR, NEAR, NOISY_WIDTH, Verdict, judge, judge_one, unsettled


@pytest.mark.parametrize("count", [7, 14, 21, 42])
def test_interval_holds_the_median_in_95_of_100(count):
    draw = random.Random(count)
    held = 0
    for _ in range(2000):
        values = [draw.lognormvariate(0, 0.3) for _ in range(count)]  # true median 1, skewed as times are
        low, high = interval_of_median(values)
        held += low <= 1 <= high
    assert 0.94 <= held / 2000 <= 0.995


def test_interval_narrows_with_rounds():
    draw = random.Random(0)
    values = [draw.gauss(1, 0.1) for _ in range(400)]
    few, many = interval_of_median(values[:10]), interval_of_median(values)
    assert few[1] - few[0] > 2 * (many[1] - many[0])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rounds_give_their_range(count):
    values = [float(i) for i in range(count)]
    assert interval_of_median(values) == (min(values), max(values))


def test_summary_and_percentiles():
    found = summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found.median, found.p20, found.p80, found.rounds) == (3.0, 1.8, 4.2, 5)
    assert percentile([7.0], 0.2) == 7.0


def test_ratio_is_taken_round_by_round():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]  # a machine that slows down by 2 each round
    found = ratio_of([3 * d for d in drift], [2 * d for d in drift])
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)
    retired = ratio_of([3.0, 3.0, 3.0], [2.0] * 20)
    assert retired.value == 1.5
    assert found.value == statistics.median([1.5])


def exactly(value: float) -> Ratio:
    return Ratio(value, value * 0.995, value * 1.005)


@pytest.mark.parametrize(
    ("ratio", "bar", "verdict"),
    [
        (exactly(0.90), None, Verdict.BEHIND),
        (exactly(0.99), None, Verdict.LEVEL),
        (exactly(3.00), None, Verdict.LEVEL),
        (exactly(0.90), 1.2, Verdict.BEHIND),
        (exactly(1.00), 1.2, Verdict.MISSED),
        (exactly(1.10), 1.2, Verdict.NEAR),
        (exactly(1.20), 1.2, Verdict.REACHED),
        (Ratio(0.96, 0.94, 0.98), None, Verdict.LEVEL),  # the floor is not certainly missed
        (Ratio(0.96, 0.94, 0.965), None, Verdict.BEHIND),
        (Ratio(1.5, 1.2, 1.9), 1.0, Verdict.REACHED),  # wide, and the same wherever the truth lies
        (Ratio(1.5, 0.9, 1.9), 1.0, Verdict.NOISY),
        (Ratio(0.9, 0.7, 1.1), None, Verdict.NOISY),
    ],
)
def test_verdict_of_one_comparison(ratio, bar, verdict):
    assert judge_one(ratio, bar) is verdict


def test_thresholds_are_what_they_are_called():
    bar = 2.0
    assert judge_one(exactly(NEAR * bar * 1.001), bar) is Verdict.NEAR
    assert judge_one(exactly(NEAR * bar * 0.99), bar) is Verdict.MISSED
    below = NEAR * bar * 0.99
    assert judge_one(Ratio(below, below * 0.99, NEAR * bar), bar) is Verdict.NEAR
    assert judge_one(Ratio(below, below * 0.99, below * 1.005), bar) is Verdict.MISSED
    assert judge_one(Ratio(FLOOR, FLOOR - 0.02, FLOOR), None) is Verdict.LEVEL
    assert judge_one(Ratio(FLOOR - 0.01, FLOOR - 0.02, FLOOR - 0.001), None) is Verdict.BEHIND
    wide = Ratio(1.0, 1.0 - NOISY_WIDTH, 1.0 + NOISY_WIDTH)
    assert judge_one(wide, None) is Verdict.NOISY


def test_a_row_is_as_good_as_its_worst_comparison():
    reached, near, level, behind = (exactly(1.5), 1.2), (exactly(1.1), 1.2), (exactly(1.0), None), (exactly(0.8), None)
    noisy = (Ratio(1.0, 0.7, 1.4), 1.2)
    assert judge([reached]) is Verdict.REACHED
    assert judge([reached, near]) is Verdict.NEAR
    assert judge([reached, level]) is Verdict.REACHED  # nothing is asked of the second but the floor
    assert judge([reached, behind]) is Verdict.BEHIND
    assert judge([reached, noisy]) is Verdict.NOISY
    assert judge([behind, noisy]) is Verdict.BEHIND
    assert judge([level]) is Verdict.LEVEL


def test_rows_are_unsettled_while_an_interval_holds_a_threshold():
    assert not unsettled([(exactly(1.5), 1.2)])
    assert unsettled([(exactly(1.2), 1.2)])
    assert unsettled([(Ratio(1.0, 0.95, 1.05), None)])
    assert unsettled([(exactly(1.5), 1.2), (exactly(1.02), 1.2)])
