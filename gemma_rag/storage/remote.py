"""A knowledge base whose rows are in a vector database: a small folder here says which of them count.

The folder has the manifest, the lock of the one process that writes, and what was learned; share it between machines, and do
not copy it. A commit

1. adds rows and a record of the next generation, which no reader looks at yet;
2. replaces the manifest: the commit point. It names the documents whose older rows have to go (`pending`);
3. deletes those, and empties the list.

Whoever writes next finishes what a killed writer left: rows after the manifest's generation are deleted, and so are the older
rows of what is pending. Readers hide both. A reader of an earlier generation no longer finds what has been replaced or deleted
since; it moves on with `refresh`, as `TwoStageRetriever` does before every search.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.documents import Document
from gemma_rag.encoders.base import Space
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.index.remote import Engine, RemoteRow, document_of, open_engine, rows_of
from gemma_rag.storage import catalogue
from gemma_rag.storage.base import Entry, StoredCategory
from gemma_rag.storage.catalogue import Group, Record, Words
from gemma_rag.storage.files import LOCK, canonical_json, locked, remove_abandoned, sync, sync_folder
from gemma_rag.storage.manifest import Attachment, EngineAddress, Manifest, read_manifest, write_manifest
from gemma_rag.storage.reader import ATTACHED
from gemma_rag.storage.remote_reader import RemoteReader, by_document
from gemma_rag.summaries import summarize
from gemma_rag.vectors import Floats

_SMALL = 2_000
"""Rows up to which every commit makes the summaries of stage one anew; with more they are joined, and `compact` does."""

_SUMMARISED_AT_ONCE = 100_000
"""Rows that `RemoteStore.compact` holds at a time."""


class RemoteStore(RemoteReader):
    """Documents, chunks, vectors and categories in a vector database.

    Use `RemoteStore.create` and `RemoteStore.open`. One process writes at a time; any number read, as far as the database
    lets them.
    """

    # -- opening and closing ----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        address: EngineAddress,
        space: Space,
        recipe: Mapping[str, Any],
        chunking: Mapping[str, Any],
        attachments: Mapping[str, bytes] | None = None,
    ) -> RemoteStore:
        """An empty store: a new folder, and a new collection.

        Args:
            path: The folder; it must not exist, or be empty.
            address: Of the database; a collection without a name gets one.
            space: Of the vectors.
            recipe: Loads the same encoder again, without secrets.
            chunking: How documents are cut.
            attachments: Files to start with, as for `attach`.

        Raises:
            InputError: The folder or the collection exists already.
            MissingExtra: The database's client is not installed.
            KnowledgeBaseError: The database cannot be reached, or the folder cannot be written.
        """
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists already: make a knowledge base in a new folder, or open that one and add to it")
        manifest = Manifest(space=space, fingerprint=space.fingerprint, recipe=dict(recipe), chunking=dict(chunking))
        uri = str(address.uri)
        manifest.engine = EngineAddress(
            name=address.name,
            uri=uri if "://" in uri else str(Path(uri).absolute()),
            collection=address.collection or f"gemma_rag_{manifest.identity}",
        )
        engine = _engine(manifest, create=True)
        scratch = path.parent / f".{path.name}.{manifest.identity[:8]}.unfinished"
        store = cls(manifest, engine, scratch)
        try:
            with _explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
                    remove_abandoned(left_over)
                scratch.mkdir()
                with locked(scratch / LOCK):  # held until the folder has its name, so that nobody takes it for abandoned
                    files = attachments or {}
                    manifest.attachments = {name: store._write_file(0, name, data) for name, data in files.items()}
                    write_manifest(scratch, manifest)
                    if path.exists():
                        path.rmdir()
                    scratch.rename(path)
                sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            engine.drop()
            engine.close()
            raise
        store.path = store._folder = path
        return store

    @classmethod
    def open(cls, path: Path) -> RemoteStore:
        """Open a folder as it was last committed, and connect to its database.

        Raises:
            KnowledgeBaseError: The folder is absent or damaged, or the database cannot be reached, or has lost the collection.
            MissingExtra: The database's client is not installed.
        """
        manifest = read_manifest(path)
        return cls(manifest, _engine(manifest), path)

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
            InputError: A document came without chunks or vectors, or does not fit into the database.
            KnowledgeBaseError: Another process is writing, or the database or the disk failed.
        """
        with self._guard, self._writing():
            before = self.manifest
            generation = before.generation + 1
            rows = [row for entry in entries for row in rows_of(*entry, generation)]
            gone = list(dict.fromkeys([*delete, *(entry.document.id for entry in entries)]))
            old = self._documents_of(self.engine.rows(gone))
            content = int(before.content_sha256, 16) + _digest(by_document(rows)) - _digest(old)
            described = {item.category.name: item for item in categories}
            known = self._described()
            names = dict.fromkeys(name for entry in entries for name in (entry.document.category, *entry.document.also_in))
            if missing := [name for name in names if name not in described and name not in known]:
                raise InputError(f"the categories {', '.join(map(repr, missing[:10]))} are new and came without vectors")
            newest = self._newest()
            content += sum(
                _category_digest(item) - (_category_digest(was) if (was := known.get(name)) is not None else 0)
                for name, item in described.items()
            )
            changes = [(name, -1) for parts in old.values() for name in parts[0].categories]
            changes += [(name, 1) for entry in entries for name in (entry.document.category, *entry.document.also_in)]
            record = Record(
                newest.generation + 1,
                generation,
                f"{content % 2**256:064x}",
                catalogue.added(newest.counts, changes),
                newest.stale + sum(len(parts) for parts in old.values()),
                described,
                _grouped(rows),
                Words.of_texts(_texts(entry.document for entry in entries)).plus(
                    Words.of_texts(_texts(map(document_of, old.values())), sign=-1)
                ),
            )
            chunks = before.chunks + len(rows) - sum(len(parts) for parts in old.values())
            if chunks <= _SMALL:
                record = self._whole(record, rows, set(gone))
            manifest = before.model_copy(
                update={
                    "generation": generation,
                    "documents": before.documents + len(entries) - len(old),
                    "chunks": chunks,
                    "categories": sum(count > 0 for count in record.counts.values()),
                    "content_sha256": record.content,
                    "pending": sorted(old),
                }
            )
            self._publish(manifest, rows, record)

    def _whole(self, record: Record, rows: Sequence[RemoteRow], gone: Collection[str]) -> Record:
        """A record that stands for all others, its summaries made of every vector."""
        kept = [row for batch in self.engine.scan() for row in batch if self.is_visible(row) and row.id not in gone]
        return record._replace(
            since=0,
            counts={name: count for name, count in record.counts.items() if count > 0},
            stale=0,
            described=self._described() | record.described,
            groups=_grouped([*kept, *rows]),
            words=self.words().plus(record.words),
        )

    def attach(self, files: Mapping[str, bytes | None]) -> None:
        """Keep small files in the folder, or let go of them (None), as one generation."""
        with self._guard, self._writing():
            before = self.manifest
            generation = before.generation + 1
            with _explained(self._folder):
                kept = {name: item for name, item in before.attachments.items() if name not in files}
                new = {name: data for name, data in files.items() if data is not None}
                kept |= {name: self._write_file(generation, name, data) for name, data in new.items()}
                self._replace(before.model_copy(update={"generation": generation, "attachments": kept}))
            self._sweep()

    def compact(self) -> None:
        """Make the summaries of stage one anew, without what was deleted; the database compacts its rows itself.

        Reads every vector once, a part at a time.
        """
        with self._guard, self._writing():
            before = self.manifest
            groups: dict[str, Group] = {}
            block: list[RemoteRow] = []
            for batch in self.engine.scan():
                block += [row for row in batch if self.is_visible(row)]
                if len(block) >= _SUMMARISED_AT_ONCE:
                    groups, block = _with(groups, _grouped(block)), []
            groups = _with(groups, _grouped(block))
            generation = before.generation + 1
            record = Record(0, generation, before.content_sha256, self.counts(), 0, self._described(), groups, self.words())
            self._publish(before.model_copy(update={"generation": generation}), [], record)

    def _publish(self, manifest: Manifest, rows: Sequence[RemoteRow], record: Record) -> None:
        """The three steps of a commit; a failure before the second leaves what was."""
        known = [] if record.since == 0 else list(self._known())
        while catalogue.is_to_be_joined(record, known):
            record = record.after(known.pop())
        try:
            if rows:
                self.engine.add(rows)
            self.engine.put(record.name, record.to_bytes())
            self.engine.persist()
            with _explained(self._folder):
                self._replace(manifest)
        except BaseException:
            self.manifest = read_manifest(self._folder)  # which may be the new state
            raise
        self._records = [*known, record]
        self._finish()

    def _replace(self, manifest: Manifest) -> None:
        write_manifest(self._folder, manifest)
        self.manifest = manifest

    def _finish(self) -> None:
        """Step three: delete the older rows of what was replaced or deleted, and the records that others stand for."""
        if self.manifest.pending:
            self.engine.delete(self.manifest.pending, before=self.manifest.generation)
            self.engine.persist()
        names = self.engine.records()
        kept = catalogue.chosen(names, self.manifest.generation)
        for name in names:
            if catalogue.span_of(name) is not None and name not in kept:
                self.engine.put(name, None)
        if self.manifest.pending:
            with _explained(self._folder):
                self._replace(self.manifest.model_copy(update={"pending": []}))
        self._sweep()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock, at the newest generation, with everything that a killed writer left behind finished or undone."""
        with locked(self._folder / LOCK):
            self.refresh()
            self.engine.undo(after=self.manifest.generation)
            for name in self.engine.records():
                span = catalogue.span_of(name)
                if span is not None and span[1] > self.manifest.generation:
                    self.engine.put(name, None)
            if self.manifest.pending:
                self._finish()
            yield

    def _write_file(self, generation: int, name: str, data: bytes) -> Attachment:
        file = f"{ATTACHED}{generation}-{name}"
        with (self._folder / file).open("wb") as stream:
            stream.write(data)
            stream.flush()
            sync(stream.fileno())
        return Attachment(file=file, sha256=hashlib.sha256(data).hexdigest())

    def _sweep(self) -> None:
        kept = {item.file for item in self.manifest.attachments.values()}
        for left in self._folder.glob(f"{ATTACHED}*"):
            if left.name not in kept:
                with contextlib.suppress(OSError):  # a reader on Windows holds it; the next commit tries again
                    left.unlink()


def _engine(manifest: Manifest, *, create: bool = False) -> Engine:
    address = manifest.engine
    return open_engine(address.name, str(address.uri), str(address.collection), manifest.space.dimensions, create=create)


def _grouped(rows: Sequence[RemoteRow]) -> dict[str, Group]:
    """What stage one has to know of rows, by category."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for name in row.categories:
            members.setdefault(name, []).append(i)
    if not members:
        return {}
    vectors: Floats = np.stack([row.vector for row in rows if row.vector is not None])
    summaries = summarize(vectors, [np.array(places, dtype=np.int64) for places in members.values()])
    return dict(zip(members, catalogue.groups_of(summaries), strict=True))


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    return (f"{document.title}\n{document.text}" for document in documents)


def _with(groups: dict[str, Group], more: dict[str, Group]) -> dict[str, Group]:
    return groups | {name: catalogue.joined([groups[name], own]) if name in groups else own for name, own in more.items()}


def _digest(documents: Mapping[str, Sequence[RemoteRow]]) -> int:
    """The sum of a number for each document, which stands for its content and its chunks."""
    total = 0
    for document_id, rows in documents.items():
        chunks = [row.chunk.model_dump(mode="json") for row in sorted(rows, key=lambda row: row.place)]
        text = canonical_json([document_id, rows[0].hash, chunks])
        total += int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    return total


def _category_digest(item: StoredCategory) -> int:
    vectors = np.ascontiguousarray(item.vectors, dtype="<f4").tobytes().hex()
    text = canonical_json([item.category.model_dump(mode="json"), vectors])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KnowledgeBaseError(f"{path} cannot be written: {error}") from error
