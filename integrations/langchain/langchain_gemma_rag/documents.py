"""Documents of LangChain and hits of gemma-rag, each made from the other."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from langchain_core.documents import Document

from gemma_rag import documents as core
from gemma_rag.results import Hit, Retrieval

SCORE = "score"
"""Where the metadata of a document has its score."""
CATEGORY = "category"
TITLE = "title"
ROUNDING = 1e-3
"""How far beyond 1 a store's rounding may put a cosine."""
_OF_THE_QUESTION = (SCORE, "category_score", "fused_score")
"""What the metadata say of the question and not of the document."""


class Retrieved(list[Document]):
    """The documents that were found, and why they are not more, or none.

    A list like any other, so that all of LangChain takes it. A list that is made of it, such as a slice, has no `retrieval`.

    Args:
        documents: What was found, best first.
        retrieval: What the retriever says of it.

    Attributes:
        retrieval: Scores, categories, near misses, thresholds and the outcome (`gemma_rag.results.Retrieval`).
    """

    retrieval: Retrieval

    def __init__(self, documents: Iterable[Document] = (), retrieval: Retrieval | None = None) -> None:
        super().__init__(documents)
        if retrieval is not None:  # tracers of older langchain-core copy lists by their class, with the elements alone
            self.retrieval = retrieval

    @classmethod
    def of(cls, retrieval: Retrieval) -> Retrieved:
        """The hits of a retrieval as documents."""
        return cls(map(as_document, retrieval.hits), retrieval)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), getattr(self, "retrieval", None))


def as_document(hit: Hit) -> Document:
    """A hit as a document of LangChain: the passage that fits the question, and in its metadata where it comes from.

    ``title``, ``category``, ``score``, ``category_score`` (None where there was no stage one), and where there are some
    ``headings`` and ``fused_score``, stand beside the metadata of the document itself. Where that has a key of the same
    name, ours wins; the other is still in ``Retrieved.retrieval``.
    """
    metadata = {
        **copy.deepcopy(hit.document.metadata),
        TITLE: hit.document.title,
        CATEGORY: hit.document.category,
        SCORE: float(hit.score),
        "category_score": None if math.isnan(hit.category_score) else float(hit.category_score),
    }
    if hit.headings:
        metadata["headings"] = list(hit.headings)
    if hit.fused_score is not None:
        metadata["fused_score"] = float(hit.fused_score)
    return Document(id=hit.document.id, page_content=hit.passage, metadata=metadata)


def as_hit(document: Document) -> Hit:
    """A document that any retriever found as a hit; what its metadata does not say is left empty, and its score is 0.

    A score beyond -1 to 1 is no cosine, and counts as none.
    """
    score = as_score(document.metadata.get(SCORE)) or 0.0
    category = document.metadata.get(CATEGORY)
    return Hit(
        document=core.Document(
            id=document_id(document),
            text=core.whole_text(document.page_content),
            title=core.whole_text(document.metadata.get(TITLE) or ""),
            category=core.whole_text(category) if isinstance(category, str) and category.strip() else core.UNCATEGORISED,
            metadata=core.plain_metadata(document.metadata),
        ),
        score=min(1.0, max(-1.0, score)) if abs(score) <= 1.0 + ROUNDING else 0.0,
        category_score=math.nan,
        passage=core.whole_text(document.page_content),
    )


def as_score(value: Any) -> float | None:
    """A score as it stands in metadata: a finite number, and no truth value; None for anything else."""
    if not isinstance(value, (int, float, np.floating)) or isinstance(value, bool):
        return None
    return float(value) if is_finite(value) else None


def is_finite(value: Any) -> bool:
    """Whether a number is one that a float can hold: no NaN, no infinity, and no integer beyond them."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def document_id(document: Document, key: str | None = None) -> str:
    """What to call a document: its id, else what its metadata has under a key, else a digest of what it holds.

    Halves of characters (lone surrogates) in an id become question marks, as they do in a text.

    Args:
        document: The document.
        key: Where a store that returns documents without ids puts its own.
    """
    own = document.id if document.id is not None else document.metadata.get(key) if key is not None else None
    if own is not None and str(own).strip():
        return core.whole_text(own)
    held = json.dumps([document.page_content, core.plain_metadata(document.metadata)], sort_keys=True)
    return hashlib.sha256(held.encode()).hexdigest()[:32]


def each_once(documents: Iterable[Document]) -> list[Document]:
    """Documents without those that came before: of the same id and text, or, without ids, of the same text and metadata.

    Retrievers that ask several questions bring one document for each of them, with the score of each.
    """
    first: dict[tuple[str, str], Document] = {}
    for document in documents:
        own = {key: value for key, value in document.metadata.items() if key not in _OF_THE_QUESTION}
        name = document_id(Document(document.page_content, id=document.id, metadata=own))
        first.setdefault((name, document.page_content), document)
    return list(first.values())
