"""The Chroma engine: a folder of this machine, or a Chroma server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gemma_rag.errors import InputError, KnowledgeBaseError, MissingExtra, without_secrets
from gemma_rag.index.chroma_client import FOLDERS, TOKEN, connected
from gemma_rag.index.chroma_rows import batches, included, metadata_of, rows_in, slices
from gemma_rag.index.remote import RemoteRow, Stamp, Wanted, facet
from gemma_rag.vectors import Floats

LAYOUT = 1
"""Of the rows; a collection of another one is refused."""

_EF_SEARCH = 300
"""Candidates that Chroma's graph looks at; benchmarks on 20,000 rows: recall@100 0.994, and 0.946 with Chroma's own 100."""

_ROWS = 1_000
"""In one request, at most."""

_IDS = 5_000
"""Ids in one filter, at most: each is a variable of an SQL statement, which has 32,766."""

_QUESTIONS = 64
"""In one request, at most, as the answer holds the rows of all of them."""

_PIECE = 1_000_000
"""Bytes of a record in one row, at most."""


class ChromaEngine:
    """A collection of Chroma, and beside it ``<collection>.records`` for what is no row.

    The space of the collection is ``ip``: our vectors have norm 1, so that one minus Chroma's distance is the cosine, and they
    come back bit by bit, where the space ``cosine`` would normalise them again. Chroma's index is a graph: it finds nearly all
    of the nearest rows (docs/decisions/0011). It sees a write when the call returns, and does not rank by words.

    An embedded Chroma serves one process at a time: a second one would read an index that misses what the first adds. So a
    folder is locked while it is open; several processes use a server, ``chroma run --path FOLDER``.

    Args:
        uri: The folder of an embedded one, or ``http(s)://host:port``, with ``?tenant=...&database=...`` where needed.
        collection: Its name.
        dimensions: Of the vectors.
        create: Make it, and fail if it is there already with rows in it; otherwise fail if it is not.

    Raises:
        InputError: A collection of that name exists already, or the name or the uri is none that Chroma takes.
        MissingExtra: ``chromadb`` is not installed.
        KnowledgeBaseError: It cannot be reached, or has no such collection, or one that is not ours.
    """

    name = "chroma"
    has_words = False

    def __init__(self, uri: str, collection: str, dimensions: int, *, create: bool = False) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,500}[A-Za-z0-9]", collection):
            raise InputError(
                f"Chroma takes no collection named {collection!r}: a name has 3 characters or more of A-Z a-z 0-9 . _ -, "
                "a letter or a digit first and last"
            )
        if find_spec("chromadb") is None:
            raise MissingExtra("the Chroma engine", "chroma")
        self._uri, self._collection, self._dimensions = uri, collection, dimensions
        self._folder = None if urlsplit(uri).scheme in ("http", "https") else Path(uri).resolve()
        self._guests_at: tuple[int, frozenset[str]] | None = None
        self._guests_written: set[str] = set()
        if self._folder is not None:
            if not create and not self._folder.is_dir():
                raise KnowledgeBaseError(f"there is no Chroma folder at {self._folder}")
            FOLDERS.enter(self._folder)
        self._closed = False
        self._client: Any = None
        try:
            with self._explained():
                self._client = connected(uri, self._folder)
                self._rows, self._records = self._opened(create)
                self._most = min(_ROWS, int(self._client.get_max_batch_size()))
        except BaseException:
            self.close()
            raise

    # -- rows ---------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[RemoteRow]) -> None:
        """See `Engine.add`."""
        with self._explained():
            self._note_guests({category for row in rows for category in row.also_in})
            for batch in batches(rows, self._most):
                self._rows.upsert(
                    ids=[row.key for row in batch],
                    embeddings=np.stack([_checked(row, self._dimensions) for row in batch]),
                    documents=[row.piece for row in batch],
                    metadatas=[metadata_of(row) for row in batch],
                )

    def delete(self, ids: Sequence[str], before: int) -> None:
        """See `Engine.delete`."""
        with self._explained():
            for some in slices(ids, _IDS):
                self._rows.delete(where={"$and": [{"document_id": {"$in": some}}, {"generation": {"$lt": before}}]})

    def undo(self, after: int) -> None:
        """See `Engine.undo`."""
        with self._explained():
            self._rows.delete(where={"generation": {"$gt": after}})

    def search(
        self, queries: Floats, within: Sequence[Sequence[str] | None], n: int, where: Wanted | None, generation: int
    ) -> list[list[tuple[RemoteRow, float]]]:
        """See `Engine.search`; questions that look into the same categories are asked together."""
        groups: dict[tuple[str, ...] | None, list[int]] = {}
        for i, names in enumerate(within):
            groups.setdefault(None if names is None else tuple(sorted(names)), []).append(i)
        found: list[list[tuple[RemoteRow, float]]] = [[] for _ in within]
        with self._explained():
            for group, members in groups.items():
                clause = self._clause(group, where, generation)
                if clause is None or n < 1:
                    continue
                for some in slices(members, _QUESTIONS):
                    for i, rows in zip(some, self._nearest(queries[some], n, clause, generation), strict=True):
                        found[i] = rows
        return found

    def words(
        self, question: str, within: Sequence[str] | None, n: int, where: Wanted | None, generation: int
    ) -> list[RemoteRow]:
        """See `Engine.words`: Chroma has no BM25."""
        raise InputError("Chroma does not rank by words: search by meaning, or use the engine faiss or milvus for this")

    def homes(self, where: Wanted, generation: int, most: int) -> set[str] | None:
        """See `Engine.homes`."""
        with self._explained():
            clause = self._clause(None, where, generation)
            if clause is None:
                return set()
            found = self._rows.get(where=clause or None, limit=most + 1, include=["metadatas"])["metadatas"]
        if len(found) > most:
            return None
        seen = [entry for entry in found if entry is not None and entry["generation"] <= generation]
        return {name for entry in seen for name in (entry["category"], *(entry.get("also_in") or ()))}

    def rows(self, ids: Sequence[str], vectors: bool = False) -> list[RemoteRow]:
        """See `Engine.rows`."""
        out: list[RemoteRow] = []
        with self._explained():
            for some in slices(ids, _ROWS):
                out += rows_in(self._rows.get(where={"document_id": {"$in": some}}, include=included(vectors)))
        return out

    def stamps(self, ids: Sequence[str]) -> list[Stamp]:
        """See `Engine.stamps`."""
        out: set[Stamp] = set()
        with self._explained():
            for some in slices(ids, _IDS):
                for entry in filter(
                    None, self._rows.get(where={"document_id": {"$in": some}}, include=["metadatas"])["metadatas"]
                ):
                    out.add(Stamp(entry["document_id"], json.loads(entry["row"])["hash"], entry["generation"]))
        return sorted(out)

    def scan(self, batch: int = 1000, vectors: bool = True) -> Iterator[list[RemoteRow]]:
        """See `Engine.scan`; keys are read first, so that rows that come or go on the way do not shift the others."""
        with self._explained():
            keys = sorted(self._rows.get(include=[])["ids"])
        for some in slices(keys, batch):
            with self._explained():
                rows = rows_in(self._rows.get(ids=some, include=included(vectors)))
            if rows:
                yield sorted(rows, key=lambda row: row.key)

    def count(self) -> int:
        """See `Engine.count`."""
        with self._explained():
            return int(self._rows.count())

    # -- records ------------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes | None) -> None:
        """See `Engine.put`: a record is there when its first row is, which is written last."""
        with self._explained():
            version = uuid.uuid4().hex
            if data is not None:
                pieces = [data[i : i + _PIECE] for i in range(0, len(data), _PIECE)] or [b""]
                for i in reversed(range(len(pieces))):
                    about = {"kind": "piece" if i else "record", "name": name, "version": version, "pieces": len(pieces)}
                    text = base64.b85encode(pieces[i]).decode("ascii")
                    self._write_record(f"{name}/{version}/{i}" if i else name, {**about, "data": text})
            self._records.delete(where={"$and": [{"name": name}, {"version": {"$ne": version}}]})

    def fetch(self, name: str) -> bytes | None:
        """See `Engine.fetch`."""
        with self._explained():
            for _ in range(10):  # another process may replace it between our two looks
                head = self._records.get(ids=[name], include=["metadatas"])["metadatas"]
                if not head:
                    return None
                ids = [f"{name}/{head[0]['version']}/{i}" for i in range(1, head[0]["pieces"])]
                parts: dict[str | None, str] = {None: head[0]["data"]}
                for some in slices(ids, 8):
                    got = self._records.get(ids=some, include=["metadatas"])
                    parts |= {key: entry["data"] for key, entry in zip(got["ids"], got["metadatas"], strict=True)}
                if len(parts) == 1 + len(ids):
                    return b"".join(base64.b85decode(parts[key]) for key in (None, *ids))
        raise KnowledgeBaseError(f"{self!r}: the record {name} is damaged: some of its pieces are missing")

    def records(self) -> list[str]:
        """See `Engine.records`."""
        with self._explained():
            return sorted(self._records.get(where={"kind": "record"}, include=[])["ids"])

    # -- the collection -----------------------------------------------------------------------------------------------

    def persist(self) -> None:
        """See `Engine.persist`: Chroma's log has a write, and searches see it, when the call returns."""

    def drop(self) -> None:
        """See `Engine.drop`."""
        from chromadb.errors import NotFoundError

        with self._explained():
            for name in (self._collection, f"{self._collection}.records"):
                with contextlib.suppress(NotFoundError):
                    self._client.delete_collection(name)

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            if self._client is not None:
                self._client.close()
                for client in (self._client, getattr(self._client, "_admin_client", None)):
                    session = getattr(getattr(client, "_server", None), "_session", None)
                    if session is not None:
                        session.close()  # Chroma's own client leaves its connections open
            if self._folder is not None:
                FOLDERS.leave(self._folder)

    def __repr__(self) -> str:
        return f"<Chroma at {self._uri}: collection {self._collection}>"

    # -- inside -------------------------------------------------------------------------------------------------------

    def _opened(self, create: bool) -> tuple[Any, Any]:
        from chromadb.errors import NotFoundError

        names = (self._collection, f"{self._collection}.records")
        try:
            there = self._client.get_collection(names[0], embedding_function=None)
        except NotFoundError:
            there = None
        hnsw = {"space": "ip", "ef_search": _EF_SEARCH}
        graph: dict[str, Any] = {"configuration": {"hnsw": hnsw}, "embedding_function": None}
        mine = {"gemma_rag": LAYOUT, "dimensions": self._dimensions}
        if create and there is None:
            there = self._client.create_collection(names[0], metadata=mine, **graph)
        elif create and there.count():
            raise InputError(f"Chroma at {self._uri} has a collection {names[0]} already: choose another name")
        elif there is None:
            raise KnowledgeBaseError(f"Chroma at {self._uri} has no collection {names[0]}")
        about = there.metadata or {}
        if {name: about.get(name) for name in mine} != mine:
            raise KnowledgeBaseError(
                f"the collection {names[0]} of Chroma at {self._uri} is none of ours, of another version, or not of "
                f"{self._dimensions} dimensions"
            )
        if create:
            return there, self._client.get_or_create_collection(names[1], **graph)
        return there, self._client.get_collection(names[1], embedding_function=None)

    def _nearest(self, queries: Floats, n: int, clause: dict[str, Any], generation: int) -> list[list[tuple[RemoteRow, float]]]:
        """The best rows of each question, without those of later generations.

        Those are there while somebody commits, and few: they are left out here, as a filter on the generation would make
        Chroma list every row of the collection first.
        """
        found: list[list[tuple[RemoteRow, float]]] = [[] for _ in queries]
        left, size = list(range(len(queries))), n
        while left:
            answer = self._rows.query(
                query_embeddings=queries[left], n_results=size, where=clause or None, include=[*included(False), "distances"]
            )
            again = []
            for place, i in enumerate(left):
                rows = rows_in({key: answer[key][place] for key in ("documents", "metadatas")})
                distances = dict(zip(answer["ids"][place], answer["distances"][place], strict=True))
                seen = [row for row in rows if row.generation <= generation]
                kept = [(row, max(-1.0, min(1.0, 1.0 - distances[row.key]))) for row in seen]
                found[i] = sorted(kept, key=lambda pair: (-pair[1], pair[0].key))[:n]
                if len(kept) < min(n, len(distances)) and len(distances) >= size:
                    again.append(i)
            left, size = again, size * 4
        return found

    def _clause(self, within: Sequence[str] | None, where: Wanted | None, generation: int) -> dict[str, Any] | None:
        """A filter of Chroma's, ``{}`` for everything; None where nothing can pass."""
        parts = []
        if within is not None:
            if not within:
                return None
            further = sorted(self._guests(generation).intersection(within))
            parts.append(
                _any_of([{"category": {"$in": list(within)}}, *({"also_in": {"$contains": name}} for name in further)])
            )
        for key, values in (where or {}).items():
            facets = dict.fromkeys(facet(key, value) for value in values)
            if not facets:
                return None
            parts.append(_any_of([{"facets": {"$contains": item}} for item in facets]))
        return {"$and": parts} if len(parts) > 1 else parts[0] if parts else {}

    def _guests(self, generation: int) -> frozenset[str]:
        """Categories that some document is also in, up to a generation; only these need the slow half of the filter."""
        if self._guests_at is None or self._guests_at[0] != generation:
            found = self._records.get(where={"kind": "guest"}, include=["metadatas"])["metadatas"]
            self._guests_at = (generation, frozenset(entry["name"] for entry in found))
        return self._guests_at[1]

    def _note_guests(self, categories: set[str]) -> None:
        for name in sorted(categories - self._guests_written):
            self._write_record(f"guest/{hashlib.sha256(name.encode()).hexdigest()}", {"kind": "guest", "name": name})
            self._guests_written.add(name)

    def _write_record(self, key: str, about: Mapping[str, Any]) -> None:
        self._records.upsert(ids=[key], embeddings=np.ones((1, 1), dtype=np.float32), metadatas=[about])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What Chroma and the way to it raise, as an error of ours."""
        if self._closed:
            raise KnowledgeBaseError(f"{self!r} is closed")
        import httpx
        from chromadb.errors import ChromaError

        try:
            yield
        except InputError:
            raise
        except (ChromaError, httpx.HTTPError, OSError, ValueError) as error:
            hint = "" if self._folder is not None else f" Is the server running, and does {TOKEN} hold what it wants?"
            raise KnowledgeBaseError(
                f"Chroma at {self._uri} failed: {without_secrets(str(error)) or type(error).__name__}.{hint}"
            ) from error


def _any_of(clauses: list[dict[str, Any]]) -> dict[str, Any]:
    return clauses[0] if len(clauses) == 1 else {"$or": clauses}


def _checked(row: RemoteRow, dimensions: int) -> Floats:
    if row.vector is None or row.vector.shape != (dimensions,):
        raise InputError(f"document {row.id!r} has a row without a vector of {dimensions} numbers")
    return row.vector
