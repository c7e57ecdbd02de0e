"""What the page about a calibration shows, from its report."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_rag.calibrating import CalibrationReport
from gemma_rag.curves import precision_recall, roc
from gemma_rag.learned import Calibration, Kind, KindCalibration
from gemma_rag.observing import Observed

_BINS = 10


def page_of(found: CalibrationReport, before: Calibration | None = None) -> dict[str, Any]:
    """What `gemma_rag.report.write_calibration_page` takes, for the kind of search with the most questions.

    Args:
        found: What calibrating found.
        before: The calibration that it replaces: questions flip against what it did. None: against answering everything.
    """
    kind = max(found.calibration.kinds, key=lambda name: len(found.observed[name].places))
    some, item, scores = found.observed[kind], found.calibration.kinds[kind], found.evidence[kind]
    points = [item.document, *item.points]
    replaced = None if before is None else before.kinds.get(kind)
    alike = replaced is not None and replaced.evidence == item.evidence
    old = replaced.document.threshold if replaced is not None and alike else None
    page: dict[str, Any] = {
        "title": f"Thresholds of {kind} search" + (", estimated without labels" if found.calibration.estimated else ""),
        "points": [{**point.model_dump(mode="json"), "statement": point.statement} for point in points],
        "chosen": item.document.rule,
        "stages": {"document": _stage(scores, some, item.document.threshold, old)},
        "flips": _flips(found, kind, replaced),
        "notes": list(found.notes),
    }
    if item.category is not None:
        page["stages"]["category"] = _stage(some.category_scores, some, item.category.threshold, None)
    if item.probability is not None:
        page["reliability"] = _reliability(item, scores, some)
    return page


def _stage(scores: Any, some: Observed, threshold: float, old: float | None) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "scores": scores.tolist(),
        "answerable": some.answerable.tolist(),
        "threshold": threshold,
        "old_threshold": old,
    }
    if some.answerable.any() and not some.answerable.all():
        falling, both = roc(scores, some.answerable), precision_recall(scores, some.answerable)
        stage["roc"] = {"x": falling.false_positive_rate.tolist(), "y": falling.true_positive_rate.tolist()}
        stage["precision_recall"] = {"x": both.recall.tolist(), "y": both.precision.tolist()}
    return stage


def _reliability(item: KindCalibration, scores: Any, some: Observed) -> dict[str, list[float]]:
    """Predicted probabilities in ten bins of equal width against how many were right."""
    predicted = item.probability.apply(scores) if item.probability is not None else np.zeros(0)
    bins = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    rows = [(predicted[bins == b], some.right[bins == b]) for b in range(_BINS) if (bins == b).any()]
    return {
        "predicted": [float(p.mean()) for p, _ in rows],
        "observed": [float(r.mean()) for _, r in rows],
        "count": [len(p) for p, _ in rows],
    }


def _answered(item: KindCalibration, scores: Any, some: Observed) -> Any:
    """Which questions a calibration answers, bool of shape ``(n,)``."""
    return scores >= np.array([item.document.threshold if name is None else item.threshold(name) for name in some.groups])


def _flips(found: CalibrationReport, kind: Kind, replaced: KindCalibration | None) -> dict[str, list[dict[str, Any]]]:
    some, scores = found.observed[kind], found.evidence[kind]
    now = _answered(found.calibration.kinds[kind], scores, some)
    known = replaced is not None and set(replaced.evidence.features) <= some.values.keys()
    was = (
        _answered(replaced, replaced.evidence.score(some.values), some) if replaced is not None and known else np.ones_like(now)
    )

    def row(i: int) -> dict[str, Any]:
        return {
            "question": found.questions[some.places[i]].question,
            "score": float(scores[i]),
            "answerable": bool(some.answerable[i]),
            "right": bool(some.right[i]),
        }

    return {
        "newly_answered": [row(i) for i in np.flatnonzero(now & ~was).tolist()],
        "newly_refused": [row(i) for i in np.flatnonzero(was & ~now).tolist()],
    }
