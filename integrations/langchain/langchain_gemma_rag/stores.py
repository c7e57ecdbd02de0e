"""The table of LangChain's vector stores that are known: how each is searched and filtered, and what it calls a score.

A store is recognised by the name of its class and of the package that defines it, so that none of their libraries is
imported here. What a score is, is read from the store's own configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from langchain_core.documents import Document

from gemma_rag.errors import InputError
from gemma_rag.external import Within
from gemma_rag.search import Scalar
from gemma_rag.store_scores import Metric, chroma_space, named

Found: TypeAlias = list[tuple[Document, float]]

_FETCH_AT_FIRST = 200
"""Entries that FAISS fetches for a filter to look at, before it is asked for more of them."""


def _nowhere(store: Any) -> None:
    return None


def _never(store: Any) -> bool:
    return False


def _size(vector: Any) -> int | None:
    return None if vector is None else len(vector)


class Kind(NamedTuple):
    """A store that is known.

    Attributes:
        package: The package that defines its class.
        class_name: The class.
        metric: What it calls a score; None as long as it has no entries and no index. Raises `InputError` for one that has no
            cosine.
        search: Its entries that come closest to a vector, within a filter, with its own scores.
        dimensions: How many its vectors have; None as long as it has none.
        id_key: Where it puts the id of an entry, for a store that returns documents without ids.
        normalises: Whether it gives every vector norm 1 itself, though its metric is none of cosines.
    """

    package: str
    class_name: str
    metric: Callable[[Any], Metric | None]
    search: Callable[[Any, list[float], int, Within], Found]
    dimensions: Callable[[Any], int | None]
    id_key: Callable[[Any], str | None] = _nowhere
    normalises: Callable[[Any], bool] = _never


def matches(metadata: Mapping[str, Any], within: Within) -> bool:
    """Whether metadata has one of the values for each key, or, where it is a list, has one of them; true is not 1."""
    return all(key in metadata and _among(metadata[key], values) for key, values in within.items())


def _among(have: Any, values: Sequence[Scalar]) -> bool:
    if isinstance(have, (list, tuple)):
        return any(_among(item, values) for item in have)
    return any(have == value and isinstance(have, bool) == isinstance(value, bool) for value in values)


# -- LangChain's InMemoryVectorStore: cosines, a filter that is a function --------------------------------------------------


def _metric_in_memory(store: Any) -> Metric:
    return "cosine"


def _search_in_memory(store: Any, vector: list[float], k: int, within: Within) -> Found:
    keep = (lambda document: matches(document.metadata, within)) if within else None
    found: Found = store.similarity_search_with_score_by_vector(vector, k, filter=keep)
    return found


def _dimensions_in_memory(store: Any) -> int | None:
    return _size(next((entry["vector"] for entry in store.store.values()), None))


# -- FAISS: the index knows its metric; a filter sees only what was fetched before it ----------------------------------------

_FAISS_METRICS: Mapping[int, Metric] = {0: "inner-product", 1: "l2-squared"}


def _metric_of_faiss(store: Any) -> Metric:
    # the store's own distance_strategy is not asked: one that says COSINE has an index of Euclidean distances
    number = getattr(store.index, "metric_type", None)
    metric = None if number is None else _FAISS_METRICS.get(number)
    if metric is None:
        raise InputError(f"the FAISS index compares by its metric {number}, and only inner product (0) and L2 (1) have cosines")
    return metric


def _faiss_normalises(store: Any) -> bool:
    return bool(getattr(store, "_normalize_L2", False))


def _search_faiss(store: Any, vector: list[float], k: int, within: Within) -> Found:
    total = store.index.ntotal
    if not total:
        return []
    keep = (lambda metadata: matches(metadata, within)) if within else None
    fetch = min(total, max(_FETCH_AT_FIRST, 10 * k)) if within else total
    while True:
        found: Found = store.similarity_search_with_score_by_vector(vector, min(k, total), filter=keep, fetch_k=fetch)
        if len(found) >= k or fetch == total:
            return found
        fetch = min(total, 8 * fetch)


def _dimensions_of_faiss(store: Any) -> int | None:
    return int(store.index.d)


# -- Chroma: the space is in the collection's configuration, in its metadata before Chroma 1.0 -------------------------------


def _metric_of_chroma(store: Any) -> Metric:
    return named("Chroma", chroma_space(store._collection))


def _search_chroma(store: Any, vector: list[float], k: int, within: Within) -> Found:
    conditions = [_chroma_condition(key, values) for key, values in within.items()]
    where = conditions[0] if len(conditions) == 1 else {"$and": conditions} if conditions else None
    found: Found = store.similarity_search_by_vector_with_relevance_scores(vector, k, filter=where)
    return found


def _chroma_condition(key: str, values: Sequence[Scalar]) -> dict[str, Any]:
    if any(value is None for value in values):
        raise InputError(f"Chroma cannot search for entries whose {key!r} is None: leave it out of where")
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    by_type: list[dict[str, Any]] = [  # one list may hold values of one type only; 1 and 1.0 are the same to us
        {key: {"$in": same}}
        for same in (
            [value for value in values if isinstance(value, str)],
            [value for value in values if isinstance(value, bool)],
            [int(number) for number in numbers if number == int(number)],
            [float(number) for number in numbers if number == float(number)],  # an integer beyond 2^53 is none exactly
        )
        if same
    ]
    return by_type[0] if len(by_type) == 1 else {"$or": by_type}


def _dimensions_of_chroma(store: Any) -> int | None:
    rows = store._collection.peek(1)["embeddings"]
    return _size(None if rows is None or not len(rows) else rows[0])


# -- Milvus: the index knows its metric; documents come without ids ----------------------------------------------------------


def _metric_of_milvus(store: Any) -> Metric | None:
    field = _milvus_vector_field(store)
    collection = store.col
    if collection is None:  # made with the first document
        return None
    index = next((each for each in collection.indexes if each.field_name == field), None)
    if index is None:
        return None
    return named("Milvus", str(index.to_dict()["index_param"].get("metric_type")))


def _milvus_vector_field(store: Any) -> str:
    names: list[str] = list(store.vector_fields)
    if len(names) != 1:
        raise InputError(
            f"the Milvus store has the vectors {', '.join(names)}, and the two stages compare by one: open it with one"
        )
    return names[0]


def _search_milvus(store: Any, vector: list[float], k: int, within: Within) -> Found:
    if store.col is None:
        return []
    clauses = []
    for key, values in within.items():
        field = _milvus_field(store, key)
        terms = (f"{field} is null" if value is None else f"{field} == {_milvus_literal(value)}" for value in values)
        clauses.append(f"({' or '.join(terms)})")
    found: Found = store.similarity_search_with_score_by_vector(vector, k, expr=" and ".join(clauses) or None)
    return found


def _milvus_field(store: Any, key: str) -> str:
    if key in store.fields:
        return key
    inside = getattr(store, "_metadata_field", None) or ("$meta" if getattr(store, "enable_dynamic_field", False) else None)
    if inside is None:
        raise InputError(f"the Milvus collection has no field {key!r} to search by: it has {', '.join(store.fields)}")
    return f"{inside}[{_milvus_literal(key)}]"


def _milvus_literal(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False)


def _dimensions_of_milvus(store: Any) -> int | None:
    if store.col is None:
        return None
    field, fields = _milvus_vector_field(store), store.client.describe_collection(store.collection_name)["fields"]
    return next((int(each["params"]["dim"]) for each in fields if each["name"] == field), None)


def _id_key_of_milvus(store: Any) -> str:
    return str(store._primary_field)


# -- Qdrant: the distance is the store's own; a score is never a distance but for Euclid --------------------------------------


def _metric_of_qdrant(store: Any) -> Metric:
    mode = str(getattr(store.retrieval_mode, "value", store.retrieval_mode))
    if mode == "sparse":
        raise InputError("the Qdrant store has sparse vectors only, and the two stages compare by dense ones")
    return named("Qdrant", str(getattr(store.distance, "value", store.distance)).capitalize())


def _search_qdrant(store: Any, vector: list[float], k: int, within: Within) -> Found:
    from qdrant_client import models  # the store is of its client, so it is there

    def condition(key: str, values: Sequence[Scalar]) -> Any:
        path = f"{store.metadata_payload_key}.{json.dumps(key) if not key.isidentifier() else key}"
        names = [value for value in values if isinstance(value, str)]
        either: list[Any] = [models.FieldCondition(key=path, match=models.MatchAny(any=names))] if names else []
        for value in values:
            if value is None:
                either.append(models.IsNullCondition(is_null=models.PayloadField(key=path)))
            elif isinstance(value, bool) or (isinstance(value, int) and value != float(value)):
                either.append(models.FieldCondition(key=path, match=models.MatchValue(value=value)))
            elif not isinstance(value, str):
                either.append(models.FieldCondition(key=path, range=models.Range(gte=value, lte=value)))
        return models.Filter(should=either)

    only = models.Filter(must=[condition(key, values) for key, values in within.items()]) if within else None
    found: Found = store.similarity_search_with_score_by_vector(vector, k, filter=only)
    return found


def _dimensions_of_qdrant(store: Any) -> int | None:
    vectors = store.client.get_collection(store.collection_name).config.params.vectors
    return int((vectors[store.vector_name] if isinstance(vectors, Mapping) else vectors).size)


def _id_key_of_qdrant(store: Any) -> str:
    return "_id"


KINDS: tuple[Kind, ...] = (
    Kind("langchain_core", "InMemoryVectorStore", _metric_in_memory, _search_in_memory, _dimensions_in_memory),
    Kind("langchain_community", "FAISS", _metric_of_faiss, _search_faiss, _dimensions_of_faiss, normalises=_faiss_normalises),
    Kind("langchain_chroma", "Chroma", _metric_of_chroma, _search_chroma, _dimensions_of_chroma),
    Kind("langchain_milvus", "Milvus", _metric_of_milvus, _search_milvus, _dimensions_of_milvus, id_key=_id_key_of_milvus),
    Kind(
        "langchain_qdrant",
        "QdrantVectorStore",
        _metric_of_qdrant,
        _search_qdrant,
        _dimensions_of_qdrant,
        id_key=_id_key_of_qdrant,
    ),
)
"""The table of known stores."""


def find_kind(store: object) -> Kind | None:
    """What is known of a store, by its class or one that it derives from; None for nothing."""
    for base in type(store).__mro__:
        for kind in KINDS:
            if base.__name__ == kind.class_name and base.__module__.partition(".")[0] == kind.package:
                return kind
    return None
