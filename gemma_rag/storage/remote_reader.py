"""Reading one generation of a knowledge base whose rows are in a vector database."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma_rag.documents import Document
from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.index.remote import Engine, RemoteRow, document_of
from gemma_rag.storage import catalogue
from gemma_rag.storage.arrays import CURE
from gemma_rag.storage.base import Entry, StoredCategory
from gemma_rag.storage.catalogue import NO_WORDS, Group, Record, Words
from gemma_rag.storage.manifest import Manifest, read_manifest


class RemoteReader:
    """The reading half of a `RemoteStore`.

    Args:
        manifest: The generation to read.
        engine: The collection.
        path: The folder.
    """

    def __init__(self, manifest: Manifest, engine: Engine, path: Path) -> None:
        self.manifest = manifest
        self.engine = engine
        self.path: Path | None = path
        self._folder = path
        self._guard = threading.RLock()
        self._records: list[Record] | None = None
        self._read: dict[str, Record] = {}  # a record never changes
        self.disturbed = 0  # searches in a row during which somebody wrote
        self._pending_of: Manifest | None = None
        self._pending_ids: frozenset[str] = frozenset()

    def close(self) -> None:
        """Let go of the connection."""
        self.engine.close()

    def has_moved(self, generation: int) -> bool:
        """Whether somebody has committed since a generation."""
        return read_manifest(self._folder).generation != generation

    def refresh(self) -> bool:
        """Move on to what another process has committed since; returns whether there was anything."""
        with self._guard:
            manifest = read_manifest(self._folder)
            if manifest.identity != self.manifest.identity:
                raise KnowledgeBaseError(
                    f"{self.path} was replaced by another knowledge base since it was opened: open it again"
                )
            moved = manifest.generation != self.manifest.generation
            self.manifest = manifest
            if moved:
                self._records = None
            return moved

    # -- reading ----------------------------------------------------------------------------------------------------

    def is_visible(self, row: RemoteRow) -> bool:
        """Whether a row belongs to the generation that is read."""
        return self._counts(row.id, row.generation)

    def _counts(self, document_id: str, generation: int) -> bool:
        now = self.manifest
        return generation <= now.generation and not (generation < now.generation and document_id in self._pending)

    @property
    def _pending(self) -> frozenset[str]:
        if self._pending_of is not self.manifest:
            self._pending_of, self._pending_ids = self.manifest, frozenset(self.manifest.pending)
        return self._pending_ids

    def attachment(self, name: str) -> bytes | None:
        """What `attach` kept under a name, or None.

        Raises:
            KnowledgeBaseError: The file is missing, or not what was written.
        """
        with self._guard:
            item = self.manifest.attachments.get(name)
            if item is None:
                return None
            try:
                data = (self._folder / item.file).read_bytes()
            except OSError as error:
                raise KnowledgeBaseError(f"{self._folder / item.file} is missing or cannot be read: {error}. {CURE}") from error
            if hashlib.sha256(data).hexdigest() != item.sha256:
                raise KnowledgeBaseError(f"{self._folder / item.file} is damaged: its checksum is wrong. {CURE}")
            return data

    def hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each document that is there, by id."""
        stamps = self.engine.stamps(ids) if ids else []
        return {stamp.id: stamp.hash for stamp in stamps if self._counts(stamp.id, stamp.generation)}

    def get(self, document_id: str) -> Entry | None:
        """A document by its id, with its chunks and their vectors, or None."""
        found = self._documents_of(self.engine.rows([document_id], vectors=True))
        return _entry(found[document_id]) if document_id in found else None

    def documents(self, ids: Sequence[str]) -> dict[str, Document]:
        """Documents by their ids.

        Raises:
            KnowledgeBaseError: One is gone, because another process has written since this generation was opened.
        """
        found = self._documents_of(self.engine.rows(ids)) if ids else {}
        if gone := [document_id for document_id in ids if document_id not in found]:
            raise KnowledgeBaseError(self._rewritten(gone))
        return {document_id: document_of(rows) for document_id, rows in found.items()}

    def entries(self) -> Iterator[Entry]:
        """Everything, a document at a time."""
        return (_entry(rows) for rows in self._streamed(vectors=True))

    def all_documents(self) -> Iterator[Document]:
        """Every document, read a little at a time."""
        return (document_of(rows) for rows in self._streamed(vectors=False))

    def stored_categories(self) -> list[StoredCategory]:
        """Every category that was ever described or used, sorted by name."""
        return [item for _, item in sorted(self._described().items())]

    def counts(self) -> dict[str, int]:
        """How many documents each category has that has any, those included that have it as a further one."""
        return {name: count for name, count in self._newest().counts.items() if count > 0}

    def groups(self) -> list[dict[str, Group]]:
        """What stage one knows of the vectors, by category, for one or more lots of them."""
        return [record.groups for record in self._known() if record.groups]

    def words(self) -> Words:
        """In how many documents each word occurs."""
        out = NO_WORDS
        for record in self._known():
            out = out.plus(record.words)
        return out

    @property
    def stale(self) -> float:
        """Share of the vectors that stage one knows and that have been deleted since, 0 to 1; `compact` makes it 0."""
        known = self._known()
        every = sum(group.size for record in known for name, group in record.groups.items())
        return min(1.0, known[-1].stale / every) if known and every else 0.0

    # -- inside: reading --------------------------------------------------------------------------------------------

    def _known(self) -> list[Record]:
        """The records of this generation, the oldest first."""
        with self._guard:
            if self._records is None:
                names = catalogue.chosen(self.engine.records(), self.manifest.generation)
                records = [self._read.get(name) or self._fetched(name) for name in names]
                expected = 1  # they follow each other without a gap, up to what the manifest says
                for record in records:
                    if record.since > expected:
                        raise KnowledgeBaseError(self._rewritten([record.name]))
                    expected = record.generation + 1
                if self.manifest.content_sha256 != (records[-1].content if records else "0" * 64):
                    raise KnowledgeBaseError(self._rewritten(["a record of what it holds"]))
                self._read = {record.name: record for record in records}
                self._records = records
            return self._records

    def _fetched(self, name: str) -> Record:
        data = self.engine.fetch(name)
        if data is None:
            raise KnowledgeBaseError(self._rewritten([name]))
        return Record.from_bytes(data, self.manifest.space.dimensions)

    def _newest(self) -> Record:
        known = self._known()
        return known[-1] if known else Record(0, 0, "0" * 64, {}, 0, {}, {}, NO_WORDS)

    def _described(self) -> dict[str, StoredCategory]:
        out: dict[str, StoredCategory] = {}
        for record in self._known():
            out |= record.described
        return out

    def _documents_of(self, rows: Iterable[RemoteRow]) -> dict[str, list[RemoteRow]]:
        """The rows of each document, without those that are not of this generation."""
        return by_document(row for row in rows if self.is_visible(row))

    def _streamed(self, *, vectors: bool) -> Iterator[list[RemoteRow]]:
        unfinished: dict[str, list[RemoteRow]] = {}
        for batch in self.engine.scan(vectors=vectors):
            for row in batch:
                if self.is_visible(row):
                    unfinished.setdefault(row.id, []).append(row)
                    if len(unfinished[row.id]) == row.of:
                        yield unfinished.pop(row.id)
        if unfinished:
            raise KnowledgeBaseError(self._rewritten(list(unfinished)))

    def _rewritten(self, gone: Sequence[str]) -> str:
        return (
            f"the collection of {self.path} no longer has {', '.join(map(repr, gone[:3]))}{' ...' if len(gone) > 3 else ''}: "
            "another process has written since it was opened, or it is damaged: refresh it, or open it again"
        )


def _entry(rows: Sequence[RemoteRow]) -> Entry:
    rows = sorted(rows, key=lambda row: row.place)
    vectors = [row.vector for row in rows if row.vector is not None]
    return Entry(document_of(rows), [row.chunk for row in rows], np.stack(vectors))


def by_document(rows: Iterable[RemoteRow]) -> dict[str, list[RemoteRow]]:
    """Rows by the id of their document."""
    out: dict[str, list[RemoteRow]] = {}
    for row in rows:
        out.setdefault(row.id, []).append(row)
    return out
