"""Files of rows and folders of files as rows, read a little at a time: what they say, before it is a document.

A row is a mapping, or a text that says what is wrong with it. Nothing here holds a whole file, but one file of a folder.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gemma_rag.chunking import find_headings
from gemma_rag.errors import InputError

Fields: TypeAlias = Mapping[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson")
_MARKDOWN_SUFFIXES = (".md", ".markdown")
_HTML_SUFFIXES = (".html", ".htm")
TEXT_SUFFIXES = (*_MARKDOWN_SUFFIXES, *_HTML_SUFFIXES, ".txt")
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


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        source: Its file.
        line: Its line in it, from 1; 0 where the whole file is the row.
        fields: The row, or what is wrong with it.
        raw: What stood there, as plain JSON; None for a file of a folder.
    """

    source: str
    line: int
    fields: Fields | str
    raw: Any = None


@dataclass
class Meter:
    """How far reading has come, in bytes of the source."""

    done: int = 0
    total: int = 0


def hash_of(text: str) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def is_absent(value: object) -> bool:
    """Whether a field says nothing: there is none, or it is white space."""
    return value is None or (isinstance(value, str) and not value.strip())


# Files of rows


def table_rows(path: Path, columns: Mapping[str, str], category: str | None, encoding: str, meter: Meter) -> Iterator[Row]:
    """The rows of a JSON Lines or CSV file, each with an id.

    The file is looked at before, as far as it takes to find the columns and an id: in a usual file its first row.

    Raises:
        InputError: A column that is needed is nowhere in the file, or the encoding is unknown.
    """
    meter.total = path.stat().st_size
    id_column = columns.get("id", "id")
    has_ids = _look(path, columns, category, encoding)
    for row in _plain_rows(path, encoding, meter):
        if has_ids or isinstance(row.fields, str):
            yield row
        else:
            yield row._replace(fields={**row.fields, id_column: f"{path.stem}-{row.line}"})


def json_rows(path: Path, encoding: str = "utf-8", meter: Meter | None = None) -> Iterator[Row]:
    """The rows of a JSON Lines file."""
    for line, row in enumerate(_lines(path, encoding, None, meter or Meter()), 1):
        if row.strip():  # not splitlines: a JSON string may hold U+2028
            fields = _json_row(row, encoding)
            yield Row(str(path), line, fields, readable(row.strip()) if isinstance(fields, str) else fields)


def _plain_rows(path: Path, encoding: str, meter: Meter) -> Iterator[Row]:
    delimiter = DELIMITERS.get(path.suffix.lower())
    return json_rows(path, encoding, meter) if delimiter is None else _csv_rows(path, encoding, delimiter, meter)


def _look(path: Path, columns: Mapping[str, str], category: str | None, encoding: str) -> bool:
    """Whether any row has an id, after checking that the columns are there."""
    needed = dict(columns)
    if path.suffix.lower() in DELIMITERS:
        needed = {"text": "text", **({} if category else {"category": "category"}), **columns}
    id_column = columns.get("id", "id")
    there: dict[str, None] = {}
    has_ids = False
    for row in _plain_rows(path, encoding, Meter()):
        if isinstance(row.fields, str):
            continue
        there |= dict.fromkeys(row.fields)
        has_ids = has_ids or not is_absent(row.fields.get(id_column))
        if has_ids and there.keys() >= set(needed.values()):
            return True
    if there and (missing := {field: column for field, column in needed.items() if column not in there}):
        raise InputError(
            f"{path} has no {' and no '.join(f'{column!r} for the {field}' for field, column in missing.items())}. "
            f"It has {', '.join(map(repr, there))}: say which is which with columns={{field: name}}"
            + ("; category= names one for all rows" if "category" in missing else "")
        )
    return has_ids


def _lines(path: Path, encoding: str, newline: str | None, meter: Meter) -> Iterator[str]:
    with path.open("rb") as file:
        try:
            text = io.TextIOWrapper(file, encoding, "gemma_rag.mark_undecodable", newline)
        except LookupError as error:
            raise _unknown_encoding(encoding) from error
        for number, line in enumerate(text):
            meter.done = file.tell()
            yield line if number else line.removeprefix("\ufeff")


def _decoded(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode(encoding, "gemma_rag.mark_undecodable").removeprefix("\ufeff")
    except LookupError as error:
        raise _unknown_encoding(encoding) from error


def _unknown_encoding(encoding: str) -> InputError:
    return InputError(f"there is no encoding {encoding!r}: try utf-8, gb18030, gbk, big5 or utf-16")


def _not_decodable(encoding: str) -> str:
    return f"bytes that are not {encoding}: give the encoding of the source, for example encoding='gbk'"


def readable(text: str) -> str:
    """A text with replacement characters for what could not be decoded."""
    return text.replace(_UNDECODABLE, "\ufffd")


def _json_row(row: str, encoding: str) -> Fields | str:
    if _UNDECODABLE in row:
        return _not_decodable(encoding)
    try:
        value = json.loads(row)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nesting of thousands of levels
        return f"not usable JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, got {row.strip()[:40]}"


def _csv_rows(path: Path, encoding: str, delimiter: str, meter: Meter) -> Iterator[Row]:
    # The limit is global; it is raised and stays so, because setting it back could trip a reader in another thread.
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    # strict: a quotation mark that nothing closes is an error, where it would else swallow the rest of the file
    reader = csv.reader(_lines(path, encoding, "", meter), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(str(path), line, f"not valid CSV: {error}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = _checked_header(path, cells, encoding)
        elif any(_UNDECODABLE in cell for cell in cells):
            yield Row(str(path), line, _not_decodable(encoding), [*map(readable, cells)])
        elif len(cells) != len(header):
            yield Row(str(path), line, f"{len(cells)} fields, but the header has {len(header)}", cells)
        else:
            fields = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            yield Row(str(path), line, fields, fields)


def _checked_header(path: Path, cells: Sequence[str], encoding: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if any(_UNDECODABLE in name for name in header):
        raise InputError(f"the header of {path} has {_not_decodable(encoding)}")
    if twice := [name for name, times in Counter(header).items() if name and times > 1]:
        raise InputError(f"the header of {path} has {', '.join(map(repr, twice))} more than once: rename one")
    return header


# Folders


def folder_rows(folder: Path, encoding: str, meter: Meter) -> Iterator[Row]:
    """The files of a folder, in sorted order. The folder is walked twice: first for the ids that two files would share."""
    hashes = array("Q")
    meter.total = 0
    for file in _walk(folder):
        relative = PurePosixPath(file.relative_to(folder).as_posix())
        hashes.append(hash_of(str(relative.with_suffix(""))))
        hashes.append(hash_of(str(relative)))  # a short id must not be the path of another file either
        meter.total += file.stat().st_size
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    shared = set(values[counts > 1].tolist())
    for file in _walk(folder):
        relative = PurePosixPath(file.relative_to(folder).as_posix())
        short = str(relative.with_suffix(""))
        line, fields = _file_row(file, relative, str(relative) if hash_of(short) in shared else short, encoding)
        meter.done += file.stat().st_size
        yield Row(str(file), line, fields)


def _walk(folder: Path) -> Iterator[Path]:
    return _walk_below(folder, (folder.resolve(),))


def _walk_below(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    """The files to read. A link may lead anywhere inside the first parent, but not back into a folder above it."""
    for name in sorted(os.listdir(folder), key=os.path.normcase):  # noqa: PTH208  (a million names take less room than paths)
        path = folder / name
        if name.startswith(".") or not path.exists():
            continue
        resolved = path.resolve()
        if not resolved.is_relative_to(parents[0]):
            continue
        if path.is_dir() and resolved not in parents:
            yield from _walk_below(path, (*parents, resolved))
        elif path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
            yield path


def _file_row(file: Path, relative: PurePosixPath, document_id: str, encoding: str) -> tuple[int, Fields | str]:
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
