from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.index.exact import ExactIndex, Scored, joined
from gemma_rag.vectors import Floats, unit

DIRECTIONS = np.array([[1, 0], [0, 1], [0.6, 0.8], [-0.8, 0.6], [-1, 0]], dtype=np.float32)


class Case(NamedTuple):
    """Rows of an index, and questions with their opened categories."""

    vectors: Floats
    documents: np.ndarray
    codes: np.ndarray
    categories: int
    queries: Floats
    opened: np.ndarray

    @property
    def index(self) -> ExactIndex:
        return ExactIndex(self.vectors, self.documents, self.codes, self.categories)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # chunks of each document of each category; few directions, so that there are many ties
    layout = draw(st.lists(st.lists(st.integers(1, 4), max_size=4), max_size=4))
    chunks = [count for category in layout for count in category]
    numbers = draw(st.permutations(range(100, 100 + len(chunks))))
    picks = st.integers(0, len(DIRECTIONS) - 1)
    row_picks = draw(st.lists(picks, min_size=sum(chunks), max_size=sum(chunks)))
    questions = draw(st.lists(picks, max_size=3))
    gates = st.lists(st.booleans(), min_size=len(layout), max_size=len(layout))
    opened = draw(st.lists(gates, min_size=len(questions), max_size=len(questions)))
    return Case(
        vectors=DIRECTIONS[np.array(row_picks, dtype=np.int64)],
        documents=np.repeat(np.array(numbers, dtype=np.int64), chunks),
        codes=np.repeat(np.arange(len(layout)), [sum(category) for category in layout]),
        categories=len(layout),
        queries=DIRECTIONS[np.array(questions, dtype=np.int64)],
        opened=np.array(opened, dtype=bool).reshape(len(questions), len(layout)),
    )


def brute_force(case: Case, question: int) -> list[tuple[int, float, int]]:
    """Document, best score and its first row, of every document of an opened category, in the order of the rows."""
    found: dict[int, tuple[float, int]] = {}
    for row, (document, code) in enumerate(zip(case.documents.tolist(), case.codes.tolist(), strict=True)):
        score = float(case.queries[question] @ case.vectors[row])
        if case.opened[question, code] and (document not in found or score > found[document][0] + 1e-6):
            found[document] = (score, row)
    return [(document, score, row) for document, (score, row) in found.items()]


@given(cases())
def test_the_documents_of_the_opened_categories_are_found_and_no_others(case: Case) -> None:
    index = case.index
    found = [index.documents[scored.places].tolist() for scored in index.search(case.queries, case.opened)]
    assert found == [[document for document, _, _ in brute_force(case, i)] for i in range(len(case.queries))]


@given(cases())
def test_a_document_scores_as_its_best_chunk(case: Case) -> None:
    for i, scored in enumerate(case.index.search(case.queries, case.opened)):
        assert scored.scores.tolist() == pytest.approx([score for _, score, _ in brute_force(case, i)], abs=1e-6)


@given(cases())
def test_the_row_is_that_of_the_first_best_chunk(case: Case) -> None:
    for i, scored in enumerate(case.index.search(case.queries, case.opened)):
        assert scored.rows.tolist() == [row for _, _, row in brute_force(case, i)]


@given(cases())
def test_every_row_knows_the_place_of_its_document(case: Case) -> None:
    index = case.index
    assert index.documents[index.row_places].tolist() == case.documents.tolist()


@given(cases())
def test_every_document_knows_its_category(case: Case) -> None:
    index = case.index
    assert index.codes[index.row_places].tolist() == case.codes.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_documents_of_many_dimensions_agree_with_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    chunks = random.integers(1, 5, size=1_000)
    documents = np.repeat(np.arange(1_000), chunks)
    vectors, queries = unit(random.normal(size=(len(documents), 64))), unit(random.normal(size=(5, 64)))
    codes = np.sort(random.integers(0, 20, size=1_000))[documents]
    opened = random.random((5, 20)) < 0.3
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    expected = np.full((5, 1_000), -np.inf)
    np.maximum.at(expected.T, documents, scores.T)
    for i, scored in enumerate(ExactIndex(vectors, documents, codes, 20).search(queries, opened)):
        assert scored.scores == pytest.approx(expected[i, scored.places], abs=1e-5)


@given(cases(), st.data())
def test_documents_scored_by_their_places_score_as_in_a_search_of_everything(case: Case, data: st.DataObject) -> None:
    index = case.index
    places = np.array(data.draw(st.lists(st.sampled_from(range(len(index.documents))), unique=True)) if len(case.codes) else [])
    everything = case._replace(opened=np.ones_like(case.opened))
    for i, query in enumerate(case.queries):
        expected = {document: (score, row) for document, score, row in brute_force(everything, i)}
        found = index.score(query, places.astype(np.int64))
        assert found.places.tolist() == places.tolist()
        for document, score, row in zip(index.documents[found.places].tolist(), found.scores, found.rows, strict=True):
            assert (score, row) == (pytest.approx(expected[document][0], abs=1e-6), expected[document][1])


@given(cases(), st.randoms(use_true_random=False))
def test_the_rows_of_documents_come_in_the_order_of_the_places(case: Case, random: Random) -> None:
    index = case.index
    places = list(range(len(index.documents)))
    random.shuffle(places)
    by_place = [np.flatnonzero(index.row_places == place).tolist() for place in places]
    assert index.rows_of(np.array(places, dtype=np.int64)).tolist() == [row for rows in by_place for row in rows]


def small_index() -> ExactIndex:
    # category 0: document 7 with rows 0 and 1, document 5 with row 2; category 1: document 9 with row 3
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]], dtype=np.float32)
    return ExactIndex(vectors, np.array([7, 7, 5, 9]), np.array([0, 0, 0, 1]), 2)


def test_the_best_chunk_of_each_document_by_hand() -> None:
    # against (0, 1) the rows score 0, 0.8, 1, 0.6; document 7's best is 0.8 in row 1
    [scored] = small_index().search(np.array([[0, 1]], dtype=np.float32), np.array([[True, True]]))
    assert list(zip(scored.places.tolist(), scored.scores.round(6).tolist(), scored.rows.tolist(), strict=True)) == [
        (0, pytest.approx(0.8), 1),
        (1, pytest.approx(1.0), 2),
        (2, pytest.approx(0.6), 3),
    ]


def test_documents_scored_by_their_places_by_hand() -> None:
    # against (0, 1) the rows score 0, 0.8, 1, 0.6; places 2 and 0 are documents 9 and 7, of two categories
    found = small_index().score(np.array([0, 1], dtype=np.float32), np.array([2, 0]))
    assert (found.places.tolist(), found.rows.tolist()) == ([2, 0], [3, 1])
    assert found.scores == pytest.approx([0.6, 0.8])


def test_the_rows_of_documents_by_hand() -> None:
    assert small_index().rows_of(np.array([2, 0])).tolist() == [3, 0, 1]


def test_no_places_have_no_scores() -> None:
    found = small_index().score(np.array([0, 1], dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert [(len(column), column.dtype) for column in found] == [(0, np.int64), (0, np.float32), (0, np.int64)]


def test_no_places_have_no_rows() -> None:
    assert small_index().rows_of(np.zeros(0, dtype=np.int64)).tolist() == []


def test_scores_by_places_are_float32_and_rows_int64() -> None:
    found = small_index().score(np.array([0, 1], dtype=np.float32), np.array([1]))
    assert [column.dtype for column in found] == [np.int64, np.float32, np.int64]


def test_each_question_has_its_own_gate() -> None:
    queries = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    opened = np.array([[True, False], [False, True], [False, True]])
    found = small_index().search(queries, opened)
    assert [scored.places.tolist() for scored in found] == [[0, 1], [2], [2]]


def test_each_question_has_its_own_scores() -> None:
    # document 9 stands at (0.8, 0.6)
    queries = np.array([[1, 0], [0, 1]], dtype=np.float32)
    found = small_index().search(queries, np.array([[False, True], [False, True]]))
    assert [scored.scores.tolist() for scored in found] == [pytest.approx([0.8]), pytest.approx([0.6])]


def test_a_question_that_opens_nothing_scores_nothing() -> None:
    found = small_index().search(np.array([[1, 0], [1, 0]], dtype=np.float32), np.array([[False, False], [True, False]]))
    assert [len(scored.places) for scored in found] == [0, 2]


def test_no_questions_find_nothing() -> None:
    assert small_index().search(np.zeros((0, 2), dtype=np.float32), np.zeros((0, 2), dtype=bool)) == []


def test_of_equal_chunks_the_first_is_the_row() -> None:
    vectors = np.array([[0, 1], [1, 0], [1, 0]], dtype=np.float32)
    index = ExactIndex(vectors, np.array([3, 3, 3]), np.array([0, 0, 0]), 1)
    [scored] = index.search(np.array([[1, 0]], dtype=np.float32), np.array([[True]]))
    assert scored.rows.tolist() == [1]


def test_scores_that_rounding_puts_above_1_are_clipped() -> None:
    vector = unit(np.random.default_rng(1).normal(size=(200, 301)))
    index = ExactIndex(vector, np.arange(200), np.zeros(200, dtype=np.int64), 1)
    assert max(scored.scores.max() for scored in index.search(vector, np.ones((200, 1), dtype=bool))) <= 1.0


def test_scores_by_places_that_rounding_puts_above_1_are_clipped() -> None:
    vectors = unit(np.random.default_rng(1).normal(size=(200, 301)))
    index = ExactIndex(vectors, np.arange(200), np.zeros(200, dtype=np.int64), 1)
    assert max((vectors @ vector).max() for vector in vectors) > 1.0  # else this tests nothing
    assert max(index.score(vector, np.arange(200)).scores.max() for vector in vectors) <= 1.0


def scored(*places: int) -> Scored:
    return Scored(np.array(places), np.array(places, dtype=np.float32) / 10, np.array(places) + 100)


def test_parts_are_joined_in_their_order() -> None:
    whole = joined([scored(4, 5), scored(), scored(1)])
    assert whole.places.tolist() == [4, 5, 1]
    assert whole.scores == pytest.approx([0.4, 0.5, 0.1])
    assert whole.rows.tolist() == [104, 105, 101]


@pytest.mark.parametrize("parts", [[scored(4, 5)], [scored(), scored(4, 5)], [scored(4), scored(5)]])
def test_the_types_of_joined_parts_are_those_of_scores(parts: list[Scored]) -> None:
    assert [column.dtype for column in joined(parts)] == [np.int64, np.float32, np.int64]


@pytest.mark.parametrize("parts", [[], [scored()], [scored(), scored()]])
def test_nothing_joined_is_nothing(parts: list[Scored]) -> None:
    assert [(len(column), column.dtype) for column in joined(parts)] == [(0, np.int64), (0, np.float32), (0, np.int64)]


def test_an_empty_index_has_no_documents() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert ExactIndex(np.zeros((0, 2), dtype=np.float32), none, none, 0).documents.tolist() == []


def test_an_empty_index_finds_nothing() -> None:
    none = np.zeros(0, dtype=np.int64)
    index = ExactIndex(np.zeros((0, 2), dtype=np.float32), none, none, 0)
    [scored] = index.search(np.array([[1, 0]], dtype=np.float32), np.zeros((1, 0), dtype=bool))
    assert [len(column) for column in scored] == [0, 0, 0]


def test_vectors_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", DIRECTIONS)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = ExactIndex(mapped, np.arange(5), np.array([0, 0, 1, 1, 1]), 2)
    [scored] = index.search(np.array([[1, 0]], dtype=np.float32), np.array([[False, True]]))
    assert scored.scores == pytest.approx([0.6, -0.8, -1.0])
