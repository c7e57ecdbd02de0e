"""What a knowledge base asks of its store, whatever engine keeps the vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.storage.manifest import Manifest
from gemma_rag.vectors import Floats


class Entry(NamedTuple):
    """A document with its chunks and their vectors, shape ``(len(chunks), dimensions)``."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: Floats


class StoredCategory(NamedTuple):
    """A category with its vectors, shape ``(1 + examples, dimensions)``: of name and description, then of each example."""

    category: Category
    vectors: Floats


class KnowledgeStore(Protocol):
    """Documents, chunks, vectors and categories, with one writer at a time and any number of readers.

    Adding, deleting and making it last are one call, `commit`, because a change has to be there as a whole or not at all.
    """

    manifest: Manifest
    path: Path | None

    def close(self) -> None:
        """Let go of files and connections."""
        ...

    def refresh(self) -> bool:
        """Move on to what another process has committed since; returns whether there was anything."""
        ...

    def commit(
        self, entries: Sequence[Entry] = (), delete: Sequence[str] = (), categories: Sequence[StoredCategory] = ()
    ) -> None:
        """Apply a change: all of it, or, after a kill, none of it.

        Args:
            entries: Documents to add; each replaces the one with its id.
            delete: Ids to delete; unknown ones are passed over.
            categories: Categories to add or to describe anew.
        """
        ...

    def compact(self) -> None:
        """Forget what was deleted, and put together what many commits have scattered."""
        ...

    def attach(self, files: Mapping[str, bytes | None]) -> None:
        """Keep small files with the knowledge base, or let go of them (None)."""
        ...

    def attachment(self, name: str) -> bytes | None:
        """What `attach` kept under a name, or None."""
        ...

    def hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """The content hash of each document that is there, by id."""
        ...

    def get(self, document_id: str) -> Entry | None:
        """A document by its id, with its chunks and their vectors, or None."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Everything, a little at a time."""
        ...

    def all_documents(self) -> Iterator[Document]:
        """Every document, a little at a time."""
        ...

    def stored_categories(self) -> list[StoredCategory]:
        """Every category that was ever described or used, sorted by name."""
        ...
