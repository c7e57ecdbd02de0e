"""Normalise, cut, compare: known answers by hand, and what must hold for all rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma_rag.errors import InputError
from gemma_rag.vectors import cosines, truncate, unit

# No component is 0, so that every cut of every row has a direction.
COMPONENT = st.one_of(st.floats(2**-10, 2**10, width=32), st.floats(-(2**10), -(2**-10), width=32))


def rows(dimensions=None):
    """Up to six rows, of that many components or of 1 to 12."""
    shape = st.tuples(st.integers(1, 6), st.integers(1, 12) if dimensions is None else st.just(dimensions))
    return shape.flatmap(lambda s: hnp.arrays(np.float32, s, elements=COMPONENT))


def test_unit_divides_by_the_euclidean_norm():
    # sqrt(3^2 + 4^2) = 5; sqrt(5^2 + 12^2) = 13
    np.testing.assert_allclose(unit([[3, 4], [5, -12]]), [[0.6, 0.8], [5 / 13, -12 / 13]], rtol=1e-6)


@given(rows())
def test_unit_gives_rows_of_norm_1(x):
    np.testing.assert_allclose(np.linalg.norm(unit(x).astype(np.float64), axis=1), 1, atol=1e-6)


@given(rows())
def test_unit_of_unit_is_unit(x):
    np.testing.assert_allclose(unit(unit(x)), unit(x), atol=1e-6)


@given(rows(), st.floats(2**-10, 2**10))
def test_unit_ignores_the_length_of_a_row(x, factor):
    np.testing.assert_allclose(unit(x * np.float32(factor)), unit(x), atol=1e-6)


@given(rows())
def test_unit_leaves_its_argument_alone(x):
    before = x.copy()
    unit(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_unit_returns_float32_whatever_came(dtype):
    assert unit(np.array([[3, 4]], dtype=dtype)).dtype == np.float32


def test_unit_scales_rows_whose_squares_leave_float32():
    # (1e30)^2 = 1e60 is above the largest float32, 3.4e38; 1 / sqrt(2) = 0.70710678
    np.testing.assert_allclose(unit([[1e30, 1e30]]), [[0.70710678, 0.70710678]], rtol=1e-6)


def test_unit_of_no_rows_is_no_rows():
    assert unit(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("bad", [[np.nan, 1], [np.inf, 1], [-np.inf, 1], [0, 0]], ids=["nan", "inf", "-inf", "zeros"])
def test_unit_refuses_a_row_without_direction_and_names_it(bad):
    with pytest.raises(InputError, match=r"1 of 3 vectors .* the first in row 1\."):
        unit([[1, 2], bad, [3, 4]])


def test_unit_counts_all_rows_without_direction():
    with pytest.raises(InputError, match=r"2 of 3 vectors .* the first in row 0\."):
        unit([[0, 0], [1, 2], [0, np.nan]])


def test_unit_refuses_a_number_that_float32_cannot_hold():
    with pytest.raises(InputError, match="1 of 1 vectors"):
        unit(np.array([[1e300, 1.0]]))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_unit_refuses_what_is_not_rows_and_names_the_shape(shape):
    with pytest.raises(InputError, match="one of shape"):
        unit(np.ones(shape))


def test_truncate_scales_what_is_left_to_norm_1():
    # (3, 4, 12) has norm 13; its first two components have norm 5
    np.testing.assert_allclose(truncate([[3, 4, 12]], 2), [[0.6, 0.8]], rtol=1e-6)


@given(rows(), st.data())
def test_truncate_is_unit_of_the_cut(x, data):
    dimensions = data.draw(st.integers(1, x.shape[1]))
    np.testing.assert_array_equal(truncate(x, dimensions), unit(x[:, :dimensions]))


@given(rows(), st.data())
def test_truncate_forgets_whether_its_rows_were_scaled_before(x, data):
    dimensions = data.draw(st.integers(1, x.shape[1]))
    np.testing.assert_allclose(truncate(unit(x), dimensions), truncate(x, dimensions), atol=1e-6)


@given(rows(), st.data())
def test_truncate_in_two_steps_is_truncate_in_one(x, data):
    first = data.draw(st.integers(1, x.shape[1]))
    second = data.draw(st.integers(1, first))
    np.testing.assert_allclose(truncate(truncate(x, first), second), truncate(x, second), atol=1e-6)


@given(rows())
def test_truncate_to_the_native_dimension_is_unit(x):
    np.testing.assert_array_equal(truncate(x, x.shape[1]), unit(x))


@pytest.mark.parametrize("dimensions", [-1, 0, 4])
def test_truncate_refuses_dimensions_that_the_rows_do_not_have(dimensions):
    with pytest.raises(InputError, match=rf"shape \(2, 3\) to {dimensions} dimensions"):
        truncate(np.ones((2, 3)), dimensions)


def test_truncate_refuses_what_is_not_rows():
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        truncate([1, 2, 3], 1)


def test_truncate_refuses_a_row_whose_direction_was_in_the_part_cut_off():
    with pytest.raises(InputError, match="all zeros"):
        truncate([[0, 0, 1]], 2)


def test_cosines_are_the_dot_products_of_unit_rows():
    left = np.array([[1, 0], [0.6, 0.8]], dtype=np.float32)
    right = np.array([[1, 0], [0, 1], [-0.8, 0.6]], dtype=np.float32)
    # 0.6 * -0.8 + 0.8 * 0.6 = 0
    np.testing.assert_allclose(cosines(left, right), [[1, 0, -0.8], [0.6, 0.8, 0]], atol=1e-7)


@given(rows(5), rows(5))
def test_cosines_stay_within_minus_1_and_1(left, right):
    scores = cosines(unit(left), unit(np.vstack([right, left, -left])))
    assert scores.min() >= -1
    assert scores.max() <= 1


@given(rows(5), rows(5))
def test_cosines_turned_around_are_transposed(left, right):
    left, right = unit(left), unit(right)
    np.testing.assert_allclose(cosines(left, right), cosines(right, left).T, atol=1e-6)


@given(rows())
def test_the_cosine_of_a_row_with_itself_is_1(x):
    np.testing.assert_allclose(np.diag(cosines(unit(x), unit(x))), 1, atol=1e-6)


def test_cosines_have_one_row_per_left_and_one_column_per_right():
    assert cosines(unit(np.ones((2, 3))), unit(np.ones((4, 3)))).shape == (2, 4)


def test_cosines_are_float32():
    assert cosines(unit([[1, 2]]), unit([[3, 4]])).dtype == np.float32


@pytest.mark.parametrize(("left", "right"), [((2, 3), (2, 4)), ((3,), (1, 3)), ((1, 3), (3,))])
def test_cosines_refuse_shapes_that_do_not_fit(left, right):
    with pytest.raises(InputError, match="cannot compare vectors of shape"):
        cosines(np.ones(left, dtype=np.float32), np.ones(right, dtype=np.float32))


def test_lists_of_numbers_are_compared_as_arrays_are():
    assert cosines([[1.0, 0.0]], [[0.6, 0.8], [0.0, 1.0]])[0].tolist() == pytest.approx([0.6, 0.0])
