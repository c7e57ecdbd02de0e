"""How few components of a vector a knowledge base can be searched by: measured on its own documents, and then put to use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_rag.errors import InputError
from gemma_rag.index.planning import PlanReport, plan_for
from gemma_rag.labelled import Labelled
from gemma_rag.passages import sentences
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.search import Search
from gemma_rag.thresholds import FixedThreshold

if TYPE_CHECKING:
    from gemma_rag.knowledge_base import KnowledgeBase

QUESTIONS = 200
"""Questions that are asked, at most."""

_MANY, _MUCH = 200, 0.15
"""Categories from which on, and share of the documents above which, the report says that the gate opens too much."""


def plan(
    base: KnowledgeBase,
    *,
    target_overlap: float = 0.99,
    questions: Iterable[Labelled | Mapping[str, Any] | str] | None = None,
    retriever: TwoStageRetriever | None = None,
    seed: int = 0,
    keep: bool = True,
) -> PlanReport:
    """Choose how the documents of the opened categories are searched, by measuring on this knowledge base.

    The first components of each vector make a shortlist, all of them rank it; thresholds see the full cosine. The report
    says what every setting cost and how many of the exact search's best documents it found.

    Args:
        base: What will be searched.
        target_overlap: Share, above 0 to 1, of the exact search's best ``k`` documents that has to be found on average.
        questions: Questions that people ask. None: titles, or first sentences, of up to 200 of its documents.
        retriever: How it will be searched: its ``k`` and its gate; the default one otherwise.
        seed: Of the choice of documents.
        keep: Commit the plan, so that it is in force from now on.

    Raises:
        InputError: There is nothing to measure on, the target is out of its range, or a database keeps the vectors.
    """
    if not 0.0 < target_overlap <= 1.0:
        raise InputError(f"target_overlap is above 0 and at most 1, and is {target_overlap}")
    if base.manifest.engine.name != "faiss":
        raise InputError(f"{base.manifest.engine.name} keeps these vectors and plans its searches itself")
    if not len(base):
        raise InputError("the knowledge base is empty: index documents, then plan")
    retriever = retriever if retriever is not None else TwoStageRetriever(base)
    asked = _asked(base, seed) if questions is None else [_text(item) for item in questions][:QUESTIONS]
    if not asked:
        raise InputError("there is no question to measure with: give some, or leave them out")
    [(_, settings), *_] = retriever.plan(asked, mode="two-stage")
    search = Search(base, settings, None, None)
    queries, classification = search.encoded(asked, classify=True)
    gates = search.gated(classification, queries, FixedThreshold(-1.0))
    opened = np.stack([gate.opened for gate in gates])
    report = plan_for(base.view().index, queries, opened, settings.k, target_overlap, wanted=search.wanted)
    share = report.documents / len(base)
    if settings.max_categories is None and len(search.view.categories) >= _MANY and share > _MUCH:
        report = replace(
            report,
            why=f"{report.why}. The gate opens {share:.0%} of the documents for a question, since there are so many "
            "categories: max_categories=50 opens fewer, and may hide some answers",
        )
    if keep:
        base.use_plan(report.plan)
    return report


def _asked(base: KnowledgeBase, seed: int) -> list[str]:
    """A question for each of some documents: its title, or else its first sentence."""
    view = base.view()
    alive = np.arange(len(view.index.documents)) if view.index.alive is None else np.flatnonzero(view.index.alive)
    chosen = np.sort(np.random.default_rng(seed).permutation(alive)[:QUESTIONS])
    numbers = view.index.documents[chosen].tolist()
    documents = view.documents(numbers)
    return [
        documents[number].title.strip() or next(iter(sentences(documents[number].text)), documents[number].text)
        for number in numbers
    ]


def _text(item: Labelled | Mapping[str, Any] | str) -> str:
    if isinstance(item, str):
        return item
    return item.question if isinstance(item, Labelled) else str(item["question"])
