import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.postprocessor import LongContextReorder, SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index_gemma_rag import GemmaEmbedding, GroundedQueryEngine, ThresholdPostprocessor, TwoStageRetriever
from pydantic import PrivateAttr

from gemma_rag import GroundedAnswerer
from gemma_rag import TwoStageRetriever as Core
from gemma_rag.errors import InputError

QUESTION = "How do I reset my password?"
OFF_TOPIC = "Why do cats purr?"


class Counting(CustomLLM):
    """Says what it is told to, word by word, and counts how often it is asked."""

    says: str = "Reset it in the portal [1]."
    _prompts: list[str] = PrivateAttr(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata()

    def complete(self, prompt, formatted=False, **kwargs):
        self._prompts.append(prompt)
        return CompletionResponse(text=self.says)

    def stream_complete(self, prompt, formatted=False, **kwargs):
        self._prompts.append(prompt)

        def words():
            text = ""
            for word in self.says.split(" "):
                delta = word if not text else f" {word}"
                text += delta
                yield CompletionResponse(text=text, delta=delta)

        return words()


def writer(says="Reset it in the portal [1]."):
    asked = []

    def write(system, user):
        asked.append(threading.get_ident())
        yield from says.split("|")

    write.asked = asked
    return write


@pytest.fixture
def retriever(base):
    return TwoStageRetriever(base)


@pytest.fixture(scope="module")
def index(documents, minilm):
    nodes = [TextNode(id_=each.id, text=each.text, metadata={"title": each.title}) for each in documents]
    return VectorStoreIndex(nodes, embed_model=GemmaEmbedding(minilm))


async def ask(engine, question, way):
    """The response to a question, by each of the ways to ask: its text and the rest."""
    if way == "query":
        response = engine.query(question)
    elif way == "aquery":
        response = await engine.aquery(question)
    elif way == "stream":
        engine._streaming = True
        streaming = engine.query(question)
        assert isinstance(streaming, StreamingResponse)
        response = streaming.get_response()
    else:
        engine._streaming = True
        streaming = await engine.aquery(question)
        assert isinstance(streaming, AsyncStreamingResponse)
        response = await streaming.get_response()
    assert isinstance(response, Response)
    return response


WAYS = pytest.mark.parametrize("way", ["query", "aquery", "stream", "astream"])


# -- quoted, written, refused -------------------------------------------------------------------------------------------


@WAYS
async def test_without_a_model_sentences_are_quoted_as_the_core_does(base, retriever, way):
    response = await ask(GroundedQueryEngine(retriever), QUESTION, way)
    answer = GroundedAnswerer(Core(base)).answer(QUESTION)
    assert response.response == answer.text
    assert response.metadata == {
        "outcome": "answered",
        "kind": "extractive",
        "citations": answer.to_json()["citations"],
        "unknown_citations": [],
    }
    assert [node.node_id for node in response.source_nodes] == [hit.document.id for hit in answer.retrieval.hits]


@WAYS
async def test_a_model_writes_from_the_sources(retriever, way):
    model = Counting()
    response = await ask(GroundedQueryEngine(retriever, model), QUESTION, way)
    assert response.response == model.says
    assert response.metadata["kind"] == "generated"
    assert [each["id"] for each in response.metadata["citations"]] == ["password"]
    assert response.source_nodes[0].node_id == "password"
    assert len(model._prompts) == 1
    assert "Reset a forgotten password" in model._prompts[0]
    assert QUESTION in model._prompts[0]


@WAYS
async def test_a_function_writes_too(retriever, way):
    response = await ask(GroundedQueryEngine(retriever, writer("Reset it |in the portal [1][9].")), QUESTION, way)
    assert response.response == "Reset it in the portal [1][9]."
    assert response.metadata["unknown_citations"] == [9]


@WAYS
async def test_where_nothing_was_found_no_model_is_asked(retriever, way):
    model = Counting()
    response = await ask(GroundedQueryEngine(retriever, model), OFF_TOPIC, way)
    assert model._prompts == []
    assert response.response == "I don't know. The question fits none of the categories well enough."
    assert response.metadata == {
        "outcome": "category_below_threshold",
        "kind": "refusal",
        "citations": [],
        "unknown_citations": [],
    }
    assert response.source_nodes == []


@WAYS
async def test_a_model_that_does_not_know_makes_a_refusal_that_is_said_once(retriever, way):
    response = await ask(GroundedQueryEngine(retriever, Counting(says="I don't know.")), QUESTION, way)
    assert response.response == "I don't know. The language model found no answer in the documents."
    assert response.metadata["outcome"] == "declined_by_model"


@pytest.mark.parametrize(("language", "start"), [("en", "I don't know."), ("zh", "我不知道")])
def test_the_language_can_be_chosen(retriever, language, start):
    assert str(GroundedQueryEngine(retriever, language=language).query(OFF_TOPIC)).startswith(start)


@pytest.mark.parametrize("llm", ["gpt", 7, Core])
def test_what_cannot_write_is_refused(retriever, llm):
    class ChatModel:
        def stream(self): ...

    with pytest.raises(InputError, match=r"LlamaIndex LLM or a function .*LangChainLLM"):
        GroundedQueryEngine(retriever, ChatModel() if llm is Core else llm)


async def awaited(system, user):
    return "text"


async def awaited_pieces(system, user):
    yield "text"


class Awaited:
    async def __call__(self, system, user):
        return "text"


@pytest.mark.parametrize("llm", [awaited, awaited_pieces, partial(awaited, "system"), Awaited()])
def test_an_asynchronous_function_is_refused_with_the_cure(retriever, llm):
    with pytest.raises(InputError, match=r"asynchronous function \(async def\).*give a function that yields text"):
        GroundedQueryEngine(retriever, llm)


def test_another_language_is_refused(retriever):
    with pytest.raises(InputError, match="'en' or 'zh', and is 'fr'"):
        GroundedQueryEngine(retriever, language="fr")


def test_what_a_model_raises_comes_through(retriever):
    def broken(system, user):
        raise TimeoutError("too slow")

    with pytest.raises(TimeoutError, match="too slow"):
        GroundedQueryEngine(retriever, broken).query(QUESTION)


# -- streaming ----------------------------------------------------------------------------------------------------------


def test_pieces_come_as_they_are_written(retriever):
    response = GroundedQueryEngine(retriever, writer("Reset |it [1]|."), streaming=True).query(QUESTION)
    assert response.metadata["outcome"] is None
    assert list(response.response_gen) == ["Reset", " it [1]", "."]
    assert response.metadata["outcome"] == "answered"


async def test_pieces_come_as_they_are_written_asynchronously(retriever):
    response = await GroundedQueryEngine(retriever, writer("Reset |it [1]|."), streaming=True).aquery(QUESTION)
    assert response.metadata["outcome"] is None
    assert [piece async for piece in response.async_response_gen()] == ["Reset", " it [1]", "."]
    assert response.metadata["outcome"] == "answered"


async def test_a_function_does_not_hold_up_the_event_loop(retriever):
    write = writer()
    await GroundedQueryEngine(retriever, write).aquery(QUESTION)
    await (await GroundedQueryEngine(retriever, write, streaming=True).aquery(QUESTION)).get_response()
    assert len(write.asked) == 2
    assert threading.get_ident() not in write.asked


# -- other retrievers, postprocessors -----------------------------------------------------------------------------------


@WAYS
async def test_any_retriever_serves(index, way):
    response = await ask(GroundedQueryEngine(index.as_retriever(similarity_top_k=2), Counting()), QUESTION, way)
    assert response.metadata["outcome"] == "answered"
    assert [each["id"] for each in response.metadata["citations"]] == ["password"]
    assert [each["title"] for each in response.metadata["citations"]] == ["Passwords"]


def test_sentences_of_another_retriever_are_quoted(index):
    response = GroundedQueryEngine(index.as_retriever(similarity_top_k=2)).query(QUESTION)
    assert str(response).startswith("“Reset a forgotten password in the self-service portal.” [1]")


@WAYS
async def test_thresholds_over_another_retriever_refuse(index, way):
    model = Counting()
    engine = GroundedQueryEngine(index.as_retriever(), model, node_postprocessors=[ThresholdPostprocessor(threshold=0.5)])
    response = await ask(engine, OFF_TOPIC, way)
    assert response.metadata["outcome"] == "filtered_out"
    assert model._prompts == []


def test_another_retriever_that_finds_nothing_refuses(minilm):
    empty = VectorStoreIndex([], embed_model=GemmaEmbedding(minilm)).as_retriever()
    response = GroundedQueryEngine(empty, Counting()).query(QUESTION)
    assert response.metadata["outcome"] == "nothing_retrieved"


def test_a_retriever_around_ours_gives_its_own_reasons(retriever):
    fusion = QueryFusionRetriever([retriever], llm=Counting(), num_queries=1, use_async=False)
    assert GroundedQueryEngine(fusion).query(QUESTION).metadata["outcome"] == "answered"
    assert GroundedQueryEngine(fusion).query(OFF_TOPIC).metadata["outcome"] == "nothing_retrieved"


class Paraphrasing(Counting):
    """Makes three questions of one."""

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text="How do I set a new password?\nWhere is my password reset?")


def test_questions_that_find_the_same_are_fused(retriever):
    fusion = QueryFusionRetriever([retriever], llm=Paraphrasing(), num_queries=3, use_async=False, mode="reciprocal_rerank")
    nodes = fusion._retrieve(QueryBundle(QUESTION))
    assert len({node.node_id for node in nodes}) == len(nodes)
    assert nodes[0].score == pytest.approx(3 / 60)


class Hiding(BaseNodePostprocessor):
    """Takes titles out, as one that must not be seen."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        for each in nodes:
            each.node.metadata["title"] = "[hidden]"
        return nodes


def test_what_a_postprocessor_hides_does_not_reach_the_model(retriever):
    seen = []

    def write(system, user):
        seen.append(user)
        return ["It is so [1]."]

    response = GroundedQueryEngine(retriever, write, node_postprocessors=[Hiding()]).query(QUESTION)
    assert 'title="[hidden]' in seen[0]
    assert response.metadata["citations"][0]["title"] == "[hidden]"


class Noting(BaseNodePostprocessor):
    """Adds what changes nothing that a model reads."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        for each in nodes:
            each.node.metadata["seen"] = True
        return nodes


@pytest.mark.parametrize("postprocessors", [[], [Noting()]])
def test_titles_and_categories_under_other_keys_are_cited(minilm, postprocessors):
    page = TextNode(id_="n", text="Reset a password in the portal.", metadata={"topic": "it", "name": "Passwords"})
    index = VectorStoreIndex([page], embed_model=GemmaEmbedding(minilm))
    retriever = TwoStageRetriever.from_index(index, category_key="topic", title_key="name", document_threshold=0.1)
    engine = GroundedQueryEngine(retriever, node_postprocessors=postprocessors)
    for response in (engine.query(QUESTION), engine.synthesize(QueryBundle(QUESTION), engine.retrieve(QueryBundle(QUESTION)))):
        (citation,) = response.metadata["citations"]
        assert (citation["title"], citation["category"]) == ("Passwords", "it")


def test_a_postprocessor_that_takes_everything_leaves_a_refusal(retriever):
    engine = GroundedQueryEngine(retriever, Counting(), node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.99)])
    response = engine.query(QUESTION)
    assert response.metadata["outcome"] == "filtered_out"
    assert response.source_nodes == []


def test_numbers_count_after_the_postprocessors(base):
    retriever = TwoStageRetriever(base, k=3, category_threshold=-1.0, document_threshold=-1.0, hybrid=False)
    plain = [node.node_id for node in retriever.retrieve(QUESTION)]
    response = GroundedQueryEngine(retriever, Counting(), node_postprocessors=[LongContextReorder()]).query(QUESTION)
    reordered = [node.node_id for node in response.source_nodes]
    assert sorted(reordered) == sorted(plain)
    assert reordered != plain
    assert response.metadata["citations"][0]["id"] == reordered[0]


def test_nodes_without_a_text_are_no_sources(retriever):
    nodes = [ImageNode(image_url="http://host/a.png"), TextNode(id_="n", text="Reset it in the portal.")]
    response = GroundedQueryEngine(retriever, Counting()).synthesize(
        QueryBundle(QUESTION), [NodeWithScore(node=node, score=0.5) for node in nodes]
    )
    assert [node.node_id for node in response.source_nodes] == ["n"]
    assert response.metadata["citations"][0]["id"] == "n"


# -- as a part of LlamaIndex --------------------------------------------------------------------------------------------


async def test_it_retrieves_and_synthesizes_in_two_steps(retriever):
    engine, query, model = GroundedQueryEngine(retriever, Counting()), QueryBundle(QUESTION), Counting()
    nodes = engine.retrieve(query)
    assert [node.node_id for node in nodes] == [node.node_id for node in await engine.aretrieve(query)]
    assert str(engine.synthesize(query, nodes)) == model.says
    assert str(await engine.asynthesize(query, nodes)) == model.says
    extra = [NodeWithScore(node=TextNode(id_="extra", text="Extra"))]
    assert engine.synthesize(query, nodes, extra).source_nodes[-1].node_id == "extra"


def test_it_is_a_tool(retriever):
    tool = QueryEngineTool.from_defaults(GroundedQueryEngine(retriever), name="handbook", description="the handbook")
    assert "[1]" in tool.call(QUESTION).content


# -- several at once ----------------------------------------------------------------------------------------------------

MIXED = [QUESTION, OFF_TOPIC, "May I fly business class?", "What is the capital of Peru?"] * 5


def test_threads_do_not_mix_up_their_reasons(retriever):
    engine = GroundedQueryEngine(retriever)
    wanted = [retriever.explain(question).outcome.value for question in MIXED]
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(engine.query, MIXED))
    assert [response.metadata["outcome"] for response in responses] == wanted


async def test_tasks_do_not_mix_up_their_reasons(retriever):
    engine = GroundedQueryEngine(retriever)
    wanted = [retriever.explain(question).outcome.value for question in MIXED]
    responses = await asyncio.gather(*map(engine.aquery, MIXED))
    assert [response.metadata["outcome"] for response in responses] == wanted
    assert len(set(wanted)) > 1
