"""The two stages over a store. The stores' own libraries are in integration_tests."""

import asyncio
import copy
import math
import pickle
import threading

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_gemma_rag import RoleSafeCache, TwoStageRetriever
from langchain_gemma_rag.source import StoreSource
from langchain_gemma_rag.stores import matches
from pydantic import ValidationError

from gemma_rag import Document as Page
from gemma_rag import GemmaEmbeddings, KnowledgeBase
from gemma_rag.errors import InputError


class Angles(Embeddings):
    """The text begins with an angle in degrees; vectors have a norm of one's choice."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def embed_query(self, text: str) -> list[float]:
        angle = math.radians(float(text.split()[0]))
        return [self.norm * math.cos(angle), self.norm * math.sin(angle)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def entry(angle: int, category: str | None, **metadata) -> Document:
    named = {} if category is None else {"category": category}
    return Document(f"{angle} degrees", id=f"at {angle}", metadata={**named, **metadata})


ENTRIES = [
    entry(0, "east", title="East", year=2023, tags=["a", "b"]),
    entry(20, "east", year=2024, tags=["b"]),
    entry(90, "north", year=2024),
    entry(180, "west", year=2025, done=True),
    entry(200, "west", year=1, done=False),
]


def filled(documents=ENTRIES, embeddings=None) -> InMemoryVectorStore:
    store = InMemoryVectorStore(embeddings or Angles())
    store.add_documents(list(documents))
    return store


@pytest.fixture
def retriever() -> TwoStageRetriever:
    return TwoStageRetriever.from_vectorstore(filled(), k=2)


def ids(documents) -> list[str]:
    return [document.id for document in documents]


# -- two stages over a store --------------------------------------------------------------------------------------------


def test_it_finds_the_nearest_entries_with_their_cosines(retriever):
    found = retriever.invoke("10 degrees")
    assert {each.id: round(each.metadata["score"], 5) for each in found} == {"at 0": 0.98481, "at 20": 0.98481}
    assert found.retrieval.mode == "two-stage"


def test_documents_carry_their_text_title_and_category(retriever):
    document = retriever.invoke("1 degrees", k=1)[0]
    assert (document.page_content, document.metadata["title"]) == ("0 degrees", "East")
    assert (document.metadata["category"], document.metadata["year"]) == ("east", 2023)
    assert document.metadata["category_score"] == pytest.approx(document.metadata["score"])


def test_thresholds_refuse(retriever):
    found = retriever.invoke("270 degrees", category_threshold=0.5)
    assert found == []
    assert found.retrieval.outcome.value == "category_below_threshold"
    assert retriever.invoke("45 degrees", document_threshold=0.95).retrieval.outcome.value == "document_below_threshold"


def test_categories_are_a_filter(retriever):
    assert ids(retriever.invoke("0 degrees", categories=["west", "north"], mode="flat")) == ["at 90", "at 200"]


def test_where_is_a_filter(retriever):
    assert ids(retriever.invoke("0 degrees", where={"year": [2024, 2025]}, mode="flat")) == ["at 20", "at 90"]


def test_filters_that_nothing_passes_are_named_as_the_reason(retriever):
    assert retriever.invoke("0 degrees", where={"year": 1900}).retrieval.outcome.value == "filtered_out"


def test_an_empty_store_is_named_as_the_reason():
    assert TwoStageRetriever.from_vectorstore(filled([])).invoke("0").retrieval.outcome.value == "empty_knowledge_base"


def test_options_work_as_over_a_knowledge_base(retriever):
    assert len(retriever.invoke("0 degrees", k=1)) == 1
    assert len(retriever.with_config(configurable={"k": 1}).invoke("0 degrees")) == 1
    assert [len(found) for found in retriever.batch(["0 degrees", "90 degrees"], k=1)] == [1, 1]
    assert retriever.invoke("0 degrees", mode="auto").retrieval.mode == "two-stage"


async def test_async_finds_the_same(retriever):
    assert await retriever.ainvoke("10 degrees", k=1) == retriever.invoke("10 degrees", k=1)


async def test_the_event_loop_goes_on_while_a_store_is_searched():
    released = threading.Event()

    class Waiting(Angles):
        def embed_query(self, text):
            assert released.wait(10), "the event loop stood still"
            return super().embed_query(text)

    async def release():
        released.set()

    retriever = TwoStageRetriever.from_vectorstore(filled(), embeddings=Waiting())
    found, _ = await asyncio.gather(retriever.ainvoke("0 degrees"), release())
    assert found


async def test_a_model_is_loaded_outside_the_event_loop(tiny_gemma):
    """The thresholds of a model are known once it is loaded, which takes seconds."""
    here = threading.get_ident()
    seen = []

    class Watched(GemmaEmbeddings):
        @property
        def profile(self):
            seen.append(threading.get_ident())
            return super().profile

    embeddings = Watched(model=str(tiny_gemma), device="cpu", show_progress=False)
    retriever = TwoStageRetriever.from_vectorstore(InMemoryVectorStore(embeddings))
    assert not seen
    await retriever.ainvoke("question")
    assert seen
    assert here not in seen


def test_keys_of_the_metadata_can_be_named():
    store = filled([Document("0", id="a", metadata={"dept": "east", "name": "East"})])
    found = TwoStageRetriever.from_vectorstore(store, category_key="dept", title_key="name").invoke("0")
    assert found[0].metadata == {
        "dept": "east",
        "name": "East",
        "title": "East",
        "category": "east",
        "score": pytest.approx(1.0),
        "category_score": pytest.approx(1.0),
    }


def test_metadata_that_is_no_json_becomes_it():
    store = filled([entry(0, "east", where=np.float32(0.5))])
    assert TwoStageRetriever.from_vectorstore(store).invoke("0")[0].metadata["where"] == 0.5


def test_langsmith_is_told_of_the_store(retriever):
    params = retriever._get_ls_params()
    assert params["ls_vector_store_provider"] == "InMemoryVectorStore"
    assert params["ls_embedding_provider"] == "Angles"


def test_langsmith_is_told_of_the_model(tiny_gemma):
    embeddings = GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)
    store = InMemoryVectorStore(RoleSafeCache(embeddings, InMemoryByteStore()))
    params = TwoStageRetriever.from_vectorstore(store)._get_ls_params()
    assert (params["ls_embedding_provider"], params["ls_embedding_model"]) == ("GemmaEmbeddings", str(tiny_gemma))


def test_the_repr_names_the_store(retriever):
    assert repr(retriever) == "TwoStageRetriever(<InMemoryVectorStore, Angles>, k=2)"


def test_a_retriever_over_a_store_can_be_pickled_with_it():
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document("text", id="a", metadata={"category": "c"})])
    again = pickle.loads(pickle.dumps(TwoStageRetriever.from_vectorstore(store, k=2)))
    assert again.k == 2
    assert ids(again.invoke("text")) == ["a"]


def test_a_copy_shares_the_store(retriever):
    assert copy.deepcopy(retriever).source.store is retriever.source.store


def test_our_embeddings_bring_thresholds_and_an_encoder(tiny_gemma):
    embeddings = GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)
    store = InMemoryVectorStore(embeddings)
    for given in (None, RoleSafeCache(embeddings, InMemoryByteStore())):
        retriever = TwoStageRetriever.from_vectorstore(store, embeddings=given)
        assert retriever.encoder is embeddings
        assert retriever._core().profile == embeddings.profile


def test_foreign_embeddings_bring_neither(retriever):
    assert retriever.encoder is None
    assert retriever._core().profile is None


# -- a store that is not known ------------------------------------------------------------------------------------------


class Distances(VectorStore):
    """A store that nobody knows: it calls 1 - cosine a score."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def nearest(self, vector, k, within):
        inside = [document for document in self.documents if matches(document.metadata, within)]
        rows = np.array(Angles().embed_documents([document.page_content for document in inside])).reshape(-1, 2)
        distances = 1 - rows @ np.array(vector)
        return [(inside[i], float(distances[i])) for i in np.argsort(distances)[:k]]

    def similarity_search(self, query, k=4, **kwargs):
        raise NotImplementedError

    @classmethod
    def from_texts(cls, texts, embedding, metadatas=None, **kwargs):
        raise NotImplementedError


def test_an_unknown_store_is_refused_with_the_way_to_name_its_conversion():
    with pytest.raises(InputError, match=r'Distances.*InMemoryVectorStore.*Qdrant.*metric="cosine-distance".*search='):
        TwoStageRetriever.from_vectorstore(Distances([]), embeddings=Angles())


@pytest.mark.parametrize("half", [{"metric": "cosine-distance"}, {"search": lambda vector, k, within: []}])
def test_half_of_a_conversion_is_not_enough(half):
    with pytest.raises(InputError, match="search="):
        TwoStageRetriever.from_vectorstore(Distances([]), embeddings=Angles(), **half)


def test_an_unknown_store_works_with_its_conversion():
    store = Distances(ENTRIES)
    retriever = TwoStageRetriever.from_vectorstore(
        store, embeddings=Angles(), metric="cosine-distance", search=store.nearest, k=1
    )
    assert retriever.invoke("85 degrees")[0].metadata["score"] == pytest.approx(math.cos(math.radians(5)))
    assert ids(retriever.invoke("85 degrees", categories=["west"])) == ["at 180"]


def test_a_conversion_gets_lists_to_filter_by():
    seen = []
    store = Distances(ENTRIES)

    def search(vector, k, within):
        seen.append(within)
        return store.nearest(vector, k, within)

    retriever = TwoStageRetriever.from_vectorstore(store, embeddings=Angles(), metric="cosine-distance", search=search)
    retriever.invoke("0 degrees", where={"year": (2023,)}, mode="flat")
    assert seen == [{"year": [2023]}]


def test_what_a_conversion_finds_outside_the_categories_is_dropped():
    """One that ignores its filter would show everything to somebody who is to see one category only."""
    store = Distances(ENTRIES)
    retriever = TwoStageRetriever.from_vectorstore(
        store,
        embeddings=Angles(),
        metric="cosine-distance",
        search=lambda vector, k, within: store.nearest(vector, k, {}),
        k=5,
        category_threshold=-1,
        document_threshold=-1,
        categories=["west"],
    )
    for mode in ("two-stage", "flat"):
        assert {document.metadata["category"] for document in retriever.invoke("180 degrees", mode=mode)} == {"west"}
    nothing = retriever.invoke("0 degrees", mode="flat", k=1)  # the nearest two are not of the category
    assert (ids(nothing), nothing.retrieval.outcome.value) == ([], "filtered_out")


def test_a_metric_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="'cosinus'"):
        TwoStageRetriever.from_vectorstore(filled(), metric="cosinus")


def test_a_metric_that_does_not_fit_is_found_out():
    with pytest.raises(InputError, match="is no relevance"):
        TwoStageRetriever.from_vectorstore(filled(), metric="relevance").invoke("180 degrees")


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_embeddings_must_be_given_where_the_store_has_none():
    with pytest.raises(InputError, match=r"Distances does not say what embeds.*give the embeddings"):
        TwoStageRetriever.from_vectorstore(Distances([]), metric="cosine", search=lambda vector, k, within: [])


def test_what_are_no_embeddings_is_refused():
    with pytest.raises(InputError, match="a str as embeddings"):
        TwoStageRetriever.from_vectorstore(filled(), embeddings="minilm")


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 10**400], ids=["inf", "-inf", "nan", "huge"])
@pytest.mark.parametrize("mode", ["two-stage", "flat"])
def test_a_filter_by_a_number_that_no_store_holds_is_refused(retriever, number, mode):
    with pytest.raises(InputError, match="a filter asks for a 'year' that is infinite"):
        retriever.invoke("0 degrees", where={"year": [2024, number]}, mode=mode)


def test_an_id_with_half_a_character_is_mended():
    broken = Document("0 degrees", id="a\ud800", metadata={"category": "east"})
    found = TwoStageRetriever.from_vectorstore(filled([broken]), document_threshold=0.5).invoke("0 degrees")
    assert ids(found) == ["a?"]


@pytest.mark.parametrize("metric", ["inner-product", "inner-product-distance", "l2-squared", "l2"])
def test_vectors_of_another_norm_are_refused_where_the_metric_needs_unit_vectors(metric):
    retriever = TwoStageRetriever.from_vectorstore(filled(embeddings=Angles(norm=3.0)), metric=metric)
    with pytest.raises(InputError, match=f"Angles have not norm 1 .* 3\\).*{metric}"):
        retriever.invoke("0 degrees")


def test_vectors_of_another_norm_are_no_matter_for_cosines():
    found = TwoStageRetriever.from_vectorstore(filled(embeddings=Angles(norm=3.0)), k=1).invoke("5 degrees")
    assert found[0].metadata["score"] == pytest.approx(math.cos(math.radians(5)))


@pytest.mark.parametrize(("category", "has"), [(None, "has no category"), (3, "has 3"), (" ", "has ' '"), (["a"], "has ")])
def test_an_entry_without_a_category_names_the_cure(category, has):
    store = filled([entry(0, category, dept="east")])
    with pytest.raises(
        InputError, match=rf"entry 'at 0' of InMemoryVectorStore {has}.*'category'.*category_key=.*'dept'"
    ) as caught:
        TwoStageRetriever.from_vectorstore(store).invoke("0 degrees")
    assert "give every entry one" in str(caught.value)


def test_an_entry_without_text_is_named():
    source = StoreSource(filled([]))
    with pytest.raises(InputError, match="'a' of InMemoryVectorStore has no text"):
        source._entry(Document(" ", id="a", metadata={"category": "east"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hybrid", False), ("lexical_weight", 0.5), ("reranker", lambda q, p: []), ("rerank_top", 5), ("diversity", 0.5)],
)
def test_what_a_store_has_not_is_refused(field, value):
    with pytest.raises(ValidationError, match=rf"{field}\n.*only a knowledge base"):
        TwoStageRetriever.from_vectorstore(filled(), **{field: value})


def test_words_are_no_mode_of_a_store(retriever):
    with pytest.raises(ValidationError, match="no words to search"):
        TwoStageRetriever.from_vectorstore(filled(), mode="lexical")
    with pytest.raises(InputError, match="'two-stage' or 'flat'"):
        retriever.invoke("0 degrees", mode="lexical")


def test_an_option_of_knowledge_bases_is_refused_in_a_call(retriever):
    with pytest.raises(InputError, match="no option 'hybrid'"):
        retriever.invoke("0 degrees", hybrid=False)


def test_a_field_out_of_its_range_is_refused_at_once():
    with pytest.raises(ValidationError, match="probe"):
        TwoStageRetriever.from_vectorstore(filled(), probe=0)


def test_a_knowledge_base_beside_a_store_is_refused(retriever, words):
    kb = KnowledgeBase.from_documents([Page(id="a", text="red", category="colours")], words)
    with pytest.raises(ValidationError, match="either a knowledge base or a vector store"):
        TwoStageRetriever(source=retriever.source, knowledge_base=kb)


def test_without_a_stage_one_entries_need_no_category():
    over_store = TwoStageRetriever.from_vectorstore(filled([entry(0, None), entry(90, "north")]), document_threshold=0.5)
    (found,) = over_store.invoke("1", mode="flat")
    assert (found.id, found.metadata["category"]) == ("at 0", "uncategorised")


def test_a_category_with_white_space_around_it_is_found_in_the_store():
    entries = [*(entry(angle, "east ") for angle in (1, 2)), *(entry(angle, "north") for angle in range(3, 40))]
    over_store = TwoStageRetriever.from_vectorstore(filled(entries), k=2, probe=4, category_threshold=0, document_threshold=0)
    assert [document.id for document in over_store.invoke("0", max_categories=1)] == ["at 1", "at 2"]
