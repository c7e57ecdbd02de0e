"""Reading documents from a file, a folder or memory, with every row that cannot be used named at once.

    .jsonl, .ndjson     one JSON object on each line
    .csv, .tsv          a header and rows
    a folder            Markdown, HTML and text files; the folder that a file is in is its category

All of them become rows, and one function makes a row a `Document`, so a bad row is the same thing everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Document
from gemma_rag.errors import BadRow, BadRows, InputError
from gemma_rag.reading import (
    DELIMITERS,
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    Fields,
    Meter,
    Row,
    folder_rows,
    hash_of,
    is_absent,
    table_rows,
)
from gemma_rag.reading import json_rows as _json_rows

_Candidate: TypeAlias = tuple[str, int, Document | str]  # source, line, and the document or what is wrong with it
_Numbers: TypeAlias = npt.NDArray[np.uint64]

_FIELDS = ("id", "text", "title", "category", "also_in")
_SAME_NAMES: Mapping[str, str] = MappingProxyType({field: field for field in _FIELDS})
_NO_CLEANING = Cleaning()

_READ_AHEAD = 1024
"""Rows whose ids are compared with those before at once."""
_READ_AHEAD_CHARACTERS = 4_000_000
"""Of their texts; whichever comes first."""


@dataclass(frozen=True)
class Loaded:
    """What was read.

    Attributes:
        documents: The documents, in the order of the source.
        bad_rows: The rows that were left out; empty unless that was asked for.
    """

    documents: tuple[Document, ...]
    bad_rows: tuple[BadRow, ...]


def load_documents(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    category: str | None = None,
    encoding: str = "utf-8",
    cleaning: Cleaning = _NO_CLEANING,
    skip_bad: bool = False,
) -> Loaded:
    """Read documents from a file of rows or from a folder of files.

    In a file, a document's id is its id field, or ``<file stem>-<line>`` where no row of the file has one. Keys that are no
    field become metadata; in JSON, those of an object under ``metadata`` do too.

    In a folder, Markdown, HTML and text files are read in sorted order, hidden ones and links out of the folder left out.
    The id is the path without its suffix (with it where two files would share an id), the category is the path of the
    folder (``IT/Accounts``), the title is the first heading or else the file's name, and ``metadata["source"]`` is the
    path. In a Markdown file, ``title:`` and ``category:`` of YAML front matter come first.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.csv`` or ``.tsv`` file, or a folder.
        columns: The file's column or key by our field (``id``, ``text``, ``title``, ``category``, ``also_in``), where it
            differs. ``also_in`` is a list, or a text with semicolons between the names.
        category: The category of documents that have none.
        encoding: How the source is encoded, for example ``gbk``. A byte order mark is accepted.
        cleaning: Applied to texts and titles.
        skip_bad: Leave bad rows out instead of raising; they are in ``Loaded.bad_rows``.

    Raises:
        BadRows: Some rows cannot be used; all of them are listed.
        InputError: The source or an argument cannot be used, or there is no document at all.
    """
    rows = _Source(source, columns, category, encoding, cleaning).candidates(Meter())
    return _collect(((row.source, row.line, document) for row, document in rows), skip_bad)


class StreamedRow(NamedTuple):
    """A row of a stream.

    Attributes:
        source: The file that it stands in.
        line: Its line there, from 1; 0 where the file is the row.
        document: The document that it is; None where it cannot be used.
        problem: Why it cannot be used; empty for a document.
        raw: What stood there, as plain JSON, where it cannot be used.
    """

    source: str
    line: int
    document: Document | None
    problem: str = ""
    raw: Any = None

    @property
    def bad(self) -> BadRow:
        """The row, as one that cannot be used."""
        return BadRow(self.source, self.line, self.problem)


class DocumentStream:
    """A source of documents that is read a little at a time, each time that somebody iterates over it.

    The arguments are those of `load_documents`, and the rows are the same. Of the documents that went by, 16 bytes each stay
    in memory: 64 bits of a hash of the id, and its place. Two ids of the same hash would be taken for one: among ten million
    that happens with a probability of 3 in a million.

    Attributes:
        meter: How far reading has come, in bytes.

    Raises:
        InputError: The source or an argument cannot be used; while iterating, also that there is no document at all.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        category: str | None = None,
        encoding: str = "utf-8",
        cleaning: Cleaning = _NO_CLEANING,
    ) -> None:
        self._source = _Source(source, columns, category, encoding, cleaning)
        self._seen = _Seen()
        self.meter = Meter()

    def __reduce__(self) -> tuple[Any, ...]:
        """The source, to be read from its beginning, by a process that may have another working directory."""
        options = {name: getattr(self._source, name) for name in ("columns", "category", "encoding", "cleaning")}
        return partial(type(self), **options), (str(Path(self._source.source).absolute()),)

    def __iter__(self) -> Iterator[StreamedRow]:
        self._seen, self.meter.done = _Seen(), 0
        files: list[str] = []
        ahead: list[tuple[Row, Document | str]] = []
        characters = 0
        for row, document in self._source.candidates(self.meter):
            ahead.append((row, document))
            characters += len(document if isinstance(document, str) else document.text)
            if len(ahead) >= _READ_AHEAD or characters >= _READ_AHEAD_CHARACTERS:
                yield from self._checked(ahead, files)
                ahead, characters = [], 0
        yield from self._checked(ahead, files)

    def holds(self, ids: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Which of these ids belong to a document that went by."""
        return self._seen.places(np.array([hash_of(name) for name in ids], dtype=np.uint64)) >= 0

    def _checked(self, ahead: list[tuple[Row, Document | str]], files: list[str]) -> Iterator[StreamedRow]:
        """Rows as they are given out: one with an id that went by is a bad one."""
        good = [(row, document) for row, document in ahead if isinstance(document, Document)]
        hashes = np.array([hash_of(document.id) for _, document in good], dtype=np.uint64)
        whole_files = bool(ahead) and ahead[0][0].line == 0
        places = np.array([len(files) + i if whole_files else row.line for i, (row, _) in enumerate(good)], dtype=np.int64)
        files += [row.source for row, _ in good] if whole_files else []
        first = iter(self._seen.add(hashes, places).tolist())
        for row, document in ahead:
            if isinstance(document, str):
                yield StreamedRow(row.source, row.line, None, document, row.raw)
                continue
            taken = next(first)
            if taken < 0:
                yield StreamedRow(row.source, row.line, document)
                continue
            where = files[taken] if whole_files else f"{row.source}:{taken}"
            yield StreamedRow(row.source, row.line, None, f"the id {document.id!r} is taken already by {where}", row.raw)


def stream_documents(
    source: str | Path, *, on_bad: Callable[[BadRow], None] | None = None, **options: Any
) -> Iterator[Document]:
    """Read documents one after another, in constant memory: for sources that are too large for `load_documents`.

    Args:
        source: As for `load_documents`.
        on_bad: Told of every row that cannot be used, which is left out. None: the first one raises.
        options: ``columns``, ``category``, ``encoding``, ``cleaning``, as for `load_documents`.

    Yields:
        The documents, in the order of the source.

    Raises:
        BadRows: A row cannot be used; what came before it has been given out.
        InputError: The source or an argument cannot be used, or there is no document at all.
    """
    for row in DocumentStream(source, **options):
        if row.document is not None:
            yield row.document
        elif on_bad is None:
            raise BadRows([row.bad], "Mend it, or give on_bad to go on without such rows")
        else:
            on_bad(row.bad)


def json_rows(path: Path, encoding: str = "utf-8") -> list[tuple[str, int, Fields | str]]:
    """Read a JSON Lines file: for each line its source, its number, and the object or what is wrong with it.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return [(row.source, row.line, row.fields) for row in _json_rows(path, encoding)]
    except OSError as error:
        raise _unreadable(error, path) from error


def validate_documents(documents: Iterable[Document | Mapping[str, Any]], *, skip_bad: bool = False) -> Loaded:
    """Check documents given in memory: `Document` objects, or mappings that are read like the rows of a JSON Lines file.

    Args:
        documents: The documents; each needs an id of its own.
        skip_bad: Leave bad ones out instead of raising; they are in ``Loaded.bad_rows``.

    Raises:
        BadRows: Some cannot be used; all of them are listed, with their place, from 1, as the line.
        InputError: One document came instead of several.
    """
    if isinstance(documents, (str, bytes, Mapping, Document)):
        raise InputError(f"documents must be a list of documents, and one {type(documents).__name__} came: put it in a list")

    def candidate(item: object) -> Document | str:
        if isinstance(item, Document):
            return item
        if isinstance(item, Mapping):
            return _document(item, _SAME_NAMES, None, _NO_CLEANING)
        return f"expected a Document or a mapping, got {type(item).__name__}"

    return _collect((("documents", place, candidate(item)) for place, item in enumerate(documents, 1)), skip_bad)


def _check_arguments(source: str | Path, path: Path, columns: Mapping[str, str] | None, category: str | None) -> None:
    if not str(source) or not path.exists():
        raise InputError(f"there is no file or folder {str(source)!r}: check the path")
    if not path.is_dir() and path.suffix.lower() not in (*JSON_SUFFIXES, *DELIMITERS):
        raise InputError(
            f"cannot read {path}: expected a {', '.join((*JSON_SUFFIXES, *DELIMITERS))} file, or a folder. "
            "For a document of its own give the folder that it is in"
        )
    if columns and path.is_dir():
        raise InputError(f"columns is for files of rows, and {path} is a folder: leave it out")
    if unknown := sorted(set(columns or ()) - set(_FIELDS)):
        raise InputError(f"columns has {', '.join(map(repr, unknown))}, but the fields to map are {', '.join(_FIELDS)}")
    if category is not None and not category.strip():
        raise InputError("category is empty: name one, or leave it out")


def _unreadable(error: OSError, path: Path) -> InputError:
    return InputError(f"cannot read {error.filename or path}: {error.strerror or error}")


# Rows to documents


def _document(row: Fields, columns: Mapping[str, str], category: str | None, cleaning: Cleaning) -> Document | str:
    """The document of a row, or what is wrong with the row."""
    fields = {field: row[column] for field, column in columns.items() if not is_absent(row.get(column))}
    metadata = {key: value for key, value in row.items() if key not in columns.values()}
    inner = metadata.get("metadata", {})
    if inner is None or isinstance(inner, Mapping):
        metadata.pop("metadata", None)
        if both := sorted(map(repr, metadata.keys() & (inner or {}).keys())):
            return f"{', '.join(both)} in the row and in its metadata too: name it once"
        metadata.update(inner or {})
    if category is not None:
        fields.setdefault("category", category)
    if type(fields.get("id")) is int:
        fields["id"] = str(fields["id"])
    if missing := [field for field in ("id", "text", "category") if field not in fields]:
        return ", ".join(f"no {field}" if field == columns[field] else f"no {field} ({columns[field]!r})" for field in missing)
    if isinstance(fields.get("also_in"), str):  # a cell of a table
        fields["also_in"] = [name for name in re.split(r"\s*[;；]\s*", fields["also_in"].strip()) if name]
    for field in ("text", "title"):
        if isinstance(fields.get(field), str):
            fields[field] = cleaning.apply(fields[field])
    try:
        return Document(**fields, metadata=metadata)
    except RecursionError:
        return "the metadata is nested too deeply"
    except ValidationError as error:
        return "; ".join(_in_plain_words(problem["loc"], problem) for problem in error.errors())


def _in_plain_words(place: tuple[int | str, ...], problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in place)
    if problem["type"] == "string_type":
        return f"{name} must be a string, not {type(problem['input']).__name__}"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}"


def _collect(candidates: Iterable[_Candidate], skip_bad: bool) -> Loaded:
    first: dict[str, str] = {}
    documents: list[Document] = []
    bad: list[BadRow] = []
    for source, line, document in candidates:
        if isinstance(document, str):
            bad.append(BadRow(source, line, document))
        elif document.id in first:
            bad.append(BadRow(source, line, f"the id {document.id!r} is taken already by {first[document.id]}"))
        else:
            first[document.id] = f"{source}:{line}" if line else source
            documents.append(document)
    if bad and not skip_bad:
        raise BadRows(bad)
    return Loaded(tuple(documents), tuple(bad))


@dataclass(frozen=True)
class _Source:
    """A source, with how it is read."""

    source: str | Path
    columns: Mapping[str, str] | None
    category: str | None
    encoding: str
    cleaning: Cleaning

    def __post_init__(self) -> None:
        try:
            _check_arguments(self.source, Path(self.source), self.columns, self.category)
        except OSError as error:  # a name that is too long
            raise _unreadable(error, Path(self.source)) from error

    def candidates(self, meter: Meter) -> Iterator[tuple[Row, Document | str]]:
        """Every row, with the document that it is or what is wrong with it."""
        path, names = Path(self.source), {**_SAME_NAMES, **(self.columns or {})}
        rows = (
            folder_rows(path, self.encoding, meter)
            if path.is_dir()
            else table_rows(path, self.columns or {}, self.category, self.encoding, meter)
        )
        row = None
        try:
            for row in rows:
                fields = row.fields
                yield row, fields if isinstance(fields, str) else _document(fields, names, self.category, self.cleaning)
        except OSError as error:
            raise _unreadable(error, path) from error
        if row is None:
            raise InputError(
                f"there is no document in {path}: expected "
                + (f"files that end in {', '.join(TEXT_SUFFIXES)}" if path.is_dir() else "at least one row")
            )


class _Seen:
    """A set of hashes, with a number for each: sorted arrays, each at most half as long as the one before it."""

    def __init__(self) -> None:
        self._runs: list[tuple[_Numbers, npt.NDArray[np.int64]]] = []

    def places(self, hashes: _Numbers) -> npt.NDArray[np.int64]:
        """The number of each hash, or -1."""
        found = np.full(len(hashes), -1, dtype=np.int64)
        for keys, numbers in self._runs:
            at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            found = np.where(keys[at] == hashes, numbers[at], found)
        return found

    def add(self, hashes: _Numbers, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Take in hashes with their numbers.

        Returns:
            For each hash the number that it was first taken in with, or -1 where that is now.
        """
        found = self.places(hashes)
        keys, first, back = np.unique(hashes, return_index=True, return_inverse=True)
        twice = first[back] != np.arange(len(hashes))
        found = np.where((found < 0) & twice, numbers[first[back]], found)
        fresh = found[first] < 0
        run = (keys[fresh], numbers[first[fresh]])
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            longer = self._runs.pop()
            at = np.searchsorted(longer[0], run[0])
            run = (np.insert(longer[0], at, run[0]), np.insert(longer[1], at, run[1]))
        if len(run[0]):
            self._runs.append(run)
        return found
