import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index_gemma_rag import GemmaEmbedding, GroundedQueryEngine, TwoStageRetriever

SECRET = "hf_" + "madeup" * 5
QUESTION = "How do I reset my password?"


def test_embedding_is_told_of_without_secrets(listener):
    GemmaEmbedding(model="minilm", token=SECRET, show_progress=False).get_text_embedding_batch(["one", "two"])
    start, end = listener.heard
    assert isinstance(start, EmbeddingStartEvent)
    assert isinstance(end, EmbeddingEndEvent)
    assert start.model_dict["class_name"] == "GemmaEmbedding"
    assert start.model_dict["model_name"] == "minilm"
    assert end.chunks == ["one", "two"]
    assert SECRET not in repr(listener.heard)


async def test_asynchronous_embedding_is_told_of(listener, gemma):
    model = GemmaEmbedding(gemma)
    await model.aget_text_embedding_batch(["one"])
    await model.aget_query_embedding("one")
    assert listener.names() == ["EmbeddingStartEvent", "EmbeddingEndEvent"] * 2


def test_retrieving_is_told_of(listener, base):
    nodes = TwoStageRetriever(base).retrieve(QUESTION)
    assert listener.names() == ["RetrievalStartEvent", "RetrievalEndEvent"]
    end = listener.heard[-1]
    assert isinstance(end, RetrievalEndEvent)
    assert [node.node_id for node in end.nodes] == [node.node_id for node in nodes]


@pytest.mark.parametrize("question", [QUESTION, "Why do cats purr?"])
def test_a_query_is_told_of(listener, base, question):
    GroundedQueryEngine(TwoStageRetriever(base)).query(question)
    assert listener.names() == ["QueryStartEvent", "RetrievalStartEvent", "RetrievalEndEvent", "QueryEndEvent"]


async def test_an_asynchronous_query_is_told_of(listener, base):
    await GroundedQueryEngine(TwoStageRetriever(base)).aquery(QUESTION)
    assert listener.names() == ["QueryStartEvent", "RetrievalStartEvent", "RetrievalEndEvent", "QueryEndEvent"]


def test_callbacks_of_the_older_kind_are_called(base):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    GroundedQueryEngine(TwoStageRetriever(base, callback_manager=manager), callback_manager=manager).query(QUESTION)
    assert len(debug.get_event_pairs(CBEventType.QUERY)) == 1
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 1
