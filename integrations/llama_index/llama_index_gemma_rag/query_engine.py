"""`GroundedQueryEngine`: an answer from the retrieved nodes alone, cited, or a refusal that says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.settings import Settings

from gemma_rag.answer import Answer, Draft, Writer, extract
from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError
from gemma_rag.grounding import Language
from gemma_rag.results import Hit, Outcome, Retrieval
from llama_index_gemma_rag.embedding import GemmaEmbedding
from llama_index_gemma_rag.nodes import as_hit
from llama_index_gemma_rag.retriever import Notebook, TwoStageRetriever, noting
from llama_index_gemma_rag.writing import apieces, awritten, is_asynchronous, pieces, written


class GroundedQueryEngine(BaseQueryEngine):
    """Answers from the retrieved nodes and nothing else, with the numbers of its sources, or refuses and says why.

    **Without an `llm` no language model is used, and LlamaIndex's `Settings.llm` is not either**: the answer is the
    sentences of the nodes that come closest to the question, quoted. Where nothing was retrieved, no model is called.

    The response's `source_nodes` are the numbered sources, ``[1]`` first. Its `metadata` have ``outcome`` (``answered``, or
    why not: `gemma_rag.results.Outcome`), ``kind`` (``extractive``, ``generated`` or ``refusal``), ``citations`` (plain
    dictionaries) and ``unknown_citations`` (numbers that the model made up); while a response is streamed they are empty,
    and they are filled in when its text has ended.

    Args:
        retriever: Any LlamaIndex retriever; a `TwoStageRetriever` gives its reasons too.
        llm: Writes the answer: a LlamaIndex LLM, or a function from the system's and the user's message to pieces of text.
            None: quoted sentences.
        language: Language of the prompt and of refusals, ``"en"`` or ``"zh"``; None: that of the question.
        streaming: Give the text piece by piece: a `StreamingResponse`, or an `AsyncStreamingResponse` from `aquery`.
        node_postprocessors: Applied to what was retrieved, in this order.
        callback_manager: LlamaIndex's. None: that of its `Settings`.

    Example:
        >>> from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase
        >>> page = Document(id="vpn", title="VPN", text="Sign in with your card.", category="it")
        >>> base = KnowledgeBase.from_documents([page], GemmaEmbeddings(model="minilm", show_progress=False))
        >>> response = GroundedQueryEngine(TwoStageRetriever(base)).query("How do I sign in to the VPN?")
        >>> print(response, response.metadata["outcome"])
        “Sign in with your card.” [1] answered

    Raises:
        InputError: `llm` or `language` is none of these.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: BaseLLM | Writer | None = None,
        language: Language | None = None,
        streaming: bool = False,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if language not in (None, "en", "zh"):
            raise InputError(f"the language of an answer is 'en' or 'zh', and is {language!r}")
        if llm is not None and not isinstance(llm, BaseLLM) and (hasattr(llm, "stream") or not callable(llm)):
            raise InputError(
                f"llm is a LlamaIndex LLM or a function of two messages, and is a {type(llm).__name__}. A LangChain model "
                "goes into LlamaIndex's LangChainLLM (pip install llama-index-llms-langchain)"
            )
        if callable(llm) and is_asynchronous(llm):
            raise InputError(
                "llm is an asynchronous function (async def), and the pieces of an answer are taken from a plain one, in a "
                "thread where the event loop must go on: give a function that yields text, or a LlamaIndex LLM"
            )
        super().__init__(callback_manager or Settings.callback_manager)
        self._retriever = retriever
        self._llm = llm
        self._language = language
        self._streaming = streaming
        self._postprocessors = list(node_postprocessors)
        for each in self._postprocessors:  # as LlamaIndex's own query engine does
            each.callback_manager = self.callback_manager

    @property
    def retriever(self) -> BaseRetriever:
        """What finds the nodes."""
        return self._retriever

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    # -- retrieving -------------------------------------------------------------------------------------------------

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The nodes that would be answered from."""
        return self._found(query_bundle).nodes

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """`retrieve` without holding up the event loop."""
        return (await self._afound(query_bundle)).nodes

    def _found(self, query: QueryBundle) -> _Found:
        with noting() as notebook:
            nodes = found = self._retriever.retrieve(query)
        for each in self._postprocessors:
            nodes = each.postprocess_nodes(nodes, query_bundle=query)
        return self._kept(query.query_str, notebook, found, nodes)

    async def _afound(self, query: QueryBundle) -> _Found:
        with noting() as notebook:
            nodes = found = await self._retriever.aretrieve(query)
        for each in self._postprocessors:
            if hasattr(each, "apostprocess_nodes"):  # which the first of the supported versions have not
                nodes = await each.apostprocess_nodes(nodes, query_bundle=query)
            else:
                nodes = await asyncio.to_thread(each.postprocess_nodes, nodes, query_bundle=query)
        return self._kept(query.query_str, notebook, found, nodes)

    def _kept(
        self, question: str, notebook: Notebook, found: Sequence[NodeWithScore], nodes: Sequence[NodeWithScore]
    ) -> _Found:
        own = [retrieval for retriever, retrieval in notebook if retriever is self._retriever]
        known = {hit.document.id: hit for hit in own[0].hits} if len(own) == 1 else {}
        kept = _Found.of(question, nodes, known, self._keys)
        if len(own) == 1 and kept.retrieval.hits != own[0].hits:
            kept = kept._replace(retrieval=replace(own[0], hits=kept.retrieval.hits))
        elif len(own) == 1:
            kept = kept._replace(retrieval=own[0])
        if found and not kept.nodes and self._postprocessors:
            note = f"the node postprocessors left none of the {len(found)} nodes"
            emptied = replace(kept.retrieval, outcome=Outcome.FILTERED_OUT, notes=(*kept.retrieval.notes, note))
            kept = kept._replace(retrieval=emptied)
        return kept

    # -- answering --------------------------------------------------------------------------------------------------

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer from nodes that were retrieved before."""
        return self._answer(_Found.of(query_bundle.query_str, nodes, {}, self._keys), additional_source_nodes or ())

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """`synthesize` without holding up the event loop."""
        return await self._aanswer(_Found.of(query_bundle.query_str, nodes, {}, self._keys), additional_source_nodes or ())

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as event:
            response = self._answer(self._found(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        payload: dict[str, Any] = {EventPayload.QUERY_STR: query_bundle.query_str}
        with self.callback_manager.event(CBEventType.QUERY, payload=payload) as event:
            response = await self._aanswer(await self._afound(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _answer(self, found: _Found, more: Sequence[NodeWithScore] = ()) -> RESPONSE_TYPE:
        sources = [*found.nodes, *more]
        if self._llm is None or not found.nodes:
            answer = extract(found.retrieval, self._encoder, self._language)
            return _stream_of(answer, sources) if self._streaming else _response(answer, sources)
        draft = Draft(found.retrieval, self._language)
        if self._streaming:
            metadata = _about(None)
            return StreamingResponse(_shown(draft, pieces(self._llm, draft), metadata), sources, metadata)
        draft.add(written(self._llm, draft))
        return _response(draft.finish()[1], sources)

    async def _aanswer(self, found: _Found, more: Sequence[NodeWithScore] = ()) -> RESPONSE_TYPE:
        sources = [*found.nodes, *more]
        if self._llm is None or not found.nodes:
            answer = await asyncio.to_thread(extract, found.retrieval, self._encoder, self._language)
            return _astream_of(answer, sources) if self._streaming else _response(answer, sources)
        draft = Draft(found.retrieval, self._language)
        if self._streaming:
            metadata = _about(None)
            return AsyncStreamingResponse(_ashown(draft, await apieces(self._llm, draft), metadata), sources, metadata)
        draft.add(await awritten(self._llm, draft))
        return _response(draft.finish()[1], sources)

    @property
    def _keys(self) -> tuple[str, str]:
        """Where the metadata of the nodes have their category and their title."""
        return self._retriever.keys if isinstance(self._retriever, TwoStageRetriever) else ("category", "title")

    @property
    def _encoder(self) -> Encoder | None:
        """What chooses the quoted sentences; None, and then matching words do, where the vectors are not ours."""
        if isinstance(self._retriever, TwoStageRetriever):
            return self._retriever.core.encoder
        embed_model = getattr(self._retriever, "_embed_model", None)  # of LlamaIndex's own VectorIndexRetriever
        return embed_model.embeddings if isinstance(embed_model, GemmaEmbedding) else None


class _Found(NamedTuple):
    """What is answered from.

    Attributes:
        retrieval: The hits, and why they are not more.
        nodes: The same as nodes, in the same order: the number of a citation counts in both.
    """

    retrieval: Retrieval
    nodes: list[NodeWithScore]

    @classmethod
    def of(cls, question: str, nodes: Sequence[NodeWithScore], known: Mapping[str, Hit], keys: tuple[str, str]) -> _Found:
        """Nodes that have a text, as hits: those that are known by their ids, with text, title and category as they are now."""
        hits, kept = [], []
        for each in nodes:
            hit, known_hit = as_hit(each, *keys), known.get(each.node.node_id)
            if hit is not None:
                hits.append(hit if known_hit is None else _as_now(known_hit, hit))
                kept.append(each)
        return cls(Retrieval.of_hits(question, hits), kept)


def _as_now(known: Hit, now: Hit) -> Hit:
    """A known hit; where a postprocessor has changed what a model reads of it, with that, and its scores."""
    same = (known.passage, known.document.title, known.document.category) == (
        now.passage,
        now.document.title,
        now.document.category,
    )
    return known if same else replace(known, document=now.document, passage=now.passage, headings=())


def _about(answer: Answer | None) -> dict[str, Any]:
    """The metadata of a response; None for an answer that is being written."""
    if answer is None:
        return {"outcome": None, "kind": None, "citations": [], "unknown_citations": []}
    whole = answer.to_json()
    return {key: whole[key] for key in ("outcome", "kind", "citations", "unknown_citations")}


def _response(answer: Answer, sources: list[NodeWithScore]) -> Response:
    return Response(answer.text, sources, _about(answer))


def _stream_of(answer: Answer, sources: list[NodeWithScore]) -> StreamingResponse:
    def at_once() -> Generator[str, None, None]:
        yield answer.text

    return StreamingResponse(at_once(), sources, _about(answer))


def _astream_of(answer: Answer, sources: list[NodeWithScore]) -> AsyncStreamingResponse:
    async def at_once() -> AsyncGenerator[str, None]:
        yield answer.text

    return AsyncStreamingResponse(at_once(), sources, _about(answer))


def _shown(draft: Draft, written_so_far: Iterable[str], metadata: dict[str, Any]) -> Generator[str, None, None]:
    for piece in written_so_far:
        if shown := draft.add(piece):
            yield shown
    rest, answer = draft.finish()
    metadata.update(_about(answer))
    if rest:
        yield rest


async def _ashown(draft: Draft, written_so_far: AsyncIterator[str], metadata: dict[str, Any]) -> AsyncGenerator[str, None]:
    async for piece in written_so_far:
        if shown := draft.add(piece):
            yield shown
    rest, answer = draft.finish()
    metadata.update(_about(answer))
    if rest:
        yield rest
