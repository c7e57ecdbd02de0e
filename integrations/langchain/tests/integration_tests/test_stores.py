"""The stores themselves: each score turned back into the true cosine, filters, ids, and the two stages over them."""

import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_gemma_rag import GemmaEmbeddings, TwoStageRetriever
from langchain_gemma_rag.source import StoreSource

from gemma_rag.errors import InputError

QUOTED = 'tools "new" \\ old'
SUBJECTS = {
    "people": ["leave", "salary", "illness", "parents", "training"],
    QUOTED: ["hammer", "drill", "saw", "printer", "laptop"],
    "差旅": ["train", "hotel", "flight", "taxi", "visa"],
}
ENTRIES = [
    Document(
        f"What to do about {subject}, part {part}.",
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{subject} {part}")),
        metadata={"category": category, "title": subject.title(), "part": part, "weight": part / 4, "new": part == 1},
    )
    for category, subjects in SUBJECTS.items()
    for subject in subjects
    for part in (1, 2)
]
QUESTION = "How do I get a new laptop?"


def in_memory(embeddings: Embeddings, folder: Path) -> VectorStore:
    return InMemoryVectorStore(embeddings)


def faiss(strategy: str, **options) -> Callable[[Embeddings, Path], VectorStore]:
    def make(embeddings: Embeddings, folder: Path) -> VectorStore:
        library = pytest.importorskip("faiss")
        pytest.importorskip("langchain_community")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from langchain_community.docstore.in_memory import InMemoryDocstore
            from langchain_community.vectorstores import FAISS
            from langchain_community.vectorstores.utils import DistanceStrategy

        dimensions = len(embeddings.embed_query("dimensions"))
        kind = library.IndexFlatIP if strategy == "MAX_INNER_PRODUCT" else library.IndexFlatL2
        return FAISS(
            embeddings, kind(dimensions), InMemoryDocstore(), {}, distance_strategy=DistanceStrategy[strategy], **options
        )

    return make


def chroma(space: str | None) -> Callable[[Embeddings, Path], VectorStore]:
    def make(embeddings: Embeddings, folder: Path) -> VectorStore:
        chromadb = pytest.importorskip("chromadb")
        library = pytest.importorskip("langchain_chroma")
        return library.Chroma(
            f"c{uuid.uuid4().hex}",
            embeddings,
            client=chromadb.PersistentClient(folder / "chroma"),
            collection_configuration=None if space is None else {"hnsw": {"space": space}},
        )

    return make


def milvus(metric: str | None, **options) -> Callable[[Embeddings, Path], VectorStore]:
    def make(embeddings: Embeddings, folder: Path) -> VectorStore:
        pytest.importorskip("milvus_lite")
        library = pytest.importorskip("langchain_milvus")
        index = None if metric is None else {"metric_type": metric, "index_type": "FLAT", "params": {}}
        return library.Milvus(embeddings, connection_args={"uri": str(folder / "milvus.db")}, index_params=index, **options)

    return make


def qdrant(distance: str, name: str = "") -> Callable[[Embeddings, Path], VectorStore]:
    def make(embeddings: Embeddings, folder: Path) -> VectorStore:
        client = pytest.importorskip("qdrant_client")
        library = pytest.importorskip("langchain_qdrant")
        return library.QdrantVectorStore.construct_instance(
            embeddings,
            client_options={"location": ":memory:"},
            collection_name="c",
            distance=client.models.Distance[distance],
            vector_name=name,
        )

    return make


STORES: dict[str, Callable[[Embeddings, Path], VectorStore]] = {
    "in memory": in_memory,
    "FAISS L2": faiss("EUCLIDEAN_DISTANCE"),
    "FAISS L2, normalising": faiss("EUCLIDEAN_DISTANCE", normalize_L2=True),
    "FAISS that says cosine": faiss("COSINE"),
    "FAISS inner product": faiss("MAX_INNER_PRODUCT"),
    "Chroma": chroma(None),
    "Chroma cosine": chroma("cosine"),
    "Chroma inner product": chroma("ip"),
    "Chroma L2": chroma("l2"),
    "Milvus": milvus(None),
    "Milvus cosine": milvus("COSINE"),
    "Milvus inner product": milvus("IP"),
    "Milvus L2": milvus("L2"),
    "Milvus with dynamic fields": milvus("COSINE", enable_dynamic_field=True),
    "Qdrant cosine": qdrant("COSINE"),
    "Qdrant dot": qdrant("DOT"),
    "Qdrant Euclid": qdrant("EUCLID"),
    "Qdrant with a named vector": qdrant("COSINE", "words"),
}


@pytest.fixture(params=STORES, scope="module")
def store(request, minilm, tmp_path_factory) -> VectorStore:
    made = STORES[request.param](minilm, tmp_path_factory.mktemp("store"))
    made.add_documents(ENTRIES, ids=[entry.id for entry in ENTRIES])
    return made


@pytest.fixture(scope="module")
def cosines(minilm) -> dict[str, float]:
    """The true cosine of the question and each entry, by id."""
    rows = np.array(minilm.embed_documents([entry.page_content for entry in ENTRIES]))
    return dict(zip([entry.id for entry in ENTRIES], (rows @ np.array(minilm.embed_query(QUESTION))).tolist(), strict=True))


def everything(store: VectorStore, **options) -> list[Document]:
    retriever = TwoStageRetriever.from_vectorstore(store, k=len(ENTRIES), document_threshold=-1.0, mode="flat")
    return retriever.invoke(QUESTION, **options)


# -- every store --------------------------------------------------------------------------------------------------------


def test_every_score_is_the_true_cosine(store, cosines):
    found = everything(store)
    assert {each.id: each.metadata["score"] for each in found} == pytest.approx(cosines, abs=1e-5)
    assert [each.id for each in found][:3] == sorted(cosines, key=cosines.get, reverse=True)[:3]


def test_vectors_of_other_dimensions_are_refused_with_both_numbers(store):
    class Eight(Embeddings):
        def embed_query(self, text):
            return [8**-0.5] * 8

        def embed_documents(self, texts):
            raise NotImplementedError

    retriever = TwoStageRetriever.from_vectorstore(store, embeddings=Eight(), mode="flat", document_threshold=-1.0)
    with pytest.raises(InputError, match=r"Eight .* of 8 dimensions, and those in \w+ have 384: .*embeddings="):
        retriever.invoke(QUESTION)


def test_documents_come_back_whole(store):
    by_id = {entry.id: entry for entry in ENTRIES}
    for found in everything(store):
        entry = by_id[found.id]
        assert found.page_content == entry.page_content
        assert entry.metadata.items() <= found.metadata.items()


@pytest.mark.parametrize(
    "where",
    [
        {"part": 2},
        {"part": [1, 2]},
        {"title": ["Laptop", "Train"]},
        {"new": True},
        {"new": False},
        {"weight": [0.25, 7.5]},
        {"weight": 0.5, "title": "Drill"},
        {"category": QUOTED},
    ],
    ids=str,
)
def test_a_filter_lets_through_what_it_should(store, where):
    expected = {
        entry.id
        for entry in ENTRIES
        if all(entry.metadata[key] in (value if isinstance(value, list) else [value]) for key, value in where.items())
    }
    assert {each.id for each in everything(store, where=where)} == expected


@pytest.mark.parametrize("categories", [["people"], [QUOTED], ["差旅", "people"]])
def test_categories_are_a_filter(store, categories):
    found = everything(store, categories=categories)
    assert {each.id for each in found} == {entry.id for entry in ENTRIES if entry.metadata["category"] in categories}


def test_a_filter_that_nothing_passes_is_the_reason(store):
    assert everything(store, where={"title": "Nothing"}).retrieval.outcome.value == "filtered_out"


def test_two_stages_find_the_best_of_the_best_category(store, cosines):
    retriever = TwoStageRetriever.from_vectorstore(store, k=3, document_threshold=-1.0, max_categories=1, probe=4)
    found = retriever.invoke(QUESTION)
    inside = [entry.id for entry in ENTRIES if entry.metadata["category"] == QUOTED]
    assert [each.id for each in found] == sorted(inside, key=cosines.get, reverse=True)[:3]
    assert found.retrieval.categories[0].name == QUOTED
    assert found[0].metadata["category_score"] == pytest.approx(max(cosines.values()), abs=1e-5)


def test_a_threshold_refuses(store):
    retriever = TwoStageRetriever.from_vectorstore(store, category_threshold=0.95)
    assert retriever.invoke(QUESTION).retrieval.outcome.value == "category_below_threshold"


async def test_async_finds_the_same(store):
    retriever = TwoStageRetriever.from_vectorstore(store, k=3)
    sync, asynchronous = retriever.invoke(QUESTION), await retriever.ainvoke(QUESTION)
    assert [each.id for each in asynchronous] == [each.id for each in sync]


@pytest.mark.parametrize("name", ["in memory", "FAISS L2", "Chroma cosine", "Milvus", "Qdrant cosine"])
def test_an_empty_store_is_the_reason(name, minilm, tmp_path):
    found = TwoStageRetriever.from_vectorstore(STORES[name](minilm, tmp_path)).invoke(QUESTION)
    assert found.retrieval.outcome.value == "empty_knowledge_base"


def test_a_filter_on_what_no_entry_has_lets_nothing_through(minilm, tmp_path):
    for name in ("in memory", "FAISS L2", "Chroma cosine", "Milvus with dynamic fields", "Qdrant cosine"):
        made = STORES[name](minilm, tmp_path)
        made.add_documents(ENTRIES[:3], ids=[entry.id for entry in ENTRIES[:3]])
        assert everything(made, where={"nowhere": "x"}) == []


# -- one store each -----------------------------------------------------------------------------------------------------


def test_faiss_looks_behind_what_it_fetches_first(tiny_gemma, tmp_path):
    """FAISS filters what it has fetched, 20 entries unless told otherwise."""
    gemma = GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)
    made = STORES["FAISS inner product"](gemma, tmp_path)
    rows = np.zeros((500, 48), dtype=np.float32)
    question = np.array(gemma.embed_query(QUESTION))
    rows[:] = question  # all but the last are the question itself
    rows[-1] = -question
    metadata = [{"category": "near"}] * 499 + [{"category": "far"}]
    made.add_embeddings([(f"text {i}", row.tolist()) for i, row in enumerate(rows)], metadatas=metadata)
    found = TwoStageRetriever.from_vectorstore(made, document_threshold=-1.0, mode="flat").invoke(QUESTION, categories=["far"])
    assert [each.metadata["score"] for each in found] == pytest.approx([-1.0], abs=1e-5)


def test_faiss_that_normalises_itself_works_with_vectors_of_any_norm(tmp_path, minilm):
    class Longer(Embeddings):
        def embed_query(self, text):
            return (3 * np.array(minilm.embed_query(text))).tolist()

        def embed_documents(self, texts):
            return (3 * np.array(minilm.embed_documents(texts))).tolist()

    made = STORES["FAISS L2, normalising"](Longer(), tmp_path)
    made.add_documents(ENTRIES[:4], ids=[entry.id for entry in ENTRIES[:4]])
    found = TwoStageRetriever.from_vectorstore(made, document_threshold=-1.0, mode="flat").invoke(ENTRIES[0].page_content)
    assert found[0].metadata["score"] == pytest.approx(1.0, abs=1e-5)


def test_faiss_without_normalising_refuses_vectors_of_another_norm(tmp_path, minilm):
    class Longer(Embeddings):
        def embed_query(self, text):
            return (3 * np.array(minilm.embed_query(text))).tolist()

        def embed_documents(self, texts):
            return (3 * np.array(minilm.embed_documents(texts))).tolist()

    made = STORES["FAISS L2"](Longer(), tmp_path)
    made.add_documents(ENTRIES[:4])
    with pytest.raises(InputError, match="have not norm 1"):
        TwoStageRetriever.from_vectorstore(made).invoke(QUESTION)


def test_chroma_mixes_types_in_a_filter(minilm, tmp_path):
    made = STORES["Chroma cosine"](minilm, tmp_path)
    made.add_documents([Document("one", metadata={"category": "c", "n": value}) for value in ("1", 1, 1.0, True, 2)])
    assert len(everything(made, where={"n": ["1", 1]})) == 3
    assert len(everything(made, where={"n": [True, 2.0]})) == 2


def test_chroma_says_that_it_cannot_look_for_none(minilm, tmp_path):
    with pytest.raises(InputError, match=r"Chroma cannot search .* 'n' is None"):
        everything(STORES["Chroma cosine"](minilm, tmp_path), where={"n": None})


def test_milvus_knows_its_metric_once_it_has_entries(minilm, tmp_path):
    made = STORES["Milvus cosine"](minilm, tmp_path)
    source = StoreSource(made)
    assert source.metric() is None
    made.add_documents(ENTRIES[:2], ids=[entry.id for entry in ENTRIES[:2]])
    assert source.metric() == "cosine"


def test_milvus_numbers_its_entries_where_nobody_names_them(minilm, tmp_path):
    made = milvus("COSINE", auto_id=True)(minilm, tmp_path)
    made.add_documents(ENTRIES[:3])
    assert sorted(each.id for each in everything(made)) == sorted(str(pk) for pk in made.get_pks("pk > 0"))


def test_milvus_with_all_metadata_in_one_field_is_filtered_and_has_ids(minilm, tmp_path, cosines):
    made = milvus("COSINE", metadata_field="about", auto_id=True)(minilm, tmp_path)
    made.add_documents(ENTRIES[:4])
    found = everything(made, where={"part": 1})
    assert [each.metadata["part"] for each in found] == [1, 1]
    assert len({each.id for each in found}) == 2


def test_milvus_names_its_fields_where_a_filter_asks_for_another(minilm, tmp_path):
    made = STORES["Milvus cosine"](minilm, tmp_path)
    made.add_documents(ENTRIES[:3], ids=[entry.id for entry in ENTRIES[:3]])
    with pytest.raises(InputError, match=r"no field 'year' to search by: it has .*category"):
        everything(made, where={"year": 2024})


def test_qdrant_looks_into_lists_and_for_what_is_not_there(minilm, tmp_path):
    made = STORES["Qdrant cosine"](minilm, tmp_path)
    made.add_documents(
        [Document(f"text {i}", metadata={"category": "c", "a.b": value}) for i, value in enumerate((["x", "y"], "x", None, 3))]
    )
    assert len(everything(made, where={"a.b": "x"})) == 2
    assert len(everything(made, where={"a.b": [None, 3]})) == 2
