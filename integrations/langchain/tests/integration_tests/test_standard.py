"""LangChain's own tests: for retrievers, over a knowledge base and over a vector store, and for embeddings."""

import pytest
from langchain_core.documents import Document
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gemma_rag import RoleSafeCache, TwoStageRetriever
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests

from gemma_rag import Document as Page
from gemma_rag import KnowledgeBase

TEXTS = {
    "vpn": ("it", "Install the VPN client, then sign in with the code on your phone."),
    "password": ("it", "Reset a forgotten password in the self-service portal."),
    "phone": ("it", "The code for signing in is shown by the app on your phone."),
    "leave": ("hr", "Everyone has 27 days of annual leave."),
    "sick": ("hr", "Call in sick before ten in the morning."),
}


class OverKnowledgeBase(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, minilm):
        pages = [Page(id=name, text=text, category=category) for name, (category, text) in TEXTS.items()]
        self.knowledge_base = KnowledgeBase.from_documents(pages, minilm)

    @property
    def retriever_constructor(self):
        return TwoStageRetriever

    @property
    def retriever_constructor_params(self):
        return {"knowledge_base": self.knowledge_base, "document_threshold": -1.0}

    @property
    def retriever_query_example(self):
        return "How do I sign in to the VPN?"


class TestOverKnowledgeBase(OverKnowledgeBase):
    pass


class TestOverVectorStore(OverKnowledgeBase):
    @pytest.fixture(autouse=True)
    def _filled(self, minilm):
        self.store = InMemoryVectorStore(minilm)
        self.store.add_documents(
            [Document(text, id=name, metadata={"category": category}) for name, (category, text) in TEXTS.items()]
        )

    @property
    def retriever_constructor(self):
        return TwoStageRetriever.from_vectorstore

    @property
    def retriever_constructor_params(self):
        return {"store": self.store, "document_threshold": -1.0}


class TestRoleSafeCache(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _loaded(self, minilm):
        self.minilm = minilm

    @property
    def embeddings_class(self):
        return RoleSafeCache

    @property
    def embedding_model_params(self):
        return {"embeddings": self.minilm, "store": InMemoryByteStore()}
