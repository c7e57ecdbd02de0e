"""From a source of documents to a knowledge base on disk: what `gemma-rag index` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gemma_rag.chunking import Chunker
from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Category
from gemma_rag.encoders import EncoderSettings, load_encoder
from gemma_rag.errors import BadRow, BadRows, InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.loading import load_documents

_CLEANINGS = {
    "whitespace": "collapse_whitespace",
    "punctuation": "punctuation",
    "urls": "mask_urls",
    "emails": "mask_emails",
}


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
        skipped: Bad rows that were left out (with ``skip_bad``).
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
    replace: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> IndexReport:
    """Build a knowledge base from a source, or bring an existing one up to date.

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
        skip_bad: Leave bad rows out.
        replace: Delete documents that the source does not have; refused where some of its rows are bad.
        say: Told what is going on.

    Raises:
        InputError: The source, or another argument, cannot be used.
        KnowledgeBaseError: The knowledge base cannot be opened or written.
        ModelUnavailable: The model cannot be had.
    """
    started = time.perf_counter()
    chunking = {name: value for name, value in (("max_tokens", chunk_tokens), ("overlap", chunk_overlap)) if value is not None}
    chunker = Chunker(**chunking)
    exists = out.exists() and (not out.is_dir() or any(out.iterdir()))
    base = KnowledgeBase.open(out) if exists else None
    if base is not None:
        _keep_chunking(base, chunking)
        if not chosen_model:
            own = settings.model_dump(exclude_defaults=True, exclude={"model", "show_progress"})
            settings = EncoderSettings(**{**base.manifest.recipe, "show_progress": settings.show_progress, **own})
    encoder = load_encoder(settings)
    described = _read_categories(categories) if categories is not None else []
    loaded = load_documents(
        source, columns=columns, category=category, encoding=encoding, cleaning=_cleaning(clean), skip_bad=skip_bad
    )
    if replace and loaded.bad_rows:
        raise InputError(
            f"{len(loaded.bad_rows)} rows of {source} cannot be used, the first: {loaded.bad_rows[0]}. To replace would delete "
            "what they stood for: mend them, or leave --replace out"
        )
    if base is None:
        say(f"model: {encoder.space.model}, {encoder.space.dimensions} dimensions")
        base = KnowledgeBase.from_documents(loaded.documents, encoder, categories=described, chunker=chunker)
        base.save(out)
        added, updated, unchanged, deleted = len(base), 0, 0, 0
    else:
        base.close()
        base = KnowledgeBase.open(out, encoder, verify=False)
        say(f"model: {base.space.model}, {base.space.dimensions} dimensions")
        changes = base.add(loaded.documents, categories=described)
        gone = {document.id for document in base} - {document.id for document in loaded.documents} if replace else set()
        deleted = base.delete(sorted(gone)) if gone else 0
        added, updated, unchanged = changes.added, changes.updated, changes.unchanged
    with base:
        return IndexReport(
            path=out,
            model=base.space.model,
            dimensions=base.space.dimensions,
            added=added,
            updated=updated,
            unchanged=unchanged,
            deleted=deleted,
            skipped=loaded.bad_rows,
            documents=len(base),
            chunks=base.manifest.chunks,
            categories=len(base.categories),
            seconds=time.perf_counter() - started,
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
