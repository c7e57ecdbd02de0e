"""What a search makes of labelled questions, thresholds off: the ground that thresholds are chosen on and judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import InputError
from gemma_rag.judging import Judge, best
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Labelled, texts
from gemma_rag.learned import Kind
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.search import Found, Search, Settings, searching
from gemma_rag.thresholds import FixedThreshold

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FEATURES: dict[Kind, tuple[str, ...]] = {
    "dense": ("cosine",),
    "hybrid": ("cosine", "lexical", "coverage"),
    "lexical": ("lexical", "coverage"),
}
"""What evidence is made of, by the way of scoring; a learned router adds ``router``."""


@dataclass(frozen=True)
class Observed:
    """What a search made of labelled questions of one kind, thresholds off; arrays of one entry per question.

    Attributes:
        places: Which of the questions given these are.
        answerable: bool, shape ``(n,)``.
        right: Whether the first document is relevant, bool, shape ``(n,)``.
        groups: The category of the first document; None where nothing was found.
        category_scores: The best category's score, shape ``(n,)``; NaN without a stage one.
        values: The features of the first document, each of shape ``(n,)``.
        fused: Its fused score, which it was ordered by, shape ``(n,)``.
        weights: The weight of each feature in that.
    """

    places: tuple[int, ...]
    answerable: Bools
    right: Bools
    groups: tuple[str | None, ...]
    category_scores: Doubles
    values: dict[str, Doubles]
    fused: Doubles
    weights: dict[str, float]

    def some(self, rows: npt.NDArray[Any]) -> Observed:
        """Some of the questions."""
        chosen = np.arange(len(self.fused))[rows]
        return Observed(
            tuple(self.places[i] for i in chosen),
            self.answerable[chosen],
            self.right[chosen],
            tuple(self.groups[i] for i in chosen),
            self.category_scores[chosen],
            {name: values[chosen] for name, values in self.values.items()},
            self.fused[chosen],
            self.weights,
        )

    def beside(self, other: Observed) -> Observed:
        """The questions of both."""
        join = np.concatenate
        return Observed(
            self.places + other.places,
            join([self.answerable, other.answerable]),
            join([self.right, other.right]),
            self.groups + other.groups,
            join([self.category_scores, other.category_scores]),
            {name: join([values, other.values[name]]) for name, values in self.values.items()},
            join([self.fused, other.fused]),
            self.weights,
        )


def observe(
    base: KnowledgeBase,
    labelled: Sequence[Labelled],
    retriever: TwoStageRetriever | None = None,
    *,
    held_out: bool = False,
    watch: Callable[[int, Search, Found], None] | None = None,
) -> dict[Kind, Observed]:
    """Search for labelled questions with thresholds off, and note what is known of the first document of each.

    Args:
        base: Where to search.
        labelled: The questions.
        retriever: How to search; the default retriever of the knowledge base otherwise.
        held_out: Search as if the relevant documents were not there.
        watch: Called with the place of each question, the search and what it found.

    Raises:
        InputError: The retriever belongs to another knowledge base.
    """
    retriever = retriever or TwoStageRetriever(base)
    if retriever.knowledge_base is not base:
        raise InputError("the retriever searches another knowledge base than the one that is observed")
    out: dict[Kind, Observed] = {}
    for places, settings in retriever.plan(texts(labelled)):
        kind, observed = _observe_alike(base, labelled, tuple(places), settings, held_out, watch)
        out[kind] = observed
    return out


def _observe_alike(
    base: KnowledgeBase,
    labelled: Sequence[Labelled],
    places: tuple[int, ...],
    settings: Settings,
    held_out: bool,
    watch: Callable[[int, Search, Found], None] | None,
) -> tuple[Kind, Observed]:
    search = searching(base, settings._replace(category_threshold=-1.0, document_threshold=-1.0), None, None)
    judging = Judge(search)
    names = (*FEATURES[search.kind], *(("router",) if search.learned.router is not None else ()))
    rows: list[dict[str, float]] = []
    groups: list[str | None] = []
    asked = [labelled[i] for i in places]
    for at, item, found in zip(places, asked, search.find(texts(asked), FixedThreshold(-1.0)), strict=True):
        if watch is not None:
            watch(at, search, found)
        relevant = set(item.relevant)
        is_relevant = np.array([name in relevant for name in search.view.ids[found.scored.places].tolist()], dtype=bool)
        order = np.where(is_relevant, -np.inf, found.order) if held_out else found.order
        first = best(order, found.scored.scores, 1)
        if held_out:
            first = first[~is_relevant[first]]
        values = judging.features(item.question, found, first, names)
        scores = found.gated.scores[search.eligible]
        groups.append(search.view.categories[search.view.index.codes[found.scored.places[first[0]]]] if len(first) else None)
        rows.append(
            {name: float(values[name][0]) if len(first) else 0.0 for name in names}
            | {
                "right": float(len(first) and not held_out and is_relevant[first[0]]),
                "fused": float(found.order[first[0]]) if len(first) else 0.0,
                "category": float(scores.max()) if len(scores) else np.nan,
            }
        )
    column = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in (*names, "right", "fused", "category")}
    return search.kind, Observed(
        places=places,
        answerable=np.array([item.answerable and not held_out for item in asked], dtype=bool),
        right=column["right"] > 0,
        groups=tuple(groups),
        category_scores=column["category"],
        values={name: column[name] for name in names},
        fused=column["fused"],
        weights=search.weights(),
    )
