"""Vector stores of LlamaIndex as sources of the two stages: what each calls a similarity, turned back into a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.indices import VectorStoreIndex
from llama_index.core.schema import BaseNode, QueryBundle
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from pydantic import ValidationError

from gemma_rag.errors import InputError
from gemma_rag.external import Candidate, Within
from gemma_rag.search import Scalar
from gemma_rag.store_scores import Metric, check_metric, check_norm, chroma_space, cosine_of, named
from gemma_rag.vectors import Floats
from llama_index_gemma_rag.nodes import NodeDocument, is_blank


class Scale(NamedTuple):
    """How a store's similarity becomes a cosine.

    Attributes:
        metric: What the score is, once it is `raw`.
        raw: From the similarity that LlamaIndex gives to what the store itself calls the score.
    """

    metric: Metric
    raw: Callable[[float], float] = float


class Kind(NamedTuple):
    """A store that is known.

    Attributes:
        scale: How its similarities become cosines.
        dimensions: How many its vectors have; None as long as it has none.
    """

    scale: Callable[[Any], Scale]
    dimensions: Callable[[Any], int | None]


def _simple(store: Any) -> Scale:
    return Scale("cosine")


def _dimensions_of_simple(store: Any) -> int | None:
    return next((len(vector) for vector in store.data.embedding_dict.values()), None)


def _chroma(store: Any) -> Scale:
    """exp(-distance), of whichever distance the collection has: squared Euclidean unless it was told otherwise."""
    metric = named("Chroma", chroma_space(store.client))
    return Scale(metric, lambda score: -math.log(score) if score > 0.0 else math.inf)


def _dimensions_of_chroma(store: Any) -> int | None:
    rows = store.client.peek(1)["embeddings"]
    return len(rows[0]) if rows is not None and len(rows) else None


def _qdrant(store: Any) -> Scale:
    distance = _qdrant_vectors(store).distance
    return Scale(named("Qdrant", str(getattr(distance, "value", distance))))


def _qdrant_vectors(store: Any) -> Any:
    """How the collection was made."""
    name = store.collection_name
    if store.client is None:
        raise InputError(
            f"the Qdrant store {name!r} has an asynchronous client only, and the two stages search with a plain one, in a "
            "thread where the event loop must go on: QdrantVectorStore(..., client=QdrantClient(...))"
        )
    if not store.client.collection_exists(name):
        raise InputError(
            f"Qdrant has no collection {name!r} yet, so that nothing says what its scores will be: fill the index first, "
            "VectorStoreIndex(nodes, storage_context=...)"
        )
    vectors = store.client.get_collection(name).config.params.vectors
    if not isinstance(vectors, Mapping):
        return vectors
    if store.dense_vector_name not in vectors:
        raise InputError(
            f"the Qdrant collection {name!r} has no vector {store.dense_vector_name!r}: name one of "
            f"{', '.join(map(repr, vectors)) or 'none'} with QdrantVectorStore(..., dense_vector_name=...)"
        )
    return vectors[store.dense_vector_name]


def _dimensions_of_qdrant(store: Any) -> int | None:
    return int(_qdrant_vectors(store).size)


def _milvus(store: Any) -> Scale:
    """The metric of the collection's own index, which need not be the one that the store was opened with."""
    client, collection = store.client, store.collection_name
    indexes = client.list_indexes(collection, field_name=store.embedding_field) if client.has_collection(collection) else []
    name = client.describe_index(collection, indexes[0])["metric_type"] if indexes else store.similarity_metric
    return Scale(named("Milvus", str(name)))


def _dimensions_of_milvus(store: Any) -> int | None:
    client, collection = store.client, store.collection_name
    if not client.has_collection(collection):
        return None
    fields = client.describe_collection(collection)["fields"]
    return next((int(each["params"]["dim"]) for each in fields if each["name"] == store.embedding_field), None)


KNOWN: Mapping[str, Kind] = {
    "SimpleVectorStore": Kind(_simple, _dimensions_of_simple),
    "ChromaVectorStore": Kind(_chroma, _dimensions_of_chroma),
    "QdrantVectorStore": Kind(_qdrant, _dimensions_of_qdrant),
    "MilvusVectorStore": Kind(_milvus, _dimensions_of_milvus),
}
"""Stores whose similarities were compared with true cosines, by the names of their classes."""

_CANNOT_FILTER = ("FaissVectorStore", "FaissMapVectorStore")


def scale_of(store: object, metric: Metric | None = None) -> Scale:
    """How a vector store's similarity becomes a cosine.

    Args:
        store: LlamaIndex's vector store.
        metric: What the user says that it calls a similarity; None to look it up.

    Raises:
        InputError: It cannot filter on metadata, or it is not known and no metric came.
    """
    names = [each.__name__ for each in type(store).__mro__]
    if any(name in _CANNOT_FILTER for name in names):
        raise InputError(
            "Faiss in LlamaIndex cannot filter on metadata, so that a category cannot be searched by itself: use "
            "another vector store, or a gemma_rag.KnowledgeBase"
        )
    if metric is not None:
        return Scale(check_metric(metric))
    known = kind_of(store)
    if known is None:
        raise InputError(
            f"what a {names[0]} calls a similarity is not known here: name it, as in from_index(index, metric='cosine'). Known "
            f"are {', '.join(KNOWN)}"
        )
    return known.scale(store)


def kind_of(store: object) -> Kind | None:
    """What is known of a store, by its class or one that it derives from; None for nothing."""
    return next((KNOWN[each.__name__] for each in type(store).__mro__ if each.__name__ in KNOWN), None)


class IndexSource:
    """A `VectorStoreIndex` as a `gemma_rag.external.VectorSource`.

    Args:
        index: The index.
        category_key: Where the metadata of a node name its category.
        title_key: Where they name its title.
        metric: What its store calls a similarity; None to look it up.
        needs_category: Whether a node without a category is refused.
    """

    def __init__(
        self, index: VectorStoreIndex, category_key: str, title_key: str, metric: Metric | None, *, needs_category: bool
    ) -> None:
        self._index = index
        self._keys = (category_key, title_key)
        self._scale = scale_of(index.vector_store, metric)
        self._fits: int | None = None  # dimensions that were found to be those of the store
        self._needs_category = needs_category
        self.name = type(index.vector_store).__name__

    def embed_with(self, model: BaseEmbedding) -> Callable[[str], list[float]]:
        """From a question to its vector, by an embedding model whose vectors this store compares as cosines.

        The function raises `InputError` where the model's vectors have not norm 1 and the store does not divide by it, or
        have other dimensions than those of the store.
        """

        def embed(question: str) -> list[float]:
            vector = model.get_query_embedding(question)
            check_norm(vector, self._scale.metric, model=model.class_name(), store=self.name)
            self._check_dimensions(len(vector), model.class_name())
            return vector

        return embed

    def _check_dimensions(self, asked: int, model: str) -> None:
        known = kind_of(self._index.vector_store)
        if known is None or asked == self._fits:
            return
        stored = known.dimensions(self._index.vector_store)
        if stored not in (None, asked):
            raise InputError(
                f"{model} gives a question a vector of {asked} dimensions, and those in {self.name} have {stored}: name what "
                "filled the index (embed_model=...), with the same dimensions"
            )
        self._fits = None if stored is None else asked

    def search(self, vector: Floats, k: int, within: Within) -> list[Candidate]:
        """The nodes that come closest to a vector, as `gemma_rag.external.VectorSource` says.

        Raises:
            InputError: A node has no category, a similarity is no cosine, or LlamaIndex has no such filter.
        """
        retriever = self._index.as_retriever(similarity_top_k=k, filters=_filters(within) if within else None)
        # not `retrieve`, which would follow nodes that stand for other things; ours does that with what is kept
        found = retriever._retrieve(QueryBundle(query_str="", embedding=vector.tolist()))
        out = []
        for each in found:
            if self._needs_category:
                self._check_category(each.node)
            if each.score is None:
                raise InputError(
                    f"{self.name} gives no similarities, and the two stages live by them: use another vector store"
                )
            document = NodeDocument.of(each.node, *self._keys)
            if document is not None:
                out.append(Candidate(document, cosine_of(self._scale.raw(each.score), self._scale.metric)))
        return out

    def _check_category(self, node: BaseNode) -> None:
        category = node.metadata.get(self._keys[0])
        if is_blank(category):
            raise InputError(
                f"node {node.node_id!r} has no {self._keys[0]!r} in its metadata: name the key that has it (category_key=...; "
                f"there are {', '.join(map(repr, node.metadata)) or 'none'}), or search without categories (mode='flat')"
            )
        if not isinstance(category, str) or category != category.strip():
            raise InputError(
                f"node {node.node_id!r} has the category {category!r}: a category is a text with no white space around it, so "
                "that the vector store can filter on it. Index it anew, or search without categories (mode='flat')"
            )


def _filters(within: Within) -> MetadataFilters:
    return MetadataFilters(filters=[_filter(key, values) for key, values in within.items()])


def _filter(key: str, values: Sequence[Scalar]) -> MetadataFilter:
    one = len(values) == 1
    value: Any = values[0] if one else list(values)
    try:
        return MetadataFilter(key=key, value=value, operator=FilterOperator.EQ if one else FilterOperator.IN)
    except ValidationError:
        raise InputError(
            f"LlamaIndex's filters compare with a text or a number, or with several of one kind, and {key!r} is to be {value!r}"
        ) from None
