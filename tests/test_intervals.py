"""Intervals and the paired test: known answers by hand, exact coverage, and what is refused."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag import intervals
from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.intervals import (
    PairedTest,
    binomial_interval,
    binomial_upper,
    bootstrap_interval,
    bootstrap_statistic,
    finite,
    optional_module,
    paired_test,
)


def chance(k, n, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (9, 10, 0.5550, 0.9975),  # a textbook pair
        (5, 10, 0.1871, 0.8129),
        (0, 1, 0.0, 0.975),  # 1 - 0.025
        (1, 1, 0.025, 1.0),
        (0, 10, 0.0, 1 - 0.025**0.1),  # (1 - high)^10 = 0.025
        (10, 10, 0.025**0.1, 1.0),
    ],
)
def test_binomial_interval_of_known_counts(successes, n, low, high):
    assert binomial_interval(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("p", np.linspace(0.02, 0.98, 25))
def test_binomial_interval_holds_the_truth_as_often_as_it_says(p):
    held = sum(chance(k, 20, p) for k in range(21) if binomial_interval(k, 20)[0] <= p <= binomial_interval(k, 20)[1])
    assert held >= 0.95


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_the_upper_bound_leaves_just_the_doubt_below_it(counts, confidence):
    k, n = counts
    upper = binomial_upper(k, n, confidence)
    below = sum(chance(i, n, upper) for i in range(k + 1))  # the chance of so few, were the upper bound true
    assert upper == 1.0 if k == n else below == pytest.approx(1 - confidence, rel=1e-6)


def test_no_success_in_59_is_the_first_that_bounds_a_share_by_5_percent():
    assert binomial_upper(0, 59) <= 0.05 < binomial_upper(0, 58)


@pytest.mark.parametrize("function", [binomial_interval, binomial_upper])
@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (0.5, 5), (1, -1), (float("nan"), 5)])
def test_counts_that_make_no_share_are_refused(function, successes, n):
    with pytest.raises(InputError, match="a share needs whole numbers"):
        function(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
@pytest.mark.parametrize(
    "call",
    [
        lambda c: binomial_interval(1, 2, c),
        lambda c: binomial_upper(1, 2, c),
        lambda c: bootstrap_interval([0.0, 1.0], c),
        lambda c: bootstrap_statistic(np.mean, [0.0, 1.0], confidence=c),
    ],
)
def test_a_confidence_in_percent_is_refused(call, confidence):
    with pytest.raises(InputError, match=r"the confidence is between 0 and 1, as 0.95 for 95 %"):
        call(confidence)


def test_without_scipy_the_message_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtra, match=r"^scipy, which computes exact intervals, is not.*'gemma-rag\[eval\]'"):
        binomial_interval(1, 2)


def test_a_missing_module_goes_by_the_name_of_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    with pytest.raises(MissingExtra, match=r"^scikit-learn, which fits, is not installed"):
        optional_module("sklearn.isotonic", "which fits")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "the scores are empty"),
        ([[1.0]], r"have the shape \(1, 1\)"),
        (0.5, r"have the shape \(\)"),
        ([0.1, float("nan")], r"number 1 \(counted from 0\) is nan"),
        ([-float("inf")], "is -inf"),
        (["high"], "must be a list of numbers"),
        ([None, {}], "must be a list of numbers"),
    ],
)
def test_finite_says_what_is_wrong_with_numbers(values, message):
    with pytest.raises(InputError, match=message):
        finite("the scores", values)


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).random(2000)
    error = 1.96 * values.std() / math.sqrt(2000)
    low, high = bootstrap_interval(values)
    assert (low - values.mean(), high - values.mean()) == (pytest.approx(-error, rel=0.1), pytest.approx(error, rel=0.1))


@pytest.mark.parametrize("block", [10, 2000, 10**6])
def test_bootstrap_draws_as_many_resamples_whatever_the_block(monkeypatch, block):
    drawn = []
    monkeypatch.setattr(intervals, "BLOCK", block)
    monkeypatch.setattr(intervals, "_percentiles", lambda means, confidence: drawn.append(len(means)))
    bootstrap_interval(np.arange(300.0), resamples=1999)
    assert drawn == [1999]


@pytest.mark.parametrize("values", [[0.3], [0.3] * 7])
def test_bootstrap_of_equal_values_has_no_width(values):
    assert bootstrap_interval(values) == (pytest.approx(0.3), pytest.approx(0.3))


def test_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(1).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_more_confidence_makes_a_wider_bootstrap_interval():
    values = np.random.default_rng(1).random(50)
    (low, high), (lower, higher) = bootstrap_interval(values, 0.8), bootstrap_interval(values, 0.99)
    assert lower < low < values.mean() < high < higher


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval([1.0], resamples=0),
        lambda: bootstrap_statistic(np.mean, [1.0], resamples=0),
        lambda: paired_test([1.0], [1.0], resamples=0),
    ],
)
def test_no_resamples_are_refused(call):
    with pytest.raises(InputError, match="at least 1 resample, not 0"):
        call()


def test_bootstrap_of_a_mean_agrees_with_that_of_the_statistic_mean():
    values = np.random.default_rng(1).random(200)
    assert bootstrap_statistic(np.mean, values) == pytest.approx(bootstrap_interval(values), abs=0.005)


def test_bootstrap_draws_the_rows_of_all_arrays_together():
    x = np.random.default_rng(1).random(30)
    assert bootstrap_statistic(lambda a, b: float(np.abs(a - b).max()), x, x, resamples=50) == (0.0, 0.0)


def test_bootstrap_draws_again_where_the_statistic_is_not_defined():
    def needs_a_one(values):
        if not values.any():
            raise InputError("no one")
        return float(values.sum())

    low, _ = bootstrap_statistic(needs_a_one, np.array([1, 0, 0, 0]), resamples=200)
    assert low == 1.0


def test_bootstrap_gives_up_where_most_resamples_are_of_no_use():
    def only_the_original(values):
        if values.tolist() != list(range(9)):
            raise InputError("not the original")
        return 1.0

    with pytest.raises(InputError, match=r"too few labels for a bootstrap.*\(not the original\)"):
        bootstrap_statistic(only_the_original, np.arange(9), resamples=20)


def test_a_statistic_that_is_not_defined_on_the_data_itself_says_so():
    def refuses(values):
        raise InputError("needs both classes")

    with pytest.raises(InputError, match=r"^needs both classes"):
        bootstrap_statistic(refuses, [1.0])


def test_a_statistic_that_is_not_a_number_is_refused():
    with pytest.raises(InputError, match="the resampled statistics must be finite"):
        bootstrap_statistic(lambda values: float("nan"), [1.0])


@pytest.mark.parametrize("arrays", [(), ([],), ([1.0], [1.0, 2.0]), (1.0,)])
def test_arrays_that_do_not_align_are_refused(arrays):
    with pytest.raises(InputError, match="arrays of one length, not empty"):
        bootstrap_statistic(lambda *a: 0.0, *arrays)


@pytest.mark.parametrize(
    ("first", "second", "difference", "p_value"),
    [
        ([1], [0], 1.0, 1.0),  # +1 and -1 are both as large
        ([1, 1, 1, 0], [0, 0, 0, 0], 0.75, 2 / 8),  # +3 and -3 of eight
        ([1] * 6, [0] * 6, 1.0, 2 / 64),
        ([1, 1, 0], [0, 0, 1], 1 / 3, 1.0),  # every sum of three signs is at least 1
        ([0.3, 0.1], [0, 0], 0.2, 2 / 4),  # 0.4, 0.2, -0.2, -0.4
        ([0, 0], [0.3, 0.1], -0.2, 2 / 4),
        ([0.1, 0.2, 0.0], [0, 0, 0.3], 0.0, 1.0),  # in floating point the sum is not quite 0
        ([0, 0, 0, 0.1], [0.3, 0.3, 0.2, 0], -0.175, 4 / 16),  # 0.9 and 0.7, both ways, whatever the rounding of 0.7
        ([0.5, 0.5], [0.5, 0.5], 0.0, 1.0),
    ],
)
def test_paired_test_tries_all_signs_where_few_differ(first, second, difference, p_value):
    result = paired_test(first, second)
    assert (result.difference, result.p_value) == (pytest.approx(difference), p_value)


def test_paired_test_of_many_differences_agrees_with_the_exact_sign_test():
    first = np.array([1.0] * 27 + [0.0] * 13 + [1.0] * 60)
    second = np.array([0.0] * 27 + [1.0] * 13 + [1.0] * 60)
    exact = 2 * sum(chance(k, 40, 0.5) for k in range(27, 41))  # 0.0385
    assert paired_test(first, second).p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_paired_test_never_says_that_chance_is_impossible():
    result = paired_test(np.ones(500), np.zeros(500), resamples=999)
    assert result == PairedTest(1.0, 1.0, 1.0, 1 / 1000)


def test_paired_test_rejects_equal_systems_as_rarely_as_it_should():
    random = np.random.default_rng(2)
    draws = [paired_test(random.normal(size=30), random.normal(size=30), 200, seed) for seed in range(300)]
    rejected = np.mean([draw.p_value <= 0.1 for draw in draws])
    assert rejected == pytest.approx(0.1, abs=3.5 * math.sqrt(0.1 * 0.9 / 300))


def test_paired_test_interval_holds_the_difference():
    random = np.random.default_rng(2)
    first, second = random.normal(0.5, 1, 400), random.normal(0, 1, 400)
    result = paired_test(first, second, 1000)
    error = 1.96 * (first - second).std() / 20
    assert (result.high - result.low) / 2 == pytest.approx(error, rel=0.15)
    assert result.low < result.difference < result.high


def test_swapping_the_systems_mirrors_the_result():
    random = np.random.default_rng(2)
    first, second = random.random(40), random.random(40)
    one, other = paired_test(first, second), paired_test(second, first)
    assert (one.difference, one.low, one.p_value) == pytest.approx((-other.difference, -other.high, other.p_value))


def test_a_paired_test_needs_pairs():
    with pytest.raises(InputError, match="got 2 and 1 values"):
        paired_test([1, 0], [1])
