"""One generation of a knowledge base, in the form that a search needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemma_rag.documents import Chunk, Document
from gemma_rag.index.embedded import EmbeddedIndex, Part
from gemma_rag.lexical import LexicalIndex
from gemma_rag.routing import Overview, Tree
from gemma_rag.storage import Snapshot, StoredCategory
from gemma_rag.storage.arrays import read_here_and_there
from gemma_rag.storage.reader import Reader
from gemma_rag.storage.segments import SegmentData
from gemma_rag.vectors import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class _Member(NamedTuple):
    """A segment, and which of its rows are alive; taken over by the next view where it is still there.

    Attributes:
        data: The segment.
        alive: bool of shape ``(rows,)``; None where all are.
    """

    data: SegmentData
    alive: Bools | None

    def without(self, dead: Ints) -> _Member:
        """With further documents dead."""
        if not len(dead) or not (hit := np.isin(self.data.documents, dead)).any():
            return self
        return self._replace(alive=~hit if self.alive is None else self.alive & ~hit)


class View:
    """One generation of a knowledge base, ready to be searched. What costs time is computed once, when first needed.

    Segments are stitched together: **places** number the documents through all segments, **rows** the chunks, and a
    **code** is the place of a category among the sorted names of those that have documents.

    Args:
        snapshot: The generation.
        store: To fetch documents from.
        previous: The view of an earlier generation of the same store.

    Attributes:
        snapshot: The generation.
        categories: Names of the categories that have documents, sorted.
        index: The vectors.
        guests: int64 of shape ``(m, 2)``: the place of a document, and the code of a further category that it belongs to.
        documents_total: How many documents there are.
        stale: Share of the rows, 0 to 1, that belong to deleted documents: the summaries of stage one still count them,
            until `KnowledgeBase.compact`.
    """

    def __init__(self, snapshot: Snapshot, store: Reader, previous: View | None = None) -> None:
        self._store = store
        self.snapshot = snapshot
        old = previous if previous is not None and previous._store is store else None
        known = {} if old is None else old._members
        gone = snapshot.dead if old is None else np.setdiff1d(snapshot.dead, old.snapshot.dead)
        self._members: dict[str, _Member] = {
            name: known[name]._replace(data=data).without(gone) if name in known else _Member(data, None).without(snapshot.dead)
            for name, data in snapshot.segments
        }
        stored = {item.category.name: item for item in snapshot.categories}
        numbers = self._living_categories()
        self.stored_categories: tuple[StoredCategory, ...] = tuple(
            stored[name] for name in sorted(snapshot.names[number] for number in numbers.tolist())
        )
        self.categories: tuple[str, ...] = tuple(item.category.name for item in self.stored_categories)
        self._code_of = self._codes(numbers)
        self.index = EmbeddedIndex(
            [
                Part(
                    item.data.head,
                    item.data.tail,
                    item.data.documents,
                    self._code_of[item.data.categories],
                    item.alive,
                    item.data.scales,
                    item.data.graphs,
                )
                for item in self._members.values()
            ],
            len(self.categories),
        )
        self.guests = self._guests()
        alive = self.index.alive
        self.documents_total = len(self.index.documents) if alive is None else int(alive.sum())
        rows = sum(len(item.data.documents) for item in self._members.values())
        dead = sum(int((~item.alive).sum()) for item in self._members.values() if item.alive is not None)
        self.stale = dead / rows if rows else 0.0

    def read_tails_here_and_there(self) -> None:
        """Searches by a plan read few tails; see `gemma_rag.storage.arrays.read_here_and_there`."""
        for item in self._members.values():
            read_here_and_there(item.data.tail)

    def places_in(self, opened: Bools) -> Bools:
        """Which documents belong to one of the opened categories.

        Args:
            opened: Shape ``(categories,)``.
        """
        alive = self.index.alive
        inside = opened[self.index.codes] if len(opened) else np.zeros(len(self.index.codes), dtype=bool)
        if len(self.guests):
            inside[self.guests[opened[self.guests[:, 1]], 0]] = True
        return inside if alive is None else inside & alive

    def counts(self) -> Ints:
        """How many documents each category has, guests included."""
        alive = self.index.alive
        codes = self.index.codes if alive is None else self.index.codes[alive]
        every = np.concatenate([codes, self.guests[:, 1]])
        return np.bincount(every, minlength=len(self.categories)).astype(np.int64)

    @cached_property
    def tree(self) -> Tree:
        """The categories as paths."""
        return Tree(self.categories)

    @cached_property
    def names(self) -> tuple[Floats, Ints]:
        """Vectors of names with descriptions and of example questions, and the node of the tree that each belongs to."""
        return name_vectors([item.vectors for item in self.stored_categories], self.tree, self._store.manifest.space.dimensions)

    @cached_property
    def overview(self) -> Overview:
        """What stage one knows of the documents below each node of the tree."""
        groups = [(item.data.summaries, self._code_of[item.data.summarised]) for item in self._members.values()]
        return Overview(groups, self.tree)

    @cached_property
    def lexical(self) -> LexicalIndex:
        """BM25 over the documents, with their titles, in the order of the index's places."""
        return LexicalIndex([item.data.words for item in self._members.values()], self.index.alive)

    @cached_property
    def ids(self) -> npt.NDArray[np.object_]:
        """The id of the document at each place; of dead ones, an empty text."""
        known = self._store.ids()
        return np.array([known.get(number, "") for number in self.index.documents.tolist()], dtype=object)

    @cached_property
    def rows(self) -> tuple[Ints, Ints]:
        """The living rows, and the code of the category of each."""
        alive = [
            np.ones(len(item.data.documents), bool) if item.alive is None else item.alive for item in self._members.values()
        ]
        codes = [self._code_of[item.data.categories] for item in self._members.values()]
        if not alive:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        rows = np.flatnonzero(np.concatenate(alive))
        return rows, np.concatenate(codes)[rows]

    @cached_property
    def metadata(self) -> dict[int, dict[str, Any]]:
        """Metadata of every document, by its number."""
        return self._store.metadata()

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by their numbers."""
        return self._store.documents(numbers)

    def chunk_places(self, rows: Sequence[int]) -> dict[int, Chunk]:
        """Chunks by their rows in the index."""
        firsts = np.cumsum([0, *(len(item.data.chunks) for item in self._members.values())])
        members = list(self._members.values())
        numbers = {}
        for row in rows:
            part = int(np.searchsorted(firsts, row, side="right")) - 1
            numbers[row] = int(members[part].data.chunks[row - firsts[part]])
        places = self._store.chunk_places(list(numbers.values()))
        return {row: places[number] for row, number in numbers.items()}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _living_categories(self) -> Ints:
        """Numbers of the categories that have living documents or guests, ascending."""
        most = max(self.snapshot.names, default=0) + 1
        found = np.zeros(most, dtype=bool)
        for data, alive in self._members.values():
            found[data.categories if alive is None else data.categories[alive]] = True
            found[_living_guests(data, alive)[:, 1]] = True
        return np.flatnonzero(found)

    def _codes(self, numbers: Ints) -> Ints:
        """The code of each category number; -1 for those without living documents."""
        code_of = np.full(max(self.snapshot.names, default=0) + 1, -1, dtype=np.int64)
        place = {name: code for code, name in enumerate(self.categories)}
        for number in numbers.tolist():
            code_of[number] = place[self.snapshot.names[number]]
        return code_of

    def _guests(self) -> Ints:
        found = [np.zeros((0, 2), dtype=np.int64)]
        first = 0
        for data, alive in self._members.values():
            own = data.documents[np.flatnonzero(np.diff(data.documents, prepend=-1))]
            guests = _living_guests(data, alive)
            if len(guests):
                order = np.argsort(own)
                places = first + order[np.searchsorted(own, guests[:, 0], sorter=order)]
                found.append(np.stack([places, self._code_of[guests[:, 1]]], axis=1))
            first += len(own)
        return np.unique(np.concatenate(found), axis=0)


def name_vectors(vectors: Sequence[Floats], tree: Tree, dimensions: int) -> tuple[Floats, Ints]:
    """The vectors of each node's names, and the node that each belongs to.

    Args:
        vectors: For each category those of its name and of its examples.
        tree: The categories as paths.
        dimensions: Components of a vector.
    """
    if not vectors:
        return np.zeros((0, dimensions), dtype=np.float32), np.zeros(0, dtype=np.int64)
    ends = np.cumsum([len(rows) for rows in vectors])
    own = [np.arange(end - len(rows), end) for end, rows in zip(ends.tolist(), vectors, strict=True)]
    nodes = tree.spread(own)
    stacked = np.concatenate(vectors)[np.concatenate(nodes)]
    return stacked, np.repeat(np.arange(len(nodes)), [len(rows) for rows in nodes]).astype(np.int64)


def _living_guests(data: SegmentData, alive: Bools | None) -> Ints:
    if alive is None or not len(data.guests):
        return data.guests
    return data.guests[np.isin(data.guests[:, 0], data.documents[alive])]
