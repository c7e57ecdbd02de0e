"""Other stores on the vectors and questions of `search.py`, each in a process of its own; prints JSON.

Every store gets the same vectors, the categories that our gate opens for each question, at no cost, and returns the ids of
the best ten. Where a store has a filter, it searches in those categories; it also searches everything, where that is the
usual way. Questions are asked one after the other until 20 seconds have passed.

usage: python benchmarks/search_peers.py NAME FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Ask = Callable[[Floats, "list[str] | None"], Sequence[str]]

K = 10
SECONDS = 20.0
"""For the questions of one way to search."""

_BATCH = 5_000


class Work(NamedTuple):
    """What is to be searched; see `search.py`, which writes it.

    Attributes:
        vectors: float32 of shape ``(n, d)``.
        codes: The category of each, a number.
        questions: float32 of shape ``(q, d)``.
        opened: bool of shape ``(q, categories)``: where each question is searched.
        inside: int64 of shape ``(q, 10)``: the best rows in there.
        best: The best rows of all.
    """

    vectors: Floats
    codes: Ints
    questions: Floats
    opened: npt.NDArray[np.bool_]
    inside: Ints
    best: Ints

    @classmethod
    def load(cls, folder: Path) -> Work:
        names = ("vectors", "categories", "questions", "opened", "inside", "best")
        work = cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))
        return work._replace(questions=work.questions[: len(work.opened)])  # of the others nobody needs the answer

    def batches(self) -> Iterator[tuple[list[str], Floats, list[str], list[str]]]:
        """Ids, vectors, categories and texts, some thousands at a time."""
        for first in range(0, len(self.vectors), _BATCH):
            rows = range(first, min(first + _BATCH, len(self.vectors)))
            categories = [category(code) for code in self.codes[rows.start : rows.stop].tolist()]
            yield [str(row) for row in rows], self.vectors[rows.start : rows.stop], categories, [text(row) for row in rows]


class Peer(NamedTuple):
    """A filled store: how to ask it everything and how to ask it in some categories, where it can; and what that means."""

    everything: Ask | None
    within: Ask | None
    note: str
    packages: tuple[str, ...]


def category(code: int) -> str:
    """The name of a category."""
    return f"category {code:04d}"


def text(row: int) -> str:
    """The text of a document."""
    return f"What document number {row} says, in a sentence or two, so that there is a text."


# -- the stores -----------------------------------------------------------------------------------------------------------


def langchain_memory(work: Work, scratch: Path) -> Peer:
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    class Given(DeterministicFakeEmbedding):
        """Hands out the vectors that are there already."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return given.pop(0)

    given: list[list[list[float]]] = []
    store = InMemoryVectorStore(Given(size=work.vectors.shape[1]))
    for ids, vectors, categories, texts in work.batches():
        given.append(vectors.tolist())
        pages = [Document(page, metadata={"category": name}) for page, name in zip(texts, categories, strict=True)]
        store.add_documents(pages, ids)

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        names = None if within is None else set(within)
        chosen = None if names is None else lambda document: document.metadata["category"] in names
        found = store.similarity_search_with_score_by_vector(question.tolist(), K, filter=chosen)
        return [str(document.id) for document, _ in found]

    return Peer(ask, ask, "filter: a function, called for every document", ("langchain-core",))


def langchain_faiss(work: Work, scratch: Path) -> Peer:
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_community.vectorstores.utils import DistanceStrategy
    from langchain_core.embeddings import DeterministicFakeEmbedding

    d = work.vectors.shape[1]
    store = FAISS(
        DeterministicFakeEmbedding(size=d),
        faiss.IndexFlatIP(d),
        InMemoryDocstore(),
        {},
        distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT,
    )
    for ids, vectors, categories, texts in work.batches():
        pairs = zip(texts, vectors.tolist(), strict=True)
        store.add_embeddings(pairs, [{"category": name} for name in categories], ids)

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        chosen = {"filter": {"category": {"$in": within}}, "fetch_k": 1000} if within is not None else {}
        found = store.similarity_search_with_score_by_vector(question.tolist(), K, **chosen)
        return [str(document.id) for document, _ in found]

    note = "flat index; its filter comes after the search of everything, on the best 1,000"
    return Peer(ask, ask, note, ("langchain-community", "faiss-cpu"))


def llama_index(work: Work, scratch: Path) -> Peer:
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery
    from llama_index.core.vector_stores.simple import SimpleVectorStore

    store = SimpleVectorStore()
    for ids, vectors, categories, texts in work.batches():
        rows = zip(ids, vectors.tolist(), categories, texts, strict=True)
        store.add([TextNode(id_=id_, embedding=v, metadata={"category": name}, text=page) for id_, v, name, page in rows])

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        one = None
        if within is not None:
            one = MetadataFilters(filters=[MetadataFilter(key="category", value=within, operator=FilterOperator.IN)])
        found = store.query(VectorStoreQuery(question.tolist(), similarity_top_k=K, filters=one))
        return list(found.ids or [])

    return Peer(ask, ask, "filter: called for every document", ("llama-index-core",))


def chroma(work: Work, scratch: Path) -> Peer:
    import chromadb

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    store = client.create_collection("bench", configuration={"hnsw": {"space": "cosine"}})
    for ids, vectors, categories, texts in work.batches():
        store.add(ids, np.array(vectors), [{"category": name} for name in categories], texts)

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        where: Any = None if within is None else {"category": {"$in": within}}
        return store.query([question], n_results=K, where=where, include=["distances"])["ids"][0]

    return Peer(ask, ask, "embedded; HNSW with its defaults: approximate", ("chromadb",))


def milvus_lite(work: Work, scratch: Path) -> Peer:
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(scratch / "peer.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=work.vectors.shape[1])
    schema.add_field("category", DataType.VARCHAR, max_length=64)
    schema.add_field("text", DataType.VARCHAR, max_length=512)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("bench", schema=schema, index_params=index)
    for ids, vectors, categories, texts in work.batches():
        rows = zip(ids, vectors, categories, texts, strict=True)
        fields = [{"id": int(id_), "vector": v, "category": name, "text": page} for id_, v, name, page in rows]
        for first in range(0, len(fields), 1000):
            client.insert("bench", fields[first : first + 1000])
    client.flush("bench")
    client.load_collection("bench")

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        filters = "" if within is None else f"category in {json.dumps(within)}"
        found = client.search("bench", [question.tolist()], limit=K, filter=filters, search_params={"metric_type": "COSINE"})
        return [str(hit["id"]) for hit in found[0]]

    return Peer(ask, ask, "a file of Milvus Lite, FLAT index", ("pymilvus", "milvus-lite"))


def faiss_flat(work: Work, scratch: Path) -> Peer:
    import faiss

    index = faiss.IndexFlatIP(work.vectors.shape[1])
    for _, vectors, _, _ in work.batches():
        index.add(np.ascontiguousarray(vectors))

    def ask(question: Floats, within: list[str] | None) -> list[str]:
        return [str(row) for row in index.search(question[None], K)[1][0].tolist()]

    return Peer(ask, None, "IndexFlatIP over everything, no documents beside it", ("faiss-cpu",))


PEERS: dict[str, Callable[[Work, Path], Peer]] = {
    "FAISS IndexFlatIP": faiss_flat,
    "LangChain InMemoryVectorStore": langchain_memory,
    "LangChain FAISS": langchain_faiss,
    "LlamaIndex SimpleVectorStore": llama_index,
    "Chroma": chroma,
    "Milvus Lite": milvus_lite,
}


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Fill a store and ask it.

    Args:
        name: One of `PEERS`.
        folder: Where the work is.
    """
    work = Work.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        peer = PEERS[name](work, Path(scratch))
        built = time.perf_counter() - started
        out: dict[str, Any] = {"note": peer.note, "build_s": round(built, 2), "memory": memory()}
        for way, ask, truth in (("everything", peer.everything, work.best), ("within", peer.within, work.inside)):
            if ask is not None:
                out[way] = asked(work, ask, truth, filtered=way == "within")
        out["versions"] = {package: version(package) for package in peer.packages}
        return out


def asked(work: Work, ask: Ask, truth: Ints, *, filtered: bool) -> dict[str, float | int]:
    """Ask one question after the other; milliseconds, and how many of the right best ten came."""
    seconds: list[float] = []
    overlap: list[float] = []
    opened = [[category(code) for code in np.flatnonzero(row).tolist()] for row in work.opened] if filtered else None
    ask(np.array(work.questions[-1]), opened[-1] if opened else None)
    while len(seconds) < len(work.questions) - 1 and (sum(seconds) < SECONDS or len(seconds) < 3):
        i = len(seconds)
        question = np.array(work.questions[i])
        started = time.perf_counter()
        found = ask(question, opened[i] if opened else None)
        seconds.append(time.perf_counter() - started)
        right = {str(row) for row in truth[i].tolist() if row >= 0}
        overlap.append(len(right.intersection(found)) / max(1, len(right)))
    return {
        "questions": len(seconds),
        "p50_ms": round(float(np.percentile(seconds, 50)) * 1e3, 3),
        "p99_ms": round(float(np.percentile(seconds, 99)) * 1e3, 3),
        "overlap@10": round(float(np.mean(overlap)), 4),
    }


def memory() -> dict[str, int]:
    """Bytes of memory that this process holds: its own, and of files that it has mapped (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")  # of packages that are others'
    logging.disable(logging.WARNING)
    print(json.dumps(measure(name, folder)))


if __name__ == "__main__":
    main()
