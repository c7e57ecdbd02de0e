"""One behaviour, two faces: the core, LangChain's and LlamaIndex's retriever give the same of the same questions.

200 questions of clinc150 where GEMMA_RAG_DATA names the folder that has it, and the sample handbook's own always.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gemma_rag import TwoStageRetriever as LangChainRetriever
from langchain_gemma_rag import create_grounded_chain
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index_gemma_rag import GemmaEmbedding, GroundedQueryEngine
from llama_index_gemma_rag import TwoStageRetriever as LlamaIndexRetriever

from gemma_rag.answer import GroundedAnswerer
from gemma_rag.embeddings import GemmaEmbeddings
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import Dataset, texts
from gemma_rag.loading import load_documents
from gemma_rag.retriever import TwoStageRetriever

DATA = os.environ.get("GEMMA_RAG_DATA")
SAMPLE = Path(__file__).parent.parent / "gemma_rag" / "sample"


class Asked(NamedTuple):
    """A knowledge base and questions to it."""

    base: KnowledgeBase
    questions: list[str]


class Seen(NamedTuple):
    """What each of the three has to agree on."""

    ids: list[str]
    scores: list[float]
    categories: list[str]
    outcome: str


@pytest.fixture(scope="module")
def sample(minilm) -> Asked:
    rows = [json.loads(line) for line in (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = load_documents(SAMPLE / "handbook").documents
    return Asked(KnowledgeBase.from_documents(documents, minilm), [row["question"] for row in rows])


@pytest.fixture(scope="module")
def clinc150(minilm) -> Asked:
    if DATA is None:
        pytest.skip("GEMMA_RAG_DATA does not name the folder of the evaluation sets")
    dataset = Dataset.load(Path(DATA) / "clinc150")
    questions = random.Random(0).sample(texts(dataset.split("test")), 200)
    return Asked(KnowledgeBase.from_documents(dataset.documents, minilm), questions)


@pytest.fixture(params=["sample", "clinc150"])
def asked(request) -> Asked:
    found: Asked = request.getfixturevalue(request.param)
    return found


def of_core(retrieval: Any) -> Seen:
    hits = retrieval.hits
    return Seen(
        [hit.document.id for hit in hits],
        [hit.score for hit in hits],
        [hit.document.category for hit in hits],
        retrieval.outcome.value,
    )


def of_langchain(documents: Any) -> Seen:
    return Seen(
        [document.id for document in documents],
        [document.metadata["score"] for document in documents],
        [document.metadata["category"] for document in documents],
        documents.retrieval.outcome.value,
    )


def of_llama_index(nodes: Any, outcome: str) -> Seen:
    return Seen(
        [node.node.node_id for node in nodes],
        [node.score for node in nodes],
        [node.metadata["category"] for node in nodes],
        outcome,
    )


def check_same(one: Seen, other: Seen) -> None:
    assert (one.ids, one.categories, one.outcome) == (other.ids, other.categories, other.outcome)
    assert np.allclose(one.scores, other.scores, rtol=0, atol=1e-6)


def test_langchain_gives_what_the_core_gives(asked) -> None:
    core, face = TwoStageRetriever(asked.base), LangChainRetriever(knowledge_base=asked.base)
    outcomes = set()
    for question in asked.questions:
        expected = of_core(core.retrieve(question))
        check_same(of_langchain(face.invoke(question)), expected)
        outcomes.add(expected.outcome)
    assert len(outcomes) > 1  # refusals are among them


def test_llama_index_gives_what_the_core_gives(asked) -> None:
    core, face = TwoStageRetriever(asked.base), LlamaIndexRetriever(knowledge_base=asked.base)
    for question in asked.questions:
        check_same(
            of_llama_index(face.retrieve(question), face.explain(question).outcome.value), of_core(core.retrieve(question))
        )


def test_both_give_it_asynchronously_too(asked) -> None:
    core = TwoStageRetriever(asked.base)
    langchain, llama_index = LangChainRetriever(knowledge_base=asked.base), LlamaIndexRetriever(knowledge_base=asked.base)

    async def ask(question: str) -> tuple[Any, Any]:
        return await langchain.ainvoke(question), await llama_index.aretrieve(question)

    for question in asked.questions[:20]:
        documents, nodes = asyncio.run(ask(question))
        expected = of_core(core.retrieve(question))
        check_same(of_langchain(documents), expected)
        check_same(of_llama_index(nodes, expected.outcome), expected)


def test_the_answers_are_the_same(sample) -> None:
    core = GroundedAnswerer(TwoStageRetriever(sample.base))
    chain = create_grounded_chain(LangChainRetriever(knowledge_base=sample.base))
    engine = GroundedQueryEngine(LlamaIndexRetriever(knowledge_base=sample.base))
    for question in sample.questions:
        answer = core.answer(question)
        linked, response = chain.invoke(question), engine.query(question)
        assert linked["answer"] == str(response) == answer.text
        assert linked["outcome"] == response.metadata["outcome"] == answer.outcome.value
        cited = [citation.id for citation in answer.citations]
        assert [each["id"] for each in linked["citations"]] == [each["id"] for each in response.metadata["citations"]] == cited


@pytest.fixture(scope="module")
def gemma(tiny_gemma) -> GemmaEmbeddings:
    return GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)


TEXTS = ["The fox sleeps under the hedge.", "A dog barks at the moon.", "Rain falls on the roof."]


def test_inside_langchains_store_the_vectors_are_the_prompted_ones(gemma) -> None:
    store = InMemoryVectorStore(gemma)
    store.add_documents([LangChainDocument(id=str(i), page_content=text) for i, text in enumerate(TEXTS)])
    by_hand = prompted(gemma, [f"title: none | text: {text}" for text in TEXTS])
    for i, row in enumerate(by_hand):
        assert np.allclose(store.store[str(i)]["vector"], row, atol=1e-5)
    ((_, score),) = store.similarity_search_with_score("Where is the fox?", k=1)
    query = prompted(gemma, ["task: search result | query: Where is the fox?"])[0]
    assert score == pytest.approx(float((by_hand @ query).max()), abs=1e-5)


def test_inside_llama_indexs_index_the_vectors_are_the_prompted_ones(gemma) -> None:
    nodes = [TextNode(id_=str(i), text=text, metadata={"title": f"Page {i}"}) for i, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=GemmaEmbedding(embeddings=gemma))
    by_hand = prompted(gemma, [f"title: Page {i} | text: {text}" for i, text in enumerate(TEXTS)])
    stored = index.vector_store.data.embedding_dict
    for i, row in enumerate(by_hand):
        assert np.allclose(stored[str(i)], row, atol=1e-5)
    (best,) = index.as_retriever(similarity_top_k=1).retrieve("Where is the fox?")
    query = prompted(gemma, ["task: search result | query: Where is the fox?"])[0]
    assert best.score == pytest.approx(float((by_hand @ query).max()), abs=1e-5)


def prompted(gemma: GemmaEmbeddings, texts: list[str]) -> np.ndarray:
    """The model's own vectors of texts with their prompts written out, by sentence-transformers alone."""
    from sentence_transformers import SentenceTransformer

    rows: np.ndarray = SentenceTransformer(gemma.model, device="cpu").encode(texts, prompt="", normalize_embeddings=True)
    return rows
