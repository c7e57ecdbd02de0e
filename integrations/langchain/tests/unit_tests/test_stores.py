"""The table of known stores: recognising one, its filter, its metric. The stores' own libraries are in integration_tests."""

import types

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gemma_rag import TwoStageRetriever
from langchain_gemma_rag.source import StoreSource
from langchain_gemma_rag.stores import _FAISS_METRICS, find_kind, matches

from gemma_rag.errors import InputError

METADATA = {
    0: {"year": 2023, "tags": ["a", "b"]},
    20: {"year": 2024, "tags": ["b"]},
    90: {"year": 2024},
    180: {"year": 2025, "done": True},
    200: {"year": 1, "done": False},
}


def embeddings() -> Embeddings:
    return DeterministicFakeEmbedding(size=8)


# -- filters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("within", "passes"),
    [
        ({}, [0, 20, 90, 180, 200]),
        ({"year": [2024]}, [20, 90]),
        ({"year": [2024.0, "2025"]}, [20, 90]),
        ({"year": [True]}, []),
        ({"year": [1]}, [200]),
        ({"done": [True]}, [180]),
        ({"done": [1]}, []),
        ({"tags": ["b"]}, [0, 20]),
        ({"tags": ["a"], "year": [2024]}, []),
        ({"nowhere": [None]}, []),
        ({"year": []}, []),
    ],
)
def test_metadata_is_compared_as_a_knowledge_base_compares_it(within, passes):
    assert [name for name, metadata in METADATA.items() if matches(metadata, within)] == passes


# -- recognising stores -------------------------------------------------------------------------------------------------


def test_a_subclass_of_a_known_store_is_known():
    class Mine(InMemoryVectorStore):
        pass

    assert find_kind(Mine(embeddings())).class_name == "InMemoryVectorStore"


def test_a_store_of_the_same_name_from_elsewhere_is_not_known():
    impostor = type("Chroma", (), {"__module__": "elsewhere.chroma"})
    assert find_kind(impostor()) is None


# -- metrics that have no cosine ----------------------------------------------------------------------------------------


def stand_in(package: str, name: str, **attributes):
    """An object that is recognised as a store, with the attributes that tell its metric."""
    kind = type(name, (), {"__module__": f"{package}.vectorstores"})
    store = kind()
    store.__dict__.update({"embeddings": embeddings(), **attributes})
    return store


@pytest.mark.parametrize(
    ("store", "says"),
    [
        (stand_in("langchain_community", "FAISS", index=types.SimpleNamespace(metric_type=2)), "metric 2"),
        (stand_in("langchain_community", "FAISS", index=types.SimpleNamespace()), "metric None"),
        (
            stand_in("langchain_chroma", "Chroma", _collection=types.SimpleNamespace(metadata={"hnsw:space": "x"})),
            "compares by x",
        ),
        (stand_in("langchain_qdrant", "QdrantVectorStore", retrieval_mode="dense", distance="Manhattan"), "by Manhattan"),
        (stand_in("langchain_qdrant", "QdrantVectorStore", retrieval_mode="sparse", distance="Cosine"), "sparse"),
        (stand_in("langchain_milvus", "Milvus", vector_fields=["dense", "sparse"], col=None), "dense, sparse"),
    ],
    ids=["FAISS", "FAISS binary", "Chroma", "Qdrant", "Qdrant sparse", "Milvus"],
)
def test_a_store_without_cosines_is_refused_at_once(store, says):
    with pytest.raises(InputError, match=says):
        TwoStageRetriever.from_vectorstore(store)


def test_several_embeddings_are_refused():
    store = stand_in("langchain_milvus", "Milvus", vector_fields=["dense"], col=None, embeddings=[embeddings(), embeddings()])
    with pytest.raises(InputError, match="several embeddings"):
        TwoStageRetriever.from_vectorstore(store)


def test_chroma_before_its_first_release_keeps_the_space_in_the_metadata():
    collection = types.SimpleNamespace(metadata={"hnsw:space": "ip"})
    assert StoreSource(stand_in("langchain_chroma", "Chroma", _collection=collection)).metric() == "inner-product-distance"


def test_chroma_that_says_nothing_has_squared_distances():
    collection = types.SimpleNamespace(metadata=None)
    assert StoreSource(stand_in("langchain_chroma", "Chroma", _collection=collection)).metric() == "l2-squared"


def test_the_numbers_of_faiss_are_its_own():
    faiss = pytest.importorskip("faiss")
    assert {faiss.METRIC_INNER_PRODUCT: "inner-product", faiss.METRIC_L2: "l2-squared"} == _FAISS_METRICS
