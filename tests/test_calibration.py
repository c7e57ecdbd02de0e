"""Thresholds from labels: known answers by hand, brute force on small cases, and the promise by simulation."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from gemma_rag.calibration import (
    OperatingPoint,
    TooFewLabels,
    best_end_to_end,
    best_f1,
    flips,
    for_coverage,
    for_precision,
    guarantee,
    judge,
    per_group,
)
from gemma_rag.errors import InputError
from gemma_rag.intervals import binomial_interval, binomial_upper

UNANSWERABLE, WRONG, RIGHT = "U", "W", "R"
score = st.integers(0, 8).map(lambda tenths: tenths / 10) | st.floats(-1, 1)  # many ties, and any cosine
questions = st.lists(st.tuples(score, st.sampled_from("UWR")), min_size=1, max_size=25)
RULES = [best_f1, for_precision, for_coverage, best_end_to_end, guarantee]


def labels(text):
    """Labels as in ``"0.1 U, 0.5 W, 0.9 R"``: a score, and what the question is."""
    return arrays([(float(part.split()[0]), part.split()[1]) for part in text.split(",")])


def arrays(rows):
    scores, kinds = zip(*rows, strict=True)
    return np.array(scores), np.array([k != UNANSWERABLE for k in kinds]), np.array([k == RIGHT for k in kinds])


def cuts(scores):
    """What can be answered: the questions from each score up, and none."""
    return [np.array(scores) >= cut for cut in [*np.unique(scores), 2.0]]


def f1(answered, answerable, right):
    return 2 * (answered & right).sum() / (answered.sum() + answerable.sum())


def simulated(n, seed, shift=1.5, unanswerable=0.3):
    random = np.random.default_rng(seed)
    answerable = random.random(n) >= unanswerable
    right = answerable & (random.random(n) < 0.75)
    return random.normal(size=n) + shift * right + 0.5 * (answerable & ~right), answerable, right


# ---- thresholds by hand


MIXED = "0.1 U, 0.2 R, 0.3 U, 0.5 W, 0.6 R, 0.9 R"


@pytest.mark.parametrize(
    ("choose", "threshold"),
    [
        # F1 = 2 right / (answers + 4): from 0.1 up 6/10, 0.2 6/9, 0.3 4/8, 0.5 4/7, 0.6 4/6, 0.9 2/5: two of 2/3
        (best_f1, 0.55),
        # precision from 0.1 up 3/6, 0.2 3/5, 0.3 2/4, 0.5 2/3, 0.6 2/2, 0.9 1/1
        (lambda *a: for_precision(*a, target=0.6), 0.15),
        (lambda *a: for_precision(*a, target=0.61), 0.4),
        (lambda *a: for_precision(*a, target=1.0), 0.55),
        (lambda *a: for_precision(*a, target=0.5), 0.1 - 1e-6),  # answers everything
        # answerable ones at 0.2, 0.5, 0.6, 0.9
        (lambda *a: for_coverage(*a, target=0.25), 0.75),
        (lambda *a: for_coverage(*a, target=0.26), 0.55),
        (lambda *a: for_coverage(*a, target=0.75), 0.4),
        (lambda *a: for_coverage(*a, target=1.0), 0.15),
        # of six end well, from 0.1 up 3, 0.2 4, 0.3 3, 0.5 4, 0.6 4, 0.9 3, none 2; the standard error of 4/6 is 0.19,
        # so all but "none" are within it: (0.1 + 0.15 + 0.25 + 0.4 + 0.55 + 0.75) / 6 = 0.37, nearest to 0.4
        (best_end_to_end, 0.4),
        # with n = 2 and a rate of 0.9, CDF(0) = 0.01 and CDF(1) = 0.19 <= 0.2: above the second largest, 0.1
        (lambda *a: guarantee(*a, rate=0.9, confidence=0.8), 0.15),
        (lambda *a: guarantee(*a, rate=0.9, confidence=0.9), 0.4),  # CDF(1) > 0.1: above the largest, 0.3
    ],
)
def test_thresholds_by_hand(choose, threshold):
    assert choose(*labels(MIXED)).threshold == pytest.approx(threshold, abs=1e-12)


def test_what_a_point_does_by_hand():
    point = for_coverage(*labels(MIXED), target=0.75)  # at 0.4: answers 0.5 W, 0.6 R, 0.9 R
    assert point.model_dump() == {
        "rule": "coverage",
        "threshold": 0.4,
        "target": 0.75,
        "confidence": None,
        "coverage": 3 / 4,
        "coverage_interval": binomial_interval(3, 4),
        "precision": 2 / 3,
        "precision_interval": binomial_interval(2, 3),
        "false_answers": 0.0,
        "false_answers_interval": binomial_interval(0, 2),
        "end_to_end": 4 / 6,
        "end_to_end_interval": binomial_interval(4, 6),
        "answerable": 4,
        "unanswerable": 2,
    }


@pytest.mark.parametrize(
    ("choose", "statement"),
    [
        (
            best_f1,
            "With the best balance of precision and recall (threshold 0.5500), 50 % of the 4 answerable questions were "
            "answered, 0 % of the 2 unanswerable ones were answered by mistake, and 100 % of the answers had the right "
            "document first.",
        ),
        (lambda *a: for_precision(*a, target=0.6), "With answers as often as a precision of 60 % allows (threshold 0.1500), "),
        (lambda *a: for_coverage(*a, target=0.75), "With answers to at least 75 % of the answerable questions (threshold 0.4"),
        (best_end_to_end, "With as many questions ending well as possible, 66.7 % of them (threshold 0.4000), 75 % of the 4 "),
        (
            lambda *a: guarantee(*a, rate=0.9, confidence=0.8),
            "With the promise, at 80 % confidence, that of all questions like these without an answer at most 90 % get one "
            "(threshold 0.1500), ",
        ),
    ],
)
def test_statements_are_one_sentence_for_people(choose, statement):
    said = choose(*labels(MIXED)).statement
    assert said.startswith(statement)
    assert (said[-1], said.count(". ")) == (".", 0)


def test_a_statement_leaves_out_what_was_not_measured():
    point = guarantee(np.full(100, 0.5), np.zeros(100), np.zeros(100))
    assert point.statement.endswith("(threshold 0.5000), 0 % of the 100 unanswerable ones were answered by mistake.")


def test_a_statement_does_not_round_up_to_all():
    answers = "0.1 U," + ",".join(["0.9 R"] * 1999)
    assert "99.95 % of the answers" in for_coverage(*labels(answers + ", 0.9 U")).statement


@pytest.mark.parametrize(
    ("text", "choose", "threshold", "coverage", "precision", "false_answers"),
    [
        ("0.5 R", best_f1, 0.5 - 1e-6, 1.0, 1.0, None),
        ("0.5 R", for_precision, 0.5 - 1e-6, 1.0, 1.0, None),
        ("0.5 W", for_coverage, 0.5 - 1e-6, 1.0, 0.0, None),
        ("0.5 U, 0.5 R", best_f1, 0.5 - 1e-6, 1.0, 0.5, 1.0),  # all scores equal: all or none
        ("0.5 U, 0.5 U, 0.5 R", best_end_to_end, 0.5 + 1e-6, 0.0, None, 0.0),
        ("0.5 U, 0.5 R, 0.5 R, 0.5 R", lambda *a: guarantee(*a, rate=0.5, confidence=0.4), 0.5 + 1e-6, 0.0, None, 0.0),
        ("-0.9 R, -0.8 U", for_coverage, -0.9 - 1e-6, 1.0, 0.5, 1.0),  # inverted scores
        ("0.2 R, 0.8 U, 0.9 U", lambda *a: guarantee(*a, rate=0.9, confidence=0.9), 0.9 + 1e-6, 0.0, None, 0.0),
        ("40 R, 20 U", best_f1, 30.0, 1.0, 1.0, 0.0),  # no cosines
        ("40 W, 20 R", for_coverage, 20 - 2e-5, 1.0, 0.5, None),  # the margin grows with the scores
    ],
)
def test_thresholds_of_small_and_odd_labels(text, choose, threshold, coverage, precision, false_answers):
    point = choose(*labels(text))
    assert point.threshold == pytest.approx(threshold, abs=1e-9)
    assert (point.coverage, point.precision, point.false_answers) == (coverage, precision, false_answers)


# ---- thresholds against brute force


@given(questions)
def test_best_f1_is_the_best(rows):
    scores, answerable, right = arrays(rows)
    assume(right.any())
    answered = scores >= best_f1(scores, answerable, right).threshold
    assert f1(answered, answerable, right) == max(f1(cut, answerable, right) for cut in cuts(scores))


@given(questions, st.floats(0.05, 1))
def test_for_precision_answers_as_much_as_the_target_allows(rows, target):
    scores, answerable, right = arrays(rows)
    enough = [cut for cut in cuts(scores)[:-1] if right[cut].mean() >= target]
    if enough:
        point = for_precision(scores, answerable, right, target)
        assert (scores >= point.threshold).tolist() == enough[0].tolist()
        assert point.precision >= target
    else:
        with pytest.raises(InputError, match=f"no threshold reaches a precision of {target}"):
            for_precision(scores, answerable, right, target)


@given(questions, st.floats(0.05, 1))
def test_for_coverage_answers_no_more_than_it_must(rows, target):
    scores, answerable, right = arrays(rows)
    assume(answerable.any())
    enough = [cut for cut in cuts(scores) if cut[answerable].mean() >= target]
    assert (scores >= for_coverage(scores, answerable, right, target).threshold).tolist() == enough[-1].tolist()


@given(questions)
def test_best_end_to_end_is_within_a_standard_error_of_the_best(rows):
    scores, answerable, right = arrays(rows)
    assume(answerable.any() and not answerable.all())
    best = max(np.where(cut, right, ~answerable).mean() for cut in cuts(scores))
    assert best_end_to_end(scores, answerable, right).end_to_end >= best - math.sqrt(best * (1 - best) / len(rows)) - 1e-9


@given(questions, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_guarantee_is_the_lowest_threshold_within_the_clopper_pearson_bound(rows, rate, confidence):
    scores, answerable, right = arrays(rows)
    n = int((~answerable).sum())
    bounds = [binomial_upper(int(cut[~answerable].sum()), n, confidence) if n else 1.0 for cut in cuts(scores)]
    assume(all(abs(bound - rate) > 1e-9 for bound in bounds))  # where they are equal, rounding decides
    fits = [cut for cut, bound in zip(cuts(scores), bounds, strict=True) if bound <= rate]
    if fits:
        answered = scores >= guarantee(scores, answerable, right, rate, confidence).threshold
        assert answered.tolist() == fits[0].tolist()
    else:
        with pytest.raises(TooFewLabels):
            guarantee(scores, answerable, right, rate, confidence)


@pytest.mark.parametrize("choose", RULES)
def test_rounded_scores_are_treated_as_before(choose):
    scores, answerable, right = simulated(400, 3)
    scores = scores.round(2)
    threshold = choose(scores, answerable, right).threshold
    for noise in (1e-7, -1e-7):
        assert ((scores + noise >= threshold) == (scores >= threshold)).all()


def test_neighbouring_doubles_are_told_apart():
    low = 0.5
    high = np.nextafter(low, 1)
    point = best_f1([low, high], [False, True], [False, True])
    assert (point.coverage, point.false_answers) == (1.0, 0.0)
    assert guarantee([low, high, 1.0], [False, False, True], [False, False, True], 0.9, 0.9).false_answers == 0.0


def test_best_end_to_end_loses_less_on_fresh_questions_than_the_plain_maximum():
    fresh = simulated(100_000, 0)

    def accuracy(threshold):
        return np.where(fresh[0] >= threshold, fresh[2], ~fresh[1]).mean()

    gain = []
    for seed in range(1, 101):
        scores, answerable, right = simulated(50, seed)
        plain = max(np.unique(scores), key=lambda cut: np.where(scores >= cut, right, ~answerable).sum())
        gain.append(accuracy(best_end_to_end(scores, answerable, right).threshold) - accuracy(plain))
    assert np.mean(gain) > 2 * np.std(gain) / 10


# ---- the promise


def test_a_promise_of_5_percent_at_95_percent_takes_59_labels():
    with pytest.raises(TooFewLabels) as caught:
        guarantee(np.linspace(0, 1, 58), np.zeros(58), np.zeros(58))
    assert (caught.value.have, caught.value.need) == (58, 59)
    assert str(caught.value) == (
        "a promise of at most 5 % with 95 % confidence takes at least 59 labelled questions that have no answer, and there "
        "are 58: add 1 more, or promise less"
    )
    assert guarantee(np.linspace(0, 1, 59), np.zeros(59), np.zeros(59)).false_answers == 0


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.9, 0.95, 0.99, 0.999])
def test_the_labels_asked_for_are_enough_and_one_less_is_not(rate, confidence):
    with pytest.raises(TooFewLabels) as caught:
        guarantee([0.5], [True], [True], rate, confidence)
    need = caught.value.need
    assert guarantee(np.zeros(need), np.zeros(need), np.zeros(need), rate, confidence).false_answers == 0
    if need > 1:
        with pytest.raises(TooFewLabels):
            guarantee(np.zeros(need - 1), np.zeros(need - 1), np.zeros(need - 1), rate, confidence)


def test_too_few_labels_survives_a_pickle():
    error = pickle.loads(pickle.dumps(TooFewLabels(3, 59, "a promise")))
    assert (error.have, error.need, str(error)) == (3, 59, str(TooFewLabels(3, 59, "a promise")))


def normal_tail(threshold):
    return 0.5 * math.erfc(threshold / math.sqrt(2))


@pytest.mark.parametrize(
    ("draw", "tail", "smooth"),
    [
        (lambda random, n: random.random(n), lambda t: min(max(1 - t, 0), 1), True),
        (lambda random, n: random.normal(size=n), normal_tail, True),
        (lambda random, n: random.integers(0, 40, n) / 40, lambda t: np.mean(np.arange(40) / 40 >= t), False),
        (
            lambda random, n: random.choice([0.1, 0.9], n, p=[0.96, 0.04]),
            lambda t: np.dot([0.96, 0.04], [t <= 0.1, t <= 0.9]),
            False,
        ),
        (
            lambda random, n: random.choice([0.1, 0.9], n, p=[0.94, 0.06]),
            lambda t: np.dot([0.94, 0.06], [t <= 0.1, t <= 0.9]),
            False,
        ),
    ],
    ids=["uniform", "normal", "40 values", "4 % high", "6 % high"],
)
@pytest.mark.parametrize("n", [59, 200])
def test_the_promise_holds_as_often_as_it_says(draw, tail, smooth, n):
    random = np.random.default_rng(n)
    answerable = np.arange(n + 100) >= n
    truths = []
    for _ in range(400):
        scores = np.concatenate([draw(random, n), random.random(100)])
        truths.append(tail(guarantee(scores, answerable, answerable).threshold))
    kept = max(k for k in range(n) if sum(math.comb(n, i) * 0.05**i * 0.95 ** (n - i) for i in range(k + 1)) <= 0.05)
    broken = np.mean(np.array(truths) > 0.05)
    assert broken <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)  # two standard errors of the simulation
    if smooth:  # nor is it loose: the (k+1)-th of n scores has (k+1)/(n+1) above it on average
        assert np.mean(truths) >= 0.7 * (kept + 1) / (n + 1)


# ---- groups


def test_groups_are_pooled_towards_the_overall_threshold():
    scores, answerable, right = labels("0.1 U, 0.3 R, 0.5 U, 0.7 R, 0.7 U, 0.9 R")
    overall = best_f1(scores, answerable, right)  # 2 * right / (answers + 3): 6/9, 6/8, 4/7, 4/6, 2/4: the second, at 0.2
    groups = ["low", "low", None, "high", "high", "high"]
    # low: above 0.1, at 0.2 itself. high: 4/(3 + 2) at 0.7, 2/(1 + 2) at 0.9, so at 0.7 - 1e-6; pooled with 3 of 3 + 9 labels
    pooled = per_group(scores, answerable, right, groups, overall, prior=9)
    assert overall.threshold == pytest.approx(0.2)
    assert pooled == {"low": pytest.approx(0.2), "high": pytest.approx(0.25 * (0.7 - 1e-6) + 0.75 * 0.2)}


def test_without_a_prior_a_group_has_its_own_threshold():
    scores, answerable, right = simulated(200, 1)
    groups = ["odd" if i % 2 else "even" for i in range(200)]
    own = per_group(scores, answerable, right, groups, best_f1(scores, answerable, right), prior=0)
    assert own["odd"] == best_f1(scores[1::2], answerable[1::2], right[1::2]).threshold


@pytest.mark.parametrize(
    ("text", "choose"),
    [
        ("0.8 R, 0.9 R", best_f1),  # no unanswerable one
        ("0.8 U, 0.9 U", best_f1),  # no answerable one
        ("0.8 U, 0.9 W", best_f1),  # no right one: the rule has nothing to say
        ("0.8 R, 0.9 U", lambda *a: for_precision(*a, target=0.6)),  # not to be reached in this group
        ("0.8 R, 0.9 U", lambda *a: guarantee(*a, rate=0.2, confidence=0.5)),  # too few for a promise
    ],
)
def test_a_group_that_cannot_choose_keeps_the_overall_threshold(text, choose):
    scores, answerable, right = labels("0.1 U, 0.2 U, 0.3 U, 0.5 R, 0.6 R, 0.7 R, 0.75 R, " + text)
    overall = choose(scores, answerable, right)
    groups = [None] * 7 + ["small"] * 2
    assert per_group(scores, answerable, right, groups, overall, prior=0) == {"small": overall.threshold}


def test_no_group_goes_below_a_promise_and_some_go_above():
    random = np.random.default_rng(4)
    hard = np.arange(600) % 2 == 0
    answerable = random.random(600) < 0.5
    scores = random.normal(size=600) + answerable + hard
    overall = guarantee(scores, answerable, answerable)
    groups = ["hard" if h else "easy" for h in hard]
    thresholds = per_group(scores, answerable, answerable, groups, overall)
    assert guarantee(scores[~hard], answerable[~hard], answerable[~hard]).threshold < overall.threshold
    assert thresholds["easy"] == overall.threshold < thresholds["hard"]


@pytest.mark.parametrize(
    ("groups", "prior", "message"),
    [(["a"], 50, "2 scores needs a group or None, and there are 1"), (["a", "b"], -1, "at least 0, and is -1")]
    + [(["a", None], prior, "the prior of the groups counts labels") for prior in (float("nan"), float("inf"))],
)
def test_groups_that_do_not_fit_are_refused(groups, prior, message):
    scores, answerable, right = labels("0.1 U, 0.9 R")
    with pytest.raises(InputError, match=message):
        per_group(scores, answerable, right, groups, best_f1(scores, answerable, right), prior)


# ---- points as data


@pytest.mark.parametrize("choose", RULES)
def test_a_point_survives_json(choose):
    point = choose(*simulated(300, 1))
    assert OperatingPoint.model_validate_json(point.model_dump_json()) == point


def test_judging_on_other_labels_keeps_the_threshold_and_measures_anew():
    point = for_precision(*labels(MIXED), target=0.6)
    other = judge(point, *labels("0.1 R, 0.16 U, 0.17 W, 0.2 R"))
    assert (other.rule, other.threshold, other.target) == ("precision", point.threshold, 0.6)
    assert (other.coverage, other.precision, other.false_answers, other.end_to_end) == (2 / 3, 1 / 3, 1.0, 1 / 4)


@pytest.mark.parametrize(
    "change",
    [{"rule": "luck"}, {"threshold": math.inf}, {"target": 0.5}, {"confidence": 0.9}, {"rule": "precision"}, {"mood": "good"}],
)
def test_a_point_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValidationError):
        OperatingPoint.model_validate(best_f1(*labels(MIXED)).model_dump() | change)


# ---- what is refused


@pytest.mark.parametrize("choose", RULES)
@pytest.mark.parametrize(
    ("scores", "answerable", "right", "message"),
    [
        ([], [], [], "the scores are empty"),
        ([0.1, float("nan")], [1, 1], [1, 1], "the scores must be finite, and number 1"),
        ([0.1, float("inf")], [1, 1], [1, 1], "the scores must be finite"),
        ([[0.1]], [[1]], [[1]], "list of numbers"),
        ([0.1, 0.2], [1], [1, 1], "answerable needs one entry for each of the 2 scores"),
        ([0.1, 0.2], [1, 1], [[1, 1]], r"right needs one entry .* shape \(1, 2\)"),
        ([0.1, 0.2], [1, 2], [1, 1], "answerable must be true or false"),
        ([0.1, 0.2], [1, None], [1, 1], "answerable must be true or false"),
        ([0.1, 0.2], ["yes", "no"], [1, 0], "answerable must be true or false"),
        ([0.1, 0.2], [1, 0], [0, 1], r"question 1 \(counted from 0\) has no answer, so its first hit cannot be right"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(choose, scores, answerable, right, message):
    with pytest.raises(InputError, match=message):
        choose(scores, answerable, right)


@pytest.mark.parametrize(
    ("choose", "text", "message"),
    [
        (best_f1, "0.1 U, 0.2 W", "best F1 needs questions whose first hit is right"),
        (
            for_precision,
            "0.1 R, 0.4 W, 0.5 U",
            r"precision of 0.9: the best is 0.3333, at a threshold of 0.1000 with 3 answers",
        ),
        (for_coverage, "0.1 U, 0.2 U", "a coverage needs questions that have an answer"),
        (best_end_to_end, "0.1 U, 0.2 U", "accuracy needs questions that have an answer"),
        (best_end_to_end, "0.1 R, 0.2 W", "accuracy needs questions that have no answer"),
        (guarantee, "0.1 R", "takes at least 59 labelled questions that have no answer, and there are 0: add 59 more"),
    ],
)
def test_labels_of_one_kind_are_refused_where_the_rule_needs_both(choose, text, message):
    with pytest.raises(InputError, match=message):
        choose(*labels(text))


@pytest.mark.parametrize(
    ("choose", "options", "message"),
    [
        (for_precision, {"target": 0.0}, "the precision to reach is above 0 and at most 1, for example 0.9, and is 0.0"),
        (for_precision, {"target": 90}, "and is 90"),
        (for_coverage, {"target": -0.1}, "the coverage to reach"),
        (for_coverage, {"target": float("nan")}, "and is nan"),
        (guarantee, {"rate": 5}, "the rate of a promise is between 0 and 1"),
        (guarantee, {"rate": 0.0}, "the rate of a promise is between 0 and 1"),
        (guarantee, {"confidence": 95}, "the confidence of a promise is between 0 and 1"),
    ],
)
def test_targets_out_of_range_are_refused(choose, options, message):
    with pytest.raises(InputError, match=message):
        choose(*labels(MIXED), **options)


# ---- flips


@pytest.mark.parametrize(
    ("old", "new", "answered", "refused"),
    [(0.5, 0.3, [1, 2], []), (0.3, 0.5, [], [1, 2]), (0.5, 0.5, [], []), (0.9, 0.0, [0, 1, 2, 3], []), (0.7, 0.71, [], [0])],
)
def test_flips_by_hand(old, new, answered, refused):
    moved = flips([0.7, 0.3, 0.4, 0.1], old, new)
    assert (moved.newly_answered.tolist(), moved.newly_refused.tolist()) == (answered, refused)


@pytest.mark.parametrize(("scores", "old"), [([0.1, float("nan")], 0.5), ([0.1], float("nan")), ([], 0.5)])
def test_flips_of_no_numbers_are_refused(scores, old):
    with pytest.raises(InputError):
        flips(scores, old, 0.5)
