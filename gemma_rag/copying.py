"""Moving a knowledge base from one engine to another, vectors and all: nothing is embedded again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.storage import EngineAddress, Entry, KnowledgeStore, Store, StoredCategory
from gemma_rag.storage.files import canonical_json
from gemma_rag.storage.manifest import MANIFEST

MARK = "copying.json"
"""Attachment of a copy that is not finished: which knowledge base it is one of."""

BATCH = 1_000
"""Documents that are committed together."""

_CHUNKS = 10_000
"""Chunks that are committed together, about, at most."""


@dataclass(frozen=True)
class CopyReport:
    """What copying did.

    Attributes:
        out: The folder of the copy.
        engine: What keeps its vectors.
        documents: How many it holds.
        chunks: Likewise.
        categories: Likewise, with those that are described and have no document.
        copied: Documents that this call wrote; the others were there, from a call that was stopped.
        deleted: Documents that such a call had written and that the source no longer has.
        content_sha256: Sum, modulo 2^256, of a SHA-256 of every document with its chunks and vectors, and of every category:
            of what was read of the source, and, in a second reading, of the copy; they were equal.
        seconds: How long it took.
    """

    out: Path
    engine: EngineAddress
    documents: int
    chunks: int
    categories: int
    copied: int
    deleted: int
    content_sha256: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """It as plain values."""
        return {**asdict(self), "out": str(self.out), "engine": self.engine.model_dump(mode="json")}


@dataclass
class Content:
    """What a knowledge base holds, counted; `digest` is a sum, so that the order does not matter."""

    documents: int = 0
    chunks: int = 0
    digest: int = 0

    def add(self, entry: Entry) -> None:
        """Count a document."""
        document = entry.document
        chunks = [[chunk.start, chunk.end, chunk.headings] for chunk in entry.chunks]
        self.documents += 1
        self.chunks += len(chunks)
        self._sum([document.id, document.content_hash, chunks], entry.vectors)

    def add_category(self, item: StoredCategory) -> None:
        """Count a category."""
        self._sum(item.category.model_dump(mode="json"), item.vectors)

    @classmethod
    def of(cls, store: KnowledgeStore) -> Content:
        """All of a store, which is read once."""
        content = cls()
        for item in store.stored_categories():
            content.add_category(item)
        for entry in store.entries():
            content.add(entry)
        return content

    def _sum(self, about: object, vectors: Any) -> None:
        row = canonical_json(about).encode("utf-8", "surrogatepass") + np.asarray(vectors, dtype="<f4").tobytes()
        self.digest = (self.digest + int.from_bytes(hashlib.sha256(row).digest(), "big")) % 2**256

    @property
    def sha256(self) -> str:
        """The sum, as 64 digits."""
        return f"{self.digest:064x}"


def copy_knowledge_base(
    source: KnowledgeBase,
    out: str | Path,
    engine: EngineAddress | None = None,
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """Copy everything into a new knowledge base: documents, chunks, vectors, categories, and what was learned.

    Whoever was stopped on the way calls it again: what is there already is found by its content hash, and left. At the end the
    copy is read and compared with the source.

    Args:
        source: What to copy; it is not changed.
        out: The folder of the copy: a new one, or that of a copy of the same source that was stopped.
        engine: What keeps the vectors there; the folder itself by default.
        batch: Documents that are committed together.
        progress: Called with the number of documents that are done, and of all.

    Raises:
        InputError: The folder holds something else, or a copy on another engine.
        KnowledgeBaseError: A disk or a database failed, or the source was changed meanwhile: call it again.
    """
    started = time.perf_counter()
    out, engine = Path(out), engine if engine is not None else EngineAddress()
    generation = source.manifest.generation
    with _copy_at(out, engine, source) as target:
        had = target.manifest.documents
        expected, written = Content(), 0
        ids: set[int] = set()
        categories = source.store.stored_categories()
        for item in categories:
            expected.add_category(item)
        if described := _differing(categories, target.store.stored_categories()):
            target.commit(categories=described)
        for entries in _batches(source.store.entries(), batch):
            for entry in entries:
                expected.add(entry)
            there = target.store.hashes([entry.document.id for entry in entries])
            new = [entry for entry in entries if there.get(entry.document.id) != entry.document.content_hash]
            if new:
                target.commit(new)
            if had:
                ids.update(hash(entry.document.id) for entry in entries)
            written += len(new)
            if progress is not None:
                progress(expected.documents, source.manifest.documents)
        extra = [] if len(target) == expected.documents else _others(target, ids)
        if extra:
            target.delete(extra)
        if source.manifest.attachments:
            target.store.attach({name: source.store.attachment(name) for name in source.manifest.attachments})
        if written > batch:
            target.compact()
        _compare(expected, Content.of(target.store), target, moved=source.manifest.generation != generation)
        target.store.attach({MARK: None})
        return CopyReport(
            out=out,
            engine=target.manifest.engine,
            documents=expected.documents,
            chunks=expected.chunks,
            categories=len(categories),
            copied=written,
            deleted=len(extra),
            content_sha256=expected.sha256,
            seconds=time.perf_counter() - started,
        )


def _copy_at(out: Path, engine: EngineAddress, source: KnowledgeBase) -> KnowledgeBase:
    """The unfinished copy of a knowledge base, which may be one that is made now."""
    manifest = source.manifest
    mark = json.dumps({"of": manifest.identity}).encode()
    if source.path is not None and out.resolve() == source.path.resolve():
        raise InputError(f"{out} is what is to be copied: give another folder for the copy")
    if not (out / MANIFEST).exists():
        settings = (manifest.space, manifest.recipe, manifest.chunking)
        store: KnowledgeStore
        if engine.name == "faiss":
            store = Store.create_in(out, *settings)
        else:
            from gemma_rag.storage.remote import RemoteStore

            store = RemoteStore.create(out, engine, *settings, attachments={MARK: mark})
        target = KnowledgeBase(store, None)
    else:
        target = KnowledgeBase.open(out)
    try:
        stored = target.store.attachment(MARK)
        if stored != mark and (stored is not None or target.manifest.generation > 0):
            raise InputError(f"{out} exists already, and is no unfinished copy of {source!r}: give a new folder")
        at = target.manifest.engine
        elsewhere = (at.name, _place(at.uri)) != (engine.name, _place(engine.uri))
        if elsewhere or engine.collection not in (None, at.collection):
            raise InputError(
                f"{out} is an unfinished copy on {at.name}{f' at {at.uri}' if at.uri else ''}: finish it with the same engine "
                "and uri, or give a new folder"
            )
        if stored is None:
            target.store.attach({MARK: mark})
    except BaseException:
        target.close()
        raise
    return target


def _place(uri: str | None) -> str | None:
    return uri if uri is None or "://" in uri else str(Path(uri).absolute())


def _differing(wanted: Iterable[StoredCategory], there: Iterable[StoredCategory]) -> list[StoredCategory]:
    known: Mapping[str, StoredCategory] = {item.category.name: item for item in there}
    return [
        item
        for item in wanted
        if (old := known.get(item.category.name)) is None
        or old.category != item.category
        or not np.array_equal(old.vectors, item.vectors)
    ]


def _batches(entries: Iterator[Entry], most: int) -> Iterator[list[Entry]]:
    """Documents in parts of so many, and fewer where they have many chunks."""
    part: list[Entry] = []
    chunks = 0
    for entry in entries:
        part.append(entry)
        chunks += len(entry.chunks)
        if len(part) >= most or chunks >= _CHUNKS:
            yield part
            part, chunks = [], 0
    if part:
        yield part


def _others(target: KnowledgeBase, ids: set[int]) -> list[str]:
    """The documents of a copy that are not among those, given by the hashes of their ids."""
    return [document.id for document in target if hash(document.id) not in ids]


def _compare(expected: Content, found: Content, target: KnowledgeBase, *, moved: bool) -> None:
    if moved:
        raise KnowledgeBaseError("the knowledge base was changed while it was being copied: copy again, which does the rest")
    if found != expected:
        raise KnowledgeBaseError(
            f"the copy {target!r} is not what was copied: it holds {found.documents} documents in {found.chunks} chunks, sum "
            f"{found.sha256[:16]}, and the source has {expected.documents} in {expected.chunks}, sum {expected.sha256[:16]}. "
            "Delete it and copy again"
        )
