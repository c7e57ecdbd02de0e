"""A categorised collection of documents with their vectors, in memory or in a folder."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Chunk, Document
from gemma_rag.encoders import Encoder, EncoderSettings, Input, Space, is_encoder, load_encoder
from gemma_rag.errors import InputError, SpaceMismatch
from gemma_rag.learned import FILES, Learned
from gemma_rag.loading import validate_documents
from gemma_rag.prompts import Task
from gemma_rag.storage import Entry, Manifest, Store, StoredCategory
from gemma_rag.view import View, Words

if TYPE_CHECKING:
    from gemma_rag.calibrating import CalibrationReport
    from gemma_rag.fitting import FitReport
    from gemma_rag.labelled import Labelled


@dataclass(frozen=True)
class Changes:
    """What `KnowledgeBase.add` did, in documents."""

    added: int
    updated: int
    unchanged: int


@dataclass(frozen=True)
class CategoryInfo:
    """A category of a knowledge base, and how many documents it has."""

    name: str
    description: str
    documents: int


class KnowledgeBase:
    """Documents in categories, their vectors, and everything to search them with.

    A knowledge base made by `from_documents` lives in memory until `save`; from then on, and when it was opened from a
    folder, every `add` and `delete` is committed to that folder before it returns, as a whole or not at all.

    Example:
        >>> from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase
        >>> page = Document(id="vpn", title="VPN", text="Install the client, then sign in.", category="it")
        >>> kb = KnowledgeBase.from_documents([page], GemmaEmbeddings(model="minilm", show_progress=False))
        >>> len(kb), kb.categories[0].name
        (1, 'it')
    """

    def __init__(self, store: Store, encoder: Encoder | None) -> None:
        self._store = store
        self._encoder = encoder
        self._view: View | None = None
        self._learned: Learned | None = None
        self._words = Words()
        self._guard = threading.RLock()  # for looking at the state and for exchanging it, never held while texts are embedded
        self._changing = threading.RLock()  # for changes, one after another

    # -- making, opening, saving ------------------------------------------------------------------------------------

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document | Mapping[str, Any]],
        embeddings: Encoder,
        *,
        categories: Iterable[Category] = (),
        chunker: Chunker | None = None,
    ) -> KnowledgeBase:
        """Build a knowledge base in memory.

        Args:
            documents: What goes in; ids must differ.
            embeddings: A `GemmaEmbeddings`, or any other `Encoder`.
            categories: Descriptions of categories; those that are not described have their name alone.
            chunker: How long documents are cut; chunks of 512 tokens at most by default.

        Raises:
            BadRows: Some documents cannot be used; all of them are listed.
            InputError: `embeddings` is no `Encoder`.
        """
        encoder = _checked(embeddings)
        settings = encoder if isinstance(encoder, EncoderSettings) else getattr(encoder, "settings", None)
        recipe = settings.recipe() if isinstance(settings, EncoderSettings) else {}
        store = Store.create(encoder.space, recipe, dataclasses.asdict(chunker or Chunker()))
        base = cls(store, encoder)
        try:
            base.add(documents, categories=categories)
        except BaseException:
            base.close()
            raise
        return base

    @classmethod
    def open(cls, path: str | Path, embeddings: Encoder | None = None, *, verify: bool = True) -> KnowledgeBase:
        """Open a folder that `save` wrote, as it was last committed.

        Args:
            path: The folder.
            embeddings: The embeddings that it was built with. None: they are loaded as the folder says, when a question
                first needs them.
            verify: Read every file once and compare checksums; False opens large knowledge bases faster.

        Raises:
            KnowledgeBaseError: There is none, or it is damaged; the file is named.
            SpaceMismatch: Other embeddings built it; each field that differs is listed.
        """
        encoder = _checked(embeddings) if embeddings is not None else None
        store = Store.open(Path(path), verify=verify)
        try:
            if encoder is not None:
                _compare(store.manifest.space, encoder.space)
            base = cls(store, encoder)
            base.view()
        except BaseException:
            store.close()
            raise
        return base

    def save(self, path: str | Path) -> None:
        """Write the knowledge base to a new folder, and keep it there from now on.

        The folder appears when it is complete: a kill on the way leaves no folder.

        Raises:
            InputError: The folder exists already.
            KnowledgeBaseError: It cannot be written.
        """
        with self._changing, self._guard:
            store = self._store.save(Path(path))
            self._store.close()
            self._store, self._view, self._learned = store, None, None

    def close(self) -> None:
        """Let go of the files."""
        self._store.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- what is in it ----------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """What it holds: counts, space, chunking, generation."""
        return self._store.manifest

    @property
    def path(self) -> Path | None:
        """Its folder, or None while it lives in memory."""
        return self._store.path

    @property
    def space(self) -> Space:
        """The space of its vectors."""
        return self._store.manifest.space

    @property
    def categories(self) -> tuple[CategoryInfo, ...]:
        """The categories that have documents, sorted by name."""
        view = self.view()
        counts = sum(np.bincount(codes, minlength=len(view.categories)) for codes in (view.index.codes, view.guests[:, 1]))
        return tuple(
            CategoryInfo(item.category.name, item.category.description, count)
            for item, count in zip(view.snapshot.categories, np.asarray(counts).tolist(), strict=True)
        )

    def __len__(self) -> int:
        return self._store.manifest.documents

    def __contains__(self, document_id: object) -> bool:
        return isinstance(document_id, str) and document_id in self._store.hashes([document_id])

    def __iter__(self) -> Iterator[Document]:
        return self._store.all_documents()

    def get(self, document_id: str) -> Document:
        """A document by its id.

        Raises:
            InputError: There is none.
        """
        found = self._store.get(document_id)
        if found is None:
            raise InputError(f"the knowledge base has no document {document_id!r}")
        return found[0]

    def __repr__(self) -> str:
        where = f"at {self.path}" if self.path else "in memory"
        return f"<KnowledgeBase {where}: {len(self)} documents, {self.space.model}, {self.space.dimensions} dimensions>"

    # -- changing it ------------------------------------------------------------------------------------------------

    def add(self, documents: Iterable[Document | Mapping[str, Any]], *, categories: Iterable[Category] = ()) -> Changes:
        """Add documents; one with a known id replaces the old one.

        A document whose content has not changed is not touched, and where only its category or metadata changed, its
        vectors are kept. All of it is committed together.

        Args:
            documents: What to add; ids must differ.
            categories: Categories to describe, or to describe anew.

        Returns:
            How many were new, changed and unchanged.

        Raises:
            BadRows: Some documents cannot be used; all of them are listed, and nothing is added.
            KnowledgeBaseError: Another process is writing, or the disk failed; nothing is added.
        """
        checked = validate_documents(documents).documents
        with self._changing:
            self.refresh()
            stored = self._store.hashes([document.id for document in checked])
            changed = [document for document in checked if stored.get(document.id) != document.content_hash]
            described = self._new_categories(changed, {category.name: category for category in categories})
            if changed or described:
                self._commit(*self._embedded(changed, described))
        updated = sum(document.id in stored for document in changed)
        return Changes(added=len(changed) - updated, updated=updated, unchanged=len(checked) - len(changed))

    def delete(self, ids: Iterable[str]) -> int:
        """Delete documents by their ids; all of it is committed together.

        Returns:
            How many were deleted.

        Raises:
            InputError: Some ids are unknown; they are listed, and nothing is deleted.
            KnowledgeBaseError: Another process is writing, or the disk failed; nothing is deleted.
        """
        if isinstance(ids, str):
            raise InputError("ids is a list of ids, and one string came: put it in a list")
        wanted = list(dict.fromkeys(ids))
        with self._changing:
            self.refresh()
            known = self._store.hashes(wanted)
            if unknown := [document_id for document_id in wanted if document_id not in known]:
                raise InputError(
                    f"the knowledge base has no documents {', '.join(map(repr, unknown[:20]))}: nothing was deleted"
                )
            if wanted:
                self._commit([], wanted, [])
        return len(wanted)

    def refresh(self) -> bool:
        """Move on to what another process has committed since; returns whether there was anything."""
        with self._guard:
            moved = self._store.refresh()
            if moved:
                self._view, self._learned = None, None
            return moved

    # -- for the retriever ------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """What embeds questions; loaded as the folder says where none was given.

        Raises:
            SpaceMismatch: What was loaded gives other vectors than those stored (the model has changed since).
            ModelUnavailable: The model cannot be had.
        """
        with self._guard:
            if self._encoder is None:
                if not self._store.manifest.recipe:
                    raise InputError(
                        "an encoder of your own made these vectors: give it again, KnowledgeBase.open(path, encoder)"
                    )
                encoder = load_encoder(EncoderSettings.model_validate(self._store.manifest.recipe))
                _compare(self.space, encoder.space)
                self._encoder = encoder
            return self._encoder

    def view(self) -> View:
        """The current generation, ready to be searched."""
        with self._guard:
            if self._view is None:
                self._view = View(self._store.snapshot(), self._store, self._words)
            return self._view

    # -- what it has learned ----------------------------------------------------------------------------------------

    @property
    def learned(self) -> Learned:
        """What it has learned from labelled questions; empty until `fit_router` or `calibrate`.

        Raises:
            KnowledgeBaseError: It cannot be read.
            SpaceMismatch: It was learned in another space.
        """
        with self._guard:
            if self._learned is None:
                learned = Learned.from_files({name: self._store.attachment(name) for name in FILES}, repr(self))
                learned.check(self.manifest.fingerprint)
                self._learned = learned
            return self._learned

    def learn(self, learned: Learned, *, keep: bool = True) -> None:
        """Order and refuse by this from now on.

        Args:
            learned: Replaces what was learned before.
            keep: Commit it to the folder; otherwise it is in force on this object alone, until the folder's next commit by
                another process is taken over.

        Raises:
            SpaceMismatch: It was learned in another space.
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        learned.check(self.manifest.fingerprint)
        with self._changing, self._guard:
            if keep:
                try:
                    self._store.attach(learned.to_files())
                finally:
                    self._view, self._learned = None, None
            self._learned = learned

    def fit_router(self, labelled: Iterable[Labelled | Mapping[str, Any]], **options: Any) -> FitReport:
        """Learn from labelled questions how to order documents: `gemma_rag.fitting.fit_router`, with its options."""
        from gemma_rag.fitting import fit_router

        return fit_router(self, labelled, **options)

    def calibrate(self, labelled: Iterable[Labelled | Mapping[str, Any]], **options: Any) -> CalibrationReport:
        """Choose thresholds from labelled questions: `gemma_rag.calibrating.calibrate`, with its options."""
        from gemma_rag.calibrating import calibrate

        return calibrate(self, labelled, **options)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _commit(self, entries: Sequence[Entry], delete: Sequence[str], categories: Sequence[StoredCategory]) -> None:
        with self._guard:
            try:
                self._store.commit(entries, delete, categories)
            finally:
                self._view = None  # also after a failure, which may have come after the commit point

    def _new_categories(self, documents: Sequence[Document], described: Mapping[str, Category]) -> list[Category]:
        """Categories that need a vector: those that are new here, and those described anew."""
        known = {item.category.name: item.category for item in self._store.stored_categories()}
        names = [*described, *(name for document in documents for name in (document.category, *document.also_in))]
        wanted = {name: described.get(name) or known.get(name) or Category(name=name) for name in names}
        return [category for name, category in wanted.items() if known.get(name) != category]

    def _embedded(
        self, documents: Sequence[Document], categories: Sequence[Category]
    ) -> tuple[list[Entry], list[str], list[StoredCategory]]:
        """What `_commit` takes: chunks and vectors for documents and categories, in one pass of the encoder."""
        entries: dict[str, Entry] = {}
        for document in documents:
            old = self._store.get(document.id)
            if old is not None and (old[0].title, old[0].text) == (document.title, document.text):
                entries[document.id] = Entry(document, old[1], self._store.vectors_of(old[2]))
        todo = [document for document in documents if document.id not in entries]
        chunks = self._chunked(todo)
        inputs = [
            Input(document.text[chunk.start : chunk.end], Task.DOCUMENT, chunk.title(document.title))
            for document, cut in zip(todo, chunks, strict=True)
            for chunk in cut
        ]
        for category in categories:
            inputs += [Input(text, Task.CLASSIFICATION) for text in (category.text, *category.examples)]
        expected = (len(inputs), self.space.dimensions)
        vectors = self.encoder.encode(inputs) if inputs else np.zeros(expected, dtype=np.float32)
        if vectors.shape != expected:
            raise InputError(f"the encoder gave an array of shape {vectors.shape}, and its space says {expected}")
        first = 0
        for document, cut in zip(todo, chunks, strict=True):
            entries[document.id] = Entry(document, cut, vectors[first : first + len(cut)])
            first += len(cut)
        stored = []
        for category in categories:
            last = first + 1 + len(category.examples)
            stored.append(StoredCategory(category, vectors[first:last]))
            first = last
        return [entries[document.id] for document in documents], [], stored

    def _chunked(self, documents: Sequence[Document]) -> list[list[Chunk]]:
        if not documents:
            return []
        encoder = self.encoder
        settings = Chunker(**self._store.manifest.chunking)
        limit = min(settings.max_tokens, encoder.space.max_tokens)
        chunker = Chunker(limit, min(settings.overlap, limit // 2 - 1))

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


def _checked(embeddings: object) -> Encoder:
    if not is_encoder(embeddings):
        raise InputError(
            f"embeddings must be a GemmaEmbeddings, or an Encoder as gemma_rag.encoders describes it, and is a "
            f"{type(embeddings).__name__}: other embeddings do not say what space their vectors are in"
        )
    return embeddings


def _compare(stored: Space, given: Space) -> None:
    if differences := stored.differences(given):
        raise SpaceMismatch(differences)
