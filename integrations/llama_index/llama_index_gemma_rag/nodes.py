"""Nodes of LlamaIndex and hits of gemma-rag, each made from the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from pydantic import PrivateAttr

from gemma_rag.documents import UNCATEGORISED, Document, plain_metadata, whole_text
from gemma_rag.results import Hit


class NodeDocument(Document):
    """A node of somebody else's, as a document; `node` is the node itself."""

    _node: BaseNode = PrivateAttr()

    @property
    def node(self) -> BaseNode:
        """The node that it was made from."""
        return self._node

    @classmethod
    def of(cls, node: BaseNode, category_key: str = "category", title_key: str = "title") -> NodeDocument | None:
        """A node as a document, its id and its text the node's own.

        Args:
            node: The node.
            category_key: Where its metadata name its category.
            title_key: Where they name its title.

        Returns:
            The document; None where the node has no text.
        """
        text = whole_text(node.get_content(metadata_mode=MetadataMode.NONE))
        if not text.strip():
            return None
        title, category = (node.metadata.get(key) for key in (title_key, category_key))
        document = cls(
            id=node.node_id,
            text=text,
            title="" if title is None else whole_text(title),
            category=UNCATEGORISED if is_blank(category) else whole_text(category),
            metadata=plain_metadata(node.metadata),
        )
        document._node = node
        return document


def is_blank(value: object) -> bool:
    """Whether metadata say nothing with a value: None, or white space."""
    return value is None or not str(value).strip()


def as_node(hit: Hit) -> NodeWithScore:
    """A hit as a node: the passage that fits the question, and in its metadata where it comes from.

    ``title``, ``category``, ``score`` and ``category_score`` (None where there was no stage one), and where there are some
    ``headings`` and ``fused_score``, stand beside the document's own metadata, and take the place of such keys there. A
    language model is not shown the scores, and an embedding model sees the title alone, so that the node's vector, made
    anew, is that of the passage in the knowledge base. A node of an index comes back as it was, with the scores beside.
    """
    document = hit.document
    scores: dict[str, Any] = {
        "score": float(hit.score),
        "category_score": None if math.isnan(hit.category_score) else float(hit.category_score),
    }
    if hit.fused_score is not None:
        scores["fused_score"] = float(hit.fused_score)
    if isinstance(document, NodeDocument):
        return NodeWithScore(node=_with_scores(document, scores), score=float(hit.score))
    about: dict[str, Any] = {"title": document.title, "category": document.category}
    if hit.headings:
        about["headings"] = list(hit.headings)
    metadata = {**document.metadata, **about, **scores}
    untitled = [] if document.title else ["title"]
    node = TextNode(
        id_=document.id,
        text=hit.passage,
        metadata=metadata,
        excluded_llm_metadata_keys=[*scores, *untitled],
        excluded_embed_metadata_keys=[key for key in metadata if key != "title" or untitled],
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document.id)},
    )
    return NodeWithScore(node=node, score=float(hit.score))


def _with_scores(document: NodeDocument, scores: Mapping[str, Any]) -> BaseNode:
    node = document.node
    known = {"title": document.title, "category": document.category}
    new = {**{key: value for key, value in known.items() if key not in node.metadata}, **scores}
    return node.model_copy(
        update={
            "metadata": {**node.metadata, **new},
            "excluded_llm_metadata_keys": list(dict.fromkeys([*node.excluded_llm_metadata_keys, *new])),
            "excluded_embed_metadata_keys": list(dict.fromkeys([*node.excluded_embed_metadata_keys, *new])),
        }
    )


def as_hit(found: NodeWithScore) -> Hit | None:
    """A node that any retriever found as a hit; a score that it has not is 0. None where it has no text."""
    document = NodeDocument.of(found.node)
    if document is None:
        return None
    score = 0.0 if found.score is None or not math.isfinite(found.score) else float(found.score)
    return Hit(document, score, math.nan, document.text)
