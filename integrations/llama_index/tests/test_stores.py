"""The two stages over LlamaIndex's own indexes: one suite over every vector store whose similarities are known."""

import itertools

import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices import SummaryIndex
from llama_index.core.schema import IndexNode, QueryBundle, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index_gemma_rag import GemmaEmbedding, TwoStageRetriever
from llama_index_gemma_rag.stores import KNOWN, IndexSource, scale_of

from gemma_rag.errors import InputError
from gemma_rag.results import Outcome

QUESTION = "How do I reset my password?"
CATEGORIES = {"it": "it, computers", "people": "O'Neil's \"people\"", "travel": "旅行/交通"}
numbers = itertools.count()


pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")  # Qdrant in memory


def simple(tmp_path):
    return SimpleVectorStore()


def chroma(space):
    def make(tmp_path):
        chromadb = pytest.importorskip("chromadb")
        stores = pytest.importorskip("llama_index.vector_stores.chroma")
        configuration = {"hnsw": {"space": space}} if space else {}
        client = chromadb.PersistentClient(tmp_path / "chroma")
        collection = client.create_collection(f"collection-{next(numbers)}", configuration=configuration)
        return stores.ChromaVectorStore(chroma_collection=collection)

    return make


def qdrant(distance):
    def make(tmp_path):
        client = pytest.importorskip("qdrant_client")
        stores = pytest.importorskip("llama_index.vector_stores.qdrant")
        memory = client.QdrantClient(":memory:")
        chosen = client.models.VectorParams(size=384, distance=getattr(client.models.Distance, distance))
        memory.create_collection("pages", vectors_config=chosen)
        return stores.QdrantVectorStore("pages", client=memory)

    return make


def milvus(metric):
    def make(tmp_path):
        stores = pytest.importorskip("llama_index.vector_stores.milvus")
        pytest.importorskip("milvus_lite")
        return stores.MilvusVectorStore(uri=str(tmp_path / "milvus.db"), dim=384, similarity_metric=metric)

    return make


STORES = {
    "simple": simple,
    "chroma": chroma(None),
    "chroma-l2": chroma("l2"),
    "chroma-cosine": chroma("cosine"),
    "chroma-ip": chroma("ip"),
    "qdrant-cosine": qdrant("COSINE"),
    "qdrant-dot": qdrant("DOT"),
    "qdrant-euclid": qdrant("EUCLID"),
    "milvus-cosine": milvus("COSINE"),
    "milvus-ip": milvus("IP"),
    "milvus-l2": milvus("L2"),
}


def pages(documents):
    return [
        TextNode(
            id_=f"00000000-0000-0000-0000-{i:012}",  # Qdrant takes UUIDs
            text=each.text,
            metadata={"title": each.title, "topic": CATEGORIES[each.category], "year": each.metadata["year"]},
        )
        for i, each in enumerate(documents)
    ]


def index_over(store, nodes, embed_model):
    return VectorStoreIndex(nodes, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embed_model)


@pytest.fixture(scope="module")
def model(minilm):
    return GemmaEmbedding(minilm)


@pytest.fixture(scope="module", params=STORES)
def index(request, documents, model, tmp_path_factory):
    return index_over(STORES[request.param](tmp_path_factory.mktemp("store")), pages(documents), model)


@pytest.fixture(scope="module")
def cosines(documents, model):
    nodes = model(pages(documents))
    question = np.array(model.get_query_embedding(QUESTION))
    return {node.node_id: float(question @ np.array(node.embedding)) for node in nodes}


def vector(model):
    return np.array(model.get_query_embedding(QUESTION), dtype=np.float32)


# -- every known store --------------------------------------------------------------------------------------------------


def test_similarities_become_true_cosines_best_first(index, model, cosines):
    found = IndexSource(index, "topic", "title", None, needs_category=True).search(vector(model), 10, {})
    assert [each.document.id for each in found] == sorted(cosines, key=cosines.get, reverse=True)
    np.testing.assert_allclose([each.score for each in found], sorted(cosines.values(), reverse=True), atol=1e-4)


@pytest.mark.parametrize("opened", [["it"], ["people"], ["travel"], ["it", "travel"], ["people", "travel"]])
def test_only_the_opened_categories_are_searched(index, model, opened):
    names = {CATEGORIES[name] for name in opened}
    found = IndexSource(index, "topic", "title", None, needs_category=True).search(vector(model), 10, {"topic": sorted(names)})
    assert {each.document.category for each in found} == names
    assert len(found) == sum({"it": 4, "people": 3, "travel": 3}[name] for name in opened)


def test_two_filters_hold_together(index, model):
    within = {"topic": [CATEGORIES["it"]], "year": [2020]}
    found = IndexSource(index, "topic", "title", None, needs_category=True).search(vector(model), 10, within)
    assert {each.document.title for each in found} == {"VPN", "Printers"}


def test_the_two_stages_find_the_right_node(index):
    retriever = TwoStageRetriever.from_index(index, category_key="topic", probe=1, k=1)
    retrieval = retriever.explain(QUESTION)
    assert retrieval.outcome is Outcome.ANSWERED
    assert [category.name for category in retrieval.categories if category.kept] == [CATEGORIES["it"]]
    (node,) = retriever.retrieve(QUESTION)
    assert node.metadata["title"] == "Passwords"
    assert node.score == pytest.approx(retrieval.hits[0].score)


def test_off_topic_is_refused(index):
    retriever = TwoStageRetriever.from_index(index, category_key="topic", category_threshold=0.3)
    assert retriever.retrieve("Why do cats purr?") == []
    assert retriever.explain("Why do cats purr?").outcome is Outcome.CATEGORY_BELOW_THRESHOLD


def test_vectors_of_other_dimensions_are_refused_with_both_numbers(index):
    retriever = TwoStageRetriever.from_index(index, embed_model=Directions(embed_dim=8), category_key="topic", probe=1)
    with pytest.raises(InputError, match=r"of 8 dimensions, and those in \w+ have 384: .*embed_model="):
        retriever.retrieve(QUESTION)


# -- over one of them ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(documents, model):
    return index_over(SimpleVectorStore(), pages(documents), model)


async def test_it_finds_the_same_asynchronously(plain):
    retriever = TwoStageRetriever.from_index(plain, category_key="topic")
    one, two = retriever.retrieve(QUESTION), await retriever.aretrieve(QUESTION)
    assert [(node.node_id, node.score) for node in one] == [(node.node_id, node.score) for node in two]
    assert one


def test_nodes_come_back_as_they_are_in_the_index(plain, documents):
    (node,) = TwoStageRetriever.from_index(plain, category_key="topic", k=1).retrieve(QUESTION)
    stored = plain.docstore.get_node(node.node_id)
    assert (node.metadata, node.node.hash) == (stored.metadata, stored.hash)


async def test_a_node_that_stands_for_another_leads_to_it(model):
    page = TextNode(id_="page", text="The whole page.")
    index = VectorStoreIndex(
        [IndexNode(text="Passwords", index_id="p", obj=page, metadata={"category": "it"})], embed_model=model
    )
    retriever = TwoStageRetriever.from_index(index)
    assert [node.node_id for node in retriever.retrieve("Passwords")] == ["page"]
    assert [node.node_id for node in await retriever.aretrieve("Passwords")] == ["page"]


async def test_an_object_of_the_index_is_led_to(model):
    page = TextNode(id_="page", text="The whole page.")
    objects = [IndexNode(text="Passwords", index_id="p", obj=page, metadata={"category": "it"})]
    retriever = TwoStageRetriever.from_index(VectorStoreIndex(objects=objects, embed_model=model))
    assert [node.node_id for node in retriever.retrieve("Passwords")] == ["page"]
    assert [node.node_id for node in await retriever.aretrieve("Passwords")] == ["page"]


@pytest.mark.parametrize("titled", [GemmaEmbedding(model="minilm", title_key="name"), None])
def test_titles_are_where_the_model_has_them_unless_told(titled, documents, minilm):
    nodes = [TextNode(text=each.text, metadata={"name": each.title, "category": each.category}) for each in documents]
    index = index_over(SimpleVectorStore(), nodes, GemmaEmbedding(minilm, title_key="name"))
    by_default = TwoStageRetriever.from_index(index, embed_model=titled, k=1).explain(QUESTION)
    assert by_default.hits[0].document.title == "Passwords"
    told = TwoStageRetriever.from_index(index, embed_model=titled, k=1, title_key="category").explain(QUESTION)
    assert told.hits[0].document.title == "it"


def test_a_model_that_leaves_titles_in_the_text_says_nothing_of_their_key(plain, minilm):
    retriever = TwoStageRetriever.from_index(plain, embed_model=GemmaEmbedding(minilm, title_key=None), category_key="topic")
    assert retriever.keys == ("topic", "title")


async def test_strings_to_embed_instead_of_the_question_are_used(plain, model):
    retriever = TwoStageRetriever.from_index(plain, category_key="topic", k=2, category_threshold=-1, document_threshold=-1)
    strings = ["Fly in economy class.", "Flights are booked."]
    found = retriever.retrieve(QueryBundle(QUESTION, custom_embedding_strs=strings))
    also = await retriever.aretrieve(QueryBundle(QUESTION, custom_embedding_strs=strings))
    wanted = plain.as_retriever(similarity_top_k=2).retrieve(QueryBundle(QUESTION, custom_embedding_strs=strings))
    assert found[0].metadata["title"] == "Flights"
    for nodes in (found, also):
        assert [node.node_id for node in nodes] == [node.node_id for node in wanted]
        np.testing.assert_allclose([node.score for node in nodes], [node.score for node in wanted], atol=1e-5)


def test_strings_to_embed_serve_a_store_of_inner_products(documents, tmp_path):
    index = index_over(chroma("ip")(tmp_path), pages(documents), Directions(embed_dim=8))
    retriever = TwoStageRetriever.from_index(index, category_key="topic", category_threshold=0.5, document_threshold=0.5)
    assert retriever.retrieve(QueryBundle(QUESTION, custom_embedding_strs=["Go by rail.", "Fly."]))


def test_thresholds_are_those_of_the_models_profile(plain, minilm):
    thresholds = TwoStageRetriever.from_index(plain, category_key="topic").explain(QUESTION).thresholds
    assert (thresholds["category"], thresholds["document"]) == (
        minilm.profile.category_threshold,
        minilm.profile.document_threshold,
    )


def test_categories_and_filters_are_kept_to(plain):
    retriever = TwoStageRetriever.from_index(
        plain, category_key="topic", categories=[CATEGORIES["it"]], where={"year": [2020, 2021]}, document_threshold=-1.0
    )
    nodes = retriever.retrieve(QUESTION)
    assert {node.metadata["topic"] for node in nodes} == {CATEGORIES["it"]}
    assert len(nodes) == 4


def test_what_was_embedded_can_be_told(documents, model, minilm):
    index = index_over(SimpleVectorStore(), model(pages(documents)), MockEmbedding(embed_dim=384))
    (node,) = TwoStageRetriever.from_index(index, embed_model=minilm, category_key="topic", k=1).retrieve(QUESTION)
    assert node.metadata["title"] == "Passwords"


class Letters(MockEmbedding):
    """Counts letters; its vectors have not norm 1."""

    def _get_text_embedding(self, text):
        return [1.0 + text.lower().count(letter) for letter in "aeinorst"]

    _get_query_embedding = _get_text_embedding


class Directions(Letters):
    """The same letters, of norm 1."""

    def _get_text_embedding(self, text):
        vector = np.array(super()._get_text_embedding(text))
        return (vector / np.linalg.norm(vector)).tolist()

    _get_query_embedding = _get_text_embedding


def test_any_embedding_model_serves(documents):
    index = index_over(SimpleVectorStore(), pages(documents), Letters(embed_dim=8))
    retriever = TwoStageRetriever.from_index(index, category_key="topic", category_threshold=0.5, document_threshold=0.5)
    retrieval = retriever.explain(QUESTION)
    assert retrieval.hits
    assert retriever.core.encoder is None


def test_an_empty_index_is_an_empty_knowledge_base(model):
    retriever = TwoStageRetriever.from_index(VectorStoreIndex([], embed_model=model))
    assert retriever.explain(QUESTION).outcome is Outcome.EMPTY_KNOWLEDGE_BASE


def test_without_categories_flat_mode_searches(plain):
    retriever = TwoStageRetriever.from_index(plain, category_key="none of these", mode="flat", k=1)
    assert [node.metadata["title"] for node in retriever.retrieve(QUESTION)] == ["Passwords"]


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_a_node_without_a_category_is_named(plain):
    with pytest.raises(InputError, match=r"node '00000000-.* has no 'shelf' .*category_key="):
        TwoStageRetriever.from_index(plain, category_key="shelf").retrieve(QUESTION)


@pytest.mark.parametrize("category", [7, " it "])
def test_a_category_that_no_filter_finds_again_is_refused(model, category):
    index = VectorStoreIndex([TextNode(text="Text", metadata={"category": category})], embed_model=model)
    with pytest.raises(InputError, match=f"has the category {category!r}"):
        TwoStageRetriever.from_index(index).retrieve(QUESTION)


class Unknown(SimpleVectorStore.__base__):
    """A store that nobody has measured."""

    stores_text: bool = True
    is_embedding_query: bool = True

    @property
    def client(self):
        return None

    def add(self, nodes, **kwargs):
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id, **kwargs): ...

    def query(self, query, **kwargs):
        raise NotImplementedError


def test_an_unknown_store_is_refused_with_the_way_to_name_its_metric():
    with pytest.raises(InputError, match=r"Unknown .*metric='cosine'.* SimpleVectorStore, ChromaVectorStore"):
        scale_of(Unknown())


def test_an_unknown_store_is_taken_with_its_metric():
    assert scale_of(Unknown(), "l2").metric == "l2"


def test_a_metric_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="no metric is named 'distance'"):
        scale_of(Unknown(), "distance")


def test_a_store_made_of_a_known_one_is_known():
    class Mine(SimpleVectorStore):
        pass

    assert scale_of(Mine()).metric == "cosine"


def test_vectors_of_another_norm_are_refused_where_the_store_does_not_divide_by_it(documents, tmp_path):
    index = index_over(chroma("ip")(tmp_path), pages(documents), Letters(embed_dim=8))
    retriever = TwoStageRetriever.from_index(index, category_key="topic", category_threshold=0.5, document_threshold=0.5)
    with pytest.raises(InputError, match=r"MockEmbedding have not norm 1 .*inner-product-distance"):
        retriever.retrieve(QUESTION)


def test_vectors_of_another_norm_serve_where_the_store_divides_by_it(documents, tmp_path):
    index = index_over(chroma("cosine")(tmp_path), pages(documents), Letters(embed_dim=8))
    retriever = TwoStageRetriever.from_index(index, category_key="topic", category_threshold=0.5, document_threshold=0.5)
    assert all(0.5 <= node.score <= 1.0 for node in retriever.retrieve(QUESTION))


@pytest.mark.parametrize("metric", [None, "cosine"])
def test_faiss_is_refused_with_the_reason(metric):
    faiss = pytest.importorskip("faiss")
    stores = pytest.importorskip("llama_index.vector_stores.faiss")
    with pytest.raises(InputError, match="cannot filter on metadata"):
        scale_of(stores.FaissVectorStore(faiss_index=faiss.IndexFlatIP(4)), metric)


def test_a_distance_of_qdrant_that_is_no_cosine_is_refused():
    with pytest.raises(InputError, match="Manhattan"):
        scale_of(qdrant("MANHATTAN")(None))


def test_a_qdrant_without_its_collection_is_refused_with_the_cure():
    client = pytest.importorskip("qdrant_client")
    stores = pytest.importorskip("llama_index.vector_stores.qdrant")
    with pytest.raises(InputError, match=r"no collection 'pages' yet.* fill the index first"):
        scale_of(stores.QdrantVectorStore("pages", client=client.QdrantClient(":memory:")))


def test_a_qdrant_with_an_asynchronous_client_alone_is_refused_with_the_cure():
    client = pytest.importorskip("qdrant_client")
    stores = pytest.importorskip("llama_index.vector_stores.qdrant")
    with pytest.raises(InputError, match=r"asynchronous client only.* client=QdrantClient"):
        scale_of(stores.QdrantVectorStore("pages", aclient=client.AsyncQdrantClient(":memory:")))


def test_the_metric_of_milvus_is_that_of_the_collection_and_not_of_the_store(tmp_path):
    milvus("L2")(tmp_path)
    opened = milvus("IP")(tmp_path)
    assert opened.similarity_metric == "IP"
    assert scale_of(opened).metric == "l2-squared"


def test_a_filter_that_llama_index_has_not_is_refused(plain):
    with pytest.raises(InputError, match="a text or a number"):
        TwoStageRetriever.from_index(plain, category_key="topic", where={"draft": True}).retrieve(QUESTION)


def test_another_kind_of_index_is_refused():
    with pytest.raises(InputError, match="is a SummaryIndex"):
        TwoStageRetriever.from_index(SummaryIndex([]))


def test_every_known_store_is_in_this_suite():
    tested = {name.partition("-")[0] for name in STORES}
    assert tested == {name.removesuffix("VectorStore").lower() for name in KNOWN}
