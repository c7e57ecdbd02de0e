"""Exact search in numpy: every vector of the opened categories is compared, and no other is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Scored(NamedTuple):
    """The documents that were scored for one question.

    Attributes:
        places: int64 of shape ``(n,)``: places of the documents in the index.
        scores: float32 of shape ``(n,)``: the best of each document's chunks (MaxP: Dai and Callan, SIGIR 2019).
        rows: int64 of shape ``(n,)``: the row of that chunk.
    """

    places: Ints
    scores: Floats
    rows: Ints


class ExactIndex:
    """Vectors grouped by category, and by document within.

    Args:
        vectors: float32 of shape ``(n, d)``, rows of norm 1, sorted by category, then by document; may be memory-mapped.
        documents: Document of each row, shape ``(n,)``; the rows of a document stand together.
        codes: Category of each row, shape ``(n,)``, ascending.
        categories: How many categories there are.

    Attributes:
        documents: int64 of shape ``(documents,)``: the number of the document at each place.
        codes: int64 of shape ``(documents,)``: its category.
        row_places: int64 of shape ``(n,)``: the place of each row's document.
    """

    def __init__(self, vectors: Floats, documents: Ints, codes: Ints, categories: int) -> None:
        self._vectors = vectors
        changes = np.flatnonzero(np.diff(documents)) + 1 if len(documents) else np.zeros(0, dtype=np.int64)
        self._first_rows = np.concatenate([np.zeros(1, dtype=np.int64), changes])[: len(documents)]
        self.documents = documents[self._first_rows]
        self.codes = codes[self._first_rows]
        self._lengths = np.diff(np.append(self._first_rows, len(documents)))
        self.row_places = np.repeat(np.arange(len(self.documents)), self._lengths)
        self._row_bounds = np.searchsorted(codes, np.arange(categories + 1))
        self._place_bounds = np.searchsorted(self.codes, np.arange(categories + 1))

    def search(self, queries: Floats, opened: Bools) -> list[Scored]:
        """Score the documents of the opened categories.

        Args:
            queries: float32 of shape ``(q, d)``, rows of norm 1.
            opened: bool of shape ``(q, categories)``.

        Returns:
            One `Scored` per question.
        """
        parts: list[list[Scored]] = [[] for _ in queries]
        for code in np.flatnonzero(opened.any(axis=0)):
            asking = np.flatnonzero(opened[:, code])
            first, last = self._row_bounds[code], self._row_bounds[code + 1]
            places = np.arange(self._place_bounds[code], self._place_bounds[code + 1])
            scores = np.clip(queries[asking] @ self._vectors[first:last].T, -1.0, 1.0)
            for question, row_scores in zip(asking, scores, strict=True):
                best, rows = self.best_of_documents(row_scores, int(code))
                parts[question].append(Scored(places, best, rows))
        return [joined(found) for found in parts]

    def score(self, query: Floats, places: Ints) -> Scored:
        """Score documents by their places, whatever their categories.

        Args:
            query: float32 of shape ``(d,)``, norm 1.
            places: Shape ``(n,)``, without repeats.
        """
        if not len(places):
            return joined([])
        rows = self.rows_of(places)
        lengths = self._lengths[places]
        scores = np.clip(self._vectors[rows] @ query, -1.0, 1.0)
        starts = np.cumsum(lengths) - lengths
        best = np.maximum.reduceat(scores, starts)
        first = np.flatnonzero(scores == np.repeat(best, lengths))
        owners = np.repeat(np.arange(len(places)), lengths)[first]
        return Scored(places, best, rows[first[np.searchsorted(owners, np.arange(len(places)))]])

    def rows_of(self, places: Ints) -> Ints:
        """The rows of documents, in the order of the places."""
        lengths = self._lengths[places]
        starts = np.cumsum(lengths) - lengths
        return np.repeat(self._first_rows[places] - starts, lengths) + np.arange(int(lengths.sum()))

    def best_of_documents(self, row_scores: Floats, code: int) -> tuple[Floats, Ints]:
        """The best row of each document of a category, and its score.

        Args:
            row_scores: Scores of the category's rows.
            code: The category.
        """
        first = self._row_bounds[code]
        starts = self._first_rows[self._place_bounds[code] : self._place_bounds[code + 1]] - first
        if len(starts) == len(row_scores):
            return row_scores, np.arange(first, first + len(row_scores))
        best = np.maximum.reduceat(row_scores, starts)
        lengths = np.diff(np.append(starts, len(row_scores)))
        is_best = row_scores == np.repeat(best, lengths)
        rows = np.flatnonzero(is_best)
        owners = np.repeat(np.arange(len(starts)), lengths)[rows]
        return best, first + rows[np.searchsorted(owners, np.arange(len(starts)))]


def joined(parts: Sequence[Scored]) -> Scored:
    """Documents that were scored in several parts, as one."""
    parts = [part for part in parts if len(part.places)]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Scored(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64))
    return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))
