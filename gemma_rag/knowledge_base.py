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
from gemma_rag.documents import Category, Document
from gemma_rag.embedding import Change, changes_to, embed
from gemma_rag.encoders import Encoder, EncoderSettings, Space, is_encoder, load_encoder
from gemma_rag.errors import InputError, KnowledgeBaseError, SpaceMismatch
from gemma_rag.index.compressed import Precision
from gemma_rag.index.embedded import Plan
from gemma_rag.learned import FILES, Learned
from gemma_rag.loading import validate_documents
from gemma_rag.storage import EngineAddress, Entry, KnowledgeStore, Manifest, Store, StoredCategory
from gemma_rag.storage.manifest import read_manifest
from gemma_rag.view import View

if TYPE_CHECKING:
    from gemma_rag.calibrating import CalibrationReport
    from gemma_rag.fitting import FitReport
    from gemma_rag.index.planning import PlanReport
    from gemma_rag.labelled import Labelled


PLAN = "plan.json"
"""Attachment: how to search."""

_TRIES = 5

_VERIFIED = 100_000
"""Chunks up to which a folder is checked whole when it is opened."""


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

    def __init__(self, store: KnowledgeStore, encoder: Encoder | None) -> None:
        self._store = store
        self._encoder = encoder
        self._view: View | None = None
        self._last_view: View | None = None  # of the generation before: what has not changed is taken over from it
        self._learned: Learned | None = None
        self._plan: Plan | None = None
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
        store = Store.create(encoder.space, _recipe(encoder), dataclasses.asdict(chunker or Chunker()))
        base = cls(store, encoder)
        try:
            base.add(documents, categories=categories)
        except BaseException:
            base.close()
            raise
        return base

    @classmethod
    def create(
        cls,
        path: str | Path,
        embeddings: Encoder,
        *,
        categories: Iterable[Category] = (),
        chunker: Chunker | None = None,
        engine: EngineAddress | None = None,
    ) -> KnowledgeBase:
        """Make an empty knowledge base in a new folder, to be filled a part at a time.

        Args:
            path: The folder; it must not exist, or be empty.
            embeddings: A `GemmaEmbeddings`, or any other `Encoder`.
            categories: Descriptions of categories, as for `from_documents`.
            chunker: How long documents are cut; chunks of 512 tokens at most by default.
            engine: What keeps the vectors; the folder itself by default. With a database, the folder keeps a manifest and what
                was learned, and the database everything else.

        Raises:
            InputError: The folder exists, or the database has a knowledge base of that name.
            KnowledgeBaseError: The folder cannot be written, or the database cannot be reached.
        """
        encoder = _checked(embeddings)
        settings = (encoder.space, _recipe(encoder), dataclasses.asdict(chunker or Chunker()))
        store: KnowledgeStore
        if engine is None or engine.name == "faiss":
            store = Store.create_in(Path(path), *settings)
        else:
            from gemma_rag.storage.remote import RemoteStore

            store = RemoteStore.create(Path(path), engine, *settings)
        base = cls(store, encoder)
        try:
            base.add([], categories=categories)
        except BaseException:
            base.close()
            raise
        return base

    @classmethod
    def open(cls, path: str | Path, embeddings: Encoder | None = None, *, verify: bool | None = None) -> KnowledgeBase:
        """Open a knowledge base as it was last committed.

        Args:
            path: The folder.
            embeddings: The embeddings that it was built with. None: they are loaded as the folder says, when a question
                first needs them.
            verify: Read every file once and compare checksums. None: where the folder has up to 100,000 chunks, so that a large
                one opens in a second; sizes and headers are compared always.

        Raises:
            KnowledgeBaseError: There is none, or it is damaged; the file is named. Or its database cannot be reached.
            SpaceMismatch: Other embeddings built it; each field that differs is listed.
        """
        encoder = _checked(embeddings) if embeddings is not None else None
        manifest = read_manifest(Path(path))
        store: KnowledgeStore
        if manifest.engine.name == "faiss":
            store = Store.open(Path(path), verify=manifest.chunks <= _VERIFIED if verify is None else verify)
        else:
            from gemma_rag.storage.remote import RemoteStore

            store = RemoteStore.open(Path(path))
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
            InputError: The folder exists already, or a database keeps this knowledge base: see `gemma_rag.copying`.
            KnowledgeBaseError: It cannot be written.
        """
        with self._changing, self._guard:
            if not isinstance(self._store, Store):
                raise InputError(f"{self.manifest.engine.name} keeps this knowledge base: move it with `gemma-rag copy`")
            store = self._store.save(Path(path))
            self._store.close()
            self._store = store
            self._forget()

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
    def store(self) -> KnowledgeStore:
        """What keeps it, for what moves or repairs it; applications leave it alone."""
        return self._store

    @property
    def space(self) -> Space:
        """The space of its vectors."""
        return self._store.manifest.space

    @property
    def categories(self) -> tuple[CategoryInfo, ...]:
        """The categories that have documents, sorted by name."""
        view = self.view()
        return tuple(
            CategoryInfo(item.category.name, item.category.description, count)
            for item, count in zip(view.stored_categories, view.counts().tolist(), strict=True)
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
        return found.document

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
            change = changes_to(self._store, checked, {category.name: category for category in categories})
            if change.documents or change.categories:
                embedded: tuple[list[Entry], list[StoredCategory]] = ([], [])
                if change.to_embed or change.categories:
                    embedded = embed(change.to_embed, change.categories, self.encoder, self.chunker)
                self._commit(change.entries(embedded[0]), [], embedded[1])
        return Changes(added=len(change.documents) - change.updated, updated=change.updated, unchanged=change.unchanged)

    def changes(self, documents: Sequence[Document]) -> Change:
        """What adding documents would come to; nothing is embedded or written. Their ids must differ."""
        return changes_to(self._store, documents, {})

    def commit(self, entries: Sequence[Entry] = (), categories: Sequence[StoredCategory] = ()) -> None:
        """Add documents with vectors that were computed elsewhere, by embeddings of the same space; `gemma_rag.embedding`.

        Args:
            entries: Documents, their chunks and vectors; each replaces the one with its id.
            categories: Categories with their vectors: every one that is new here.

        Raises:
            InputError: A vector is not of norm 1 or has another number of components, or a category has none.
            KnowledgeBaseError: Another process is writing, or the disk failed; nothing is added.
        """
        for document, _, vectors in entries:
            norms = np.linalg.norm(np.asarray(vectors, dtype=np.float32), axis=-1)
            if np.ndim(vectors) != 2 or np.shape(vectors)[1] != self.space.dimensions or not np.allclose(norms, 1.0, atol=1e-3):
                raise InputError(
                    f"the vectors of document {document.id!r} are not of shape (chunks, {self.space.dimensions}) and norm 1"
                )
        with self._changing:
            self.refresh()
            self._commit(entries, [], categories)

    def compact(self, *, tails: Precision | None = None, graphs_above: int | None = None) -> None:
        """Forget deleted documents and put together what many commits have scattered; costs what the knowledge base holds.

        Args:
            tails: Store the components after the first 128 as ``float16`` or ``int8`` from now on, in a half or a quarter of
                the bytes, with cosines off by up to about 2e-5 or 1e-3. There is no way back. None: as they are.
            graphs_above: Build a graph over each category of more rows than this, for searches with a plan; needs the extra
                ``faiss``. 0: none from now on. None: as before. More of both under `gemma_rag.storage.Store.compact`.

        Raises:
            InputError: An option is out of its range, or a database keeps the vectors, as it sees fit.
            MissingExtra: FAISS is not installed, and there is a graph to be built.
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        if not isinstance(self._store, Store) and (tails is not None or graphs_above is not None):
            raise InputError(f"{self.manifest.engine.name} keeps the vectors in its own way: leave tails and graphs_above out")
        with self._changing:
            self.refresh()
            with self._guard:
                try:
                    if isinstance(self._store, Store):
                        self._store.compact(tails, graphs_above)
                    else:
                        self._store.compact()
                finally:
                    self._forget()

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
                self._forget()
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
            for left in reversed(range(_TRIES)):
                if self._view is not None:
                    break
                try:
                    self._view = self._last_view = self._viewed()
                except KnowledgeBaseError:  # a writer may replace files between our reading of the manifest and of them
                    if not left or not self._store.refresh():
                        raise
                    self._forget()
            if self._view is None:
                raise KnowledgeBaseError(f"{self.path} is rewritten faster than it can be read: try again")
            return self._view

    @property
    def chunker(self) -> Chunker:
        """How its documents are cut."""
        return Chunker(**self._store.manifest.chunking)

    @property
    def search_plan(self) -> Plan | None:
        """How the documents of the opened categories are searched; None: exactly."""
        with self._guard:
            if self._plan is None and (data := self._store.attachment(PLAN)) is not None:
                self._plan = Plan.from_json(data)
            return self._plan

    def use_plan(self, plan: Plan | None) -> None:
        """Search by this plan from now on; None: exactly.

        Raises:
            KnowledgeBaseError: Another process is writing, or the disk failed.
        """
        with self._changing, self._guard:
            try:
                self._store.attach({PLAN: None if plan is None else plan.to_json()})
            finally:
                self._forget()

    def plan(self, **options: Any) -> PlanReport:
        """Measure how few components find the same documents, and search so: `gemma_rag.planning.plan`, with its options."""
        from gemma_rag.planning import plan

        return plan(self, **options)

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
                    self._forget()
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

    def _forget(self) -> None:
        """What was read of an earlier generation is read again when it is needed."""
        self._view = self._learned = self._plan = None

    def _viewed(self) -> View:
        if isinstance(self._store, Store):
            view = View(self._store.snapshot(), self._store, self._last_view)
            if self.search_plan is not None:
                view.read_tails_here_and_there()
            return view
        from gemma_rag.remote_view import RemoteView
        from gemma_rag.storage.remote import RemoteStore

        if not isinstance(self._store, RemoteStore):
            raise InputError(f"a knowledge base cannot search a {type(self._store).__name__}")
        return RemoteView(self._store)


def _recipe(encoder: Encoder) -> dict[str, Any]:
    """What loads the encoder again, without secrets; empty for one that the caller wrote."""
    settings = encoder if isinstance(encoder, EncoderSettings) else getattr(encoder, "settings", None)
    return settings.recipe() if isinstance(settings, EncoderSettings) else {}


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
