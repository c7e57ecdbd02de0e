"""Milvus: a collection partitioned by category, cosines, and BM25 on the server; a file of Milvus Lite or a cluster.

The category is the partition key, and a document has its rows once in each of its categories: a search in some categories is
then a filter on the partition key alone, which leaves the other partitions unread. With the further categories in an array
beside the key, ``category in ... or array_contains_any(...)`` would have to read every partition.

Every read is of consistency level Strong: it sees what was written before it, by whomever.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra, without_secrets
from gemma_rag.index import milvus_rows
from gemma_rag.index.milvus_rows import (
    FIELDS,
    LONGEST,
    STAMP,
    batches,
    check_name,
    once,
    owned_by,
    packed,
    selected,
    unpacked,
    visible,
)
from gemma_rag.index.remote import RemoteRow, Stamp, Wanted
from gemma_rag.vectors import Floats

TOKEN = "GEMMA_RAG_MILVUS_TOKEN"  # noqa: S105 - the name of the variable
"""Environment variable with ``user:password`` or an API key."""

_MOST_ROWS = 16_384  # that one search or query gives
_BATCH_ROWS = 1_000
_BATCH_BYTES = 16 << 20  # a server takes 64 MB in one request
_IDS_AT_ONCE = 500
_AT_ONCE = 2_000  # rows of documents that one request gives
_PIECES_AT_ONCE = 256  # of a record
_KEEPALIVE = {"grpc.keepalive_time_ms": 300_000, "grpc.keepalive_permit_without_calls": False}
"""A server of Milvus Lite hangs up on whoever pings it every ten seconds, as pymilvus does by itself."""
_TIMEOUT = 30.0  # seconds for one request
_PARTITIONS = 64  # that a server spreads the categories over; Milvus Lite, with a file for each, has its 16
_MOST_PARTITIONS = 1024  # of a collection, as Milvus is delivered
_THREADS = 8  # searches that are on their way at a time, of a batch that opens different categories

_files: dict[str, int] = {}
_files_guard = threading.Lock()
"""How many engines of this process have a file of Milvus Lite open: the last one lets go of it."""


class _Quiet(logging.Filter):
    """Lets nothing through that the thread logs that made it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


class MilvusEngine:
    """A collection of Milvus, and a second one for small records.

    Args:
        uri: ``http://host:port``, or a path that ends in ``.db``: a file of Milvus Lite, which only one process
            at a time can open. ``http://host:port?partitions=1024`` spreads the categories of a collection that is
            made over so many partitions, 1 to 1,024, instead of 64.
        collection: Its name.
        dimensions: Of the vectors.
        create: Make it; one that is there already, and empty, is taken.

    Raises:
        InputError: The uri or the name cannot be used, or the collection exists already.
        MissingExtra: pymilvus is not installed, or milvus-lite for a file.
        KnowledgeBaseError: The server cannot be reached, or there is no such collection, or it is not one of ours.
    """

    name = "milvus"
    has_words = True

    def __init__(self, uri: str, collection: str, dimensions: int, *, create: bool = False) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,200}", collection):
            raise InputError(f"a collection of Milvus is called by letters, digits and underscores, and not {collection!r}")
        self.uri, self._partitions = partitions_of(uri)
        self.collection, self._dimensions = collection, dimensions
        self._records = f"{collection}_records"
        self._file: str | None = None
        self._client = self._connected()
        try:
            with self._explained():
                self.lite = "lite" in str(self._client.get_server_version())
                if self.lite:  # whose every iterator warns that the clock is the client's
                    logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
                (self._create if create else self._check)()
                for name in (self._records, collection):
                    self._client.load_collection(name)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<MilvusEngine {self.collection} at {self.uri}>"

    # -- connecting -------------------------------------------------------------------------------------------------

    def _connected(self) -> Any:
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise MissingExtra("the client of Milvus (pymilvus)", "milvus") from None
        options: dict[str, Any] = {"timeout": _TIMEOUT, "grpc_options": _KEEPALIVE}
        if token := os.environ.get(TOKEN):
            options["token"] = token
        if not re.match(r"(https?|tcp|unix)://", self.uri):
            self._take_file()
        try:
            with self._explained():
                return MilvusClient(self.uri, **options)
        except BaseException:
            self._release_file()
            raise

    def _take_file(self) -> None:
        path = Path(self.uri)
        if path.suffix != ".db":
            raise InputError(f"milvus needs the http:// address of a server, or a path that ends in .db, and not {self.uri!r}")
        try:
            import jieba
            import milvus_lite  # noqa: F401
        except ImportError:
            raise MissingExtra("Milvus Lite with jieba, which keeps a Milvus in a file,", "milvus") from None
        jieba.setLogLevel(logging.WARNING)  # that it reads its dictionary is no news to anybody
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = str(path.resolve())
        with _files_guard:
            _files[self._file] = _files.get(self._file, 0) + 1

    def _release_file(self) -> None:
        if self._file is None:
            return
        with _files_guard:
            _files[self._file] -= 1
            last = not _files[self._file]
        if last:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._file)
        self._file = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client raises, as errors of ours."""
        from pymilvus.exceptions import MilvusException

        quiet = _Quiet()
        log = logging.getLogger("pymilvus.decorators")  # prints a traceback of what is raised here as an error of ours
        log.addFilter(quiet)
        try:
            yield
        except MilvusException as error:
            said = without_secrets(str(getattr(error, "message", "") or error))
            hint = ""
            if self._file is not None and "local milvus" in said:
                hint = (
                    ". Only one process at a time can open a file of Milvus Lite: close the other one, or start "
                    "`milvus-lite server --data-dir FILE` and give its http:// address to both"
                )
            raise KnowledgeBaseError(f"Milvus at {self.uri} could not do it: {said}{hint}") from None
        finally:
            log.removeFilter(quiet)

    # -- the collections --------------------------------------------------------------------------------------------

    def _create(self) -> None:
        if self._client.has_collection(self.collection):
            self._check()
            self._client.load_collection(self._records)
            self._client.load_collection(self.collection)
            if self.count() or self.records():
                raise InputError(
                    f"there is a collection {self.collection!r} at {self.uri} already: open the knowledge base that it belongs "
                    "to, or choose another name"
                )
            return
        if self._client.has_collection(self._records):  # somebody was killed between the two
            self._client.drop_collection(self._records)
        self._make(self._records, *milvus_rows.schema_of_records())
        self._make(self.collection, *milvus_rows.schema_of_rows(self._dimensions, lite=self.lite), partitioned=True)

    def _make(self, name: str, schema: Any, indexes: milvus_rows.Indexes, *, partitioned: bool = False) -> None:
        params = self._client.prepare_index_params()
        for field, (kind, metric) in indexes.items():
            params.add_index(field, index_type=kind, **({} if metric is None else {"metric_type": metric}))
        options = {"num_partitions": self._partitions} if partitioned and not self.lite else {}
        self._client.create_collection(name, schema=schema, consistency_level="Strong", **options)
        self._client.create_index(name, params, sync=not self.lite)  # Milvus Lite is ready at once, and cannot be asked

    def _check(self) -> None:
        if not (self._client.has_collection(self.collection) and self._client.has_collection(self._records)):
            raise KnowledgeBaseError(
                f"Milvus at {self.uri} has no collection {self.collection!r} of a knowledge base: index the documents anew, or "
                "copy the knowledge base from where it is"
            )
        fields = {field["name"]: field for field in self._client.describe_collection(self.collection)["fields"]}
        if not fields.keys() >= {*FIELDS, "category", "guest", "owner", "facets", "vector"}:
            raise KnowledgeBaseError(f"the collection {self.collection!r} at {self.uri} was not made by gemma-rag")
        if (found := int(fields["vector"]["params"]["dim"])) != self._dimensions:
            raise KnowledgeBaseError(
                f"the collection {self.collection!r} at {self.uri} has vectors of {found} dimensions, and the knowledge base "
                f"has {self._dimensions}"
            )

    # -- rows -------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[RemoteRow]) -> None:
        """Upsert rows in batches of at most 1,000 rows and 16 MB."""
        batch: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            for item in packed(row):
                own = 4 * self._dimensions + 4 * len(item["text"]) + sum(4 * len(piece) for piece in item["rest"])
                if batch and (size + own > _BATCH_BYTES or len(batch) == _BATCH_ROWS):
                    self._upsert(batch)
                    batch, size = [], 0
                batch.append(item)
                size += own
        if batch:
            self._upsert(batch)

    def _upsert(self, batch: list[dict[str, Any]]) -> None:
        with self._explained():
            self._client.upsert(self.collection, batch)

    def delete(self, ids: Sequence[str], before: int) -> None:
        """Delete the rows of these documents that are of generations less than `before`."""
        for some in batches(ids, _IDS_AT_ONCE):
            with self._explained():
                self._client.delete(self.collection, filter=f"{owned_by(some)} and generation < {int(before)}")

    def undo(self, after: int) -> None:
        """Delete the rows of every generation greater than `after`."""
        with self._explained():
            self._client.delete(self.collection, filter=f"generation > {int(after)}")

    def rows(self, ids: Sequence[str], vectors: bool = False) -> list[RemoteRow]:
        """Every row of these documents, of every generation."""
        fields = [*FIELDS, "vector"] if vectors else FIELDS
        return [unpacked(item) for item in self._of_documents(ids, "guest == false", fields)]

    def stamps(self, ids: Sequence[str]) -> list[Stamp]:
        """Document, content and generation of the first row that each commit wrote of these documents."""
        items = self._of_documents(ids, "guest == false and place == 0", STAMP)
        return [Stamp(item["document"], item["hash"], int(item["generation"])) for item in items]

    def _of_documents(self, ids: Sequence[str], which: str, fields: list[str]) -> Iterator[Any]:
        for some in batches(ids, _IDS_AT_ONCE):
            expression = f"{owned_by(some)} and {which}"
            with self._explained():
                found = self._client.query(self.collection, filter=expression, output_fields=fields, limit=_AT_ONCE)
            if len(found) < _AT_ONCE:
                yield from found
            else:  # there may be more: read all, a little at a time
                for batch in self._read(expression, fields, _BATCH_ROWS):
                    yield from batch

    def scan(self, batch: int = 1000, vectors: bool = True) -> Iterator[list[RemoteRow]]:
        """Every row, in the order of the keys, as they were when it began."""
        for some in self._read("guest == false", [*FIELDS, "vector"] if vectors else FIELDS, batch):
            yield [unpacked(item) for item in some]

    def _read(self, expression: str, fields: list[str], batch: int) -> Iterator[list[dict[str, Any]]]:
        with self._explained():
            iterator = self._client.query_iterator(self.collection, batch_size=batch, filter=expression, output_fields=fields)
        try:
            while True:
                with self._explained():
                    found = iterator.next()
                if not found:
                    return
                yield found
        finally:
            iterator.close()

    def count(self) -> int:
        """How many rows there are, of every generation; a document's further categories add none."""
        with self._explained():
            return int(self._client.query(self.collection, filter="guest == false", output_fields=["count(*)"])[0]["count(*)"])

    # -- searching --------------------------------------------------------------------------------------------------

    def search(
        self, queries: Floats, within: Sequence[Sequence[str] | None], n: int, where: Wanted | None, generation: int
    ) -> list[list[tuple[RemoteRow, float]]]:
        """The nearest rows; questions that look into the same categories go in one request."""
        together: dict[tuple[str, ...] | None, list[int]] = {}
        for i, names in enumerate(within):
            together.setdefault(None if names is None else tuple(sorted(names)), []).append(i)
        found: list[list[tuple[RemoteRow, float]]] = [[] for _ in within]

        def ask(names: tuple[str, ...] | None, asking: list[int]) -> None:
            limit = n
            while asking and (names is None or names):
                answers = self._found(
                    [np.asarray(queries[i], dtype=np.float32) for i in asking],
                    "vector",
                    limit,
                    selected(names, where, generation),
                    FIELDS,
                )
                short = []
                for i, hits in zip(asking, answers, strict=True):
                    rows = [unpacked(hit["entity"]) for hit in hits]
                    cosines = [min(1.0, max(-1.0, float(hit["distance"]))) for hit in hits]
                    found[i] = [(rows[at], cosines[at]) for at in once(rows)[:n]]
                    if len(found[i]) < n and len(rows) == limit < _MOST_ROWS:
                        short.append(i)
                asking, limit = short, 2 * limit

        if len(together) == 1 or self.lite:
            for names, asking in together.items():
                ask(names, asking)
        else:
            with ThreadPoolExecutor(min(_THREADS, len(together))) as pool:
                list(pool.map(ask, together.keys(), together.values()))
        return found

    def words(
        self, question: str, within: Sequence[str] | None, n: int, where: Wanted | None, generation: int
    ) -> list[RemoteRow]:
        """The rows that match the words best. The scores are left where they are: those of Milvus Lite are negative."""
        limit, rows = n, list[RemoteRow]()
        while (within is None or within) and question.strip():
            fields = [*FIELDS, "vector"]
            [hits] = self._found([question], "words", limit, selected(within, where, generation), fields)
            every = [unpacked(hit["entity"]) for hit in hits]
            rows = [every[at] for at in once(every)[:n]]
            if len(rows) == n or len(hits) < limit or limit >= _MOST_ROWS:
                break
            limit *= 2
        return rows

    def _found(self, data: list[Any], field: str, limit: int, expression: str, fields: list[str]) -> list[list[Any]]:
        metric = {"vector": "COSINE", "words": "BM25"}[field]
        with self._explained():
            return list(
                self._client.search(
                    self.collection,
                    data=data,
                    anns_field=field,
                    limit=min(limit, _MOST_ROWS),
                    filter=expression,
                    output_fields=fields,
                    search_params={"metric_type": metric},
                )
            )

    def homes(self, where: Wanted, generation: int, most: int) -> set[str] | None:
        """The categories of the rows that match, where at most `most` do (Milvus gives no more than 16,383)."""
        most = min(most, _MOST_ROWS - 1)
        with self._explained():
            found = self._client.query(
                self.collection, filter=visible(where, generation), output_fields=["category"], limit=most + 1
            )
        return None if len(found) > most else {str(item["category"]) for item in found}

    # -- records ----------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes | None) -> None:
        """Keep a record, in base64 and in pieces of 64 KB."""
        check_name(name)
        with self._explained():
            self._client.delete(self._records, filter=f'name == "{name}"')
            if data is None:
                return
            text = base64.b64encode(data).decode()
            pieces = [text[at : at + LONGEST] for at in range(0, len(text), LONGEST)] or [""]
            for first in range(0, len(pieces), _PIECES_AT_ONCE):
                self._client.upsert(
                    self._records,
                    [
                        {
                            "key": f"{name}-{place:06d}",
                            "name": name,
                            "place": place,
                            "of": len(pieces),
                            "data": piece,
                            "vector": [1.0, 0.0],
                        }
                        for place, piece in enumerate(pieces[first : first + _PIECES_AT_ONCE], start=first)
                    ],
                )

    def fetch(self, name: str) -> bytes | None:
        """What `put` kept, or None.

        Raises:
            KnowledgeBaseError: Some of its pieces are missing.
        """
        check_name(name)
        pieces: dict[int, str] = {}
        of, first = 1, 0
        while first < of:
            some = f'name == "{name}" and place >= {first} and place < {first + _PIECES_AT_ONCE}'
            with self._explained():
                for item in self._client.query(self._records, filter=some, output_fields=["place", "of", "data"]):
                    pieces[int(item["place"])] = item["data"]
                    of = int(item["of"])
            first += _PIECES_AT_ONCE
        if not pieces:
            return None
        if sorted(pieces) != list(range(of)):
            raise KnowledgeBaseError(f"the record {name!r} of {self!r} is damaged: {len(pieces)} of its {of} pieces are there")
        return base64.b64decode("".join(pieces[place] for place in range(of)))

    def records(self) -> list[str]:
        """The names of all records."""
        with self._explained():
            found = self._client.query(self._records, filter="place == 0", output_fields=["name"], limit=_MOST_ROWS)
        return sorted(str(item["name"]) for item in found)

    # -- the end ----------------------------------------------------------------------------------------------------

    def persist(self) -> None:
        """Flush, on Milvus Lite, which searches what it holds in memory many times slower than what it has written.

        A cluster has every acknowledged write in its log, shows it to reads of level Strong, and flushes when it thinks fit
        (it takes one request for that in ten seconds).
        """
        if self.lite:
            with self._explained():
                self._client.flush(self.collection)
                self._client.flush(self._records)

    def drop(self) -> None:
        """Delete both collections."""
        with self._explained():
            self._client.drop_collection(self.collection)
            self._client.drop_collection(self._records)

    def close(self) -> None:
        """Let go of the connection, and of the file."""
        self._client.close()  # twice does no harm
        self._release_file()


def partitions_of(uri: str) -> tuple[str, int]:
    """The address in a uri, and the number of partitions that it asks for.

    >>> partitions_of("http://localhost:19530?partitions=1024")
    ('http://localhost:19530', 1024)

    Raises:
        InputError: The number is out of its range.
    """
    address, asks, number = uri.partition("?partitions=")
    if not asks:
        return uri, _PARTITIONS
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= _MOST_PARTITIONS):
        raise InputError(f"a collection of Milvus has 1 to {_MOST_PARTITIONS} partitions, and the uri asks for {number!r}")
    return address, int(number)
