"""What a retrieval says: what was kept, what was not and by how much, and why there is no answer where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from gemma_rag.documents import Document


class Outcome(str, Enum):
    """How a question ended."""

    ANSWERED = "answered"
    CATEGORY_BELOW_THRESHOLD = "category_below_threshold"
    DOCUMENT_BELOW_THRESHOLD = "document_below_threshold"
    FILTERED_OUT = "filtered_out"
    EMPTY_KNOWLEDGE_BASE = "empty_knowledge_base"
    DECLINED_BY_MODEL = "declined_by_model"
    NOTHING_RETRIEVED = "nothing_retrieved"

    @property
    def reason(self) -> str:
        """The outcome in a sentence."""
        return _REASONS[self]


_REASONS = {
    Outcome.ANSWERED: "Answered from the documents cited.",
    Outcome.CATEGORY_BELOW_THRESHOLD: "The question fits none of the categories well enough.",
    Outcome.DOCUMENT_BELOW_THRESHOLD: "A category fits, but no document in the opened ones is close enough to the question.",
    Outcome.FILTERED_OUT: "No document passes the filters.",
    Outcome.EMPTY_KNOWLEDGE_BASE: "The knowledge base holds no documents.",
    Outcome.DECLINED_BY_MODEL: "The language model found no answer in the documents.",
    Outcome.NOTHING_RETRIEVED: "The retriever found no documents.",
}


class CategoryScore(NamedTuple):
    """What stage one thought of a category.

    Attributes:
        name: The category.
        score: The best cosine that a document of it is expected to have, -1 to 1, blended with the cosine of its name;
            in lexical mode the score of its best document.
        kept: Whether its documents were searched.
        probability: Its share of a softmax over the scores, 0 to 1; 0 where the gate did not get as far, and in lexical mode.
        why: ``mass`` (the gate keeps the best categories up to a probability mass), ``rescue`` (opened afterwards, since
            it promised more than what the others held), ``words`` (only documents that match the question's words were
            compared), ``all`` (lexical mode), or empty.
    """

    name: str
    score: float
    kept: bool
    probability: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Hit:
    """A document that was kept.

    Attributes:
        document: The whole document.
        score: Cosine of the question and the document's best chunk; in lexical mode its lexical score.
        category_score: What stage one gave its category; NaN in flat mode, which has no stage one.
        passage: The text of that chunk.
        headings: The headings that the chunk stands under.
        lexical_score: Share of the best possible BM25 score, 0 to 1; None where words were not looked at.
        fused_score: What the hits are ordered by: ``(1 - w) * cosine + w * lexical``, plus the learned router's part where
            there is one; None where that is the score itself.
        evidence: What calibrated thresholds act on (`gemma_rag.learned.Evidence`); None without a calibration.
        probability: Of being a right answer, 0 to 1, as calibrated on labelled questions; None without a calibration.
        rerank_score: What the reranker gave it; None where there is none, or the hit was below its reach.
    """

    document: Document
    score: float
    category_score: float
    passage: str
    headings: tuple[str, ...] = ()
    lexical_score: float | None = None
    fused_score: float | None = None
    evidence: float | None = None
    probability: float | None = None
    rerank_score: float | None = None


@dataclass(frozen=True)
class NearMiss:
    """A document that was scored and fell short of the document threshold.

    Attributes:
        document: The whole document.
        score: As in `Hit`.
        category_score: As in `Hit`.
        margin: By how much it fell short, above 0, in the units of the score that the threshold acts on.
    """

    document: Document
    score: float
    category_score: float
    margin: float


@dataclass(frozen=True)
class Retrieval:
    """Everything about one question.

    Attributes:
        question: The question.
        outcome: `Outcome.ANSWERED` if there is a hit, else why there is none.
        mode: ``two-stage``, ``flat`` or ``lexical``; ``external`` where somebody else's retriever found the documents.
        hits: What was kept, best first.
        near_misses: What was scored and just failed, best first.
        categories: What stage one thought of each category, best first; empty in flat mode. Of more than 50, those that were
            opened or have a hit, and the best of the others.
        thresholds: What was in force at each stage, ``category`` and ``document``, as plain JSON, and what the latter
            ``acts_on``: ``cosine``, ``lexical`` or ``evidence``.
        documents_scored: How many documents stage two compared with the question.
        documents_total: How many the knowledge base holds; None where that is not known (`gemma_rag.external`).
        timings_ms: Milliseconds by step; questions asked together share the time of the steps that they share.
        notes: What else the reader of this result should know.
    """

    question: str
    outcome: Outcome
    mode: str
    hits: tuple[Hit, ...]
    near_misses: tuple[NearMiss, ...]
    categories: tuple[CategoryScore, ...]
    thresholds: dict[str, Any]
    documents_scored: int
    documents_total: int | None
    timings_ms: dict[str, float]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hits)

    @classmethod
    def of_hits(cls, question: str, hits: Sequence[Hit]) -> Retrieval:
        """What somebody else's retriever found: nothing is known but the hits, best first."""
        outcome = Outcome.ANSWERED if hits else Outcome.NOTHING_RETRIEVED
        return cls(question, outcome, "external", tuple(hits), (), (), {}, len(hits), None, {})

    def to_json(self) -> dict[str, Any]:
        """The retrieval as plain JSON."""
        return {
            "question": self.question,
            "outcome": self.outcome.value,
            "mode": self.mode,
            "categories": [
                {"name": c.name, "score": _number(c.score), "kept": c.kept, "probability": _number(c.probability), "why": c.why}
                for c in self.categories
            ],
            "hits": [
                {
                    **_about(hit.document),
                    "score": _number(hit.score),
                    "category_score": _number(hit.category_score),
                    "lexical_score": _number(hit.lexical_score),
                    "fused_score": _number(hit.fused_score),
                    "evidence": _number(hit.evidence),
                    "probability": _number(hit.probability),
                    "rerank_score": _number(hit.rerank_score),
                    "headings": list(hit.headings),
                    "text": hit.passage,
                }
                for hit in self.hits
            ],
            "near_misses": [
                {**_about(miss.document), "score": _number(miss.score), "margin": _number(miss.margin)}
                for miss in self.near_misses
            ],
            "thresholds": self.thresholds,
            "documents_scored": self.documents_scored,
            "documents_total": self.documents_total,
            "notes": list(self.notes),
            "timings_ms": {step: round(ms, 3) for step, ms in self.timings_ms.items()},
        }


def _about(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "title": document.title,
        "category": document.category,
        "also_in": list(document.also_in),
        "metadata": document.metadata,
    }


def _number(value: float | None) -> float | None:
    """Four decimals; null where there is none, since JSON has no NaN."""
    return None if value is None or value != value else round(float(value), 4)
