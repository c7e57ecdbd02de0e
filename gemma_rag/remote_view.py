"""One generation of a knowledge base in a vector database, in the form that a search needs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from gemma_rag import lexical
from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError
from gemma_rag.index.remote import RemoteRow, document_of
from gemma_rag.lexical import LexicalIndex, tokenize
from gemma_rag.routing import Overview
from gemma_rag.storage.base import StoredCategory
from gemma_rag.storage.catalogue import Words, summaries_of
from gemma_rag.storage.remote import RemoteStore
from gemma_rag.vectors import Floats
from gemma_rag.view import Bools, Ints, View, name_vectors


class RemoteWords(LexicalIndex):
    """BM25 by the statistics of the whole collection, for texts that are at hand.

    Args:
        words: The statistics.
    """

    def __init__(self, words: Words) -> None:
        super().__init__([])
        self._words = words
        self._mean = words.length / words.documents if words.length else 1.0

    def weight(self, term: str) -> float:
        """The inverse document frequency of a term, as `LexicalIndex` has it."""
        n = self._words.frequency(np.uint64(lexical._hash(term)))
        return float(np.log(1.0 + (self._words.documents - n + 0.5) / (n + 0.5)))

    def scores_of(self, question: str, texts: Sequence[str]) -> Floats:
        """What `LexicalIndex.scores` would give these texts, shape ``(texts,)``.

        Args:
            question: The question.
            texts: Titles and texts.
        """
        weights = {term: times * self.weight(term) for term, times in Counter(tokenize(question)).items()}
        bound = sum(weights.values())
        out = np.zeros(len(texts), dtype=np.float32)
        for i, text in enumerate(texts if bound else ()):
            terms = Counter(tokenize(text))
            longer = lexical._K1 * (1.0 - lexical._B + lexical._B * terms.total() / self._mean)
            out[i] = sum(weight / bound * terms[term] / (terms[term] + longer) for term, weight in weights.items())
        return np.minimum(out, 1.0)


class _Growing:
    """An array of whole numbers that grows at its end.

    Args:
        width: Columns; 0 for one dimension.
    """

    def __init__(self, width: int = 0) -> None:
        self._space = np.zeros((64, width) if width else 64, dtype=np.int64)
        self._count = 0

    def append(self, value: Any) -> None:
        """Put a value, or a row of values, at the end."""
        if self._count == len(self._space):
            self._space = np.concatenate([self._space, np.zeros_like(self._space)])
        self._space[self._count] = value
        self._count += 1

    @property
    def values(self) -> Ints:
        """What there is."""
        return self._space[: self._count]


class Candidates:
    """The rows that one call of a search has seen so far, under the names that `EmbeddedIndex` gives them.

    Places number the documents, rows the chunks, in the order in which they came; a document's number is its place.

    Args:
        store: To fetch from.
        code_of: The code of each category.

    Attributes:
        alive: None: all are.
    """

    alive: Bools | None = None

    def __init__(self, store: RemoteStore, code_of: dict[str, int]) -> None:
        self._store = store
        self._code_of = code_of
        self._rows: list[RemoteRow] = []
        self._row_of: dict[str, int] = {}
        self._place_of: dict[str, int] = {}
        self._of_place: list[list[int]] = []
        self._codes, self._guests = _Growing(), _Growing(2)
        self._documents: dict[int, Document] = {}

    def row(self, row: RemoteRow) -> tuple[int, int]:
        """The place and the number of a row, which is taken in if it is new."""
        number = self._row_of.get(row.key)
        if number is None:
            number = self._row_of[row.key] = len(self._rows)
            self._rows.append(row)
            place = self._place_of.setdefault(row.id, len(self._of_place))
            if place == len(self._of_place):
                self._of_place.append([])
                self._codes.append(self._code_of[row.category])
                for code in sorted(self._code_of[name] for name in row.also_in):
                    self._guests.append((place, code))
            self._of_place[place].append(number)
        elif row.vector is not None:
            self._rows[number] = row
        return self._place_of[row.id], number

    def first(self, place: int) -> RemoteRow:
        """The row of a document that came first."""
        return self._rows[self._of_place[place][0]]

    @property
    def documents(self) -> Ints:
        """The number of the document at each place."""
        return np.arange(len(self._of_place))

    @property
    def codes(self) -> Ints:
        """The code of the category of the document at each place."""
        return self._codes.values

    @property
    def guests(self) -> Ints:
        """The places of documents, ascending, and the codes of further categories that they belong to."""
        return self._guests.values

    def rows_of(self, places: Ints) -> Ints:
        """The rows of documents that have been seen, in the order of the places."""
        return np.array([row for place in places.tolist() for row in self._of_place[place]], dtype=np.int64)

    def vectors(self, rows: Ints) -> Floats:
        """The vectors of rows; those that did not come with them are fetched."""
        missing = {self._rows[row].id for row in rows.tolist() if self._rows[row].vector is None}
        for row in self._store.engine.rows(sorted(missing), vectors=True) if missing else []:
            if row.key in self._row_of:
                self._rows[self._row_of[row.key]] = row
        found = [self._rows[row].vector for row in rows.tolist()]
        return np.stack([vector for vector in found if vector is not None])

    def chunk(self, row: int) -> Chunk:
        """The chunk of a row."""
        return self._rows[row].chunk

    def text(self, place: int, row: int) -> str:
        """Title and text of a document, as far as its row knows them."""
        return f"{self.first(place).title}\n{self._rows[row].piece}"

    def fetch(self, places: Sequence[int]) -> dict[int, Document]:
        """Documents with their whole texts; those of several chunks are fetched together."""
        new = [place for place in dict.fromkeys(places) if place not in self._documents]
        long = {self.first(place).id: place for place in new if self.first(place).of > 1}
        whole = self._store.documents(list(long)) if long else {}
        for place in new:
            row = self.first(place)
            self._documents[place] = whole[row.id] if row.of > 1 else document_of([row])
        return {place: self._documents[place] for place in places}


class RemoteView(View):
    """One generation of a knowledge base in a vector database.

    Stage one is here: categories, their names' vectors, and what is known of their documents. Of the documents themselves it
    knows, in a `session`, those that the database has given.

    Args:
        store: The store, at the generation.
    """

    index: Candidates  # type: ignore[assignment]

    def __init__(self, store: RemoteStore) -> None:
        self.store = store
        self.generation = store.manifest.generation
        self._documents_of = store.counts()
        self.categories = tuple(sorted(self._documents_of))
        described = {item.category.name: item for item in store.stored_categories()}
        self.stored_categories: tuple[StoredCategory, ...] = tuple(described[name] for name in self.categories)
        self.code_of = {name: code for code, name in enumerate(self.categories)}
        self.documents_total = store.manifest.documents
        self.stale = store.stale
        self._groups = store.groups()
        self._words = store.words()
        self.index = Candidates(store, self.code_of)

    def session(self) -> RemoteView:
        """The same generation for one call of a search, which brings in documents."""
        if self.categories:
            _ = self.tree, self.names, self.overview, self.lexical  # once for all calls
        own = copy.copy(self)
        own.index = Candidates(self.store, self.code_of)
        return own

    @property
    def guests(self) -> Ints:  # type: ignore[override]
        """Of the documents that were given; see `View`."""
        return self.index.guests

    def counts(self) -> Ints:
        """How many documents each category has, guests included."""
        return np.array([self._documents_of[name] for name in self.categories], dtype=np.int64)

    @cached_property
    def names(self) -> tuple[Floats, Ints]:
        """Vectors of names with descriptions and of example questions, and the node of the tree that each belongs to."""
        dimensions = self.store.manifest.space.dimensions
        return name_vectors([item.vectors for item in self.stored_categories], self.tree, dimensions)

    @cached_property
    def overview(self) -> Overview:
        """What stage one knows of the documents below each node of the tree."""
        return Overview(
            [
                (summaries_of(groups.values()), np.array([self.code_of.get(name, -1) for name in groups], dtype=np.int64))
                for groups in self._groups
            ],
            self.tree,
        )

    @cached_property
    def lexical(self) -> RemoteWords:
        """BM25 by the statistics of all documents, for texts at hand."""
        return RemoteWords(self._words)

    @property
    def ids(self) -> Any:
        """The id of the document at each place."""
        return np.array([self.index.first(place).id for place in self.index.documents.tolist()], dtype=object)

    @property
    def rows(self) -> NoReturn:
        """Not to be had: every vector would have to come from the database."""
        raise InputError(
            f"this needs every vector at hand, and they are in {self.store.manifest.engine.name}: copy the knowledge base into "
            "a folder with `gemma-rag copy`, do it there, and copy it back with what it has learned"
        )

    @property
    def metadata(self) -> NoReturn:
        """Not to be had: the database filters by it."""
        raise InputError("the metadata of all documents is not at hand: the database filters by it")

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by their numbers."""
        return self.index.fetch(numbers)

    def chunk_places(self, rows: Sequence[int]) -> dict[int, Chunk]:
        """Chunks by their rows."""
        return {row: self.index.chunk(row) for row in rows}
