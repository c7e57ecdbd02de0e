"""How well scores tell apart, as numbers and curves, and the labels that they are measured with.

>>> auroc([0.1, 0.4, 0.4, 0.8], positive=[False, False, True, True])  # of four pairs three are won and one is a tie
0.875
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.intervals import Scores, finite

Flags = npt.NDArray[np.bool_]
"""True or false for each question."""

MARGIN = 1e-6
"""How far "answer everything" and "refuse everything" stand from the worst and the best score (times the score where
that is above 1): more than the rounding of 32-bit cosines, less than any difference that matters."""


def _flags(name: str, values: npt.ArrayLike, n: int) -> Flags:
    array = np.asarray(values)
    if array.shape != (n,):
        raise InputError(f"{name} needs one entry for each of the {n} scores, and has the shape {array.shape}")
    if array.dtype != np.bool_ and not (array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all()):
        raise InputError(f"{name} must be true or false for every question, and holds other values")
    return array.astype(bool)


@dataclass(frozen=True)
class Labels:
    """Labelled questions that have been checked.

    Attributes:
        scores: float64 of shape ``(n,)``, higher is better.
        answerable: bool of shape ``(n,)``: whether the collection holds an answer.
        right: bool of shape ``(n,)``: whether the first hit holds it.
    """

    scores: Scores
    answerable: Flags
    right: Flags

    @classmethod
    def read(cls, scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike) -> Labels:
        """Check what was given.

        Raises:
            InputError: Scores that are no finite numbers, a list of another length, something other than true or false,
                or a right first hit where there is no answer.
        """
        numbers = finite("the scores", scores)
        labels = cls(numbers, _flags("answerable", answerable, len(numbers)), _flags("right", right, len(numbers)))
        wrong = np.flatnonzero(labels.right & ~labels.answerable)
        if len(wrong):
            raise InputError(f"question {wrong[0]} (counted from 0) has no answer, so its first hit cannot be right")
        return labels

    def __getitem__(self, rows: Flags) -> Labels:
        return Labels(self.scores[rows], self.answerable[rows], self.right[rows])

    def need(self, answerable: bool, purpose: str) -> None:
        """Refuse labels without answerable questions, or without unanswerable ones."""
        if not (self.answerable == answerable).any():
            kind = "an answer" if answerable else "no answer"
            raise InputError(f"{purpose} needs questions that have {kind}, and there are none among the labels: add some")


def candidates(scores: Scores) -> Scores:
    """Every threshold that makes a difference, rising: answer everything, between neighbouring scores, refuse everything."""
    distinct = np.unique(scores)
    low, high = distinct[:-1], distinct[1:]
    middle = low / 2 + high / 2
    middle = np.where((low < middle) & (middle < high), middle, high)  # two doubles with none between them
    worst, best = distinct[0], distinct[-1]
    return np.concatenate([[worst - MARGIN * max(1.0, abs(worst))], middle, [best + MARGIN * max(1.0, abs(best))]])


def reach(scores: Scores, thresholds: Scores) -> npt.NDArray[np.intp]:
    """How many scores are at least each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds)


@dataclass(frozen=True)
class Counts:
    """How many questions of each kind are answered at each candidate threshold; at the first, all of them are."""

    thresholds: Scores
    right: npt.NDArray[np.intp]
    answerable: npt.NDArray[np.intp]
    unanswerable: npt.NDArray[np.intp]

    @classmethod
    def of(cls, labels: Labels) -> Counts:
        """Count the questions."""
        thresholds, scores = candidates(labels.scores), labels.scores
        kinds = labels.right, labels.answerable, ~labels.answerable
        return cls(thresholds, *(reach(scores[kind], thresholds) for kind in kinds))

    @property
    def answered(self) -> npt.NDArray[np.intp]:
        """How many questions are answered, with or without an answer to be found."""
        return self.answerable + self.unanswerable


def two_classes(
    what: str, scores: npt.ArrayLike, labels: npt.ArrayLike, names: tuple[str, str] = ("positive", "negative")
) -> tuple[Scores, Flags]:
    """Scores and labels of which some are true and some false.

    Args:
        what: What they are needed for, to stand in a message.
        scores: Shape ``(n,)``.
        labels: Shape ``(n,)``.
        names: What a true and a false label are called in a message.

    Returns:
        float64 and bool, both of shape ``(n,)``.

    Raises:
        InputError: One class is missing, or scores and labels that cannot be used.
    """
    numbers = finite("the scores", scores)
    flags = _flags("the labels", labels, len(numbers))
    for flag, name in zip((flags, ~flags), names, strict=True):
        if not flag.any():
            raise InputError(f"{what} needs labels of both classes, and none is {name}")
    return numbers, flags


def auroc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting half (Mann and Whitney 1947).

    The same number as scikit-learn's ``roc_auc_score``, several times faster, which a bootstrap of it needs.

    Args:
        scores: Shape ``(n,)``, higher for positive.
        positive: Which of the questions are positive, for example answerable, shape ``(n,)``.

    Returns:
        0 to 1; 0.5 for scores that tell nothing.

    Raises:
        InputError: One class is missing, or scores and labels that cannot be used.
    """
    numbers, flags = two_classes("the AUROC", scores, positive)
    above, below = numbers[flags], np.sort(numbers[~flags])
    wins = np.searchsorted(below, above, side="left") + np.searchsorted(below, above, side="right")
    return float(wins.sum() / 2 / len(above) / len(below))


@dataclass(frozen=True)
class Roc:
    """A ROC curve, from "refuse everything" to "answer everything".

    Attributes:
        false_positive_rate: Share of the negatives that reach each threshold, 0 rising to 1.
        true_positive_rate: Share of the positives that do.
        thresholds: Falling, never on a score.
    """

    false_positive_rate: Scores
    true_positive_rate: Scores
    thresholds: Scores


def roc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> Roc:
    """The ROC curve, a point for every threshold that makes a difference.

    Raises:
        InputError: One class is missing, or scores and labels that cannot be used.
    """
    numbers, flags = two_classes("a ROC curve", scores, positive)
    thresholds = candidates(numbers)[::-1]
    false, true = numbers[~flags], numbers[flags]
    return Roc(reach(false, thresholds) / len(false), reach(true, thresholds) / len(true), thresholds)


@dataclass(frozen=True)
class PrecisionRecall:
    """A precision-recall curve, from the fewest answers to "answer everything".

    Attributes:
        precision: Share of what reaches each threshold that is positive.
        recall: Share of the positives that reaches it, rising to 1.
        thresholds: Falling, never on a score; without "refuse everything", where no precision is defined.
    """

    precision: Scores
    recall: Scores
    thresholds: Scores


def precision_recall(scores: npt.ArrayLike, positive: npt.ArrayLike) -> PrecisionRecall:
    """The precision-recall curve, a point for every threshold that makes a difference.

    Raises:
        InputError: One class is missing, or scores and labels that cannot be used.
    """
    numbers, flags = two_classes("a precision-recall curve", scores, positive)
    thresholds = candidates(numbers)[-2::-1]
    true = reach(numbers[flags], thresholds)
    return PrecisionRecall(true / reach(numbers, thresholds), true / flags.sum(), thresholds)


@dataclass(frozen=True)
class RiskCoverage:
    """What answering more costs.

    Attributes:
        coverage: Share of all questions that are answered at each threshold, rising to 1.
        risk: Share of the answered ones that are answered wrongly.
        area: Mean risk over all coverages, 0 to 1, lower is better.
        thresholds: Falling, never on a score; without "refuse everything", which has no risk.
    """

    coverage: Scores
    risk: Scores
    area: float
    thresholds: Scores


def risk_coverage(scores: npt.ArrayLike, right: npt.ArrayLike) -> RiskCoverage:
    """The risk-coverage curve (El-Yaniv and Wiener, JMLR 2010) and the area under it (Geifman and El-Yaniv, NeurIPS 2017).

    Questions with equal scores are answered or refused together, as one block with the risk at its end, so that their
    order does not matter. Labels of one class are welcome: the risk is then 0 or 1 throughout.

    Args:
        scores: Shape ``(n,)``, higher is surer.
        right: Whether an answer would be right, shape ``(n,)``.

    Raises:
        InputError: Scores and labels that cannot be used.
    """
    numbers = finite("the scores", scores)
    flags = _flags("right", right, len(numbers))
    thresholds = candidates(numbers)[-2::-1]
    answered = reach(numbers, thresholds)
    coverage, risk = answered / len(numbers), 1 - reach(numbers[flags], thresholds) / answered
    return RiskCoverage(coverage, risk, float((np.diff(coverage, prepend=0.0) * risk).sum()), thresholds)
