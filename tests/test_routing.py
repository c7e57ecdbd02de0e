from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import InputError
from gemma_rag.routing import Gate, centroids
from gemma_rag.vectors import Floats, unit

COSINES = st.integers(-1000, 1000).map(lambda thousandths: thousandths / 1000)
SCORES = st.integers(1, 8).flatmap(
    lambda count: st.lists(st.lists(COSINES, min_size=count, max_size=count), min_size=1, max_size=4)
)
MASSES = st.floats(0.01, 0.999)
TEMPERATURES = st.floats(0.01, 2.0)
# with a temperature of 1 the softmax gives back the probabilities themselves: exp(ln p) = p
HALF_THIRD_FIFTH = [math.log(0.5), math.log(0.3), math.log(0.2)]


def rows(*values: list[float]) -> Floats:
    return np.array(values, dtype=np.float32)


def shares(scores: Floats, temperature: float) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name_weight", "expected"),
    [
        (0.0, 0.8),  # the query against the centroid: 0 * 0.6 + 1 * 0.8
        (1.0, 0.28),  # the classification against the name: 1 * 0.28 + 0 * 0.96
        (0.25, 0.67),  # 0.25 * 0.28 + 0.75 * 0.8 = 0.07 + 0.6
        (0.5, 0.54),  # 0.5 * 0.28 + 0.5 * 0.8
    ],
)
def test_a_score_is_the_weighted_mean_of_the_names_and_the_centroids_cosine(name_weight: float, expected: float) -> None:
    gate = Gate(name_weight=name_weight)
    scores = gate.scores(rows([1, 0]), rows([0, 1]), names=rows([0.28, 0.96]), centroids=rows([0.6, 0.8]))
    assert scores == pytest.approx(expected)


def test_the_name_counts_a_fifth_by_default() -> None:
    # 0.2 * 0.28 + 0.8 * 0.8 = 0.056 + 0.64
    scores = Gate().scores(rows([1, 0]), rows([0, 1]), names=rows([0.28, 0.96]), centroids=rows([0.6, 0.8]))
    assert scores == pytest.approx(0.696)


def test_scores_have_a_row_for_each_question_and_a_column_for_each_category() -> None:
    questions, categories = rows([1, 0], [0, 1]), rows([1, 0], [0, 1], [0.6, 0.8])
    scores = Gate().scores(questions, questions, categories, categories)
    assert scores == pytest.approx(rows([1, 0, 0.6], [0, 1, 0.8]))


def test_scores_are_float32() -> None:
    assert Gate().scores(rows([1, 0]), rows([1, 0]), rows([1, 0]), rows([1, 0])).dtype == np.float32


def test_scores_of_no_categories_have_no_columns() -> None:
    none = np.zeros((0, 2), dtype=np.float32)
    assert Gate().scores(rows([1, 0]), rows([1, 0]), none, none).shape == (1, 0)


# -- open -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        (0.49, [True, False, False]),  # 0.5 reaches it
        (0.51, [True, True, False]),  # 0.5 does not, 0.5 + 0.3 does
        (0.79, [True, True, False]),
        (0.81, [True, True, True]),  # 0.8 does not, 0.5 + 0.3 + 0.2 does
    ],
)
def test_the_best_categories_are_opened_until_they_hold_the_mass(mass: float, expected: list[bool]) -> None:
    assert Gate(mass=mass, temperature=1.0).open(rows(HALF_THIRD_FIFTH)).tolist() == [expected]


def test_the_order_of_the_categories_does_not_matter() -> None:
    a, b, c = HALF_THIRD_FIFTH
    assert Gate(mass=0.51, temperature=1.0).open(rows([c, a, b])).tolist() == [[False, True, True]]


@pytest.mark.parametrize(("mass", "opened"), [(0.88, 1), (0.89, 2)])
def test_scores_are_divided_by_the_temperature(mass: float, opened: int) -> None:
    # (0.6 - 0.5) / 0.05 = 2, so the better one holds e^2 / (e^2 + 1) = 7.389 / 8.389 = 0.881
    assert Gate(mass=mass, temperature=0.05).open(rows([0.6, 0.5])).sum() == opened


def test_every_question_opens_its_own_categories() -> None:
    assert Gate(mass=0.5).open(rows([0.9, 0.1], [0.1, 0.9])).tolist() == [[True, False], [False, True]]


@given(SCORES, MASSES, TEMPERATURES)
def test_the_opened_categories_hold_the_mass(scores: list[list[float]], mass: float, temperature: float) -> None:
    array = rows(*scores)
    opened = Gate(mass=mass, temperature=temperature).open(array)
    held = np.where(opened, shares(array, temperature), 0.0).sum(axis=1)
    assert (held >= mass - 1e-9).all()


@given(SCORES, MASSES, TEMPERATURES)
def test_without_the_least_opened_category_the_mass_is_missed(
    scores: list[list[float]], mass: float, temperature: float
) -> None:
    array = rows(*scores)
    opened = Gate(mass=mass, temperature=temperature).open(array)
    held = np.where(opened, shares(array, temperature), 0.0).sum(axis=1)
    least = np.where(opened, shares(array, temperature), np.inf).min(axis=1)
    assert (held - least < mass + 1e-9).all()


@given(SCORES, MASSES, TEMPERATURES)
def test_no_closed_category_scores_above_an_opened_one(scores: list[list[float]], mass: float, temperature: float) -> None:
    array = rows(*scores)
    opened = Gate(mass=mass, temperature=temperature).open(array)
    assert (np.where(opened, array, np.inf).min(axis=1) >= np.where(opened, -np.inf, array).max(axis=1)).all()


@given(SCORES, st.floats(1e-6, 1.0), st.floats(1e-6, 1e6), st.one_of(st.none(), st.integers(1, 9)))
def test_the_best_category_is_always_opened(
    scores: list[list[float]], mass: float, temperature: float, most: int | None
) -> None:
    array = rows(*scores)
    opened = Gate(mass=mass, temperature=temperature).open(array, most)
    assert opened[np.arange(len(array)), array.argmax(axis=1)].all()


@given(SCORES, MASSES, st.integers(1, 9))
def test_no_more_than_max_categories_are_opened(scores: list[list[float]], mass: float, most: int) -> None:
    array = rows(*scores)
    wanted = Gate(mass=mass).open(array).sum(axis=1)
    assert Gate(mass=mass).open(array, most).sum(axis=1).tolist() == np.minimum(wanted, most).tolist()


def test_max_categories_keeps_the_best_ones() -> None:
    assert Gate().open(rows([0.50, 0.52, 0.51]), max_categories=2).tolist() == [[False, True, True]]


def test_max_categories_keeps_the_best_ones_whose_shares_are_all_0_to_a_float() -> None:
    # e^(-0.8 / 0.001) = e^-800 and e^-900 are both below the smallest float
    opened = Gate(mass=1.0, temperature=0.001).open(rows([1.0, 0.1, 0.2]), max_categories=2)
    assert opened.tolist() == [[True, False, True]]


def test_of_equal_categories_only_as_many_are_opened_as_the_mass_needs() -> None:
    # each holds 0.25: 0.5 is below 0.6, 0.75 is not
    assert Gate(mass=0.6).open(rows([0.3, 0.3, 0.3, 0.3])).sum() == 3


def test_of_equal_categories_the_first_ones_are_opened() -> None:
    assert Gate(mass=0.6).open(rows([0.3, 0.3, 0.3, 0.3])).tolist() == [[True, True, True, False]]


@given(SCORES)
def test_a_mass_of_one_opens_every_category(scores: list[list[float]]) -> None:
    assert Gate(mass=1.0).open(rows(*scores)).all()


def test_a_mass_of_one_opens_categories_whose_share_is_too_small_for_a_float() -> None:
    # (1 - -1) / 0.05 = 40: the worse one holds e^-40 = 4e-18, which a sum near 1 cannot show
    assert Gate(mass=1.0).open(rows([1.0, -1.0])).tolist() == [[True, True]]


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert Gate(temperature=1e-6).open(rows([0.9, -0.9])).tolist() == [[True, False]]


def test_a_single_category_is_opened() -> None:
    assert Gate().open(rows([-0.7])).tolist() == [[True]]


def test_where_there_are_no_categories_none_is_opened() -> None:
    assert Gate().open(np.zeros((3, 0), dtype=np.float32)).shape == (3, 0)


def test_no_questions_open_nothing() -> None:
    assert Gate().open(np.zeros((0, 4), dtype=np.float32)).shape == (0, 4)


def test_ten_thousand_equal_categories_are_opened_up_to_the_mass() -> None:
    # each holds 1/10,000: 5,000 of them hold a half
    opened = Gate(mass=0.5).open(np.zeros((2, 10_000), dtype=np.float32))
    assert opened.sum(axis=1) == pytest.approx(5000, abs=1)  # within rounding


def test_one_good_category_among_ten_thousand_is_found() -> None:
    scores = np.zeros((1, 10_000), dtype=np.float32)
    scores[0, 7_777] = 1.0  # holds e^20 / (e^20 + 9,999) = 0.99998
    assert np.flatnonzero(Gate().open(scores)[0]).tolist() == [7_777]


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.01, math.nan])
def test_a_mass_outside_0_to_1_is_refused(mass: float) -> None:
    with pytest.raises(InputError, match="mass"):
        Gate(mass=mass)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        Gate(temperature=temperature)


@pytest.mark.parametrize("name_weight", [-0.01, 1.01, math.nan])
def test_a_name_weight_outside_0_to_1_is_refused(name_weight: float) -> None:
    with pytest.raises(InputError, match="name_weight"):
        Gate(name_weight=name_weight)


# -- centroids --------------------------------------------------------------------------------------------------------


def test_a_centroid_is_the_direction_of_the_mean() -> None:
    # category 0: (1, 0) + (0, 1) = (1, 1), of length sqrt 2; category 1: its one vector
    found = centroids(rows([1, 0], [0, 1], [0.6, 0.8]), np.array([0, 0, 1]), 2)
    assert found == pytest.approx(rows([math.sqrt(0.5), math.sqrt(0.5)], [0.6, 0.8]))


def test_a_centroid_leans_to_where_more_vectors_are() -> None:
    # 2 * (1, 0) + (0, 1) = (2, 1), of length sqrt 5
    found = centroids(rows([1, 0], [1, 0], [0, 1]), np.array([0, 0, 0]), 1)
    assert found == pytest.approx(rows([2 / math.sqrt(5), 1 / math.sqrt(5)]))


def test_opposite_vectors_have_a_centroid_of_length_1() -> None:
    found = centroids(rows([0.6, 0.8], [-0.6, -0.8]), np.array([0, 0]), 1)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0)


def test_opposite_vectors_leave_the_other_centroids_alone() -> None:
    found = centroids(rows([1, 0], [-1, 0], [0.6, 0.8]), np.array([0, 0, 1]), 2)
    assert found[1] == pytest.approx([0.6, 0.8])


def test_where_there_are_no_categories_there_are_no_centroids() -> None:
    assert centroids(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int64), 0).shape == (0, 3)


def test_ten_thousand_categories_of_one_vector_are_their_own_centroids() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(10_000, 8)))
    assert centroids(vectors, np.arange(10_000), 10_000) == pytest.approx(vectors, abs=1e-6)
