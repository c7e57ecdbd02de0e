"""Which language models may write: LangChain's, and functions."""

import asyncio
import threading

import pytest
from langchain_core.language_models import FakeStreamingListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_gemma_rag import create_grounded_chain

from gemma_rag.errors import InputError
from gemma_rag.llms import LocalModel


def model(*answers: str) -> GenericFakeChatModel:
    return GenericFakeChatModel(messages=iter([AIMessage(answer) for answer in answers]))


async def collected(chunks) -> list:
    return [chunk async for chunk in chunks]


def added(chunks) -> dict:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def test_a_plain_language_model_works(retriever):
    assert (
        create_grounded_chain(retriever, FakeStreamingListLLM(responses=["Red [1]."])).invoke("red apple")["answer"]
        == "Red [1]."
    )


async def test_a_plain_language_model_streams_asynchronously(retriever):
    chunks = await collected(
        create_grounded_chain(retriever, FakeStreamingListLLM(responses=["Red [1]."])).astream("red apple")
    )
    assert added(chunks)["answer"] == "Red [1]."
    assert len(chunks) > 4


def test_a_model_with_a_parser_works(retriever):
    assert create_grounded_chain(retriever, model("Red [1].") | StrOutputParser()).invoke("red apple")["answer"] == "Red [1]."


def test_content_blocks_are_read(retriever):
    def blocks(chunks):
        for _ in chunks:
            yield AIMessageChunk([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Red"}])
            yield AIMessageChunk([{"type": "text", "text": " [1]."}])

    from langchain_core.runnables import RunnableGenerator

    assert create_grounded_chain(retriever, RunnableGenerator(blocks)).invoke("red apple")["answer"] == "Red [1]."


def write(system: str, user: str):
    yield "Red "
    yield "[1]."


def test_a_function_of_two_messages_works_and_streams(retriever):
    chunks = list(create_grounded_chain(retriever, write).stream("red apple"))
    assert added(chunks)["answer"] == "Red [1]."
    assert [chunk["answer"] for chunk in chunks if "answer" in chunk] == ["Red", " [1]."]


def test_a_function_that_returns_a_list_works(retriever):
    assert create_grounded_chain(retriever, lambda system, user: ["Red ", "[1]."]).invoke("red apple")["answer"] == "Red [1]."


async def test_a_function_streams_in_async(retriever):
    chunks = await collected(create_grounded_chain(retriever, write).astream("red apple"))
    assert [chunk["answer"] for chunk in chunks if "answer" in chunk] == ["Red", " [1]."]


async def test_the_event_loop_goes_on_while_a_function_writes(retriever):
    released = threading.Event()

    def waiting(system, user):
        assert released.wait(10), "the event loop stood still"
        yield "Red [1]."

    async def release():
        released.set()

    result, _ = await asyncio.gather(create_grounded_chain(retriever, waiting).ainvoke("red apple"), release())
    assert result["answer"] == "Red [1]."


async def test_a_local_model_works(retriever, tiny_language_model):
    chain = create_grounded_chain(retriever, LocalModel(str(tiny_language_model), max_new_tokens=4))
    sync, asynchronous = chain.invoke("red apple"), await chain.ainvoke("red apple")
    assert sync["answer"] == asynchronous["answer"]  # the weights are random, and so are the words
    assert sync["outcome"] in ("answered", "declined_by_model")


class Broken(Exception):
    pass


def test_an_error_of_the_model_comes_through_as_it_is(retriever):
    def broken(messages):
        raise Broken("no credit left")

    with pytest.raises(Broken, match="no credit left"):
        create_grounded_chain(retriever, RunnableLambda(broken)).invoke("red apple")


async def test_an_error_of_the_model_comes_through_in_async(retriever):
    def broken(messages):
        raise Broken("no credit left")

    with pytest.raises(Broken, match="no credit left"):
        await create_grounded_chain(retriever, RunnableLambda(broken)).ainvoke("red apple")


def test_an_error_of_the_retriever_comes_through_as_it_is(retriever):
    with pytest.raises(InputError, match="empty"):
        create_grounded_chain(retriever).invoke(" ")


async def awaited(system, user):
    return "text"


async def awaited_pieces(system, user):
    yield "text"


@pytest.mark.parametrize("llm", [awaited, awaited_pieces])
def test_an_asynchronous_function_is_refused_with_the_cure(retriever, llm):
    with pytest.raises(InputError, match=r"asynchronous function \(async def\).*give a function that yields text"):
        create_grounded_chain(retriever, llm)
