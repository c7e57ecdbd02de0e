import asyncio
import copy
import json
import math
import pickle
import threading

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.load import dumps
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gemma_rag import Retrieved, TwoStageRetriever
from pydantic import ValidationError

from gemma_rag import Document as Page
from gemma_rag import DynamicThreshold, KnowledgeBase
from gemma_rag.errors import InputError, KnowledgeBaseError, ModelUnavailable
from gemma_rag.retriever import TwoStageRetriever as CoreRetriever


@pytest.fixture
def retriever(kb) -> TwoStageRetriever:
    return TwoStageRetriever(knowledge_base=kb, k=4)


def ids(documents) -> list[str]:
    return [document.id for document in documents]


# -- what comes back ----------------------------------------------------------------------------------------------------


def test_it_finds_what_the_core_finds(kb, retriever):
    found, core = retriever.invoke("red apple"), CoreRetriever(kb, k=4).retrieve("red apple")
    assert ids(found) == [hit.document.id for hit in core.hits]
    assert [each.metadata["score"] for each in found] == pytest.approx([hit.score for hit in core.hits], abs=1e-6)


def test_documents_are_langchains_with_their_scores(retriever):
    document = retriever.invoke("red")[0]
    assert isinstance(document, Document)
    assert (document.id, document.page_content) == ("red", "red red red")
    assert document.metadata["title"] == "Red"
    assert document.metadata["category"] == "colours"
    assert document.metadata["year"] == 2023
    assert document.metadata["score"] == pytest.approx(1.0, abs=1e-4)
    assert 0.5 < document.metadata["category_score"] <= 1.0


def test_metadata_is_plain_json(retriever):
    for document in retriever.invoke("red", mode="flat"):
        assert json.loads(json.dumps(document.metadata, allow_nan=False)) == document.metadata
        assert document.metadata["category_score"] is None


def test_a_refusal_is_an_empty_list_that_keeps_its_reason(retriever):
    found = retriever.invoke("nothing of it", document_threshold=0.9, category_threshold=0.9)
    assert found == []
    assert isinstance(found, Retrieved)
    assert found.retrieval.outcome.value == "category_below_threshold"


def test_retrieve_returns_the_cores_own_form(retriever):
    retrieval = retriever.retrieve("red", 1, document_threshold=0.2)
    assert [hit.document.id for hit in retrieval.hits] == ["red"]
    assert retrieval.thresholds["document"] == 0.2


async def test_aretrieve_returns_the_same(retriever):
    sync, asynchronous = retriever.retrieve("red", k=2), await retriever.aretrieve("red", k=2)
    assert asynchronous.hits == sync.hits


def test_the_encoder_is_that_of_the_knowledge_base(retriever, words):
    assert retriever.encoder is words


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_an_unknown_keyword_is_refused(retriever):
    with pytest.raises(InputError, match=r"no option 'kk': there are k, .*where"):
        retriever.invoke("red", kk=3)


async def test_an_unknown_keyword_is_refused_in_async(retriever):
    with pytest.raises(InputError, match="no option 'kk'"):
        await retriever.ainvoke("red", kk=3)


def test_an_unknown_keyword_that_is_none_is_refused(retriever):
    with pytest.raises(InputError, match="no option 'kk'"):
        retriever.invoke("red", kk=None)


def test_an_unknown_keyword_is_refused_in_batch(retriever):
    with pytest.raises(InputError, match="no option 'score_threshold'"):
        retriever.batch(["red"], score_threshold=0.4)


def test_an_unknown_keyword_of_retrieve_is_refused(retriever):
    with pytest.raises(InputError, match="no option 'kk'"):
        retriever.retrieve("red", kk=3)


def test_the_knowledge_base_is_no_option_of_a_call(kb, retriever):
    with pytest.raises(InputError, match="no option 'knowledge_base'"):
        retriever.invoke("red", knowledge_base=kb)


def test_a_known_keyword_out_of_its_range_is_refused(retriever):
    with pytest.raises(InputError, match="at least 1, and is 0"):
        retriever.invoke("red", k=0)


def test_an_empty_question_is_refused(retriever):
    with pytest.raises(InputError, match="empty"):
        retriever.invoke(" ")


def test_langchains_own_keywords_are_no_options_of_ours(retriever):
    assert len(retriever.invoke("red", k=1, verbose=True)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 0),
        ("k", True),
        ("k", "3"),
        ("mode", "three-stage"),
        ("category_threshold", "severe"),
        ("document_threshold", 2.0),
        ("lexical_weight", 1.5),
        ("gate", 0.9),
        ("max_categories", 0),
        ("reranker", 5),
        ("rerank_top", 0),
        ("diversity", -1.0),
        ("categories", "fruit"),
        ("where", "year"),
        ("probe", 8),
        ("top_k", 3),
    ],
)
def test_a_field_out_of_its_range_is_refused_at_once(kb, field, value):
    with pytest.raises(ValidationError, match=field):
        TwoStageRetriever(knowledge_base=kb, **{field: value})


def test_errors_do_not_repeat_what_was_given(kb):
    with pytest.raises(ValidationError) as caught:
        TwoStageRetriever(knowledge_base=kb, api_key="sk-" + "s" * 40)
    assert "api_key" in str(caught.value)
    assert "sk-" not in str(caught.value)


def test_without_anything_to_search_it_says_what_to_give():
    with pytest.raises(ValidationError, match="give knowledge_base="):
        TwoStageRetriever()


def test_what_is_no_knowledge_base_is_refused():
    with pytest.raises(ValidationError, match=r"1 validation error .*\nknowledge_base\n.*a int came"):
        TwoStageRetriever(knowledge_base=3)


def test_a_wrong_path_is_an_error_at_once(tmp_path):
    with pytest.raises(KnowledgeBaseError, match="nowhere"):
        TwoStageRetriever(knowledge_base=tmp_path / "nowhere")


# -- paths, copies, changes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(minilm, tmp_path_factory):
    pages = [Page(id=word, text=word, category="words") for word in ("apple", "car")]
    kb = KnowledgeBase.from_documents(pages, minilm)
    kb.save(path := tmp_path_factory.mktemp("kb") / "saved")
    kb.close()
    return path


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_path_is_opened(folder, kind):
    retriever = TwoStageRetriever(knowledge_base=kind(folder), k=1)
    assert ids(retriever.invoke("apple")) == ["apple"]


def test_a_retriever_over_a_folder_can_be_pickled(folder):
    retriever = TwoStageRetriever(knowledge_base=folder, k=1, document_threshold=DynamicThreshold())
    again = pickle.loads(pickle.dumps(retriever))
    assert (again.k, again.document_threshold) == (1, DynamicThreshold())
    assert ids(again.invoke("apple")) == ["apple"]


def test_a_retriever_over_memory_says_why_it_cannot_be_pickled(retriever):
    with pytest.raises(TypeError, match="save the knowledge base first"):
        pickle.dumps(retriever)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: each.model_copy(deep=True)])
def test_a_copy_shares_the_knowledge_base(kb, retriever, copied):
    again = copied(retriever)
    assert again.knowledge_base is kb
    assert ids(again.invoke("red")) == ids(retriever.invoke("red"))


def test_a_copy_with_another_field_uses_it(retriever):
    assert len(retriever.model_copy(update={"k": 1}).invoke("red")) == 1
    assert len(retriever.invoke("red")) > 1


def test_a_field_can_be_changed(retriever):
    retriever.k = 1
    assert len(retriever.invoke("red")) == 1


def test_a_field_cannot_be_changed_to_nonsense(retriever):
    with pytest.raises(ValidationError):
        retriever.k = 0
    assert len(retriever.invoke("red")) > 1


@pytest.mark.parametrize(("field", "value"), [("knowledge_base", None), ("reranker", 3)])
def test_what_fails_to_be_assigned_has_no_effect(kb, retriever, field, value):
    """These are refused by the check of the retriever as a whole, which pydantic makes after it has assigned."""
    before, found = retriever._fields(), ids(retriever.invoke("red"))
    chosen = set(retriever.model_fields_set)
    with pytest.raises(ValidationError):
        setattr(retriever, field, value)
    assert (retriever._fields(), retriever.model_fields_set) == (before, chosen)
    assert ids(retriever.invoke("red")) == found


def test_an_assignment_that_a_model_fails_has_no_effect(retriever, monkeypatch):
    def absent(*args, **kwargs):
        raise ModelUnavailable("no such model")

    monkeypatch.setattr(TwoStageRetriever, "_core", absent)
    with pytest.raises(ModelUnavailable):
        retriever.reranker = "somebody/model"
    assert retriever.reranker is None


def test_a_store_cannot_be_put_beside_a_knowledge_base_later(retriever):
    source = TwoStageRetriever.from_vectorstore(InMemoryVectorStore(DeterministicFakeEmbedding(size=4))).source
    with pytest.raises(ValidationError, match="either a knowledge base or a vector store"):
        retriever.source = source
    assert retriever.source is None
    assert retriever.invoke("red")


def test_the_repr_is_short_and_names_what_was_set(kb):
    shown = repr(TwoStageRetriever(knowledge_base=kb, k=3, document_threshold=0.4))
    assert shown == (
        "TwoStageRetriever(<KnowledgeBase in memory: 6 documents, words, 10 dimensions>, k=3, document_threshold=0.4)"
    )


def test_langchains_serialisation_holds_the_repr_and_no_document(retriever):
    written = dumps(retriever)
    assert json.loads(written)["type"] == "not_implemented"
    assert "red red red" not in written


# -- async and traces ---------------------------------------------------------------------------------------------------


async def test_the_event_loop_goes_on_while_it_searches(kb, words):
    released = threading.Event()
    retriever = TwoStageRetriever(knowledge_base=kb)
    encode = words.encode

    def waiting(inputs):
        assert released.wait(10), "the event loop stood still"
        return encode(inputs)

    async def release():
        released.set()

    words.encode = waiting
    found, _ = await asyncio.gather(retriever.ainvoke("red"), release())
    assert found


def traced(retriever, *args, **kwargs):
    collector = RunCollectorCallbackHandler()
    retriever.with_config(callbacks=[collector]).invoke(*args, **kwargs)
    (run,) = collector.traced_runs
    return run


def test_a_run_says_how_the_question_ended(retriever):
    metadata = traced(retriever, "red").extra["metadata"]
    assert metadata["gemma_rag_outcome"] == "answered"
    assert metadata["gemma_rag_mode"] == "two-stage"
    assert metadata["gemma_rag_documents_scored"] >= 1
    assert json.dumps(metadata)


def test_a_run_of_a_refusal_says_why(retriever):
    run = traced(retriever, "red", category_threshold=0.999999)
    assert run.outputs["documents"] == []
    assert run.extra["metadata"]["gemma_rag_outcome"] == "category_below_threshold"
    assert run.extra["metadata"]["gemma_rag_reason"].startswith("The question fits none")


async def test_an_async_run_says_how_the_question_ended(retriever):
    collector = RunCollectorCallbackHandler()
    await retriever.ainvoke("red", {"callbacks": [collector]})
    assert collector.traced_runs[0].extra["metadata"]["gemma_rag_outcome"] == "answered"


def test_runs_of_a_batch_keep_their_own_outcomes(retriever):
    collector = RunCollectorCallbackHandler()
    retriever.with_config(callbacks=[collector], metadata={"team": "search"}).batch(["red", "plum"], document_threshold=0.5)
    outcomes = {run.inputs["query"]: run.extra["metadata"]["gemma_rag_outcome"] for run in collector.traced_runs}
    assert outcomes == {"red": "answered", "plum": "document_below_threshold"}
    assert all(run.extra["metadata"]["team"] == "search" for run in collector.traced_runs)


def test_the_outcome_does_not_leak_into_other_runs(retriever):
    collector = RunCollectorCallbackHandler()
    (retriever | RunnableLambda(len)).invoke("red", {"callbacks": [collector], "metadata": {"team": "search"}})
    (chain,) = collector.traced_runs
    found, counted = chain.child_runs
    assert "gemma_rag_outcome" in found.extra["metadata"]
    assert "gemma_rag_outcome" not in chain.extra["metadata"]
    assert "gemma_rag_outcome" not in counted.extra["metadata"]


def test_the_metadata_of_the_retriever_itself_stays_as_it_is(kb):
    retriever = TwoStageRetriever(knowledge_base=kb, metadata={"team": "search"}, tags=["mine"])
    run = traced(retriever, "red")
    assert run.extra["metadata"]["team"] == "search"
    assert "mine" in run.tags
    assert retriever.metadata == {"team": "search"}


def test_a_failed_run_carries_its_error(retriever):
    collector = RunCollectorCallbackHandler()
    with pytest.raises(InputError):
        retriever.invoke("red", {"callbacks": [collector]}, kk=1)
    assert "no option 'kk'" in collector.traced_runs[0].error


def test_langsmith_is_told_what_searched(retriever):
    assert retriever._get_ls_params() == {
        "ls_retriever_name": "twostage",
        "ls_vector_store_provider": "KnowledgeBase",
        "ls_embedding_provider": "test",
        "ls_embedding_model": "words",
    }


def test_the_stream_of_events_shows_the_documents_and_the_outcome(retriever):
    async def ended():
        return [event async for event in retriever.astream_events("red", version="v2") if event["event"] == "on_retriever_end"]

    (event,) = asyncio.run(ended())
    assert ids(event["data"]["output"]) == ids(retriever.invoke("red"))
    assert event["metadata"]["gemma_rag_outcome"] == "answered"


def test_scores_are_no_nan(retriever):
    assert not any(math.isnan(each.metadata["score"]) for each in retriever.invoke("red"))


def test_a_folder_may_begin_with_the_home(kb, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kb.save(tmp_path / "kb")
    with pytest.raises(InputError, match="encoder of your own"):  # it was opened, and asks for what made its vectors
        TwoStageRetriever(knowledge_base="~/kb").invoke("red")
