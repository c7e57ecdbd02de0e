"""How well scores tell apart: known answers by hand, and scikit-learn's."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gemma_rag.curves import auroc, precision_recall, risk_coverage, roc
from gemma_rag.errors import InputError
from gemma_rag.intervals import bootstrap_statistic

score = st.integers(0, 8).map(lambda tenths: tenths / 10) | st.floats(-1, 1)  # many ties, and any cosine


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.1, 0.9], [0, 1], 1.0),
        ([0.9, 0.1], [0, 1], 0.0),  # inverted
        ([0.5, 0.5], [0, 1], 0.5),
        ([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1], 0.875),  # of four pairs three are won and one is a tie
        ([0.3, 0.1, 0.2], [1, 0, 1], 1.0),
    ],
)
def test_auroc_by_hand(scores, positive, expected):
    assert auroc(scores, positive) == expected


@given(st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=30))
def test_curves_agree_with_scikit_learn(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = map(np.array, zip(*rows, strict=True))
    assume(positive.any() and not positive.all())
    assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))
    ours, (false, true, _) = roc(scores, positive), metrics.roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose([ours.false_positive_rate, ours.true_positive_rate], [false, true])
    curve, (precision, recall, _) = precision_recall(scores, positive), metrics.precision_recall_curve(positive, scores)
    np.testing.assert_allclose([curve.precision[::-1], curve.recall[::-1]], [precision[:-1], recall[:-1]])


@given(st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=30))
def test_curves_say_what_their_thresholds_do(rows):
    scores, positive = map(np.array, zip(*rows, strict=True))
    assume(positive.any() and not positive.all())
    curve, pr, rc = roc(scores, positive), precision_recall(scores, positive), risk_coverage(scores, positive)
    for threshold, false in zip(curve.thresholds, curve.false_positive_rate, strict=True):
        assert false == (scores[~positive] >= threshold).mean()
    for threshold, precision in zip(pr.thresholds, pr.precision, strict=True):
        assert precision == positive[scores >= threshold].mean()
    for threshold, coverage, risk in zip(rc.thresholds, rc.coverage, rc.risk, strict=True):
        assert (coverage, risk) == pytest.approx(((scores >= threshold).mean(), 1 - positive[scores >= threshold].mean()))


def test_risk_coverage_by_hand():
    curve = risk_coverage([0.9, 0.8, 0.7, 0.6], [True, False, True, True])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert curve.thresholds == pytest.approx([0.85, 0.75, 0.65, 0.6], abs=1e-5)


@pytest.mark.parametrize("right", [[True, False, True], [False, True, True]])
def test_risk_coverage_takes_equal_scores_as_one_block(right):
    curve = risk_coverage([0.5, 0.5, 0.2], right)
    assert curve.coverage == pytest.approx([2 / 3, 1])
    assert curve.risk == pytest.approx([1 / 2, 1 / 3])
    assert curve.area == pytest.approx(2 / 3 * 1 / 2 + 1 / 3 * 1 / 3)


@pytest.mark.parametrize(("right", "area"), [(True, 0.0), (False, 1.0)])
def test_risk_coverage_of_one_class_is_level(right, area):
    assert risk_coverage([0.1, 0.2, 0.2], [right] * 3).area == area


@pytest.mark.parametrize(
    ("function", "name"), [(auroc, "AUROC"), (roc, "ROC curve"), (precision_recall, "precision-recall curve")]
)
@pytest.mark.parametrize(("only", "missing"), [(True, "negative"), (False, "positive")])
def test_one_class_alone_is_refused_by_the_name_of_the_missing_one(function, name, only, missing):
    with pytest.raises(InputError, match=f"{name} needs labels of both classes, and none is {missing}"):
        function([0.1, 0.2], [only, only])


def test_auroc_has_a_bootstrap_interval_around_it():
    random = np.random.default_rng(1)
    answerable = random.random(300) >= 0.3
    scores = random.normal(size=300) + 1.2 * answerable
    low, high = bootstrap_statistic(auroc, scores, answerable, resamples=300)
    assert low < auroc(scores, answerable) < high
    assert high - low < 0.2
