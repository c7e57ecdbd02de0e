"""A question in, a grounded answer with its citations out, as one of LangChain's runnables."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import AddableDict

from gemma_rag.answer import Answer, Draft, Writer, extract, in_thread
from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError
from gemma_rag.grounding import Language, piece_text
from gemma_rag.results import Retrieval
from langchain_gemma_rag.cache import gemma_embeddings
from langchain_gemma_rag.documents import Retrieved, as_document, as_hit, each_once
from langchain_gemma_rag.retriever import TwoStageRetriever

NAME = "GroundedChain"
_WRAPPED = ("bound", "default", "base_retriever")
"""Where a retriever keeps the one that it is wrapped around: with a configuration, with configurable fields, a compressor."""


def create_grounded_chain(
    retriever: Runnable[str, Any], llm: Runnable[Any, Any] | Writer | None = None, language: Language | None = None
) -> Runnable[str, dict[str, Any]]:
    """A chain from a question to an answer that rests on the documents found, or to a refusal that says why.

    What comes out is ``{"documents", "answer", "citations", "outcome"}``: the documents that the model saw, numbered from 1
    in their order; the text, which cites them as ``[1]``; for each document cited a dict of ``number``, ``id``, ``title``,
    ``category`` and ``quote``; and how the question ended (`gemma_rag.results.Outcome`), ``answered`` or a reason.
    A document that comes several times, as a `MultiQueryRetriever` brings it, counts once.
    Where the retriever finds nothing, the model is not called. Streaming yields dicts that add up to the whole: the
    documents first, then pieces of the answer, citations and outcome last. The retriever and the model get the chain's
    configuration, so both appear in a trace, and ``configurable`` reaches them; keywords of a call, as in
    ``invoke(question, k=3)``, go to the retriever. Errors of the model come through as they are.

    Example:
        >>> from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase
        >>> from langchain_gemma_rag import TwoStageRetriever, create_grounded_chain
        >>> page = Document(id="vpn", title="VPN", text="Install the client, then sign in.", category="it")
        >>> kb = KnowledgeBase.from_documents([page], GemmaEmbeddings(model="minilm", show_progress=False))
        >>> chain = create_grounded_chain(TwoStageRetriever(knowledge_base=kb))
        >>> chain.invoke("How do I install the VPN client?")["answer"]
        '“Install the client, then sign in.” [1]'

    Args:
        retriever: Our `TwoStageRetriever`, or any other retriever of LangChain.
        llm: Writes the answer: a chat model or another language model of LangChain, or a function of the system's and the
            user's message that gives the text piece by piece (`gemma_rag.llms.LocalModel` is one). None: sentences of the
            documents are quoted.
        language: Of the prompt and of refusals, ``en`` or ``zh``; None for Chinese where the question is Chinese.

    Raises:
        InputError: An argument of the wrong kind.
    """
    if not isinstance(retriever, Runnable):
        raise InputError(f"retriever must be a retriever of LangChain, and is a {type(retriever).__name__}")
    if language not in (None, "en", "zh"):
        raise InputError(f"the language of an answer is 'en' or 'zh', and is {language!r}")
    chain = _Chain(retriever, None if llm is None else _runnable(llm), language)
    return _generator(chain.stream, chain.astream, NAME).with_types(input_type=str, output_type=dict[str, Any])


class _Chain:
    """What the chain does with one question. The two methods differ in `await` alone."""

    def __init__(self, retriever: Runnable[str, Any], llm: Runnable[Any, Any] | None, language: Language | None) -> None:
        self.retriever, self.llm, self.language = retriever, llm, language

    def stream(self, questions: Iterator[str], config: RunnableConfig, **options: Any) -> Iterator[AddableDict]:
        question = _joined(list(questions))
        retrieval, documents = _retrieval(question, self.retriever.invoke(question, config, **options))
        yield AddableDict(documents=documents)
        if self.llm is None or not retrieval.hits:
            yield from _whole(self.quote(retrieval))
            return
        draft = Draft(retrieval, self.language)
        for piece in self.llm.stream(_messages(draft), config):
            if shown := draft.add(piece_text(piece)):
                yield AddableDict(answer=shown)
        yield from _end(draft)

    async def astream(
        self, questions: AsyncIterator[str], config: RunnableConfig, **options: Any
    ) -> AsyncIterator[AddableDict]:
        question = _joined([each async for each in questions])
        retrieval, documents = _retrieval(question, await self.retriever.ainvoke(question, config, **options))
        yield AddableDict(documents=documents)
        if self.llm is None or not retrieval.hits:
            for part in _whole(await run_in_executor(config, self.quote, retrieval)):
                yield part
            return
        draft = Draft(retrieval, self.language)
        async for piece in self.llm.astream(_messages(draft), config):
            if shown := draft.add(piece_text(piece)):
                yield AddableDict(answer=shown)
        for part in _end(draft):
            yield part

    def quote(self, retrieval: Retrieval) -> Answer:
        """The answer without a model: quoted sentences, or a refusal."""
        by_words = not retrieval.hits or retrieval.mode == "lexical"
        return extract(retrieval, None if by_words else _encoder(self.retriever), self.language)


def _joined(questions: Sequence[Any]) -> str:
    if not questions or not all(isinstance(question, str) for question in questions):
        came = "nothing" if not questions else f"a {type(questions[0]).__name__}"
        raise InputError(f"a grounded chain takes a question, a string, and {came} came")
    return "".join(questions)


def _retrieval(question: str, found: Any) -> tuple[Retrieval, list[Document]]:
    """What was found, in the core's form, and the documents in the order of its hits."""
    documents = _documents(found)
    known = getattr(found, "retrieval", None) if isinstance(found, Retrieved) else None
    if known is not None and [hit.document.id for hit in known.hits] == [document.id for document in documents]:
        pairs = list(zip(known.hits, documents, strict=True))
        if all(as_document(hit) == document for hit, document in pairs):
            return known, documents
        # somebody has changed them since, perhaps to hide something: they count as they are now
        kept = [(hit if as_document(hit) == each else as_hit(each), each) for hit, each in pairs if each.page_content.strip()]
        if kept:
            return replace(known, hits=tuple(hit for hit, _ in kept)), [document for _, document in kept]
    documents = each_once(document for document in documents if document.page_content.strip())  # the others cannot be cited
    return Retrieval.of_hits(question, [as_hit(document) for document in documents]), documents


def _documents(found: Any) -> list[Document]:
    listed = isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping, Document))
    documents = list(found) if listed else [found]
    if others := [each for each in documents if not isinstance(each, Document)]:
        raise InputError(
            f"a grounded chain cites the documents that its retriever returns, and this one returned a "
            f"{type(others[0]).__name__}{' among them' if len(others) < len(documents) else ''}: give a "
            "retriever of LangChain, or a runnable from a question to a list of Documents"
        )
    return documents


def _encoder(retriever: Any) -> Encoder | None:
    """What a retriever embeds questions with, or one that it is wrapped around, where that is ours; else None."""
    while inner := next(filter(None, (getattr(retriever, name, None) for name in _WRAPPED)), None):
        retriever = inner
    if isinstance(retriever, TwoStageRetriever):
        return retriever.encoder
    return gemma_embeddings(getattr(getattr(retriever, "vectorstore", None), "embeddings", None))


def _whole(answer: Answer) -> Iterator[AddableDict]:
    yield AddableDict(answer=answer.text)
    yield _rest(answer)


def _end(draft: Draft) -> Iterator[AddableDict]:
    text, answer = draft.finish()
    if text:
        yield AddableDict(answer=text)
    yield _rest(answer)


def _rest(answer: Answer) -> AddableDict:
    return AddableDict(citations=answer.to_json()["citations"], outcome=answer.outcome.value)


# -- language models ----------------------------------------------------------------------------------------------------


def _messages(draft: Draft) -> list[tuple[str, str]]:
    system, user = draft.messages
    return [("system", system), ("human", user)]


def _runnable(llm: Any) -> Runnable[Any, Any]:
    """A language model as a runnable from messages to text."""
    if isinstance(llm, Runnable):
        return llm
    if callable(llm) and _is_asynchronous(llm):
        raise InputError(
            "llm is an asynchronous function (async def), and the pieces of an answer are taken from a plain one, in a thread "
            "where the event loop must go on: give a function that yields text, or a language model of LangChain"
        )
    if callable(llm):
        writer = _Writer(llm)
        name = getattr(llm, "__name__", type(llm).__name__)
        return _generator(writer.stream, writer.astream, name)
    raise InputError(f"llm must be a language model of LangChain or a function of two messages, and is a {type(llm).__name__}")


def _is_asynchronous(write: Any) -> bool:
    return any(
        test(each) for test in (inspect.iscoroutinefunction, inspect.isasyncgenfunction) for each in (write, write.__call__)
    )


class _Writer:
    """A function of two messages that gives its text piece by piece, as a stream of LangChain."""

    def __init__(self, write: Writer) -> None:
        self.write = write

    def stream(self, messages: Iterator[list[tuple[str, str]]]) -> Iterator[str]:
        ((_, system), (_, user)) = next(messages)
        yield from self.write(system, user)

    async def astream(self, messages: AsyncIterator[list[tuple[str, str]]]) -> AsyncIterator[str]:
        ((_, system), (_, user)) = await anext(messages)
        async for piece in in_thread(iter(await asyncio.to_thread(self.write, system, user))):
            yield piece


def _generator(stream: Any, astream: Any, name: str) -> RunnableGenerator[Any, Any]:
    """Two functions from inputs to outputs as a runnable; its types do not know that they may take a configuration too."""
    return RunnableGenerator(stream, astream, name=name)
