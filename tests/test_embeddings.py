from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from gemma_rag import GemmaEmbeddings
from gemma_rag.errors import InputError, ModelUnavailable
from gemma_rag.prompts import Task


@pytest.fixture(scope="module")
def gemma(tiny_gemma) -> GemmaEmbeddings:
    return GemmaEmbeddings(model=str(tiny_gemma), device="cpu", show_progress=False)


class _OnMiniLM:
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return GemmaEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        return {"model": "minilm", "device": "cpu"}


class TestStandardUnitMiniLM(_OnMiniLM, EmbeddingsUnitTests):
    """LangChain's own tests, on the offline MiniLM."""


class TestStandardIntegrationMiniLM(_OnMiniLM, EmbeddingsIntegrationTests):
    """LangChain's own tests, on the offline MiniLM."""


class _OnTinyGemma(_OnMiniLM):
    @pytest.fixture(autouse=True)
    def _with_folder(self, tiny_gemma):
        self.folder = str(tiny_gemma)

    @property
    def embedding_model_params(self) -> dict:
        return {"model": self.folder, "device": "cpu"}


class TestStandardUnitTinyGemma(_OnTinyGemma, EmbeddingsUnitTests):
    """LangChain's own tests, on EmbeddingGemma's architecture."""


class TestStandardIntegrationTinyGemma(_OnTinyGemma, EmbeddingsIntegrationTests):
    """LangChain's own tests, on EmbeddingGemma's architecture."""


def test_the_default_without_access_fails_at_once_and_says_what_to_do():
    started = time.monotonic()
    with pytest.raises(ModelUnavailable, match="accept the licence"):
        GemmaEmbeddings()
    assert time.monotonic() - started < 5


def test_titles_go_into_the_document_prompt(gemma):
    with_titles = gemma.embed_documents(["dog", "fox"], titles=["Animals", None])
    written_out = gemma.model_copy(update={"detect_prompts": True}).embed(
        ["title: Animals | text: dog", "title: none | text: fox"], Task.DOCUMENT
    )
    assert np.abs(np.array(with_titles) - written_out).max() < 1e-6


def test_a_query_and_a_document_with_the_same_text_differ(gemma):
    assert np.abs(np.array(gemma.embed_query("dog")) - gemma.embed_documents(["dog"])[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["STS", "similarity", "PairClassification", Task.SIMILARITY])
def test_a_task_may_be_given_by_any_of_its_names(gemma, name):
    assert np.array_equal(gemma.embed(["dog"], name), gemma.embed(["dog"], Task.SIMILARITY))


def test_an_unknown_task_lists_the_tasks(gemma):
    with pytest.raises(InputError, match="query, document, classification"):
        gemma.embed(["dog"], "poetry")


def test_titles_for_anything_but_documents_are_refused(gemma):
    with pytest.raises(InputError, match="only documents have titles"):
        gemma.embed(["dog"], "query", titles=["Animals"])


def test_titles_of_another_number_are_refused(gemma):
    with pytest.raises(InputError, match="2 titles came for 1 texts"):
        gemma.embed_documents(["dog"], titles=["Animals", "Plants"])


def test_one_string_instead_of_a_list_is_refused(gemma):
    with pytest.raises(InputError, match="put it in a list"):
        gemma.embed_documents("dog")


def test_similarity_is_symmetric_and_1_for_equal_texts(gemma):
    scores = gemma.similarity(["dog", "fox"], ["dog", "fox"])
    assert scores.shape == (2, 2)
    assert np.abs(scores - scores.T).max() < 1e-5
    assert np.abs(np.diag(scores) - 1).max() < 1e-5


def test_meaning_is_seen(minilm):
    scores = minilm.similarity(["How do I reset my password?"], ["I forgot my password", "The cat sleeps"])[0]
    assert scores[0] > 0.6 > 0.2 > scores[1]


async def test_the_async_twins_give_the_same_vectors(gemma):
    assert np.allclose(await gemma.aembed_query("dog"), gemma.embed_query("dog"), atol=1e-6)
    documents = await gemma.aembed_documents(["dog"], titles=["Animals"])
    assert np.allclose(documents, gemma.embed_documents(["dog"], titles=["Animals"]), atol=1e-6)
    assert np.allclose(await gemma.aembed(["dog"], "clustering"), gemma.embed(["dog"], "clustering"), atol=1e-6)


async def test_the_event_loop_goes_on_while_a_text_is_embedded(gemma, monkeypatch):
    begun, released = threading.Event(), threading.Event()
    encode = gemma._encoder.encode

    def slow(inputs):
        begun.set()
        assert released.wait(30)
        return encode(inputs)

    monkeypatch.setattr(gemma._encoder, "encode", slow)
    task = asyncio.create_task(gemma.aembed_query("dog"))
    while not begun.is_set():
        await asyncio.sleep(0)  # other work of the loop
    released.set()  # reached only because the loop was free
    assert len(await task) == 48


def test_a_token_shows_nowhere(gemma, tiny_gemma):
    embeddings = GemmaEmbeddings(model=str(tiny_gemma), token="hf_very_secret")
    for text in (repr(embeddings), str(embeddings), embeddings.model_dump_json(), str(embeddings.recipe())):
        assert "very_secret" not in text


def test_the_recipe_makes_the_same_space_again(tiny_gemma):
    settings = {"dimensions": 16, "untrained_dimensions": True, "prompts": "e5", "max_tokens": 64}
    first = GemmaEmbeddings(model=str(tiny_gemma), device="cpu", **settings)
    assert GemmaEmbeddings(**first.recipe()).space == first.space


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="dimension\n"):
        GemmaEmbeddings(model="minilm", dimension=256)


def test_every_field_is_documented():
    assert [name for name, field in GemmaEmbeddings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, GemmaEmbeddings.model_copy])
def test_a_copy_shares_the_loaded_model(gemma, copied):
    assert copied(gemma)._encoder is gemma._encoder


def test_a_copy_with_other_settings_gives_the_vectors_of_those(gemma):
    cut = gemma.model_copy(update={"dimensions": 16, "untrained_dimensions": True})
    assert len(cut.embed_query("dog")) == 16


def test_another_process_gets_the_same_embeddings(gemma):
    assert pickle.loads(pickle.dumps(gemma)).space == gemma.space


def test_a_langchain_vector_store_takes_it(minilm):
    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore.from_texts(["Reset a password in the portal.", "Cats purr when they are content."], minilm)
    assert store.similarity_search("I forgot my login", k=1)[0].page_content.startswith("Reset")


def test_the_recipe_of_a_folder_is_found_from_anywhere(tiny_gemma, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_gemma.parent)
    recipe = GemmaEmbeddings(model=tiny_gemma.name).recipe()
    monkeypatch.chdir(tmp_path)
    assert GemmaEmbeddings(**recipe).model == str(tiny_gemma.resolve())
