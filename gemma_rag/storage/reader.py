"""Reading one generation of a store: all of it, or an error that says that it is no longer there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.arrays import CURE
from gemma_rag.storage.base import Entry, StoredCategory
from gemma_rag.storage.files import canonical_json
from gemma_rag.storage.manifest import Manifest, read_manifest
from gemma_rag.storage.segments import Ints, SegmentData, Segments

DATABASE = "documents.sqlite"
_BATCH = 500  # rows that are read at a time
ATTACHED = "attached-"
LIVE = "born <= :generation AND (died IS NULL OR died > :generation)"
"""Condition on a row: it belongs to the generation."""


@dataclass(frozen=True)
class Snapshot:
    """One generation, as a search reads it.

    Attributes:
        generation: Which one.
        segments: The names of its segments, and their arrays.
        dead: int64, ascending: numbers of documents that were deleted or replaced; segments may still have their rows.
        names: The name of each category by its number.
        categories: Every category that was ever described or used, sorted by name.
    """

    generation: int
    segments: tuple[tuple[str, SegmentData], ...]
    dead: Ints
    names: Mapping[int, str]
    categories: tuple[StoredCategory, ...]


class Reader:
    """The reading half of a `Store`.

    Args:
        manifest: The generation to read.
        database: Documents, chunks and categories.
        path: The folder, or None for a store in memory.
    """

    def __init__(self, manifest: Manifest, database: sqlite3.Connection, path: Path | None) -> None:
        self.manifest = manifest
        self.path = path
        self._database = database
        self._guard = threading.RLock()
        self._close = weakref.finalize(self, database.close)  # nobody has to close a knowledge base in memory
        self._segments = Segments(path, manifest.space.dimensions)
        self._files: dict[str, bytes] = {}  # attachments of a store in memory
        self._known_names: dict[int, str] = {}

    def close(self) -> None:
        """Let go of the database file."""
        self._close()

    def refresh(self) -> bool:
        """Move on to what another process has committed since; returns whether there was anything."""
        if self.path is None:
            return False
        manifest = read_manifest(self.path)
        if manifest.identity != self.manifest.identity:
            raise KnowledgeBaseError(f"{self.path} was replaced by another knowledge base since it was opened: open it again")
        moved = manifest.generation != self.manifest.generation
        self.manifest = manifest
        return moved

    # -- reading ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that a search needs, of the current generation; no document is read."""
        with self._reading():
            dead = self._select("SELECT seq FROM documents WHERE died IS NOT NULL AND died <= :generation ORDER BY seq")
            return Snapshot(
                generation=self.manifest.generation,
                segments=tuple((item.file, self._segments.read(item)) for item in self.manifest.segments),
                dead=np.array([row[0] for row in dead], dtype=np.int64),
                names=self._names(),
                categories=tuple(self.stored_categories()),
            )

    def stored_categories(self) -> list[StoredCategory]:
        """Every category that was ever described or used, sorted by name."""
        with self._reading():
            rows = self._select(f"SELECT name, description, examples, vectors FROM categories WHERE {LIVE} ORDER BY name")
            return [
                StoredCategory(
                    Category(name=name, description=text, examples=tuple(json.loads(examples))),
                    np.frombuffer(blob, dtype="<f4").astype(np.float32).reshape(-1, self.manifest.space.dimensions),
                )
                for name, text, examples, blob in rows
            ]

    def hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each document that is there, by id."""
        with self._reading():
            found: dict[str, str] = {}
            for batch in _batches(ids):
                marks = ",".join("?" * len(batch))
                rows = self._database.execute(
                    f"SELECT id, hash, born, died FROM documents WHERE id IN ({marks})",
                    batch,
                ).fetchall()
                found.update({row[0]: row[1] for row in rows if self._is_live(row[2], row[3])})
            return found

    def get(self, document_id: str) -> Entry | None:
        """A document by its id, with its chunks and their vectors, or None."""
        with self._reading():
            rows = self._select(f"SELECT seq, category FROM documents WHERE id = :id AND {LIVE}", id=document_id)
            return self._entry(*rows[0]) if rows else None

    def entries(self) -> Iterator[Entry]:
        """Everything, a document at a time, in the order in which they came."""
        last = 0
        while True:
            with self._reading():
                rows = self._select(
                    f"SELECT seq, category FROM documents WHERE seq > :last AND {LIVE} ORDER BY seq LIMIT {_BATCH}", last=last
                )
                found = [self._entry(*row) for row in rows]
            if not rows:
                return
            yield from found
            last = rows[-1][0]

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by their numbers.

        Raises:
            KnowledgeBaseError: One is gone, because another process has rewritten the folder since it was opened.
        """
        found: dict[int, Document] = {}
        with self._reading():
            for batch in _batches([int(number) for number in numbers]):
                marks = ",".join("?" * len(batch))
                rows = self._database.execute(
                    f"SELECT seq, id, category, title, text, metadata, also_in FROM documents WHERE seq IN ({marks})",
                    batch,
                ).fetchall()
                found.update({row[0]: self._document(row[1:]) for row in rows})
        if len(found) < len(set(numbers)):
            raise KnowledgeBaseError(self._rewritten())
        return found

    def chunk_places(self, numbers: Sequence[int]) -> dict[int, Chunk]:
        """Chunks by their numbers."""
        found: dict[int, Chunk] = {}
        with self._reading():
            for batch in _batches([int(number) for number in numbers]):
                marks = ",".join("?" * len(batch))
                rows = self._database.execute(
                    f"SELECT start, stop, headings, seq FROM chunks WHERE seq IN ({marks})",
                    batch,
                )
                found.update({row[3]: _chunk(row) for row in rows})
        return found

    def all_documents(self) -> Iterator[Document]:
        """Every document, in the order in which they came; read a little at a time."""
        last = 0
        while True:
            with self._reading():
                rows = self._select(
                    "SELECT seq, id, category, title, text, metadata, also_in FROM documents "
                    f"WHERE seq > :last AND {LIVE} ORDER BY seq LIMIT {_BATCH}",
                    last=last,
                )
                found = [self._document(row[1:]) for row in rows]
            if not rows:
                return
            yield from found
            last = rows[-1][0]

    def ids(self) -> dict[int, str]:
        """The id of every document by its number."""
        with self._reading():
            return dict(self._select(f"SELECT seq, id FROM documents WHERE {LIVE}"))

    def metadata(self) -> dict[int, dict[str, Any]]:
        """The metadata of every document by its number."""
        with self._reading():
            return {seq: json.loads(text) for seq, text in self._select(f"SELECT seq, metadata FROM documents WHERE {LIVE}")}

    def attachment(self, name: str) -> bytes | None:
        """What `Store.attach` kept under a name, or None.

        Raises:
            KnowledgeBaseError: The file is missing, or not what was written.
        """
        with self._reading():
            item = self.manifest.attachments.get(name)
            if item is None:
                return None
            try:
                data = self._files[item.file] if self.path is None else (self.path / item.file).read_bytes()
            except OSError as error:
                raise KnowledgeBaseError(f"{self._name(item.file)} is missing or cannot be read: {error}. {CURE}") from error
            if hashlib.sha256(data).hexdigest() != item.sha256:
                raise KnowledgeBaseError(f"{self._name(item.file)} is damaged: its checksum is wrong. {CURE}")
            return data

    # -- inside: reading --------------------------------------------------------------------------------------------

    def _entry(self, seq: int, category: int) -> Entry:
        chunks = self._select(
            "SELECT start, stop, headings, seq FROM chunks WHERE document = :seq ORDER BY start, seq", seq=seq
        )
        document = self.documents([seq])[seq]
        wanted = np.array([row[3] for row in chunks], dtype=np.int64)
        for item in reversed(self.manifest.segments):
            data = self._segments.read(item)
            first, last = np.searchsorted(data.categories, [category, category + 1]).tolist()
            at = first + int(np.searchsorted(data.documents[first:last], seq))
            if at < last and data.documents[at] == seq:
                rows = np.arange(at, min(at + len(wanted), last))
                if not np.array_equal(data.chunks[rows], wanted):
                    break
                return Entry(document, [_chunk(row) for row in chunks], data.vectors(rows))
        raise KnowledgeBaseError(f"{self._name()} is damaged: document {document.id!r} has chunks without a vector. {CURE}")

    def _document(self, row: Sequence[Any]) -> Document:
        also_in = json.loads(row[5]) if row[5] != "[]" else ()
        names = self._known_names
        if row[1] not in names or not all(number in names for number in also_in):
            names = self._names()
        return Document.model_construct(
            id=row[0],
            category=names[row[1]],
            title=row[2],
            text=row[3],
            metadata=json.loads(row[4]) if row[4] != "{}" else {},
            also_in=tuple(names[number] for number in also_in),
        )

    def _names(self) -> dict[int, str]:
        """The name of each category by its number; numbers are given once and for all."""
        known = self._known_names
        rows = self._database.execute("SELECT number, name FROM names WHERE number > ?", (max(known, default=0),)).fetchall()
        if rows:
            self._known_names = known = known | dict(rows)
        return known

    def _check_rows(self) -> None:
        """Compare every live row with the manifest's count and sum."""
        with self._reading():
            problem = self._database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if problem != "ok":
                raise KnowledgeBaseError(f"{self._name(DATABASE)} is damaged: {problem}. {CURE}")
            numbers = [row[0] for row in self._select(f"SELECT seq FROM documents WHERE {LIVE}")]
            digests = [self._row_digest(number) for number in numbers]
            content = sum(digest for digest, _ in digests)
            for row in self._select(f"SELECT name, description, examples, vectors FROM categories WHERE {LIVE}"):
                content += category_digest(*row)
        found = (len(numbers), sum(count for _, count in digests), f"{content % 2**256:064x}")
        expected = (self.manifest.documents, self.manifest.chunks, self.manifest.content_sha256)
        if found != expected:
            raise KnowledgeBaseError(
                f"{self._name(DATABASE)} is damaged: it holds {found[0]} documents in {found[1]} chunks and the manifest says "
                f"{expected[0]} in {expected[1]}, or their contents have changed. {CURE}"
            )

    def _row_digest(self, seq: int) -> tuple[int, int]:
        """A number that stands for a document's whole row and its chunks, and how many chunks it has."""
        names = self._names()
        category, also_in, *row = self._database.execute(
            "SELECT category, also_in, id, title, text, metadata, hash FROM documents WHERE seq = ?", (seq,)
        ).fetchone()
        row += [names.get(number) for number in (category, *json.loads(also_in))]
        chunks = self._database.execute(
            "SELECT seq, start, stop, headings FROM chunks WHERE document = ? ORDER BY seq", (seq,)
        ).fetchall()
        return int.from_bytes(
            hashlib.sha256(canonical_json([seq, row, chunks]).encode("utf-8", "surrogatepass")).digest(), "big"
        ), len(chunks)

    def _select(self, statement: str, **values: object) -> list[Any]:
        return self._database.execute(statement, {"generation": self.manifest.generation, **values}).fetchall()

    def _is_live(self, born: int, died: int | None) -> bool:
        return born <= self.manifest.generation and (died is None or died > self.manifest.generation)

    def _name(self, file: str = "") -> str:
        return str(self.path / file) if self.path is not None else "the knowledge base in memory"

    def _rewritten(self) -> str:
        return (
            f"{self._name()} was rewritten by another process since it was opened, or is damaged: refresh it, or open it again"
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Read this generation: all of it, or an error that says that it is no longer there."""
        with self._guard, self._explained():
            try:
                yield
            except KnowledgeBaseError as error:
                if self.path is not None and read_manifest(self.path).generation != self.manifest.generation:
                    raise KnowledgeBaseError(self._rewritten()) from error
                raise
            except (TypeError, ValueError) as error:  # a value of another kind than was written
                raise KnowledgeBaseError(f"{self._name(DATABASE)} is damaged: {error}. {CURE}") from error
            purged = self._database.execute("PRAGMA user_version").fetchone()[0]
            if purged > self.manifest.generation:  # looked at last: what was read before cannot have been purged
                raise KnowledgeBaseError(self._rewritten())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the database's own errors into ours, with the file's name."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise KnowledgeBaseError(f"{self._name(DATABASE)} cannot be used: {error}") from error
        except OSError as error:
            raise KnowledgeBaseError(f"{self._name()} cannot be written: {error}") from error


def category_digest(name: str, description: str, examples: str, vectors: bytes) -> int:
    """A number that stands for a category's whole row."""
    row = canonical_json([name, description, examples, vectors.hex()])
    return int.from_bytes(hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest(), "big")


def _chunk(row: Sequence[Any]) -> Chunk:
    return Chunk.model_construct(start=row[0], end=row[1], headings=tuple(json.loads(row[2])) if row[2] != "[]" else ())


def _batches(values: Sequence[Any], size: int = _BATCH) -> Iterator[list[Any]]:
    for first in range(0, len(values), size):
        yield list(values[first : first + size])
