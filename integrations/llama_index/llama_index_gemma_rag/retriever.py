"""`TwoStageRetriever`: the category first, then the document, as a LlamaIndex retriever."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices import VectorStoreIndex
from llama_index.core.schema import IndexNode, NodeWithScore, QueryBundle
from typing_extensions import Self

from gemma_rag import KnowledgeBase
from gemma_rag import TwoStageRetriever as Core
from gemma_rag.embeddings import GemmaEmbeddings
from gemma_rag.errors import InputError
from gemma_rag.external import ExternalRetriever
from gemma_rag.rerank import Reranker
from gemma_rag.results import Retrieval
from gemma_rag.routing import Gate
from gemma_rag.search import Mode, Where
from gemma_rag.store_scores import Metric
from gemma_rag.thresholds import Threshold
from llama_index_gemma_rag.embedding import GemmaEmbedding, direction
from llama_index_gemma_rag.nodes import as_node
from llama_index_gemma_rag.stores import IndexSource

logger = logging.getLogger(__name__)

Limit: TypeAlias = float | str | Threshold | None
"""A threshold as users write it."""


class TwoStageRetriever(BaseRetriever):
    """Finds the nodes that answer a question in a knowledge base, or none; `explain` says why.

    The nodes have cosines as their scores. Their metadata are the document's own, `title` and `category`. An embedding that
    comes with a `QueryBundle` is not used. Its `custom_embedding_strs`, which query transformations such as HyDE make, are
    embedded instead of the question over an index (`from_index`), and not over a knowledge base, where the question's text
    and its words count: that is logged as a warning.

    Args:
        knowledge_base: What to search: a `gemma_rag.KnowledgeBase`, or the folder of one.
        k: Most nodes, at least 1.
        category_threshold: What the best category has to reach: a cosine, a preset's name, ``"dynamic"``, or any
            `gemma_rag.thresholds.Threshold`. None: the default of the model's prompt profile.
        document_threshold: What a document has to reach, likewise.
        mode: ``auto``, ``two-stage``, ``flat`` or ``lexical``, as for `gemma_rag.TwoStageRetriever`; so are the next seven.
        hybrid: Order by cosine and matching words together.
        lexical_weight: Share of the words in that order, 0 to 1.
        gate: How stage one scores categories and how many it opens.
        max_categories: Most categories to open.
        reranker: Orders the first `rerank_top` anew.
        rerank_top: How many it sees.
        diversity: 0 to 1: how much likeness to those before counts against a document.
        categories: Search these categories only, and those inside them.
        where: Search documents with this metadata only: ``{"year": 2024, "language": ["en", "zh"]}``.
        callback_manager: LlamaIndex's.

    Attributes:
        core: The retriever of `gemma_rag` that does the work.
        categories: As given.
        where: As given.

    Example:
        >>> from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase
        >>> page = Document(id="vpn", title="VPN", text="Install the client, then sign in.", category="it")
        >>> base = KnowledgeBase.from_documents([page], GemmaEmbeddings(model="minilm", show_progress=False))
        >>> [node.node_id for node in TwoStageRetriever(base).retrieve("How do I sign in to the VPN?")]
        ['vpn']

    Raises:
        InputError: An argument is out of its range.
        KnowledgeBaseError: The folder holds no knowledge base.
    """

    def __init__(
        self,
        knowledge_base: KnowledgeBase | str | Path,
        k: int = 4,
        category_threshold: Limit = None,
        document_threshold: Limit = None,
        mode: Mode = "auto",
        hybrid: bool = True,
        lexical_weight: float | None = None,
        gate: Gate | None = None,
        max_categories: int | None = None,
        reranker: Reranker | str | None = None,
        rerank_top: int = 20,
        diversity: float = 0.0,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        base = knowledge_base if isinstance(knowledge_base, KnowledgeBase) else KnowledgeBase.open(knowledge_base)
        core = Core(
            base,
            k=k,
            category_threshold=category_threshold,
            document_threshold=document_threshold,
            mode=mode,
            hybrid=hybrid,
            lexical_weight=lexical_weight,
            gate=gate or Gate(),
            max_categories=max_categories,
            reranker=reranker,
            rerank_top=rerank_top,
            diversity=diversity,
        )
        self._take(core, categories, where, callback_manager)

    def _take(
        self,
        core: Core | ExternalRetriever,
        categories: Sequence[str] | None,
        where: Where | None,
        callback_manager: CallbackManager | None,
        object_map: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(callback_manager=callback_manager, object_map=dict(object_map or {}))
        self.core = core
        self.keys = ("category", "title")  # where the metadata of the nodes have the two
        self.categories = categories
        self.where = where

    @classmethod
    def from_index(
        cls,
        index: VectorStoreIndex,
        *,
        embed_model: BaseEmbedding | GemmaEmbeddings | None = None,
        category_key: str = "category",
        title_key: str | None = None,
        metric: Metric | None = None,
        k: int = 4,
        category_threshold: Limit = None,
        document_threshold: Limit = None,
        mode: Literal["two-stage", "flat"] = "two-stage",
        gate: Gate | None = None,
        max_categories: int | None = None,
        probe: int = 64,
        categories: Sequence[str] | None = None,
        where: Where | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> Self:
        """The two stages over an index that exists already, whose vector store filters on metadata.

        The categories are values in the nodes' metadata; nothing is embedded or stored anew. The nodes come back as they
        are in the index.

        Args:
            index: The index.
            embed_model: What its vectors were made with. None: the index's own.
            category_key: Where the metadata of a node name its category.
            title_key: Where they name its title. None: where a `GemmaEmbedding` has it, else ``title``.
            metric: What the vector store calls a similarity. None: known for the stores of `stores.KNOWN`.
            k: Most nodes, at least 1.
            category_threshold: As for the class; None: the default of a `GemmaEmbedding`'s prompt profile, or none.
            document_threshold: Likewise.
            mode: ``two-stage``, or ``flat`` without a stage one.
            gate: How many categories stage one opens.
            max_categories: Most categories to open.
            probe: How many nodes stage one looks at, at least 1. A category that has none among them is not opened.
            categories: Search these categories only.
            where: Search nodes with this metadata only.
            callback_manager: LlamaIndex's.

        Raises:
            InputError: The store cannot filter on metadata, or is not known and no metric came, or an argument is out of
                its range. Retrieving raises it for nodes without a category and for scores that are no cosines.
        """
        if not isinstance(index, VectorStoreIndex):
            raise InputError(f"index is a VectorStoreIndex, and is a {type(index).__name__}")
        if isinstance(embed_model, GemmaEmbeddings):
            embed_model = GemmaEmbedding(embed_model)
        model = embed_model or index._embed_model
        ours = model.embeddings if isinstance(model, GemmaEmbedding) else None
        if title_key is None:
            title_key = (model.title_key if isinstance(model, GemmaEmbedding) else None) or "title"
        source = IndexSource(index, category_key, title_key, metric, needs_category=mode != "flat")
        core = ExternalRetriever(
            source,
            source.embed_with(model),
            category_key=category_key,
            k=k,
            category_threshold=category_threshold,
            document_threshold=document_threshold,
            mode=mode,
            gate=gate or Gate(),
            max_categories=max_categories,
            probe=probe,
            profile=None if ours is None else ours.profile,
            encoder=ours,
        )
        made = cls.__new__(cls)
        made._take(core, categories, where, callback_manager, getattr(index, "_object_map", None))
        made.keys = (category_key, title_key)
        return made

    def explain(self, question: str, **options: Any) -> Retrieval:
        """What is found for a question, what is not and by how much, and why there is nothing where there is nothing.

        Args:
            question: The question.
            options: For this call: `categories`, `where`, and any of the fields that say how to search.

        Raises:
            InputError: An empty question, an unknown category or option, or an argument out of its range.
        """
        return self.core.retrieve(question, **self._options(options))

    async def aexplain(self, question: str, **options: Any) -> Retrieval:
        """`explain` without holding up the event loop."""
        return await self.core.aretrieve(question, **self._options(options))

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"categories": self.categories, "where": self.where, **given}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._noted(self._asked(query_bundle).retrieve(query_bundle.query_str, **self._options({})))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._noted(await self._asked(query_bundle).aretrieve(query_bundle.query_str, **self._options({})))

    def _asked(self, query: QueryBundle) -> Core | ExternalRetriever:
        """What is asked: over an index with the strings that are to be embedded for the question, where it has some."""
        strings = query.custom_embedding_strs
        if not strings or strings == [query.query_str]:
            return self.core
        if isinstance(self.core, ExternalRetriever):
            return replace(self.core, embed_question=_mean_of(strings, self.core.embed_question))
        logger.warning(
            "the question came with %d strings to embed instead of it (custom_embedding_strs), as HyDE makes them: a knowledge "
            "base is searched by the question alone, and TwoStageRetriever.from_index uses them",
            len(strings),
        )
        return self.core

    # LlamaIndex follows nodes that stand for other things. Its older versions then drop nodes of equal text and metadata,
    # whatever their ids are: where there is nothing to follow, it is not asked.

    def _handle_recursive_retrieval(self, query_bundle: QueryBundle, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return super()._handle_recursive_retrieval(query_bundle, nodes) if _leads_on(nodes) else nodes

    async def _ahandle_recursive_retrieval(self, query_bundle: QueryBundle, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return await super()._ahandle_recursive_retrieval(query_bundle, nodes) if _leads_on(nodes) else nodes

    def _noted(self, retrieval: Retrieval) -> list[NodeWithScore]:
        if (notebook := _NOTEBOOK.get()) is not None:
            notebook.append((self, retrieval))
        return [as_node(hit) for hit in retrieval.hits]


def _mean_of(strings: Sequence[str], embed: Callable[[str], Sequence[float]]) -> Callable[[str], list[float]]:
    """Embeds some strings instead of a question: the direction of their mean."""
    return lambda question: direction([embed(string) for string in strings])


def _leads_on(nodes: Sequence[NodeWithScore]) -> bool:
    return any(isinstance(each.node, IndexNode) for each in nodes)


Notebook: TypeAlias = list[tuple[BaseRetriever, Retrieval]]
"""Who was asked, and what was found."""

_NOTEBOOK: ContextVar[Notebook | None] = ContextVar("gemma_rag_retrievals", default=None)


@contextmanager
def noting() -> Iterator[Notebook]:
    """Note down the retrievals of every `TwoStageRetriever` that is asked inside, also in threads and tasks of its context.

    LlamaIndex's `retrieve` hands on a list of nodes and nothing else; this is how the reasons come past it.
    """
    notebook: Notebook = []
    token = _NOTEBOOK.set(notebook)
    try:
        yield notebook
    finally:
        _NOTEBOOK.reset(token)
