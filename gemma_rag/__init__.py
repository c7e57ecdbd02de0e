"""RAG on Google's EmbeddingGemma: right vectors, two-stage retrieval, honest refusals.

Importing this package loads neither torch nor a framework: each name below is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_rag.answer import GroundedAnswerer as GroundedAnswerer
    from gemma_rag.documents import Category as Category
    from gemma_rag.documents import Document as Document
    from gemma_rag.embeddings import GemmaEmbeddings as GemmaEmbeddings
    from gemma_rag.errors import GemmaRagError as GemmaRagError
    from gemma_rag.knowledge_base import KnowledgeBase as KnowledgeBase
    from gemma_rag.loading import load_documents as load_documents
    from gemma_rag.prompts import Task as Task
    from gemma_rag.retriever import TwoStageRetriever as TwoStageRetriever
    from gemma_rag.thresholds import DynamicThreshold as DynamicThreshold

__version__ = "0.1.0"

_HOME = {
    "Category": "documents",
    "Document": "documents",
    "DynamicThreshold": "thresholds",
    "GemmaEmbeddings": "embeddings",
    "GemmaRagError": "errors",
    "KnowledgeBase": "knowledge_base",
    "Task": "prompts",
    "TwoStageRetriever": "retriever",
    "GroundedAnswerer": "answer",
    "load_documents": "loading",
}

__all__ = [
    "Category",
    "Document",
    "DynamicThreshold",
    "GemmaEmbeddings",
    "GemmaRagError",
    "GroundedAnswerer",
    "KnowledgeBase",
    "Task",
    "TwoStageRetriever",
    "load_documents",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
