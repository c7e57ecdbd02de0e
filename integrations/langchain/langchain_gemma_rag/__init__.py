"""gemma-rag in LangChain: the same retrieval, thresholds and answers, in LangChain's own types.

The names here translate between the two libraries; what they do is done, and explained, in `gemma_rag`.
"""

from __future__ import annotations

from gemma_rag.embeddings import GemmaEmbeddings
from langchain_gemma_rag.cache import RoleSafeCache
from langchain_gemma_rag.chain import create_grounded_chain
from langchain_gemma_rag.documents import Retrieved
from langchain_gemma_rag.filter import ThresholdFilter
from langchain_gemma_rag.retriever import TwoStageRetriever

__version__ = "0.1.0"

__all__ = [
    "GemmaEmbeddings",
    "Retrieved",
    "RoleSafeCache",
    "ThresholdFilter",
    "TwoStageRetriever",
    "create_grounded_chain",
]
