"""Learning from labelled questions when to refuse: what speaks for a hit, and how much of it is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.calibration import (
    OperatingPoint,
    Rule,
    best_end_to_end,
    best_f1,
    for_coverage,
    for_precision,
    guarantee,
    judge,
    per_group,
)
from gemma_rag.errors import InputError
from gemma_rag.intervals import optional_module
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Labelled, as_labelled, check_ids
from gemma_rag.learned import Calibration, Evidence, Kind, KindCalibration
from gemma_rag.observing import Observed, observe
from gemma_rag.probability import ProbabilityMap, fit_probability
from gemma_rag.retriever import TwoStageRetriever

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CATEGORY_COVERAGE = 0.995
"""Stage one refuses early and cheaply; it may cost this little of the answerable questions."""

TARGETS: dict[Rule, tuple[float | None, float | None]] = {
    "best_f1": (None, None),
    "precision": (0.9, None),
    "coverage": (0.95, None),
    "end_to_end": (None, None),
    "guarantee": (0.05, 0.95),
}
"""Target and confidence of each rule, unless others are asked for."""

_NOISE = 1e-6
"""A feature that varies less than the rounding of float32 says nothing."""

_RULES: dict[Rule, Callable[..., OperatingPoint]] = {
    "best_f1": best_f1,
    "precision": for_precision,
    "coverage": for_coverage,
    "end_to_end": best_end_to_end,
    "guarantee": guarantee,
}


@dataclass(frozen=True)
class CalibrationReport:
    """What calibrating found, with the numbers behind it.

    Attributes:
        calibration: What the knowledge base uses from now on.
        observed: By kind, what the search made of the questions.
        evidence: By kind, the evidence of each question by a model that has not seen it, shape ``(n,)``.
        questions: The labelled questions.
        notes: What its reader should know.
    """

    calibration: Calibration
    observed: dict[Kind, Observed]
    evidence: dict[Kind, Doubles]
    questions: tuple[Labelled, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON, without the numbers of each question."""
        kinds = {
            kind: {
                **{key: value for key, value in item.model_dump(mode="json").items() if key not in ("probability", "evidence")},
                "statement": item.document.statement,
                "features": dict(zip(item.evidence.features, item.evidence.coefficients, strict=True)),
                "probability": None
                if item.probability is None
                else item.probability.model_dump(include={"kind", "log_loss", "brier"}),
            }
            for kind, item in self.calibration.kinds.items()
        }
        return {
            "questions": len(self.questions),
            "estimated": self.calibration.estimated,
            "kinds": kinds,
            "notes": list(self.notes),
        }


def calibrate(
    base: KnowledgeBase,
    labelled: Iterable[Labelled | Mapping[str, Any]],
    *,
    rule: Rule = "end_to_end",
    target: float | None = None,
    confidence: float | None = None,
    per_category: bool = True,
    retriever: TwoStageRetriever | None = None,
    folds: int = 5,
    seed: int = 0,
    keep: bool = True,
) -> CalibrationReport:
    """Choose thresholds from labelled questions, and use them from now on.

    Logistic regression on what is known of the first document (its cosine, its lexical score, how much of the question its
    best sentence speaks of) tells questions that have an answer from those that have none. Its sum, the
    evidence, is one score for all that is known; the threshold is put on it by the rule. The evidence that
    thresholds are chosen on and judged by comes from models that have not seen the question (cross-fitting).

    Args:
        base: What to calibrate.
        labelled: Questions with the ids of the documents that answer them, or with none.
        rule: ``best_f1`` of answering rightly; ``precision`` of the answers at least `target`; ``coverage`` of the answerable
            questions at least `target`; ``end_to_end``: most questions answered rightly or rightly refused;
            ``guarantee``: at most the share `target` of the unanswerable questions gets an answer, with `confidence`.
        target: By default 0.9 for precision, 0.95 for coverage, 0.05 for the guarantee.
        confidence: Of the guarantee, 0.95 by default.
        per_category: Put the threshold where a category's own labels want it, as far as they are many.
        retriever: How questions will be searched; the default one otherwise.
        folds: Parts that the questions are cut into, at least 2.
        seed: Of that cut.
        keep: Commit it to the knowledge base's folder.

    Raises:
        TooFewLabels: The guarantee cannot be given with so few questions without an answer; it says how many more it takes.
        InputError: The rule cannot be met, or the labels cannot be used.
        MissingExtra: scikit-learn or scipy is not installed.
    """
    if rule not in _RULES:
        raise InputError(f"no rule is named {rule!r}: there are {', '.join(_RULES)}")
    labelled = as_labelled(labelled)
    if not labelled:
        raise InputError("calibrating needs labelled questions, and none came")
    check_ids(labelled, {document.id for document in base})
    observed = observe(base, labelled, retriever)
    kinds: dict[Kind, KindCalibration] = {}
    evidence: dict[Kind, Doubles] = {}
    notes: list[str] = []
    for kind, some in observed.items():
        try:
            kinds[kind], evidence[kind] = _calibrate_kind(some, rule, target, confidence, per_category, folds, seed, notes)
        except InputError as error:
            if len(observed) == 1:
                raise
            notes.append(f"{kind} search keeps its default thresholds: {error}")
    if not kinds:
        raise InputError("; ".join(notes))
    calibration = taken_over(base, kinds, notes, estimated=False, keep=keep)
    return CalibrationReport(calibration, observed, evidence, labelled, tuple(notes))


def taken_over(
    base: KnowledgeBase, kinds: dict[Kind, KindCalibration], notes: Sequence[str], *, estimated: bool, keep: bool
) -> Calibration:
    """Let a knowledge base use thresholds from now on; those of other kinds of search stay, if they were found alike.

    Args:
        base: The knowledge base.
        kinds: The thresholds.
        notes: What their reader should know.
        estimated: Found without labels.
        keep: Commit them to the knowledge base's folder.
    """
    old = base.learned.calibration
    stay = {} if old is None or old.estimated != estimated else old.kinds
    calibration = Calibration(
        fingerprint=base.manifest.fingerprint,
        estimated=estimated,
        kinds={**stay, **kinds},
        categories=base.view().categories,
        notes=tuple(notes),
    )
    base.learn(base.learned._replace(calibration=calibration), keep=keep)
    return calibration


def _calibrate_kind(
    some: Observed,
    rule: Rule,
    target: float | None,
    confidence: float | None,
    per_category: bool,
    folds: int,
    seed: int,
    notes: list[str],
) -> tuple[KindCalibration, Doubles]:
    rate = None if rule != "guarantee" else TARGETS[rule][0] if target is None else target
    evidence, scores = fit_evidence(some, folds, seed, rate)
    labels = (scores, some.answerable, some.right)
    point = _judged(some, scores, rule, target, confidence, folds, seed)
    by_category: dict[str, float] = {}
    if per_category and rule != "guarantee":
        by_category = {
            name: threshold
            for name, threshold in per_group(*labels, some.groups, point).items()
            if threshold != point.threshold
        }
    others = []
    for other in _RULES:
        if other != rule:
            try:
                others.append(_judged(some, scores, other, None, None, folds, seed))
            except InputError as error:
                notes.append(f"no operating point by {other}: {error}")
    category = None
    reached = np.isfinite(some.category_scores)
    if reached.all() and some.answerable.any() and "cosine" in evidence.features:
        category = for_coverage(some.category_scores, some.answerable, some.answerable, CATEGORY_COVERAGE)
    return KindCalibration(
        evidence=evidence,
        document=point,
        by_category=by_category,
        category=category,
        probability=_probability(scores, some.right, seed),
        points=tuple(others),
        questions=(int(some.answerable.sum()), int((~some.answerable).sum())),
    ), scores


def place(
    rule: Rule, target: float | None, confidence: float | None, scores: Doubles, answerable: Bools, right: Bools
) -> OperatingPoint:
    """Choose a threshold by a rule, with the rule's own target and confidence where none are given."""
    goal, certainty = TARGETS[rule]
    extra = [value if value is not None else own for value, own in ((target, goal), (confidence, certainty)) if own is not None]
    return _RULES[rule](scores, answerable, right, *extra)


def fit_evidence(some: Observed, folds: int = 5, seed: int = 0, rate: float | None = None) -> tuple[Evidence, Doubles]:
    """Fit what tells questions with an answer from those without one.

    Args:
        some: What was observed; with fewer than two questions of either kind the evidence is the fused score.
        folds: Parts that the questions are cut into, at least 2.
        seed: Of that cut.
        rate: Of false answers, where a promise is to be made of it.

    Returns:
        The evidence, fitted on all questions, and the evidence of each question by one that was fitted without it.
    """
    answerable = some.answerable
    folds = min(max(2, folds), int(answerable.sum()), int((~answerable).sum()))
    if folds < 2:
        features = tuple(some.weights)
        fixed = Evidence(features=features, coefficients=tuple(some.weights[name] for name in features), intercept=0.0)
        return fixed, fixed.score(some.values)
    out = np.empty(len(answerable))
    for inside in parts(answerable, folds, seed):
        out[inside] = _logistic(some.some(~inside)).score(some.some(inside).values)
    return (_logistic(some), out) if rate is None else _safest(some, _logistic(some), out, rate)


def _safest(some: Observed, evidence: Evidence, scores: Doubles, rate: float) -> tuple[Evidence, Doubles]:
    """Of the fitted evidence and the first feature alone, what answers more where few false answers are left.

    What separates best on the whole need not be best among the highest scores of unanswerable questions, which alone
    decide a promise. Compared is the mean coverage over thresholds with up to `rate` false answers (a part of the area
    under the ROC curve), so that the one score that the promise hangs on has little say; see docs/decisions/0008.
    """
    first = next(iter(some.values))
    alone = Evidence(features=(first,), coefficients=(1.0,), intercept=0.0)
    plain = alone.score(some.values)

    def coverage(values: Doubles) -> float:
        worst = np.sort(values[~some.answerable])[::-1]
        few = worst[: max(1, int(np.ceil(rate * len(worst))))]
        return float(np.mean([(values[some.answerable] > score).mean() for score in few]))

    return (alone, plain) if coverage(plain) > coverage(scores) else (evidence, scores)


def parts(answerable: Bools, folds: int, seed: int) -> list[Bools]:
    """Cut questions into parts, each with its share of answerable and unanswerable ones."""
    shuffled = np.random.default_rng(seed).permutation(len(answerable))
    number = np.empty(len(answerable), dtype=np.int64)
    number[shuffled[np.argsort(answerable[shuffled], kind="stable")]] = np.arange(len(answerable)) % folds
    return [number == part for part in range(folds)]


def _logistic(some: Observed) -> Evidence:
    linear = optional_module("sklearn.linear_model", "calibrating")
    features = tuple(some.values)
    columns = np.column_stack([some.values[name] for name in features])
    mean, scale = columns.mean(axis=0), columns.std(axis=0)
    varies = scale > _NOISE
    coefficients = np.zeros(len(features))
    scaled = np.where(varies, (columns - mean) / np.where(varies, scale, 1.0), 0.0)
    model = linear.LogisticRegression().fit(scaled, some.answerable)
    coefficients[varies] = model.coef_[0][varies] / scale[varies]
    return Evidence(
        features=features,
        coefficients=tuple(coefficients.tolist()),
        intercept=float(model.intercept_[0] - (coefficients * mean).sum()),
    )


def _judged(
    some: Observed, scores: Doubles, rule: Rule, target: float | None, confidence: float | None, folds: int, seed: int
) -> OperatingPoint:
    """A threshold chosen on all questions, with what thresholds that are chosen the same way do on questions held out."""
    point = place(rule, target, confidence, scores, some.answerable, some.right)
    beyond = np.empty(len(scores))
    for inside in parts(some.answerable, max(2, folds), seed + 1):
        rest = (scores[~inside], some.answerable[~inside], some.right[~inside])
        try:
            beyond[inside] = scores[inside] - place(rule, target, confidence, *rest).threshold
        except InputError:  # too few labels in the rest: the threshold of all stands in, and looks a little better than it is
            beyond[inside] = scores[inside] - point.threshold
    held_out = judge(point.model_copy(update={"threshold": 0.0}), beyond, some.answerable, some.right)
    return held_out.model_copy(update={"threshold": point.threshold})


def _probability(scores: Doubles, right: Bools, seed: int) -> ProbabilityMap | None:
    return fit_probability(scores, right, seed) if right.any() and not right.all() else None
