"""Where a knowledge base is kept: documents in SQLite, vectors in memory-mapped arrays, a manifest as the commit point.

A folder holds

    manifest.json        format version, space, counts, checksums, and the names of the vector files
    documents.sqlite     documents, chunks, categories; each row with the generation that it was born in and died in
    vectors-<g>.npy      float32 (n, dimensions), written once by generation g
    rows-<g>.npy         int64 (n,), the chunk that each vector belongs to
    lock                 held by the one process that writes

A commit writes the new vector files, then the rows of the next generation, and last replaces the manifest, which is
atomic. Until then every reader, and whoever comes after a kill, sees the generation that the manifest names: rows of a
later one are not looked at and are swept away by the next writer. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders.base import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.storage.files import LOCK, canonical_json, connect, locked, remove_abandoned, sync_folder
from gemma_rag.storage.manifest import Manifest, Segment, read_manifest, write_manifest
from gemma_rag.storage.segments import CURE, Ints, Segments
from gemma_rag.vectors import Floats

DATABASE = "documents.sqlite"
_MOST_SEGMENTS = 8
_OPEN_TRIES = 5  # a writer may replace the files between our reading of the manifest and of them

_SCHEMA = """
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, category TEXT NOT NULL, title TEXT NOT NULL,
    text TEXT NOT NULL, metadata TEXT NOT NULL, hash TEXT NOT NULL, born INTEGER NOT NULL, died INTEGER);
CREATE INDEX documents_by_id ON documents (id);
CREATE TABLE chunks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents (seq),
    start INTEGER NOT NULL, stop INTEGER NOT NULL, headings TEXT NOT NULL);
CREATE INDEX chunks_by_document ON chunks (document);
CREATE TABLE categories (
    name TEXT NOT NULL, description TEXT NOT NULL, vector BLOB NOT NULL, born INTEGER NOT NULL, died INTEGER);
"""
_LIVE = "born <= :generation AND (died IS NULL OR died > :generation)"


class Entry(NamedTuple):
    """A document with its chunks and their vectors, shape ``(len(chunks), dimensions)``."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: Floats


class StoredCategory(NamedTuple):
    """A category with the vector of its name and description, shape ``(dimensions,)``."""

    category: Category
    vector: Floats


@dataclass(frozen=True)
class Snapshot:
    """One generation, ready to be searched. Rows are sorted by category, then by document, then by place in it.

    Attributes:
        generation: Which one.
        vectors: float32 of shape ``(chunks, dimensions)``, rows of norm 1; memory-mapped where no row had to be moved.
        chunks: int64 of shape ``(chunks,)``: the chunk of each row.
        documents: int64 of shape ``(chunks,)``: the document of each row.
        codes: int64 of shape ``(chunks,)``: the category of each row, an index into `categories`.
        categories: Those that have documents, sorted by name.
    """

    generation: int
    vectors: Floats
    chunks: Ints
    documents: Ints
    codes: Ints
    categories: tuple[StoredCategory, ...]


class Store:
    """Documents, chunks, vectors and categories, in memory or in a folder.

    Use `Store.create` and `Store.open`. One process writes at a time; any number read.
    """

    def __init__(self, manifest: Manifest, database: sqlite3.Connection, path: Path | None) -> None:
        self.manifest = manifest
        self.path = path
        self._database = database
        self._guard = threading.RLock()
        self._segments = Segments(path, manifest.space.dimensions)

    # -- opening and closing ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, space: Space, recipe: Mapping[str, Any], chunking: Mapping[str, Any]) -> Store:
        """An empty store in memory."""
        database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        database.executescript(_SCHEMA)
        manifest = Manifest(space=space, fingerprint=space.fingerprint, recipe=dict(recipe), chunking=dict(chunking))
        return cls(manifest, database, None)

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Store:
        """Open a folder as it was last committed.

        Args:
            path: The folder.
            verify: Read every file once and compare its checksum.

        Raises:
            KnowledgeBaseError: The folder is absent, unfinished, damaged, or of another format; the file is named.
        """
        for left in reversed(range(_OPEN_TRIES)):
            manifest = read_manifest(path)
            store = cls(manifest, connect(path / DATABASE), path)
            try:
                store._segments.check(manifest.segments, checksums=verify)
                if verify:
                    store._check_rows()
            except BaseException as error:
                store.close()
                if left and isinstance(error, KnowledgeBaseError) and read_manifest(path).generation != manifest.generation:
                    continue
                raise
            return store
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Let go of the database file."""
        self._database.close()

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
                "SELECT chunks.seq, documents.seq, documents.category "
                "FROM chunks JOIN documents ON documents.seq = chunks.document "
                f"WHERE {_LIVE} ORDER BY documents.category, documents.seq, chunks.start, chunks.seq"
            )
            chunks = np.array([row[0] for row in live], dtype=np.int64)
            documents = np.array([row[1] for row in live], dtype=np.int64)
            used = sorted({row[2] for row in live})
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
                categories=tuple(known[name] for name in used),
            )

    def stored_categories(self) -> list[StoredCategory]:
        """Every category that was ever described or used, sorted by name."""
        with self._reading():
            rows = self._select(f"SELECT name, description, vector FROM categories WHERE {_LIVE} ORDER BY name")
        return [
            StoredCategory(Category(name=name, description=text), np.frombuffer(blob, dtype="<f4").astype(np.float32))
            for name, text, blob in rows
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
            rows = self._select(f"SELECT seq FROM documents WHERE id = :id AND {_LIVE}", id=document_id)
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
                    f"SELECT seq, id, category, title, text, metadata FROM documents WHERE seq IN ({marks})",
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
            rows = self._select(f"SELECT id, category, title, text, metadata FROM documents WHERE {_LIVE} ORDER BY seq")
        return map(_document, rows)

    def metadata(self) -> dict[int, dict[str, Any]]:
        """The metadata of every document by its number."""
        with self._reading():
            return {seq: json.loads(text) for seq, text in self._select(f"SELECT seq, metadata FROM documents WHERE {_LIVE}")}

    def vectors_of(self, chunks: Ints) -> Floats:
        """The vectors of chunks by their numbers, in that order."""
        with self._reading():
            return self._segments.gather(self.manifest.segments, chunks)

    # -- writing ----------------------------------------------------------------------------------------------------

    def commit(
        self,
        entries: Sequence[Entry] = (),
        delete: Sequence[str] = (),
        categories: Sequence[StoredCategory] = (),
    ) -> None:
        """Apply a change as one generation: all of it, or, after a kill, none of it.

        Args:
            entries: Documents to add; each replaces the one with its id.
            delete: Ids to delete; unknown ones are passed over.
            categories: Categories to add or to describe anew.

        Raises:
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        with self._guard, self._writing():
            before = self.manifest
            generation = before.generation + 1
            try:
                with self._explained():
                    manifest = self._write(before, generation, entries, delete, categories)
                    if self.path is not None:
                        write_manifest(self.path, manifest)
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if self.path is not None:
                    self.manifest = read_manifest(self.path)
                raise
            self.manifest = manifest
            self._sweep(before, manifest)

    def save(self, path: Path) -> Store:
        """Write everything into a new folder, which appears only when it is complete, and open that.

        Raises:
            InputError: Something is there already.
            KnowledgeBaseError: The disk failed.
        """
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists already: save a knowledge base to a new folder, or open that one and add to it")
        scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished"
        with self._guard, self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
                remove_abandoned(left_over)
            scratch.mkdir()
            try:
                with locked(scratch / LOCK):  # held until the folder has its name, so that nobody takes it for abandoned
                    self._copy_to(scratch)
                    if path.exists():
                        path.rmdir()
                    scratch.rename(path)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            sync_folder(path.parent)
        return Store.open(path, verify=False)

    # -- inside: writing --------------------------------------------------------------------------------------------

    def _copy_to(self, folder: Path) -> None:
        database = connect(folder / DATABASE, new=True)
        self._database.backup(database)
        manifest = self.manifest.model_copy(update={"identity": uuid.uuid4().hex, "segments": []})
        copy = Store(manifest, database, folder)
        try:
            copy._undo_after(manifest.generation)
            copy._purge(manifest.generation)
            database.execute("VACUUM")
            if manifest.chunks:
                snapshot = self.snapshot()
                manifest.segments = [copy._segments.write(manifest.generation, snapshot.vectors, snapshot.chunks)]
            write_manifest(folder, manifest)
        finally:
            copy.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock, at the newest generation, with everything that an earlier kill left behind swept away."""
        if self.path is None:
            yield
            return
        with locked(self.path / LOCK):
            self.refresh()
            yield

    def _write(
        self,
        before: Manifest,
        generation: int,
        entries: Sequence[Entry],
        delete: Sequence[str],
        categories: Sequence[StoredCategory],
    ) -> Manifest:
        run = self._database.execute
        run("BEGIN IMMEDIATE")
        self._undo_after(before.generation)
        content = int(before.content_sha256, 16)
        documents, chunks = before.documents, before.chunks
        for gone in dict.fromkeys([*delete, *(entry.document.id for entry in entries)]):
            for seq, *_ in self._select(f"SELECT seq FROM documents WHERE id = :id AND {_LIVE}", id=gone):
                digest, count = self._row_digest(seq)
                content, documents, chunks = content - digest, documents - 1, chunks - count
                run("UPDATE documents SET died = ? WHERE seq = ?", (generation, seq))
        numbers: list[int] = []
        for document, places, vectors in entries:
            if len(places) != len(vectors) or not len(places):
                raise InputError(f"document {document.id!r} came with {len(places)} chunks and {len(vectors)} vectors")
            seq = run(
                "INSERT INTO documents (id, category, title, text, metadata, hash, born) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    document.id,
                    document.category,
                    document.title,
                    document.text,
                    canonical_json(document.metadata),
                    document.content_hash,
                    generation,
                ),
            ).lastrowid
            for place in places:
                row = run(
                    "INSERT INTO chunks (document, start, stop, headings) VALUES (?, ?, ?, ?)",
                    (seq, place.start, place.end, canonical_json(place.headings)),
                )
                numbers.append(int(row.lastrowid or 0))
            digest, count = self._row_digest(int(seq or 0))
            content, documents, chunks = content + digest, documents + 1, chunks + count
        for category, vector in categories:
            for old in self._select(
                f"SELECT rowid, name, description, vector FROM categories WHERE name = :name AND {_LIVE}", name=category.name
            ):
                content -= _category_digest(*old[1:])
                run("UPDATE categories SET died = ? WHERE rowid = ?", (generation, old[0]))
            blob = np.asarray(vector, dtype="<f4").tobytes()
            run(
                "INSERT INTO categories (name, description, vector, born) VALUES (?, ?, ?, ?)",
                (category.name, category.description, blob, generation),
            )
            content += _category_digest(category.name, category.description, blob)
        named = run(f"SELECT count(DISTINCT category) FROM documents WHERE {_LIVE}", {"generation": generation}).fetchone()[0]
        manifest = before.model_copy(
            update={
                "generation": generation,
                "documents": documents,
                "chunks": chunks,
                "categories": named,
                "content_sha256": f"{content % 2**256:064x}",
                "segments": self._write_vectors(before, generation, chunks, entries, np.array(numbers, dtype=np.int64)),
            }
        )
        run("COMMIT")
        return manifest

    def _write_vectors(
        self, before: Manifest, generation: int, live: int, entries: Sequence[Entry], numbers: Ints
    ) -> list[Segment]:
        """Append a segment, or, where there are many or most rows are dead, write all live rows into a new one."""
        new = (
            np.concatenate([entry.vectors for entry in entries])
            if entries
            else np.zeros((0, before.space.dimensions), np.float32)
        )
        stored = sum(segment.count for segment in before.segments) + len(new)
        if len(before.segments) < _MOST_SEGMENTS and stored <= 2 * live:
            return [*before.segments, self._segments.write(generation, new, numbers)] if len(new) else list(before.segments)
        rows = np.array(
            [
                row[0]
                for row in self._select(
                    "SELECT chunks.seq FROM chunks JOIN documents ON documents.seq = chunks.document WHERE died IS NULL "
                    "ORDER BY documents.category, documents.seq, chunks.start, chunks.seq"
                )
            ],
            dtype=np.int64,
        )
        if not len(rows):
            return []
        vectors = self._segments.gather(before.segments, rows, extra=(numbers, new))
        return [self._segments.write(generation, vectors, rows)]

    def _undo_after(self, generation: int) -> None:
        """Take back rows of generations that were never published (a writer was killed)."""
        run = self._database.execute
        run("DELETE FROM chunks WHERE document IN (SELECT seq FROM documents WHERE born > ?)", (generation,))
        run("DELETE FROM documents WHERE born > ?", (generation,))
        run("DELETE FROM categories WHERE born > ?", (generation,))
        run("UPDATE documents SET died = NULL WHERE died > ?", (generation,))
        run("UPDATE categories SET died = NULL WHERE died > ?", (generation,))

    def _purge(self, generation: int) -> None:
        """Forget rows that died in that generation or before."""
        run = self._database.execute
        run("DELETE FROM chunks WHERE document IN (SELECT seq FROM documents WHERE died <= ?)", (generation,))
        run("DELETE FROM documents WHERE died <= ?", (generation,))
        run("DELETE FROM categories WHERE died <= ?", (generation,))
        run(f"PRAGMA user_version = {int(generation)}")  # generations before this one are no longer whole

    def _sweep(self, before: Manifest, now: Manifest) -> None:
        """Remove what no generation from now on needs. A kill in here leaves rubbish, never a wrong answer."""
        rewritten = bool(before.segments) and all(segment not in now.segments for segment in before.segments)
        if rewritten:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._purge(now.generation)
                self._database.execute("COMMIT")
            except sqlite3.OperationalError:  # a reader is in the way: the next rewrite purges
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
        self._segments.sweep(now.segments)

    # -- inside: reading --------------------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        """Compare every live row with the manifest's count and sum."""
        with self._reading():
            problem = self._database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if problem != "ok":
                raise KnowledgeBaseError(f"{self._name(DATABASE)} is damaged: {problem}. {CURE}")
            numbers = [row[0] for row in self._select(f"SELECT seq FROM documents WHERE {_LIVE}")]
            digests = [self._row_digest(number) for number in numbers]
            content = sum(digest for digest, _ in digests)
            for row in self._select(f"SELECT name, description, vector FROM categories WHERE {_LIVE}"):
                content += _category_digest(*row)
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
            "SELECT id, category, title, text, metadata, hash FROM documents WHERE seq = ?", (seq,)
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


def _category_digest(name: str, description: str, vector: bytes) -> int:
    return int.from_bytes(hashlib.sha256(canonical_json([name, description, vector.hex()]).encode()).digest(), "big")


def _document(row: Sequence[Any]) -> Document:
    return Document.model_construct(id=row[0], category=row[1], title=row[2], text=row[3], metadata=json.loads(row[4]))


def _chunk(row: Sequence[Any]) -> Chunk:
    return Chunk.model_construct(start=row[0], end=row[1], headings=tuple(json.loads(row[2])))


def _batches(values: Sequence[Any], size: int = 500) -> Iterator[list[Any]]:
    for first in range(0, len(values), size):
        yield list(values[first : first + size])
