"""What a knowledge base asks of a vector database: rows in and out, search within categories, small records, no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from gemma_rag.documents import Chunk, Document
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.vectors import Floats

Scalar: TypeAlias = str | int | float | bool | None
Wanted: TypeAlias = Mapping[str, Sequence[Scalar]]
"""For each key of the metadata the values that are searched for; `matches` says what that means."""

ENGINES = ("milvus", "chroma")


class RemoteRow(NamedTuple):
    """One chunk of a document, with what the document's rows share.

    The text of a document is kept once: each of its rows has the piece from where its chunk begins (the first: from the
    start of the text) to where the next one does (the last: to the end). `document_of` puts them together.

    Attributes:
        id: Of the document.
        hash: Content hash of the document.
        generation: Of the commit that wrote it.
        place: Which of the document's chunks this is, from 0.
        of: How many chunks the document has.
        category: Of the document.
        also_in: Further categories of the document.
        title: Of the document.
        metadata: Of the document.
        piece: Part of the document's text.
        chunk: Where the chunk begins and ends in the document's text.
        vector: float32 of shape ``(d,)``; None where it was not asked for.
    """

    id: str
    hash: str
    generation: int
    place: int
    of: int
    category: str
    also_in: tuple[str, ...]
    title: str
    metadata: dict[str, Any]
    piece: str
    chunk: Chunk
    vector: Floats | None

    @property
    def key(self) -> str:
        """Tells it from every other row: written twice, by whoever tries again, it is there once.

        Rows of one document stand together in the order of their keys. The generation is part of it, so that content that
        comes back never overwrites a row that readers still see.
        """
        digest = hashlib.blake2b(self.id.encode(), digest_size=16).hexdigest()
        return f"{digest}-{self.generation:010d}-{self.place:06d}"

    @property
    def categories(self) -> tuple[str, ...]:
        """Every category that it is found in."""
        return (self.category, *self.also_in)


class Stamp(NamedTuple):
    """What is cheap to know of a row: of which document, which content, which commit."""

    id: str
    hash: str
    generation: int


class Engine(Protocol):
    """A collection of a vector database. It knows nothing of commits: `gemma_rag.storage.remote` makes those of it.

    Attributes:
        name: ``milvus`` or ``chroma``.
        has_words: Whether it ranks by BM25 itself.
    """

    name: str
    has_words: bool

    def add(self, rows: Sequence[RemoteRow]) -> None:
        """Add rows, in batches; one with a known key replaces the old one.

        Raises:
            InputError: A row does not fit into the database; the message names the document.
        """
        ...

    def delete(self, ids: Sequence[str], before: int) -> None:
        """Delete the rows of these documents that are of generations less than `before`."""
        ...

    def undo(self, after: int) -> None:
        """Delete the rows of every generation greater than `after`: a writer was killed before it published them."""
        ...

    def search(
        self, queries: Floats, within: Sequence[Sequence[str] | None], n: int, where: Wanted | None, generation: int
    ) -> list[list[tuple[RemoteRow, float]]]:
        """The nearest rows of each question.

        Args:
            queries: float32 of shape ``(q, d)``, rows of norm 1.
            within: For each question the categories to look into (`RemoteRow.categories` has one of them); None for all.
            n: How many rows for each question, at most.
            where: What the metadata has to hold. The database may return rows that do not match, where it cannot say it
                exactly, but never leaves one out that does: the caller looks at them again.
            generation: Rows of later ones are not looked at.

        Returns:
            Rows with their cosines, best first, each row once, without vectors; fewer than `n` only where there are no more.
        """
        ...

    def words(
        self, question: str, within: Sequence[str] | None, n: int, where: Wanted | None, generation: int
    ) -> list[RemoteRow]:
        """The rows that match a question's words best, by BM25, best first, with their vectors; arguments as of `search`.

        Raises:
            InputError: The database has no such search (`has_words`).
        """
        ...

    def homes(self, where: Wanted, generation: int, most: int) -> set[str] | None:
        """The categories that have rows with such metadata; None if more than `most` rows would have to be read to know."""
        ...

    def rows(self, ids: Sequence[str], vectors: bool = False) -> list[RemoteRow]:
        """Every row of these documents, of every generation, in any order."""
        ...

    def stamps(self, ids: Sequence[str]) -> list[Stamp]:
        """The same, without reading texts; rows of one stamp may be told once."""
        ...

    def scan(self, batch: int = 1000, vectors: bool = True) -> Iterator[list[RemoteRow]]:
        """Every row of every generation, each once, some at a time; those of a document near each other."""
        ...

    def put(self, name: str, data: bytes | None) -> None:
        """Keep a small record under a name (letters, digits, hyphens), or let go of it (None)."""
        ...

    def fetch(self, name: str) -> bytes | None:
        """What `put` kept, or None."""
        ...

    def records(self) -> list[str]:
        """The names of all records."""
        ...

    def count(self) -> int:
        """How many rows there are, of every generation."""
        ...

    def persist(self) -> None:
        """Return when what was added and deleted outlives a crash, and is what searches see."""
        ...

    def drop(self) -> None:
        """Delete the collection with everything in it."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


def open_engine(name: str, uri: str, collection: str, dimensions: int, *, create: bool = False) -> Engine:
    """Connect to a collection.

    Args:
        name: ``milvus`` or ``chroma``.
        uri: ``http://host:port``, or the file (Milvus) or folder (Chroma) of an embedded one. A token comes from the
            environment: ``GEMMA_RAG_MILVUS_TOKEN``, ``GEMMA_RAG_CHROMA_TOKEN``.
        collection: Its name.
        dimensions: Of the vectors.
        create: Make it, and fail if it is there already with rows in it; otherwise fail if it is not.

    Raises:
        InputError: No such engine, or a collection of that name exists already.
        MissingExtra: The database's client is not installed.
        KnowledgeBaseError: It cannot be reached, or has no such collection, or one that is not ours.
    """
    if name == "milvus":
        from gemma_rag.index.milvus import MilvusEngine

        return MilvusEngine(uri, collection, dimensions, create=create)
    if name == "chroma":
        from gemma_rag.index.chroma import ChromaEngine

        return ChromaEngine(uri, collection, dimensions, create=create)
    raise InputError(f"there is no engine {name!r}: take one of {', '.join(ENGINES)}")


def matches(metadata: Mapping[str, Any], where: Wanted) -> bool:
    """Whether metadata holds, under every key, one of the values; of a list any item; true is not 1."""
    return all(key in metadata and _one_of(metadata[key], values) for key, values in where.items())


def _one_of(have: Any, values: Sequence[Scalar]) -> bool:
    if isinstance(have, list):
        return any(_one_of(item, values) for item in have)
    return any(have == value and isinstance(have, bool) == isinstance(value, bool) for value in values)


def rows_of(document: Document, chunks: Sequence[Chunk], vectors: Floats, generation: int) -> list[RemoteRow]:
    """A document as the rows that are kept of it.

    Args:
        document: The document.
        chunks: At least one.
        vectors: float32 of shape ``(len(chunks), d)``.
        generation: Of the commit that adds it.

    Raises:
        InputError: There are no chunks, or not one vector for each.
    """
    if len(chunks) != len(vectors) or not len(chunks):
        raise InputError(f"document {document.id!r} came with {len(chunks)} chunks and {len(vectors)} vectors")
    order = sorted(range(len(chunks)), key=lambda i: chunks[i].start)
    starts = [chunks[i].start for i in order]
    cuts = [0, *starts[1:], len(document.text)]
    content_hash = document.content_hash
    return [
        RemoteRow(
            id=document.id,
            hash=content_hash,
            generation=generation,
            place=place,
            of=len(order),
            category=document.category,
            also_in=document.also_in,
            title=document.title,
            metadata=document.metadata,
            piece=document.text[cuts[place] : cuts[place + 1]],
            chunk=chunks[i],
            vector=np.asarray(vectors[i], dtype=np.float32),
        )
        for place, i in enumerate(order)
    ]


def document_of(rows: Iterable[RemoteRow]) -> Document:
    """The document that rows were made of.

    Args:
        rows: All rows that one commit wrote of it, in any order.

    Raises:
        KnowledgeBaseError: Some of them are missing, or they do not give the text that was written.
    """
    ordered = sorted(rows, key=lambda row: row.place)
    first = ordered[0]
    damaged = f"document {first.id!r} is damaged in the database"
    if [row.place for row in ordered] != list(range(first.of)):
        raise KnowledgeBaseError(f"{damaged}: {len(ordered)} of its {first.of} rows are there. Add it again")
    document = Document(
        id=first.id,
        text="".join(row.piece for row in ordered),
        title=first.title,
        category=first.category,
        also_in=first.also_in,
        metadata=first.metadata,
    )
    if document.content_hash != first.hash:
        raise KnowledgeBaseError(f"{damaged}: its content is not what was written. Add it again")
    return document


EVERY = "*"
"""Stands among the facets of metadata that has too many of them to be told: it may hold anything."""


def facet(key: str, value: Scalar) -> str:
    """A key of metadata and a value as one short text, equal where `matches` says that the values are.

    A database that can only compare texts filters by it exactly, up to a rare chance of 2^-60.
    """
    plain: Any = value
    if isinstance(value, float) and value.is_integer():
        plain = int(value)
    kind = "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "none" if value is None else "number"
    return hashlib.blake2b(f"{kind}\0{key}\0{plain}".encode(), digest_size=8).hexdigest()


def facets_of(metadata: Mapping[str, Any], most: int) -> list[str]:
    """The facets of metadata, of lists those of every item; `EVERY` alone if there are more than `most`."""
    found: dict[str, None] = {}
    for key, value in metadata.items():
        for plain in _scalars(value):
            found[facet(key, plain)] = None
    return list(found) if len(found) <= most else [EVERY]


def _scalars(value: Any) -> Iterator[Scalar]:
    if isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    elif not isinstance(value, dict):
        yield value
