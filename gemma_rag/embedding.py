"""From documents and categories to chunks and vectors: the half of indexing that needs an encoder and no knowledge base.

`changes_to` says what a store needs, the `embed` functions make it, in this process or in another, and the store commits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Encoder, Input
from gemma_rag.errors import InputError
from gemma_rag.prompts import Task
from gemma_rag.storage.base import Entry, KnowledgeStore, StoredCategory
from gemma_rag.vectors import Floats


class Change(NamedTuple):
    """What adding documents to a store comes to.

    Attributes:
        documents: Those that are new or differ from what is stored, in the order given.
        kept: Of those, by id, the ones whose text and title are as stored: chunks and vectors stay.
        categories: Categories that need a vector: new here, or described anew.
        replaced: The ids of `documents` that replace a stored one.
        unchanged: How many of those given are stored just so.
    """

    documents: list[Document]
    kept: dict[str, Entry]
    categories: list[Category]
    replaced: set[str]
    unchanged: int

    @property
    def updated(self) -> int:
        """How many of `documents` replace a stored one."""
        return len(self.replaced)

    @property
    def to_embed(self) -> list[Document]:
        """The documents whose vectors have to be computed."""
        return [document for document in self.documents if document.id not in self.kept]

    def entries(self, embedded: Sequence[Entry]) -> list[Entry]:
        """All that is to be committed, in order, given what became of `to_embed`; what is missing there is left out."""
        by_id = self.kept | {entry.document.id: entry for entry in embedded}
        return [by_id[document.id] for document in self.documents if document.id in by_id]


def changes_to(store: KnowledgeStore, documents: Sequence[Document], described: Mapping[str, Category]) -> Change:
    """Compare documents with what a store holds, by their content hashes.

    Args:
        store: As of its newest generation.
        documents: With ids that differ.
        described: Categories to describe, or to describe anew, by name.
    """
    stored = store.hashes([document.id for document in documents])
    changed = [document for document in documents if stored.get(document.id) != document.content_hash]
    kept: dict[str, Entry] = {}
    for document in changed:
        old = store.get(document.id) if document.id in stored else None
        if old is not None and (old.document.title, old.document.text) == (document.title, document.text):
            kept[document.id] = Entry(document, old.chunks, old.vectors)
    known = {item.category.name: item.category for item in store.stored_categories()} if changed or described else {}
    names = [*described, *(name for document in changed for name in (document.category, *document.also_in))]
    wanted = {name: described.get(name) or known.get(name) or Category(name=name) for name in names}
    return Change(
        documents=changed,
        kept=kept,
        categories=[category for name, category in wanted.items() if known.get(name) != category],
        replaced={document.id for document in changed if document.id in stored},
        unchanged=len(documents) - len(changed),
    )


def embed(
    documents: Sequence[Document], categories: Sequence[Category], encoder: Encoder, chunker: Chunker
) -> tuple[list[Entry], list[StoredCategory]]:
    """Cut documents and embed their chunks, and categories with their examples, in one pass of the encoder.

    Args:
        documents: What to embed.
        categories: Likewise.
        encoder: Makes the vectors.
        chunker: How documents are cut; no chunk exceeds the encoder's context either.

    Raises:
        InputError: A document cannot be cut (its title is too long), or the encoder's vectors are not of its space.
    """
    if not documents and not categories:
        return [], []  # without a look at the encoder, which may not be loaded
    chunks = cut(documents, encoder, chunker)
    inputs = [
        Input(document.text[chunk.start : chunk.end], Task.DOCUMENT, chunk.title(document.title))
        for document, pieces in zip(documents, chunks, strict=True)
        for chunk in pieces
    ]
    for category in categories:
        inputs += [Input(text, Task.CLASSIFICATION) for text in (category.text, *category.examples)]
    vectors = _encoded(inputs, encoder)
    counts = [*map(len, chunks), *(1 + len(category.examples) for category in categories)]
    parts = iter(np.split(vectors, np.cumsum(counts)[:-1]))
    return (
        [Entry(document, pieces, next(parts)) for document, pieces in zip(documents, chunks, strict=True)],
        [StoredCategory(category, next(parts)) for category in categories],
    )


def embed_documents(documents: Sequence[Document], encoder: Encoder, chunker: Chunker) -> list[Entry]:
    """`embed`, for documents alone."""
    return embed(documents, (), encoder, chunker)[0]


def embed_categories(categories: Sequence[Category], encoder: Encoder) -> list[StoredCategory]:
    """`embed`, for categories alone."""
    return embed((), categories, encoder, Chunker())[1]


def cut(documents: Sequence[Document], encoder: Encoder, chunker: Chunker) -> list[list[Chunk]]:
    """The chunks of each document, none longer than the chunker and the encoder's context allow.

    Raises:
        InputError: The title of a document leaves no room for its text.
    """
    if not documents:
        return []
    limit = min(chunker.max_tokens, encoder.space.max_tokens)
    chunker = Chunker(limit, min(chunker.overlap, limit // 2 - 1))

    def tokens(text: str) -> int:
        return encoder.count_tokens([text])[0]

    def overhead(title: str) -> int:
        return tokens(encoder.profile.prompt(Task.DOCUMENT, title))

    whole = encoder.count_tokens([encoder.profile.render(d.text, Task.DOCUMENT, d.title) for d in documents])
    return [
        [_whole(document)] if length <= chunker.max_tokens else chunker.split(document, tokens, overhead)
        for document, length in zip(documents, whole, strict=True)
    ]


def _whole(document: Document) -> Chunk:
    text = document.text
    return Chunk(start=len(text) - len(text.lstrip()), end=len(text.rstrip()))


def _encoded(inputs: Sequence[Input], encoder: Encoder) -> Floats:
    expected = (len(inputs), encoder.space.dimensions)
    vectors = encoder.encode(inputs)
    if vectors.shape != expected:
        raise InputError(f"the encoder gave an array of shape {vectors.shape}, and its space says {expected}")
    return vectors
