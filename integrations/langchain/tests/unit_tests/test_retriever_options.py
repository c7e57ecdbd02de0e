"""Options: as fields, for a call, in the configuration."""

import inspect
import json

import pytest
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_gemma_rag import TwoStageRetriever

from gemma_rag import Document as Page
from gemma_rag import KnowledgeBase
from gemma_rag.retriever import TwoStageRetriever as CoreRetriever
from gemma_rag.routing import Gate


@pytest.fixture
def retriever(kb) -> TwoStageRetriever:
    return TwoStageRetriever(knowledge_base=kb, k=4)


def ids(documents) -> list[str]:
    return [document.id for document in documents]


QUESTION = "red zebra"
"""Its second word is one that the vectors do not know."""
PAGES = [
    Page(id="red", text="red red red", category="colours", metadata={"year": 2023}),
    Page(id="green", text="green red", category="colours", metadata={"year": 2024}),
    Page(id="zebra", text="blue red zebra zebra", category="colours", metadata={"year": 2024}),
    Page(id="cherry", text="red apple", category="red fruit", metadata={"year": 2023}),
    Page(id="pear", text="pear apple", category="red fruit"),
    Page(id="car", text="red car bus tram", category="traffic/road"),
]


def shortest_first(question, passages):
    return [-len(passage) for passage in passages]


OPTIONS = {
    "k": 1,
    "category_threshold": 0.999999,
    "document_threshold": 0.99,
    "mode": "lexical",
    "hybrid": False,
    "lexical_weight": 0.0,
    "gate": Gate(name_weight=1.0),
    "max_categories": 1,
    "reranker": shortest_first,
    "rerank_top": 1,
    "diversity": 0.9,
    "categories": ["red fruit", "traffic"],
    "where": {"year": 2024},
}
BESIDE = {"gate": {"max_categories": 1}, "rerank_top": {"reranker": shortest_first}}
"""What an option needs beside it to make a difference."""


def test_every_field_of_the_core_can_be_given():
    fields = set(inspect.signature(CoreRetriever).parameters) - {"knowledge_base"}
    assert fields | {"categories", "where"} == set(OPTIONS)
    assert fields < set(TwoStageRetriever.model_fields)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_works_as_a_field_a_keyword_and_in_the_configuration(words, name):
    kb, beside, asked = KnowledgeBase.from_documents(PAGES, words), BESIDE.get(name, {}), {name: OPTIONS[name]}
    default = TwoStageRetriever(knowledge_base=kb, **beside)
    as_field = ids(TwoStageRetriever(knowledge_base=kb, **beside, **asked).invoke(QUESTION))
    assert as_field == [hit.document.id for hit in CoreRetriever(kb, **beside).retrieve(QUESTION, **asked).hits]
    assert as_field != ids(default.invoke(QUESTION))
    assert ids(default.invoke(QUESTION, **asked)) == as_field
    if name not in ("gate", "reranker"):  # which a configuration does not set
        assert ids(default.with_config(configurable=asked).invoke(QUESTION)) == as_field


async def test_keywords_work_in_async(retriever):
    assert len(await retriever.ainvoke("red", k=2)) == 2
    assert len((await retriever.ainvoke("red", k=1)).retrieval.hits) == 1


def test_keywords_work_in_batch(retriever):
    assert [len(found) for found in retriever.batch(["red", "apple"], k=1)] == [1, 1]


async def test_keywords_work_in_abatch(retriever):
    assert [len(found) for found in await retriever.abatch(["red", "apple"], k=1)] == [1, 1]


async def test_the_configuration_works_in_async(retriever):
    assert len(await retriever.with_config(configurable={"k": 1}).ainvoke("red")) == 1


def test_the_configuration_is_read_from_the_call_too(retriever):
    assert len(retriever.invoke("red", {"configurable": {"k": 1}})) == 1


def test_a_keyword_goes_before_the_configuration(retriever):
    assert len(retriever.with_config(configurable={"k": 1}).invoke("red", k=2)) == 2


def test_the_configuration_goes_before_the_field(kb):
    assert len(TwoStageRetriever(knowledge_base=kb, k=3).with_config(configurable={"k": 2}).invoke("red")) == 2


def test_none_means_the_retrievers_own(retriever):
    assert ids(retriever.invoke("red", k=None)) == ids(retriever.invoke("red"))
    assert len(retriever.with_config(configurable={"k": 1}).invoke("red", k=None)) == 1


def test_what_others_have_in_the_configuration_is_left_alone(retriever):
    assert retriever.invoke("red", {"configurable": {"thread_id": "7", "user": {"id": 1}}})


def test_the_configuration_of_a_chain_reaches_the_retriever(retriever):
    chain = {"context": retriever, "question": RunnablePassthrough()} | RunnableLambda(lambda both: len(both["context"]))
    assert chain.invoke("red") > 1
    assert chain.with_config(configurable={"k": 1}).invoke("red") == 1


def test_the_configuration_reaches_a_retriever_that_a_function_calls(retriever):
    chain = RunnableLambda(lambda question: len(retriever.invoke(question)))
    assert chain.invoke("red", {"configurable": {"k": 1}}) == 1


def test_configurable_fields_work(retriever):
    chosen = retriever.configurable_fields(
        k=ConfigurableField(id="top_k"), document_threshold=ConfigurableField(id="good_enough")
    )
    assert len(chosen.invoke("red", {"configurable": {"top_k": 1}})) == 1
    assert ids(chosen.with_config(configurable={"good_enough": 0.99}).invoke("red")) == ["red"]


def test_configurable_fields_describe_themselves(retriever):
    chosen = retriever.configurable_fields(k=ConfigurableField(id="top_k"), gate=ConfigurableField(id="gate"))
    assert {spec.id for spec in chosen.config_specs} == {"top_k", "gate"}
    assert "top_k" in json.dumps(chosen.config_schema().model_json_schema())


def test_a_bound_keyword_works(retriever):
    assert len(retriever.bind(k=1).invoke("red")) == 1


def test_where_of_the_field_holds_unless_a_call_brings_its_own(kb):
    retriever = TwoStageRetriever(knowledge_base=kb, where={"year": 2023})
    assert ids(retriever.invoke("red")) == ["red"]
    assert "red" not in ids(retriever.invoke("red", where={"year": 2024}))
    assert len(retriever.invoke("red", where={})) > 1


def test_a_configuration_can_narrow_a_filter_and_not_lift_it(kb):
    """It may come with the request of somebody who is to see one year only."""
    own = TwoStageRetriever(knowledge_base=kb, k=9, where={"year": [2023, 2024]}, category_threshold=-1, document_threshold=-1)
    asked = {"years": {"year": 2024}, "others": {"year": 1999}, "none": {}, "more": {"year": [2024, 1999]}}
    found = {name: ids(own.invoke("red", {"configurable": {"where": where}})) for name, where in asked.items()}
    assert found["none"] == ids(own.invoke("red"))
    assert (sorted(found["years"]), found["others"], sorted(found["more"])) == (["blue", "green"], [], ["blue", "green"])


def test_a_configuration_can_narrow_categories_and_not_widen_them(kb):
    own = TwoStageRetriever(
        knowledge_base=kb, k=9, categories=["traffic", "fruit"], category_threshold=-1, document_threshold=-1
    )
    assert ids(own.invoke("red", {"configurable": {"categories": ["traffic/road", "colours"]}})) == ["car"]
    assert ids(own.invoke("red", {"configurable": {"categories": ["colours"]}})) == []


def test_a_configuration_loads_no_model(kb):
    retriever = TwoStageRetriever(knowledge_base=kb, category_threshold=-1, document_threshold=-1)
    assert ids(retriever.invoke("red", {"configurable": {"reranker": "somebody/model"}})) == ids(retriever.invoke("red"))


def test_one_is_not_true_where_a_configuration_narrows_a_filter(words):
    pages = [Page(id=f"{flag}", text="red", category="c", metadata={"flag": flag}) for flag in (True, 1)]
    own = TwoStageRetriever(
        knowledge_base=KnowledgeBase.from_documents(pages, words),
        where={"flag": True},
        category_threshold=-1,
        document_threshold=-1,
    )
    assert ids(own.invoke("red", {"configurable": {"where": {"flag": 1}}})) == []
    assert ids(own.invoke("red", {"configurable": {"where": {"flag": True}}})) == ["True"]
