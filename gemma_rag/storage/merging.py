"""Which segments are merged when, so that there stay few of them, and the graphs over their large categories."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_rag.index.compressed import Precision
from gemma_rag.index.embedded import Part
from gemma_rag.index.graph import build_graphs
from gemma_rag.storage.building import NewDocument, merged, segment_of
from gemma_rag.storage.manifest import GraphFile, Segment
from gemma_rag.storage.segments import Ints, Segments

_SMALL = 2_000
"""Rows up to which every commit puts everything into one segment."""

_MERGED_AT_ONCE = 100_000
"""Rows that a commit merges at most; `Store.compact` merges all."""

_MOST_SEGMENTS = 32
"""Segments that are too large for a commit to merge do not count; these are merged whatever their sizes."""


@dataclass(frozen=True)
class Merger:
    """Writes the segments of one generation.

    Args:
        files: The segments there are.
        database: Knows the dead; those whose rows a merge leaves out are marked in it.
        generation: What is written.
        dimensions: Components of a vector.
        tails: The precision of the tails that are written.
    """

    files: Segments
    database: sqlite3.Connection
    generation: int
    dimensions: int
    tails: Precision

    def appended(self, segments: Sequence[Segment], live: int, new: Sequence[NewDocument]) -> list[Segment]:
        """Append a segment, or merge the new rows with the smallest segments there are.

        A segment is merged with what came after it where that is at least half as large: of n commits of one size about
        log2(n) segments remain, and a row is rewritten about as often. What is too large for a commit waits for `compact`.

        Args:
            segments: Those of the generation before.
            live: How many rows are alive, the new ones included.
            new: May be none.
        """
        segments = list(segments)
        added = sum(len(document.chunks) for document in new)
        if not live:
            return self.merged(segments)
        if live <= _SMALL and sum(item.rows for item in segments) <= _MERGED_AT_ONCE:
            dead = any(item.rows for item in segments) and sum(item.rows for item in segments) + added > live
            return self.merged(segments, new) if new or dead else segments
        if not new:
            return segments
        last: list[Segment] = []
        rows = added
        while (
            segments
            and segments[-1].rows + rows <= _MERGED_AT_ONCE
            and (segments[-1].rows <= 2 * rows or len(segments) > _MOST_SEGMENTS)
        ):
            last.insert(0, segments.pop())
            rows += last[0].rows
        return [*segments, *self.merged(last, new)]

    def merged(self, segments: Sequence[Segment], new: Sequence[NewDocument] = ()) -> list[Segment]:
        """Segments and new documents as one segment, or none where nothing is alive; without graphs, unless it is as it was."""
        parts = [self.files.read(item) for item in segments]
        if new:
            parts.append(segment_of(new, self.dimensions, self.tails))
        if not parts:
            return []
        dead = np.array(
            [row[0] for row in self.database.execute("SELECT seq FROM documents WHERE died IS NOT NULL ORDER BY seq")],
            dtype=np.int64,
        )
        for part in parts:
            gone = np.intersect1d(part.documents, dead)
            self.database.executemany(
                "UPDATE documents SET dropped = ? WHERE seq = ?", [(self.generation, number) for number in gone.tolist()]
            )
        name = f"segment-{self.generation}.bin"
        if len(parts) == 1 and not len(dead) and parts[0].tail.dtype == np.dtype(self.tails):
            return [*segments] or [self.files.write(name, len(parts[0].documents), parts[0].arrays())]
        rows, arrays = merged(parts, dead, self.tails)
        return [self.files.write(name, rows, arrays)] if rows else []

    def with_graphs(self, segments: Sequence[Segment], above: int | None) -> list[Segment]:
        """Segments with a graph over every category that has more rows than some number in one of them.

        Graphs that are there are kept.

        Args:
            segments: As `merged` gave them.
            above: The number; None: no graphs.

        Raises:
            MissingExtra: FAISS is not installed, and there is a graph to be built.
        """
        if above is None:
            return [item.model_copy(update={"graphs": []}) for item in segments]
        return [item.model_copy(update={"graphs": [*self._graphs(item, above)]}) for item in segments]

    def _graphs(self, segment: Segment, above: int) -> Iterator[GraphFile]:
        data = self.files.read(segment)
        there = {item.first: item for item in segment.graphs if self.files.has_graph(item)}
        for first, last in _runs(data.categories):
            if last - first <= above:
                continue
            if first in there:
                yield there[first]
            else:
                rows = slice(first, last)
                scales = None if data.scales is None else data.scales[rows]
                part = Part(data.head[rows], data.tail[rows], data.documents[rows], data.categories[rows], None, scales)
                yield self.files.write_graph(f"graph-{self.generation}-{first}.faiss", first, build_graphs(part, above)[0])


def _runs(categories: Ints) -> list[tuple[int, int]]:
    """The first row of each category, and the one after its last."""
    firsts = np.flatnonzero(np.diff(categories, prepend=-1)).tolist()
    return list(zip(firsts, [*firsts[1:], len(categories)], strict=True))
