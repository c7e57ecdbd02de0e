import datetime
import math

import pytest
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode
from llama_index_gemma_rag.nodes import NodeDocument, as_hit, as_node

from gemma_rag import Document
from gemma_rag.results import Hit

PAGE = Document(id="vpn", title="VPN", text="One. Two.", category="it", metadata={"year": 2024, "score": "theirs"})


def test_a_hit_becomes_a_node_with_its_passage_and_where_it_comes_from():
    node = as_node(Hit(PAGE, 0.8, 0.6, "Two.", headings=("A", "B"), fused_score=0.7))
    assert (node.node_id, node.text, node.score, node.node.ref_doc_id) == ("vpn", "Two.", 0.8, "vpn")
    assert node.metadata == {
        "score": "theirs",
        "year": 2024,
        "title": "VPN",
        "category": "it",
        "headings": ["A", "B"],
    }


def test_two_questions_find_nodes_that_are_equal_to_llama_index():
    hits = [Hit(PAGE, 0.8, 0.6, "Two.", fused_score=0.7), Hit(PAGE, 0.5, math.nan, "Two.")]
    assert as_node(hits[0]).node.hash == as_node(hits[1]).node.hash


def test_a_language_model_is_shown_where_it_comes_from():
    text = as_node(Hit(PAGE, 0.8, 0.6, "Two.", fused_score=0.7)).node.get_content(metadata_mode=MetadataMode.LLM)
    assert text == "score: theirs\nyear: 2024\ntitle: VPN\ncategory: it\n\nTwo."


def test_an_embedding_model_is_shown_the_title_alone():
    text = as_node(Hit(PAGE, 0.8, 0.6, "Two.")).node.get_content(metadata_mode=MetadataMode.EMBED)
    assert text == "title: VPN\n\nTwo."


@pytest.mark.parametrize("mode", [MetadataMode.LLM, MetadataMode.EMBED])
def test_a_title_that_is_not_there_is_shown_to_nobody(mode):
    untitled = Document(id="a", text="Two.", category="it")
    assert "title" not in as_node(Hit(untitled, 0.8, 0.6, "Two.")).node.get_content(metadata_mode=mode)


def test_a_node_becomes_a_hit():
    hit = as_hit(NodeWithScore(node=TextNode(id_="n", text="Text", metadata={"title": "T", "category": "c"}), score=0.5))
    assert (hit.document.id, hit.document.title, hit.document.category, hit.passage) == ("n", "T", "c", "Text")
    assert hit.score == 0.5
    assert math.isnan(hit.category_score)


@pytest.mark.parametrize("metadata", [{}, {"category": None}, {"category": "  "}])
def test_a_node_without_a_category_is_uncategorised(metadata):
    assert as_hit(NodeWithScore(node=TextNode(text="Text", metadata=metadata))).document.category == "uncategorised"


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_not_there_is_0(score):
    assert as_hit(NodeWithScore(node=TextNode(text="Text"), score=score)).score == 0.0


@pytest.mark.parametrize("node", [TextNode(text=" \n"), ImageNode(image_url="http://host/picture.png")])
def test_a_node_without_a_text_is_no_hit(node):
    assert as_hit(NodeWithScore(node=node, score=0.5)) is None


def test_metadata_that_are_no_json_become_json():
    metadata = {"day": datetime.date(2024, 5, 1), "nan": math.nan, "set": {1}, "inner": {"x": (1, 2)}, "path": object}
    plain = NodeDocument.of(TextNode(text="Text", metadata=metadata)).metadata
    assert plain == {"day": "2024-05-01", "nan": None, "set": [1], "inner": {"x": [1, 2]}, "path": str(object)}


def test_halves_of_characters_are_replaced():
    assert NodeDocument.of(TextNode(text="a\ud800b")).text == "a?b"


def test_a_node_of_an_index_comes_back_as_it_was():
    node = TextNode(id_="n", text="Text", metadata={"topic": "c", "score": "4 stars"}, excluded_llm_metadata_keys=["topic"])
    back = as_node(Hit(NodeDocument.of(node, "topic"), 0.8, 0.6, "Text")).node
    assert (back, back.hash) == (node, node.hash)


def test_changing_a_node_does_not_change_the_index():
    node = TextNode(id_="n", text="Text", metadata={"topic": "c"})
    as_node(Hit(NodeDocument.of(node, "topic"), 0.8, 0.6, "Text")).node.metadata["topic"] = "d"
    assert node.metadata == {"topic": "c"}
