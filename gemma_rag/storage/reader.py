"""Reading one generation of a store: all of it, or an error that says that it is no longer there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.storage.files import canonical_json
from gemma_rag.storage.manifest import Manifest, read_manifest
from gemma_rag.storage.segments import CURE, Ints, Segments
from gemma_rag.vectors import Floats

DATABASE = "documents.sqlite"
ATTACHED = "attached-"
LIVE = "born <= :generation AND (died IS NULL OR died > :generation)"
"""Condition on a row: it belongs to the generation."""


class StoredCategory(NamedTuple):
    """A category with its vectors, shape ``(1 + examples, dimensions)``: of name and description, then of each example."""

    category: Category
    vectors: Floats


@dataclass(frozen=True)
class Snapshot:
    """One generation, ready to be searched. Rows are sorted by category, then by document, then by place in it.

    Attributes:
        generation: Which one.
        vectors: float32 of shape ``(chunks, dimensions)``, rows of norm 1; memory-mapped where no row had to be moved.
        chunks: int64 of shape ``(chunks,)``: the chunk of each row.
        documents: int64 of shape ``(chunks,)``: the document of each row.
        codes: int64 of shape ``(chunks,)``: the category of each row, an index into `categories`.
        guests: int64 of shape ``(m, 2)``, sorted: a row, and a further category that its document belongs to.
        categories: Those that have documents, sorted by name.
    """

    generation: int
    vectors: Floats
    chunks: Ints
    documents: Ints
    codes: Ints
    guests: Ints
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
        """Everything that a search needs, of the current generation."""
        with self._reading():
            live = self._select(
                "SELECT chunks.seq, documents.seq, documents.category, documents.also_in "
                "FROM chunks JOIN documents ON documents.seq = chunks.document "
                f"WHERE {LIVE} ORDER BY documents.category, documents.seq, chunks.start, chunks.seq"
            )
            chunks = np.array([row[0] for row in live], dtype=np.int64)
            documents = np.array([row[1] for row in live], dtype=np.int64)
            further = [(i, name) for i, row in enumerate(live) if row[3] != "[]" for name in json.loads(row[3])]
            used = sorted({row[2] for row in live} | {name for _, name in further})
            code = {name: i for i, name in enumerate(used)}
            codes = np.array([code[row[2]] for row in live], dtype=np.int64)
            known = {item.category.name: item for item in self.stored_categories()}
            if missing := [name for name in used if name not in known]:
                raise KnowledgeBaseError(f"{self._name(DATABASE)} is damaged: no vector for the categories {missing}")
            return Snapshot(
                generation=self.manifest.generation,
                vectors=self._segments.gather(self.manifest.segments, chunks),
                chunks=chunks,
                documents=documents,
                codes=codes,
                guests=np.array(sorted((i, code[name]) for i, name in further), dtype=np.int64).reshape(-1, 2),
                categories=tuple(known[name] for name in used),
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

    def get(self, document_id: str) -> tuple[Document, list[Chunk], Ints] | None:
        """A document by its id, with its chunks and their numbers, or None."""
        with self._reading():
            rows = self._select(f"SELECT seq FROM documents WHERE id = :id AND {LIVE}", id=document_id)
            if not rows:
                return None
            chunks = self._select(
                "SELECT start, stop, headings, seq FROM chunks WHERE document = :seq ORDER BY start, seq", seq=rows[0][0]
            )
            document = self.documents([rows[0][0]])[rows[0][0]]
        return document, [_chunk(row) for row in chunks], np.array([row[3] for row in chunks], dtype=np.int64)

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
                )
                found.update({row[0]: _document(row[1:]) for row in rows})
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
        """Every document, in the order in which they came."""
        with self._reading():
            rows = self._select(f"SELECT id, category, title, text, metadata, also_in FROM documents WHERE {LIVE} ORDER BY seq")
        return map(_document, rows)

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

    def vectors_of(self, chunks: Ints) -> Floats:
        """The vectors of chunks by their numbers, in that order."""
        with self._reading():
            return self._segments.gather(self.manifest.segments, chunks)

    # -- inside: reading --------------------------------------------------------------------------------------------

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
        row = self._database.execute(
            "SELECT id, category, also_in, title, text, metadata, hash FROM documents WHERE seq = ?", (seq,)
        ).fetchone()
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


def _document(row: Sequence[Any]) -> Document:
    return Document.model_construct(
        id=row[0], category=row[1], title=row[2], text=row[3], metadata=json.loads(row[4]), also_in=tuple(json.loads(row[5]))
    )


def _chunk(row: Sequence[Any]) -> Chunk:
    return Chunk.model_construct(start=row[0], end=row[1], headings=tuple(json.loads(row[2])))


def _batches(values: Sequence[Any], size: int = 500) -> Iterator[list[Any]]:
    for first in range(0, len(values), size):
        yield list(values[first : first + size])
