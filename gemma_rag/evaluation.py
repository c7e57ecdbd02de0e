"""How good retrieval is on a data set: what it finds, what stage one costs, and how well it knows when to be silent."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from gemma_rag import __version__
from gemma_rag.calibrating import CalibrationReport, calibrate
from gemma_rag.curves import auroc, precision_recall, risk_coverage, roc
from gemma_rag.encoders import CachedEncoder, Encoder
from gemma_rag.errors import InputError
from gemma_rag.fitting import fit_router
from gemma_rag.intervals import bootstrap_interval, bootstrap_statistic, paired_test
from gemma_rag.judging import best
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Dataset, Labelled, check_ids
from gemma_rag.learned import Kind, Learned
from gemma_rag.metrics import ranking_metrics
from gemma_rag.observing import Observed, observe
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate
from gemma_rag.search import Found, Search

EvaluationMode: TypeAlias = Literal["two-stage", "flat", "classic", "lexical"]
RouterChoice: TypeAlias = Literal["none", "learned"]
Doubles = npt.NDArray[np.float64]

DEPTH = 10
_WORST = 20
_RESAMPLES = 1_000
_PER_QUESTION = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")

PLAIN = (
    *_PER_QUESTION,
    "category_accuracy",
    "routing_loss",
    "documents_scored",
    "abstention_auroc",
    "risk_coverage_area",
    "end_to_end",
)
"""The numbers of an evaluation, by their plain names."""


@dataclass(frozen=True)
class Evaluation:
    """One way of searching, measured on one split of a data set.

    Attributes:
        result: Everything, as plain JSON; `gemma_rag.report.write_report` takes it.
        per_question: For each number that is a mean over questions, its values: over the answerable questions, in their order;
            ``end_to_end`` and ``documents_scored`` over all.
    """

    result: dict[str, Any]
    per_question: dict[str, Doubles]

    def to_json(self) -> dict[str, Any]:
        """The numbers, without what is there for plots only."""
        return {
            key: value for key, value in self.result.items() if key not in ("curves", "answer_scores", "worst", "per_category")
        }


@dataclass
class _Trace:
    """What is noted of each question while it is searched for; see `_Watch`."""

    ranked: list[list[str]]
    reached: Doubles
    scored: Doubles
    best_category: list[str | None]


def evaluate(
    dataset: Dataset,
    base: KnowledgeBase,
    *,
    mode: EvaluationMode = "two-stage",
    hybrid: bool = False,
    router: RouterChoice = "none",
    split: str = "test",
    fit_on: str = "dev",
) -> Evaluation:
    """Measure one way of searching.

    What the knowledge base has learned before plays no part, and is in force again afterwards. Rankings are measured with
    thresholds off. The answer score, how sure the first document makes us that there is an
    answer, is calibrated on another split (`calibrate`, rule ``end_to_end``), and so is its threshold.

    Args:
        dataset: Documents and labelled questions.
        base: The knowledge base of these documents (`open_base`).
        mode: ``two-stage`` (by words where the model cannot read the question), ``flat`` (everything is searched),
            ``classic`` (the published naive form: one category, chosen by its name; no words) or ``lexical``.
        hybrid: Order by cosines and matching words together.
        router: ``learned`` fits the order to the labels of `fit_on`; ``none`` uses no labels for it.
        split: What is measured.
        fit_on: What is learned from; without such a split, nothing is calibrated.

    Returns:
        The evaluation. ``seconds`` counts the searching and judging of `split`, not the fitting.

    Raises:
        InputError: The split has no questions, or an argument out of its range.
        MissingExtra: ``gemma-rag[eval]`` is not installed.
    """
    if mode not in get_args(EvaluationMode) or router not in get_args(RouterChoice):
        raise InputError(f"mode is one of {get_args(EvaluationMode)} and router one of {get_args(RouterChoice)}")
    if mode == "classic" and (hybrid or router == "learned"):
        raise InputError("classic is the published form: it knows neither hybrid search nor a learned router")
    questions = dataset.split(split)
    check_ids(questions, {document.id for document in base})
    labels = [item for item in dataset.questions if item.split == fit_on != split]
    retriever = _retriever(base, mode, hybrid)
    notes: list[str] = []
    before = base.learned
    try:
        base.learn(Learned(), keep=False)
        if router == "learned":
            notes += _fitted(base, labels)
        calibration = _calibrated(base, labels, retriever, notes)
        base.learn(base.learned._replace(calibration=None), keep=False)
        started = time.perf_counter()
        trace = _Trace([[] for _ in questions], np.ones(len(questions)), np.zeros(len(questions)), [None] * len(questions))
        watch = _Watch(base, questions, trace)
        observed = observe(base, questions, retriever, watch=watch)
        seconds = time.perf_counter() - started
    finally:
        base.learn(before, keep=False)
    about = {
        "dataset": dataset.name,
        "model": base.space.model,
        "mode": mode,
        "hybrid": hybrid,
        "router": router,
        "split": split,
        "questions": _digest(questions),
        "thresholds_chosen_on": None if calibration is None else fit_on,
        "n_queries": len(questions),
        "n_answerable": sum(item.answerable for item in questions),
        "seconds": round(seconds, 2),
    }
    return _summed_up(about, questions, trace, observed, calibration, notes, routed=mode in ("two-stage", "classic"))


def compare(first: Evaluation, second: Evaluation) -> Evaluation:
    """The first evaluation, with a paired test of each number against the second on the same questions.

    Raises:
        InputError: They are of different questions.
    """
    for key in ("dataset", "split", "questions"):
        if first.result[key] != second.result[key]:
            raise InputError(f"only evaluations of the same questions compare, and the {key} differ")
    metrics = {}
    for name in (*_PER_QUESTION, "end_to_end", "documents_scored"):
        if name in first.per_question and name in second.per_question:
            test = paired_test(first.per_question[name], second.per_question[name])
            metrics[name] = {
                "first": float(first.per_question[name].mean()),
                "second": float(second.per_question[name].mean()),
                "difference": test.difference,
                "low": test.low,
                "high": test.high,
                "p_value": test.p_value,
            }
    comparison = {key: second.result[key] for key in ("mode", "hybrid", "router")} | {"metrics": metrics}
    return replace(first, result={**first.result, "comparison": comparison})


# -- searching ----------------------------------------------------------------------------------------------------------


def _retriever(base: KnowledgeBase, mode: EvaluationMode, hybrid: bool) -> TwoStageRetriever:
    if mode == "classic":
        return TwoStageRetriever(base, k=DEPTH, mode="two-stage", hybrid=False, gate=Gate(name_weight=1.0), max_categories=1)
    return TwoStageRetriever(base, k=DEPTH, mode="auto" if mode == "two-stage" else mode, hybrid=hybrid)


def _fitted(base: KnowledgeBase, labels: Sequence[Labelled]) -> list[str]:
    try:
        report = fit_router(base, labels, keep=False)
    except InputError as error:
        return [f"nothing was fitted: {error}"]
    weights = f"lexical weight {report.lexical_weight}, router weight {report.router_weight}"
    return [f"fitted on {report.questions} questions: {weights}", *report.notes]


def _calibrated(
    base: KnowledgeBase, labels: Sequence[Labelled], retriever: TwoStageRetriever, notes: list[str]
) -> CalibrationReport | None:
    try:
        return calibrate(base, labels, rule="end_to_end", retriever=retriever, keep=False)
    except InputError as error:
        notes.append(f"nothing was calibrated: {error}")
        return None


class _Watch:
    """Notes the ranking of each question, whether the gate let a relevant document be scored, and what that cost."""

    def __init__(self, base: KnowledgeBase, questions: Sequence[Labelled], trace: _Trace) -> None:
        self._questions = questions
        self._trace = trace
        self._documents = len(base)

    def __call__(self, at: int, search: Search, found: Found) -> None:
        scored = found.scored
        first = best(found.order, scored.scores, DEPTH)
        ids = search.view.ids
        self._trace.ranked[at] = ids[scored.places[first]].tolist()
        self._trace.scored[at] = scored.compared / self._documents
        relevant = set(self._questions[at].relevant)
        if relevant:
            self._trace.reached[at] = not relevant.isdisjoint(ids[scored.places].tolist())
        scores = found.gated.scores
        if len(scores) and np.isfinite(scores).all():
            self._trace.best_category[at] = search.view.categories[int(scores.argmax())]


# -- summing up ---------------------------------------------------------------------------------------------------------


def _summed_up(
    about: dict[str, Any],
    questions: Sequence[Labelled],
    trace: _Trace,
    observed: Mapping[Kind, Observed],
    calibration: CalibrationReport | None,
    notes: list[str],
    *,
    routed: bool,
) -> Evaluation:
    answerable = np.array([item.answerable for item in questions], dtype=bool)
    asked = [i for i, item in enumerate(questions) if item.answerable]
    values: dict[str, Doubles] = {"documents_scored": trace.scored}
    if asked:
        values |= ranking_metrics([trace.ranked[i] for i in asked], [set(questions[i].relevant) for i in asked])
        if routed:
            values["routing_loss"] = 1.0 - trace.reached[asked]
            gold = [questions[i].category for i in asked]
            pairs = [(trace.best_category[i], name) for i, name in zip(asked, gold, strict=True) if name is not None]
            if pairs and any(name for name, _ in pairs):
                values["category_accuracy"] = np.array([found == name for found, name in pairs], dtype=np.float64)
    scores = np.zeros(len(questions))
    answered = np.ones(len(questions), dtype=bool)
    right = np.zeros(len(questions), dtype=bool)
    point: dict[str, Any] | None = None
    for kind, some in observed.items():
        places = list(some.places)
        right[places] = some.right
        known = calibration.calibration.kinds.get(kind) if calibration is not None else None
        scores[places] = some.fused if known is None else known.evidence.score(some.values)
        if known is not None:
            cutoffs = np.array([known.document.threshold if name is None else known.threshold(name) for name in some.groups])
            answered[places] = scores[places] >= cutoffs
            if known.category is not None:
                answered[places] &= some.category_scores >= known.category.threshold
            point = {**known.document.model_dump(mode="json"), "statement": known.document.statement}
    if calibration is not None:
        values["end_to_end"] = np.where(answered, right, ~answerable).astype(np.float64)
    intervals = {name: list(bootstrap_interval(each, resamples=_RESAMPLES)) for name, each in values.items()}
    numbers: dict[str, Any] = {name: float(each.mean()) for name, each in values.items()}
    by_kind: dict[str, float] = {}
    curves: dict[str, Any] = {}
    if answerable.any() and not answerable.all():
        numbers["abstention_auroc"] = auroc(scores, answerable)
        intervals["abstention_auroc"] = list(bootstrap_statistic(auroc, scores, answerable, resamples=_RESAMPLES))
        for kind_name in sorted({item.kind for item in questions if not item.answerable}):
            chosen = answerable | np.array([item.kind == kind_name for item in questions])
            by_kind[kind_name] = auroc(scores[chosen], answerable[chosen])
        falling, both = roc(scores, answerable), precision_recall(scores, answerable)
        curves["roc"] = {"x": falling.false_positive_rate.tolist(), "y": falling.true_positive_rate.tolist()}
        curves["precision_recall"] = {"x": both.recall.tolist(), "y": both.precision.tolist()}
    risk = risk_coverage(scores, right)
    numbers["risk_coverage_area"] = risk.area
    curves["risk_coverage"] = {"coverage": risk.coverage.tolist(), "risk": risk.risk.tolist()}
    result = {
        **about,
        **{name: None if numbers.get(name) is None else round(numbers[name], 4) for name in PLAIN},
        "intervals": {name: [round(end, 4) for end in interval] for name, interval in intervals.items()},
        "auroc_by_kind": {name: round(value, 4) for name, value in by_kind.items()},
        "refused_by_kind": _refused(questions, answered) if calibration is not None else {},
        "operating_point": point,
        "notes": notes,
        "curves": curves,
        "answer_scores": {
            name: [round(float(s), 4) for s, item in zip(scores, questions, strict=True) if item.kind == name]
            for name in dict.fromkeys(item.kind for item in questions)
        },
        "per_category": _per_category(questions, trace, values, asked),
        "worst": _worst(questions, trace, scores, right),
    }
    return Evaluation(result, values)


def _digest(questions: Sequence[Labelled]) -> str:
    """What stands for a list of questions and their answers."""
    rows = [[item.question, item.relevant] for item in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _refused(questions: Sequence[Labelled], answered: npt.NDArray[np.bool_]) -> dict[str, float]:
    kinds = dict.fromkeys(item.kind for item in questions)
    return {
        name: round(float(np.mean([not a for a, item in zip(answered, questions, strict=True) if item.kind == name])), 4)
        for name in kinds
    }


def _per_category(
    questions: Sequence[Labelled], trace: _Trace, values: Mapping[str, Doubles], asked: Sequence[int]
) -> list[dict[str, Any]]:
    rows: dict[str, list[int]] = {}
    for n, i in enumerate(asked):
        rows.setdefault(questions[i].category or "", []).append(n)
    out = [
        {
            "name": name,
            "questions": len(places),
            "recall@1": round(float(values["recall@1"][places].mean()), 4),
            **({"routing_loss": round(float(values["routing_loss"][places].mean()), 4)} if "routing_loss" in values else {}),
        }
        for name, places in rows.items()
        if name
    ]
    return sorted(out, key=lambda row: (row["recall@1"], row["name"]))


def _worst(questions: Sequence[Labelled], trace: _Trace, scores: Doubles, right: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The questions that were answered wrongly with the highest answer scores."""
    wrong = [i for i in np.argsort(-scores, kind="stable").tolist() if not right[i]][:_WORST]
    return [
        {
            "question": questions[i].question,
            "expected": ", ".join(questions[i].relevant) or f"no answer ({questions[i].kind})",
            "got": trace.ranked[i][0] if trace.ranked[i] else "nothing",
            "score": round(float(scores[i]), 4),
        }
        for i in wrong
    ]


# -- the knowledge base of a data set -----------------------------------------------------------------------------------


def default_cache() -> Path:
    """Where vectors of data sets are kept: ``gemma-rag`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-rag"


def open_base(dataset: Dataset, embeddings: Encoder, cache: Path | None = None) -> KnowledgeBase:
    """The knowledge base of a data set's documents, from the cache where there is one.

    Args:
        dataset: The data set.
        embeddings: What embeds documents and questions.
        cache: A folder to keep vectors in, by space and content; None keeps nothing.
    """
    if cache is None:
        return KnowledgeBase.from_documents(dataset.documents, embeddings)
    content = hashlib.sha256("".join(document.content_hash + document.id for document in dataset.documents).encode())
    path = cache / f"{content.hexdigest()[:16]}-{embeddings.space.fingerprint[:16]}-{__version__}"
    if not path.is_dir():
        with KnowledgeBase.from_documents(dataset.documents, embeddings) as base:
            try:
                base.save(path)
            except InputError:
                if not path.is_dir():
                    raise  # else another process was faster
    return KnowledgeBase.open(path, CachedEncoder(embeddings, cache))
