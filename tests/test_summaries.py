from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from gemma_rag import summaries
from gemma_rag.summaries import Summaries, summarize
from gemma_rag.vectors import Floats, unit


def rows(*values: list[float]) -> Floats:
    return np.array(values, dtype=np.float32)


def numbers(*lists: Sequence[int]) -> list[np.ndarray]:
    return [np.array(items, dtype=np.int64) for items in lists]


def whole(vectors: Floats) -> Summaries:
    """All vectors one category."""
    return summarize(vectors, numbers(range(len(vectors))))


def test_a_summary_by_hand() -> None:
    # category 0: (1, 0) and (0, 1), mean (0.5, 0.5), both 1/sqrt 2 from it along (1, -1)/sqrt 2: a variance of 0.5
    # category 1: one vector, which varies nowhere
    found = summarize(rows([1, 0], [0, 1], [0.6, 0.8]), numbers([0, 1], [2]))
    assert found.means == pytest.approx(rows([0.5, 0.5], [0.6, 0.8]))
    assert found.sizes.tolist() == [2, 1]
    assert np.abs(found.directions) == pytest.approx(rows([math.sqrt(0.5), math.sqrt(0.5)]))
    assert found.variances == pytest.approx([0.5])
    assert found.owners.tolist() == [0]
    assert found.residuals == pytest.approx([0, 0], abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12, 13, 100])  # beyond 12 = d, directions are found in another way
def test_directions_are_at_most_eight_unit_vectors_and_the_residual_is_the_rest(n: int) -> None:
    vectors = unit(np.random.default_rng(n).normal(size=(n, 12)))
    found = whole(vectors)
    m = len(found.variances)
    assert m == min(8, n - 1)
    assert found.directions @ found.directions.T == pytest.approx(np.eye(m), abs=1e-5)
    assert (np.diff(found.variances) <= 0).all()
    assert found.variances == pytest.approx(np.var(vectors @ found.directions.T, axis=0), abs=1e-6)
    assert found.variances.sum() + found.residuals[0] * (12 - m) == pytest.approx(np.var(vectors, axis=0).sum(), abs=1e-6)


def test_the_directions_of_a_category_stand_together_in_the_order_of_the_categories() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20, 12)))
    found = summarize(vectors, numbers(range(3), [3], range(4, 20)))
    assert found.owners.tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 2, 2]


def test_no_groups_have_an_empty_summary() -> None:
    found = summarize(np.zeros((0, 2), dtype=np.float32), [])
    assert [part.shape for part in found] == [(0, 2), (0,), (0, 2), (0,), (0,), (0,)]


def like_text(n: int, d: int) -> Floats:
    """Unit vectors about one direction, whose variances fall slowly, as those of text do."""
    random = np.random.default_rng(n)
    turned = np.linalg.qr(random.normal(size=(d, d)))[0]
    return unit((random.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1)) + random.normal(size=d)) @ turned)


def test_both_exact_ways_of_finding_directions_agree() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(8, 8)))  # no more vectors than components: one way; 24: the other
    few, many = whole(vectors), whole(np.tile(vectors, (3, 1)))
    assert few.variances == pytest.approx(many.variances, abs=1e-6)
    assert np.abs((few.directions * many.directions).sum(axis=1)) == pytest.approx(np.ones(7), abs=1e-4)


@pytest.mark.parametrize("n", [300, 1000])
def test_directions_of_many_vectors_are_found_as_exactly_as_by_a_decomposition(n: int, monkeypatch) -> None:
    vectors = like_text(n, 320)
    found = whole(vectors)
    monkeypatch.setattr(summaries, "_EXACT", 1000)
    exact = whole(vectors)
    assert found.variances == pytest.approx(exact.variances, rel=1e-3)
    assert found.residuals == pytest.approx(exact.residuals, rel=1e-3)
    assert found.directions @ found.directions.T == pytest.approx(np.eye(8), abs=1e-5)
    assert np.linalg.svd(found.directions @ exact.directions.T)[1].min() > 0.99  # both span the same space


def test_directions_of_unstructured_vectors_hold_nearly_as_much_as_the_best_ones(monkeypatch) -> None:
    # with no direction before the others there is hardly a best one: the hardest case for an iteration
    vectors = unit(np.random.default_rng(0).normal(size=(1000, 320)))
    found = whole(vectors)
    monkeypatch.setattr(summaries, "_EXACT", 1000)
    assert found.variances == pytest.approx(whole(vectors).variances, rel=0.04)


def test_many_vectors_in_three_dimensions_of_many_have_as_many_directions() -> None:
    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(400, 3)) @ random.normal(size=(3, 300)))
    found = whole(vectors)
    assert len(found.variances) == 3
    assert found.residuals == pytest.approx([0], abs=1e-6)


def test_the_same_vectors_have_the_same_summary() -> None:
    vectors = like_text(300, 300)
    assert all((one == other).all() for one, other in zip(whole(vectors), whole(vectors.copy()), strict=True))


def test_a_group_is_summarised_alone_as_among_others() -> None:
    vectors = like_text(600, 300)
    members = numbers(range(280), range(280, 600))
    together, alone = summarize(vectors, members), summarize(vectors, members[1:])
    assert (together.directions[together.owners == 1] == alone.directions).all()
    assert together.means[1].tolist() == alone.means[0].tolist()


def test_vectors_may_be_read_when_they_are_asked_for() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20, 12)))
    asked: list[int] = []

    def read(rows: np.ndarray) -> Floats:
        asked.append(len(rows))
        return vectors[rows]

    members = numbers(range(3), [3], range(4, 20))
    found = summarize(read, members)
    assert all((one == other).all() for one, other in zip(found, summarize(vectors, members), strict=True))
    assert max(asked) == 16


def test_read_only_vectors_in_half_precision_are_summarised_in_single() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20, 12))).astype(np.float16)
    vectors.setflags(write=False)
    found = whole(vectors)
    assert found.means.dtype == found.directions.dtype == np.float32
    assert found.means == pytest.approx(vectors.astype(np.float32).mean(axis=0, keepdims=True), abs=1e-6)


def test_a_large_group_is_read_in_parts_and_its_mean_and_variances_are_those_of_all(monkeypatch) -> None:
    vectors = like_text(1000, 12)
    exact = whole(vectors)
    asked: list[int] = []

    def read(rows: np.ndarray) -> Floats:
        asked.append(len(rows))
        return vectors[rows]

    monkeypatch.setattr(summaries, "_SAMPLE", 150)
    found = summarize(read, numbers(range(1000)))
    assert max(asked) == 150
    assert found.means == pytest.approx(exact.means, abs=1e-6)
    assert found.variances == pytest.approx(np.var(vectors @ found.directions.T, axis=0), abs=1e-6)
    assert (np.diff(found.variances) <= 0).all()
    assert found.variances.sum() + found.residuals[0] * 4 == pytest.approx(np.var(vectors, axis=0).sum(), abs=1e-6)
    assert found.variances.sum() == pytest.approx(exact.variances.sum(), rel=0.05)
