"""Where a knowledge base is kept: documents in SQLite, vectors in memory-mapped arrays, a manifest as the commit point.

A folder holds

    manifest.json        format version, space, counts, checksums, and the names of the vector files
    documents.sqlite     documents, chunks, categories; each row with the generation that it was born in and died in
    vectors-<g>.npy      float32 (n, dimensions), written once by generation g
    rows-<g>.npy         int64 (n,), the chunk that each vector belongs to
    attached-<g>-<name>  what was learned from labelled questions, written once by generation g
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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_rag.documents import Chunk, Document
from gemma_rag.encoders.base import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.storage.files import LOCK, canonical_json, connect, locked, remove_abandoned, sync, sync_folder
from gemma_rag.storage.manifest import Attachment, Manifest, Segment, read_manifest, write_manifest
from gemma_rag.storage.reader import ATTACHED, DATABASE, LIVE, Reader, StoredCategory, category_digest
from gemma_rag.storage.segments import Ints
from gemma_rag.vectors import Floats

_MOST_SEGMENTS = 8
_OPEN_TRIES = 5  # a writer may replace the files between our reading of the manifest and of them

_SCHEMA = """
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, category TEXT NOT NULL, also_in TEXT NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL, hash TEXT NOT NULL, born INTEGER NOT NULL, died INTEGER);
CREATE INDEX documents_by_id ON documents (id);
CREATE TABLE chunks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents (seq),
    start INTEGER NOT NULL, stop INTEGER NOT NULL, headings TEXT NOT NULL);
CREATE INDEX chunks_by_document ON chunks (document);
CREATE TABLE categories (
    name TEXT NOT NULL, description TEXT NOT NULL, examples TEXT NOT NULL, vectors BLOB NOT NULL, born INTEGER NOT NULL,
    died INTEGER);
"""


class Entry(NamedTuple):
    """A document with its chunks and their vectors, shape ``(len(chunks), dimensions)``."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: Floats


class Store(Reader):
    """Documents, chunks, vectors and categories, in memory or in a folder.

    Use `Store.create` and `Store.open`. One process writes at a time; any number read.
    """

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
                    for name in manifest.attachments:
                        store.attachment(name)
            except BaseException as error:
                store.close()
                if left and isinstance(error, KnowledgeBaseError) and read_manifest(path).generation != manifest.generation:
                    continue
                raise
            return store
        raise AssertionError("unreachable")

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
                self._recover()
                raise
            self.manifest = manifest
            self._sweep(before, manifest)

    def attach(self, files: Mapping[str, bytes | None]) -> None:
        """Keep files with the folder, or let go of them (None), as one generation.

        Args:
            files: Contents by name.

        Raises:
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        with self._guard, self._writing():
            before = self.manifest
            generation = before.generation + 1
            try:
                with self._explained():
                    self._database.execute("BEGIN IMMEDIATE")
                    self._undo_after(before.generation)
                    self._database.execute("COMMIT")
                    kept = {name: item for name, item in before.attachments.items() if name not in files}
                    new = {name: data for name, data in files.items() if data is not None}
                    kept |= {name: self._write_file(generation, name, data) for name, data in new.items()}
                    manifest = before.model_copy(update={"generation": generation, "attachments": kept})
                    if self.path is not None:
                        write_manifest(self.path, manifest)
            except BaseException:
                self._recover()
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
            manifest.attachments = {
                name: copy._write_file(manifest.generation, name, data)
                for name in self.manifest.attachments
                if (data := self.attachment(name)) is not None
            }
            write_manifest(folder, manifest)
        finally:
            copy.close()

    def _recover(self) -> None:
        """After a failure: back to what the folder says, which may be the new state."""
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")
        if self.path is not None:
            self.manifest = read_manifest(self.path)

    def _write_file(self, generation: int, name: str, data: bytes) -> Attachment:
        file = f"{ATTACHED}{generation}-{name}"
        if self.path is None:
            self._files[file] = data
        else:
            with (self.path / file).open("wb") as stream:
                stream.write(data)
                stream.flush()
                sync(stream.fileno())
        return Attachment(file=file, sha256=hashlib.sha256(data).hexdigest())

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
            for seq, *_ in self._select(f"SELECT seq FROM documents WHERE id = :id AND {LIVE}", id=gone):
                digest, count = self._row_digest(seq)
                content, documents, chunks = content - digest, documents - 1, chunks - count
                run("UPDATE documents SET died = ? WHERE seq = ?", (generation, seq))
        numbers: list[int] = []
        for document, places, vectors in entries:
            if len(places) != len(vectors) or not len(places):
                raise InputError(f"document {document.id!r} came with {len(places)} chunks and {len(vectors)} vectors")
            seq = run(
                "INSERT INTO documents (id, category, also_in, title, text, metadata, hash, born) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    document.id,
                    document.category,
                    canonical_json(document.also_in),
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
        for category, vectors in categories:
            for old in self._select(
                f"SELECT rowid, name, description, examples, vectors FROM categories WHERE name = :name AND {LIVE}",
                name=category.name,
            ):
                content -= category_digest(*old[1:])
                run("UPDATE categories SET died = ? WHERE rowid = ?", (generation, old[0]))
            blob = np.asarray(vectors, dtype="<f4").tobytes()
            examples = canonical_json(category.examples)
            run(
                "INSERT INTO categories (name, description, examples, vectors, born) VALUES (?, ?, ?, ?, ?)",
                (category.name, category.description, examples, blob, generation),
            )
            content += category_digest(category.name, category.description, examples, blob)
        used = run(f"SELECT DISTINCT category, also_in FROM documents WHERE {LIVE}", {"generation": generation}).fetchall()
        manifest = before.model_copy(
            update={
                "generation": generation,
                "documents": documents,
                "chunks": chunks,
                "categories": len({name for first, further in used for name in (first, *json.loads(further))}),
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
            except sqlite3.OperationalError:
                pass  # a reader is in the way: the next rewrite purges
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
        self._segments.sweep(now.segments)
        kept = {item.file for item in now.attachments.values()}
        self._files = {file: data for file, data in self._files.items() if file in kept}
        for left in [] if self.path is None else self.path.glob(f"{ATTACHED}*"):
            if left.name not in kept:
                with contextlib.suppress(OSError):  # a reader on Windows holds it; the next commit tries again
                    left.unlink()
