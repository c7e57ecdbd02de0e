"""What is kept: known answers by hand, and what must hold for every list of scores."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma_rag.errors import InputError
from gemma_rag.thresholds import PRESETS, DynamicThreshold, FixedThreshold, as_threshold, describe, preset

cosine = st.floats(-1, 1)
scores = st.lists(cosine, max_size=20)
fixed = st.builds(FixedThreshold, cosine)
dynamic = st.builds(DynamicThreshold, st.floats(0, 1), st.integers(1, 10), st.none() | cosine)
thresholds = fixed | dynamic
BOTH = [pytest.param(FixedThreshold(0.4), id="fixed"), pytest.param(DynamicThreshold(floor=0.4), id="dynamic")]


def kept(threshold, values):
    return threshold.apply(values).keep.tolist()


def test_fixed_keeps_what_is_at_least_its_value():
    assert kept(FixedThreshold(0.4), [0.41, 0.4, 0.39, -0.4]) == [True, True, False, False]


def test_fixed_names_its_value_as_the_cutoff():
    assert FixedThreshold(0.4).apply([0.9]).cutoff == 0.4


@pytest.mark.parametrize(
    ("threshold", "values", "cutoff", "expected"),
    [
        # mean of five (0.80 + 0.79 + 0.52 + 0.51 + 0.50) / 5 = 0.624; 0.85 * 0.624 = 0.5304
        (DynamicThreshold(), [0.80, 0.79, 0.52, 0.51, 0.50], 0.5304, [True, True, False, False, False]),
        # the sixth, 0.1, is not among the five best: the same cutoff
        (DynamicThreshold(), [0.1, 0.80, 0.79, 0.52, 0.51, 0.50], 0.5304, [False, True, True, False, False, False]),
        # fewer than five: (0.9 + 0.3) / 2 = 0.6; 0.85 * 0.6 = 0.51
        (DynamicThreshold(), [0.9, 0.3], 0.51, [True, False]),
        # the best alone: 0.5 * 0.8 = 0.4
        (DynamicThreshold(ratio=0.5, top_n=1), [0.3, 0.8, 0.5], 0.4, [False, True, True]),
        # 0.85 * 0.5 = 0.425 is under the floor of 0.45
        (DynamicThreshold(floor=0.45), [0.56, 0.44], 0.45, [True, False]),
        # 0.85 * 0.6 = 0.51 is over the floor of 0.45
        (DynamicThreshold(floor=0.45), [0.7, 0.5], 0.51, [True, False]),
        # ratio 0 asks for 0 * mean = 0
        (DynamicThreshold(ratio=0), [0.5, 0.01, -0.01], 0.0, [True, True, False]),
        # below 0 the cutoff is above the mean: 0.85 * -0.2 = -0.17
        (DynamicThreshold(), [-0.2], -0.17, [False]),
    ],
)
def test_dynamic_keeps_what_is_near_the_mean_of_the_best(threshold, values, cutoff, expected):
    cut = threshold.apply(values)
    assert (cut.keep.tolist(), cut.cutoff) == (expected, pytest.approx(cutoff))


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20), st.floats(0, 1), st.integers(1, 10))
@example([0.1, 0.1, 0.1], 1.0, 3)  # in floating point (0.1 + 0.1 + 0.1) / 3 is 0.10000000000000002
def test_dynamic_without_a_floor_never_empties_positive_scores(values, ratio, top_n):
    assert any(kept(DynamicThreshold(ratio, top_n), values))


@given(scores, st.floats(0, 1), st.integers(1, 10), cosine)
def test_dynamic_with_a_floor_above_all_scores_keeps_none(values, ratio, top_n, floor):
    below = [value for value in values if value < floor]
    assert not any(kept(DynamicThreshold(ratio, top_n, floor), below))


@given(scores, st.floats(0, 1), st.integers(1, 10), cosine)
def test_dynamic_keeps_nothing_below_its_floor(values, ratio, top_n, floor):
    cut = DynamicThreshold(ratio, top_n, floor).apply(values)
    assert (np.array(values)[cut.keep] >= floor).all()


@given(thresholds, scores)
def test_what_is_kept_is_what_reaches_the_cutoff(threshold, values):
    cut = threshold.apply(values)
    assert cut.keep.tolist() == [value >= cut.cutoff for value in values]


@given(thresholds, scores, st.data())
def test_the_order_of_the_scores_does_not_matter(threshold, values, data):
    order = data.draw(st.permutations(range(len(values))))
    mask = kept(threshold, values)
    assert kept(threshold, [values[i] for i in order]) == [mask[i] for i in order]


@given(scores, cosine, cosine)
def test_a_higher_fixed_threshold_keeps_a_part_of_what_a_lower_one_keeps(values, one, other):
    lower, higher = (FixedThreshold(value).apply(values).keep for value in sorted((one, other)))
    assert not (higher & ~lower).any()


@pytest.mark.parametrize("threshold", BOTH)
def test_no_scores_give_an_empty_mask(threshold):
    assert threshold.apply([]).keep.tolist() == []


@pytest.mark.parametrize(("floor", "cutoff"), [(None, -1.0), (0.3, 0.3)])
def test_dynamic_without_scores_has_its_floor_as_the_cutoff(floor, cutoff):
    assert DynamicThreshold(floor=floor).apply([]).cutoff == cutoff


@pytest.mark.parametrize("threshold", BOTH)
def test_the_mask_is_boolean(threshold):
    assert threshold.apply([0.5]).keep.dtype == np.bool_


@pytest.mark.parametrize("threshold", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_scores_are_refused(threshold, bad):
    with pytest.raises(InputError, match="NaN or infinite"):
        threshold.apply([0.5, bad])


@pytest.mark.parametrize("threshold", BOTH)
@pytest.mark.parametrize("bad", [0.5, [[0.5, 0.4]]], ids=["0-D", "2-D"])
def test_scores_that_are_no_list_are_refused(threshold, bad):
    with pytest.raises(InputError, match="a threshold needs a list of scores"):
        threshold.apply(bad)


@pytest.mark.parametrize("value", [1.01, -1.01, 40, float("nan"), float("inf")])
def test_a_fixed_threshold_that_is_no_cosine_is_refused(value):
    with pytest.raises(InputError, match="a fixed threshold is a cosine"):
        FixedThreshold(value)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_the_ends_of_the_cosine_range_are_thresholds(value):
    assert FixedThreshold(value).value == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.01}, "the ratio .* from 0 to 1, and is 1.01"),
        ({"ratio": -0.1}, "the ratio"),
        ({"ratio": float("nan")}, "the ratio"),
        ({"top_n": 0}, "at least 1 score, not 0"),
        ({"top_n": -1}, "at least 1 score, not -1"),
        ({"floor": 1.5}, "the floor of a dynamic threshold is a cosine"),
        ({"floor": float("nan")}, "the floor of a dynamic threshold is a cosine"),
    ],
    ids=str,
)
def test_a_dynamic_threshold_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        DynamicThreshold(**options)


@pytest.mark.parametrize(("name", "value"), [("strict", 0.85), ("balanced", 0.72), ("loose", 0.58)])
def test_a_preset_is_a_fixed_threshold(name, value):
    assert preset(name) == FixedThreshold(value)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(InputError, match="'lax': there are strict, balanced, loose"):
        preset("lax")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.4, FixedThreshold(0.4)),
        (0, FixedThreshold(0.0)),
        (np.float64(0.5), FixedThreshold(0.5)),
        (np.float32(0.5), FixedThreshold(0.5)),
        ("strict", FixedThreshold(PRESETS["strict"])),
        ("dynamic", DynamicThreshold(ratio=0.85, top_n=5, floor=None)),
        (DynamicThreshold(floor=0.3), DynamicThreshold(floor=0.3)),
    ],
    ids=repr,
)
def test_a_threshold_is_read_as_users_write_it(value, expected):
    assert as_threshold(value) == expected


@pytest.mark.parametrize("value", [None, True, [0.4], {"ratio": 0.5}, "lax", 1.5], ids=repr)
def test_what_is_no_threshold_is_refused(value):
    with pytest.raises(InputError):
        as_threshold(value)


class KeepAll:
    def apply(self, scores):
        raise NotImplementedError

    def __repr__(self):
        return "KeepAll()"


def test_a_threshold_of_the_users_own_is_taken_as_it_is():
    own = KeepAll()
    assert as_threshold(own) is own


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (FixedThreshold(0.4), 0.4),
        (DynamicThreshold(0.5, 3, 0.2), {"ratio": 0.5, "top_n": 3, "floor": 0.2}),
        (KeepAll(), "KeepAll()"),
    ],
    ids=repr,
)
def test_a_threshold_is_described_in_plain_json(threshold, expected):
    assert describe(threshold) == expected
