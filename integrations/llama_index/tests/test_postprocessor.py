import math

import numpy as np
import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_gemma_rag import GemmaEmbedding, ThresholdPostprocessor
from pydantic import ValidationError

from gemma_rag import DynamicThreshold
from gemma_rag.errors import InputError
from gemma_rag.thresholds import Cut, FixedThreshold


def scored(*scores):
    return [NodeWithScore(node=TextNode(text=f"text {i}"), score=score) for i, score in enumerate(scores)]


def scores(nodes):
    return [node.score for node in nodes]


class TopOne:
    """A threshold of somebody's own."""

    def apply(self, scores):
        return Cut(np.asarray(scores) == max(scores), max(scores))


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.5, [0.8, 0.9, 0.52, 0.51]),
        ("balanced", [0.8, 0.9]),
        ("dynamic", [0.8, 0.9]),
        (DynamicThreshold(floor=0.85), [0.9]),
        (FixedThreshold(0.95), []),
        (TopOne(), [0.9]),
    ],
)
def test_what_is_good_enough_is_kept_in_its_order(threshold, kept):
    nodes = scored(0.8, 0.9, 0.52, 0.51, 0.49)
    assert scores(ThresholdPostprocessor(threshold=threshold).postprocess_nodes(nodes)) == kept


@pytest.mark.parametrize("threshold", [2.0, "lenient", None, True, object()])
def test_what_is_no_threshold_is_refused(threshold):
    with pytest.raises(ValidationError, match="threshold"):
        ThresholdPostprocessor(threshold=threshold)


def test_missing_scores_are_refused_with_the_cure():
    with pytest.raises(InputError, match=r"1 of 2 nodes have no score .*embed_model="):
        ThresholdPostprocessor(threshold=0.5).postprocess_nodes(scored(0.8, None))


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="NaN"):
        ThresholdPostprocessor(threshold=0.5).postprocess_nodes(scored(math.nan))


@pytest.mark.parametrize("embedded", [False, True])
def test_no_nodes_stay_no_nodes(embedded, minilm):
    chosen = ThresholdPostprocessor(threshold=0.5, embed_model=GemmaEmbedding(minilm) if embedded else None)
    assert chosen.postprocess_nodes([]) == []


# -- by embedding -------------------------------------------------------------------------------------------------------

TEXTS = ["Reset a password in the portal.", "Cats purr."]


@pytest.fixture
def nodes():
    return [NodeWithScore(node=TextNode(text=text, metadata={"title": f"T{i}"})) for i, text in enumerate(TEXTS)]


def test_nodes_are_scored_as_documents_with_their_titles(gemma, nodes):
    chosen = ThresholdPostprocessor(threshold=-1.0, embed_model=GemmaEmbedding(gemma))
    kept = chosen.postprocess_nodes(nodes, query_str="How?")
    wanted = np.array(gemma.embed_documents(TEXTS, titles=["T0", "T1"])) @ np.array(gemma.embed_query("How?"))
    np.testing.assert_allclose(scores(kept), wanted, atol=1e-6)


def test_nodes_are_scored_as_sentences_where_that_is_asked_for(gemma, nodes):
    chosen = ThresholdPostprocessor(threshold=-1.0, embed_model=gemma, symmetric=True)
    kept = chosen.postprocess_nodes(nodes, query_str=TEXTS[0])
    np.testing.assert_allclose(scores(kept), gemma.similarity(TEXTS[:1], TEXTS)[0], atol=1e-6)
    assert kept[0].score == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
async def test_nodes_are_scored_the_same_asynchronously(gemma, nodes, symmetric):
    chosen = ThresholdPostprocessor(threshold=-1.0, embed_model=gemma, symmetric=symmetric)
    if not hasattr(chosen, "apostprocess_nodes"):
        pytest.skip("this llama-index-core has no asynchronous postprocessors")
    kept = await chosen.apostprocess_nodes(nodes, query_str="How?")
    np.testing.assert_allclose(scores(kept), scores(chosen.postprocess_nodes(nodes, query_str="How?")), atol=1e-6)


def test_what_is_far_from_the_question_goes(minilm, nodes):
    chosen = ThresholdPostprocessor(threshold=0.4, embed_model=minilm)
    assert [each.text for each in chosen.postprocess_nodes(nodes, query_str="How do I reset my password?")] == TEXTS[:1]


def test_any_embedding_model_scores(nodes):
    kept = ThresholdPostprocessor(threshold=0.9, embed_model=MockEmbedding(embed_dim=4)).postprocess_nodes(nodes, query_str="a")
    np.testing.assert_allclose(scores(kept), [1.0, 1.0])


@pytest.mark.parametrize("symmetric", [False, True])
async def test_nodes_without_a_text_are_dropped(gemma, nodes, symmetric):
    chosen = ThresholdPostprocessor(threshold=-1.0, embed_model=gemma, symmetric=symmetric)
    blank = NodeWithScore(node=TextNode(text=" "))
    mixed = [blank, nodes[0], blank, nodes[1]]
    for kept in (
        chosen.postprocess_nodes(mixed, query_str="How?"),
        await chosen._apostprocess_nodes(mixed, QueryBundle("How?")),
    ):
        assert [each.text for each in kept] == TEXTS
        np.testing.assert_allclose(scores(kept), scores(chosen.postprocess_nodes(nodes, query_str="How?")), atol=1e-6)
    assert chosen.postprocess_nodes([blank], query_str="How?") == []
    assert await chosen._apostprocess_nodes([blank], QueryBundle("How?")) == []


def test_what_came_is_left_as_it_was(gemma, nodes):
    before = [each.model_dump() for each in nodes]
    kept = ThresholdPostprocessor(threshold=-1.0, embed_model=gemma).postprocess_nodes(nodes, query_str="How?")
    assert [each.model_dump() for each in nodes] == before
    assert all(new is not old for new, old in zip(kept, nodes, strict=True))


def test_without_a_question_nothing_can_be_embedded(gemma, nodes):
    with pytest.raises(InputError, match="query_str="):
        ThresholdPostprocessor(threshold=0.5, embed_model=gemma).postprocess_nodes(nodes)


@pytest.mark.parametrize("embed_model", [None, MockEmbedding(embed_dim=4)])
def test_sentence_similarity_needs_our_model(embed_model):
    with pytest.raises(ValidationError, match="GemmaEmbedding"):
        ThresholdPostprocessor(threshold="strict", embed_model=embed_model, symmetric=True)


# -- writing down -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.4, "strict", "dynamic", FixedThreshold(0.3), DynamicThreshold(floor=0.2)])
def test_it_comes_back_from_what_it_writes(threshold):
    written = ThresholdPostprocessor(threshold=threshold, embed_model=GemmaEmbedding(model="minilm")).to_json()
    again = ThresholdPostprocessor.from_json(written)
    assert again.threshold == threshold
    assert again.embed_model.embeddings.model == "minilm"


def test_its_name_is_written_with_it():
    assert ThresholdPostprocessor(threshold=0.4).to_dict()["class_name"] == ThresholdPostprocessor.class_name()
