"""What stores call a score, each turned into the cosine that it stands for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import InputError
from gemma_rag.store_scores import check_metric, check_norm, chroma_space, cosine_of, named


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("cosine", 0.28),
        ("cosine-distance", 0.72),
        ("inner-product", 0.28),
        ("inner-product-distance", 0.72),
        ("l2-squared", 1.44),  # 2 - 2 * 0.28
        ("l2", 1.2),
        ("relevance", 0.64),
        ("exp-cosine-distance", math.exp(-0.72)),
    ],
)
def test_a_score_of_every_metric_is_the_same_cosine(metric, score):
    assert cosine_of(score, metric) == pytest.approx(0.28)


@given(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0))
def test_a_better_cosine_stays_better_through_every_distance(one, other):
    for metric, score in (("cosine-distance", lambda c: 1 - c), ("l2-squared", lambda c: 2 - 2 * c)):
        low, high = sorted((one, other))
        assert cosine_of(score(high), metric) >= cosine_of(score(low), metric)


def test_rounding_beyond_one_is_one():
    assert (cosine_of(1.0002, "cosine"), cosine_of(-1e-7, "l2-squared")) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("metric", "score"), [("cosine", 17.3), ("l2-squared", 5.0), ("exp-cosine-distance", 0.0), ("cosine", math.nan)]
)
def test_a_score_that_is_no_cosine_is_refused_with_the_cure(metric, score):
    with pytest.raises(InputError, match=r"another metric \(name it: metric=.*l2-squared.*not normalised"):
        cosine_of(score, metric)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no metric is named 'manhattan': there are cosine, cosine-distance"):
        check_metric("manhattan")


@pytest.mark.parametrize(
    ("store", "name", "metric"),
    [
        ("Chroma", "l2", "l2-squared"),
        ("Milvus", "L2", "l2-squared"),
        ("Qdrant", "Euclid", "l2"),
        ("Chroma", "ip", "inner-product-distance"),
    ],
)
def test_a_known_stores_own_name_is_its_metric(store, name, metric):
    assert named(store, name) == metric


def test_a_name_without_a_cosine_is_refused_with_those_that_have_one():
    with pytest.raises(InputError, match=r"compares by Manhattan, which has no cosine.*Cosine, Dot, Euclid"):
        named("Qdrant", "Manhattan")


@pytest.mark.parametrize(
    ("configuration", "metadata", "space"),
    [
        ({"hnsw": {"space": "cosine"}}, None, "cosine"),
        ({"hnsw": None, "spann": {"space": "ip"}}, {"hnsw:space": "l2"}, "ip"),
        (None, {"hnsw:space": "cosine"}, "cosine"),
        ({}, None, "l2"),
    ],
)
def test_where_chroma_has_its_space(configuration, metadata, space):
    assert chroma_space(SimpleNamespace(configuration=configuration, metadata=metadata)) == space


def test_a_long_vector_is_refused_where_scores_are_cosines_for_norm_1_only():
    with pytest.raises(
        InputError, match=r"the vectors of Long have not norm 1 \(that of the question has 5\), and Store compares"
    ):
        check_norm([3.0, 4.0], "l2", model="Long", store="Store")


@pytest.mark.parametrize(("vector", "metric"), [([0.6, 0.8], "l2"), ([3.0, 4.0], "cosine"), ([3.0, 4.0], None)])
def test_vectors_whose_scores_are_cosines_pass(vector, metric):
    check_norm(vector, metric, model="Any", store="Store")
