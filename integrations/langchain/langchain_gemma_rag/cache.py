"""An embedding cache in any of LangChain's byte stores, where a question never gets a document's vector."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.stores import ByteStore

from gemma_rag.embeddings import GemmaEmbeddings
from gemma_rag.errors import InputError

_LAYOUT = "gemma-rag role-safe cache 1"
_CHECKSUM = 4

Role: TypeAlias = Literal["query", "document"]
Vector: TypeAlias = list[float]


class _Wanted(NamedTuple):
    """A text whose vector is asked for."""

    key: str
    text: str
    title: str


class RoleSafeCache(Embeddings):
    """Embeddings that keep what they computed in a byte store of LangChain, apart for questions and for documents.

    A model with task prompts gives the same words two vectors, one as a question and one as a document. A key holds
    which of the two it is, the title, the text, and what made the vector: the fingerprint of a `GemmaEmbeddings` (model,
    prompts, dimensions ...), or a namespace. It is a SHA-256 in hexadecimal, which every store takes. A value is a
    CRC-32 and the vector in float32; one that is damaged is computed again. Vectors come back rounded to float32 the
    first time too, so that a result does not depend on what was in the cache.

    Where the vectors need not lie in a store of LangChain, ``GemmaEmbeddings(cache="folder")`` does the same for every
    task, in one SQLite file, with a limit to its size.

    Example:
        >>> from langchain_core.stores import InMemoryByteStore
        >>> from langchain_gemma_rag import GemmaEmbeddings, RoleSafeCache
        >>> cached = RoleSafeCache(GemmaEmbeddings(model="minilm", show_progress=False), InMemoryByteStore())
        >>> cached.embed_query("reset a password") == cached.embed_query("reset a password")
        True

    Args:
        embeddings: What computes the vectors that are missing.
        store: Where they are kept.
        namespace: Keeps the vectors of different models apart. Needed for embeddings that are not a `GemmaEmbeddings`:
            name the model and all that decides its vectors, as in ``"text-embedding-3-small/512"``.
        batch_size: Documents that are computed, and then stored, at a time, at least 1.

    Raises:
        InputError: No namespace where one is needed, or an argument of the wrong kind.
    """

    def __init__(
        self, embeddings: Embeddings, store: ByteStore, *, namespace: str | None = None, batch_size: int = 512
    ) -> None:
        if not isinstance(embeddings, Embeddings):
            raise InputError(f"a cache needs the embeddings of LangChain that it caches, and got a {type(embeddings).__name__}")
        if not all(hasattr(store, name) for name in ("mget", "mset")):
            raise InputError(f"a cache needs a byte store of LangChain, with mget and mset, and got a {type(store).__name__}")
        if not namespace and not isinstance(embeddings, GemmaEmbeddings):
            raise InputError(
                f"nothing says which model {type(embeddings).__name__} runs, so its vectors could be mixed with those of "
                "another: give a namespace that names the model and its settings"
            )
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size is a number of documents, at least 1, and is {batch_size!r}")
        self.embeddings = embeddings
        self.store = store
        self.namespace = namespace
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return f"<RoleSafeCache of {type(self.embeddings).__name__} in {type(self.store).__name__}>"

    def embed_documents(self, texts: list[str], titles: Sequence[str | None] | None = None) -> list[Vector]:
        """Embed documents, or find their vectors in the store; the same text and title is computed once.

        Args:
            texts: The documents.
            titles: Their titles, one per text, None or "" where there is none; only for embeddings that read titles, as
                `GemmaEmbeddings` does.

        Raises:
            InputError: Titles that do not fit, or embeddings that return the wrong number of vectors.
        """
        wanted = self._documents(texts, titles)
        keys = list(dict.fromkeys(each.key for each in wanted))
        found = self._read(keys, self.store.mget(keys) if keys else [])
        for part in self._missing(wanted, found):
            rows = self.embeddings.embed_documents([each.text for each in part], **_titled(part))
            self.store.mset(_taken(part, rows, found))
        return [found[each.key] for each in wanted]

    async def aembed_documents(self, texts: list[str], titles: Sequence[str | None] | None = None) -> list[Vector]:
        """`embed_documents` without holding up the event loop, by the store's own ``amget`` and ``amset``."""
        wanted = self._documents(texts, titles)
        keys = list(dict.fromkeys(each.key for each in wanted))
        found = self._read(keys, await self.store.amget(keys) if keys else [])
        for part in self._missing(wanted, found):
            rows = await self.embeddings.aembed_documents([each.text for each in part], **_titled(part))
            await self.store.amset(_taken(part, rows, found))
        return [found[each.key] for each in wanted]

    def embed_query(self, text: str) -> Vector:
        """Embed a question, or find its vector in the store; never that of a document with the same words."""
        wanted = _Wanted(self._key("query", text), text, "")
        found = self._read([wanted.key], self.store.mget([wanted.key]))
        if not found:
            self.store.mset(_taken([wanted], [self.embeddings.embed_query(text)], found))
        return found[wanted.key]

    async def aembed_query(self, text: str) -> Vector:
        """`embed_query` without holding up the event loop."""
        wanted = _Wanted(self._key("query", text), text, "")
        found = self._read([wanted.key], await self.store.amget([wanted.key]))
        if not found:
            await self.store.amset(_taken([wanted], [await self.embeddings.aembed_query(text)], found))
        return found[wanted.key]

    def _documents(self, texts: Sequence[str], titles: Sequence[str | None] | None) -> list[_Wanted]:
        if isinstance(texts, str):
            raise InputError("texts is a list of strings, and one string came: put it in a list")
        if titles is not None and len(titles) != len(texts):
            raise InputError(f"{len(titles)} titles came for {len(texts)} texts")
        if any(titles or ()) and not isinstance(self.embeddings, GemmaEmbeddings):
            raise InputError(f"{type(self.embeddings).__name__} does not read titles: put them into the texts")
        return [
            _Wanted(self._key("document", text, title or ""), text, title or "")
            for text, title in zip(texts, titles or [None] * len(texts), strict=True)
        ]

    def _key(self, role: Role, text: str, title: str = "") -> str:
        for each in (text, title):
            if not isinstance(each, str):
                raise InputError(f"a text to embed is a string, and so is a title, and one is a {type(each).__name__}")
        fingerprint = self.embeddings.space.fingerprint if isinstance(self.embeddings, GemmaEmbeddings) else None
        fields = [_LAYOUT, self.namespace, fingerprint, role, title, text]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def _read(self, keys: Sequence[str], values: Sequence[bytes | None]) -> dict[str, Vector]:
        """The vectors that the store has, whole."""
        dimensions = self.embeddings.space.dimensions if isinstance(self.embeddings, GemmaEmbeddings) else None
        rows = {key: _vector(value, dimensions) for key, value in zip(keys, values, strict=True)}
        return {key: row for key, row in rows.items() if row is not None}

    def _missing(self, wanted: Sequence[_Wanted], found: dict[str, Vector]) -> Iterator[list[_Wanted]]:
        """What is not there yet, each once, in batches."""
        rest = list({each.key: each for each in wanted if each.key not in found}.values())
        for first in range(0, len(rest), self.batch_size):
            yield rest[first : first + self.batch_size]


def _titled(part: Sequence[_Wanted]) -> dict[str, Any]:
    """Titles to hand on; nothing where there are none, since most embeddings take no titles."""
    return {"titles": [each.title for each in part]} if any(each.title for each in part) else {}


def _taken(part: Sequence[_Wanted], rows: Sequence[Vector], found: dict[str, Vector]) -> list[tuple[str, bytes]]:
    """Take what was computed: into what was found, and as entries for the store."""
    if len(rows) != len(part):
        raise InputError(f"the embeddings returned {len(rows)} vectors for {len(part)} texts")
    entries = []
    for each, row in zip(part, rows, strict=True):
        values = np.asarray(row, dtype="<f4")
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise InputError(f"the embeddings returned no vector of finite numbers for a text of {len(each.text)} characters")
        found[each.key] = values.tolist()
        entries.append((each.key, _checksum(values.tobytes()) + values.tobytes()))
    return entries


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little")


def _vector(value: Any, dimensions: int | None) -> Vector | None:
    """A value of the store as a vector; None where there is none, or it is damaged."""
    if not isinstance(value, bytes) or len(value) <= _CHECKSUM or len(value) % 4:
        return None
    data = value[_CHECKSUM:]
    if _checksum(data) != value[:_CHECKSUM] or dimensions not in (None, len(data) // 4):
        return None
    values = np.frombuffer(data, dtype="<f4")
    row: Vector = values.tolist()
    return row if np.isfinite(values).all() else None


def gemma_embeddings(embeddings: object) -> GemmaEmbeddings | None:
    """The `GemmaEmbeddings` that some embeddings are, or keep in a `RoleSafeCache`; None for others."""
    own = embeddings.embeddings if isinstance(embeddings, RoleSafeCache) else embeddings
    return own if isinstance(own, GemmaEmbeddings) else None
