"""Nodes of LlamaIndex and hits of gemma-rag, each made from the other."""

from __future__ import annotations

import math
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

    ``title``, ``category`` and where there are some ``headings`` stand beside the document's own metadata, and take the place
    of such keys there. An embedding model sees the title alone, so that the node's vector, made anew, is that of the passage in
    the knowledge base. A node of an index comes back as it is there. Nothing in the metadata depends on the question, since
    LlamaIndex knows equal nodes by a hash of text and metadata, and would not see that two questions found the same.
    """
    document = hit.document
    if isinstance(document, NodeDocument):
        node = document.node.model_copy(update={"metadata": dict(document.node.metadata)})  # the index's own stays as it is
        return NodeWithScore(node=node, score=float(hit.score))
    about: dict[str, Any] = {"title": document.title, "category": document.category}
    if hit.headings:
        about["headings"] = list(hit.headings)
    metadata = {**document.metadata, **about}
    untitled = [] if document.title else ["title"]
    made = TextNode(
        id_=document.id,
        text=hit.passage,
        metadata=metadata,
        excluded_llm_metadata_keys=untitled,
        excluded_embed_metadata_keys=[key for key in metadata if key != "title" or untitled],
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document.id)},
    )
    return NodeWithScore(node=made, score=float(hit.score))


def as_hit(found: NodeWithScore, category_key: str = "category", title_key: str = "title") -> Hit | None:
    """A node that any retriever found as a hit; a score that it has not is 0. None where it has no text."""
    document = NodeDocument.of(found.node, category_key, title_key)
    if document is None:
        return None
    score = 0.0 if found.score is None or not math.isfinite(found.score) else float(found.score)
    return Hit(document, score, math.nan, document.text)
