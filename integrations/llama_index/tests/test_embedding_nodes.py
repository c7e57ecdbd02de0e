"""Nodes through LlamaIndex's own index and pipeline: their vectors are those of prompted documents with their titles."""

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import MetadataMode, TextNode
from llama_index_gemma_rag import GemmaEmbedding

BODY = "Reset it in the self-service portal."


def stored(index, node_id):
    return index.vector_store.data.embedding_dict[node_id]


def through_an_index(node, model):
    return stored(VectorStoreIndex([node], embed_model=model), node.node_id)


def through_a_pipeline(node, model):
    return IngestionPipeline(transformations=[model]).run(nodes=[node])[0].embedding


PATHS = pytest.mark.parametrize("embedded", [through_an_index, through_a_pipeline])


@PATHS
@pytest.mark.parametrize(
    ("metadata", "title", "rest"),
    [
        ({}, None, BODY),
        ({"title": "Passwords"}, "Passwords", BODY),
        ({"title": "密码"}, "密码", BODY),
        ({"author": "Mei", "title": "Passwords", "year": 2024}, "Passwords", f"author: Mei\nyear: 2024\n\n{BODY}"),
        ({"author": "Mei"}, None, f"author: Mei\n\n{BODY}"),
        ({"title": ""}, None, BODY),
        ({"title": None}, None, BODY),
    ],
)
def test_the_title_goes_into_the_prompt_and_the_rest_stays(embedded, metadata, title, rest, gemma):
    node = TextNode(text=BODY, metadata=metadata)
    np.testing.assert_allclose(
        embedded(node, GemmaEmbedding(gemma)), gemma.embed_documents([rest], titles=[title])[0], atol=1e-6
    )


@PATHS
def test_a_title_that_is_excluded_from_embedding_is_not_in_the_prompt(embedded, gemma):
    node = TextNode(text=BODY, metadata={"title": "Passwords"}, excluded_embed_metadata_keys=["title"])
    np.testing.assert_allclose(embedded(node, GemmaEmbedding(gemma)), gemma.embed_documents([BODY])[0], atol=1e-6)


@PATHS
def test_a_text_that_merely_contains_the_key_is_a_text(embedded, gemma):
    text = "A page has parts.\n\ntitle: the first of them\n\nbody: the second"
    np.testing.assert_allclose(
        embedded(TextNode(text=text), GemmaEmbedding(gemma)), gemma.embed_documents([text])[0], atol=1e-6
    )


@PATHS
def test_a_node_with_a_title_and_no_text_is_embedded_by_its_title(embedded, gemma):
    node = TextNode(text="", metadata={"title": "Passwords"})
    np.testing.assert_allclose(embedded(node, GemmaEmbedding(gemma)), gemma.embed_documents(["Passwords"])[0], atol=1e-6)


@PATHS
def test_another_key_can_hold_the_title(embedded, gemma):
    node = TextNode(text=BODY, metadata={"document_title": "Passwords"})
    model = GemmaEmbedding(gemma, title_key="document_title")
    np.testing.assert_allclose(embedded(node, model), gemma.embed_documents([BODY], titles=["Passwords"])[0], atol=1e-6)


@PATHS
def test_without_a_key_titles_stay_in_the_text(embedded, gemma):
    node = TextNode(text=BODY, metadata={"title": "Passwords"})
    whole = node.get_content(metadata_mode=MetadataMode.EMBED)
    np.testing.assert_allclose(
        embedded(node, GemmaEmbedding(gemma, title_key=None)), gemma.embed_documents([whole])[0], atol=1e-6
    )


def test_a_text_that_brings_its_prompt_is_left_to_the_core(gemma, caplog):
    text = "title: Passwords | text: Reset it.\n\nThen sign in."
    assert GemmaEmbedding(gemma).get_text_embedding(text) == gemma.embed_documents([text])[0]


def test_what_the_model_reads_has_the_title_once(gemma):
    inputs = GemmaEmbedding(gemma)._inputs([f"title: Passwords\nauthor: Mei\n\n{BODY}"])
    read = [gemma.profile.render(*each) for each in inputs]
    assert read == [f"title: Passwords | text: author: Mei\n\n{BODY}"]


FORMS_OF_NODES = pytest.mark.parametrize(
    ("text", "metadata", "title", "rest"),
    [
        ("title: the first line of a text\n\nmore", {}, None, "title: the first line of a text\n\nmore"),
        ("title: T\nfollows at once\n\nmore", {"title": "Own"}, "Own", "title: T\nfollows at once\n\nmore"),
        (BODY, {"title": "long " * 80}, ("long " * 80).strip(), BODY),
        (BODY, {"summary": "one\n\ntwo", "title": "T"}, "T", f"summary: one\n\ntwo\n\n{BODY}"),
        (BODY, {"title": "two\n\n lines"}, "two lines", BODY),
    ],
)


@FORMS_OF_NODES
async def test_of_a_node_itself_no_title_has_to_be_guessed(text, metadata, title, rest, gemma):
    model = GemmaEmbedding(gemma)
    (node,) = model([TextNode(text=text, metadata=metadata)])
    (also,) = await model.acall([TextNode(text=text, metadata=metadata)])
    wanted = gemma.embed_documents([rest], titles=[title])[0]
    np.testing.assert_allclose(node.embedding, wanted, atol=1e-6)
    np.testing.assert_allclose(also.embedding, wanted, atol=1e-6)
    index = VectorStoreIndex([node], embed_model=model)
    np.testing.assert_allclose(stored(index, node.node_id), wanted, atol=1e-6)


def test_a_template_of_the_users_own_does_not_hide_a_title(gemma):
    node = TextNode(text=BODY, metadata={"a": 1, "title": "T"}, text_template="{content} ({metadata_str})")
    (embedded,) = GemmaEmbedding(gemma)([node])
    np.testing.assert_allclose(embedded.embedding, gemma.embed_documents([f"{BODY} (a: 1)"], titles=["T"])[0], atol=1e-6)


async def test_an_asynchronous_pipeline_gives_the_same(gemma):
    model = GemmaEmbedding(gemma)
    nodes = await IngestionPipeline(transformations=[model]).arun(nodes=[TextNode(text=BODY, metadata={"title": "Passwords"})])
    np.testing.assert_allclose(nodes[0].embedding, gemma.embed_documents([BODY], titles=["Passwords"])[0], atol=1e-6)


def test_a_pipeline_cache_keeps_models_apart(tiny_gemma):
    settings = {"model": str(tiny_gemma), "device": "cpu", "show_progress": False, "untrained_dimensions": True}
    pipeline = IngestionPipeline(transformations=[GemmaEmbedding(**settings, dimensions=24)])
    first = pipeline.run(nodes=[TextNode(text=BODY, id_="a")])
    pipeline.transformations = [GemmaEmbedding(**settings, dimensions=12)]
    second = pipeline.run(nodes=[TextNode(text=BODY, id_="a")])
    assert [len(nodes[0].embedding) for nodes in (first, second)] == [24, 12]


@pytest.mark.parametrize("use_async", [False, True])
def test_an_index_of_three_hundred_nodes_is_one_call(counting, use_async):
    nodes = [TextNode(text=f"text {i}") for i in range(300)]
    VectorStoreIndex(nodes, embed_model=GemmaEmbedding(counting), use_async=use_async)
    assert counting._calls == [300]


def test_an_index_finds_by_prompted_questions(minilm, documents):
    pages = [Document(text=each.text, metadata={"title": each.title}, id_=each.id) for each in documents]
    index = VectorStoreIndex.from_documents(pages, embed_model=GemmaEmbedding(minilm))
    found = index.as_retriever(similarity_top_k=1).retrieve("How do I reset my password?")
    assert found[0].node.ref_doc_id == "password"
    wanted = minilm.embed_documents([documents[1].text], titles=["Passwords"])[0]
    assert found[0].score == pytest.approx(np.dot(minilm.embed_query("How do I reset my password?"), wanted), abs=1e-6)
