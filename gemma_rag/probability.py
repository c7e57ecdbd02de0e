"""The probability that a first hit is right, learned from scores with known answers."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from gemma_rag.curves import Flags, two_classes
from gemma_rag.intervals import Scores, finite, optional_module


class ProbabilityMap(BaseModel):
    """From a score to the probability that the first hit is right; never falling as the score rises.

    Attributes:
        kind: ``platt``, a logistic curve, or ``isotonic``, straight lines between knots.
        slope: Of the logistic curve ``1 / (1 + exp(-(slope * score + intercept)))``, at least 0; None for the other kind.
        intercept: Its intercept; None for the other kind.
        knots: ``(score, probability)``, both rising, level outside; None for the other kind.
        clip: No probability is nearer than this to 0 or 1: ``1 / (n + 2)`` for n labels, since n labels cannot tell rarer
            things from impossible ones.
        log_loss: Mean of ``-log`` of the probability given to what happened, cross-validated; lower is better.
        brier: Mean squared difference of probability and outcome, cross-validated; lower is better.
        labels: How many labels it was fitted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["platt", "isotonic"]
    slope: float | None = Field(default=None, ge=0)
    intercept: float | None = None
    knots: tuple[tuple[float, float], ...] | None = None
    clip: float = Field(gt=0, lt=0.5)
    log_loss: float = Field(ge=0)
    brier: float = Field(ge=0)
    labels: int = Field(ge=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        curve = self.slope is not None and self.intercept is not None and self.knots is None
        lines = self.slope is None and self.intercept is None and bool(self.knots)
        if not (curve if self.kind == "platt" else lines):
            raise ValueError("a platt map has a slope and an intercept and no knots, an isotonic one has only knots")
        x, y = np.array(self.knots or [(0.0, 0.0)]).T
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or y[0] < 0 or y[-1] > 1:
            raise ValueError("the knots of an isotonic map must rise, with probabilities from 0 to 1")
        return self

    def apply(self, scores: npt.ArrayLike) -> Scores:
        """The probabilities of scores, shape ``(n,)``, each from `clip` to ``1 - clip``.

        Raises:
            InputError: Scores that are no finite numbers.
        """
        numbers = finite("the scores", scores)
        if self.knots is not None:
            x, y = np.array(self.knots).T
            raw = np.interp(numbers, x, y)
        else:
            raw = _logistic(numbers, self.slope or 0.0, self.intercept or 0.0)
        clipped: Scores = np.clip(raw, self.clip, 1 - self.clip)
        return clipped


def _logistic(scores: Scores, slope: float, intercept: float) -> Scores:
    result: Scores = 0.5 * (1 + np.tanh((slope * scores + intercept) / 2))
    return result


FEW = 75
"""With fewer labels of the rarer outcome, isotonic regression is not tried: over ten score distributions, trying it made
the log loss on fresh questions worse below this number, no different up to 100, and better above."""


def _platt(scores: Scores, right: Flags) -> tuple[float, float]:
    """Slope and intercept that fit Platt's smoothed targets with the highest likelihood, the slope not below 0."""
    yes, no = int(right.sum()), int((~right).sum())
    targets = np.where(right, (yes + 1) / (yes + 2), 1 / (no + 2))
    mean, spread = float(scores.mean()), float(scores.std())
    scale = spread if spread > 1e-12 * max(1.0, abs(mean)) else math.inf  # what differs by rounding alone is equal
    x = (scores - mean) / scale

    def loss(at: Scores) -> tuple[float, list[float]]:
        z, gap = at[0] * x + at[1], _logistic(x, at[0], at[1]) - targets
        return float((np.logaddexp(0.0, z) - targets * z).mean()), [float((gap * x).mean()), float(gap.mean())]

    minimize = optional_module("scipy.optimize", "which fits probabilities").minimize
    bounds, precision = [(0.0, None), (None, None)], {"ftol": 1e-14, "gtol": 1e-9}
    slope, intercept = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=bounds, options=precision).x
    return float(slope / scale), float(intercept - slope * mean / scale)


def _fitted(
    kind: Literal["platt", "isotonic"], scores: Scores, right: Flags, log_loss: float = 0.0, brier: float = 0.0
) -> ProbabilityMap:
    n = len(scores)
    if kind == "platt":
        slope, intercept = _platt(scores, right)
        return ProbabilityMap(
            kind=kind, slope=slope, intercept=intercept, clip=1 / (n + 2), log_loss=log_loss, brier=brier, labels=n
        )
    regression = optional_module("sklearn.isotonic", "which fits probabilities").IsotonicRegression(y_min=0, y_max=1)
    regression.fit(scores, right.astype(np.float64))
    knots = tuple(zip(regression.X_thresholds_.tolist(), regression.y_thresholds_.tolist(), strict=True))
    return ProbabilityMap(kind=kind, knots=knots, clip=1 / (n + 2), log_loss=log_loss, brier=brier, labels=n)


def fit_probability(scores: npt.ArrayLike, right: npt.ArrayLike, seed: int = 0) -> ProbabilityMap:
    """Learn the probability that a first hit is right from its score.

    A logistic curve (Platt 1999, with his smoothed targets) and isotonic regression (Zadrozny and Elkan, KDD 2002) are
    both fitted, and the one with the lower log loss in a five-fold cross-validation is kept; with few labels (`FEW`)
    only the curve. Scores that are higher for wrong hits give a map that is level, at about the share of right ones.

    Args:
        scores: Shape ``(n,)``.
        right: Whether the first hit was right, shape ``(n,)``.
        seed: Of the shuffling into folds.

    Raises:
        InputError: All are right or all are wrong, or scores and labels that cannot be used.
        MissingExtra: scipy or scikit-learn is not installed.
    """
    numbers, flags = two_classes("a probability", scores, right, ("right", "wrong"))
    shuffled = np.random.default_rng(seed).permutation(len(numbers))
    folds = np.empty(len(numbers), dtype=np.intp)
    folds[shuffled[np.argsort(flags[shuffled], kind="stable")]] = np.arange(len(numbers)) % 5  # each with both outcomes
    enough = min(flags.sum(), (~flags).sum()) >= FEW
    losses: dict[Literal["platt", "isotonic"], tuple[float, float]] = {}
    for kind in ("platt", "isotonic") if enough else ("platt",):
        given = np.empty(len(numbers))
        for fold in np.unique(folds):
            out = folds == fold
            given[out] = _fitted(kind, numbers[~out], flags[~out]).apply(numbers[out])
        log_loss = -np.log(np.where(flags, given, 1 - given)).mean()
        losses[kind] = float(log_loss), float(((given - flags) ** 2).mean())
    best = min(losses, key=lambda kind: losses[kind][0])
    return _fitted(best, numbers, flags, *losses[best])
