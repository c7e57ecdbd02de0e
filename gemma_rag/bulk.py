"""Filling a knowledge base from a stream, block by block: every commit is a checkpoint.

A run that was killed is started again: what is committed is found by its content hash and passed over, so nothing is
embedded twice. Who embeds is a function from blocks to vectors, in order: `embedded_here`, `gemma_rag.workers` or
`gemma_rag.distributed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Chunk, Document
from gemma_rag.embedding import Change, embed_categories, embed_documents
from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import StreamedRow
from gemma_rag.storage.base import Entry
from gemma_rag.vectors import Floats

_FIRST, _FEWEST, _MOST = 128, 16, 2048
"""Documents of a block, where nobody says how many: of the first one, and at least, and at most."""
_SHORT, _LONG = 10.0, 60.0
"""Seconds between commits. Blocks grow while it takes less than the one, and shrink where it takes more than the other."""
_CHARACTERS = 8_000_000
"""Of a block's texts at most, so that long documents do not fill the memory."""


class Block(NamedTuple):
    """Documents that are committed together.

    Attributes:
        rows: Where they stand in the source; every row has a document.
        change: What of them is new or changed.
    """

    rows: list[StreamedRow]
    change: Change

    def __str__(self) -> str:
        first, last = self.rows[0].bad, self.rows[-1].bad
        return f"the block of {len(self.rows)} documents from {first.source}:{first.line} to {last.source}:{last.line}"


class Embedded(NamedTuple):
    """What became of documents; light to send from one process to another.

    Attributes:
        chunks: Of each document; none for one that is refused.
        vectors: Of all chunks, one below the other.
        refused: Why, by id: a title that is too long, a text beyond the context.
    """

    chunks: list[list[Chunk]]
    vectors: Floats
    refused: dict[str, str]

    def entries(self, documents: Sequence[Document]) -> list[Entry]:
        """Documents with their chunks and vectors, without those that are refused."""
        stops = np.cumsum([len(pieces) for pieces in self.chunks])
        return [
            Entry(document, pieces, self.vectors[stop - len(pieces) : stop])
            for document, pieces, stop in zip(documents, self.chunks, stops.tolist(), strict=True)
            if pieces
        ]


NOTHING = Embedded([], np.zeros((0, 0), dtype=np.float32), {})
Embedder: TypeAlias = Callable[[Iterable[Block]], Iterator[tuple[Block, Embedded]]]


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        done: Documents that are committed or were there.
        share: How much of the source that is, from 0 to 1.
        embedded: Documents whose vectors were computed.
    """

    done: int
    share: float
    embedded: int


class Filled(NamedTuple):
    """What a run did, in documents."""

    added: int
    updated: int
    unchanged: int


def embed_block(documents: Sequence[Document], encoder: Encoder, chunker: Chunker, skip: bool) -> Embedded:
    """Embed the documents of a block.

    Args:
        documents: The documents.
        encoder: Makes the vectors.
        chunker: Cuts the documents.
        skip: Refuse documents that cannot be embedded, and go on with the others.

    Raises:
        InputError: A document cannot be embedded, and they are not skipped; or none of several can, as with wrong settings.
    """
    if not skip:
        return _put_together(documents, embed_documents(documents, encoder, chunker), {})
    refused: dict[str, str] = {}
    entries = _as_many_as_possible(documents, encoder, chunker, refused)
    if not entries and len(documents) > 1:
        raise InputError(f"none of {len(documents)} documents can be embedded, the first: {next(iter(refused.values()))}")
    return _put_together(documents, entries, refused)


def _as_many_as_possible(
    documents: Sequence[Document], encoder: Encoder, chunker: Chunker, refused: dict[str, str]
) -> list[Entry]:
    try:
        return embed_documents(documents, encoder, chunker)
    except InputError as error:
        if len(documents) == 1:
            refused[documents[0].id] = str(error)
            return []
    half = len(documents) // 2
    parts = (documents[:half], documents[half:])
    return [entry for part in parts for entry in _as_many_as_possible(part, encoder, chunker, refused)]


def _put_together(documents: Sequence[Document], entries: Sequence[Entry], refused: dict[str, str]) -> Embedded:
    chunks = {entry.document.id: list(entry.chunks) for entry in entries}
    vectors = np.concatenate([entry.vectors for entry in entries]) if entries else NOTHING.vectors
    return Embedded([chunks.get(document.id, []) for document in documents], vectors, refused)


def embedded_here(encoder: Encoder, chunker: Chunker, skip: bool) -> Embedder:
    """Embed in this process, one block after another."""

    def run(blocks: Iterable[Block]) -> Iterator[tuple[Block, Embedded]]:
        for block in blocks:
            todo = block.change.to_embed
            yield block, embed_block(todo, encoder, chunker, skip) if todo else NOTHING

    return run


class Pace:
    """How many documents a block has: as given, or so many that a commit comes every ten seconds to a minute."""

    def __init__(self, batch: int | None) -> None:
        if batch is not None and batch < 1:
            raise InputError(f"a batch has at least 1 document, and {batch} was asked for")
        self.size = batch or _FIRST
        self._fixed = batch is not None

    def took(self, seconds: float) -> None:
        """Take note of how long it was from one commit to the next."""
        if self._fixed:
            return
        if seconds < _SHORT:
            self.size = min(2 * self.size, _MOST)
        elif seconds > _LONG:
            self.size = max(self.size // 2, _FEWEST)


def in_blocks(rows: Iterable[StreamedRow], pace: Pace, on_bad: Callable[[StreamedRow], None]) -> Iterator[list[StreamedRow]]:
    """Rows with documents in blocks; the others go to `on_bad`."""
    block: list[StreamedRow] = []
    characters = 0
    for row in rows:
        if row.document is None:
            on_bad(row)
            continue
        block.append(row)
        characters += len(row.document.text)
        if len(block) >= pace.size or characters >= _CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def fill(
    base: KnowledgeBase,
    rows: Iterable[StreamedRow],
    embedder: Embedder,
    *,
    batch: int | None = None,
    share: Callable[[], float] = lambda: 0.0,
    on_bad: Callable[[StreamedRow], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Filled:
    """Add documents block by block, each block as one commit.

    Args:
        base: What they are added to.
        rows: The documents; ids differ.
        embedder: Who embeds them.
        batch: Documents of a block. None: few for a slow encoder, more for a fast one.
        share: How much of the source has been read, from 0 to 1.
        on_bad: Told of rows without a document, and of documents that were refused.
        on_progress: Told after each block.

    Raises:
        KnowledgeBaseError: A commit failed; those before it stand.
    """
    pace = Pace(batch)
    shares: list[float] = []

    def prepared() -> Iterator[Block]:
        for part in in_blocks(rows, pace, on_bad):
            shares.append(share())
            yield Block(part, base.changes([row.document for row in part if row.document is not None]))

    made: set[str] = set()  # categories that came with a block of this run
    before = time.monotonic()
    added = updated = unchanged = embedded = 0
    for block, result in embedder(prepared()):
        for row in block.rows:
            if row.document is not None and (problem := result.refused.get(row.document.id)):
                raw = row.document.model_dump(mode="json")
                on_bad(row._replace(document=None, problem=problem, raw=raw))
        entries = block.change.entries(result.entries(block.change.to_embed))
        replaced = sum(entry.document.id in block.change.replaced for entry in entries)
        if entries:
            used = {name for entry in entries for name in (entry.document.category, *entry.document.also_in)}
            new = [category for category in block.change.categories if category.name in used - made]
            base.commit(entries, embed_categories(new, base.encoder) if new else [])
            made |= used
        added, updated = added + len(entries) - replaced, updated + replaced
        unchanged, embedded = unchanged + block.change.unchanged, embedded + len(result.chunks)
        now = time.monotonic()
        pace.took(now - before)
        before = now
        on_progress(Progress(added + updated + unchanged, shares.pop(0), embedded))
    return Filled(added, updated, unchanged)
