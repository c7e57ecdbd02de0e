"""A graph over the rows of a large category (HNSW in FAISS), which finds near rows without a look at each.

Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World
graphs", https://arxiv.org/abs/1603.09320. It may miss some, so that nobody builds one who did not ask for it.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.errors import KnowledgeBaseError, MissingExtra
from gemma_rag.index.compressed import decoded
from gemma_rag.index.embedded import Ints, Part
from gemma_rag.vectors import Floats

ABOVE = 100_000
"""Rows of a category in one segment from which looking at each takes milliseconds; below, that is faster and finds more."""

CURE = "Delete it: it is searched without, and `gemma-rag compact` builds it anew"
"""What to do about a damaged graph."""

_LINKS = 32
_EFFORT = 100  # candidates while a row is linked
_BLOCK = 20_000  # rows that are put together and added at once


class Graph:
    """Near rows by all components, which the graph keeps as float16.

    Args:
        index: An index of FAISS, its rows in the order of the category's.
    """

    def __init__(self, index: Any) -> None:
        self._index = index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def nearest(self, query: Floats, n: int) -> Ints:
        """About `n` of the nearest rows, best first.

        Args:
            query: float32 of shape ``(d,)``.
            n: At least 1.
        """
        wide = _faiss().SearchParametersHNSW(efSearch=max(64, 2 * n))
        _, rows = self._index.search(np.ascontiguousarray(query[None]), min(n, len(self)), params=wide)
        found: Ints = rows[0][rows[0] >= 0].astype(np.int64)
        return found

    def save(self, file: Path) -> None:
        """Write it; `read` gives it back."""
        _faiss().write_index(self._index, str(file))

    @classmethod
    def read(cls, file: Path, rows: int, dimensions: int) -> Graph:
        """Map a graph into memory; versions of FAISS that cannot (before 1.11) read it.

        Args:
            file: Where `save` wrote it.
            rows: How many rows it should have.
            dimensions: How many components.

        Raises:
            MissingExtra: FAISS is not installed.
            KnowledgeBaseError: The file is missing or damaged, or of other rows.
        """
        faiss = _faiss()
        try:
            index = faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except RuntimeError:
            raise KnowledgeBaseError(f"the graph in {file} is missing or damaged. {CURE}") from None
        if not isinstance(index, faiss.IndexHNSW) or (index.ntotal, index.d) != (rows, dimensions):
            raise KnowledgeBaseError(f"the graph in {file} is not of these {rows} rows. {CURE}")
        return cls(index)


class StoredGraph:
    """A graph in a file, which is opened when it is first asked.

    Where FAISS or the file is missing it warns once and knows no rows, so that each is looked at, as without a graph.

    Args:
        file: Where it is.
        rows: How many rows it has.
        dimensions: Of how many components.
    """

    def __init__(self, file: Path, rows: int, dimensions: int) -> None:
        self._file, self._rows, self._dimensions = file, rows, dimensions

    def nearest(self, query: Floats, n: int) -> Ints:
        """About `n` of the nearest rows, best first.

        Raises:
            KnowledgeBaseError: The file is damaged.
        """
        return np.zeros(0, dtype=np.int64) if self._graph is None else self._graph.nearest(query, n)

    @cached_property
    def _graph(self) -> Graph | None:
        try:
            if self._file.exists():
                return Graph.read(self._file, self._rows, self._dimensions)
            why = f"{self._file} is missing: `gemma-rag compact` builds it anew"
        except MissingExtra as error:
            why = str(error)
        warnings.warn(f"a large category is searched without its graph, which takes longer. {why}", stacklevel=2)
        return None


def build_graphs(part: Part, above: int = ABOVE) -> dict[int, Graph]:
    """Build a graph for every category of a segment that has more rows than some number.

    Args:
        part: The segment.
        above: The number.

    Returns:
        Graphs by the first row of their category, as `Part.graphs` takes them.

    Raises:
        MissingExtra: FAISS is not installed.
    """
    begins = np.append(0, np.flatnonzero(np.diff(part.codes)) + 1).tolist() if len(part.codes) else []
    bounds = zip(begins, [*begins[1:], len(part.codes)], strict=True)
    return {first: _built(part, first, last) for first, last in bounds if last - first > above}


def _built(part: Part, first: int, last: int) -> Graph:
    faiss = _faiss()
    dimensions = part.head.shape[1] + part.tail.shape[1]
    index = faiss.IndexHNSWSQ(dimensions, faiss.ScalarQuantizer.QT_fp16, _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _EFFORT
    for begin in range(first, last, _BLOCK):
        rows = slice(begin, min(begin + _BLOCK, last))
        tail = decoded(part.tail[rows], None if part.scales is None else part.scales[rows])
        index.add(np.concatenate([part.head[rows], tail], axis=1))
    return Graph(index)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtra("FAISS, for graphs inside large categories,", "faiss") from None
    return faiss
