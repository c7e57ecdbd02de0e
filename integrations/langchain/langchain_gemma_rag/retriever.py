"""The two-stage retriever as one of LangChain's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever, LangSmithRetrieverParams
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from gemma_rag.encoders import Encoder
from gemma_rag.errors import InputError
from gemma_rag.external import ExternalRetriever
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.rerank import Reranker
from gemma_rag.results import Retrieval
from gemma_rag.retriever import TwoStageRetriever as CoreRetriever
from gemma_rag.routing import Gate
from gemma_rag.search import Mode, Settings, wanted_values
from gemma_rag.store_scores import Metric
from gemma_rag.thresholds import Threshold, as_threshold
from langchain_gemma_rag.assignment import Steady
from langchain_gemma_rag.documents import Retrieved
from langchain_gemma_rag.source import StoreSearch, StoreSource
from langchain_gemma_rag.stores import matches

if TYPE_CHECKING:
    ThresholdLike = float | str | Threshold
    RerankerLike = Reranker | str
else:  # pydantic cannot look into protocols; the core's retriever checks them
    ThresholdLike = Any
    RerankerLike = Any

_WHERE = ("categories", "where")
_NOT_CONFIGURABLE = ("gate", "reranker")
"""What a run's configuration, which may come from somebody else's request, does not set."""
_OF_KNOWLEDGE_BASES = (*Settings._fields, *_WHERE)
_OF_STORES = ("k", "category_threshold", "document_threshold", "mode", "gate", "max_categories", *_WHERE)
_ONLY_OF_KNOWLEDGE_BASES = tuple(name for name in _OF_KNOWLEDGE_BASES if name not in _OF_STORES)


class TwoStageRetriever(Steady, BaseRetriever):
    """Finds the documents that answer a question in two stages, the category first, then the document.

    Every field from `k` on can also be given for one call, as a keyword (``invoke(question, k=3)``, and so for
    ``ainvoke``, ``batch`` and ``abatch``), or in the configuration of a chain
    (``with_config(configurable={"k": 3})``; keys there that are not fields of ours are left alone). A keyword goes before
    the configuration, and both before the field. A configuration may come with somebody's request: its ``where`` and
    ``categories`` can only narrow the retriever's own, and it sets no ``gate`` and no ``reranker``. Keywords that are not known
    are refused.

    What is found comes as a `Retrieved`, a list of documents with the id of the document and, in the metadata beside its
    own, ``title``, ``category``, ``score`` (a cosine) and ``category_score``. Where the metadata of a document has one of
    these keys itself, ours wins. A question without an answer gets an empty list, and ``.retrieval`` says why; so does
    the run in a trace, whose metadata gets ``gemma_rag_outcome``. `retrieve` returns the same without a run.

    Example:
        >>> from gemma_rag import Document, GemmaEmbeddings, KnowledgeBase
        >>> from langchain_gemma_rag import TwoStageRetriever
        >>> page = Document(id="vpn", title="VPN", text="Install the client, then sign in.", category="it")
        >>> kb = KnowledgeBase.from_documents([page], GemmaEmbeddings(model="minilm", show_progress=False))
        >>> [document.id for document in TwoStageRetriever(knowledge_base=kb).invoke("How do I install the VPN client?")]
        ['vpn']

    Raises:
        ValidationError: An argument that is not known or out of its range (also a ValueError).
        KnowledgeBaseError: The folder holds no knowledge base, or a damaged one.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True, validate_assignment=True)

    knowledge_base: KnowledgeBase | Path | str | None = Field(
        default=None, description="What to search: a knowledge base, or the folder of one, which is opened now and stays open."
    )
    source: StoreSource | None = Field(
        default=None, description="A vector store to search instead; `from_vectorstore` makes one.", repr=False
    )
    k: int = Field(default=4, ge=1, strict=True, description="Most documents, at least 1.")
    category_threshold: ThresholdLike | None = Field(
        default=None,
        description="What the best category has to reach: a cosine, the name of a preset, `dynamic`, or a "
        "`gemma_rag.thresholds.Threshold`. None: the default of the model.",
    )
    document_threshold: ThresholdLike | None = Field(default=None, description="What a document has to reach, likewise.")
    mode: Mode = Field(
        default="auto",
        description="`two-stage`, `flat` (no stage one), `lexical` (words alone; not over a vector store), or `auto`: "
        "two-stage, but lexical for a question in a language that the model does not read.",
    )
    hybrid: bool = Field(default=True, description="Order by cosine and matching words together. Not over a vector store.")
    lexical_weight: float | None = Field(
        default=None, ge=0, le=1, description="Share of the words in that order, 0 to 1. None: what was learned, or a half."
    )
    gate: Gate = Field(default_factory=Gate, description="How stage one scores categories, and how many it opens.")
    max_categories: int | None = Field(
        default=None, ge=1, strict=True, description="Most categories to open. None: as many as the gate wants."
    )
    reranker: RerankerLike | None = Field(
        default=None, description="Orders the first hits anew: a function, or the name of a cross-encoder. Not over a store."
    )
    rerank_top: int = Field(default=20, ge=1, strict=True, description="How many hits the reranker sees.")
    diversity: float = Field(
        default=0.0, ge=0, le=1, description="How much likeness to the hits before counts against a hit, 0 to 1."
    )
    categories: Sequence[str] | None = Field(default=None, description="Search these categories only, and those inside them.")
    where: Mapping[str, Any] | None = Field(
        default=None, description="Search documents with this metadata only, as in `{'year': [2024, 2025]}`."
    )
    probe: int = Field(
        default=64,
        ge=1,
        strict=True,
        description="How many entries of a vector store stage one looks at.",
    )

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_vectorstore(
        cls,
        store: VectorStore,
        *,
        embeddings: Embeddings | None = None,
        category_key: str = "category",
        title_key: str = "title",
        metric: Metric | None = None,
        search: StoreSearch | None = None,
        **fields: Any,
    ) -> Self:
        """The two stages over a vector store that is filled already.

        Known are LangChain's InMemoryVectorStore, FAISS, Chroma, Milvus and Qdrant: how each is filtered, and how its scores
        become cosines. Any other one needs `metric` and `search`.

        Example:
            >>> from langchain_core.documents import Document
            >>> from langchain_core.vectorstores import InMemoryVectorStore
            >>> from langchain_gemma_rag import GemmaEmbeddings, TwoStageRetriever
            >>> store = InMemoryVectorStore(GemmaEmbeddings(model="minilm", show_progress=False))
            >>> page = Document("Install the client, then sign in.", id="vpn", metadata={"category": "it"})
            >>> _ = store.add_documents([page])
            >>> retriever = TwoStageRetriever.from_vectorstore(store, k=3)
            >>> [document.id for document in retriever.invoke("How do I install the VPN client?")]
            ['vpn']

        Args:
            store: The store. Each entry names its category in its metadata.
            embeddings: What filled it; None for those that it holds. Any embeddings of LangChain will do; where the store
                compares by inner product or distance, their vectors must have norm 1.
            category_key: Where the metadata has the category.
            title_key: Where it has the title, if there is one.
            metric: What the store calls a score (`gemma_rag.store_scores.Metric`), instead of what it says itself.
            search: For a store that is not known: from a vector, a number of entries and a filter (``{key: [values]}``, empty
                for none) to documents with their scores, best first.
            fields: Fields of the retriever: `k`, both thresholds, `mode`, `gate`, `max_categories`, `probe`, `categories`,
                `where`. How a store compares the metadata is its own: Chroma and Milvus do not look into lists.

        Raises:
            InputError: A store that is not known, one whose scores have no cosine, or no embeddings.
            ValidationError: As for the class.
        """
        source = StoreSource(
            store, embeddings=embeddings, category_key=category_key, title_key=title_key, metric=metric, search=search
        )
        return cls(source=source, **fields)

    @field_validator("knowledge_base", mode="before")
    @classmethod
    def _opened(cls, value: Any) -> Any:
        if value is None or isinstance(value, KnowledgeBase):
            return value
        if isinstance(value, (str, Path)):
            return KnowledgeBase.open(Path(value).expanduser())
        raise InputError(f"a KnowledgeBase, or the folder of one, is searched, and a {type(value).__name__} came")

    @field_validator("category_threshold", "document_threshold")
    @classmethod
    def _is_threshold(cls, value: Any) -> Any:
        if value is not None:
            as_threshold(value)
        return value

    @field_validator(*_ONLY_OF_KNOWLEDGE_BASES, "mode", "probe")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what is not there over what is searched; `knowledge_base` and `source` stand before these fields."""
        if info.data.get("source") is None:
            if info.field_name == "probe" and value != cls.model_fields["probe"].default:
                raise InputError("a knowledge base is not probed, but scored by its gate: leave probe out")
        elif info.field_name == "mode":
            if value == "lexical":
                raise InputError("a vector store has no words to search: its mode is auto, two-stage or flat")
        elif info.field_name in _ONLY_OF_KNOWLEDGE_BASES and value != cls.model_fields[info.field_name].default:
            raise InputError("only a knowledge base has that, and this is a vector store: leave it out")
        return value

    @model_validator(mode="after")
    def _works(self) -> Self:
        if (self.knowledge_base is None) is (self.source is None):
            raise InputError(
                "a retriever searches either a knowledge base or a vector store: give knowledge_base=..., or use "
                "TwoStageRetriever.from_vectorstore(...)"
            )
        self._core(checking=True)
        return self

    # -- what LangChain calls ---------------------------------------------------------------------------------------

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Retrieved:  # noqa: A002
        """Find the documents that answer a question.

        Args:
            input: The question.
            config: LangChain's configuration of the run; ``configurable`` may set fields of ours.
            kwargs: Fields of ours for this call.

        Raises:
            InputError: An empty question, an unknown keyword or category, or an argument out of its range.
        """
        return cast("Retrieved", super().invoke(input, config, **self._configured(config, kwargs)))

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Retrieved:  # noqa: A002
        """`invoke` without holding up the event loop."""
        return cast("Retrieved", await super().ainvoke(input, config, **self._configured(config, kwargs)))

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any) -> Retrieved:
        options.pop("verbose", None)  # LangChain's own
        return _told(self.retrieve(query, **options), run_manager)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> Retrieved:
        options.pop("verbose", None)
        return _told(await self.aretrieve(query, **options), run_manager)

    def _get_ls_params(self, **kwargs: Any) -> LangSmithRetrieverParams:
        params = super()._get_ls_params(**kwargs)
        if self.source is None:
            space = self._base.space
            params["ls_vector_store_provider"] = type(self._base).__name__
            params["ls_embedding_provider"], params["ls_embedding_model"] = space.runtime, space.model
            return params
        embeddings = self.source.ours or self.source.embeddings
        params["ls_vector_store_provider"] = self.source.name
        params["ls_embedding_provider"] = type(embeddings).__name__
        for name in ("model", "model_name"):  # what LangChain's embeddings call it
            if isinstance(model := getattr(embeddings, name, None), str):
                params["ls_embedding_model"] = model
        return params

    # -- copies and names -------------------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        shown: list[tuple[str | None, Any]] = [(None, self.knowledge_base if self.source is None else self.source)]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in ("knowledge_base", "source") and value != field.get_default(call_default_factory=True):
                shown.append((name, value))
        return shown

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()  # the knowledge base, or the store, is shared: neither is copied by accident

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self._fields()
        if self.source is None:
            fields["knowledge_base"] = self._base.path
            if self._base.path is None:
                raise TypeError("a retriever over a knowledge base in memory cannot be pickled: save the knowledge base first")
        return _made_again, (type(self), fields)  # another process opens the folder for itself

    # -- the core's own form ----------------------------------------------------------------------------------------

    def retrieve(self, question: str, k: int | None = None, **options: Any) -> Retrieval:
        """Find the documents that answer a question, in gemma-rag's own form: with scores, near misses and the outcome.

        Args:
            question: The question.
            k: Most documents, instead of the field.
            options: Any other field from `k` on, for this call.

        Raises:
            InputError: As for `invoke`.
        """
        asked = self._options({"k": k, **options})
        core = self._core()
        if isinstance(core, ExternalRetriever) and self.source is not None and asked.get("mode", core.mode) == "flat":
            core = replace(core, source=self.source.without_categories())
        return core.retrieve(question, **asked)

    async def aretrieve(self, question: str, k: int | None = None, **options: Any) -> Retrieval:
        """`retrieve` without holding up the event loop."""
        return await asyncio.to_thread(self.retrieve, question, k, **options)  # the first question may load a model

    @property
    def encoder(self) -> Encoder | None:
        """What embeds questions, where it is one of ours; loads its model."""
        return self._base.encoder if self.source is None else self.source.ours

    @property
    def _base(self) -> KnowledgeBase:
        return cast("KnowledgeBase", self.knowledge_base)  # `_opened` has opened it

    def _core(self, *, checking: bool = False) -> CoreRetriever | ExternalRetriever:
        """The core's retriever with the fields as they are now; `checking` them loads no model."""
        if self.source is None:
            return CoreRetriever(self._base, **{name: getattr(self, name) for name in Settings._fields})
        ours = self.source.ours
        return ExternalRetriever(
            self.source,
            self.source.embed_question,
            self.source.category_key,
            k=self.k,
            category_threshold=self.category_threshold,
            document_threshold=self.document_threshold,
            mode="flat" if self.mode == "flat" else "two-stage",
            gate=self.gate,
            max_categories=self.max_categories,
            probe=self.probe,
            profile=None if checking or ours is None else ours.profile,
            encoder=ours,
        )

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a call asks for, with our own filters where it has none."""
        if unknown := [name for name in given if name not in self._known]:
            raise InputError(
                f"a call of this retriever has no option {', '.join(map(repr, unknown))}: there are {', '.join(self._known)}"
            )
        options = {"categories": self.categories, "where": self.where}
        options |= {name: value for name, value in given.items() if value is not None}
        if self.source is not None and options.get("mode") == "auto":
            options["mode"] = "two-stage"
        return options

    @property
    def _known(self) -> tuple[str, ...]:
        return _OF_KNOWLEDGE_BASES if self.source is None else _OF_STORES

    def _configured(self, config: RunnableConfig | None, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call, and what the configuration of the run sets beside them."""
        configurable = ensure_config(config).get("configurable") or {}
        names = [name for name in self._known if name not in _NOT_CONFIGURABLE and configurable.get(name) is not None]
        own = {name: configurable[name] for name in names}
        if "where" in own and self.where is not None:
            own["where"] = _both(wanted_values(self.where), wanted_values(own["where"]))
        if "categories" in own and self.categories is not None:
            inside = _inside(own["categories"], self.categories)  # a store knows nothing of a category inside another
            own["categories"] = inside if self.source is None else [name for name in inside if name in self.categories]
        return given | {name: value for name, value in own.items() if given.get(name) is None}


def _both(one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """A filter that lets pass what both let pass."""
    shared = {
        key: [value for value in values if key not in one or matches({key: value}, {key: one[key]})]
        for key, values in other.items()
    }
    return {**{key: list(values) for key, values in one.items()}, **shared}


def _inside(asked: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Of the categories asked for, those that are allowed or lie inside one that is; and those allowed that lie inside one."""
    asked = [asked] if isinstance(asked, str) else list(asked)
    below = [name for name in asked if any(f"{name}/".startswith(f"{each}/") for each in allowed)]
    return list(dict.fromkeys([*below, *(each for each in allowed if any(each.startswith(f"{name}/") for name in asked))]))


def _made_again(kind: type[TwoStageRetriever], fields: dict[str, Any]) -> TwoStageRetriever:
    return kind(**fields)


def _told(retrieval: Retrieval, run_manager: CallbackManagerForRetrieverRun | AsyncCallbackManagerForRetrieverRun) -> Retrieved:
    """The hits as documents, once the run's metadata says how the question ended."""
    run_manager.metadata.update(
        gemma_rag_outcome=retrieval.outcome.value,
        gemma_rag_reason=retrieval.outcome.reason,
        gemma_rag_mode=retrieval.mode,
        gemma_rag_documents_scored=retrieval.documents_scored,
    )
    return Retrieved.of(retrieval)
