"""A row as Chroma keeps it, and what its filters can ask of metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from gemma_rag.documents import Chunk
from gemma_rag.index.remote import RemoteRow, facets_of

_BYTES = 8_000_000
"""Of one request, about, at most: the server refuses bodies of more than 40 MB."""

_FACETS = 1_000_000
"""Of one document, at most: Chroma sets no limit."""

Item = TypeVar("Item")


def metadata_of(row: RemoteRow) -> dict[str, Any]:
    """What Chroma keeps beside a vector: what filters need, and the rest in one text."""
    rest = {
        "hash": row.hash,
        "place": row.place,
        "of": row.of,
        "title": row.title,
        "metadata": row.metadata,
        "chunk": [row.chunk.start, row.chunk.end, list(row.chunk.headings)],
    }
    return {
        "document_id": row.id,
        "generation": row.generation,
        "category": row.category,
        "also_in": list(row.also_in)
        or None,  # Chroma takes no empty lists, and keeps what a row had before where it has nothing
        "facets": facets_of(row.metadata, _FACETS) or None,
        "row": json.dumps(rest, ensure_ascii=False),
    }


def rows_in(answer: Mapping[str, Any]) -> list[RemoteRow]:
    """The rows of an answer of Chroma's, in its order, with vectors where it has them; those that are gone are left out."""
    vectors = answer.get("embeddings")
    out = []
    for i, (entry, piece) in enumerate(zip(answer["metadatas"], answer["documents"], strict=True)):
        if entry is None or piece is None:
            continue  # deleted while Chroma put the answer together
        rest = json.loads(entry["row"])
        start, end, headings = rest["chunk"]
        out.append(
            RemoteRow(
                id=entry["document_id"],
                hash=rest["hash"],
                generation=entry["generation"],
                place=rest["place"],
                of=rest["of"],
                category=entry["category"],
                also_in=tuple(entry.get("also_in") or ()),
                title=rest["title"],
                metadata=rest["metadata"],
                piece=piece,
                chunk=Chunk(start=start, end=end, headings=tuple(headings)),
                vector=None if vectors is None else np.asarray(vectors[i], dtype=np.float32),
            )
        )
    return out


def included(vectors: bool) -> list[str]:
    """What to ask for, so that `rows_in` can read the answer."""
    return ["metadatas", "documents", *(["embeddings"] if vectors else [])]


def batches(rows: Sequence[RemoteRow], most: int) -> Iterator[list[RemoteRow]]:
    """Rows in requests that are neither too many nor too large."""
    batch: list[RemoteRow] = []
    size = 0
    for row in rows:
        own = 4 * len(row.piece) + 16 * (0 if row.vector is None else len(row.vector)) + 1_000
        if batch and (len(batch) == most or size + own > _BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += own
    if batch:
        yield batch


def slices(items: Sequence[Item], most: int) -> Iterator[list[Item]]:
    """The items in lists of at most so many."""
    return (list(items[i : i + most]) for i in range(0, len(items), most))
