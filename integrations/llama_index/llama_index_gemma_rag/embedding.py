"""`GemmaEmbedding`: LlamaIndex's embedding model with EmbeddingGemma's task prompts, for texts, titles and questions."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode
from pydantic import BaseModel, Field, PrivateAttr, model_serializer
from typing_extensions import Self

from gemma_rag import GemmaEmbeddings
from gemma_rag.encoders import Input
from gemma_rag.errors import InputError
from gemma_rag.prompts import PromptProfile, Task
from gemma_rag.vectors import unit
from llama_index_gemma_rag.titles import NodeText, split_title

if TYPE_CHECKING:
    from pydantic import SerializationInfo, SerializerFunctionWrapHandler

BATCH = 2048
"""Texts that LlamaIndex hands over at a time: its own maximum, and what it inserts into an index at a time. `GemmaEmbeddings`
sorts what it gets by length and makes batches of equal size in tokens; of ten texts at a time, LlamaIndex's own default, it
could make none."""


class GemmaEmbedding(BaseEmbedding):
    """EmbeddingGemma, and other models, as a LlamaIndex embedding model, with the right task prompt for every call.

    Questions are embedded behind the query prompt, texts and nodes behind the document prompt. A title in a node's metadata
    goes into that prompt (``title: T | text: ...``), once; other metadata stay in the text, where LlamaIndex puts them.

    An index of LlamaIndex hands over texts and not nodes, so that the title is found again in the lines before the text: a
    text without metadata that begins with a line ``title: ...`` is taken for one with a title, and a title behind a value
    that has a blank line in it stays where it is. Nodes that the model is called with, as pipelines do, are asked
    themselves: ``VectorStoreIndex(embed_model(nodes), embed_model=embed_model)`` guesses nothing.

    Args:
        embeddings: A `GemmaEmbeddings`, whose loaded model is shared. None: one is made of `settings`.
        embed_batch_size: Texts in a call, at most 2048; the default is that, since `GemmaEmbeddings` makes the batches.
        title_key: The metadata key of titles; None to leave titles in the text.
        embeddings_cache: Refused: LlamaIndex's cache knows a text and not what it is embedded for, so that a question
            would get the vector of a document with the same words. ``GemmaEmbeddings(cache="folder")`` keeps them apart.
        settings: Those of `GemmaEmbeddings` (``model="minilm"``, ``dimensions=256`` ...), and LlamaIndex's own
            `callback_manager`, `num_workers` and `rate_limiter`.

    Example:
        >>> embed_model = GemmaEmbedding(model="minilm", show_progress=False)
        >>> len(embed_model.get_query_embedding("How do I reset my password?"))
        384

    Raises:
        InputError: Settings came beside `embeddings`, or an `embeddings_cache`.
        ValidationError: pydantic's: a setting is unknown or out of its range.
    """

    embed_batch_size: int = Field(default=BATCH, gt=0, le=2048, description="Texts in a call.")
    title_key: str | None = Field(default="title", min_length=1, description="The metadata key of titles.")
    _embeddings: GemmaEmbeddings = PrivateAttr()

    def __init__(
        self,
        embeddings: GemmaEmbeddings | None = None,
        *,
        embed_batch_size: int = BATCH,
        title_key: str | None = "title",
        embeddings_cache: None = None,
        **settings: Any,
    ) -> None:
        _refuse_cache(embeddings_cache)
        if "model_name" in settings:
            raise InputError("the model is named by `model`, as for GemmaEmbeddings: GemmaEmbedding(model='minilm')")
        own = {name: settings.pop(name) for name in type(self).model_fields if name in settings}
        if embeddings is None:
            embeddings = GemmaEmbeddings(**settings)
        elif not isinstance(embeddings, GemmaEmbeddings):
            raise InputError(f"embeddings is a GemmaEmbeddings, and is a {type(embeddings).__name__}")
        elif settings:
            raise InputError(
                f"the embeddings that came have settings of their own, and {', '.join(settings)} came beside them: "
                "give the one or the other"
            )
        super().__init__(model_name=embeddings.model, embed_batch_size=embed_batch_size, title_key=title_key, **own)
        self._embeddings = embeddings

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores it by."""
        return "GemmaEmbedding"

    @property
    def embeddings(self) -> GemmaEmbeddings:
        """What makes the vectors."""
        return self._embeddings

    # -- nodes, whose titles are known ------------------------------------------------------------------------------

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Give nodes their vectors, as LlamaIndex's pipelines ask for."""
        rows = self.get_text_embedding_batch([NodeText.of(node, self.title_key) for node in nodes], **kwargs)
        return _with_vectors(nodes, rows)

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same without holding up the event loop."""
        rows = await self.aget_text_embedding_batch([NodeText.of(node, self.title_key) for node in nodes], **kwargs)
        return _with_vectors(nodes, rows)

    # -- LlamaIndex's six methods -----------------------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embeddings.embed_query(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        rows: list[list[float]] = self._embeddings.encode(self._inputs(texts)).tolist()
        return rows

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._embeddings.aembed_query(query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        inputs = await asyncio.to_thread(self._inputs, texts)  # the first call loads the model
        rows: list[list[float]] = (await self._embeddings.aencode(inputs)).tolist()
        return rows

    def _inputs(self, texts: list[str]) -> list[Input]:
        key = self.title_key
        if key is None or not texts:
            return [Input(str(text), Task.DOCUMENT) for text in texts]
        profile = self._embeddings.profile
        whole = [(str(text), None) if profile.is_prompted(text) else _split(text, key) for text in texts]
        return [Input(text, Task.DOCUMENT, title) for text, title in whole]

    # -- several questions as one -----------------------------------------------------------------------------------

    def get_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., list[float]] | None = None
    ) -> list[float]:
        """One vector for several questions: their mean, of norm 1 again, unless `agg_fn` makes something else of them."""
        return super().get_agg_embedding_from_queries(queries, agg_fn or direction)

    async def aget_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., list[float]] | None = None
    ) -> list[float]:
        """`get_agg_embedding_from_queries` without holding up the event loop."""
        return await super().aget_agg_embedding_from_queries(queries, agg_fn or direction)

    # -- writing down, copying --------------------------------------------------------------------------------------

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """The arguments to make it again with, in plain JSON, as LlamaIndex stores them; no secret is among them."""
        return {**handler(self), **_recipe(self._embeddings), "class_name": self.class_name()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make what `to_dict` wrote; a secret (``api_key=...``), which it does not write, is given beside it."""
        return cls(**{name: value for name, value in {**data, **kwargs}.items() if name not in ("class_name", "model_name")})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "embeddings_cache":
            _refuse_cache(value)
        super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, which shares the loaded model."""
        _refuse_cache((update or {}).get("embeddings_cache"))
        return super().model_copy(update=update, deep=deep)

    def __reduce__(self) -> tuple[Any, ...]:
        # the callback manager is bound to its process, and LlamaIndex's way would forget which model it was
        kept = {name: getattr(self, name) for name in ("embed_batch_size", "title_key", "num_workers")}
        return _made_again, (type(self), self._embeddings, kept, _written_down(getattr(self, "rate_limiter", None)))


def _refuse_cache(cache: object) -> None:
    if cache is not None:
        raise InputError(
            "embeddings_cache cannot be used: it is keyed by the text alone, and would give a question the vector of a "
            "document with the same words. Use GemmaEmbeddings(cache='folder') or GemmaEmbedding(cache='folder'), which keep "
            "the two apart"
        )


def _recipe(embeddings: GemmaEmbeddings) -> dict[str, Any]:
    """The settings as plain JSON, a prompt profile of the user's own included."""
    recipe = embeddings.recipe()
    if isinstance(embeddings.prompts, PromptProfile):
        profile = {field.name: getattr(embeddings.prompts, field.name) for field in dataclasses.fields(PromptProfile)}
        recipe["prompts"] = {
            **profile,
            "prompts": {task.value: prompt for task, prompt in embeddings.prompts.prompts.items()},
            "models": list(embeddings.prompts.models),
            "marks": sorted(embeddings.prompts.marks),
            "matryoshka": list(embeddings.prompts.matryoshka),
            "languages": list(embeddings.prompts.languages),
        }
    return recipe


def direction(vectors: Sequence[Sequence[float]]) -> list[float]:
    """The mean of some vectors, of norm 1 again."""
    mean: list[float] = unit(np.mean(vectors, axis=0, keepdims=True))[0].tolist()
    return mean


def _split(text: str, key: str) -> tuple[str, str | None]:
    return text.parts if isinstance(text, NodeText) else split_title(text, key)


def _with_vectors(nodes: Sequence[BaseNode], rows: Sequence[list[float]]) -> Sequence[BaseNode]:
    for node, row in zip(nodes, rows, strict=True):
        node.embedding = row
    return nodes


def _written_down(limiter: Any) -> Any:
    """A rate limiter to be pickled: LlamaIndex's own hold a lock, and are made again of their limits."""
    return (type(limiter), limiter.model_dump()) if isinstance(limiter, BaseModel) else limiter


def _made_again(
    kind: type[GemmaEmbedding], embeddings: GemmaEmbeddings, kept: dict[str, Any], limiter: Any = None
) -> GemmaEmbedding:
    if limiter is not None:  # which older versions of LlamaIndex have not
        kept["rate_limiter"] = limiter[0](**limiter[1]) if isinstance(limiter, tuple) else limiter
    return kind(embeddings, **kept)
