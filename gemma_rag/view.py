"""One generation of a knowledge base, in the form that a search needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from gemma_rag.documents import Chunk, Document
from gemma_rag.index.exact import ExactIndex
from gemma_rag.lexical import LexicalIndex
from gemma_rag.routing import centroids
from gemma_rag.storage import Snapshot, Store
from gemma_rag.vectors import Floats


class View:
    """One generation of a knowledge base, ready to be searched. What costs time is computed once, when first needed.

    Args:
        snapshot: The generation.
        store: To fetch texts from.
    """

    def __init__(self, snapshot: Snapshot, store: Store) -> None:
        self._store = store
        self.snapshot = snapshot
        self.categories: tuple[str, ...] = tuple(item.category.name for item in snapshot.categories)
        self.index = ExactIndex(snapshot.vectors, snapshot.documents, snapshot.codes, len(self.categories))

    @cached_property
    def names(self) -> Floats:
        """Vectors of the categories' names and descriptions, shape ``(categories, d)``."""
        rows = [item.vector for item in self.snapshot.categories]
        return np.stack(rows) if rows else np.zeros((0, self.snapshot.vectors.shape[1]), dtype=np.float32)

    @cached_property
    def centroids(self) -> Floats:
        """Directions of the means of the categories' chunks, shape ``(categories, d)``."""
        return centroids(self.snapshot.vectors, self.snapshot.codes, len(self.categories))

    @cached_property
    def lexical(self) -> LexicalIndex:
        """BM25 over the chunks, with their titles, in the order of the index's rows."""
        places = self._store.chunk_places(self.snapshot.chunks.tolist())
        documents = self._store.documents(self.index.documents.tolist())
        texts = []
        for chunk, number in zip(self.snapshot.chunks.tolist(), self.snapshot.documents.tolist(), strict=True):
            document, place = documents[number], places[chunk]
            texts.append(f"{place.title(document.title)}\n{document.text[place.start : place.end]}")
        return LexicalIndex(texts)

    @cached_property
    def metadata(self) -> dict[int, dict[str, Any]]:
        """Metadata of every document, by its number."""
        return self._store.metadata()

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by their numbers."""
        return self._store.documents(numbers)

    def chunk_places(self, rows: Sequence[int]) -> dict[int, Chunk]:
        """Chunks by their rows in the index."""
        numbers = {row: int(self.snapshot.chunks[row]) for row in rows}
        places = self._store.chunk_places(list(numbers.values()))
        return {row: places[number] for row, number in numbers.items()}
