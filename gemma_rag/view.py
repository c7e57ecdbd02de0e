"""One generation of a knowledge base, in the form that a search needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_rag.documents import Chunk, Document
from gemma_rag.index.exact import ExactIndex
from gemma_rag.lexical import Counted, LexicalIndex, Vocabulary
from gemma_rag.routing import Summaries, Tree, summarize
from gemma_rag.storage import Snapshot, Store
from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Words:
    """The counted terms of documents by their numbers, which never change their texts: kept from one generation to the next."""

    def __init__(self) -> None:
        self._vocabulary = Vocabulary()
        self._counted: dict[int, Counted] = {}

    def index(self, numbers: Sequence[int], store: Store) -> LexicalIndex:
        """BM25 over documents, in the order of their numbers given; only new ones are read and counted.

        Args:
            numbers: Of the documents.
            store: To fetch texts from.
        """
        known = self._counted  # another thread may put another in its place meanwhile
        new = store.documents([number for number in numbers if number not in known])
        counted = {number: self._vocabulary.count(f"{new[number].title}\n{new[number].text}") for number in new}
        now = {number: known[number] if number in known else counted[number] for number in numbers}
        self._counted = now
        return LexicalIndex(list(now.values()), self._vocabulary)


class View:
    """One generation of a knowledge base, ready to be searched. What costs time is computed once, when first needed.

    Args:
        snapshot: The generation.
        store: To fetch texts from.
        words: What was counted of its documents before, if anything was.

    Attributes:
        categories: Their names, sorted.
        index: The vectors.
        guests: int64 of shape ``(m, 2)``: the place of a document, and a further category that it belongs to.
    """

    def __init__(self, snapshot: Snapshot, store: Store, words: Words | None = None) -> None:
        self._store = store
        self._words = words if words is not None else Words()
        self.snapshot = snapshot
        self.categories: tuple[str, ...] = tuple(item.category.name for item in snapshot.categories)
        self.index = ExactIndex(snapshot.vectors, snapshot.documents, snapshot.codes, len(self.categories))
        rows, codes = snapshot.guests.T
        self.guests: Ints = np.unique(np.stack([self.index.row_places[rows], codes], axis=1), axis=0)

    def places_in(self, opened: Bools) -> Bools:
        """Which documents belong to one of the opened categories.

        Args:
            opened: Shape ``(categories,)``.
        """
        inside: Bools = opened[self.index.codes]
        if len(self.guests):
            inside = inside.copy()
            inside[self.guests[opened[self.guests[:, 1]], 0]] = True
        return inside

    @cached_property
    def tree(self) -> Tree:
        """The categories as paths."""
        return Tree(self.categories)

    @cached_property
    def names(self) -> tuple[Floats, Ints]:
        """Vectors of names with descriptions and of example questions, and the node of the tree that each belongs to."""
        vectors = [item.vectors for item in self.snapshot.categories]
        if not vectors:
            return np.zeros((0, self.snapshot.vectors.shape[1]), dtype=np.float32), np.zeros(0, dtype=np.int64)
        ends = np.cumsum([len(rows) for rows in vectors])
        own = [np.arange(end - len(rows), end) for end, rows in zip(ends.tolist(), vectors, strict=True)]
        nodes = self.tree.spread(own)
        stacked = np.concatenate(vectors)[np.concatenate(nodes)]
        return stacked, np.repeat(np.arange(len(nodes)), [len(rows) for rows in nodes]).astype(np.int64)

    @cached_property
    def summaries(self) -> Summaries:
        """What stage one knows of the documents below each node of the tree."""
        bounds = np.searchsorted(self.snapshot.codes, np.arange(len(self.categories) + 1))
        guests = self.snapshot.guests
        members = [
            np.concatenate([np.arange(bounds[code], bounds[code + 1]), guests[guests[:, 1] == code, 0]])
            if len(guests)
            else np.arange(bounds[code], bounds[code + 1])
            for code in range(len(self.categories))
        ]
        return summarize(self.snapshot.vectors, self.tree.spread(members))

    @cached_property
    def lexical(self) -> LexicalIndex:
        """BM25 over the documents, with their titles, in the order of the index's places."""
        return self._words.index(self.index.documents.tolist(), self._store)

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
