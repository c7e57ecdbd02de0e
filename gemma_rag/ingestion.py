"""From a source of documents to a knowledge base on disk: what `gemma-rag index` does."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from gemma_rag.bulk import Embedder, Filled, Progress, embedded_here, fill
from gemma_rag.chunking import Chunker
from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Category
from gemma_rag.encoders import EncoderSettings, load_encoder
from gemma_rag.errors import BadRow, BadRows, InputError, MissingExtra
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import DocumentStream, StreamedRow
from gemma_rag.storage.manifest import EngineAddress

_CLEANINGS = {
    "whitespace": "collapse_whitespace",
    "punctuation": "punctuation",
    "urls": "mask_urls",
    "emails": "mask_emails",
}
_SHOWN = 1000
"""Bad rows that a report holds; the dead-letter file has all."""
_SCATTERED = 4
"""Segments from which it is worth to put together what a run has added."""


@dataclass(frozen=True)
class IndexReport:
    """What indexing did, in documents.

    Attributes:
        path: The knowledge base.
        model: The model that made the vectors.
        dimensions: Components of a vector.
        added: New documents.
        updated: Changed documents.
        unchanged: Documents that were there already.
        deleted: Documents that the source no longer has (with ``replace``).
        skipped: Bad rows that were left out (with ``skip_bad`` or ``dead_letter``); the first thousand of them.
        bad: How many there were.
        documents: Documents there now.
        chunks: Chunks there now.
        categories: Categories that have documents now.
        seconds: How long it took.
    """

    path: Path
    model: str
    dimensions: int
    added: int
    updated: int
    unchanged: int
    deleted: int
    skipped: tuple[BadRow, ...]
    bad: int
    documents: int
    chunks: int
    categories: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            **self.__dict__,
            "path": str(self.path),
            "skipped": [str(row) for row in self.skipped],
            "seconds": round(self.seconds, 3),
        }


class _DeadLetters:
    """Takes bad rows: counts them, keeps the first, and writes all of them into a file where one is named."""

    def __init__(self, file: Path | None, source: Path) -> None:
        self.first: list[BadRow] = []
        self.count = 0
        self._file: IO[str] | None = None
        if file is None:
            return
        if file.resolve() == source.resolve() or file.is_dir():
            raise InputError(f"{file} is the source or a folder: name another file for the rows that cannot be used")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror or error}") from error

    def take(self, row: StreamedRow) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(row.bad)
        if self._file is not None:
            letter = {"source": row.source, "line": row.line, "problem": row.problem, "row": row.raw}
            self._file.write(json.dumps(letter) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def index_source(
    source: Path,
    out: Path,
    *,
    settings: EncoderSettings,
    chosen_model: bool = True,
    chunk_tokens: int | None = None,
    chunk_overlap: int | None = None,
    columns: Mapping[str, str] | None = None,
    category: str | None = None,
    categories: Path | None = None,
    encoding: str = "utf-8",
    clean: Sequence[str] = (),
    skip_bad: bool = False,
    dead_letter: Path | None = None,
    replace: bool = False,
    batch: int | None = None,
    workers: int | None = None,
    distributed: bool = False,
    engine: EngineAddress | None = None,
    say: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> IndexReport:
    """Build a knowledge base from a source, or bring an existing one up to date.

    The source is read a little at a time, and what has been embedded is committed block by block. A run that was stopped
    is started again with the same arguments: documents that are committed are found by their content, and passed over.

    Args:
        source: As for `load_documents`.
        out: The knowledge base: a new folder, or an existing one.
        settings: The encoder.
        chosen_model: Whether the user chose the model; if not, an existing knowledge base keeps its own.
        chunk_tokens: Most tokens of a chunk; 512 for a new knowledge base. An existing one keeps its own chunking.
        chunk_overlap: Tokens that neighbouring chunks share; 0 for a new knowledge base.
        columns: As for `load_documents`.
        category: As for `load_documents`.
        categories: A JSON Lines file with ``name`` and ``description`` of categories.
        encoding: Of the source.
        clean: Names of cleanings: ``whitespace``, ``punctuation``, ``urls``, ``emails``.
        skip_bad: Leave bad rows out, and documents that cannot be embedded. Without it, and without `dead_letter`, the
            source is read once before anything else, and refused with all of its bad rows.
        dead_letter: Leave them out and write them here, one JSON object a line: ``source``, ``line``, ``problem``, ``row``.
            The file is written anew by every run.
        replace: Delete documents that the source does not have; refused where some of its rows are bad.
        batch: Documents of a commit. None: as many as take ten seconds to a minute, 2,048 at most.
        workers: Processes that embed; a script that asks for them keeps its own work below ``if __name__ == "__main__":``.
            None: this process. With `distributed`, the most actors.
        distributed: Embed on the machines of a Ray cluster (extra ``ray``).
        engine: What keeps the vectors of a new knowledge base. None: its folder, or what an existing one has.
        say: Told what is going on.
        on_progress: Told after each block how far it is.

    Raises:
        BadRows: Some rows cannot be used; all of them are listed, and nothing was done.
        InputError: The source, or another argument, cannot be used.
        KnowledgeBaseError: The knowledge base cannot be opened or written; what was committed before stands.
        ModelUnavailable: The model cannot be had.
    """
    started = time.perf_counter()
    chunking = {name: value for name, value in (("max_tokens", chunk_tokens), ("overlap", chunk_overlap)) if value is not None}
    chunker = Chunker(**chunking)
    exists = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if exists:
        with KnowledgeBase.open(out, verify=False) as base:
            _keep_chunking(base, chunking)
            _keep_engine(base, engine)
            if not chosen_model:
                own = settings.model_dump(exclude_defaults=True, exclude={"model", "show_progress"})
                settings = EncoderSettings(**{**base.manifest.recipe, "show_progress": settings.show_progress, **own})
    settings = settings.changed(show_progress=False)  # a bar for every block would be one too many
    encoder = load_encoder(settings)
    described = _read_categories(categories) if categories is not None else []
    stream = DocumentStream(source, columns=columns, category=category, encoding=encoding, cleaning=_cleaning(clean))
    skip = skip_bad or dead_letter is not None
    if engine is not None and engine.uri is not None and Path(engine.uri).absolute() == out.absolute():
        raise InputError(f"{out} cannot be the folder of the knowledge base and the place of its database: name another --uri")
    if replace or not skip:
        _check_rows(stream, source, replace, skip)
    rows = iter(stream)
    rows = chain([next(rows)], rows)  # a source that is empty, or lacks a column, is refused before there is a folder
    with contextlib.ExitStack() as stack:
        letters = stack.enter_context(contextlib.closing(_DeadLetters(dead_letter, source)))
        say(f"model: {encoder.space.model}, {encoder.space.dimensions} dimensions")
        base = stack.enter_context(
            KnowledgeBase.open(out, encoder) if exists else KnowledgeBase.create(out, encoder, chunker=chunker, engine=engine)
        )
        stack.enter_context(_told(base, exists, say))
        base.add([], categories=described)
        embedder: Embedder = embedded_here(encoder, base.chunker, skip)
        load = partial(load_encoder, settings)
        if distributed:
            from gemma_rag.distributed import BATCH, embedded_by_ray

            batch = batch or BATCH
            embedder = embedded_by_ray(base, stream, load, base.chunker, skip, batch, workers)
        elif workers is not None:
            from gemma_rag.workers import embedded_by_workers

            embedder = embedded_by_workers(load, encoder.space, base.chunker, skip, workers)
        filled = fill(
            base,
            rows,
            embedder,
            batch=batch,
            share=lambda: min(stream.meter.done / max(stream.meter.total, 1), 1.0),
            on_bad=letters.take,
            on_progress=on_progress,
        )
        gone = list(_gone(base, stream)) if replace else []
        deleted = base.delete(gone) if gone else 0
        if _is_scattered(base, filled):
            try:
                base.compact()
            except MissingExtra as error:  # it has graphs, which are built elsewhere; everything is committed
                say(f"the knowledge base was not compacted: {error}")
        return IndexReport(
            path=out,
            model=base.space.model,
            dimensions=base.space.dimensions,
            added=filled.added,
            updated=filled.updated,
            unchanged=filled.unchanged,
            deleted=deleted,
            skipped=tuple(letters.first),
            bad=letters.count,
            documents=len(base),
            chunks=base.manifest.chunks,
            categories=base.manifest.categories,
            seconds=time.perf_counter() - started,
        )


@contextlib.contextmanager
def _told(base: KnowledgeBase, existed: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Where a run stops, say how to go on; a folder that it made and put nothing into is taken away."""
    before = base.manifest.generation
    try:
        yield
    except BaseException:
        if not existed and base.path is not None and base.manifest.engine.name == "faiss" and not len(base):
            shutil.rmtree(base.path, ignore_errors=True)
        elif base.manifest.generation > before:
            say(f"stopped: {len(base)} documents are committed, and the same command goes on from there")
        raise


def _check_rows(stream: DocumentStream, source: Path, replace: bool, skip: bool) -> None:
    """Read the whole source once, and refuse it where it has bad rows."""
    bad: list[BadRow] = []
    for row in stream:
        if row.document is None:
            bad.append(row.bad)
            if skip:
                break
    if bad and skip and replace:
        raise InputError(
            f"rows of {source} cannot be used, the first: {bad[0]}. To replace would delete what they stood for: mend them, or "
            "leave --replace out"
        )
    if bad:
        raise BadRows(bad)


def _gone(base: KnowledgeBase, stream: DocumentStream) -> Iterator[str]:
    """The ids of stored documents that are not in the stream, which has gone by."""
    ids = (document.id for document in base)
    while part := list(islice(ids, 10_000)):
        yield from (name for name, there in zip(part, stream.holds(part).tolist(), strict=True) if not there)


def _is_scattered(base: KnowledgeBase, filled: Filled) -> bool:
    """Whether a run has changed so much that it is worth to read everything once, to put together what its commits made."""
    changed = filled.added + filled.updated
    if base.manifest.engine.name == "faiss":
        return len(base.manifest.segments) > _SCATTERED and changed > len(base) // 10
    return changed > len(base) // 2


def _keep_engine(base: KnowledgeBase, wanted: EngineAddress | None) -> None:
    own = base.manifest.engine
    if wanted is not None and any(value not in (None, getattr(own, name)) for name, value in wanted.model_dump().items()):
        raise InputError(
            f"{base.path} is kept by {own.name}{f' at {own.uri}' if own.uri else ''}, and another engine was asked for: leave "
            "--engine and --uri out, or move it with `gemma-rag copy`"
        )


def describe_base(base: KnowledgeBase) -> dict[str, Any]:
    """What a knowledge base holds, as plain JSON."""
    manifest, (ranking, _, calibration) = base.manifest, base.learned
    size = sum(file.stat().st_size for file in base.path.iterdir() if file.is_file()) if base.path else None
    return {
        "path": str(base.path) if base.path else None,
        "documents": manifest.documents,
        "chunks": manifest.chunks,
        "categories": [
            {"name": category.name, "documents": category.documents, "description": category.description}
            for category in base.categories
        ],
        "space": manifest.space.model_dump(),
        "fingerprint": manifest.fingerprint,
        "encoder": manifest.recipe,
        "chunking": manifest.chunking,
        "learned": {
            "ranking": None if ranking is None else ranking.model_dump(mode="json", exclude={"trials", "categories"}),
            "calibration": None if calibration is None else calibration.summary(),
        },
        "engine": manifest.engine.model_dump(mode="json"),
        "plan": None if base.search_plan is None else base.search_plan.model_dump(),
        "segments": len(manifest.segments),
        "tails": manifest.tails,
        "stale": round(base.view().stale, 4),
        "generation": manifest.generation,
        "format_version": manifest.version,
        "bytes": size,
    }


def _keep_chunking(base: KnowledgeBase, wanted: Mapping[str, int]) -> None:
    stored = base.manifest.chunking
    if differing := {name: value for name, value in wanted.items() if stored.get(name) != value}:
        raise InputError(
            f"the documents of {base.path} are cut with {stored}, and {differing} was asked for: leave the chunk options out, "
            "or index into a new folder"
        )


def _cleaning(names: Sequence[str]) -> Cleaning:
    if unknown := [name for name in names if name not in _CLEANINGS]:
        raise InputError(f"no cleaning is named {', '.join(map(repr, unknown))}: there are {', '.join(_CLEANINGS)}")
    return Cleaning(**{_CLEANINGS[name]: True for name in names})


def _read_categories(file: Path) -> list[Category]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the categories in {file} cannot be read: {error}") from None
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Category.model_validate(json.loads(line)))
        except ValidationError as error:
            problem = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())
            bad.append(BadRow(str(file), number, problem))
        except ValueError as error:
            bad.append(BadRow(str(file), number, f"no JSON: {error}"))
    if bad:
        raise BadRows(bad)
    return found
