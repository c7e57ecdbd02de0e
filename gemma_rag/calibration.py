"""Where to put a threshold, from questions with known answers, and what it will do there.

A question is answered if and only if its score is at least the threshold. Everything here is numbers in, numbers out:

- `scores`: how good the first hit of each question looked, higher is better;
- `answerable`: whether the collection holds an answer to it;
- `right`: whether the first hit holds it, so never true where there is no answer.

>>> point = best_f1([0.2, 0.3, 0.6, 0.7], answerable=[False, True, True, True], right=[False, False, True, True])
>>> round(point.threshold, 4), point.precision
(0.45, 1.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from gemma_rag.curves import Counts, Labels, candidates
from gemma_rag.errors import InputError
from gemma_rag.intervals import between_0_and_1, binomial_interval, finite, special_functions

Interval = tuple[float, float]
Rule = Literal["best_f1", "precision", "coverage", "end_to_end", "guarantee", "estimate"]


class TooFewLabels(InputError):
    """A promise needs more labelled questions than there are.

    Args:
        have: How many unanswerable questions there are.
        need: How many it takes at the least.
        promise: What was to be promised, in words.
    """

    def __init__(self, have: int, need: int, promise: str) -> None:
        self.have, self.need, self.promise = have, need, promise
        super().__init__(
            f"{promise} takes at least {need} labelled questions that have no answer, and there are {have}: "
            f"add {need - have} more, or promise less"
        )

    def __reduce__(self) -> tuple[type[TooFewLabels], tuple[int, int, str]]:
        return type(self), (self.have, self.need, self.promise)


def _percent(share: float) -> str:
    return f"{100 * share:.{4 if share > 0.99 else 3}g} %"


_REASONS: dict[Rule, str] = {
    "best_f1": "With the best balance of precision and recall",
    "precision": "With answers as often as a precision of {target} allows",
    "coverage": "With answers to at least {target} of the answerable questions",
    "end_to_end": "With as many questions ending well as possible, {end_to_end} of them",
    "guarantee": "With the promise, at {confidence} confidence, that of all questions like these without an answer at most "
    "{target} get one",
    "estimate": "Estimated from the documents, where each stands for a question and is then held out",
}


class OperatingPoint(BaseModel):
    """A threshold, why it stands there, and what it does on labelled questions.

    Each measured share stands beside its exact 95 % interval (`binomial_interval`), which says how far the truth may be
    from it because the labels are few. It takes the threshold as given: on the labels that chose the threshold the
    shares are a little too good, and `judge` measures them on others.

    Attributes:
        rule: What chose the threshold.
        threshold: A question is answered if its score is at least this.
        target: The precision, the coverage or the rate of false answers that was asked for; None for the other rules.
        confidence: Of the promise; None for the other rules.
        coverage: Share of the answerable questions that are answered; None without answerable ones.
        coverage_interval: Its 95 % interval; None where the share is, here and below.
        precision: Share of the answered questions whose first hit is right; None where nothing is answered.
        precision_interval: Its 95 % interval.
        false_answers: Share of the unanswerable questions that are answered; None without unanswerable ones.
        false_answers_interval: Its 95 % interval, two-sided: for a promise it may reach a little above the promised rate.
        end_to_end: Share of all questions that end well: the right document first, or rightly silent.
        end_to_end_interval: Its 95 % interval.
        answerable: How many answerable questions judged it.
        unanswerable: How many unanswerable ones did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rule: Rule
    threshold: float
    target: float | None = None
    confidence: float | None = None
    coverage: float | None
    coverage_interval: Interval | None
    precision: float | None
    precision_interval: Interval | None
    false_answers: float | None
    false_answers_interval: Interval | None
    end_to_end: float
    end_to_end_interval: Interval
    answerable: int = Field(ge=0)
    unanswerable: int = Field(ge=0)

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if (self.target is None) == (self.rule in ("precision", "coverage", "guarantee")):
            raise ValueError("the rules precision, coverage and guarantee have a target, and the others have none")
        if (self.confidence is None) == (self.rule == "guarantee"):
            raise ValueError("the rule guarantee has a confidence, and the others have none")
        return self

    @property
    def statement(self) -> str:
        """What the threshold does, in a sentence for people who will not read this page."""
        shares = {name: _percent(getattr(self, name) or 0.0) for name in ("target", "confidence", "end_to_end")}
        parts = [f"{_REASONS[self.rule].format(**shares)} (threshold {self.threshold:.4f})"]
        if self.coverage is not None:
            parts.append(f"{_percent(self.coverage)} of the {self.answerable} answerable questions were answered")
        if self.false_answers is not None:
            parts.append(
                f"{_percent(self.false_answers)} of the {self.unanswerable} unanswerable ones were answered by mistake"
            )
        if self.precision is not None:
            parts.append(f"{_percent(self.precision)} of the answers had the right document first")
        return f"{', '.join(parts[:-1])}, and {parts[-1]}." if len(parts) > 2 else f"{', '.join(parts)}."


def _judged(labels: Labels, rule: Rule, threshold: float, target: float | None, confidence: float | None) -> OperatingPoint:
    answered = labels.scores >= threshold
    ends_well = np.where(answered, labels.right, ~labels.answerable)
    point: dict[str, object] = {"rule": rule, "threshold": threshold, "target": target, "confidence": confidence}
    for name, happened, among in (
        ("coverage", answered, labels.answerable),
        ("precision", labels.right, answered),
        ("false_answers", answered, ~labels.answerable),
        ("end_to_end", ends_well, np.ones_like(answered)),
    ):
        k, n = int((happened & among).sum()), int(among.sum())
        point[name] = k / n if n else None
        point[f"{name}_interval"] = binomial_interval(k, n) if n else None
    point["answerable"], point["unanswerable"] = int(labels.answerable.sum()), int((~labels.answerable).sum())
    return OperatingPoint.model_validate(point)


def estimate(threshold: float, scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike) -> OperatingPoint:
    """A threshold that was found without labels, measured on questions made from the documents.

    Raises:
        InputError: Scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _judged(Labels.read(scores, answerable, right), "estimate", threshold, None, None)


def judge(point: OperatingPoint, scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike) -> OperatingPoint:
    """The same threshold, measured on other labels than those that chose it.

    Raises:
        InputError: Scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _judged(Labels.read(scores, answerable, right), point.rule, point.threshold, point.target, point.confidence)


def _share(name: str, value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise InputError(f"the {name} to reach is above 0 and at most 1, for example 0.9, and is {value}")
    return value


def _place_f1(labels: Labels) -> float:
    if not labels.right.any():
        raise InputError("the best F1 needs questions whose first hit is right, and there are none among the labels: add some")
    counts = Counts.of(labels)
    f1 = 2 * counts.right / (counts.answered + counts.answerable[0])
    return float(counts.thresholds[np.flatnonzero(f1 == f1.max())[-1]])


def _place_precision(labels: Labels, target: float) -> float:
    counts = Counts.of(labels)
    precision = counts.right[:-1] / counts.answered[:-1]
    enough = np.flatnonzero(precision >= _share("precision", target))
    if not len(enough):
        best = int(precision.argmax())
        raise InputError(
            f"no threshold reaches a precision of {target}: the best is {precision[best]:.4f}, at a threshold of "
            f"{counts.thresholds[best]:.4f} with {counts.answered[best]} answers; ask for less, or improve the search"
        )
    return float(counts.thresholds[enough[0]])


def _place_coverage(labels: Labels, target: float) -> float:
    labels.need(True, "a coverage")
    counts = Counts.of(labels)
    return float(counts.thresholds[np.flatnonzero(counts.answerable / counts.answerable[0] >= _share("coverage", target))[-1]])


def _place_end_to_end(labels: Labels) -> float:
    labels.need(True, "the best end-to-end accuracy")
    labels.need(False, "the best end-to-end accuracy")
    counts, n = Counts.of(labels), len(labels.scores)
    accuracy = (counts.right + counts.unanswerable[0] - counts.unanswerable) / n
    best = accuracy.max()
    near = counts.thresholds[accuracy >= best - math.sqrt(best * (1 - best) / n) - 1e-12]
    return float(near[np.abs(near - near.mean()).argmin()])


def _place_guarantee(labels: Labels, rate: float, confidence: float) -> float:
    between_0_and_1("the rate of a promise", rate)
    between_0_and_1("the confidence of a promise", confidence)
    special, doubt = special_functions(), 1 - confidence
    falling = np.sort(labels.scores[~labels.answerable])[::-1]
    n = len(falling)
    refused = int((special.bdtr(np.arange(n), n, rate) <= doubt).sum())
    if not refused:
        need = max(n + 1, math.floor(math.log(doubt) / math.log1p(-rate)))
        while special.bdtr(0, need, rate) > doubt:
            need += 1
        promise = f"a promise of at most {_percent(rate)} with {_percent(confidence)} confidence"
        raise TooFewLabels(n, need, promise)
    thresholds = candidates(labels.scores)
    return float(thresholds[np.searchsorted(thresholds, falling[refused - 1], side="right")])


_PLACES: dict[Rule, Callable[..., float]] = {
    "best_f1": _place_f1,
    "precision": _place_precision,
    "coverage": _place_coverage,
    "end_to_end": _place_end_to_end,
    "guarantee": _place_guarantee,
}


def _place(labels: Labels, rule: Rule, target: float | None, confidence: float | None) -> float:
    return _PLACES[rule](labels, *(asked for asked in (target, confidence) if asked is not None))


def _chosen(labels: Labels, rule: Rule, target: float | None = None, confidence: float | None = None) -> OperatingPoint:
    return _judged(labels, rule, _place(labels, rule, target, confidence), target, confidence)


def best_f1(scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike) -> OperatingPoint:
    """The threshold with the best F1 of answering rightly.

    Precision is right answers over answers, recall is right answers over answerable questions, and F1 is their harmonic
    mean (van Rijsbergen 1979), ``2 * right / (answers + answerable)``. Of equally good thresholds it is the highest.

    Args:
        scores: One per question, shape ``(n,)``, higher is better.
        answerable: Whether the collection holds an answer, shape ``(n,)``.
        right: Whether the first hit holds it, shape ``(n,)``.

    Raises:
        InputError: No question is right, or scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _chosen(Labels.read(scores, answerable, right), "best_f1")


def for_precision(
    scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike, target: float = 0.9
) -> OperatingPoint:
    """The lowest threshold at which the share of right answers reaches a target.

    It just reaches the target on these labels, so on other questions it falls short about as often as not.
    `OperatingPoint.precision_interval` tells by how much it may: where its lower end is far below the target, the
    labels are too few to rely on. Judge it on other labels (`judge`), or ask for more than you need.

    Args:
        scores: As in `best_f1`, here and below.
        answerable: Whether the collection holds an answer.
        right: Whether the first hit holds it.
        target: Above 0, at most 1.

    Raises:
        InputError: No threshold reaches it (the message names the best precision), a target out of range, or scores
            and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _chosen(Labels.read(scores, answerable, right), "precision", target)


def for_coverage(scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike, target: float = 0.9) -> OperatingPoint:
    """The highest threshold that still answers a share of the answerable questions, rightly or not.

    Args:
        scores: As in `best_f1`.
        answerable: Whether the collection holds an answer.
        right: Whether the first hit holds it.
        target: Above 0, at most 1.

    Raises:
        InputError: No answerable question, a target out of range, or scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _chosen(Labels.read(scores, answerable, right), "coverage", target)


def best_end_to_end(scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike) -> OperatingPoint:
    """The threshold at which the most questions end well: the right document first, or rightly silent.

    The very best threshold of a few labels is mostly luck. This is the candidate nearest to the mean of all thresholds
    within one standard error of the best accuracy. On fresh questions (six simulated score distributions, each with
    two shares of unanswerable questions, and four sets of real scores) it lost 1.7, 1.1, 0.7, 0.4 and 0.2 percentage
    points against the best threshold possible with 20, 50, 100, 300 and 1,000 labels; the plain maximum lost 2.8, 1.7,
    1.1, 0.6 and 0.3, the middle of its plateau 2.3, 1.4, 1.0, 0.5 and 0.3. With 300 labels or more the maximum is ahead
    where scores have two humps or heavy tails, by up to 0.4 points.

    Args:
        scores: As in `best_f1`.
        answerable: Whether the collection holds an answer; both kinds are needed, in about the proportion to come.
        right: Whether the first hit holds it.

    Raises:
        InputError: No answerable or no unanswerable question, or scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _chosen(Labels.read(scores, answerable, right), "end_to_end")


def guarantee(
    scores: npt.ArrayLike, answerable: npt.ArrayLike, right: npt.ArrayLike, rate: float = 0.05, confidence: float = 0.95
) -> OperatingPoint:
    """The lowest threshold with a promise: of the questions that have no answer, at most `rate` get one.

    Of n labelled questions without an answer, the threshold stands above the (k+1)-th largest score, where k is the
    largest number with ``BinomialCDF(k; n, rate) <= 1 - confidence`` (Wilks 1941; the same as asking that the
    Clopper-Pearson bound of the false answers stays within the rate): if more than the rate got an answer, so few of n
    would be seen with a chance of at most ``1 - confidence``. It holds for every distribution of scores, ties included.

    The promise is about questions drawn like the labelled ones, with the same collection, model and settings; the
    confidence is over the draw of the labels: of a hundred sets of labels, about five may break a promise at 0.95.

    Args:
        scores: As in `best_f1`.
        answerable: Whether the collection holds an answer; the promise rests on the questions that have none.
        right: Whether the first hit holds it.
        rate: Between 0 and 1.
        confidence: Between 0 and 1.

    Raises:
        TooFewLabels: Too few unanswerable questions for any such promise: it takes 59 for 5 % with 95 % confidence.
        InputError: A rate or confidence out of range, or scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    return _chosen(Labels.read(scores, answerable, right), "guarantee", rate, confidence)


def per_group(
    scores: npt.ArrayLike,
    answerable: npt.ArrayLike,
    right: npt.ArrayLike,
    groups: Sequence[str | None],
    overall: OperatingPoint,
    prior: float = 50,
) -> dict[str, float]:
    """A threshold per group of questions, by the rule of the overall one and pooled towards it.

    A group with n labels gets ``n / (n + prior)`` of its own threshold and the rest of the overall one. It keeps the
    overall one where it lacks answerable or unanswerable questions, or where the rule finds no threshold in it. On four
    sets of real scores with 200 to 1,500 labels the prior of 50 changed F1 and end-to-end accuracy on fresh questions
    by -0.2 to +0.8 percentage points, no pooling by -3.2 to +0.8.

    For a promise (`guarantee`) no group goes below the overall threshold. The promise is about all questions together:
    a lower threshold would add false answers that it has not counted, a higher one can only take some away.

    Args:
        scores: As in `best_f1`.
        answerable: Whether the collection holds an answer.
        right: Whether the first hit holds it.
        groups: The group of each question, such as the category of its first hit; None for no group.
        overall: The threshold of all questions, which brings the rule.
        prior: How many labels make a group's own threshold count as much as the overall one, at least 0.

    Returns:
        A threshold for each group that occurs, by name.

    Raises:
        InputError: Groups that are not one per question, a negative prior, or scores and labels that cannot be used.
        MissingExtra: scipy is not installed.
    """
    labels = Labels.read(scores, answerable, right)
    if len(groups) != len(labels.scores):
        raise InputError(f"each of the {len(labels.scores)} scores needs a group or None, and there are {len(groups)} groups")
    if not (math.isfinite(prior) and prior >= 0):
        raise InputError(f"the prior of the groups counts labels, so it is at least 0, and is {prior}")
    thresholds = {}
    for group in sorted({group for group in groups if group is not None}):
        some = labels[np.array([group == other for other in groups])]
        thresholds[group] = overall.threshold
        if some.answerable.all() or not some.answerable.any():
            continue
        try:
            own = _place(some, overall.rule, overall.target, overall.confidence)
        except InputError:
            continue
        weight = len(some.scores) / (len(some.scores) + prior)
        pooled = weight * own + (1 - weight) * overall.threshold
        thresholds[group] = max(pooled, overall.threshold) if overall.rule == "guarantee" else pooled
    return thresholds


@dataclass(frozen=True)
class Flips:
    """The questions that a moved threshold treats otherwise.

    Attributes:
        newly_answered: Places in the list of scores, rising.
        newly_refused: Likewise.
    """

    newly_answered: npt.NDArray[np.intp]
    newly_refused: npt.NDArray[np.intp]


def flips(scores: npt.ArrayLike, old: float, new: float) -> Flips:
    """Which questions change sides when the threshold moves from `old` to `new`.

    Raises:
        InputError: Scores or thresholds that are no finite numbers.
    """
    numbers, (before, after) = finite("the scores", scores), finite("the thresholds", [old, new])
    was, now = numbers >= before, numbers >= after
    return Flips(np.flatnonzero(now & ~was), np.flatnonzero(was & ~now))
