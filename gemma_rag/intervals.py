"""How sure a measured number is: intervals for shares and means, and a test for a difference of two systems.

>>> low, high = binomial_interval(9, 10)
>>> round(low, 4), round(high, 4)
(0.555, 0.9975)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError, MissingExtra

Scores: TypeAlias = npt.NDArray[np.float64]

BLOCK = 500_000
"""Numbers drawn at a time, so that a resampling of any size needs a few megabytes."""


def optional_module(name: str, purpose: str) -> Any:
    """Import a module of the extra ``eval`` when it is first used.

    Args:
        name: The module, for example ``"scipy.special"``.
        purpose: What it is for, in the user's words: ``"which computes exact intervals"``.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        raise MissingExtra(f"{package}, {purpose},", "eval") from error


def special_functions() -> Any:
    """The module `scipy.special`, for the distributions behind the exact intervals.

    Raises:
        MissingExtra: scipy is not installed.
    """
    return optional_module("scipy.special", "which computes exact intervals")


def finite(what: str, values: npt.ArrayLike) -> Scores:
    """Read a list of finite numbers, at least one.

    Args:
        what: Their name in the message, in the plural: ``"the scores"``.
        values: Shape ``(n,)``.

    Raises:
        InputError: Not a flat list of numbers, empty, or with NaN or infinite ones.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be a list of numbers: {error}") from error
    if array.ndim != 1:
        raise InputError(f"{what} must be a list of numbers, and have the shape {array.shape}")
    if not len(array):
        raise InputError(f"{what} are empty: give at least one")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise InputError(f"{what} must be finite, and number {wrong[0]} (counted from 0) is {array[wrong[0]]}: leave such out")
    return array


def between_0_and_1(what: str, value: float) -> None:
    """Refuse what is not strictly between 0 and 1, such as a confidence of 95 where 0.95 is meant.

    Raises:
        InputError: It is not.
    """
    if not 0.0 < value < 1.0:
        raise InputError(f"{what} is between 0 and 1, as 0.95 for 95 %, and is {value}")


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n or successes != int(successes) or n != int(n):
        raise InputError(f"a share needs whole numbers, 0 <= successes <= n and n of at least 1, not {successes} of {n}")


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise InputError(f"resampling needs at least 1 resample, not {resamples}")


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for a share (Clopper and Pearson, Biometrika 1934).

    It holds the true share at least as often as the confidence says, for every share and every n; it is therefore a
    little wide.

    Args:
        successes: How often it happened, 0 to n.
        n: How often it could have happened, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The lowest and the highest share that fit what was seen, both 0 to 1.

    Raises:
        InputError: Counts or a confidence out of range.
        MissingExtra: scipy is not installed.
    """
    _check_counts(successes, n)
    between_0_and_1("the confidence", confidence)
    quantile, tail = special_functions().betaincinv, (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(quantile(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(quantile(successes + 1, n - successes, 1 - tail))
    return low, high


def binomial_upper(successes: int, n: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper bound of a share (Clopper and Pearson): "at most this, with this confidence".

    Args:
        successes: How often it happened, 0 to n.
        n: How often it could have happened, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The highest share that fits what was seen, 0 to 1.

    Raises:
        InputError: Counts or a confidence out of range.
        MissingExtra: scipy is not installed.
    """
    _check_counts(successes, n)
    between_0_and_1("the confidence", confidence)
    return 1.0 if successes == n else float(special_functions().betaincinv(successes + 1, n - successes, confidence))


def _percentiles(values: Scores, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: npt.ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13).

    It knows nothing beyond the values: from one value, or from equal ones, it has no width, and below about twenty it
    is too narrow. For a share of few questions `binomial_interval` is the honest one.

    Args:
        values: One per question, shape ``(n,)``.
        confidence: Between 0 and 1.
        resamples: How many means of n values drawn with replacement, at least 1.
        seed: Of the random numbers; the same seed gives the same interval.

    Raises:
        InputError: Values that are no finite numbers, or an option out of range.
    """
    array = finite("the values of a bootstrap", values)
    between_0_and_1("the confidence", confidence)
    _check_resamples(resamples)
    random, n = np.random.default_rng(seed), len(array)
    rows = max(1, BLOCK // n)
    means = [array[random.integers(0, n, (min(rows, resamples - done), n))].mean(axis=1) for done in range(0, resamples, rows)]
    return _percentiles(np.concatenate(means), confidence)


def bootstrap_statistic(
    statistic: Callable[..., float],
    *arrays: npt.ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of any statistic of several aligned arrays, such as the AUROC.

    A resample on which the statistic raises `InputError`, as the AUROC does where chance left one class out, is drawn
    again.

    Args:
        statistic: Called with the arrays; gives one number.
        arrays: One entry per question in each, drawn together.
        confidence: Between 0 and 1.
        resamples: How many, at least 1.
        seed: Of the random numbers.

    Raises:
        InputError: Arrays of different lengths, an option out of range, a statistic that is not defined on the arrays
            themselves or on most of their resamples, or that is not finite.
    """
    data = [np.asarray(array) for array in arrays]
    if not data or any(a.ndim == 0 for a in data) or len({len(a) for a in data}) > 1 or not len(data[0]):
        raise InputError(f"a bootstrap needs arrays of one length, not empty, and got shapes {[a.shape for a in data]}")
    between_0_and_1("the confidence", confidence)
    _check_resamples(resamples)
    statistic(*data)
    values: list[float] = []
    random, failed = np.random.default_rng(seed), 0
    while len(values) < resamples:
        rows = random.integers(0, len(data[0]), len(data[0]))
        try:
            values.append(float(statistic(*(a[rows] for a in data))))
        except InputError as error:
            failed += 1
            if failed > resamples:
                raise InputError(f"too few labels for a bootstrap: most resamples are of no use ({error})") from error
    return _percentiles(finite("the resampled statistics", values), confidence)


@dataclass(frozen=True)
class PairedTest:
    """Whether one system beats another on the same questions.

    Attributes:
        difference: Mean of the first minus mean of the second.
        low: Lower end of the 95 % bootstrap interval of the difference.
        high: Its upper end.
        p_value: How often chance alone gives a difference at least as large, in either direction; above 0, at most 1.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_test(first: npt.ArrayLike, second: npt.ArrayLike, resamples: int = 10_000, seed: int = 0) -> PairedTest:
    """Paired randomisation test of the mean difference (Smucker, Allan and Carterette, CIKM 2007).

    If the two systems were equally good, each question's difference could as well have the other sign. All signs are
    tried where few questions differ (2 to that number is at most `resamples`), so that the p-value is exact; else
    `resamples` random ones, where what was seen counts as one of them, so that the p-value is never 0.

    Args:
        first: A value per question, shape ``(n,)``.
        second: Values of the same questions in the same order.
        resamples: How many sign flips, and how many resamples for the interval, at least 1.
        seed: Of the random numbers.

    Raises:
        InputError: Lists of different lengths, values that are no finite numbers, or fewer than 1 resample.
    """
    one, two = finite("the first values", first), finite("the second values", second)
    if len(one) != len(two):
        raise InputError(f"a paired test needs both values of each question, and got {len(one)} and {len(two)} values")
    _check_resamples(resamples)
    difference = one - two
    low, high = bootstrap_interval(difference, resamples=resamples, seed=seed)
    moved = difference[difference != 0]
    n = len(moved)
    reached = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()  # sums of the same numbers in another order differ by rounding

    def as_large(flip: npt.NDArray[Any]) -> int:
        return int((np.abs(moved.sum() - 2 * (flip @ moved)) >= reached).sum())

    if 2**n <= resamples:
        p_value = as_large(np.arange(2**n)[:, None] >> np.arange(n) & 1) / 2**n
    else:
        random, rows = np.random.default_rng(seed), max(1, BLOCK // n)
        blocks = [min(rows, resamples - done) for done in range(0, resamples, rows)]
        p_value = (1 + sum(as_large(random.integers(0, 2, (b, n), dtype=np.int8)) for b in blocks)) / (1 + resamples)
    return PairedTest(float(difference.mean()), low, high, p_value)
