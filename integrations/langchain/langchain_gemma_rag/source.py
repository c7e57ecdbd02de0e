"""A vector store of LangChain with its embeddings, as a source of the two stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from gemma_rag import documents as core
from gemma_rag.embeddings import GemmaEmbeddings
from gemma_rag.errors import InputError
from gemma_rag.external import Candidate, Within
from gemma_rag.search import Scalar
from gemma_rag.store_scores import Metric, check_metric, check_norm, cosine_of
from gemma_rag.vectors import Floats
from langchain_gemma_rag.cache import gemma_embeddings
from langchain_gemma_rag.documents import document_id, is_finite
from langchain_gemma_rag.stores import KINDS, find_kind

StoreSearch: TypeAlias = Callable[[list[float], int, dict[str, list[Scalar]]], Sequence[tuple[Document, float]]]
"""How to search a store that is not known: a vector, how many entries at most, and for each key of the metadata the values
that it may have (none for all entries), to documents with their scores, best first."""


class StoreSource:
    """A vector store of LangChain with its embeddings, as the two stages need it (`gemma_rag.external.VectorSource`).

    Args:
        store: The store.
        embeddings: What filled it; None for those that it holds.
        category_key: Where the metadata of an entry names its category.
        title_key: Where it has a title, if it has one.
        metric: What the store calls a score, instead of what the table says.
        search: How to search a store that is not in the table. What it finds outside the categories asked for is dropped.

    Raises:
        InputError: A store that is not known, without `metric` and `search`; or no embeddings.
    """

    def __init__(
        self,
        store: VectorStore,
        *,
        embeddings: Embeddings | None = None,
        category_key: str = "category",
        title_key: str = "title",
        metric: Metric | None = None,
        search: StoreSearch | None = None,
    ) -> None:
        self.store = store
        self.name = type(store).__name__
        self.category_key, self.title_key = category_key, title_key
        self._needs_category = True
        self._filters = True
        self._fits: int | None = None  # dimensions that were found to be those of the store
        self._kind = find_kind(store)
        self._metric = None if metric is None else check_metric(metric)
        if search is not None and metric is not None:
            self._search: Callable[[list[float], int, Within], Sequence[tuple[Document, float]]] = _own(search)
            self._filters = False  # it may have done so, and is not trusted to have
        elif self._kind is not None and search is None:
            self._search = partial(self._kind.search, store)
        else:
            raise InputError(_how_to_name(store))
        self.embeddings = self._checked(embeddings if embeddings is not None else getattr(store, "embeddings", None))
        self.metric()  # a metric without cosines is refused now, not at the first question

    def __repr__(self) -> str:
        return f"<{self.name}, {type(self.embeddings).__name__}>"

    def without_categories(self) -> StoreSource:
        """The same store for a search without a stage one: entries need no category."""
        other = copy.copy(self)
        other._needs_category = False
        return other

    @property
    def ours(self) -> GemmaEmbeddings | None:
        """The embeddings, where they are our own."""
        return gemma_embeddings(self.embeddings)

    def metric(self) -> Metric | None:
        """What the store calls a score; None as long as it holds nothing and has not decided."""
        if self._metric is None and self._kind is not None:
            self._metric = self._kind.metric(self.store)
        return self._metric

    def embed_question(self, question: str) -> Sequence[float]:
        """The vector of a question.

        Raises:
            InputError: It has not norm 1, and the store's scores are cosines for such vectors only; or it has other dimensions
                than the store's.
        """
        vector = self.embeddings.embed_query(question)
        normalises = self._kind is not None and self._kind.normalises(self.store)
        if not normalises:
            check_norm(vector, self.metric(), model=type(self.embeddings).__name__, store=self.name)
        self._check_dimensions(len(vector))
        return vector

    def _check_dimensions(self, asked: int) -> None:
        if self._kind is None or asked == self._fits:
            return
        stored = self._kind.dimensions(self.store)
        if stored not in (None, asked):
            raise InputError(
                f"{type(self.embeddings).__name__} gives a question a vector of {asked} dimensions, and those in {self.name} "
                f"have {stored}: give the embeddings that filled the store (embeddings=...), with the same dimensions"
            )
        self._fits = None if stored is None else asked

    def search(self, vector: Floats, k: int, within: Within) -> list[Candidate]:
        """The entries that come closest to a vector, as `gemma_rag.external.VectorSource.search` says.

        Raises:
            InputError: An entry cannot be used, a score is no cosine, or a filter asks for a number that is not finite.
        """
        for key, values in within.items():
            if not all(is_finite(value) for value in values if isinstance(value, (int, float))):
                raise InputError(
                    f"a filter asks for a {key!r} that is infinite, no number, or beyond 1.8e308, which no vector store holds: "
                    "ask for finite numbers"
                )
        row: list[float] = vector.tolist()
        found = self._search(row, k, within)
        metric = self.metric()
        if metric is None:  # nothing is in it
            return []
        candidates = [Candidate(self._entry(document), cosine_of(score, metric)) for document, score in found]
        if self._filters or self.category_key not in within:
            return candidates
        names = {str(name).strip() for name in within[self.category_key]}
        return [each for each in candidates if each.document.category in names]

    def _entry(self, document: Document) -> core.Document:
        name = document_id(document, None if self._kind is None else self._kind.id_key(self.store))
        category = document.metadata.get(self.category_key)
        if not self._needs_category and category is None:
            category = core.UNCATEGORISED
        if not isinstance(category, str) or not category.strip():
            has = "has no" if category is None else f"has {category!r} and not a name as its"
            raise InputError(
                f"the entry {name!r} of {self.name} {has} category in its metadata under {self.category_key!r}: name the key "
                f"that has it (category_key=...; there are {', '.join(map(repr, document.metadata)) or 'none'}), or give "
                "every entry one"
            )
        if not document.page_content.strip():
            raise InputError(f"the entry {name!r} of {self.name} has no text: delete it from the store")
        return core.Document(
            id=name,
            text=core.whole_text(document.page_content),
            title=core.whole_text(document.metadata.get(self.title_key) or ""),
            category=core.whole_text(category),
            metadata=core.plain_metadata(document.metadata),
        )

    def _checked(self, embeddings: Any) -> Embeddings:
        if isinstance(embeddings, Embeddings):
            return embeddings
        if embeddings is None:
            raise InputError(f"{self.name} does not say what embeds its questions: give the embeddings that filled it")
        what = "several" if isinstance(embeddings, (list, tuple)) else f"a {type(embeddings).__name__} as"
        raise InputError(
            f"{self.name} has {what} embeddings, and the two stages compare by one dense vector: give embeddings=..."
        )


def _own(search: StoreSearch) -> Callable[[list[float], int, Within], Sequence[tuple[Document, float]]]:
    return lambda vector, k, within: search(vector, k, {key: list(values) for key, values in within.items()})


def _how_to_name(store: object) -> str:
    known = ", ".join(f"{kind.class_name} ({kind.package})" for kind in KINDS)
    return (
        f"what the scores of {type(store).__name__} ({type(store).__module__}) mean is not known; known are {known}. Say it: "
        'metric="cosine-distance" or another metric of gemma_rag.store_scores, and search=, a function of a vector, a number '
        "of entries and a filter ({key: [values]}, empty for none) that returns (document, score) pairs"
    )
