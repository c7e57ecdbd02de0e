import asyncio
import copy
import math
import threading

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.stores import InMemoryByteStore
from langchain_gemma_rag import RoleSafeCache, ThresholdFilter
from pydantic import ValidationError

from gemma_rag import GemmaEmbeddings
from gemma_rag.errors import InputError
from gemma_rag.prompts import Task
from gemma_rag.thresholds import Cut, DynamicThreshold


class Angles(Embeddings):
    """The text is an angle in degrees; a question's is turned by 60 degrees."""

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([str(float(text) + 60)])[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[3 * math.cos(math.radians(float(text))), 3 * math.sin(math.radians(float(text)))] for text in texts]


class Fixed(BaseRetriever):
    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def scored(*scores: float, key: str = "score") -> list[Document]:
    return [Document(f"text {i}", id=str(i), metadata={key: score}) for i, score in enumerate(scores)]


def ids(documents) -> list[str]:
    return [document.id for document in documents]


@pytest.fixture(scope="module")
def gemma(tiny_gemma) -> GemmaEmbeddings:
    return GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)


# -- scores in the metadata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.6, ["0", "1", "2"]),
        ("strict", ["0"]),
        ("balanced", ["0", "1"]),
        ("loose", ["0", "1", "2"]),
        ("dynamic", ["0", "1", "2"]),
        (DynamicThreshold(ratio=1.0, top_n=3), ["0", "1"]),
        (DynamicThreshold(floor=0.95), []),
    ],
)
def test_each_form_of_threshold_works(threshold, kept):
    documents = scored(0.9, 0.8, 0.6, 0.2)  # the mean of all is 0.625, of the best three 0.767; 0.85 of the former is 0.53
    assert ids(ThresholdFilter(threshold=threshold).compress_documents(documents, "question")) == kept


def test_a_threshold_of_ones_own_works():
    class BestOnly:
        def apply(self, scores):
            return Cut(np.asarray(scores) == max(scores), max(scores))

    assert ids(ThresholdFilter(threshold=BestOnly()).compress_documents(scored(0.1, 0.3, 0.2), "q")) == ["1"]


def test_the_order_is_kept():
    assert ids(ThresholdFilter(threshold=0.3).compress_documents(scored(0.4, 0.1, 0.9), "q")) == ["0", "2"]


def test_the_key_of_the_score_can_be_named():
    documents = scored(0.9, 0.1, key="relevance_score")
    assert ids(ThresholdFilter(threshold=0.5, score_key="relevance_score").compress_documents(documents, "q")) == ["0"]


def test_scores_of_numpy_count():
    assert len(ThresholdFilter(threshold=0.5).compress_documents(scored(np.float32(0.9)), "q")) == 1


def test_no_documents_give_none():
    assert ThresholdFilter(threshold=0.5).compress_documents([], "q") == []


def test_no_documents_are_not_embedded():
    assert ThresholdFilter(threshold=0.5, embeddings=Angles()).compress_documents([], "no angle") == []


def test_a_missing_score_names_the_document_and_the_cure():
    with pytest.raises(InputError, match=r"document 'x' has no score .*'score'.*score_key=.*embeddings="):
        ThresholdFilter(threshold=0.5).compress_documents([Document("text", id="x")], "q")


def test_a_missing_score_of_a_document_without_an_id_names_its_index():
    with pytest.raises(InputError, match="document at index 1 has no score"):
        ThresholdFilter(threshold=0.5).compress_documents([*scored(0.9), Document("text")], "q")


@pytest.mark.parametrize("score", ["0.9", True, math.nan, math.inf])
def test_what_is_no_finite_number_is_no_score(score):
    with pytest.raises(InputError, match="no finite number"):
        ThresholdFilter(threshold=0.5).compress_documents(scored(score), "q")


# -- scores by embedding ------------------------------------------------------------------------------------------------


def test_scores_are_computed_by_embedding():
    documents = [Document("60", id="same"), Document("90", id="30 degrees off"), Document("150", id="90 degrees off")]
    kept = ThresholdFilter(threshold=0.5, embeddings=Angles()).compress_documents(documents, "0")
    assert [(each.id, round(each.metadata["score"], 5)) for each in kept] == [("same", 1.0), ("30 degrees off", 0.86603)]


def test_with_embeddings_scores_of_the_metadata_count_for_nothing():
    documents = [Document("240", id="opposite", metadata={"score": 0.99})]
    assert ThresholdFilter(threshold=0.5, embeddings=Angles()).compress_documents(documents, "0") == []


def test_the_input_is_never_changed():
    documents = [Document("60", id="a", metadata={"year": 2024})]
    before = copy.deepcopy(documents)
    kept = ThresholdFilter(threshold=0.5, embeddings=Angles()).compress_documents(documents, "0")
    assert documents == before
    assert kept[0].metadata == {"year": 2024, "score": pytest.approx(1.0)}


def test_symmetric_embeds_both_sides_as_documents():
    kept = ThresholdFilter(threshold="strict", embeddings=Angles(), symmetric=True).compress_documents([Document("10")], "10")
    assert kept[0].metadata["score"] == pytest.approx(1.0)


def test_gemma_embeddings_get_the_title_and_the_query_prompt(gemma):
    document = Document("Everyone has 27 days.", metadata={"title": "Leave"})
    kept = ThresholdFilter(threshold=-1.0, embeddings=gemma).compress_documents([document], "How many days?")
    true = np.dot(gemma.embed_query("How many days?"), gemma.embed_documents(["Everyone has 27 days."], ["Leave"])[0])
    assert kept[0].metadata["score"] == pytest.approx(true, abs=1e-6)


def test_symmetric_uses_the_similarity_prompt_of_gemma_embeddings(gemma):
    kept = ThresholdFilter(threshold=-1.0, embeddings=gemma, symmetric=True).compress_documents([Document("one")], "two")
    rows = gemma.embed(["one", "two"], Task.SIMILARITY)
    assert kept[0].metadata["score"] == pytest.approx(float(rows[0] @ rows[1]), abs=1e-6)


def test_the_same_text_has_similarity_1(gemma):
    kept = ThresholdFilter(threshold="strict", embeddings=gemma, symmetric=True).compress_documents([Document("one")], "one")
    assert kept[0].metadata["score"] == pytest.approx(1.0, abs=1e-6)


def test_a_cache_around_gemma_embeddings_changes_nothing(gemma):
    cached = RoleSafeCache(gemma, InMemoryByteStore())
    documents = [Document("one", metadata={"title": "T"})]
    for symmetric in (False, True):
        plain, kept = (
            ThresholdFilter(threshold=-1.0, embeddings=each, symmetric=symmetric).compress_documents(documents, "two")
            for each in (gemma, cached)
        )
        assert kept[0].metadata["score"] == pytest.approx(plain[0].metadata["score"], abs=1e-6)


# -- async --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
async def test_async_keeps_the_same(gemma, symmetric):
    documents = [Document(text, metadata={"title": "T"}) for text in ("one", "two", "three")]
    for embeddings in (gemma, RoleSafeCache(gemma, InMemoryByteStore())):
        chosen = ThresholdFilter(threshold=-1.0, embeddings=embeddings, symmetric=symmetric)
        sync, asynchronous = chosen.compress_documents(documents, "one"), await chosen.acompress_documents(documents, "one")
        assert [each.metadata["score"] for each in asynchronous] == pytest.approx(
            [each.metadata["score"] for each in sync], abs=1e-6
        )


async def test_async_with_scores_in_the_metadata():
    assert ids(await ThresholdFilter(threshold=0.5).acompress_documents(scored(0.9, 0.1), "q")) == ["0"]


async def test_the_event_loop_goes_on_while_texts_are_embedded():
    released = threading.Event()

    class Waiting(Angles):
        def embed_documents(self, texts):
            assert released.wait(10), "the event loop stood still"
            return super().embed_documents(texts)

    async def release():
        released.set()

    chosen = ThresholdFilter(threshold=0.5, embeddings=Waiting())
    kept, _ = await asyncio.gather(chosen.acompress_documents([Document("60")], "0"), release())
    assert len(kept) == 1


# -- inside LangChain ---------------------------------------------------------------------------------------------------


def test_it_filters_inside_a_contextual_compression_retriever(classic):
    retriever = classic("retrievers").ContextualCompressionRetriever(
        base_compressor=ThresholdFilter(threshold=0.5), base_retriever=Fixed(documents=scored(0.9, 0.1))
    )
    assert ids(retriever.invoke("q")) == ["0"]


async def test_it_filters_inside_a_contextual_compression_retriever_in_async(classic):
    retriever = classic("retrievers").ContextualCompressionRetriever(
        base_compressor=ThresholdFilter(threshold=0.5), base_retriever=Fixed(documents=scored(0.9, 0.1))
    )
    assert ids(await retriever.ainvoke("q")) == ["0"]


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["severe", 1.5, None, True, [0.5]])
def test_what_is_no_threshold_is_refused_at_once(threshold):
    with pytest.raises(ValidationError, match="threshold"):
        ThresholdFilter(threshold=threshold)


def test_symmetric_needs_embeddings():
    with pytest.raises(ValidationError, match="give embeddings="):
        ThresholdFilter(threshold=0.5, symmetric=True)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValidationError, match="cutoff"):
        ThresholdFilter(threshold=0.5, cutoff=0.5)


def test_errors_do_not_repeat_what_was_given():
    with pytest.raises(ValidationError) as caught:
        ThresholdFilter(threshold=0.5, embeddings="hf_" + "s" * 30)
    assert "hf_s" not in str(caught.value)


def test_a_threshold_can_be_changed_and_is_checked_then():
    chosen = ThresholdFilter(threshold=0.5)
    chosen.threshold = 0.95
    assert chosen.compress_documents(scored(0.9), "q") == []
    with pytest.raises(ValidationError):
        chosen.threshold = "severe"
    assert chosen.threshold == 0.95


def test_what_fails_to_be_assigned_has_no_effect():
    chosen = ThresholdFilter(threshold=0.5)
    with pytest.raises(ValidationError, match="give embeddings="):
        chosen.symmetric = True
    assert chosen.symmetric is False


def test_the_repr_is_short(gemma):
    assert repr(ThresholdFilter(threshold=0.5)) == "ThresholdFilter(threshold=0.5)"
    assert repr(ThresholdFilter(threshold="dynamic", embeddings=gemma)) == (
        "ThresholdFilter(threshold='dynamic', embeddings='GemmaEmbeddings')"
    )


def test_a_score_that_is_no_cosine_is_refused():
    for beyond in (10**400, -(10**400)):
        with pytest.raises(InputError, match="which is no finite number"):
            ThresholdFilter(threshold=0.4).compress_documents([Document("x", metadata={"score": beyond})], "q")
    with pytest.raises(InputError, match=r"the document 'a' has the score 5 .* which is no cosine"):
        ThresholdFilter(threshold=0.4).compress_documents([Document("x", id="a", metadata={"score": 5})], "q")
