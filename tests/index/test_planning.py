from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from gemma_rag.errors import InputError
from gemma_rag.index.embedded import EmbeddedIndex, Part, Plan
from gemma_rag.index.planning import PlanReport, plan_for
from gemma_rag.vectors import Floats, unit


def index_of(vectors: Floats, head: int = 128) -> EmbeddedIndex:
    codes = np.arange(len(vectors)) * 4 // len(vectors)
    return EmbeddedIndex([Part(vectors[:, :head], vectors[:, head:], np.arange(len(vectors)), codes)], 4)


def case(decay: float, seed: int = 0) -> tuple[EmbeddedIndex, Floats, np.ndarray]:
    """An index whose components shrink by a factor from one to the next, and questions that open half of it."""
    random = np.random.default_rng(seed)
    scale = decay ** np.arange(256)
    vectors, queries = unit(random.normal(size=(2_000, 256)) * scale), unit(random.normal(size=(20, 256)) * scale)
    return index_of(vectors), queries, np.tile([True, False, True, False], (20, 1))


def ticking(milliseconds: Callable[[int], float]) -> Callable[[], float]:
    """A clock by which the i-th search takes so long."""
    ticks, now = iter(range(1_000_000)), [0.0]

    def clock() -> float:
        tick = next(ticks)
        if tick % 2:
            now[0] += milliseconds(tick // 2) / 1e3
        return now[0]

    return clock


def exact_is_slow(search: int) -> float:
    return 9.0 if search < 20 else 1.0


def planned(decay: float, target: float = 0.99, milliseconds: Callable[[int], float] = exact_is_slow) -> PlanReport:
    index, queries, opened = case(decay)
    return plan_for(index, queries, opened, 10, target, clock=ticking(milliseconds))


def test_where_the_first_components_are_nearly_all_one_short_list_by_them_is_enough() -> None:
    report = planned(0.9)
    assert report.plan == Plan(dimensions=64, oversampling=1)
    assert report.exact.p50_ms == pytest.approx(9.0, rel=1e-3)
    assert report.why.startswith("64 components with 1 times as many documents ranked as wanted found 1.0000")


def test_where_the_components_are_alike_more_of_them_or_longer_lists_are_needed() -> None:
    report = planned(0.999)
    overlaps = {(trial.plan.dimensions, trial.plan.oversampling): trial.overlap for trial in report.trials if trial.plan}
    assert overlaps[64, 1] < overlaps[64, 4] < overlaps[64, 16] < overlaps[64, 64]
    assert overlaps[64, 4] < overlaps[128, 4]
    assert report.plan is not None
    assert overlaps[report.plan.dimensions, report.plan.oversampling] >= 0.99


def test_of_plans_of_one_speed_the_one_that_reads_fewest_bytes_is_chosen() -> None:
    report = planned(0.98)
    good = [trial for trial in report.trials if trial.overlap >= 0.99]
    assert len(good) > 1
    assert report.plan == min(good, key=lambda trial: trial.bytes_read).plan


def test_a_plan_that_is_no_faster_is_not_chosen() -> None:
    report = planned(0.9, milliseconds=lambda search: 1.0)
    assert report.plan is None
    assert report.why.endswith("search exactly")


def test_where_no_plan_finds_enough_the_search_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_rag.index.planning.DIMENSIONS", (8,))
    monkeypatch.setattr("gemma_rag.index.planning.OVERSAMPLING", (1, 2))
    report = planned(0.999)
    assert report.plan is None
    assert "no plan reached an overlap of 0.99" in report.why
    assert len(report.trials) == 2


def test_bytes_are_counted_by_hand() -> None:
    # half of 2,000 rows: 1,000 x 64 components for the scan, 10 whole rows for the ranking, 4 bytes each
    report = planned(0.9)
    assert report.trials[0].bytes_read == 4 * (1_000 * 64 + 10 * 256)
    assert report.exact.bytes_read == 4 * 1_000 * 256
    assert report.documents == 1_000


def test_documents_of_equal_cosine_may_stand_for_each_other() -> None:
    vectors = np.tile(np.eye(4, dtype=np.float32), (100, 64))
    vectors = unit(vectors)
    index = index_of(vectors)
    report = plan_for(index, vectors[:4], np.ones((4, 4), dtype=bool), 10)
    assert report.trials[0].overlap == 1.0


def test_questions_that_open_nothing_do_not_count() -> None:
    index, queries, opened = case(0.9)
    opened = opened.copy()
    opened[5:] = False
    assert plan_for(index, queries, opened, 10).questions == 5


def test_a_list_is_not_made_longer_than_what_there_is() -> None:
    index, queries, opened = case(0.999)
    report = plan_for(index, queries, opened, 600, 1.0)
    assert {trial.plan.oversampling for trial in report.trials if trial.plan} == {1, 2}


def test_the_report_is_plain_json() -> None:
    report = planned(0.9)
    read = json.loads(json.dumps(report.to_json()))
    assert read["plan"] == {"dimensions": 64, "oversampling": 1}
    assert read["exact"]["plan"] is None
    assert read["trials"][0]["plan"] == {"dimensions": 64, "oversampling": 1}
    assert set(read) == {
        "plan",
        "why",
        "target_overlap",
        "k",
        "wanted",
        "questions",
        "documents",
        "dimensions",
        "exact",
        "trials",
    }


@pytest.mark.parametrize(("k", "target"), [(0, 0.99), (10, 0.0), (10, 1.1)])
def test_what_cannot_be_aimed_at_is_refused(k: int, target: float) -> None:
    index, queries, opened = case(0.9)
    with pytest.raises(InputError, match="a plan is made for"):
        plan_for(index, queries, opened, k, target)


def test_without_documents_there_is_nothing_to_plan_with() -> None:
    index, queries, opened = case(0.9)
    with pytest.raises(InputError, match="nothing to plan with"):
        plan_for(index, queries, np.zeros_like(opened), 10)
