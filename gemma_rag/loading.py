"""Reading documents from a file, a folder or memory, with every row that cannot be used named at once.

    .jsonl, .ndjson     one JSON object on each line
    .csv, .tsv          a header and rows
    a folder            Markdown, HTML and text files; the folder that a file is in is its category

All of them become rows, and one function makes a row a `Document`, so a bad row is the same thing everywhere.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeAlias

from pydantic import ValidationError

from gemma_rag.chunking import find_headings
from gemma_rag.cleaning import Cleaning
from gemma_rag.documents import Document
from gemma_rag.errors import BadRow, BadRows, InputError

_Fields: TypeAlias = Mapping[str, Any]
_Row: TypeAlias = tuple[str, int, _Fields | str]  # source, line, and the row or what is wrong with it
_Candidate: TypeAlias = tuple[str, int, Document | str]  # source, line, and the document or what is wrong with it

_FIELDS = ("id", "text", "title", "category", "also_in")
_SAME_NAMES: Mapping[str, str] = MappingProxyType({field: field for field in _FIELDS})
_NO_CLEANING = Cleaning()
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_MARKDOWN_SUFFIXES = (".md", ".markdown")
_HTML_SUFFIXES = (".html", ".htm")
_TEXT_SUFFIXES = (*_MARKDOWN_SUFFIXES, *_HTML_SUFFIXES, ".txt")
_LARGEST_FIELD = 2**31 - 1  # the most that the csv module takes on every platform

# A rule at the top of a text is front matter only where a key follows at once, or the closing line.
_FRONT_MATTER = re.compile(r"---[ \t]*\n(?P<block>(?:(?:#.*\n)*[\w-]+:(?:[ \t].*)?\n(?:.*\n)*?)?)(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
_QUOTED = r"\"(?P<double>[^\"\\\n]*)\"|'(?P<single>(?:[^'\n]|'')*)'"
_SCALAR = re.compile(
    rf"^(?P<key>title|category):[ \t]+(?:{_QUOTED}|(?P<plain>[^\s\"'\[\]{{}}|>&*!%@`#].*?))[ \t]*(?:[ \t]#.*)?$", re.MULTILINE
)

_UNDECODABLE = "\udcff"
"""Stands in decoded text for bytes that the encoding does not know, so that they can be reported by their line."""


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _UNDECODABLE, error.end


codecs.register_error("gemma_rag.mark_undecodable", _mark_undecodable)


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
    path = Path(source)
    try:
        _check_arguments(source, path, columns, category)
        rows = list(_folder_rows(path, encoding) if path.is_dir() else _table_rows(path, columns or {}, category, encoding))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if not rows:
        raise InputError(
            f"there is no document in {path}: expected "
            + (f"files that end in {', '.join(_TEXT_SUFFIXES)}" if path.is_dir() else "at least one row")
        )
    names = {**_SAME_NAMES, **(columns or {})}
    return _collect(
        (
            (where, line, row if isinstance(row, str) else _document(row, names, category, cleaning))
            for where, line, row in rows
        ),
        skip_bad,
    )


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
    if not path.is_dir() and path.suffix.lower() not in (*_JSON_SUFFIXES, *_DELIMITERS):
        raise InputError(
            f"cannot read {path}: expected a {', '.join((*_JSON_SUFFIXES, *_DELIMITERS))} file, or a folder. "
            "For a document of its own give the folder that it is in"
        )
    if columns and path.is_dir():
        raise InputError(f"columns is for files of rows, and {path} is a folder: leave it out")
    if unknown := sorted(set(columns or ()) - set(_FIELDS)):
        raise InputError(f"columns has {', '.join(map(repr, unknown))}, but the fields to map are {', '.join(_FIELDS)}")
    if category is not None and not category.strip():
        raise InputError("category is empty: name one, or leave it out")


# Rows to documents


def _document(row: _Fields, columns: Mapping[str, str], category: str | None, cleaning: Cleaning) -> Document | str:
    """The document of a row, or what is wrong with the row."""
    fields = {field: row[column] for field, column in columns.items() if not _is_absent(row.get(column))}
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


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


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


# Files of rows


def _table_rows(path: Path, columns: Mapping[str, str], category: str | None, encoding: str) -> list[_Row]:
    text = _decoded(path, encoding)
    delimiter = _DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        rows = list(_json_rows(path, text, encoding))
        needed = dict(columns)
    else:
        rows = list(_csv_rows(path, text, encoding, delimiter))
        needed = {"text": "text", **({} if category else {"category": "category"}), **columns}
    good = [row for _, _, row in rows if not isinstance(row, str)]
    there = dict.fromkeys(key for row in good for key in row)
    if good and (missing := {field: column for field, column in needed.items() if column not in there}):
        raise InputError(
            f"{path} has no {' and no '.join(f'{column!r} for the {field}' for field, column in missing.items())}. "
            f"It has {', '.join(map(repr, there))}: say which is which with columns={{field: name}}"
            + ("; category= names one for all rows" if "category" in missing else "")
        )
    id_column = columns.get("id", "id")
    if any(not _is_absent(row.get(id_column)) for row in good):
        return rows
    return [
        (source, line, row if isinstance(row, str) else {**row, id_column: f"{path.stem}-{line}"}) for source, line, row in rows
    ]


def json_rows(path: Path, encoding: str = "utf-8") -> list[tuple[str, int, Mapping[str, Any] | str]]:
    """Read a JSON Lines file: for each line its source, its number, and the object or what is wrong with it.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return list(_json_rows(path, _decoded(path, encoding), encoding))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _decoded(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode(encoding, "gemma_rag.mark_undecodable").removeprefix("\ufeff")
    except LookupError as error:
        raise InputError(f"there is no encoding {encoding!r}: try utf-8, gb18030, gbk, big5 or utf-16") from error


def _not_decodable(encoding: str) -> str:
    return f"bytes that are not {encoding}: give the encoding of the source, for example encoding='gbk'"


def _json_rows(path: Path, text: str, encoding: str) -> Iterator[_Row]:
    for line, row in enumerate(io.StringIO(text, newline=None), 1):  # not splitlines: a JSON string may hold U+2028
        if row.strip():
            yield str(path), line, _json_row(row, encoding)


def _json_row(row: str, encoding: str) -> _Fields | str:
    if _UNDECODABLE in row:
        return _not_decodable(encoding)
    try:
        value = json.loads(row)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nesting of thousands of levels
        return f"not usable JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, got {row.strip()[:40]}"


def _csv_rows(path: Path, text: str, encoding: str, delimiter: str) -> Iterator[_Row]:
    # The limit is global; it is raised and stays so, because setting it back could trip a reader in another thread.
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    # strict: a quotation mark that nothing closes is an error, where it would else swallow the rest of the file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield str(path), line, f"not valid CSV: {error}"
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _checked_header(path, cells, encoding)
        elif any(_UNDECODABLE in cell for cell in cells):
            yield str(path), line, _not_decodable(encoding)
        elif len(cells) != len(header):
            yield str(path), line, f"{len(cells)} fields, but the header has {len(header)}"
        else:
            yield str(path), line, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _checked_header(path: Path, cells: Sequence[str], encoding: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if any(_UNDECODABLE in name for name in header):
        raise InputError(f"the header of {path} has {_not_decodable(encoding)}")
    if twice := [name for name, times in Counter(header).items() if name and times > 1]:
        raise InputError(f"the header of {path} has {', '.join(map(repr, twice))} more than once: rename one")
    return header


# Folders


def _folder_rows(folder: Path, encoding: str) -> Iterator[_Row]:
    files = {PurePosixPath(file.relative_to(folder).as_posix()): file for file in _walk(folder, (folder.resolve(),))}
    ids = Counter(str(relative.with_suffix("")) for relative in files)
    ids.update(str(relative) for relative in files)  # a short id must not be the path of another file either
    for relative, file in files.items():
        short = str(relative.with_suffix(""))
        yield str(file), *_file_row(file, relative, short if ids[short] == 1 else str(relative), encoding)


def _walk(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    """The files to read. A link may lead anywhere inside the first parent, but not back into a folder above it."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.exists():
            continue
        resolved = path.resolve()
        if not resolved.is_relative_to(parents[0]):
            continue
        if path.is_dir() and resolved not in parents:
            yield from _walk(path, (*parents, resolved))
        elif path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES:
            yield path


def _file_row(file: Path, relative: PurePosixPath, document_id: str, encoding: str) -> tuple[int, _Fields | str]:
    try:
        text = _decoded(file, encoding).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        return 0, f"cannot be read: {error.strerror or error}"
    if _UNDECODABLE in text:
        return text.count("\n", 0, text.index(_UNDECODABLE)) + 1, _not_decodable(encoding)
    suffix = file.suffix.lower()
    try:
        parsed = _markdown(text) if suffix in _MARKDOWN_SUFFIXES else _html(text) if suffix in _HTML_SUFFIXES else _plain(text)
    except RecursionError:
        return 0, "nested too deeply to be read"
    return 0, {
        "id": document_id,
        "text": parsed["text"],
        "title": parsed.get("title") or " ".join(re.split(r"[-_\s]+", relative.stem)).strip(),
        "category": parsed.get("category") or (None if relative.parent == PurePosixPath(".") else str(relative.parent)),
        "metadata": {"source": str(relative)},
    }


def _markdown(text: str) -> dict[str, str]:
    matter = _FRONT_MATTER.match(text)
    found: dict[str, str] = {}
    if matter:
        text = text[matter.end() :]
        for line in _SCALAR.finditer(matter["block"]):
            value = line["double"] or (line["single"] or "").replace("''", "'") or line["plain"] or ""
            found.setdefault(line["key"], value.strip())
    heading = next((heading.text for heading in find_headings(text) if heading.text), "")
    return {"title": heading, **{key: value for key, value in found.items() if value}, "text": text.strip("\n")}


def _html(text: str) -> dict[str, str]:
    from bs4 import BeautifulSoup  # here, because only HTML needs the two; markdownify brings Beautiful Soup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(text + "\n", "html.parser")  # it warns of text without a line end, taking it for a file's name
    title = soup.find("title")
    fallback = title.get_text() if title else ""
    # <head> itself stays, because its end tag may be missing; an image that is written out in the text says nothing
    for tag in [*soup(["script", "style", "nav", "title", "template"]), *soup.select('img[src^="data:"]')]:
        tag.decompose()
    heading = next((heading for h1 in soup("h1") if (heading := h1.get_text().strip())), fallback)
    converter = MarkdownConverter(heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    return {"title": " ".join(heading.split()), "text": converter.convert_soup(soup).strip("\n")}


def _plain(text: str) -> dict[str, str]:
    first, *rest = text.strip().split("\n")
    is_title = len(first) <= 80 and rest and not rest[0].strip()
    return {"title": first.strip() if is_title else "", "text": text.strip("\n")}
