"""Learning from labelled questions how to order documents: the weight of words, and a router where it earns its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.intervals import optional_module
from gemma_rag.judging import best
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Labelled, as_labelled, check_ids, texts
from gemma_rag.learned import Learned, Ranking, Router
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.search import LEXICAL_WEIGHT, Search, Settings, searching
from gemma_rag.thresholds import FixedThreshold
from gemma_rag.vectors import Floats

LEXICAL_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ROUTER_WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
"""What is tried. The router's weights are for cosines and lexical scores that sum to about 1."""

FEWEST = 20
"""Labelled questions, at least, from which anything is learned."""

_CANDIDATES = 200
"""Documents of each question among which orders are compared: the best by cosine and by words."""

_MOST_CATEGORIES = 1_000
_MOST_ROWS = 20_000
"""Beyond these a router would take minutes to fit: it is left out, or fitted on a sample of the documents."""

_SURE = 2.0
"""Standard errors by which a router has to be better to be kept. The weight of words, one number, has to be by one."""

_PENALTY = 10.0
"""``C`` of scikit-learn's logistic regression: unit vectors need little regularisation."""

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FitReport:
    """What fitting found.

    Attributes:
        questions: How many labelled questions were used.
        lexical_weight: Share of words in the order.
        router_weight: Weight of the router's log-probability; 0: it stepped aside.
        before: Mean reciprocal rank at 10 with the default order, on these questions.
        after: The same as fitted, on questions held out of the router's training.
        notes: What its reader should know.
    """

    questions: int
    lexical_weight: float
    router_weight: float
    before: float
    after: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Case:
    """The candidates of one question."""

    query: Floats
    cosines: Doubles
    words: Doubles
    places: Ints
    search: Search
    relevant: npt.NDArray[np.bool_]
    target: int


def fit_router(
    base: KnowledgeBase, labelled: Iterable[Labelled | Mapping[str, Any]], *, folds: int = 5, seed: int = 0, keep: bool = True
) -> FitReport:
    """Learn from labelled questions how to order documents.

    A logistic regression learns the category of a question from the vectors of the documents and of the questions
    (under the query prompt); its log-probability is added to a document's score with a weight. That weight and the weight
    of words are those with the best mean reciprocal rank at 10, where each question is judged by a router that has not
    seen it. Zero is among the weights, and wins unless another is better by more than two standard errors: a router
    that does not help steps aside. What was calibrated before is forgotten, since it held for another order.

    Args:
        base: What to learn for.
        labelled: Questions with the ids of the documents that answer them; those without an answer are passed over.
        folds: Parts that the questions are cut into for judging, at least 2.
        seed: Of that cut.
        keep: Commit it to the knowledge base's folder.

    Raises:
        InputError: Fewer than 20 questions with an answer, or a label names a document that is not there, or a database keeps
            the vectors.
        MissingExtra: scikit-learn is not installed.
    """
    if base.manifest.engine.name != "faiss":
        raise InputError(
            f"{base.manifest.engine.name} keeps these vectors, and fitting reads all of them: copy the knowledge base into a "
            "folder with `gemma-rag copy`, fit there, and copy it back with what it has learned"
        )
    labelled = as_labelled(labelled)
    check_ids(labelled, {document.id for document in base})
    usable = [item for item in labelled if item.answerable]
    parts = TwoStageRetriever(base, k=10).plan(texts(usable)) if usable else []
    readable = [(places, settings) for places, settings in parts if settings.mode == "two-stage"]
    usable = [usable[i] for places, _ in readable for i in places]
    if len(usable) < FEWEST:
        raise InputError(
            f"fitting needs {FEWEST} questions with an answer, in a language that the model reads, and got {len(usable)}"
        )
    cases = _cases(base, usable, readable[0][1])
    notes: list[str] = []
    routed = _routed(base, cases, folds, seed, notes)
    trials = {
        (weight, share): np.array([_reciprocal_rank(case, weight, share, log) for case, log in zip(cases, routed, strict=True)])
        for weight in LEXICAL_WEIGHTS
        for share in (ROUTER_WEIGHTS if routed[0] is not None else (0.0,))
    }
    weight, share = _best_weights(trials)
    router = _fit(base, cases, seed) if share else None
    view = base.view()
    ranking = Ranking(
        lexical_weight=weight,
        router_weight=share,
        categories=view.categories,
        fingerprint=base.manifest.fingerprint,
        questions=len(cases),
        trials={f"{w} {s}": float(values.mean()) for (w, s), values in trials.items()},
    )
    if base.learned.calibration is not None:
        notes.append("the calibration was forgotten, since it held for another order: calibrate again")
    base.learn(Learned(ranking, router), keep=keep)
    return FitReport(
        questions=len(cases),
        lexical_weight=weight,
        router_weight=share,
        before=float(trials[LEXICAL_WEIGHT, 0.0].mean()),
        after=float(trials[weight, share].mean()),
        notes=tuple(notes),
    )


def _cases(base: KnowledgeBase, usable: Sequence[Labelled], settings: Settings) -> list[_Case]:
    """Search for each question with thresholds off, and keep its candidates."""
    search = searching(base, settings._replace(lexical_weight=LEXICAL_WEIGHT), None, None)
    search.learned = Learned()
    queries, _ = search.encoded(texts(usable), classify=False)
    view = search.view
    documents = view.documents(view.index.documents.tolist())
    place = {documents[number].id: i for i, number in enumerate(view.index.documents.tolist())}
    cases = []
    for item, query, found in zip(usable, queries, search.find(texts(usable), FixedThreshold(-1.0)), strict=True):
        words = np.zeros(len(found.scored.places)) if found.words is None else found.words.astype(np.float64)
        cosines = found.scored.scores.astype(np.float64)
        chosen = np.union1d(best(cosines, words, _CANDIDATES), best(words, cosines, _CANDIDATES))
        places = found.scored.places[chosen]
        relevant = np.array([place[i] for i in item.relevant], dtype=np.int64)
        cases.append(
            _Case(
                query=query,
                cosines=cosines[chosen],
                words=words[chosen],
                places=places,
                search=search,
                relevant=np.isin(places, relevant),
                target=int(view.index.codes[relevant[0]]),
            )
        )
    return cases


def _routed(base: KnowledgeBase, cases: Sequence[_Case], folds: int, seed: int, notes: list[str]) -> list[Doubles | None]:
    """For each question the log-probability of its candidates' categories, by a router that has not seen the question."""
    search = cases[0].search
    used = np.unique(search.view.rows[1])
    count = len(np.unique([*used, *(case.target for case in cases)]))
    if len(used) < 2 or count > _MOST_CATEGORIES:
        notes.append(f"no router was fitted: there are {count} categories, and it takes from 2 to {_MOST_CATEGORIES:,}")
        return [None] * len(cases)
    order = np.random.default_rng(seed).permutation(len(cases))
    out: list[Doubles | None] = [None] * len(cases)
    for part in np.array_split(order, min(max(2, folds), len(cases))):
        rest = [cases[i] for i in np.setdiff1d(order, part).tolist()]
        router = _fit(base, rest, seed)
        log = router.log_probabilities(np.stack([cases[i].query for i in part.tolist()]))
        for i, row in zip(part.tolist(), log, strict=True):
            out[i] = search.of_categories(row, cases[i].places).astype(np.float64)
    return out


def _fit(base: KnowledgeBase, cases: Sequence[_Case], seed: int) -> Router:
    linear = optional_module("sklearn.linear_model", "fitting a router")
    view = base.view()
    rows, codes = view.rows
    if len(rows) > _MOST_ROWS:  # as many of each category, so that small ones are not lost
        rng = np.random.default_rng(seed)
        shuffled = rng.permutation(len(rows))
        rank = np.zeros(len(rows), dtype=np.int64)
        for code in range(len(view.categories)):
            own = shuffled[codes[shuffled] == code]
            rank[own] = np.arange(len(own))
        chosen = np.sort(np.argsort(rank, kind="stable")[:_MOST_ROWS])
        rows, codes = rows[chosen], codes[chosen]
    vectors = np.concatenate([view.index.vectors(rows), np.stack([case.query for case in cases])])
    codes = np.concatenate([codes, [case.target for case in cases]])
    model = linear.LogisticRegression(C=_PENALTY, max_iter=500).fit(vectors, codes)
    weights = np.zeros((len(view.categories), vectors.shape[1]), dtype=np.float32)
    bias = np.full(len(view.categories), -30.0, dtype=np.float32)  # a category that only guests live in has no row of its own
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        half = np.array([[-0.5], [0.5]])
        weights[model.classes_], bias[model.classes_] = half * model.coef_, (half * model.intercept_)[:, 0]
    else:
        weights[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
    return Router(view.categories, weights, bias)


def _reciprocal_rank(case: _Case, weight: float, share: float, log: Doubles | None) -> float:
    """Of the first relevant document among the first ten; 0 without one."""
    score = (1.0 - weight) * case.cosines + weight * case.words
    if log is not None and share:
        score = score + share * log
    if not case.relevant.any():
        return 0.0
    top = score[case.relevant].max()
    rank = 1.0 + int((score > top).sum()) + int((score[~case.relevant] == top).sum()) / 2.0  # of equal ones in the middle
    return 1.0 / rank if rank <= 10 else 0.0


def _best_weights(trials: dict[tuple[float, float], Doubles]) -> tuple[float, float]:
    """The best pair, unless a simpler one is as good: no router before one, the default weight of words before another."""

    def top(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        return max(pairs, key=lambda pair: (trials[pair].mean(), -abs(pair[0] - LEXICAL_WEIGHT), -pair[1]))

    default = (LEXICAL_WEIGHT, 0.0)
    chosen = default
    for pairs, errors in (([pair for pair in trials if pair[1] == 0.0], 1.0), (list(trials), _SURE)):
        candidate = top(pairs)
        gain = trials[candidate] - trials[chosen]
        if gain.mean() > errors * gain.std() / np.sqrt(len(gain)):
            chosen = candidate
    return chosen
