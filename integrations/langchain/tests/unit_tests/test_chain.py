import asyncio
import json
import threading

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gemma_rag import Retrieved, ThresholdFilter, create_grounded_chain
from langchain_gemma_rag.chain import _encoder

from gemma_rag import GroundedAnswerer
from gemma_rag.errors import InputError


class Fixed(BaseRetriever):
    """Somebody else's retriever."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


class NeverAsked(GenericFakeChatModel):
    def _generate(self, *args, **kwargs):
        raise AssertionError("the model was called")

    def _stream(self, *args, **kwargs):
        raise AssertionError("the model was called")


def model(*answers: str) -> GenericFakeChatModel:
    return GenericFakeChatModel(messages=iter([AIMessage(answer) for answer in answers]))


async def collected(chunks) -> list:
    return [chunk async for chunk in chunks]


def added(chunks) -> dict:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


# -- what comes out -----------------------------------------------------------------------------------------------------


def test_an_answer_has_its_text_citations_outcome_and_documents(retriever):
    result = create_grounded_chain(retriever, model("It is red [1].")).invoke("red apple")
    assert set(result) == {"answer", "citations", "outcome", "documents"}
    assert result["answer"] == "It is red [1]."
    assert result["outcome"] == "answered"
    assert [document.id for document in result["documents"]] == [document.id for document in retriever.invoke("red apple")]
    assert result["citations"] == [
        {"number": 1, "id": "red", "title": "Red things", "category": "colours", "quote": "A red apple is red. It is no pear."}
    ]


def test_without_a_model_it_answers_as_the_core_does(retriever):
    result = create_grounded_chain(retriever).invoke("red apple")
    core = GroundedAnswerer(retriever).answer("red apple")
    assert result["answer"] == core.text
    assert result["citations"] == core.to_json()["citations"]
    assert result["answer"].startswith("“")


def test_a_refusal_names_its_reason(retriever):
    result = create_grounded_chain(retriever).invoke("something else")
    assert result["outcome"] == "category_below_threshold"
    assert result["answer"].startswith("I don't know. The question fits none")
    assert (result["citations"], result["documents"]) == ([], [])


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_the_model_is_not_called_on_a_refusal(retriever, how):
    chain = create_grounded_chain(retriever, NeverAsked(messages=iter([])))
    run = {
        "invoke": lambda: chain.invoke("something else"),
        "stream": lambda: added(list(chain.stream("something else"))),
        "ainvoke": lambda: asyncio.run(chain.ainvoke("something else")),
        "astream": lambda: added(asyncio.run(collected(chain.astream("something else")))),
    }
    assert run[how]()["outcome"] == "category_below_threshold"


def test_a_model_that_does_not_know_declines(retriever):
    result = create_grounded_chain(retriever, model("I don't know.")).invoke("red apple")
    assert result["outcome"] == "declined_by_model"
    assert result["answer"].startswith("I don't know. The language model found no answer")
    assert result["citations"] == []
    assert result["documents"][0].id == "red"


def test_the_model_sees_the_documents_and_the_question_only(retriever):
    seen = []

    def watch(messages):
        seen.extend(messages)
        return AIMessage("Red [1].")

    create_grounded_chain(retriever, RunnableLambda(watch)).invoke("red apple")
    (_, system), (_, user) = seen
    assert "Use only what the sources say" in system
    assert '<source number="1" title="Red things">' in user
    assert "<question>\nred apple\n</question>" in user


def test_a_chinese_question_gets_a_chinese_refusal():
    assert create_grounded_chain(Fixed(documents=[])).invoke("猫为什么会打呼噜？")["answer"].startswith("我不知道")


def test_the_language_can_be_set(retriever):
    assert create_grounded_chain(retriever, language="zh").invoke("something else")["answer"].startswith("我不知道")


def test_the_result_but_for_the_documents_is_plain_json(retriever):
    result = create_grounded_chain(retriever, model("It is red [1].")).invoke("red apple")
    del result["documents"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# -- streaming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["It is red [1]. It is no pear [1].", "I don't know.", "I do not see why [1] not.", "  Red [1]  "]
)
def test_what_is_streamed_adds_up_to_what_invoke_returns(retriever, text):
    chunks = list(create_grounded_chain(retriever, model(text)).stream("red apple"))
    assert added(chunks) == create_grounded_chain(retriever, model(text)).invoke("red apple")


async def test_what_is_streamed_asynchronously_adds_up_too(retriever):
    text = "It is red [1]. It is no pear [1]."
    chunks = await collected(create_grounded_chain(retriever, model(text)).astream("red apple"))
    whole = create_grounded_chain(retriever, model(text)).invoke("red apple")
    assert added(chunks) == whole == await create_grounded_chain(retriever, model(text)).ainvoke("red apple")


@pytest.mark.parametrize("question", ["red apple", "something else"])
async def test_without_a_model_streams_add_up(retriever, question):
    chain = create_grounded_chain(retriever)
    whole = chain.invoke(question)
    assert added(list(chain.stream(question))) == whole
    assert added(await collected(chain.astream(question))) == whole
    assert await chain.ainvoke(question) == whole


def test_documents_come_first_and_the_text_piece_by_piece(retriever):
    chunks = list(create_grounded_chain(retriever, model("It is red [1].")).stream("red apple"))
    assert list(chunks[0]) == ["documents"]
    assert "".join(chunk["answer"] for chunk in chunks[1:-1]) == "It is red [1]."
    assert len(chunks) > 4
    assert set(chunks[-1]) == {"citations", "outcome"}


def test_words_that_may_be_taken_back_are_not_shown(retriever):
    chunks = list(create_grounded_chain(retriever, model("I don't know.")).stream("red apple"))
    assert [chunk["answer"] for chunk in chunks if "answer" in chunk] == [added(chunks)["answer"]]


def test_a_batch_answers_each_question(retriever):
    results = create_grounded_chain(retriever).batch(["red apple", "something else", "car"])
    assert [result["outcome"] for result in results] == ["answered", "category_below_threshold", "answered"]


async def test_an_async_batch_answers_each_question(retriever):
    results = await create_grounded_chain(retriever).abatch(["red apple", "something else"])
    assert [result["outcome"] for result in results] == ["answered", "category_below_threshold"]


async def test_the_event_loop_goes_on_while_sentences_are_compared(retriever, words):
    released, encode = threading.Event(), words.encode

    def waiting(inputs):
        assert released.wait(10), "the event loop stood still"
        return encode(inputs)

    async def release():
        released.set()

    words.encode = waiting
    result, _ = await asyncio.gather(create_grounded_chain(retriever).ainvoke("red apple"), release())
    assert result["outcome"] == "answered"


# -- traces and configuration -------------------------------------------------------------------------------------------


def child_runs(chain: Runnable, question: str) -> list[tuple[str, str]]:
    collector = RunCollectorCallbackHandler()
    chain.invoke(question, {"callbacks": [collector]})
    (run,) = collector.traced_runs
    return [(child.run_type, child.name) for child in run.child_runs]


def test_retriever_and_model_appear_as_child_runs(retriever):
    runs = child_runs(create_grounded_chain(retriever, model("Red [1].")), "red apple")
    assert runs == [("retriever", "TwoStageRetriever"), ("llm", "GenericFakeChatModel")]


def test_a_function_that_writes_appears_by_its_name(retriever):
    def write(system, user):
        yield "Red [1]."

    assert child_runs(create_grounded_chain(retriever, write), "red apple")[-1][1] == "write"


async def test_retriever_and_model_appear_as_child_runs_in_async(retriever):
    collector = RunCollectorCallbackHandler()
    await create_grounded_chain(retriever, model("Red [1].")).ainvoke("red apple", {"callbacks": [collector]})
    (run,) = collector.traced_runs
    assert [child.run_type for child in run.child_runs] == ["retriever", "llm"]
    assert run.name == "GroundedChain"
    assert run.outputs["outcome"] == "answered"


def test_the_configuration_reaches_the_retriever(retriever):
    assert len(create_grounded_chain(retriever).invoke("red apple", {"configurable": {"k": 1}})["documents"]) == 1


async def test_keywords_of_a_call_reach_the_retriever(retriever):
    chain = create_grounded_chain(retriever)
    assert len(chain.invoke("red green", k=1)["documents"]) == 1
    assert len((await chain.ainvoke("red green", k=1))["documents"]) == 1
    with pytest.raises(InputError, match="no option 'kk'"):
        chain.invoke("red green", kk=1)


async def test_events_show_retriever_and_model(retriever):
    chain = create_grounded_chain(retriever, model("It is red [1]."))
    events = await collected(chain.astream_events("red apple", version="v2"))
    kinds = [event["event"] for event in events]
    assert "on_retriever_end" in kinds
    assert kinds.count("on_chat_model_stream") > 1
    assert events[-1]["event"] == "on_chain_end"
    assert events[-1]["data"]["output"]["answer"] == "It is red [1]."


def test_it_composes_with_other_runnables(retriever):
    chain = create_grounded_chain(retriever, model("It is red [1].")) | RunnableLambda(lambda result: result["answer"].upper())
    assert chain.invoke("red apple") == "IT IS RED [1]."


def test_its_schemas_say_what_goes_in(retriever):
    assert create_grounded_chain(retriever).get_input_jsonschema()["type"] == "string"


# -- retrievers ---------------------------------------------------------------------------------------------------------


def test_any_retriever_will_do():
    documents = [Document("A red apple.", id="a", metadata={"title": "T", "category": "c", "score": 0.7}), Document("A car.")]
    result = create_grounded_chain(Fixed(documents=documents), model("Red [1]. A car [2].")).invoke("red")
    assert result["documents"] == documents
    assert [each["title"] for each in result["citations"]] == ["T", ""]
    assert result["citations"][0] == {"number": 1, "id": "a", "title": "T", "category": "c", "quote": "A red apple."}


def test_any_retriever_is_quoted_by_words():
    documents = [Document("A car is fast. A red apple is red.", id="a")]
    result = create_grounded_chain(Fixed(documents=documents)).invoke("Which apple is red?")
    assert result["answer"].startswith("“A red apple is red.” [1]")


def test_a_store_of_our_embeddings_is_quoted_by_meaning(minilm):
    store = InMemoryVectorStore(minilm)
    store.add_documents([Document("The office opens at nine. Everyone has 27 days off.", id="a")])
    result = create_grounded_chain(store.as_retriever()).invoke("How much vacation do I get?")
    assert result["answer"].startswith("“Everyone has 27 days off.” [1]")


def test_a_wrapped_retriever_is_quoted_by_what_it_is_wrapped_around(retriever, words, classic):
    wrapped = classic("retrievers").ContextualCompressionRetriever(
        base_compressor=ThresholdFilter(threshold=0.3), base_retriever=retriever
    )
    results = [create_grounded_chain(each).invoke("red apple") for each in (wrapped, retriever)]
    assert results[0]["answer"] == results[1]["answer"]
    assert _encoder(wrapped) is words


def test_a_retriever_that_finds_nothing_is_a_refusal():
    result = create_grounded_chain(Fixed(documents=[]), NeverAsked(messages=iter([]))).invoke("red")
    assert result["outcome"] == "nothing_retrieved"


def test_documents_without_text_are_left_out():
    documents = [Document(" "), Document("A red apple.", id="a")]
    result = create_grounded_chain(Fixed(documents=documents), model("Red [1].")).invoke("red")
    assert result["documents"] == documents[1:]
    assert result["citations"][0]["id"] == "a"


class Paraphrases(BaseChatModel):
    """Gives two other wordings."""

    @property
    def _llm_type(self):
        return "paraphrases"

    def _generate(self, *args, **kwargs):
        return ChatResult(generations=[ChatGeneration(message=AIMessage("red\nred pear"))])


def test_what_several_questions_found_counts_once(retriever, classic):
    several = classic("retrievers.multi_query").MultiQueryRetriever.from_llm(retriever, Paraphrases(), include_original=True)
    found = several.invoke("red apple")
    assert len({document.id for document in found}) < len(found)
    result = create_grounded_chain(several, model("Red [1].")).invoke("red apple")
    assert [document.id for document in result["documents"]] == list(dict.fromkeys(document.id for document in found))
    assert [each["id"] for each in result["citations"]] == ["red"]


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (["a text"], "a str"),
        ([Document("A red apple."), {"text": "a"}], "a dict among them"),
        ("a text", "a str"),
        ({"documents": []}, "a dict"),
        (None, "a NoneType"),
        (7, "a int"),
    ],
)
async def test_what_are_no_documents_is_refused(found, what):
    chain = create_grounded_chain(RunnableLambda(lambda question: found))
    with pytest.raises(InputError, match=f"this one returned {what}: give a retriever of LangChain"):
        chain.invoke("red")
    with pytest.raises(InputError, match=f"this one returned {what}"):
        await chain.ainvoke("red")


def test_one_document_counts_as_a_list_of_it():
    result = create_grounded_chain(RunnableLambda(lambda question: Document("A red apple.", id="a"))).invoke("red apple")
    assert [each["id"] for each in result["citations"]] == ["a"]


def test_a_bound_retriever_keeps_its_reason_and_its_encoder(retriever):
    chain = create_grounded_chain(retriever.bind(k=1).with_config(tags=["mine"]))
    assert chain.invoke("something else")["outcome"] == "category_below_threshold"
    assert _encoder(retriever.bind(k=1).with_config(tags=["mine"])) is retriever.encoder
    assert _encoder(retriever.configurable_fields(k=ConfigurableField(id="k"))) is retriever.encoder


def test_a_result_that_was_changed_counts_as_it_is_now(retriever):
    def without_the_first(question):
        found = retriever.invoke(question)
        del found[0]
        return found

    result = create_grounded_chain(RunnableLambda(without_the_first), model("Green [1].")).invoke("red green")
    assert isinstance(retriever.invoke("red green"), Retrieved)
    assert len(result["documents"]) == 1
    assert result["citations"][0]["id"] == result["documents"][0].id


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_what_is_no_retriever_is_refused():
    with pytest.raises(InputError, match="is a str"):
        create_grounded_chain("retriever")


def test_what_is_no_language_model_is_refused(retriever):
    with pytest.raises(InputError, match="is a str"):
        create_grounded_chain(retriever, "gemma3")


def test_an_unknown_language_is_refused(retriever):
    with pytest.raises(InputError, match="'fr'"):
        create_grounded_chain(retriever, language="fr")


@pytest.mark.parametrize("question", [{"question": "red"}, 3])
def test_what_is_no_question_is_refused(retriever, question):
    with pytest.raises(InputError, match="takes a question, a string"):
        create_grounded_chain(retriever).invoke(question)


@pytest.mark.parametrize("hidden", ["page_content", "title"])
def test_what_was_hidden_in_the_documents_does_not_reach_the_model(retriever, hidden):
    seen = []

    def hide(documents):
        for document in documents:
            document.page_content = document.page_content.replace("apple", "[HIDDEN]")
            document.metadata["title"] = "[HIDDEN]"
        return documents

    def write(system, user):
        seen.append(user)
        return ["It is red [1]."]

    result = create_grounded_chain(retriever | hide, write).invoke("red apple")
    secret = "apple" if hidden == "page_content" else "Red things"
    assert secret not in seen[0].split("<question>")[0]
    assert secret not in str(result["citations"])
    assert result["outcome"] == "answered"
