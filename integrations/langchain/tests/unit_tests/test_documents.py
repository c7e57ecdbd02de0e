import json
import math
import pickle

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_gemma_rag import Retrieved
from langchain_gemma_rag.documents import as_document, as_hit, document_id, each_once

from gemma_rag import documents as core
from gemma_rag.results import Hit, Retrieval


def hit(score: float = 0.5, category_score: float = 0.4, **more) -> Hit:
    fields = {"id": "a", "text": "The whole text.", "title": "A title", "category": "it"}
    document = core.Document(**(fields | more.pop("document", {})))
    return Hit(document, score, category_score, "the passage", **more)


def test_a_hit_becomes_a_document_with_its_passage_and_id():
    document = as_document(hit())
    assert (document.id, document.page_content) == ("a", "the passage")
    assert document.metadata == {"title": "A title", "category": "it", "score": 0.5, "category_score": 0.4}


def test_headings_and_the_fused_score_come_along_where_there_are_any():
    metadata = as_document(hit(headings=("Top", "Below"), fused_score=0.7)).metadata
    assert metadata["headings"] == ["Top", "Below"]
    assert metadata["fused_score"] == 0.7


def test_scores_are_plain_floats():
    metadata = as_document(hit(score=np.float32(0.5), category_score=np.float32(0.25))).metadata
    assert type(metadata["score"]) is float
    assert type(metadata["category_score"]) is float


def test_a_category_score_that_is_not_there_is_none():
    metadata = as_document(hit(category_score=math.nan)).metadata
    assert metadata["category_score"] is None
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata


def test_the_metadata_of_the_document_is_kept():
    assert as_document(hit(document={"metadata": {"year": 2024, "tags": ["x"]}})).metadata["tags"] == ["x"]


def test_where_names_collide_ours_wins_and_the_other_stays_in_the_retrieval():
    found = Retrieved.of(Retrieval.of_hits("question", [hit(document={"metadata": {"score": "A+"}})]))
    assert found[0].metadata["score"] == 0.5
    assert found.retrieval.hits[0].document.metadata["score"] == "A+"


def test_changing_a_document_does_not_change_the_hit():
    one = hit(document={"metadata": {"year": 2024}})
    as_document(one).metadata["year"] = 0
    assert one.document.metadata["year"] == 2024


def test_retrieved_is_a_list_that_keeps_its_retrieval():
    retrieval = Retrieval.of_hits("question", [hit()])
    found = Retrieved.of(retrieval)
    assert isinstance(found, list)
    assert found == [as_document(hit())]
    assert found.retrieval is retrieval


def test_a_list_made_by_its_class_is_one_without_a_retrieval():
    copied = Retrieved(Retrieved.of(Retrieval.of_hits("question", [hit()])))
    assert copied == [as_document(hit())]
    assert not hasattr(copied, "retrieval")
    assert pickle.loads(pickle.dumps(copied)) == copied


def test_retrieved_survives_pickling():
    found = pickle.loads(pickle.dumps(Retrieved.of(Retrieval.of_hits("question", [hit()]))))
    assert found[0].id == "a"
    assert found.retrieval.question == "question"


def test_a_document_becomes_a_hit():
    one = as_hit(Document("text", id="a", metadata={"title": "T", "category": "it", "score": 0.25, "year": 2024}))
    assert one.document == core.Document(
        id="a", text="text", title="T", category="it", metadata={"title": "T", "category": "it", "score": 0.25, "year": 2024}
    )
    assert (one.score, one.passage) == (0.25, "text")


@pytest.mark.parametrize("category", [None, 3, "", " "])
def test_a_document_without_a_category_gets_a_name_for_that(category):
    assert as_hit(Document("text", metadata={"category": category})).document.category == "uncategorised"


@pytest.mark.parametrize("score", [None, "high", math.nan, True, 1.01, -1.01, 12.7, math.inf, 10**400])
def test_what_is_no_score_counts_as_0(score):
    assert as_hit(Document("text", metadata={"score": score})).score == 0.0


@pytest.mark.parametrize(("score", "cosine"), [(1.0005, 1.0), (-1.0005, -1.0), (1, 1.0), (-0.25, -0.25)])
def test_what_rounding_put_beyond_1_is_1(score, cosine):
    assert as_hit(Document("text", metadata={"score": score})).score == cosine


def test_an_id_is_the_documents_own():
    assert document_id(Document("text", id="a", metadata={"pk": "b"}), "pk") == "a"


def test_an_id_is_taken_from_the_metadata():
    assert document_id(Document("text", metadata={"pk": 7}), "pk") == "7"


def test_without_any_id_equal_documents_have_equal_ones_and_others_differ():
    same = [document_id(Document("text", metadata={"year": 1})) for _ in range(2)]
    others = [document_id(Document("text", metadata={"year": 2})), document_id(Document("other", metadata={"year": 1}))]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 3


def test_halves_of_characters_are_mended():
    hit = as_hit(Document("bad \ud800 text", id="b\ud800", metadata={"title": "\ud800", "category": "a\ud800"}))
    assert (hit.passage, hit.document.title, hit.document.category) == ("bad ? text", "?", "a?")
    assert hit.document.id == "b?"


def test_documents_count_once():
    one, two = Document("text", id="a", metadata={"score": 0.5}), Document("text", id="a", metadata={"score": 0.4})
    other_text, other_id = Document("more", id="a"), Document("text", id="b")
    nameless = [Document("text", metadata={"page": 1, "score": score, "category_score": score}) for score in (0.5, 0.4)]
    other_page = Document("text", metadata={"page": 2})
    given = [one, two, other_text, other_id, two, *nameless, other_page]
    assert each_once(given) == [one, other_text, other_id, nameless[0], other_page]
