"""A small knowledge base, and what LangChain has moved from one of its distributions to another."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
from langchain_gemma_rag import TwoStageRetriever

from gemma_rag import Document, KnowledgeBase


@pytest.fixture
def classic() -> Callable[[str], ModuleType]:
    """Import a module of langchain-classic, or of the langchain from before it was split."""

    def imported(name: str) -> ModuleType:
        for package in ("langchain_classic", "langchain"):
            try:
                return importlib.import_module(f"{package}.{name}")
            except ImportError:
                continue
        pytest.skip("neither langchain-classic nor a langchain before 1.0 is installed")

    return imported


PAGES = [
    Document(id="red", text="red red red", category="colours", title="Red", metadata={"year": 2023}),
    Document(id="green", text="green red", category="colours", metadata={"year": 2024}),
    Document(id="blue", text="blue red", category="colours", metadata={"year": 2024, "score": "A+"}),
    Document(id="apple", text="apple apple", category="fruit"),
    Document(id="pear", text="pear apple", category="fruit"),
    Document(id="car", text="car bus", category="traffic/road"),
]


@pytest.fixture
def kb(words) -> KnowledgeBase:
    """Six documents in three categories, whose vectors can be computed by hand."""
    return KnowledgeBase.from_documents(PAGES, words)


@pytest.fixture
def retriever(words) -> TwoStageRetriever:
    """Over three documents to cite, with thresholds; what tests the retriever itself has one of its own."""
    pages = [
        Document(id="red", title="Red things", text="A red apple is red. It is no pear.", category="colours"),
        Document(id="green", title="Green things", text="A green plum is green.", category="colours"),
        Document(id="car", title="Cars", text="A car is faster than a bus.", category="traffic"),
    ]
    return TwoStageRetriever(
        knowledge_base=KnowledgeBase.from_documents(pages, words), k=2, category_threshold=0.3, document_threshold=0.3
    )
