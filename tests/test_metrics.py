"""Ranking metrics: values computed by hand, and what a library between us and trec_eval could get wrong."""

import importlib.util
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import InputError, MissingExtra
from gemma_rag.metrics import ranking_metrics

NAMES = ["recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10"]


def one(ranked, relevant):
    """The five figures of a single question."""
    values = ranking_metrics([ranked], [relevant])
    assert list(values) == NAMES
    assert all(value.shape == (1,) and value.dtype == np.float64 for value in values.values())
    return [float(value[0]) for value in values.values()]


def others(n):
    return [f"other {i}" for i in range(n)]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (1, [1, 1, 1, 1, 1]),
        (2, [0, 1, 1, 1 / 2, 1 / log2(3)]),
        (5, [0, 1, 1, 1 / 5, 1 / log2(6)]),
        (6, [0, 0, 1, 1 / 6, 1 / log2(7)]),
        (10, [0, 0, 1, 1 / 10, 1 / log2(11)]),
        (11, [0, 0, 0, 0, 0]),
    ],
)
def test_the_only_relevant_document_counts_by_its_place(place, expected):
    ranked = [*others(place - 1), "right", "last"]
    np.testing.assert_allclose(one(ranked, {"right"}), expected)


def test_of_several_relevant_documents_one_is_enough_for_recall_and_all_count_for_ndcg():
    # At places 2 and 4 of 4; a third one was not found. The best order would have put all three in front.
    gained = 1 / log2(3) + 1 / log2(5)
    best = 1 / log2(2) + 1 / log2(3) + 1 / log2(4)
    np.testing.assert_allclose(one(["a", "b", "c", "d"], ["d", "b", "unfound"]), [0, 1, 1, 1 / 2, gained / best])


def test_ndcg_is_1_when_ten_places_are_filled_with_relevant_documents_of_which_there_are_more():
    relevant = [f"right {i}" for i in range(14)]
    np.testing.assert_allclose(one(relevant[:10], relevant), [1, 1, 1, 1, 1])


def test_a_relevant_document_named_twice_counts_once():
    np.testing.assert_allclose(one(["a", "b"], ["b", "b"]), one(["a", "b"], {"b"}))


def test_nothing_found_gives_0():
    assert one(["a", "b"], {"c"}) == [0, 0, 0, 0, 0]
    assert one([], {"c"}) == [0, 0, 0, 0, 0]


def test_questions_keep_their_order_and_empty_rankings_their_places():
    # More than ten questions: as text, "10" sorts before "2".
    ranked = [["right"] if q % 3 == 0 else [] if q % 3 == 1 else ["wrong", "right"] for q in range(31)]
    values = ranking_metrics(ranked, [{"right"}] * 31)
    np.testing.assert_array_equal(values["mrr@10"], [(1.0, 0.0, 0.5)[q % 3] for q in range(31)])
    np.testing.assert_array_equal(values["recall@1"], [(1.0, 0.0, 0.0)[q % 3] for q in range(31)])


def test_only_empty_rankings_give_0_for_each_question():
    for value in ranking_metrics([[], [], []], [{"a"}, {"b"}, {"c"}]).values():
        np.testing.assert_array_equal(value, [0.0, 0.0, 0.0])


def test_no_questions_give_empty_arrays():
    assert {name: value.shape for name, value in ranking_metrics([], []).items()} == dict.fromkeys(NAMES, (0,))


@pytest.mark.parametrize(
    "document",
    ["with a space", "\ttab\n", "", " ", "公司法 第三条", "é", "0", "unfound 0", "a\0b", "\ud800"],
    ids=ascii,
)
def test_any_text_is_a_document_id(document):
    np.testing.assert_allclose(one(["a", document], {document}), [0, 1, 1, 1 / 2, 1 / log2(3)])
    assert one(["a"], {document}) == [0, 0, 0, 0, 0]


def test_ids_that_differ_after_a_nul_are_two_documents():
    assert one(["a\0b", "a\0c"], {"a\0c"})[3] == 0.5


@given(
    st.integers(1, 15).flatmap(
        lambda n: st.tuples(st.permutations([f"d{i}" for i in range(n)]), st.sets(st.integers(0, 20), min_size=1, max_size=16))
    )
)
def test_all_figures_follow_their_definitions(case):
    ranked, numbers = case
    relevant = {f"d{i}" for i in numbers}
    places = [place for place, document in enumerate(ranked[:10], start=1) if document in relevant]
    first = places[0] if places else float("inf")
    gained = sum(1 / log2(1 + place) for place in places)
    best = sum(1 / log2(1 + place) for place in range(1, min(10, len(relevant)) + 1))
    np.testing.assert_allclose(one(ranked, relevant), [first <= 1, first <= 5, first <= 10, 1 / first, gained / best])


@pytest.mark.parametrize(
    ("ranked", "relevant", "message"),
    [
        ([["a"]], [], "1 rankings, 0 sets"),
        ([], [{"a"}, {"b"}], "0 rankings, 2 sets"),
        ([["a"], ["a"]], [{"a"}, set()], "question 1 has no relevant document.*leave it out"),
        ([["a", "b", "a"]], [{"a"}], "question 0: the ranking names document 'a' more than once"),
        ([["a"]], ["a"], r"question 0: expected a list of document ids, and got the text 'a': write \['a'\]"),
        (["ab"], [{"a"}], "question 0: expected a list of document ids, and got the text 'ab'"),
    ],
)
def test_what_does_not_fit_is_refused(ranked, relevant, message):
    with pytest.raises(InputError, match=message):
        ranking_metrics(ranked, relevant)


def test_without_ir_measures_the_message_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ir_measures" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-rag\[eval\]'"):
        ranking_metrics([["a"]], [{"a"}])
