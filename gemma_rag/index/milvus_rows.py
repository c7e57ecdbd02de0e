"""What stands in a collection of Milvus: its fields, rows as it keeps them, and the expressions that find them again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from gemma_rag.documents import Chunk
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.index.remote import EVERY, RemoteRow, Wanted, facet, facets_of

Indexes: TypeAlias = dict[str, tuple[str, str | None]]
"""For a field the kind of its index, and the metric."""

ANALYZER: dict[str, Any] = {"tokenizer": "jieba", "filter": ["cnalphanumonly", "lowercase"]}
"""Of BM25: Chinese words, Latin letters and digits. Milvus Lite knows the tokenizer, lowers by itself, and has no filters."""

LONGEST = 65_535
"""Bytes of a VARCHAR."""

MOST_ITEMS = 4_096
"""Of an array."""

STAMP = ["document", "hash", "generation"]
FIELDS = [*STAMP, "key", "place", "of", "text", "rest"]


def schema_of_records() -> tuple[Any, Indexes]:
    """The fields and the indexes of the collection of records."""
    from pymilvus import DataType

    schema = _empty()
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=256)
    schema.add_field("name", DataType.VARCHAR, max_length=200)
    schema.add_field("place", DataType.INT64)
    schema.add_field("of", DataType.INT64)
    schema.add_field("data", DataType.VARCHAR, max_length=LONGEST)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without one
    return schema, {"vector": ("FLAT", "COSINE"), "name": ("INVERTED", None)}


def schema_of_rows(dimensions: int, *, lite: bool) -> tuple[Any, Indexes]:
    """The fields and the indexes of the collection of rows; Milvus Lite has neither automatic indexes nor any of arrays."""
    from pymilvus import DataType, Function, FunctionType

    schema = _empty()
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=128)
    schema.add_field("category", DataType.VARCHAR, max_length=LONGEST, is_partition_key=True)
    schema.add_field("guest", DataType.BOOL, description="in a further category of its document")
    schema.add_field("document", DataType.VARCHAR, max_length=LONGEST)
    schema.add_field("owner", DataType.VARCHAR, max_length=64, description="digest of the document's id")
    schema.add_field("hash", DataType.VARCHAR, max_length=64)
    schema.add_field("generation", DataType.INT64)
    schema.add_field("place", DataType.INT64)
    schema.add_field("of", DataType.INT64)
    schema.add_field("text", DataType.VARCHAR, max_length=LONGEST, enable_analyzer=True, analyzer_params=ANALYZER)
    array = {"datatype": DataType.ARRAY, "element_type": DataType.VARCHAR, "max_capacity": MOST_ITEMS}
    schema.add_field("rest", max_length=LONGEST, description="what else there is, as JSON", **array)
    schema.add_field("facets", max_length=32, description="digests of the metadata", **array)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
    schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(
        Function(name="bm25", function_type=FunctionType.BM25, input_field_names=["text"], output_field_names=["words"])
    )
    indexes: Indexes = {
        "vector": ("FLAT" if lite else "AUTOINDEX", "COSINE"),
        "words": ("SPARSE_INVERTED_INDEX", "BM25"),
        "owner": ("INVERTED", None),
    }
    return schema, indexes if lite else {**indexes, "facets": ("INVERTED", None)}


def _empty() -> Any:
    from pymilvus import MilvusClient

    return MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)


def packed(row: RemoteRow) -> Iterator[dict[str, Any]]:
    """A row as Milvus keeps it, once for each category.

    Raises:
        InputError: It does not fit.
    """
    for what, value in (("its id", row.id), *((f"the category {name[:30]!r}", name) for name in row.categories)):
        if len(value.encode()) > LONGEST:
            raise InputError(f"document {row.id[:60]!r} does not fit into Milvus: {what} has more than {LONGEST:,} bytes")
    text = f"{row.title}\n{row.piece}"
    shown = start_of(text, LONGEST)
    rest = [len(row.title), text[len(shown) :], row.category, row.also_in, row.metadata, row.chunk.model_dump(mode="json")]
    pieces = list(pieces_of(json.dumps(rest, ensure_ascii=False, allow_nan=False)))
    if len(pieces) > MOST_ITEMS:
        raise InputError(f"document {row.id[:60]!r} does not fit into Milvus: one of its chunks has more than 256 MB")
    packed = {
        "document": row.id,
        "owner": owner(row.id),
        "hash": row.hash,
        "generation": row.generation,
        "place": row.place,
        "of": row.of,
        "text": shown,
        "rest": pieces,
        "facets": facets_of(row.metadata, MOST_ITEMS),
        "vector": np.asarray(row.vector, dtype=np.float32),
    }
    for i, category in enumerate(row.categories):
        key = f"{row.key}-{hashlib.blake2b(category.encode(), digest_size=8).hexdigest()}" if i else row.key
        yield {**packed, "key": key, "category": category, "guest": i > 0}


def unpacked(item: Any) -> RemoteRow:
    """What `packed` packed.

    Raises:
        KnowledgeBaseError: Somebody else has written it.
    """
    try:
        title, tail, category, also_in, metadata, chunk = json.loads("".join(item["rest"]))
        text = item["text"] + tail
        vector = item.get("vector")
        return RemoteRow(
            id=item["document"],
            hash=item["hash"],
            generation=int(item["generation"]),
            place=int(item["place"]),
            of=int(item["of"]),
            category=category,
            also_in=tuple(also_in),
            title=text[:title],
            metadata=metadata,
            piece=text[title + 1 :],
            chunk=Chunk.model_validate(chunk),
            vector=None if vector is None else np.asarray(vector, dtype=np.float32),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise KnowledgeBaseError(f"a row of the collection in Milvus cannot be read: {error}") from None


def once(rows: Sequence[RemoteRow]) -> list[int]:
    """Where each row stands first: a document in several categories is found in each."""
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        seen.setdefault(row.key, i)
    return list(seen.values())


def selected(within: Sequence[str] | None, where: Wanted | None, generation: int) -> str:
    """The rows that a search may find, as an expression: each once in every category; without categories, once.

    Args:
        within: Names of categories; None for all.
        where: What the metadata has to hold.
        generation: The last that is looked at.
    """
    names = "guest == false" if within is None else f"category in [{', '.join(quoted(name) for name in within)}]"
    return f"{names} and {visible(where, generation)}"


def visible(where: Wanted | None, generation: int) -> str:
    """The same, without a word about categories."""
    parts = [f"generation <= {int(generation)}"]
    for key, values in (where or {}).items():
        facets = ", ".join(f'"{item}"' for item in (*(facet(key, value) for value in values), EVERY))
        parts.append(f"array_contains_any(facets, [{facets}])")
    return " and ".join(parts)


def quoted(text: str) -> str:
    """A text as Milvus and Milvus Lite both read it in an expression; neither takes a line's end as it is."""
    for what, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(what, escaped)
    return f'"{text}"'


def owned_by(ids: Sequence[str]) -> str:
    """The rows of documents, as an expression."""
    return f"owner in [{', '.join(repr(owner(name)) for name in ids)}]"


def owner(document_id: str) -> str:
    """A digest of an id: of one length, and the same in every syntax."""
    return hashlib.blake2b(document_id.encode(), digest_size=16).hexdigest()


def batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Items, so many at a time."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def start_of(text: str, most: int) -> str:
    """As much of a text as has at most `most` bytes."""
    return text if 4 * len(text) <= most else text.encode()[:most].decode(errors="ignore")


def pieces_of(text: str) -> Iterator[str]:
    """A text in parts that each fit into a field."""
    while text:
        piece = start_of(text, LONGEST)
        yield piece
        text = text[len(piece) :]


def check_name(name: str) -> None:
    """Refuse what would not be plain in an expression."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,200}", name):
        raise InputError(f"the name of a record has letters, digits and hyphens, and is {name!r}")
