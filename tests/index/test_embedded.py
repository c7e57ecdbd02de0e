from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import KnowledgeBaseError
from gemma_rag.index import embedded, shortlist
from gemma_rag.index.compressed import Precision, compress
from gemma_rag.index.embedded import EmbeddedIndex, Part, Plan, Scored, joined
from gemma_rag.vectors import Floats, unit

DIRECTIONS = np.array([[1, 0], [0, 1], [0.6, 0.8], [-0.8, 0.6], [-1, 0]], dtype=np.float32)


class Case(NamedTuple):
    """Rows of an index in several parts, and questions with their opened categories."""

    parts: list[Part]
    categories: int
    queries: Floats
    opened: np.ndarray

    @property
    def index(self) -> EmbeddedIndex:
        return EmbeddedIndex(self.parts, self.categories)

    def rows(self) -> list[tuple[int, int, np.ndarray, bool]]:
        """Document, category, vector, and whether it is alive, of each row."""
        return [
            (document, code, vector, alive)
            for part in self.parts
            for document, code, vector, alive in zip(
                part.documents.tolist(),
                part.codes.tolist(),
                np.concatenate([part.head, part.tail], axis=1),
                np.ones(len(part.codes), dtype=bool) if part.alive is None else part.alive,
                strict=True,
            )
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # of each part the chunks of each document of each category; few directions, so that there are many ties
    categories = draw(st.integers(0, 4))
    category = st.lists(st.integers(1, 4), max_size=4)
    layout = draw(st.lists(st.lists(category, min_size=categories, max_size=categories), max_size=3))
    numbers = iter(draw(st.permutations(range(100, 148))))
    width = draw(st.integers(1, 2))
    picks = st.integers(0, len(DIRECTIONS) - 1)
    parts = []
    for chunks in layout:
        order = draw(st.permutations(range(categories)))
        documents, codes, alive = [], [], []
        for code in order:
            hidden = code if draw(st.integers(0, 9)) else -1  # a category that nobody can open
            for count in chunks[code]:
                documents += [next(numbers)] * count
                codes += [hidden] * count
                alive += [draw(st.booleans())] * count
        rows = DIRECTIONS[np.array(draw(st.lists(picks, min_size=len(codes), max_size=len(codes))), dtype=np.int64)]
        mask = np.array(alive, dtype=bool) if draw(st.booleans()) else None
        arrays = np.array(documents, dtype=np.int64), np.array(codes, dtype=np.int64)
        parts.append(Part(rows[:, :width], rows[:, width:], *arrays, mask))
    questions = draw(st.lists(picks, max_size=3))
    gates = st.lists(st.booleans(), min_size=categories, max_size=categories)
    opened = draw(st.lists(gates, min_size=len(questions), max_size=len(questions)))
    return Case(
        parts=parts,
        categories=categories,
        queries=DIRECTIONS[np.array(questions, dtype=np.int64)],
        opened=np.array(opened, dtype=bool).reshape(len(questions), categories),
    )


def brute_force(case: Case, question: int) -> dict[int, tuple[float, int]]:
    """Best score and its first row, of every living document of an opened category, by document."""
    found: dict[int, tuple[float, int]] = {}
    for row, (document, code, vector, alive) in enumerate(case.rows()):
        score = float(case.queries[question] @ vector)
        if alive and code >= 0 and case.opened[question, code] and (document not in found or score > found[document][0] + 1e-6):
            found[document] = (score, row)
    return found


@given(cases())
def test_the_living_documents_of_the_opened_categories_are_found_and_no_others(case: Case) -> None:
    index = case.index
    for i, scored in enumerate(index.search(case.queries, case.opened)):
        assert sorted(index.documents[scored.places].tolist()) == sorted(brute_force(case, i))
        assert scored.compared == len(scored.places)


@given(cases())
def test_a_document_scores_as_its_best_chunk_and_the_row_is_the_first_of_those(case: Case) -> None:
    index = case.index
    for i, scored in enumerate(index.search(case.queries, case.opened)):
        expected = brute_force(case, i)
        for document, score, row in zip(index.documents[scored.places].tolist(), scored.scores, scored.rows, strict=True):
            assert (float(score), row) == (pytest.approx(expected[document][0], abs=1e-6), expected[document][1])


@given(cases())
def test_every_row_knows_the_place_of_its_document(case: Case) -> None:
    index, rows = case.index, case.rows()
    places = index.places_of(np.arange(len(rows)))
    assert index.documents[places].tolist() == [document for document, *_ in rows]
    assert index.codes[places].tolist() == [code for _, code, *_ in rows]


@given(cases())
def test_every_document_knows_whether_it_is_there(case: Case) -> None:
    index, rows = case.index, case.rows()
    alive = np.ones(len(index.documents), dtype=bool) if index.alive is None else index.alive
    assert alive[index.places_of(np.arange(len(rows)))].tolist() == [bool(there) for *_, there in rows]


@given(cases(), st.randoms(use_true_random=False))
def test_vectors_come_whole_and_in_the_order_of_the_rows(case: Case, random: Random) -> None:
    index, expected = case.index, case.rows()
    rows = list(range(len(expected)))
    random.shuffle(rows)
    vectors = index.vectors(np.array(rows, dtype=np.int64))
    assert vectors.tolist() == [expected[row][2].tolist() for row in rows]


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
    index = EmbeddedIndex([Part(vectors[:, :16], vectors[:, 16:], documents, codes)], 20)
    for i, scored in enumerate(index.search(queries, opened)):
        assert scored.scores == pytest.approx(expected[i, scored.places], abs=1e-5)


@given(cases(), st.data())
def test_documents_scored_by_their_places_score_as_in_a_search_of_everything(case: Case, data: st.DataObject) -> None:
    index = case.index
    openable = np.flatnonzero(index.codes >= 0).tolist()
    places = np.array(data.draw(st.lists(st.sampled_from(openable), unique=True)) if openable else [], dtype=np.int64)
    everything = case._replace(opened=np.ones_like(case.opened))
    for i, query in enumerate(case.queries):
        expected = brute_force(everything, i)
        found = index.score(query, places)
        assert index.documents[found.places].tolist() == [
            document for document in index.documents[places].tolist() if document in expected
        ]
        for document, score, row in zip(index.documents[found.places].tolist(), found.scores, found.rows, strict=True):
            assert (float(score), row) == (pytest.approx(expected[document][0], abs=1e-6), expected[document][1])


@given(cases(), st.randoms(use_true_random=False))
def test_the_rows_of_documents_come_in_the_order_of_the_places(case: Case, random: Random) -> None:
    index = case.index
    places = list(range(len(index.documents)))
    random.shuffle(places)
    owners = index.places_of(np.arange(len(case.rows())))
    by_place = [np.flatnonzero(owners == place).tolist() for place in places]
    assert index.rows_of(np.array(places, dtype=np.int64)).tolist() == [row for rows in by_place for row in rows]


def whole(vectors: Floats, documents: np.ndarray, codes: np.ndarray, categories: int) -> EmbeddedIndex:
    return EmbeddedIndex([Part(vectors[:, :1], vectors[:, 1:], documents, codes)], categories)


def small_index() -> EmbeddedIndex:
    # category 0: document 7 with rows 0 and 1, document 5 with row 2; category 1: document 9 with row 3
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]], dtype=np.float32)
    return whole(vectors, np.array([7, 7, 5, 9]), np.array([0, 0, 0, 1]), 2)


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
    assert (found.places.tolist(), found.rows.tolist(), found.compared) == ([2, 0], [3, 1], 2)
    assert found.scores == pytest.approx([0.6, 0.8])


def test_the_rows_of_documents_by_hand() -> None:
    assert small_index().rows_of(np.array([2, 0])).tolist() == [3, 0, 1]


def test_places_and_rows_run_through_the_parts_by_hand() -> None:
    # rows 0 and 1 in one part; document 8 with rows 2 and 3 in the next
    parts = [
        Part(DIRECTIONS[:2], DIRECTIONS[:2, :0], np.array([4, 6]), np.array([1, 0])),
        Part(DIRECTIONS[2:4], DIRECTIONS[2:4, :0], np.array([8, 8]), np.array([1, 1])),
    ]
    index = EmbeddedIndex(parts, 2)
    assert (index.documents.tolist(), index.codes.tolist(), index.alive) == ([4, 6, 8], [1, 0, 1], None)
    [scored] = index.search(np.array([[0, 1]], dtype=np.float32), np.array([[False, True]]))
    assert (scored.places.tolist(), scored.rows.tolist()) == ([0, 2], [0, 2])
    assert scored.scores == pytest.approx([0, 0.8])


def test_one_document_at_the_end_of_one_part_and_another_of_the_same_number_in_the_next_are_two() -> None:
    # a document that came again: the old version is dead in the first part
    parts = [
        Part(DIRECTIONS[:1], DIRECTIONS[:1, :0], np.array([4]), np.array([0]), np.array([False])),
        Part(DIRECTIONS[1:2], DIRECTIONS[1:2, :0], np.array([4]), np.array([0])),
    ]
    index = EmbeddedIndex(parts, 1)
    [scored] = index.search(np.array([[0, 1]], dtype=np.float32), np.array([[True]]))
    assert (scored.places.tolist(), scored.scores.tolist()) == ([1], [1.0])


def test_no_places_have_no_scores() -> None:
    found = small_index().score(np.array([0, 1], dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert [(len(column), column.dtype) for column in found[:3]] == [(0, np.int64), (0, np.float32), (0, np.int64)]


def test_no_places_have_no_rows() -> None:
    assert small_index().rows_of(np.zeros(0, dtype=np.int64)).tolist() == []


def test_scores_by_places_are_float32_and_rows_int64() -> None:
    found = small_index().score(np.array([0, 1], dtype=np.float32), np.array([1]))
    assert [column.dtype for column in found[:3]] == [np.int64, np.float32, np.int64]


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
    index = whole(vectors, np.array([3, 3, 3]), np.array([0, 0, 0]), 1)
    [scored] = index.search(np.array([[1, 0]], dtype=np.float32), np.array([[True]]))
    assert scored.rows.tolist() == [1]


def test_scores_that_rounding_puts_above_1_are_clipped() -> None:
    vectors = unit(np.random.default_rng(1).normal(size=(200, 301)))
    index = whole(vectors, np.arange(200), np.zeros(200, dtype=np.int64), 1)
    assert max(scored.scores.max() for scored in index.search(vectors, np.ones((200, 1), dtype=bool))) <= 1.0


def test_scores_by_places_that_rounding_puts_above_1_are_clipped() -> None:
    vectors = unit(np.random.default_rng(1).normal(size=(200, 301)))
    index = whole(vectors, np.arange(200), np.zeros(200, dtype=np.int64), 1)
    assert max((vectors @ vector).max() for vector in vectors) > 1.0  # else this tests nothing
    assert max(index.score(vector, np.arange(200)).scores.max() for vector in vectors) <= 1.0


@pytest.mark.parametrize("chunks", [1, 2])
def test_of_very_many_documents_the_best_are_returned_and_all_were_compared(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "RETURNED", 10)
    random = np.random.default_rng(2)
    vectors, queries = unit(random.normal(size=(300, 8))), unit(random.normal(size=(2, 8)))
    documents = np.arange(300) // chunks
    index = whole(vectors, documents, np.sort(random.integers(0, 5, size=300 // chunks))[documents], 5)
    opened = np.ones((2, 5), dtype=bool)
    for few, many in zip(index.search(queries, opened), index.search(queries, opened, wanted=1_000), strict=True):
        assert (len(few.places), len(many.places), few.compared) == (10, 300 // chunks, 300 // chunks)
        assert sorted(few.scores.tolist()) == sorted(many.scores.tolist())[-10:]
    assert [len(scored.places) for scored in index.search(queries, opened, wanted=20)] == [20, 20]


def scored(*places: int) -> Scored:
    return Scored(np.array(places), np.array(places, dtype=np.float32) / 10, np.array(places) + 100, 2 * len(places))


def test_parts_are_joined_in_their_order() -> None:
    found = joined([scored(4, 5), scored(), scored(1)])
    assert found.places.tolist() == [4, 5, 1]
    assert found.scores == pytest.approx([0.4, 0.5, 0.1])
    assert (found.rows.tolist(), found.compared) == ([104, 105, 101], 6)


@pytest.mark.parametrize("parts", [[scored(4, 5)], [scored(), scored(4, 5)], [scored(4), scored(5)]])
def test_the_types_of_joined_parts_are_those_of_scores(parts: list[Scored]) -> None:
    assert [column.dtype for column in joined(parts)[:3]] == [np.int64, np.float32, np.int64]


@pytest.mark.parametrize("parts", [[], [scored()], [scored(), scored()]])
def test_nothing_joined_is_nothing(parts: list[Scored]) -> None:
    assert [(len(column), column.dtype) for column in joined(parts)[:3]] == [(0, np.int64), (0, np.float32), (0, np.int64)]


def test_what_was_compared_counts_even_where_nothing_was_found() -> None:
    nothing = scored()._replace(compared=7)
    assert [joined([nothing, nothing]).compared, joined([nothing, scored(4)]).compared] == [14, 9]


def empty() -> Part:
    none = np.zeros(0, dtype=np.int64)
    return Part(np.zeros((0, 2), dtype=np.float32), np.zeros((0, 0), dtype=np.float32), none, none)


@pytest.mark.parametrize("parts", [[], [empty()]])
def test_an_empty_index_finds_nothing(parts: list[Part]) -> None:
    index = EmbeddedIndex(parts, 0)
    assert (index.documents.tolist(), index.codes.tolist(), index.alive) == ([], [], None)
    [found] = index.search(np.array([[1, 0]], dtype=np.float32), np.zeros((1, 0), dtype=bool))
    assert [len(column) for column in found[:3]] == [0, 0, 0]


def test_vectors_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", DIRECTIONS)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = whole(mapped, np.arange(5), np.array([0, 0, 1, 1, 1]), 2)
    [found] = index.search(np.array([[1, 0]], dtype=np.float32), np.array([[False, True]]))
    assert found.scores == pytest.approx([0.6, -0.8, -1.0])


@st.composite
def planned(draw: st.DrawFn) -> tuple[Case, int, Plan, np.ndarray | None]:
    case = draw(cases())
    places = len(case.index.documents)
    mask = st.lists(st.booleans(), min_size=places, max_size=places)
    allowed = np.array(draw(mask), dtype=bool) if draw(st.booleans()) else None
    plan = Plan(dimensions=draw(st.integers(1, 2)), oversampling=draw(st.integers(1, 3)))
    return case, draw(st.integers(1, 4)), plan, allowed


@pytest.mark.parametrize("together", [1, 100])
@given(planned())
def test_a_shortlist_has_the_documents_that_are_best_by_the_first_components(
    together: int, given: tuple[Case, int, Plan, np.ndarray | None]
) -> None:
    case, wanted, plan, allowed = given
    index = case.index
    with pytest.MonkeyPatch.context() as patch:  # so small that every path is walked
        patch.setattr(shortlist, "_TOGETHER", together)
        patch.setattr(shortlist, "_SAMPLED", 2)
        patch.setattr(shortlist, "_SCORES", 4)
        patch.setattr(shortlist, "_QUESTIONS", 2)
        found = index.search(case.queries, case.opened, wanted, plan, allowed)
    places = {document: place for place, document in enumerate(index.documents.tolist())}
    for i, scored in enumerate(found):
        full = {document: of for document, of in brute_force(case, i).items() if allowed is None or allowed[places[document]]}
        coarse = brute_force(case._replace(queries=case.queries * (np.arange(2) < plan.dimensions)), i)
        best = sorted((coarse[document][0] for document in full), reverse=True)[: wanted * plan.oversampling]
        documents = index.documents[scored.places].tolist()
        assert sorted((coarse[document][0] for document in documents), reverse=True) == pytest.approx(best, abs=1e-6)
        assert scored.compared == len(full)
        assert scored.places.tolist() == sorted(set(scored.places.tolist()))
        for document, score, row in zip(documents, scored.scores, scored.rows, strict=True):
            assert (float(score), row) == (pytest.approx(full[document][0], abs=1e-6), full[document][1])


@given(planned())
def test_an_exact_search_passes_over_what_is_not_allowed(given: tuple[Case, int, Plan, np.ndarray | None]) -> None:
    case, _, _, allowed = given
    index = case.index
    everything, some = index.search(case.queries, case.opened), index.search(case.queries, case.opened, allowed=allowed)
    for all_scored, scored in zip(everything, some, strict=True):
        keep = np.ones(len(all_scored.places), dtype=bool) if allowed is None else allowed[all_scored.places]
        assert [column.tolist() for column in scored[:3]] == [column[keep].tolist() for column in all_scored[:3]]
        assert scored.compared == len(scored.places)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dimensions", [8, 16, 40, 64])
def test_a_long_shortlist_finds_what_the_exact_search_finds_one_by_one_and_in_a_batch(chunks: int, dimensions: int) -> None:
    random = np.random.default_rng(3)
    codes = np.sort(random.integers(0, 20, size=6_000))
    documents = np.repeat(np.arange(6_000), chunks)
    vectors = unit(random.normal(size=(len(documents), 64)) * 0.94 ** np.arange(64))
    queries = unit(random.normal(size=(40, 64)) * 0.94 ** np.arange(64))
    opened = random.random((40, 20)) < 0.3
    parts = []
    for half in (documents % 2 == 0, documents % 2 == 1):
        alive = random.random(6_000)[documents[half]] < 0.9
        parts.append(Part(vectors[half, :16], vectors[half, 16:], documents[half], codes[documents[half]], alive))
    index = EmbeddedIndex(parts, 20)
    plan = Plan(dimensions=dimensions, oversampling={8: 64, 16: 48, 40: 8, 64: 1}[dimensions])
    batch = index.search(queries, opened, 10, plan)
    exact = index.search(queries, opened)
    hits = 0
    for i, (some, every) in enumerate(zip(batch, exact, strict=True)):
        [alone] = index.search(queries[i : i + 1], opened[i : i + 1], 10, plan)
        assert alone.places.tolist() == some.places.tolist()
        assert alone.compared == some.compared == every.compared
        assert len(some.places) == min(10 * plan.oversampling, every.compared)
        best = every.places[np.argsort(-every.scores)[:10]]
        hits += len(set(best.tolist()) & set(some.places.tolist()))
        of = dict(zip(every.places.tolist(), every.scores.tolist(), strict=True))
        assert some.scores == pytest.approx([of[place] for place in some.places.tolist()], abs=1e-6)
    assert hits >= 0.97 * 400


def test_the_sample_that_promised_too_much_is_not_believed() -> None:
    # every sampled row is the question itself, and no other row is near: the threshold is too high for the rest
    vectors = np.zeros((4_096, 4), dtype=np.float32)
    vectors[:, 0], vectors[:, 1] = 0.6, 0.8
    vectors[::32] = [1, 0, 0, 0]
    index = whole(vectors, np.arange(4_096), np.zeros(4_096, dtype=np.int64), 1)
    queries = np.tile(np.array([[1, 0, 0, 0]], dtype=np.float32), (8, 1))
    for scored in index.search(queries, np.ones((8, 1), dtype=bool), 300, Plan(dimensions=1, oversampling=1)):
        assert len(scored.places) == 300
        assert set(range(0, 4_096, 32)) <= set(scored.places.tolist())


def test_without_a_number_of_wanted_documents_a_plan_does_not_count() -> None:
    [scored] = small_index().search(
        np.array([[0, 1]], dtype=np.float32), np.array([[True, True]]), plan=Plan(dimensions=1, oversampling=1)
    )
    assert len(scored.places) == 3


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = Plan(dimensions=128, oversampling=8)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("data", [b"", b"{}", b'{"dimensions": 0, "oversampling": 1}', b"\xff"])
def test_a_damaged_plan_says_how_to_make_it_anew(data: bytes) -> None:
    with pytest.raises(KnowledgeBaseError, match="gemma-rag plan"):
        Plan.from_json(data)


@pytest.mark.parametrize(("precision", "error"), [("float16", 2e-4), ("int8", 4e-3)])
def test_a_tail_in_fewer_bits_is_decoded_wherever_it_is_read(precision: Precision, error: float) -> None:
    random = np.random.default_rng(4)
    vectors, queries = unit(random.normal(size=(500, 64))), unit(random.normal(size=(6, 64)))
    documents, codes, opened = np.arange(500) // 2, np.repeat(np.arange(5), 100), np.ones((6, 5), dtype=bool)
    tail, scales = compress(vectors[:, 16:], precision)
    index = EmbeddedIndex([Part(vectors[:, :16], tail, documents, codes, scales=scales)], 5)
    exact = EmbeddedIndex([Part(vectors[:, :16], vectors[:, 16:], documents, codes)], 5)
    assert np.abs(index.vectors(np.arange(500)) - vectors).max() < error
    for found, expected in zip(index.search(queries, opened), exact.search(queries, opened), strict=True):
        assert found.scores == pytest.approx(expected.scores, abs=error)
    everything = Plan(dimensions=40, oversampling=1)
    for question in (queries, queries[:1]):
        for found, expected in zip(
            index.search(question, opened[: len(question)], 250, everything),
            exact.search(question, opened[: len(question)]),
            strict=True,
        ):
            assert found.places.tolist() == expected.places.tolist()
            assert found.scores == pytest.approx(expected.scores, abs=error)
