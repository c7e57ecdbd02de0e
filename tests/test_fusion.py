"""Two rankings into one: known answers by hand, and what must hold for all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import InputError
from gemma_rag.fusion import reciprocal_rank, weighted

NAN = float("nan")
FUSIONS = [pytest.param(weighted, id="weighted"), pytest.param(reciprocal_rank, id="reciprocal_rank")]

score = st.one_of(st.floats(-10, 10), st.sampled_from([NAN, 0.0, 1.0]))
two_lists = st.integers(0, 12).flatmap(lambda n: st.tuples(*[st.lists(score, min_size=n, max_size=n)] * 2))
weights = st.tuples(st.floats(0.01, 10), st.floats(0, 10))


def test_weighted_scales_each_list_to_0_and_1_and_adds_by_weight():
    dense = [0.9, 0.5, 0.7]  # scaled: (0.9 - 0.5) / 0.4 = 1, 0, (0.7 - 0.5) / 0.4 = 0.5
    sparse = [2.0, 10.0, 6.0]  # scaled: 0, 1, (6 - 2) / 8 = 0.5
    # 0.7 * 1 + 0.3 * 0, 0.7 * 0 + 0.3 * 1, 0.7 * 0.5 + 0.3 * 0.5
    np.testing.assert_allclose(weighted([dense, sparse]), [0.7, 0.3, 0.5])


def test_weighted_gives_0_for_an_item_that_a_list_did_not_score():
    dense = [0.8, NAN, 0.6, 0.7]  # scaled over three: 1, -, 0, 0.5
    sparse = [NAN, 4.0, 2.0, NAN]  # scaled over two: -, 1, 0, -
    # 0.5 * 1 + 0, 0 + 0.5 * 1, 0.5 * 0 + 0.5 * 0, 0.5 * 0.5 + 0
    np.testing.assert_allclose(weighted([dense, sparse], (0.5, 0.5)), [0.5, 0.5, 0.0, 0.25])


def test_weighted_gives_1_where_all_scores_of_a_list_are_equal():
    np.testing.assert_allclose(weighted([[0.4, 0.4, NAN], [1.0, 3.0, 2.0]], (0.5, 0.5)), [0.5, 1.0, 0.25])


def test_weighted_adds_nothing_from_a_list_that_scored_no_item():
    np.testing.assert_allclose(weighted([[0.4, 0.8], [NAN, NAN]]), [0.0, 0.7])


def test_weighted_scales_the_weights_to_sum_to_1():
    # 7 / (7 + 3) = 0.7
    np.testing.assert_allclose(weighted([[1, 0], [0, 1]], (7, 3)), [0.7, 0.3])


def test_weighted_with_weight_0_ignores_the_list():
    np.testing.assert_allclose(weighted([[1, 0, 0.5], [0, 1, 1]], (1, 0)), [1, 0, 0.5])


@given(two_lists, weights)
def test_weighted_stays_within_0_and_1(lists, given_weights):
    fused = weighted(lists, given_weights)
    assert ((fused >= 0) & (fused <= 1 + 1e-12)).all()


@given(st.lists(st.integers(-100, 100), min_size=1), st.integers(1, 50), st.integers(-1000, 1000))
def test_weighted_ignores_the_scale_of_a_list(values, factor, shift):
    dense = np.array(values, dtype=float)
    np.testing.assert_allclose(weighted([dense * factor + shift], [1]), weighted([dense], [1]))


def test_reciprocal_rank_adds_one_over_60_plus_rank():
    # ranks in the first list 1, 2, 3; in the second 2, 1, 3
    fused = reciprocal_rank([[0.9, 0.8, 0.1], [5.0, 7.0, 1.0]])
    np.testing.assert_allclose(fused, [1 / 61 + 1 / 62, 1 / 62 + 1 / 61, 1 / 63 + 1 / 63])


def test_reciprocal_rank_gives_ties_the_better_rank_and_skips_the_next():
    # scores 3, 3, 1 have the ranks 1, 1, 3
    np.testing.assert_allclose(reciprocal_rank([[3, 1, 3]]), [1 / 61, 1 / 63, 1 / 61])


def test_reciprocal_rank_adds_nothing_for_an_item_that_a_list_did_not_rank():
    np.testing.assert_allclose(reciprocal_rank([[NAN, 0.5, 0.4], [1.0, NAN, NAN]]), [1 / 61, 1 / 61, 1 / 62])


def test_reciprocal_rank_multiplies_by_the_weights():
    np.testing.assert_allclose(reciprocal_rank([[2, 1], [1, 2]], weights=(2, 1)), [2 / 61 + 1 / 62, 2 / 62 + 1 / 61])


def test_reciprocal_rank_takes_another_constant():
    np.testing.assert_allclose(reciprocal_rank([[2, 1]], constant=0), [1, 1 / 2])


@given(st.lists(st.integers(-100, 100), min_size=1))
def test_reciprocal_rank_reads_the_order_only(values):
    # x^3 grows wherever x grows
    np.testing.assert_array_equal(reciprocal_rank([values]), reciprocal_rank([[x**3 for x in values]]))


@pytest.mark.parametrize("fuse", FUSIONS)
@given(lists=two_lists, given_weights=weights, data=st.data())
def test_the_order_of_the_items_does_not_matter(fuse, lists, given_weights, data):
    order = np.array(data.draw(st.permutations(range(len(lists[0])))), dtype=int)
    shuffled = [np.array(scores)[order] for scores in lists]
    np.testing.assert_array_equal(fuse(shuffled, given_weights), fuse(lists, given_weights)[order])


@pytest.mark.parametrize("fuse", FUSIONS)
@given(lists=two_lists, given_weights=weights)
def test_the_order_of_the_lists_does_not_matter(fuse, lists, given_weights):
    np.testing.assert_allclose(fuse(lists[::-1], given_weights[::-1]), fuse(lists, given_weights))


@pytest.mark.parametrize("fuse", FUSIONS)
@given(lists=two_lists, given_weights=weights)
def test_no_fused_score_is_nan(fuse, lists, given_weights):
    assert np.isfinite(fuse(lists, given_weights)).all()


@pytest.mark.parametrize("fuse", FUSIONS)
def test_fusion_of_no_items_is_no_scores(fuse):
    assert fuse([[], []]).shape == (0,)


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize(
    "lists", [[], [[1, 2], [1]], [[[1, 2]], [[1, 2]]], [1.0, 2.0]], ids=["none", "lengths", "2-D", "numbers"]
)
def test_lists_that_are_not_of_the_same_items_are_refused(fuse, lists):
    with pytest.raises(InputError, match="lists of scores for the same items"):
        fuse(lists)


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_infinite_scores_are_refused(fuse, bad):
    with pytest.raises(InputError, match="infinite"):
        fuse([[1.0, bad], [1.0, 2.0]])


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize(
    "bad",
    [(), (1,), (1, 1, 1), (-0.1, 1), (0, 0), (NAN, 1), (1, NAN), (float("inf"), 1)],
    ids=["none", "one", "three", "negative", "all-0", "nan-first", "nan-last", "inf"],
)
def test_weights_that_do_not_fit_are_refused(fuse, bad):
    with pytest.raises(InputError, match="one weight of at least 0 per list"):
        fuse([[1, 2], [2, 1]], bad)


@pytest.mark.parametrize("constant", [-1, -60, NAN], ids=str)
def test_a_constant_that_is_not_at_least_0_is_refused(constant):
    with pytest.raises(InputError, match="the constant"):
        reciprocal_rank([[1, 2]], constant=constant)
