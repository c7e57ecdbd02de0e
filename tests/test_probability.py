"""The probability that a hit is right: known answers by hand, equations that a fit must solve, and fresh labels."""

import math
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.probability import FEW, ProbabilityMap, fit_probability

score = st.integers(0, 8).map(lambda tenths: tenths / 10) | st.floats(-1, 1)  # many ties, and any cosine


def curve(n, seed):
    random = np.random.default_rng(seed)
    scores = random.random(n)
    return scores, random.random(n) < 1 / (1 + np.exp(-(6 * scores - 3)))


def test_a_logistic_curve_by_hand():
    # with one label each, Platt's targets are 2/3 and 1/3: the curve passes through both
    fitted = fit_probability([0.0, 1.0], [False, True])
    assert (fitted.kind, fitted.clip, fitted.labels) == ("platt", 1 / 4, 2)
    assert (fitted.slope, fitted.intercept) == pytest.approx((2 * math.log(2), -math.log(2)), rel=1e-6)
    assert fitted.apply([0, 0.5, 1]) == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    # each label is judged by a curve fitted to the other one, which gives 1/3 to what happens
    assert (fitted.log_loss, fitted.brier) == pytest.approx((math.log(3), 4 / 9), rel=1e-6)


def test_a_logistic_curve_solves_platts_equations():
    scores, right = curve(90, 1)
    fitted = fit_probability(scores, right)
    yes, no = right.sum(), (~right).sum()
    target = np.where(right, (yes + 1) / (yes + 2), 1 / (no + 2))
    gap = 1 / (1 + np.exp(-(fitted.slope * scores + fitted.intercept))) - target
    assert (fitted.kind, gap.mean(), (gap * scores).mean()) == ("platt", pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e4)])
def test_the_unit_of_the_scores_does_not_matter(scale, shift):
    scores, right = curve(90, 1)
    fitted = fit_probability(scores * scale + shift, right)
    assert fitted.apply(scores * scale + shift) == pytest.approx(fit_probability(scores, right).apply(scores), abs=1e-5)


def step(n, seed):
    random = np.random.default_rng(seed)
    scores = random.random(n)
    return scores, random.random(n) < np.where(scores > 0.9, 0.95, np.where(scores > 0.3, 0.5, 0.05))


def test_a_step_is_fitted_by_knots():
    fitted = fit_probability(*step(3000, 1))
    assert fitted.kind == "isotonic"
    assert fitted.apply([0.1, 0.6, 0.97]) == pytest.approx([0.05, 0.5, 0.95], abs=0.07)


def test_a_curve_is_fitted_by_a_curve():
    fitted = fit_probability(*curve(3000, 1))
    assert (fitted.kind, fitted.slope, fitted.intercept) == ("platt", pytest.approx(6, rel=0.1), pytest.approx(-3, rel=0.1))


def test_the_kind_with_the_lower_log_loss_on_fresh_labels_is_kept():
    fresh, happened = step(20_000, 2)
    kept = fit_probability(*step(3000, 1))
    given = kept.apply(fresh)
    assert kept.log_loss == pytest.approx(-np.log(np.where(happened, given, 1 - given)).mean(), abs=0.02)
    assert kept.brier == pytest.approx(((given - happened) ** 2).mean(), abs=0.01)


@pytest.mark.parametrize(("n", "kind"), [(FEW - 1, "platt"), (FEW, "isotonic")])
def test_few_labels_of_one_outcome_get_a_curve(n, kind):
    scores = np.concatenate([np.linspace(0, 0.1, 900), np.linspace(0.5, 0.6, 900), np.linspace(0.9, 1, n)])
    right = np.concatenate([np.zeros(900), np.zeros(900), np.ones(n)])  # a step: knots fit far better
    assert fit_probability(scores, right).kind == kind


@pytest.mark.parametrize("n", [60, 3000])
def test_inverted_scores_give_a_level_map_at_the_share_of_right_ones(n):
    scores, right = curve(n, 1)
    given = fit_probability(-scores, right).apply([-1.0, -0.5, 0.0])
    assert given == pytest.approx(np.full(3, right.mean()), abs=0.02)


def test_scores_that_differ_by_rounding_alone_count_as_equal():
    scores = np.full(12, 0.1)
    scores[:3] = np.nextafter(0.1, 1)
    assert fit_probability(scores, np.arange(12) < 3).slope == 0


@pytest.mark.parametrize("n", [12, 400])  # in floating point twelve times 0.1 has a standard deviation above 0
def test_equal_scores_give_a_level_map_at_the_share_of_right_ones(n):
    fitted = fit_probability(np.full(n, 0.1), np.arange(n) % 4 == 0)
    assert fitted.apply([-1.0, 0.1, 1.0]) == pytest.approx(np.full(3, 0.25), abs=0.02 if n == 12 else 0.002)


@given(st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=25), st.lists(st.floats(-3, 3), min_size=2, max_size=10))
def test_probabilities_never_fall_and_are_clipped(rows, new):
    scores, right = map(np.array, zip(*rows, strict=True))
    assume(right.any() and not right.all())
    fitted = fit_probability(scores, right)
    given = fitted.apply(np.sort(new))
    assert (np.diff(given) >= 0).all()
    assert fitted.clip <= given.min() <= given.max() <= 1 - fitted.clip
    assert fitted.clip == 1 / (len(rows) + 2)


def test_separable_labels_are_clipped_at_both_ends():
    scores = np.concatenate([np.linspace(0, 0.4, 100), np.linspace(0.6, 1, 100)])
    given = fit_probability(scores, scores > 0.5).apply([-9.0, 9.0])
    assert given == pytest.approx([1 / 202, 201 / 202])


@pytest.mark.parametrize("make", [step, curve])
def test_a_map_survives_json_and_is_the_same_each_time(make):
    fitted = fit_probability(*make(1000, 1))
    assert ProbabilityMap.model_validate_json(fitted.model_dump_json()) == fitted == fit_probability(*make(1000, 1))


def test_the_seed_shuffles_the_folds():
    assert fit_probability(*curve(80, 1), seed=1).log_loss != fit_probability(*curve(80, 1), seed=2).log_loss


def test_the_order_of_the_labels_changes_no_fit():
    scores, right = curve(80, 1)
    one, other = fit_probability(scores, right), fit_probability(scores[::-1], right[::-1])
    assert (one.slope, one.intercept) == pytest.approx((other.slope, other.intercept), rel=1e-5)


@pytest.mark.parametrize(("only", "missing"), [(True, "wrong"), (False, "right")])
def test_a_probability_needs_both_outcomes(only, missing):
    with pytest.raises(InputError, match=f"a probability needs labels of both classes, and none is {missing}"):
        fit_probability([0.1, 0.2], [only, only])


@pytest.mark.parametrize(
    "change",
    [
        {"slope": -1.0},
        {"slope": None},
        {"knots": ((0.0, 0.5),)},
        {"kind": "isotonic"},
        {"clip": 0.0},
        {"log_loss": math.nan},
        {"temperature": 1.0},
        {"kind": "isotonic", "slope": None, "intercept": None, "knots": ()},
        {"kind": "isotonic", "slope": None, "intercept": None, "knots": ((0.0, 0.5), (1.0, 0.4))},
        {"kind": "isotonic", "slope": None, "intercept": None, "knots": ((0.0, 0.5), (0.0, 0.6))},
        {"kind": "isotonic", "slope": None, "intercept": None, "knots": ((0.0, 0.5), (1.0, 1.1))},
    ],
)
def test_a_map_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValidationError):
        ProbabilityMap.model_validate(fit_probability([0.0, 1.0], [False, True]).model_dump() | change)


def test_a_map_refuses_nan():
    with pytest.raises(InputError, match="the scores must be finite"):
        fit_probability([0.0, 1.0], [False, True]).apply([float("nan")])


@pytest.mark.parametrize(("module", "package"), [("scipy.optimize", "scipy"), ("sklearn.isotonic", "scikit-learn")])
def test_without_the_extra_the_message_gives_the_pip_command(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"^{package}, which fits probabilities, .*'gemma-rag\[eval\]'"):
        fit_probability(*curve(500, 1))
