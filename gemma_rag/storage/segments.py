"""Segments: what one commit added, or a merge put together, in one file that is written once and memory-mapped.

The rows of a segment are its chunks, sorted by category, then by document, then by their place in it; a document's rows
lie in one segment. Each vector is split: the first components, `head`, lie together, and so do the others, `tail`. A
coarse scan reads the heads alone, an exact one reads both, and nothing is stored twice. Tails may be stored in fewer bits.

A graph over a large category of a segment (`gemma_rag.index.graph`) is a file beside it, ``graph-<g>-<row>.faiss``. It can be
built anew from the segment, so that a missing one is no error: its category is searched row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.index import graph as graphs
from gemma_rag.index.compressed import Stored, decoded
from gemma_rag.index.shortlist import Neighbours
from gemma_rag.lexical import Postings
from gemma_rag.storage.arrays import CURE, Array, Blocks, read_arrays, write_arrays
from gemma_rag.storage.files import sha256_of, sync
from gemma_rag.storage.manifest import GraphFile, Segment
from gemma_rag.summaries import Summaries
from gemma_rag.vectors import Floats, unit

Ints: TypeAlias = npt.NDArray[np.int64]

HEAD = 128
"""Components in the head of a vector: the smallest dimension that EmbeddingGemma was trained for."""


class SegmentData(NamedTuple):
    """The arrays of a segment.

    Attributes:
        head: float32 of shape ``(n, h)``: the first components of each vector.
        tail: Shape ``(n, d - h)``: the others, float32 or as `gemma_rag.index.compressed` made them; head and tail together
            have norm 1, as far as the tail was not rounded.
        chunks: int64 of shape ``(n,)``: number of the chunk of each row.
        documents: int64 of shape ``(n,)``: number of its document.
        categories: int64 of shape ``(n,)``, ascending: number of the category of its document.
        guests: int64 of shape ``(m, 2)``: number of a document, and of a further category that it belongs to.
        words: Of the documents, in their order.
        summaries: What stage one knows of each category that has rows or guests here.
        summarised: int64: the number of each of those categories.
        scales: float32 of shape ``(n,)`` where the tail is int8.
        graphs: By the first row of a large category, what finds its near rows.
    """

    head: Floats
    tail: Stored
    chunks: Ints
    documents: Ints
    categories: Ints
    guests: Ints
    words: Postings
    summaries: Summaries
    summarised: Ints
    scales: Floats | None = None
    graphs: Mapping[int, Neighbours] | None = None

    def arrays(self) -> dict[str, Array | Blocks]:
        """By the names that they have in the file; graphs are files of their own."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **({} if self.scales is None else {"scales": self.scales}),
            **{f"words.{name}": getattr(self.words, name) for name in Postings._fields},
            **{f"summaries.{name}": getattr(self.summaries, name) for name in Summaries._fields},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> SegmentData:
        """The other way round.

        Raises:
            KeyError: One is missing.
        """
        plain: dict[str, Any] = {name: arrays[name] for name in _PLAIN}
        return cls(
            **plain,
            words=Postings(*(arrays[f"words.{name}"] for name in Postings._fields)),
            summaries=Summaries(*(arrays[f"summaries.{name}"] for name in Summaries._fields)),
            scales=arrays.get("scales"),
        )

    def tails(self, rows: Ints | slice) -> Floats:
        """Tails of rows, float32."""
        return decoded(self.tail[rows], None if self.scales is None else self.scales[rows])

    def vectors(self, rows: Ints | slice) -> Floats:
        """Whole vectors of rows, of norm 1 also where rounding has changed it."""
        if not self.tail.shape[1]:
            return self.head[rows]
        whole = np.concatenate([self.head[rows], self.tails(rows)], axis=1)
        return whole if self.tail.dtype == np.float32 else unit(whole)


_PLAIN = ("head", "tail", "chunks", "documents", "categories", "guests", "summarised")


class Segments:
    """The segments of a store.

    Args:
        path: The store's folder, or None to keep the arrays in memory.
        dimensions: Components of a vector.
    """

    def __init__(self, path: Path | None, dimensions: int) -> None:
        self.path = path
        self.dimensions = dimensions
        self._open: dict[str, SegmentData] = {}
        self._graphs: dict[str, Neighbours] = {}

    def write(self, name: str, rows: int, arrays: Mapping[str, Array | Blocks]) -> Segment:
        """Write a segment; it is on the disk when this returns.

        Args:
            name: Of the file.
            rows: How many rows it has.
            arrays: What it holds; in memory, no blocks.
        """
        self._open.pop(name, None)  # of a generation that failed before it was published
        if self.path is not None:
            (self.path / name).unlink(missing_ok=True)
            return Segment(file=name, rows=rows, sha256=write_arrays(self.path / name, arrays))
        whole = {
            key: np.concatenate([np.asarray(part, dtype=array.dtype) for part in array.rows]).reshape(array.shape)
            if isinstance(array, Blocks)
            else array
            for key, array in arrays.items()
        }
        self._open[name] = SegmentData.from_arrays(whole)
        return Segment(file=name, rows=rows, sha256="")

    def write_graph(self, name: str, first: int, graph: graphs.Graph) -> GraphFile:
        """Write a graph; it is on the disk when this returns.

        Args:
            name: Of the file.
            first: The first row of its category.
            graph: What to write.
        """
        self._graphs.pop(name, None)
        if self.path is None:
            self._graphs[name] = graph
            return GraphFile(file=name, first=first, rows=len(graph), size=0, sha256="")
        file = self.path / name
        file.unlink(missing_ok=True)
        graph.save(file)
        with file.open("rb+") as stream:
            sync(stream.fileno())
        return GraphFile(file=name, first=first, rows=len(graph), size=file.stat().st_size, sha256=sha256_of(file))

    def has_graph(self, item: GraphFile) -> bool:
        """Whether the file of a graph is there."""
        return item.file in self._graphs if self.path is None else (self.path / item.file).exists()

    def read(self, segment: Segment) -> SegmentData:
        """The arrays of a segment, mapped into memory once; its graphs are opened when they are asked.

        Raises:
            KnowledgeBaseError: The file is not as it was written; it is named.
        """
        if segment.file not in self._open and self.path is not None:
            self._open[segment.file] = self._mapped(self.path / segment.file, segment)
        data = self._open[segment.file]
        return data._replace(graphs={item.first: self._graph(item) for item in segment.graphs}) if segment.graphs else data

    def check(self, segments: Sequence[Segment], *, checksums: bool) -> None:
        """Check that every file is there and has its shape, and, where asked, its checksum; of graphs those that are there.

        Raises:
            KnowledgeBaseError: One is not as it was written; the file is named.
        """
        if self.path is None:
            return
        for segment in segments:
            self.read(segment)
            if checksums and sha256_of(self.path / segment.file) != segment.sha256:
                raise KnowledgeBaseError(f"{self.path / segment.file} is damaged: its checksum is wrong. {CURE}")
            for item in segment.graphs:
                file = self.path / item.file
                if file.exists() and (file.stat().st_size != item.size or (checksums and sha256_of(file) != item.sha256)):
                    raise KnowledgeBaseError(f"{file} is damaged: its size or its checksum is wrong. {graphs.CURE}")

    def sweep(self, segments: Sequence[Segment]) -> None:
        """Remove the files of all other segments, and their graphs; whoever has one mapped keeps it."""
        kept = {segment.file for segment in segments} | {item.file for segment in segments for item in segment.graphs}
        self._open = {name: data for name, data in self._open.items() if name in kept}
        self._graphs = {name: graph for name, graph in self._graphs.items() if name in kept}
        for file in [] if self.path is None else [*self.path.glob("segment-*.bin"), *self.path.glob("graph-*.faiss")]:
            if file.name not in kept:
                with contextlib.suppress(OSError):  # a reader on Windows holds it; the next commit tries again
                    file.unlink()

    def _graph(self, item: GraphFile) -> Neighbours:
        if item.file not in self._graphs and self.path is not None:
            self._graphs[item.file] = graphs.StoredGraph(self.path / item.file, item.rows, self.dimensions)
        return self._graphs[item.file]

    def _mapped(self, file: Path, segment: Segment) -> SegmentData:
        try:
            data = SegmentData.from_arrays(read_arrays(file))
        except KeyError as error:
            raise KnowledgeBaseError(f"{file} is damaged: it has no array {error}. {CURE}") from None
        per_row = [data.head, data.tail, data.chunks, data.documents, data.categories]
        rows = [len(array) for array in [*per_row, *([] if data.scales is None else [data.scales])]]
        if (data.tail.dtype == np.int8) != (data.scales is not None):
            raise KnowledgeBaseError(f"{file} is damaged: only vectors of 8 bits have scales, and these always. {CURE}")
        if set(rows) != {segment.rows} or data.head.shape[1] + data.tail.shape[1] != self.dimensions:
            raise KnowledgeBaseError(
                f"{file} is damaged: it does not have {segment.rows} vectors of {self.dimensions} components. {CURE}"
            )
        return data
