"""gemma-rag for LlamaIndex: right vectors, two-stage retrieval, thresholds, grounded answers."""

from llama_index_gemma_rag.embedding import GemmaEmbedding
from llama_index_gemma_rag.postprocessor import ThresholdPostprocessor
from llama_index_gemma_rag.query_engine import GroundedQueryEngine
from llama_index_gemma_rag.retriever import TwoStageRetriever

__all__ = ["GemmaEmbedding", "GroundedQueryEngine", "ThresholdPostprocessor", "TwoStageRetriever"]
