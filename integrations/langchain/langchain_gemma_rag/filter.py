"""Thresholds over the documents of any retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from gemma_rag.errors import InputError
from gemma_rag.prompts import Task
from gemma_rag.thresholds import Threshold, as_threshold
from gemma_rag.vectors import cosines, unit
from langchain_gemma_rag.assignment import Steady
from langchain_gemma_rag.cache import gemma_embeddings
from langchain_gemma_rag.documents import ROUNDING, SCORE, TITLE, as_score

if TYPE_CHECKING:
    ThresholdLike = float | str | Threshold
else:
    ThresholdLike = Any  # pydantic cannot look into a protocol; `as_threshold` does


class ThresholdFilter(Steady, BaseDocumentCompressor):
    """Keeps the documents whose scores are good enough, in their order.

    Goes into a `ContextualCompressionRetriever` around any retriever. Scores are the cosines that the documents have in
    their metadata, as those of our `TwoStageRetriever` do, or, with `embeddings`, computed from the texts; then all of
    them are, and copies of the documents carry them in their metadata. What comes in is never changed.

    The presets ``strict`` 0.85, ``balanced`` 0.72 and ``loose`` 0.58 are meant for symmetric sentence similarity: is this
    ticket the same as that one? Give them `embeddings` and ``symmetric=True``. A question and its answer are less alike:
    use a number near 0.4, or a calibrated one, there.

    Example:
        >>> from langchain_core.documents import Document
        >>> from langchain_gemma_rag import ThresholdFilter
        >>> found = [Document("one", metadata={"score": 0.6}), Document("two", metadata={"score": 0.3})]
        >>> [document.page_content for document in ThresholdFilter(threshold=0.4).compress_documents(found, "question")]
        ['one']

    Raises:
        ValidationError: A threshold that is none, or ``symmetric`` without `embeddings`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True, validate_assignment=True)

    threshold: ThresholdLike = Field(
        description="A cosine, -1 to 1; the name of a preset; `dynamic`; or any `gemma_rag.thresholds.Threshold`."
    )
    score_key: str = Field(default=SCORE, min_length=1, description="Where the metadata has the score, or gets it.")
    embeddings: Embeddings | None = Field(default=None, description="Computes the scores. None: they are in the metadata.")
    symmetric: bool = Field(
        default=False,
        description="Embed both sides alike: with the similarity prompt of a `GemmaEmbeddings`, as two documents with others.",
    )

    @field_validator("threshold")
    @classmethod
    def _is_threshold(cls, value: Any) -> Any:
        as_threshold(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.symmetric and self.embeddings is None:
            raise InputError("symmetric says how texts are embedded, and there are no embeddings: give embeddings=...")
        return self

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        shown: list[tuple[str | None, Any]] = [("threshold", self.threshold)]
        return shown if self.embeddings is None else [*shown, ("embeddings", type(self.embeddings).__name__)]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Keep the documents that are good enough.

        Args:
            documents: What a retriever found.
            query: The question; read only with `embeddings`.
            callbacks: Not needed: no model is called that reports.

        Returns:
            Those that reach the threshold, in the order in which they came.

        Raises:
            InputError: A document has no score, or a text cannot be embedded.
        """
        if self.embeddings is None or not documents:
            return self._kept(documents, self._given(documents))
        texts = [document.page_content for document in documents]
        if self.symmetric:
            ours = gemma_embeddings(self.embeddings)
            both = [query, *texts]
            rows = self.embeddings.embed_documents(both) if ours is None else ours.embed(both, Task.SIMILARITY)
        else:
            titles = _titles(self.embeddings, documents)
            rows = [self.embeddings.embed_query(query), *self.embeddings.embed_documents(texts, **titles)]
        return self._scored(documents, rows)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """`compress_documents` without holding up the event loop."""
        if self.embeddings is None or not documents:
            return self._kept(documents, self._given(documents))
        texts = [document.page_content for document in documents]
        if self.symmetric:
            ours = gemma_embeddings(self.embeddings)
            both = [query, *texts]
            rows = await self.embeddings.aembed_documents(both) if ours is None else await ours.aembed(both, Task.SIMILARITY)
        else:
            titles = _titles(self.embeddings, documents)
            question = await self.embeddings.aembed_query(query)
            rows = [question, *await self.embeddings.aembed_documents(texts, **titles)]
        return self._scored(documents, rows)

    def _given(self, documents: Sequence[Document]) -> list[float]:
        """The scores that the documents have."""
        scores = []
        for place, document in enumerate(documents):
            score = as_score(has := document.metadata.get(self.score_key))
            if score is None:
                name = f"the document {document.id!r}" if document.id else f"the document at index {place}"
                what = "no score" if has is None else f"the score {has!r}, which is no finite number,"
                raise InputError(
                    f"{name} has {what} in its metadata under {self.score_key!r}: name the key under which the retriever puts "
                    "it (score_key=...), or have the scores computed (embeddings=...)"
                )
            if abs(score) > 1.0 + ROUNDING:
                raise InputError(
                    f"the document {document.id or place!r} has the score {score:g} in its metadata under {self.score_key!r}, "
                    "which is no cosine: name the key that has one (score_key=...), or have scores computed (embeddings=...)"
                )
            scores.append(score)
        return scores

    def _scored(self, documents: Sequence[Document], rows: npt.ArrayLike | Sequence[Sequence[float]]) -> list[Document]:
        """The documents with the cosines of their rows and the first one, those that are good enough."""
        vectors = unit(rows)
        scores: list[float] = cosines(vectors[:1], vectors[1:])[0].tolist()
        copies = [
            document.model_copy(update={"metadata": {**document.metadata, self.score_key: score}})
            for document, score in zip(documents, scores, strict=True)
        ]
        return self._kept(copies, scores)

    def _kept(self, documents: Sequence[Document], scores: list[float]) -> list[Document]:
        keep = as_threshold(self.threshold).apply(scores).keep.tolist()
        return [document for document, good in zip(documents, keep, strict=True) if good]


def _titles(embeddings: Embeddings, documents: Sequence[Document]) -> dict[str, Any]:
    """The documents' titles, for embeddings that put them into the prompt."""
    if gemma_embeddings(embeddings) is None:
        return {}
    return {"titles": [str(document.metadata.get(TITLE) or "") for document in documents]}
