"""What the page about a calibration shows: six questions, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_rag.calibrating import CalibrationReport
from gemma_rag.calibration import OperatingPoint, best_end_to_end, best_f1, judge
from gemma_rag.calibration_page import page_of
from gemma_rag.labelled import as_labelled
from gemma_rag.learned import Calibration, Evidence, KindCalibration
from gemma_rag.observing import Observed
from gemma_rag.probability import ProbabilityMap, fit_probability
from gemma_rag.report import save_plots, write_calibration_page

SCORES = [0.9, 0.8, 0.6, 0.5, 0.3, 0.1]
ANSWERABLE = [True, True, False, True, False, False]
RIGHT = [True, True, False, False, False, False]
COSINE = Evidence(features=("cosine",), coefficients=(1.0,), intercept=0.0)


def point(threshold: float, rule: str = "best_f1", scores=SCORES, answerable=ANSWERABLE, right=RIGHT) -> OperatingPoint:
    make = {"best_f1": best_f1, "end_to_end": best_end_to_end}[rule]
    chosen = make([0.0, 1.0], [False, True], [False, True]).model_copy(update={"threshold": threshold})
    return judge(chosen, scores, answerable, right)


def seen(places=range(6), scores=SCORES, answerable=ANSWERABLE, right=RIGHT, category_scores=None) -> Observed:
    values = np.array(scores)
    return Observed(
        places=tuple(places),
        answerable=np.array(answerable),
        right=np.array(right),
        groups=("c",) * len(scores),
        category_scores=np.array(category_scores if category_scores is not None else [np.nan] * len(scores)),
        values={"cosine": values},
        fused=values,
        weights={"cosine": 1.0},
    )


def report(**kinds: tuple[KindCalibration, Observed]) -> CalibrationReport:
    count = sum(len(some.places) for _, some in kinds.values())
    return CalibrationReport(
        calibration=Calibration(fingerprint="f", kinds={name: item for name, (item, _) in kinds.items()}),
        observed={name: some for name, (_, some) in kinds.items()},
        evidence={name: some.values["cosine"] for name, (_, some) in kinds.items()},
        questions=as_labelled({"question": f"question {i}", "relevant": []} for i in range(count)),
        notes=("a note",),
    )


def one(threshold: float, **more) -> KindCalibration:
    return KindCalibration(**{"evidence": COSINE, "document": point(threshold), "questions": (3, 3)} | more)


def flipped(page) -> dict[str, list[str]]:
    return {way: [row["question"] for row in rows] for way, rows in page["flips"].items()}


def test_the_first_calibration_is_shown_against_answering_everything():
    page = page_of(report(dense=(one(0.55), seen())))
    assert flipped(page) == {"newly_answered": [], "newly_refused": ["question 3", "question 4", "question 5"]}
    assert page["stages"]["document"]["old_threshold"] is None
    [lost, *rest] = page["flips"]["newly_refused"]
    assert lost == {"question": "question 3", "score": 0.5, "answerable": True, "right": False}
    assert [row["answerable"] for row in rest] == [False, False]


@pytest.mark.parametrize(
    ("old", "answered", "refused"),
    [(0.85, ["question 1", "question 2"], []), (0.2, [], ["question 3", "question 4"]), (0.55, [], [])],
)
def test_the_next_one_is_shown_against_the_last(old, answered, refused):
    before = Calibration(fingerprint="f", kinds={"dense": one(old)})
    page = page_of(report(dense=(one(0.55), seen())), before)
    assert flipped(page) == {"newly_answered": answered, "newly_refused": refused}
    assert page["stages"]["document"]["old_threshold"] == old


def test_a_calibration_of_another_kind_of_search_is_nothing_to_compare_with():
    before = Calibration(fingerprint="f", kinds={"lexical": one(0.85)})
    assert page_of(report(dense=(one(0.55), seen())), before) == page_of(report(dense=(one(0.55), seen())))


def test_the_chosen_operating_point_comes_first_with_its_sentence():
    other = point(0.7, "end_to_end")
    page = page_of(report(dense=(one(0.55, points=(other,)), seen())))
    assert page["chosen"] == "best_f1"
    assert [(p["rule"], p["threshold"]) for p in page["points"]] == [("best_f1", 0.55), ("end_to_end", 0.7)]
    first = page["points"][0]
    # of three answers two are right, and one is to a question without an answer
    assert (first["coverage"], first["precision"], first["false_answers"]) == (2 / 3, 2 / 3, 1 / 3)
    assert first["statement"] == point(0.55).statement
    assert page["notes"] == ["a note"]


def test_curves_are_those_of_the_scores():
    stage = page_of(report(dense=(one(0.55), seen())))["stages"]["document"]
    assert (stage["scores"], stage["answerable"], stage["threshold"]) == (SCORES, ANSWERABLE, 0.55)
    third = pytest.approx(1 / 3)
    assert stage["roc"]["x"] == [0, 0, 0, third, third, pytest.approx(2 / 3), 1]
    assert stage["roc"]["y"] == [0, third, pytest.approx(2 / 3), pytest.approx(2 / 3), 1, 1, 1]
    assert stage["precision_recall"]["x"] == stage["roc"]["y"][1:]
    assert stage["precision_recall"]["y"] == pytest.approx([1, 1, 2 / 3, 3 / 4, 3 / 5, 1 / 2])


def test_labels_of_one_class_have_no_curves():
    every = seen(answerable=[True] * 6)
    stage = page_of(report(dense=(one(0.55), every)))["stages"]["document"]
    assert not {"roc", "precision_recall"} & stage.keys()


def test_stage_one_is_shown_where_it_has_a_threshold():
    page = page_of(report(dense=(one(0.55), seen())))
    assert page["stages"].keys() == {"document"}
    scores = [0.7, 0.6, 0.65, 0.5, 0.2, 0.1]
    page = page_of(report(dense=(one(0.55, category=point(0.4)), seen(category_scores=scores))))
    stage = page["stages"]["category"]
    assert (stage["scores"], stage["threshold"], stage["old_threshold"]) == (scores, 0.4, None)


def test_probabilities_are_held_against_what_was_right_in_ten_bins():
    itself = ProbabilityMap(kind="isotonic", knots=((0, 0), (1, 1)), clip=1e-9, log_loss=0, brier=0, labels=6)
    scores = [1.0, 0.95, 0.92, 0.25, 0.21, 0.0]
    some = seen(scores=scores, answerable=[True] * 6, right=[True, True, False, True, False, False])
    found = page_of(report(dense=(one(0.5, probability=itself), some)))["reliability"]
    assert found["predicted"] == pytest.approx([0.0, 0.23, (1.0 + 0.95 + 0.92) / 3], abs=1e-6)
    assert found["observed"] == pytest.approx([0, 1 / 2, 2 / 3])
    assert found["count"] == [1, 2, 3]
    assert "reliability" not in page_of(report(dense=(one(0.5), some)))


def test_of_several_kinds_of_search_the_one_with_most_questions_is_shown_with_its_own():
    few = seen([5, 0], SCORES[:2], [True, False], [True, False])
    many = seen([1, 2, 3, 4], [0.9, 0.2, 0.3, 0.1], [True, True, False, False], [True, False, False, False])
    page = page_of(report(lexical=(one(0.5), few), hybrid=(one(0.25), many)))
    assert page["title"] == "Thresholds of hybrid search"
    assert flipped(page)["newly_refused"] == ["question 2", "question 4"]


def test_an_estimate_says_so_in_its_title():
    found = report(dense=(one(0.55), seen()))
    estimated = found.calibration.model_copy(update={"estimated": True})
    page = page_of(CalibrationReport(estimated, found.observed, found.evidence, found.questions))
    assert page["title"] == "Thresholds of dense search, estimated without labels"


def test_it_is_plain_json_that_the_page_and_the_plots_are_made_of(tmp_path):
    probability = fit_probability(np.array(SCORES * 20), np.array(RIGHT * 20), 0)
    item = one(0.55, category=point(0.4), probability=probability)
    page = page_of(report(dense=(item, seen(category_scores=SCORES))))
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    write_calibration_page(page, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert point(0.55).statement in text
    assert "question 3" in text
    names = {file.stem for file in save_plots(page, tmp_path / "plots")}
    assert names >= {"document-scores", "document-roc", "document-precision-recall", "category-scores", "reliability"}
