from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.errors import InputError
from gemma_rag.routing import Gate, Overview, Tree
from gemma_rag.summaries import Summaries, summarize
from gemma_rag.vectors import Floats, unit

COSINES = st.integers(-1000, 1000).map(lambda thousandths: thousandths / 1000)
SCORES = st.integers(1, 8).flatmap(
    lambda count: st.lists(st.lists(COSINES, min_size=count, max_size=count), min_size=1, max_size=4)
)
MASSES = st.floats(0.01, 0.999)
TEMPERATURES = st.floats(0.01, 2.0)
SEEDS = st.integers(0, 2**32 - 1)
# with a temperature of 1 the softmax gives back the probabilities themselves: exp(ln p) = p
HALF_THIRD_FIFTH = [math.log(0.5), math.log(0.3), math.log(0.2)]
NONE = np.zeros((0, 2), dtype=np.float32)


def rows(*values: list[float]) -> Floats:
    return np.array(values, dtype=np.float32)


def numbers(*lists: Sequence[int]) -> list[np.ndarray]:
    return [np.array(items, dtype=np.int64) for items in lists]


def overview(vectors: Floats, members: Sequence[np.ndarray]) -> Overview:
    """Of categories without paths, as one segment holds them."""
    tree = Tree([f"c{code:05}" for code in range(len(members))])
    return Overview([(summarize(vectors, members), np.arange(len(members)))], tree)


def one_each(vectors: Floats) -> Overview:
    """Every vector a category."""
    return overview(vectors, numbers(*([row] for row in range(len(vectors)))))


def whole(vectors: Floats) -> Overview:
    """All vectors one category."""
    return overview(vectors, numbers(range(len(vectors))))


def cluster(random: np.random.Generator, n: int, d: int, spread: float) -> tuple[Floats, Floats]:
    """Vectors about one direction, and questions about it."""
    centre = unit(random.normal(size=(1, d)))
    noise = spread / math.sqrt(d)
    return unit(centre + noise * random.normal(size=(n, d))), unit(centre + noise * random.normal(size=(20, d)))


def shares(scores: Floats, temperature: float) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


# -- expected_best ----------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 2), st.integers(2, 40))
def test_the_expected_best_of_one_vector_and_of_two_is_exact(seed: int, n: int, d: int) -> None:
    random = np.random.default_rng(seed)
    vectors, queries = unit(random.normal(size=(n, d))), unit(random.normal(size=(4, d)))
    best = (queries @ vectors.T).max(axis=1, keepdims=True)
    assert whole(vectors).expected_best(queries) == pytest.approx(best, abs=1e-4)


@given(SEEDS, st.integers(1, 60), st.integers(2, 8))
def test_in_up_to_eight_dimensions_the_expected_best_is_the_mean_and_so_many_deviations(seed: int, n: int, d: int) -> None:
    random = np.random.default_rng(seed)
    vectors, queries = unit(random.normal(size=(n, d))), unit(random.normal(size=(4, d)))
    cosines = queries.astype(np.float64) @ vectors.T
    expected = cosines.mean(axis=1) + min(math.sqrt(2 * math.log(n)), math.sqrt(n - 1)) * cosines.std(axis=1)
    assert whole(vectors).expected_best(queries)[:, 0] == pytest.approx(np.clip(expected, -1, 1), abs=1e-4)


# The largest of n normal values lies below sqrt(2 ln n) deviations on average. Vectors on a sphere spread less towards a
# question in their midst than sideways, and beyond eight directions that is not told apart: hence the wider bound above.
@pytest.mark.parametrize(("d", "above"), [(4, 1.5), (8, 1.5), (64, 3.0)])
@pytest.mark.parametrize("n", [3, 10, 30, 100, 1000])
def test_the_expected_best_is_at_most_so_many_deviations_off(n: int, d: int, above: float) -> None:
    random = np.random.default_rng(n * d)
    for _ in range(5):
        vectors, queries = cluster(random, n, d, spread=0.8)
        cosines = queries @ vectors.T
        error = (whole(vectors).expected_best(queries)[:, 0] - cosines.max(axis=1)) / cosines.std(axis=1)
        assert error.min() >= -0.75
        assert error.max() <= above


@given(SEEDS, st.integers(1, 30), st.integers(2, 30))
def test_the_expected_best_is_a_cosine_and_not_below_the_mean(seed: int, n: int, d: int) -> None:
    random = np.random.default_rng(seed)
    vectors, queries = unit(random.normal(size=(n, d))), unit(random.normal(size=(4, d)))
    found = whole(vectors).expected_best(queries)
    assert found.dtype == np.float32
    assert (found <= 1).all()
    assert (found[:, 0] >= (queries @ vectors.T).mean(axis=1) - 1e-6).all()


@pytest.mark.parametrize("n", [3, 1000])
def test_identical_vectors_have_their_own_cosine_as_expected_best(n: int) -> None:
    # (0.6, 0.8) against (1, 0) and (0, 1)
    found = whole(np.repeat(rows([0.6, 0.8]), n, axis=0)).expected_best(rows([1, 0], [0, 1]))
    assert found == pytest.approx(rows([0.6], [0.8]))


def test_a_category_of_two_clusters_is_found_by_a_question_near_the_small_one() -> None:
    # broad: 95 vectors at (1, 0, 0) and 5 at (0, 1, 0). To (0, 1, 0) their mean cosine is 0.05, the deviation is
    # sqrt(0.05 * 0.95) = 0.218, and sqrt(2 ln 100) = 3.035 of them are 0.661: in sum 0.711. narrow: 0.6 throughout
    vectors = np.repeat(rows([1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]), [95, 5, 20], axis=0)
    found = overview(vectors, numbers(range(100), range(100, 120)))
    assert found.expected_best(rows([0, 1, 0])) == pytest.approx(rows([0.7115, 0.6]), abs=1e-3)
    means = summarize(vectors, numbers(range(100), range(100, 120))).means
    assert (rows([0, 1, 0]) @ means.T)[0].argmax() == 1  # its mean would not have found it


def test_many_questions_are_scored_as_one_by_one() -> None:
    random = np.random.default_rng(0)
    vectors, queries = unit(random.normal(size=(40, 12))), unit(random.normal(size=(600, 12)))
    found = overview(vectors, numbers([0], range(1, 15), [15, 16], range(17, 40)))
    singly = np.concatenate([found.expected_best(query[None]) for query in queries])
    assert found.expected_best(queries) == pytest.approx(singly, abs=1e-6)


def test_categories_are_scored_together_as_alone() -> None:
    random = np.random.default_rng(1)
    vectors, queries = unit(random.normal(size=(40, 12))), unit(random.normal(size=(5, 12)))
    members = numbers([0], range(1, 15), [15, 15, 15], range(16, 40), [0, 1])  # the first and third without directions
    alone = np.concatenate([overview(vectors, [own]).expected_best(queries) for own in members], axis=1)
    assert overview(vectors, members).expected_best(queries) == pytest.approx(alone, abs=1e-6)


def test_no_questions_have_no_expected_best() -> None:
    assert one_each(rows([1, 0], [0, 1])).expected_best(NONE).shape == (0, 2)


def test_a_vector_of_two_categories_counts_in_both() -> None:
    found = overview(rows([1, 0], [0, 1]), numbers([0], [0, 1]))
    assert found.sizes.tolist() == [1, 2]
    assert found.expected_best(rows([1, 0])) == pytest.approx(rows([1, 1]), abs=1e-4)


def test_no_categories_have_no_expected_best() -> None:
    assert overview(NONE, []).expected_best(rows([1, 0], [0, 1])).shape == (2, 0)
    assert Overview([], Tree([])).expected_best(rows([1, 0])).shape == (1, 0)


# -- overview ---------------------------------------------------------------------------------------------------------


def by_hand(summaries: Summaries, group: int, query: Floats) -> float:
    """The expected best of one group: docs/decisions/0006."""
    own = summaries.owners == group
    along = (summaries.directions[own].astype(np.float64) @ query) ** 2
    rest = max(0.0, 1.0 - along.sum())
    deviation = math.sqrt(float((along * summaries.variances[own]).sum()) + float(summaries.residuals[group]) * rest)
    n = int(summaries.sizes[group])
    best = float(summaries.means[group] @ query) + min(math.sqrt(2 * math.log(n)), math.sqrt(n - 1)) * deviation
    return min(1.0, max(-1.0, best))


def parted(seed: int, categories: int, segments: int, d: int) -> tuple[Floats, list[tuple[Summaries, np.ndarray]]]:
    """Questions, and segments that hold some vectors of some categories each, of a few to more than there are directions."""
    random = np.random.default_rng(seed)
    groups = []
    for _ in range(segments):
        codes = random.permutation(categories)[: random.integers(1, categories + 1)]
        sizes = random.choice([1, 2, 5, 12, 30], size=len(codes))
        vectors = unit(random.normal(size=(sizes.sum(), d)))
        groups.append((summarize(vectors, np.split(np.arange(len(vectors)), np.cumsum(sizes)[:-1])), codes.astype(np.int64)))
    return unit(random.normal(size=(3, d))), groups


@given(SEEDS, st.integers(1, 6), st.integers(1, 4), st.sampled_from([2, 5, 20]))
def test_a_node_scores_as_the_best_group_below_it(seed: int, categories: int, segments: int, d: int) -> None:
    names = ["A", "A/1", "A/2/x", "B/1", "B/2", "C"][:categories]
    tree, (queries, groups) = Tree(names), parted(seed, categories, segments, d)
    dead = seed % categories  # has no documents any more
    kept = [(summaries, np.where(codes == dead, -1, codes)) for summaries, codes in groups]
    expected, sizes = np.full((3, len(tree)), -1.0), np.zeros(len(tree), dtype=np.int64)
    for summaries, codes in kept:
        for group, code in enumerate(codes.tolist()):
            for node in above(tree, int(tree.leaves[code])) if code >= 0 else []:
                sizes[node] += summaries.sizes[group]
                found = [by_hand(summaries, group, query) for query in queries]
                expected[:, node] = np.maximum(expected[:, node], found)
    made = Overview(kept, tree)
    assert made.sizes.tolist() == sizes.tolist()
    assert made.expected_best(queries) == pytest.approx(expected, abs=1e-5)


@given(SEEDS, st.integers(1, 6), st.integers(1, 4))
def test_the_order_of_segments_does_not_matter(seed: int, categories: int, segments: int) -> None:
    tree, (queries, groups) = Tree(["A", "A/1", "A/2/x", "B/1", "B/2", "C"][:categories]), parted(seed, categories, segments, 5)
    one, other = Overview(groups, tree), Overview(groups[::-1], tree)
    assert one.expected_best(queries) == pytest.approx(other.expected_best(queries), abs=1e-6)
    assert one.sizes.tolist() == other.sizes.tolist()


def test_a_category_that_came_in_two_segments_scores_as_the_better_one() -> None:
    # one vector each: (1, 0) has cosine 0.6 with (0.6, 0.8), and (0, 1) has 0.8
    one, two = summarize(rows([1, 0]), numbers([0])), summarize(rows([0, 1]), numbers([0]))
    found = Overview([(one, np.array([0])), (two, np.array([0]))], Tree(["only"]))
    assert found.expected_best(rows([0.6, 0.8], [1, 0])) == pytest.approx(rows([0.8], [1]))
    assert found.sizes.tolist() == [2]


def test_a_folder_scores_as_its_best_category() -> None:
    # nodes: IT, X, IT/a, IT/b
    tree = Tree(["IT/a", "IT/b", "X"])
    found = Overview([(summarize(rows([1, 0], [0.6, 0.8], [0, 1]), numbers([0], [1], [2])), np.arange(3))], tree)
    assert found.expected_best(rows([0, 1])) == pytest.approx(rows([0.8, 1, 0, 0.8]))
    assert found.sizes.tolist() == [2, 1, 1, 1]


def test_what_nothing_is_known_of_has_the_least_cosine() -> None:
    groups = [(summarize(rows([1, 0], [0, 1]), numbers([0], [1])), np.array([-1, 1]))]
    found = Overview(groups, Tree(["A", "B"]))
    assert found.expected_best(rows([1, 0])).tolist() == [[-1, 0]]
    assert Overview([], Tree(["A", "B"])).expected_best(rows([1, 0])).tolist() == [[-1, -1]]


def test_an_overview_leaves_the_arrays_that_it_is_made_of_as_they_are() -> None:
    queries, groups = parted(0, 3, 2, 20)
    for summaries, _ in groups:
        for array in summaries:
            array.setflags(write=False)
    tree = Tree(["A", "B", "C"])
    first = Overview(groups, tree).expected_best(queries)
    made = Overview(groups, tree)
    assert (made.expected_best(queries) == first).all()
    assert (made.expected_best(queries) == first).all()  # the second time as the first


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name_weight", "expected"),
    [
        (0.0, 0.8),  # the query against the document: 0 * 0.6 + 1 * 0.8
        (1.0, 0.28),  # the classification against the name: 1 * 0.28 + 0 * 0.96
        (0.25, 0.67),  # 0.25 * 0.28 + 0.75 * 0.8 = 0.07 + 0.6
        (0.5, 0.54),  # 0.5 * 0.28 + 0.5 * 0.8
    ],
)
def test_the_score_of_a_category_of_one_document_is_the_weighted_mean(name_weight: float, expected: float) -> None:
    gate = Gate(name_weight=name_weight)
    scores = gate.scores(rows([1, 0]), rows([0, 1]), rows([0.28, 0.96]), np.array([0]), one_each(rows([0.6, 0.8])))
    assert scores == pytest.approx(expected)


def test_the_name_counts_a_fifth_by_default() -> None:
    # 0.2 * 0.28 + 0.8 * 0.8 = 0.056 + 0.64
    scores = Gate().scores(rows([1, 0]), rows([0, 1]), rows([0.28, 0.96]), np.array([0]), one_each(rows([0.6, 0.8])))
    assert scores == pytest.approx(0.696)


@pytest.mark.parametrize(
    ("name_weight", "n", "share"),
    [
        (0.2, 4, 1 / 9),  # 0.2 / (0.2 + 0.8 * 2)
        (0.2, 100, 1 / 41),  # 0.2 / (0.2 + 0.8 * 10)
        (1.0, 100, 1.0),
        (0.0, 100, 0.0),
    ],
)
def test_the_share_of_the_name_shrinks_with_the_square_root_of_the_documents(name_weight: float, n: int, share: float) -> None:
    documents = whole(np.repeat(rows([0.6, 0.8]), n, axis=0))
    scores = Gate(name_weight=name_weight).scores(rows([1, 0]), rows([0, 1]), rows([0.28, 0.96]), np.array([0]), documents)
    assert scores == pytest.approx(share * 0.28 + (1 - share) * 0.8)


def test_of_the_name_and_the_examples_of_a_category_the_closest_counts() -> None:
    names = rows([0.28, 0.96], [0.6, 0.8], [0, 1], [0.8, 0.6])
    documents = one_each(rows([0, 1], [0, 1]))
    scores = Gate(name_weight=1.0).scores(rows([1, 0]), rows([1, 0]), names, np.array([0, 0, 0, 1]), documents)
    assert scores == pytest.approx(rows([0.6, 0.8]))


def test_without_names_the_documents_alone_score() -> None:
    documents = one_each(rows([0.6, 0.8]))
    scores = Gate(name_weight=1.0).scores(rows([1, 0]), rows([0, 1]), NONE, np.zeros(0, dtype=np.int64), documents)
    assert scores == pytest.approx(0.8)


def test_scores_have_a_row_for_each_question_and_a_column_for_each_category() -> None:
    questions, vectors = rows([1, 0], [0, 1]), rows([1, 0], [0, 1], [0.6, 0.8])
    scores = Gate().scores(questions, questions, vectors, np.arange(3), one_each(vectors))
    assert scores == pytest.approx(rows([1, 0, 0.6], [0, 1, 0.8]))


@pytest.mark.parametrize("name_weight", [0.0, 0.2, 1.0])
def test_scores_are_float32(name_weight: float) -> None:
    vectors = rows([1, 0])
    scores = Gate(name_weight=name_weight).scores(vectors, vectors, vectors, np.array([0]), one_each(vectors))
    assert scores.dtype == np.float32


def test_scores_of_no_categories_have_no_columns() -> None:
    owners = np.zeros(0, dtype=np.int64)
    assert Gate().scores(rows([1, 0]), rows([1, 0]), NONE, owners, overview(NONE, [])).shape == (1, 0)


# -- probabilities ----------------------------------------------------------------------------------------------------


def test_probabilities_by_hand() -> None:
    found = Gate(temperature=1.0).probabilities(rows(HALF_THIRD_FIFTH))
    assert found == pytest.approx(np.array([[0.5, 0.3, 0.2]]), abs=1e-6)


def test_probabilities_within_groups_by_hand() -> None:
    # columns 0 and 2 are one group: 0.5 / 0.7 and 0.2 / 0.7; column 1 is alone
    found = Gate(temperature=1.0).probabilities(rows(HALF_THIRD_FIFTH), np.array([4, -1, 4]))
    assert found == pytest.approx(np.array([[5 / 7, 1, 2 / 7]]), abs=1e-6)


@given(SCORES, TEMPERATURES, st.lists(st.integers(-1, 2), min_size=8, max_size=8))
def test_probabilities_sum_to_1_in_every_group(scores: list[list[float]], temperature: float, groups: list[int]) -> None:
    array = rows(*scores)
    of = np.array(groups[: array.shape[1]])
    found = Gate(temperature=temperature).probabilities(array, of)
    for group in np.unique(of):
        assert found[:, of == group].sum(axis=1) == pytest.approx(np.ones(len(array)))
        assert found[:, of == group] == pytest.approx(shares(array[:, of == group], temperature), abs=1e-9)


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


@given(st.data(), st.integers(1, 8), st.integers(1, 3), MASSES | st.just(1.0), st.none() | st.integers(1, 9))
def test_of_equal_shares_those_of_the_better_scores_are_kept(
    data: st.DataObject, columns: int, count: int, mass: float, most: int | None
) -> None:
    few = st.lists(st.integers(0, 3), min_size=columns, max_size=columns)
    held = np.array(data.draw(st.lists(few, min_size=count, max_size=count)), dtype=np.float64) / 4
    scores = rows(*data.draw(st.lists(few, min_size=count, max_size=count)))
    expected = np.zeros(held.shape, dtype=bool)
    for row in range(count):
        so_far = 0.0
        for column in sorted(range(columns), key=lambda i: (-held[row, i], -scores[row, i]))[:most]:
            expected[row, column] = held[row].any() and (so_far == 0.0 or mass == 1.0 or so_far < mass * held[row].sum())
            so_far += held[row, column]
    assert Gate(mass=mass).keep(held, scores, most).tolist() == expected.tolist()


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


# -- keep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mass", "expected"), [(0.6, [True, False, False]), (0.7, [True, True, False])])
def test_the_mass_is_a_share_of_what_the_row_sums_to(mass: float, expected: list[bool]) -> None:
    # of 0.4 the first holds 0.25 / 0.4 = 0.625
    kept = Gate(mass=mass).keep(np.array([[0.25, 0.1, 0.05]]), rows([0, 0, 0]))
    assert kept.tolist() == [expected]


def test_equal_shares_are_ordered_by_the_scores() -> None:
    assert Gate(mass=0.5).keep(np.array([[0.5, 0.5]]), rows([0.1, 0.2])).tolist() == [[False, True]]


@pytest.mark.parametrize("mass", [0.5, 1.0])
def test_a_row_of_zeros_keeps_nothing(mass: float) -> None:
    assert Gate(mass=mass).keep(np.zeros((1, 3)), rows([0.1, 0.2, 0.3])).tolist() == [[False, False, False]]


# -- tree: its shape --------------------------------------------------------------------------------------------------

PLAIN = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
PATHS = st.lists(PLAIN, min_size=1, max_size=8, unique=True)


def above(tree: Tree, node: int) -> list[int]:
    """A node and those that it lies in, from the bottom."""
    return [] if node < 0 else [node, *above(tree, int(tree.parents[node]))]


def test_a_tree_by_hand() -> None:
    # nodes: HR, IT, IT/Accounts, in it its own documents and IT/Accounts/Passwords
    tree = Tree(["HR", "IT/Accounts", "IT/Accounts/Passwords"])
    assert len(tree) == 5
    assert tree.parents.tolist() == [-1, -1, 1, 2, 2]
    assert [level.tolist() for level in tree.levels] == [[0, 1], [2], [3, 4]]
    assert tree.leaves.tolist() == [0, 3, 4]


def test_names_without_slashes_are_all_at_the_top() -> None:
    tree = Tree(["a", "b", "c"])
    assert (tree.parents.tolist(), tree.leaves.tolist(), len(tree.levels)) == ([-1, -1, -1], [0, 1, 2], 1)


def test_the_leaves_are_in_the_order_of_the_names() -> None:
    assert Tree(["c", "a", "b"]).leaves.tolist() == [2, 0, 1]


@given(PATHS)
def test_every_name_has_a_leaf_of_its_own_in_which_nothing_lies(names: list[str]) -> None:
    tree = Tree(names)
    assert len(set(tree.leaves.tolist())) == len(names)
    assert not set(tree.leaves.tolist()) & set(tree.parents.tolist())


@given(PATHS)
def test_the_leaves_below_a_node_are_the_names_that_begin_with_its_path(names: list[str]) -> None:
    tree = Tree(names)
    below = [{names[i] for i in rows_} for rows_ in tree.spread(numbers(*([i] for i in range(len(names)))))]
    folders = {"/".join(name.split("/")[:i]) for name in names for i in range(1, name.count("/") + 2)}
    inside = [{name for name in names if name == folder or name.startswith(f"{folder}/")} for folder in folders]
    assert {frozenset(found) for found in below} == {frozenset(found) for found in inside} | {
        frozenset([name]) for name in names
    }


@given(PATHS)
def test_the_levels_hold_every_node_once_and_parents_come_first(names: list[str]) -> None:
    tree = Tree(names)
    assert np.concatenate(tree.levels).tolist() == list(range(len(tree)))
    for depth, level in enumerate(tree.levels):
        assert {len(above(tree, node)) for node in level.tolist()} == {depth + 1}


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["a//b"], [3]),
        (["/a"], [2]),
        (["a/"], [2]),
        (["/"], [2]),
        (["a", "/a"], [1, 2]),  # a lies in a folder without a name
        (["a/b", "a//b"], [2, 3]),
    ],
)
def test_an_empty_part_of_a_name_is_a_part(names: list[str], depths: list[int]) -> None:
    tree = Tree(names)
    assert [len(above(tree, leaf)) for leaf in tree.leaves.tolist()] == depths
    assert len(set(tree.leaves.tolist())) == len(names)


def test_what_two_leaves_of_a_folder_share_counts_once_in_it() -> None:
    # nodes: IT, IT/a, IT/b; row 1 is a guest in IT/b
    assert [part.tolist() for part in Tree(["IT/a", "IT/b"]).spread(numbers([0, 1], [1, 2]))] == [[0, 1, 2], [0, 1], [1, 2]]


def test_a_tree_of_no_names_has_no_nodes() -> None:
    tree = Tree([])
    assert (len(tree), tree.levels, tree.leaves.tolist(), tree.spread([])) == (0, [], [], [])


# -- tree: walking it -------------------------------------------------------------------------------------------------

TWO_BY_TWO = Tree(["A/1", "A/2", "B/1", "B/2"])
# nodes: A, B, A/1, A/2, B/1, B/2
SPLIT = rows([math.log(share) for share in (0.7, 0.3, 0.9, 0.1, 0.6, 0.4)])
EVERY = np.ones(4, dtype=bool)


def test_the_probability_of_a_leaf_is_its_share_among_its_siblings_times_that_of_its_parent() -> None:
    found, opened = TWO_BY_TWO.walk(Gate(mass=1.0, temperature=1.0), SPLIT, EVERY)
    assert found == pytest.approx(np.array([[0.63, 0.07, 0.18, 0.12]]), abs=1e-6)
    assert opened.all()


@pytest.mark.parametrize(
    ("mass", "probabilities", "expected"),
    [
        # 0.6 at each of two depths: A holds 0.7 of 1; A/1 holds 0.63 of 0.7, which is more than 0.42
        (0.36, [0.63, 0, 0, 0], [True, False, False, False]),
        # 0.95: A does not hold it, and B is walked too; all but A/2 hold 0.93 of 1, so that is wanted too
        (0.9025, [0.63, 0.07, 0.18, 0.12], [True, True, True, True]),
        # 0.8: A does not hold it; A/1 and B/1 hold 0.81
        (0.64, [0.63, 0, 0.18, 0], [True, False, True, False]),
    ],
)
def test_a_beam_goes_down_where_the_mass_is(mass: float, probabilities: list[float], expected: list[bool]) -> None:
    found, opened = TWO_BY_TWO.walk(Gate(mass=mass, temperature=1.0), SPLIT, EVERY)
    assert found == pytest.approx(np.array([probabilities]), abs=1e-6)
    assert opened.tolist() == [expected]


def test_every_question_goes_its_own_way() -> None:
    scores = np.concatenate([SPLIT, SPLIT[:, [1, 0, 2, 3, 4, 5]]])  # the second one prefers B
    _, opened = TWO_BY_TWO.walk(Gate(mass=0.36, temperature=1.0), scores, EVERY)
    assert opened.tolist() == [[True, False, False, False], [False, False, True, False]]


def test_a_leaf_at_the_top_is_compared_with_the_leaves_further_down() -> None:
    # nodes: A, X, A/1, A/2 with 0.6, 0.4, 0.5, 0.5: X holds 0.4, the others 0.3 each
    tree, scores = Tree(["A/1", "A/2", "X"]), rows([math.log(share) for share in (0.6, 0.4, 0.5, 0.5)])
    found, opened = tree.walk(Gate(mass=0.9, temperature=1.0), scores, np.ones(3, dtype=bool), max_categories=1)
    assert found == pytest.approx(np.array([[0.3, 0.3, 0.4]]), abs=1e-6)
    assert opened.tolist() == [[False, False, True]]


def test_a_leaf_at_the_top_is_left_out_where_those_further_down_hold_the_mass() -> None:
    # 0.7 at each of two depths. A (0.69) does not hold it, so X (0.2) is kept and B (0.11) is not, which leaves 0.89.
    # A/1 holds 0.69 * 0.95 = 0.6555, which is more than 0.7 * 0.89 = 0.623
    tree, scores = Tree(["A/1", "A/2", "B", "X"]), rows([math.log(share) for share in (0.69, 0.11, 0.2, 0.95, 0.05)])
    _, opened = tree.walk(Gate(mass=0.49, temperature=1.0), scores, EVERY)
    assert opened.tolist() == [[True, False, False, False]]


def test_a_category_that_is_a_folder_too_competes_with_what_lies_in_it() -> None:
    # nodes: IT, in it its own documents and IT/a, with 0.8 and 0.2
    found, _ = Tree(["IT", "IT/a"]).walk(
        Gate(mass=1.0, temperature=1.0), rows([0, math.log(0.8), math.log(0.2)]), np.ones(2, dtype=bool)
    )
    assert found == pytest.approx(np.array([[0.8, 0.2]]), abs=1e-6)


@given(SCORES, MASSES, TEMPERATURES, st.one_of(st.none(), st.integers(1, 9)))
def test_without_paths_a_walk_opens_what_the_gate_opens(
    scores: list[list[float]], mass: float, temperature: float, most: int | None
) -> None:
    array = rows(*scores)
    gate, tree = Gate(mass=mass, temperature=temperature), Tree([f"c{i}" for i in range(array.shape[1])])
    _, opened = tree.walk(gate, array, np.ones(array.shape[1], dtype=bool), most)
    assert opened.tolist() == gate.open(array, most).tolist()


@given(PATHS, st.data(), MASSES, st.floats(0.05, 2.0))
def test_a_walk_agrees_with_the_product_of_all_softmaxes(
    names: list[str], data: st.DataObject, mass: float, temperature: float
) -> None:
    tree = Tree(names)
    flags = st.lists(st.booleans(), min_size=len(names), max_size=len(names))
    eligible = np.array(data.draw(flags.filter(any)))
    scores = rows(data.draw(st.lists(COSINES, min_size=len(tree), max_size=len(tree))))
    alive = {node for leaf in tree.leaves[eligible].tolist() for node in above(tree, leaf)}

    def share(node: int) -> float:
        siblings = [other for other in alive if tree.parents[other] == tree.parents[node]]
        weights = {other: math.exp(float(scores[0, other]) / temperature) for other in siblings}
        return weights[node] / sum(weights.values())

    expected = np.array(
        [
            math.prod(share(node) for node in above(tree, leaf)) if ok else 0.0
            for leaf, ok in zip(tree.leaves.tolist(), eligible, strict=True)
        ]
    )
    found, opened = tree.walk(Gate(mass=mass, temperature=temperature), scores, eligible)
    assert expected.sum() == pytest.approx(1.0)
    assert found[0] == pytest.approx(np.where(opened[0], expected, 0.0))
    assert not (opened[0] & ~eligible).any()
    assert expected[opened[0]].sum() >= mass - 1e-9
    everything, all_opened = tree.walk(Gate(mass=1.0, temperature=temperature), scores, eligible)
    assert everything[0] == pytest.approx(expected)
    assert all_opened[0].tolist() == eligible.tolist()


@given(PATHS, st.data(), st.integers(1, 9))
def test_max_categories_keeps_the_most_probable_leaves(names: list[str], data: st.DataObject, most: int) -> None:
    tree = Tree(names)
    scores = rows(data.draw(st.lists(COSINES, min_size=len(tree), max_size=len(tree), unique=True)))
    every = np.ones(len(names), dtype=bool)
    found, wanted = tree.walk(Gate(), scores, every)
    _, opened = tree.walk(Gate(), scores, every, most)
    assert opened.sum() == min(most, wanted.sum())
    assert not (opened & ~wanted).any()
    assert found[opened].min() >= found[wanted & ~opened].max(initial=0.0)


def test_a_mass_of_one_opens_leaves_whose_share_is_too_small_for_a_float() -> None:
    # e^(-1 / 0.001) = e^-1000 is 0 to a float
    scores = rows([1, 0, 1, 0, 1, 0])
    found, opened = TWO_BY_TWO.walk(Gate(mass=1.0, temperature=0.001), scores, np.array([True, True, False, True]))
    assert found.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert opened.tolist() == [[True, True, False, True]]


def test_what_may_not_be_opened_takes_no_share() -> None:
    # without A/1, A has only A/2, and with B alone there is no choice at the top
    gate = Gate(mass=1.0, temperature=1.0)
    found, _ = TWO_BY_TWO.walk(gate, SPLIT, np.array([False, True, True, True]))
    assert found == pytest.approx(np.array([[0, 0.7, 0.18, 0.12]]), abs=1e-6)
    found, _ = TWO_BY_TWO.walk(gate, SPLIT, np.array([False, False, True, True]))
    assert found == pytest.approx(np.array([[0, 0, 0.6, 0.4]]), abs=1e-6)


@pytest.mark.parametrize("mass", [0.9, 1.0])
def test_where_nothing_may_be_opened_nothing_is(mass: float) -> None:
    found, opened = TWO_BY_TWO.walk(Gate(mass=mass), SPLIT, np.zeros(4, dtype=bool))
    assert (found.tolist(), opened.tolist()) == ([[0.0] * 4], [[False] * 4])


def test_a_walk_among_no_categories_opens_none() -> None:
    found, opened = Tree([]).walk(Gate(), np.zeros((2, 0), dtype=np.float32), np.zeros(0, dtype=bool))
    assert (found.shape, opened.shape) == ((2, 0), (2, 0))


def test_no_questions_walk_nowhere() -> None:
    found, opened = TWO_BY_TWO.walk(Gate(), np.zeros((0, 6), dtype=np.float32), EVERY)
    assert (found.shape, opened.shape) == ((0, 4), (0, 4))


def test_ten_thousand_categories_are_summarised_scored_and_walked_in_seconds() -> None:
    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(30_000, 16)))
    started = time.process_time()
    tree = Tree([f"{i % 10}/{i // 10 % 10}/{i}" for i in range(10_000)])
    groups = [(summarize(vectors, list(np.arange(30_000).reshape(10_000, 3))), np.arange(10_000))]
    names = tree.spread(list(np.arange(10_000)[:, None]))
    owners = np.repeat(np.arange(len(tree)), [len(own) for own in names])
    queries = vectors[[3 * 1234, 3 * 5678]]
    scores = Gate().scores(queries, queries, vectors[::3][np.concatenate(names)], owners, Overview(groups, tree))
    _, opened = tree.walk(Gate(mass=1.0), scores, np.ones(10_000, dtype=bool), max_categories=1)
    seconds = time.process_time() - started
    assert (scores[0, tree.leaves].argmax(), scores[1, tree.leaves].argmax()) == (1234, 5678)
    assert opened.sum(axis=1).tolist() == [1, 1]
    assert seconds < 15  # takes less than one; what grows with the square of the categories takes minutes
