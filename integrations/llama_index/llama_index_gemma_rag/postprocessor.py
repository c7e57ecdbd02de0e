"""`ThresholdPostprocessor`: the thresholds of `gemma_rag.thresholds` over the nodes of any LlamaIndex retriever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from typing_extensions import Self

from gemma_rag import GemmaEmbeddings
from gemma_rag.errors import InputError
from gemma_rag.thresholds import DynamicThreshold, FixedThreshold, as_threshold
from gemma_rag.vectors import Floats, cosines, unit
from llama_index_gemma_rag.embedding import GemmaEmbedding


class ThresholdPostprocessor(BaseNodePostprocessor):
    """Keeps the nodes that are good enough, in the order in which they came. What came is left as it is.

    Without an `embed_model` the threshold acts on the scores that the nodes have, which have to be cosines for a threshold
    that is a cosine: many vector stores of LlamaIndex give something else. With an `embed_model` the question and the nodes
    are embedded anew, and the nodes that are kept have those cosines as their scores; nodes without a text are dropped.

    Args:
        threshold: A cosine, the name of a preset (``"strict"``, ``"balanced"``, ``"loose"``: for `symmetric`), ``"dynamic"``,
            or any `gemma_rag.thresholds.Threshold`.
        embed_model: Any LlamaIndex embedding model, or a `GemmaEmbeddings`. None: the nodes' own scores.
        symmetric: Embed the question and the nodes' texts for sentence similarity (is this the same as that?) instead of as
            a question and documents; needs an `embed_model` that is a `GemmaEmbedding`.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> nodes = [NodeWithScore(node=TextNode(text=text), score=score) for text, score in (("near", 0.7), ("far", 0.2))]
        >>> [kept.text for kept in ThresholdPostprocessor(threshold=0.4).postprocess_nodes(nodes)]
        ['near']

    Raises:
        ValidationError: pydantic's: it is no threshold, or `symmetric` has no `GemmaEmbedding`.
    """

    threshold: Any = Field(description="A cosine, a preset's name, `dynamic`, or a threshold.")
    embed_model: SerializeAsAny[BaseEmbedding] | None = Field(default=None, description="Scores the nodes anew.")
    symmetric: bool = Field(default=False, description="Score by sentence similarity.")

    @field_validator("threshold", mode="before")
    @classmethod
    def _is_a_threshold(cls, value: Any) -> Any:
        if isinstance(value, dict):  # as `to_dict` writes one
            value = FixedThreshold(**value) if "value" in value else DynamicThreshold(**value)
        as_threshold(value)
        return value

    @field_validator("embed_model", mode="before")
    @classmethod
    def _is_an_embed_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("class_name") == GemmaEmbedding.class_name():  # as `to_dict` writes it
            return GemmaEmbedding.from_dict(value)
        return GemmaEmbedding(value) if isinstance(value, GemmaEmbeddings) else value

    @model_validator(mode="after")
    def _symmetric_is_ours(self) -> Self:
        if self.symmetric and not isinstance(self.embed_model, GemmaEmbedding):
            raise InputError("symmetric=True needs the prompt for sentence similarity: give embed_model=GemmaEmbedding(...)")
        return self

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores it by."""
        return "ThresholdPostprocessor"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        if self.embed_model is None or not nodes:
            return self._kept(nodes)
        question, nodes, texts = self._to_embed(nodes, query_bundle)
        if not nodes:
            return []
        if self.symmetric and isinstance(self.embed_model, GemmaEmbedding):
            return self._kept(_scored(nodes, self.embed_model.embeddings.similarity([question], texts)))
        query = self.embed_model.get_query_embedding(question)
        rows = self.embed_model.get_text_embedding_batch(texts)
        return self._kept(_scored(nodes, cosines(unit([query]), unit(rows))))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if self.embed_model is None or not nodes:
            return self._kept(nodes)
        question, nodes, texts = self._to_embed(nodes, query_bundle)
        if not nodes:
            return []
        if self.symmetric and isinstance(self.embed_model, GemmaEmbedding):
            alike = await asyncio.to_thread(self.embed_model.embeddings.similarity, [question], texts)
            return self._kept(_scored(nodes, alike))
        query = await self.embed_model.aget_query_embedding(question)
        rows = await self.embed_model.aget_text_embedding_batch(texts)
        return self._kept(_scored(nodes, cosines(unit([query]), unit(rows))))

    def _to_embed(
        self, nodes: Sequence[NodeWithScore], query_bundle: QueryBundle | None
    ) -> tuple[str, list[NodeWithScore], list[str]]:
        """The question, the nodes that have a text, and their texts."""
        if query_bundle is None:
            raise InputError("to score the nodes by embedding, the question is needed: postprocess_nodes(nodes, query_str=...)")
        mode = MetadataMode.NONE if self.symmetric else MetadataMode.EMBED
        pairs = [(each, each.node.get_content(metadata_mode=mode)) for each in nodes]
        written = [(each, text) for each, text in pairs if text.strip()]
        return query_bundle.query_str, [each for each, _ in written], [text for _, text in written]

    def _kept(self, nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        scores = [each.score for each in nodes if each.score is not None]
        if len(scores) < len(nodes):
            raise InputError(
                f"{len(nodes) - len(scores)} of {len(nodes)} nodes have no score for the threshold to act on: choose a "
                "retriever that scores, or have them scored by ThresholdPostprocessor(embed_model=...)"
            )
        keep = as_threshold(self.threshold).apply(scores).keep
        return [each for each, good in zip(nodes, keep, strict=True) if good]


def _scored(nodes: Sequence[NodeWithScore], scores: Floats) -> list[NodeWithScore]:
    return [NodeWithScore(node=each.node, score=float(score)) for each, score in zip(nodes, scores[0], strict=True)]
