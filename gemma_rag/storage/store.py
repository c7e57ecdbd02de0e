"""Where a knowledge base is kept: documents in SQLite, vectors in memory-mapped segments, a manifest as the commit point.

A folder holds

    manifest.json        format version, space, counts, checksums, and the names of the segments
    documents.sqlite     documents, chunks, categories; each row with the generation that it was born in and died in
    segment-<g>.bin      vectors, words and summaries of what generation g added or merged, written once
    graph-<g>-<r>.faiss  a graph over the large category whose rows begin at r there, if `compact` was asked to build any
    attached-<g>-<name>  what was learned from labelled questions, written once by generation g
    lock                 held by the one process that writes

A commit writes the new segment, then the rows of the next generation, and last replaces the manifest, which is atomic.
Until then every reader, and whoever comes after a kill, sees the generation that the manifest names: rows of a later one
are not looked at and are swept away by the next writer. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.encoders.base import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.index.compressed import PRECISIONS, Precision
from gemma_rag.storage.base import Entry, StoredCategory
from gemma_rag.storage.building import NewDocument, merged
from gemma_rag.storage.files import LOCK, canonical_json, connect, locked, remove_abandoned, sync, sync_folder
from gemma_rag.storage.manifest import Attachment, Manifest, read_manifest, write_manifest
from gemma_rag.storage.merging import Merger
from gemma_rag.storage.reader import ATTACHED, DATABASE, LIVE, Reader, category_digest
from gemma_rag.storage.tables import SCHEMA, number_of, purge, undo_after, used_categories

_KEPT_FOR_READERS = 8
"""Generations for which deleted documents stay readable by who opened an earlier one."""

_OPEN_TRIES = 5  # a writer may replace the files between our reading of the manifest and of them


class Store(Reader):
    """Documents, chunks, vectors and categories, in memory or in a folder.

    Use `Store.create` and `Store.open`. One process writes at a time; any number read.
    """

    # -- opening and closing ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, space: Space, recipe: Mapping[str, Any], chunking: Mapping[str, Any]) -> Store:
        """An empty store in memory."""
        database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        database.executescript(SCHEMA)
        manifest = Manifest(space=space, fingerprint=space.fingerprint, recipe=dict(recipe), chunking=dict(chunking))
        return cls(manifest, database, None)

    @classmethod
    def create_in(cls, path: Path, space: Space, recipe: Mapping[str, Any], chunking: Mapping[str, Any]) -> Store:
        """An empty store in a new folder."""
        with contextlib.closing(cls.create(space, recipe, chunking)) as empty:
            return empty.save(path)

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
            self._sweep(manifest)

    def compact(self, tails: Precision | None = None, graphs_above: int | None = None) -> None:
        """Forget what was deleted, and put all vectors into one segment; costs what the store holds.

        A reader of an earlier generation is told to refresh.

        Args:
            tails: How the components after the first 128 are stored from now on: ``float16`` halves them, and a cosine is off
                by up to about 2e-5 (3e-6 on average); ``int8`` makes a quarter of them, and it is off by up to about 1e-3
                (1e-4). Vectors that are read again have norm 1. What was rounded stays so. None: as they are.
            graphs_above: Build a graph (HNSW in FAISS) over each category of more rows than this, by which searches with a
                plan find about what looking at each row finds. It lasts until a commit merges its segment, which it does with
                segments of up to 100,000 rows, and every later `compact` builds it again. 0: none from now on. None: as before.

        Raises:
            InputError: The vectors are stored in less than `tails` already, or `graphs_above` is negative.
            MissingExtra: FAISS is not installed, and there is a graph to be built.
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        with self._guard, self._writing():
            before = self.manifest
            chosen = self._checked(tails or before.tails)
            above = before.graphs_above if graphs_above is None else graphs_above or None
            if above is not None and above < 0:
                raise InputError(f"graphs are built above a number of rows, 0 for none; {above} came")
            generation = before.generation + 1
            try:
                with self._explained():
                    self._database.execute("BEGIN IMMEDIATE")
                    undo_after(self._database, before.generation)
                    merger = self._merger(generation, chosen)
                    segments = merger.with_graphs(merger.merged(before.segments), above)
                    self._database.execute("COMMIT")
                    changes = {"generation": generation, "segments": segments, "tails": chosen, "graphs_above": above}
                    manifest = before.model_copy(update=changes)
                    if self.path is not None:
                        write_manifest(self.path, manifest)
            except BaseException:
                self._recover()
                raise
            self.manifest = manifest
            self._sweep(manifest, horizon=generation)
            with contextlib.suppress(sqlite3.OperationalError):  # a reader is in the way: the file stays larger than it need be
                self._database.execute("VACUUM")

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
                    undo_after(self._database, before.generation)
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
            self._sweep(manifest)

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
            undo_after(database, manifest.generation)
            dead = self.snapshot().dead
            database.execute("UPDATE documents SET dropped = died WHERE died IS NOT NULL")
            purge(database, manifest.generation)
            database.execute("VACUUM")
            if manifest.chunks:
                rows, arrays = merged([self._segments.read(item) for item in self.manifest.segments], dead, manifest.tails)
                written = copy._segments.write(f"segment-{manifest.generation}.bin", rows, arrays)
                manifest.segments = copy._merger(manifest.generation, manifest.tails).with_graphs(
                    [written], manifest.graphs_above
                )
            manifest.attachments = {
                name: copy._write_file(manifest.generation, name, data)
                for name in self.manifest.attachments
                if (data := self.attachment(name)) is not None
            }
            write_manifest(folder, manifest)
        finally:
            copy.close()

    def _checked(self, tails: Precision) -> Precision:
        """The precision that was asked for, if it can be had."""
        if tails not in PRECISIONS:
            raise InputError(f"vectors are stored as {', '.join(PRECISIONS)}; {tails!r} came")
        stored = self.manifest.tails
        if PRECISIONS.index(tails) < PRECISIONS.index(stored):
            raise InputError(
                f"{self._name()} has stored its vectors as {stored}, and {tails} cannot bring back what was rounded: index the "
                "documents anew"
            )
        return tails

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
        undo_after(self._database, before.generation)
        content = int(before.content_sha256, 16)
        documents, chunks = before.documents, before.chunks
        for gone in dict.fromkeys([*delete, *(entry.document.id for entry in entries)]):
            for seq, *_ in self._select(f"SELECT seq FROM documents WHERE id = :id AND {LIVE}", id=gone):
                digest, count = self._row_digest(seq)
                content, documents, chunks = content - digest, documents - 1, chunks - count
                run("UPDATE documents SET died = ? WHERE seq = ?", (generation, seq))
        for name in sorted({name for item in entries for name in (item.document.category, *item.document.also_in)}):
            number_of(self._database, name)
        new: list[NewDocument] = []
        for document, places, vectors in entries:
            if len(places) != len(vectors) or not len(places):
                raise InputError(f"document {document.id!r} came with {len(places)} chunks and {len(vectors)} vectors")
            home, *further = (number_of(self._database, name) for name in (document.category, *document.also_in))
            seq = run(
                "INSERT INTO documents (id, category, also_in, title, text, metadata, hash, born) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    document.id,
                    home,
                    canonical_json(further),
                    document.title,
                    document.text,
                    canonical_json(document.metadata),
                    document.content_hash,
                    generation,
                ),
            ).lastrowid
            number = int(seq or 0)
            self._database.executemany("INSERT INTO guests VALUES (?, ?)", [(code, number) for code in further])
            order = sorted(range(len(places)), key=lambda i: places[i].start)
            numbers = []
            for place in (places[i] for i in order):
                row = run(
                    "INSERT INTO chunks (document, start, stop, headings) VALUES (?, ?, ?, ?)",
                    (number, place.start, place.end, canonical_json(place.headings)),
                )
                numbers.append(int(row.lastrowid or 0))
            text = f"{document.title}\n{document.text}"
            new.append(NewDocument(number, home, further, numbers, np.asarray(vectors)[order], text))
            digest, count = self._row_digest(number)
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
        manifest = before.model_copy(
            update={
                "generation": generation,
                "documents": documents,
                "chunks": chunks,
                "categories": used_categories(self._database),
                "content_sha256": f"{content % 2**256:064x}",
                "segments": self._merger(generation, before.tails).appended(before.segments, chunks, new),
            }
        )
        run("COMMIT")
        return manifest

    def _merger(self, generation: int, tails: Precision) -> Merger:
        return Merger(self._segments, self._database, generation, self.manifest.space.dimensions, tails)

    def _sweep(self, now: Manifest, horizon: int | None = None) -> None:
        """Remove what no generation from now on needs. A kill in here leaves rubbish, never a wrong answer."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            purge(self._database, now.generation - _KEPT_FOR_READERS if horizon is None else horizon)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError:
            pass  # a reader is in the way: the next commit purges
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
