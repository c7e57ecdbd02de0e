import asyncio
import threading

import numpy as np
import pytest
from llama_index.core import Settings
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import QueryBundle
from llama_index.core.tools import RetrieverTool
from llama_index_gemma_rag import GemmaEmbedding, TwoStageRetriever

from gemma_rag import Document, KnowledgeBase
from gemma_rag import TwoStageRetriever as Core
from gemma_rag.errors import InputError, KnowledgeBaseError
from gemma_rag.results import Outcome

QUESTIONS = ["How do I reset my password?", "How many days off do I get?", "May I fly business class?", "Why do cats purr?"]


def same(nodes, retrieval):
    assert [node.node_id for node in nodes] == [hit.document.id for hit in retrieval.hits]
    np.testing.assert_allclose([node.score for node in nodes], [hit.score for hit in retrieval.hits], atol=1e-6)


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_finds_what_the_core_finds(base, question):
    same(TwoStageRetriever(base).retrieve(question), Core(base).retrieve(question))


@pytest.mark.parametrize("question", QUESTIONS)
async def test_it_finds_the_same_asynchronously(base, question):
    same(await TwoStageRetriever(base).aretrieve(question), Core(base).retrieve(question))


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 1},
        {"document_threshold": 0.5},
        {"category_threshold": 0.9},
        {"mode": "flat"},
        {"mode": "lexical"},
        {"hybrid": False, "max_categories": 1},
        {"lexical_weight": 0.9, "diversity": 0.5},
    ],
)
def test_its_fields_are_the_cores(base, settings):
    for question in QUESTIONS:
        same(TwoStageRetriever(base, **settings).retrieve(question), Core(base, **settings).retrieve(question))


@pytest.mark.parametrize("filters", [{"categories": ["travel"]}, {"where": {"year": 2020}}])
def test_its_filters_are_the_cores(base, filters):
    for question in QUESTIONS:
        same(TwoStageRetriever(base, **filters).retrieve(question), Core(base).retrieve(question, **filters))


def test_a_folder_is_opened(documents, base, minilm, tmp_path):
    with KnowledgeBase.from_documents(documents, minilm) as saved:
        saved.save(tmp_path / "handbook")
    retriever = TwoStageRetriever(tmp_path / "handbook")
    same(retriever.retrieve(QUESTIONS[0]), Core(base).retrieve(QUESTIONS[0]))
    retriever.core.knowledge_base.close()


def test_a_folder_without_a_knowledge_base_is_refused(tmp_path):
    with pytest.raises(KnowledgeBaseError):
        TwoStageRetriever(tmp_path / "nothing")


def test_an_argument_out_of_its_range_is_refused(base):
    with pytest.raises(InputError, match="k is the number of hits"):
        TwoStageRetriever(base, k=0)


def test_a_query_bundle_is_searched_by_its_text(base):
    bundle = QueryBundle(QUESTIONS[0], embedding=[0.0] * 384)
    same(TwoStageRetriever(base).retrieve(bundle), Core(base).retrieve(QUESTIONS[0]))


def test_strings_to_embed_instead_of_the_question_are_named_as_unused(base, caplog):
    retriever = TwoStageRetriever(base)
    same(retriever.retrieve(QueryBundle(QUESTIONS[0], custom_embedding_strs=[QUESTIONS[0]])), Core(base).retrieve(QUESTIONS[0]))
    assert not caplog.records
    bundle = QueryBundle(QUESTIONS[0], custom_embedding_strs=["Use the portal.", QUESTIONS[0]])
    same(retriever.retrieve(bundle), Core(base).retrieve(QUESTIONS[0]))
    assert "2 strings to embed instead of it (custom_embedding_strs)" in caplog.text


def test_it_explains_why_there_is_nothing(base):
    retriever = TwoStageRetriever(base, category_threshold=0.9)
    assert retriever.retrieve(QUESTIONS[0]) == []
    retrieval = retriever.explain(QUESTIONS[0])
    assert retrieval.outcome is Outcome.CATEGORY_BELOW_THRESHOLD
    assert retrieval.categories[0].name == "it"


async def test_it_explains_asynchronously_and_takes_other_settings_for_a_call(base):
    retrieval = await TwoStageRetriever(base, category_threshold=0.9).aexplain(QUESTIONS[0], category_threshold=0.1, k=1)
    assert [hit.document.id for hit in retrieval.hits] == ["password"]


def test_a_filter_of_a_call_takes_the_place_of_its_own(base):
    retriever = TwoStageRetriever(base, categories=["travel"], category_threshold=-1.0, document_threshold=-1.0)
    assert {hit.document.category for hit in retriever.explain(QUESTIONS[0]).hits} == {"travel"}
    assert {hit.document.category for hit in retriever.explain(QUESTIONS[0], categories=["people"]).hits} == {"people"}


def test_an_unknown_setting_of_a_call_is_refused(base):
    with pytest.raises(InputError, match="no setting top"):
        TwoStageRetriever(base).explain(QUESTIONS[0], top=3)


async def test_two_documents_of_one_text_are_both_found(minilm):
    pages = [Document(id=id_, title="VPN", text="Sign in to the VPN.", category="it") for id_ in ("a", "b")]
    retriever = TwoStageRetriever(KnowledgeBase.from_documents(pages, minilm))
    question = "How do I sign in to the VPN?"
    assert sorted(node.node_id for node in retriever.retrieve(question)) == ["a", "b"]
    assert sorted(node.node_id for node in await retriever.aretrieve(question)) == ["a", "b"]


def test_a_node_embedded_anew_has_the_vector_of_the_knowledge_base(base, minilm):
    found = TwoStageRetriever(base).retrieve(QUESTIONS[0])[0]
    (again,) = GemmaEmbedding(minilm)([found.node])
    question = minilm.embed_query(QUESTIONS[0])
    assert np.dot(again.embedding, question) == pytest.approx(found.score, abs=1e-5)


async def test_the_event_loop_is_not_held_up(base, monkeypatch):
    retriever, threads = TwoStageRetriever(base), []
    retrieve = Core.retrieve

    def noted(self, *args, **options):
        threads.append(threading.get_ident())
        return retrieve(self, *args, **options)

    monkeypatch.setattr(Core, "retrieve", noted)
    await asyncio.gather(*(retriever.aretrieve(question) for question in QUESTIONS))
    assert len(threads) == 4
    assert threading.get_ident() not in threads


def test_llama_indexs_own_query_engine_takes_it(base):
    engine = RetrieverQueryEngine.from_args(TwoStageRetriever(base, k=1), llm=MockLLM())
    response = engine.query(QUESTIONS[0])
    assert [node.node_id for node in response.source_nodes] == ["password"]
    assert "Reset a forgotten password" in str(response)  # the mock repeats its prompt
    assert "score" not in str(response)


def test_it_is_a_tool(base):
    output = RetrieverTool.from_defaults(TwoStageRetriever(base, k=1), name="handbook", description="pages").call(QUESTIONS[0])
    assert "Reset a forgotten password" in output.content
    assert "score" not in output.content


def test_it_needs_no_global_settings(base, monkeypatch):
    monkeypatch.setattr(Settings, "_embed_model", None)
    TwoStageRetriever(base).retrieve(QUESTIONS[0])
    assert Settings._embed_model is None
    assert Settings._llm is None
