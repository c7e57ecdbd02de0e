"""Search in numpy over the segments of a store: vectors of the opened categories are compared, and no others are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.index.compressed import Stored, decoded, products
from gemma_rag.index.shortlist import Neighbours, Run, shortlists
from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RETURNED = 20_000
"""As many documents a search returns of the opened categories, the best, if more were asked for nowhere."""


class Scored(NamedTuple):
    """The documents that were scored for one question.

    Attributes:
        places: int64 of shape ``(n,)``: places of the documents in the index.
        scores: float32 of shape ``(n,)``: the best of each document's chunks (MaxP: Dai and Callan, SIGIR 2019).
        rows: int64 of shape ``(n,)``: the row of that chunk.
        compared: How many documents were compared with the question to find these.
    """

    places: Ints
    scores: Floats
    rows: Ints
    compared: int


class Part(NamedTuple):
    """The vectors of one segment, split after their first components, so that a coarse look reads no others.

    Attributes:
        head: float32 of shape ``(n, h)``; may be memory-mapped, as all of these.
        tail: Shape ``(n, d - h)``; of no columns where the head is all. float32, or as `compress` made it.
        documents: int64 of shape ``(n,)``: the number of each row's document; the rows of a document stand together.
        codes: int64 of shape ``(n,)``: the category of each row, -1 for one that nobody can open; the rows of a category stand
            together.
        alive: bool of shape ``(n,)``: False for the rows of deleted documents; None where none was deleted.
        scales: float32 of shape ``(n,)`` where the tail is int8.
        graphs: By the first row of a category, what finds its near rows (`gemma_rag.index.graph`).
    """

    head: Floats
    tail: Stored
    documents: Ints
    codes: Ints
    alive: Bools | None = None
    scales: Floats | None = None
    graphs: Mapping[int, Neighbours] | None = None


class Plan(BaseModel):
    """How the documents of the opened categories are searched: coarse to fine.

    The rows that score best by their first components are ranked by all of them (Matryoshka Representation Learning:
    Kusupati et al. 2022, https://arxiv.org/abs/2205.13147). `gemma_rag.index.planning.plan_for` measures which plan is right.

    Attributes:
        dimensions: How many components are looked at first.
        oversampling: For each document that is wanted so many are ranked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimensions: int = Field(ge=1)
    oversampling: int = Field(ge=1)

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """The plan that was stored.

        Raises:
            KnowledgeBaseError: It is damaged.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError:
            raise KnowledgeBaseError("the stored search plan is damaged. Make it anew with `gemma-rag plan`") from None


class EmbeddedIndex:
    """Vectors grouped by category, and by document within, in one part for each segment.

    Places (documents) and rows (chunks) are numbered through all parts, those of the deleted included.

    Args:
        parts: The segments.
        categories: How many categories there are.

    Attributes:
        documents: int64 of shape ``(documents,)``: the number of the document at each place.
        codes: int64 of shape ``(documents,)``: its category.
        alive: bool of shape ``(documents,)``: whether it is still there; None where none was deleted.
    """

    def __init__(self, parts: Sequence[Part], categories: int) -> None:
        self._parts = [part for part in parts if len(part.documents)]
        self._row_offsets = np.cumsum([0, *(len(part.documents) for part in self._parts)])
        firsts = [np.append(0, np.flatnonzero(np.diff(part.documents)) + 1) for part in self._parts]
        self._first_rows: Ints = _stacked([first + at for first, at in zip(firsts, self._row_offsets.tolist(), strict=False)])
        self._lengths: Ints = np.diff(np.append(self._first_rows, self._row_offsets[-1]))
        self.documents: Ints = _stacked([part.documents[first] for part, first in zip(self._parts, firsts, strict=True)])
        self.codes: Ints = _stacked([part.codes[first] for part, first in zip(self._parts, firsts, strict=True)])
        self.alive: Bools | None = None
        if any(part.alive is not None for part in self._parts):
            every = [
                np.ones(len(first), dtype=bool) if part.alive is None else np.asarray(part.alive[first], dtype=bool)
                for part, first in zip(self._parts, firsts, strict=True)
            ]
            self.alive = np.concatenate(every)
        self._counts: Ints | None = None
        self._runs: list[list[Run]] = [[] for _ in range(categories)]
        place = 0
        for part, first, row in zip(self._parts, firsts, self._row_offsets.tolist(), strict=False):
            self._add_runs(part, first, row, place)
            place += len(first)

    def _add_runs(self, part: Part, firsts: Ints, row: int, place: int) -> None:
        head, tail = np.asarray(part.head), np.asarray(part.tail)
        codes = self.codes[place : place + len(firsts)]
        begins = np.append(0, np.flatnonzero(np.diff(codes)) + 1)
        for begin, end in zip(begins.tolist(), np.append(begins[1:], len(firsts)).tolist(), strict=True):
            if codes[begin] < 0:
                continue
            first, last = int(firsts[begin]), int(firsts[end]) if end < len(firsts) else len(part.documents)
            alive = None if self.alive is None else self.alive[place + begin : place + end]
            run = Run(
                head=head[first:last],
                tail=tail[first:last],
                row=row + first,
                place=place + begin,
                end=place + end,
                starts=None if last - first == end - begin else firsts[begin:end] - first,
                alive=None if alive is None or alive.all() else alive,
                scales=None if part.scales is None else np.asarray(part.scales)[first:last],
                graph=None if part.graphs is None else part.graphs.get(first),
            )
            self._runs[int(codes[begin])].append(run)

    def search(
        self,
        queries: Floats,
        opened: Bools,
        wanted: int | None = None,
        plan: Plan | None = None,
        allowed: Bools | None = None,
    ) -> list[Scored]:
        """Score the documents of the opened categories.

        Args:
            queries: float32 of shape ``(q, d)``, rows of norm 1.
            opened: bool of shape ``(q, categories)``.
            wanted: How many documents are wanted at least; a search returns the best `RETURNED` where there are more.
            plan: Rank the documents of a shortlist, ``plan.oversampling * wanted`` of them; None, or nothing `wanted`: all.
                Graphs are asked for questions that come alone: many at once look at every row, which is faster for them.
            allowed: bool of each place: whether the document may be found at all; None: all may.

        Returns:
            One `Scored` per question: every document, or the best of more than `RETURNED`, or the shortlist. Whichever it
            is, scores are cosines of all components.
        """
        if plan is None or wanted is None:
            return self._exact(queries, opened, max(RETURNED, wanted or 0), allowed)
        dimensions = min(plan.dimensions, queries.shape[1])
        lists = shortlists(self._runs, queries, opened, dimensions, plan.oversampling * wanted, allowed)
        compared = opened @ self._living(allowed)
        return [
            scored._replace(compared=count)
            for scored, count in zip(self._ranked(queries, lists), compared.tolist(), strict=True)
        ]

    def _exact(self, queries: Floats, opened: Bools, limit: int, allowed: Bools | None) -> list[Scored]:
        kept: list[list[Scored]] = [[] for _ in queries]
        counts = [0] * len(queries)
        for code in np.flatnonzero(opened.any(axis=0)).tolist():
            asking = np.flatnonzero(opened[:, code])
            for run in self._runs[code]:
                scores = _cosines(queries[asking], run)
                may = run.alive if allowed is None else allowed[run.place : run.end]
                if run.alive is not None and allowed is not None:
                    may = run.alive & allowed[run.place : run.end]
                for question, row_scores in zip(asking.tolist(), scores, strict=True):
                    found = _best_of_documents(row_scores, run, may)
                    kept[question].append(found)
                    counts[question] += len(found.places)
                    if counts[question] > 2 * limit:
                        kept[question], counts[question] = [_best(joined(kept[question]), limit)], limit
        return [_best(joined(found), limit) for found in kept]

    def _living(self, allowed: Bools | None) -> Ints:
        """How many documents each category has that may be found."""
        if allowed is None and self._counts is not None:
            return self._counts
        may = self.alive if allowed is None else allowed if self.alive is None else self.alive & allowed
        codes = self.codes if may is None else self.codes[may]
        counts: Ints = np.bincount(codes[codes >= 0], minlength=len(self._runs)).astype(np.int64)
        if allowed is None:
            self._counts = counts
        return counts

    def _ranked(self, queries: Floats, lists: Sequence[Ints]) -> list[Scored]:
        """Score shortlists by all components.

        Args:
            queries: Shape ``(q, d)``.
            lists: For each question places, ascending.
        """
        places = np.concatenate([np.zeros(0, dtype=np.int64), *lists])
        rows, lengths = self.rows_of(places), self._lengths[places]
        ends = np.cumsum(lengths)
        scores = np.empty(len(rows), dtype=np.float32)
        bounds = np.cumsum([0, *(len(some) for some in lists)])
        first = 0
        for query, last in zip(queries, np.append(0, ends)[bounds[1:]].tolist(), strict=True):
            self._compare(rows[first:last], query, scores[first:last])
            first = last
        best, chosen = _first_best(np.clip(scores, -1.0, 1.0, out=scores), ends - lengths)
        found = rows[chosen]
        return [
            Scored(places[begin:end], best[begin:end], found[begin:end], end - begin)
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]

    def _compare(self, rows: Ints, query: Floats, out: Floats) -> None:
        """Dot products of all components with rows that ascend."""
        bounds = np.searchsorted(rows, self._row_offsets).tolist()
        for part, offset, begin, end in zip(self._parts, self._row_offsets.tolist(), bounds[:-1], bounds[1:], strict=False):
            if begin < end:
                own = rows[begin:end] - offset
                width = part.head.shape[1]
                np.dot(part.head.take(own, axis=0), query[:width], out=out[begin:end])
                if part.tail.shape[1]:
                    scales = None if part.scales is None else part.scales[own]
                    out[begin:end] += decoded(part.tail.take(own, axis=0), scales) @ query[width:]

    def score(self, query: Floats, places: Ints) -> Scored:
        """Score documents by their places, whatever their categories; deleted ones are left out.

        Args:
            query: float32 of shape ``(d,)``, norm 1.
            places: Shape ``(n,)``, without repeats.
        """
        if self.alive is not None:
            places = places[self.alive[places]]
        order = np.argsort(places, kind="stable")
        [found] = self._ranked(query[None], [places[order]])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Scored(places, found.scores[back], found.rows[back], len(places))

    def bytes_to_scan(self, opened: Bools, dimensions: int | None = None) -> Ints:
        """Bytes of the opened categories' vectors, or of their first components, of each question.

        Args:
            opened: bool of shape ``(q, categories)``.
            dimensions: How many components; None: all.
        """
        sizes = np.zeros(len(self._runs), dtype=np.int64)
        for code, runs in enumerate(self._runs):
            for run in runs:
                first = run.head.shape[1] if dimensions is None else min(run.head.shape[1], dimensions)
                rest = run.tail.shape[1] if dimensions is None else max(0, dimensions - first)
                sizes[code] += len(run.head) * (first * run.head.itemsize + rest * run.tail.itemsize)
        return opened @ sizes

    def bytes_of(self, rows: Ints) -> int:
        """Bytes of the whole vectors of rows."""
        bounds = np.searchsorted(np.sort(rows), self._row_offsets)
        each = [part.head.shape[1] * part.head.itemsize + part.tail.shape[1] * part.tail.itemsize for part in self._parts]
        return int(np.diff(bounds) @ np.array(each, dtype=np.int64))

    def rows_of(self, places: Ints) -> Ints:
        """The rows of documents, in the order of the places."""
        lengths = self._lengths[places]
        starts = np.cumsum(lengths) - lengths
        return np.repeat(self._first_rows[places] - starts, lengths) + np.arange(int(lengths.sum()))

    def places_of(self, rows: Ints) -> Ints:
        """The place of each row's document."""
        if len(self._first_rows) == self._row_offsets[-1]:
            return rows
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def vectors(self, rows: Ints) -> Floats:
        """Vectors of all components, float32 of shape ``(rows, d)``."""
        if not self._parts:
            return np.zeros((len(rows), 0), dtype=np.float32)
        if len(self._parts) == 1:
            return _gathered(self._parts[0], rows)
        owners = np.searchsorted(self._row_offsets, rows, side="right") - 1
        width = self._parts[0].head.shape[1] + self._parts[0].tail.shape[1]
        out = np.empty((len(rows), width), dtype=np.float32)
        for owner in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == owner)
            out[mine] = _gathered(self._parts[owner], rows[mine] - self._row_offsets[owner])
        return out


def joined(parts: Sequence[Scored]) -> Scored:
    """Documents that were scored in several parts, as one."""
    compared = sum(part.compared for part in parts)
    parts = [part for part in parts if len(part.places)]
    if len(parts) == 1:
        return parts[0]._replace(compared=compared)
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Scored(none, np.zeros(0, dtype=np.float32), none, compared)
    return Scored(
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.rows for part in parts]),
        compared,
    )


def _stacked(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _gathered(part: Part, rows: Ints) -> Floats:
    head = part.head[rows]
    if not part.tail.shape[1]:
        return head
    return np.concatenate([head, decoded(part.tail[rows], None if part.scales is None else part.scales[rows])], axis=1)


def _cosines(queries: Floats, run: Run) -> Floats:
    """Cosines of some questions with the rows of a run, shape ``(q, rows)``."""
    width = run.head.shape[1]
    scores: Floats = queries[:, :width] @ run.head.T
    if run.tail.shape[1]:
        scores += products(queries[:, width:], run.tail, run.scales)
    return np.clip(scores, -1.0, 1.0, out=scores)


def _best_of_documents(row_scores: Floats, run: Run, may: Bools | None) -> Scored:
    """The documents of a run by their best rows: those that may be found, or all of them (None)."""
    places = np.arange(run.place, run.end)
    if run.starts is None:
        scored = Scored(places, row_scores, np.arange(run.row, run.row + len(row_scores)), len(places))
    else:
        best, first = _first_best(row_scores, run.starts)
        scored = Scored(places, best, run.row + first, len(places))
    if may is None:
        return scored
    kept = np.flatnonzero(may)
    return Scored(places[kept], scored.scores[kept], scored.rows[kept], len(kept))


def _first_best(scores: Floats, starts: Ints) -> tuple[Floats, Ints]:
    """The best score in each stretch, and where it stands first.

    Args:
        scores: Shape ``(n,)``.
        starts: Where each stretch begins, ascending, the first at 0; none is empty.
    """
    if len(starts) == len(scores):
        return scores, np.arange(len(scores))
    best: Floats = np.maximum.reduceat(scores, starts)
    lengths = np.diff(np.append(starts, len(scores)))
    hits = np.flatnonzero(scores == np.repeat(best, lengths))
    return best, hits[np.searchsorted(hits, starts)]


def _best(scored: Scored, n: int) -> Scored:
    """The `n` best, in the order in which they stand; of equal ones the first."""
    if len(scored.places) <= n:
        return scored
    least = np.partition(scored.scores, len(scored.scores) - n)[len(scored.scores) - n]
    keep = scored.scores > least
    ties = np.flatnonzero(scored.scores == least)
    keep[ties[: n - int(keep.sum())]] = True
    return Scored(scored.places[keep], scored.scores[keep], scored.rows[keep], scored.compared)
