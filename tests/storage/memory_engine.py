"""A vector database in memory, to see what a store makes of one, and to make it fail at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gemma_rag.index.remote import RemoteRow, Stamp, Wanted, matches
from gemma_rag.lexical import LexicalIndex
from gemma_rag.vectors import Floats


class Killed(BaseException):
    """What a test raises where the process would be killed."""


class MemoryEngine:
    """Keeps rows in a dictionary, searches all of them, and counts what it is asked.

    Attributes:
        left: How many more writes succeed before `Killed` is raised; None for all.
        calls: The name of every method that was called.
    """

    name = "milvus"

    def __init__(self, *, has_words: bool = True) -> None:
        self.has_words = has_words
        self.kept: dict[str, RemoteRow] = {}
        self.files: dict[str, bytes] = {}
        self.left: int | None = None
        self.calls: list[str] = []
        self.asked: list[int] = []

    def _write(self, what: str) -> None:
        self.calls.append(what)
        if self.left is not None:
            if self.left <= 0:
                raise Killed(what)
            self.left -= 1

    def add(self, rows: Sequence[RemoteRow]) -> None:
        for row in rows:
            self._write("add")
            self.kept[row.key] = row

    def delete(self, ids: Sequence[str], before: int) -> None:
        for key in [key for key, row in self.kept.items() if row.id in ids and row.generation < before]:
            self._write("delete")
            del self.kept[key]

    def undo(self, after: int) -> None:
        for key in [key for key, row in self.kept.items() if row.generation > after]:
            self._write("undo")
            del self.kept[key]

    def _seen(self, within: Sequence[str] | None, where: Wanted | None, generation: int) -> list[RemoteRow]:
        return [
            row
            for row in self.kept.values()
            if row.generation <= generation
            and (within is None or set(within) & set(row.categories))
            and (where is None or matches(row.metadata, where))
        ]

    def search(
        self, queries: Floats, within: Sequence[Sequence[str] | None], n: int, where: Wanted | None, generation: int
    ) -> list[list[tuple[RemoteRow, float]]]:
        self.calls.append("search")
        self.asked.append(n)
        out = []
        for query, names in zip(queries, within, strict=True):
            scored = [(row._replace(vector=None), float(row.vector @ query)) for row in self._seen(names, where, generation)]
            out.append(sorted(scored, key=lambda pair: (-pair[1], pair[0].key))[:n])
        return out

    def words(
        self, question: str, within: Sequence[str] | None, n: int, where: Wanted | None, generation: int
    ) -> list[RemoteRow]:
        self.calls.append("words")
        rows = self._seen(within, where, generation)
        scores = LexicalIndex.of_texts([f"{row.title}\n{row.piece}" for row in rows]).scores(question) if rows else []
        return [rows[i] for i in np.argsort(-np.array(scores), kind="stable").tolist() if scores[i] > 0][:n]

    def homes(self, where: Wanted, generation: int, most: int) -> set[str] | None:
        rows = self._seen(None, where, generation)
        return None if len(rows) > most else {name for row in rows for name in row.categories}

    def rows(self, ids: Sequence[str], vectors: bool = False) -> list[RemoteRow]:
        self.calls.append("rows")
        found = [row for row in self.kept.values() if row.id in ids]
        return found if vectors else [row._replace(vector=None) for row in found]

    def stamps(self, ids: Sequence[str]) -> list[Stamp]:
        return [Stamp(row.id, row.hash, row.generation) for row in self.kept.values() if row.id in ids]

    def scan(self, batch: int = 1000, vectors: bool = True) -> Iterator[list[RemoteRow]]:
        rows = [row if vectors else row._replace(vector=None) for _, row in sorted(self.kept.items())]
        yield from (rows[first : first + batch] for first in range(0, len(rows), batch))

    def put(self, name: str, data: bytes | None) -> None:
        self._write("put")
        if data is None:
            self.files.pop(name, None)
        else:
            self.files[name] = data

    def fetch(self, name: str) -> bytes | None:
        return self.files.get(name)

    def records(self) -> list[str]:
        return sorted(self.files)

    def count(self) -> int:
        return len(self.kept)

    def persist(self) -> None:
        self._write("persist")

    def drop(self) -> None:
        self.kept, self.files = {}, {}

    def close(self) -> None:
        self.calls.append("close")
