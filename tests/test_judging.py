"""What is kept of what a search found: by a calibration made by hand, whose evidence is the cosine or a simple sum."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_rag.calibration import OperatingPoint, for_coverage
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.judging import Judge, best
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.learned import Calibration, Evidence, KindCalibration, Learned
from gemma_rag.probability import ProbabilityMap
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.results import Outcome
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.search import Search
from gemma_rag.thresholds import FixedThreshold

DOCUMENTS = [
    Document(id="apple", text="apple", category="fruit"),
    Document(id="both", text="apple pear", category="fruit"),
    Document(id="three", text="apple pear plum", category="mixed"),
    Document(id="car", text="car", category="traffic"),
]
# cosines of "apple", which is the order by cosine and words together as well
COSINES = {"apple": 1.0, "both": 2**-0.5, "three": 3**-0.5, "car": 0.0}
ROUGHLY = {"abs": 1e-3}  # the WordEncoder's small last component moves a cosine by up to 2e-4
COSINE = Evidence(features=("cosine",), coefficients=(1.0,), intercept=0.0)
CURVE = ProbabilityMap(kind="platt", slope=4.0, intercept=-2.0, clip=0.01, log_loss=0.1, brier=0.1, labels=98)


def point(threshold: float) -> OperatingPoint:
    """An operating point at a threshold of our own."""
    return for_coverage([0.0, 1.0], [True, True], [True, True]).model_copy(update={"threshold": threshold})


@pytest.fixture
def base(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        yield base


@pytest.fixture
def calibrated(base):
    """Gives the knowledge base a calibration of hybrid search."""

    def calibrated(threshold: float, evidence: Evidence = COSINE, **fields) -> KnowledgeBase:
        kind = KindCalibration(evidence=evidence, document=point(threshold), questions=(1, 1), **fields)
        base.learn(Learned(calibration=Calibration(fingerprint=base.manifest.fingerprint, kinds={"hybrid": kind})))
        return base

    return calibrated


def ask(base, question: str = "apple", **options):
    return TwoStageRetriever(base, **options).retrieve(question)


def ids(found) -> list[str]:
    return [hit.document.id for hit in found.hits]


# -- thresholds on evidence -------------------------------------------------------------------------------------------


def test_documents_whose_evidence_reaches_the_threshold_are_kept(calibrated) -> None:
    found = ask(calibrated(0.65))
    assert (found.outcome, ids(found)) == (Outcome.ANSWERED, ["apple", "both"])
    assert [hit.evidence for hit in found.hits] == pytest.approx([1.0, 2**-0.5], **ROUGHLY)


def test_the_result_says_what_the_threshold_acts_on(calibrated) -> None:
    found = ask(calibrated(0.65, category=point(0.3)))
    assert found.thresholds == {"category": 0.3, "document": 0.65, "acts_on": "evidence"}
    assert found.notes == ()


def test_what_falls_short_is_a_near_miss_with_its_margin_in_evidence(calibrated) -> None:
    double = Evidence(features=("cosine",), coefficients=(2.0,), intercept=1.0)
    found = ask(calibrated(1 + 2 * 0.65, double))
    assert [miss.document.id for miss in found.near_misses[:2]] == ["three", "car"]
    assert [miss.margin for miss in found.near_misses[:2]] == pytest.approx([2 * (0.65 - 3**-0.5), 2 * 0.65], abs=2e-3)
    assert found.near_misses[0].score == pytest.approx(3**-0.5, **ROUGHLY)


def test_where_nothing_reaches_it_the_question_is_refused_with_near_misses(calibrated) -> None:
    found = ask(calibrated(1.2))
    assert (found.outcome, found.hits) == (Outcome.DOCUMENT_BELOW_THRESHOLD, ())
    assert [miss.document.id for miss in found.near_misses] == ["apple", "both", "three", "car"]


def test_near_misses_are_no_more_than_k(calibrated) -> None:
    assert len(ask(calibrated(1.2), k=2).near_misses) == 2


def test_where_the_first_document_fails_none_is_given(calibrated) -> None:
    # evidence falls with the cosine: both (-0.71) passes -0.8, and apple (-1), which comes first, does not
    against = Evidence(features=("cosine",), coefficients=(-1.0,), intercept=0.0)
    found = ask(calibrated(-0.8, against))
    assert found.outcome is Outcome.DOCUMENT_BELOW_THRESHOLD
    assert [miss.document.id for miss in found.near_misses] == ["apple"]
    assert ids(ask(calibrated(-1.1, against), k=2)) == ["apple", "both"]


def test_a_later_document_that_fails_leaves_the_others(calibrated) -> None:
    found = ask(calibrated(0.5, by_category={"fruit": 0.8}))
    assert ids(found) == ["apple", "three"]  # both is fruit: 0.71 is not enough there


def test_a_category_has_its_own_threshold(calibrated) -> None:
    found = ask(calibrated(0.65, by_category={"mixed": 0.5, "unheard-of": 2.0}))
    assert ids(found) == ["apple", "both", "three"]
    assert found.near_misses[0].margin == pytest.approx(0.65, **ROUGHLY)


def test_the_probability_rises_with_the_evidence(calibrated) -> None:
    hits = ask(calibrated(-1.0, probability=CURVE)).hits
    assert [hit.probability for hit in hits] == pytest.approx(
        [1 / (1 + np.exp(2 - 4 * COSINES[hit.document.id])) for hit in hits], **ROUGHLY
    )
    assert [hit.probability for hit in hits] == sorted((hit.probability for hit in hits), reverse=True)


def test_without_a_map_there_is_evidence_and_no_probability(calibrated) -> None:
    [hit] = ask(calibrated(0.9)).hits
    assert (hit.evidence is not None, hit.probability) == (True, None)


def test_without_a_calibration_there_is_neither(base) -> None:
    [hit] = ask(base, category_threshold=-1, document_threshold=0.9).hits
    assert (hit.evidence, hit.probability) == (None, None)


def test_more_hits_than_are_weighed_by_habit_are_weighed_where_they_are_asked_for(words) -> None:
    documents = [Document(id=f"d{i:02}", text="apple", category="fruit") for i in range(13)]
    with KnowledgeBase.from_documents(documents, words) as base:
        kind = KindCalibration(evidence=COSINE, document=point(0.9), questions=(1, 1))
        base.learn(Learned(calibration=Calibration(fingerprint=base.manifest.fingerprint, kinds={"hybrid": kind})))
        found = ask(base, k=12)
    assert len(found.hits) == 12
    assert all(hit.evidence is not None for hit in found.hits)


# -- which thresholds are in force ------------------------------------------------------------------------------------


def test_a_document_threshold_of_the_caller_switches_the_calibration_off(calibrated) -> None:
    base = calibrated(1.2, category=point(1.0), probability=CURVE)
    assert not ask(base)
    found = ask(base, document_threshold=0.65, category_threshold=-1)
    assert ids(found) == ["apple", "both"]
    assert found.thresholds == {"category": -1.0, "document": 0.65, "acts_on": "cosine"}
    assert (found.hits[0].evidence, found.hits[0].probability, found.notes) == (None, None, ())


def test_a_category_threshold_of_the_caller_takes_the_place_of_the_calibrated_one(calibrated) -> None:
    base = calibrated(0.9, category=point(0.99))
    assert ask(base).outcome is Outcome.CATEGORY_BELOW_THRESHOLD
    found = ask(base, category_threshold=0.2)
    assert ids(found) == ["apple"]
    assert found.thresholds == {"category": 0.2, "document": 0.9, "acts_on": "evidence"}


def test_flat_search_has_no_category_threshold_and_the_calibrated_document_threshold(calibrated) -> None:
    found = ask(calibrated(0.9, category=point(0.99)), mode="flat")
    assert ids(found) == ["apple"]
    assert found.thresholds == {"category": None, "document": 0.9, "acts_on": "evidence"}


def test_without_a_calibrated_category_threshold_stage_one_refuses_nothing(calibrated) -> None:
    found = ask(calibrated(0.9), "whale")
    assert (found.outcome, found.thresholds["category"]) == (Outcome.DOCUMENT_BELOW_THRESHOLD, -1.0)


@pytest.mark.parametrize(
    ("options", "kind", "thresholds"),
    [
        ({"hybrid": False}, "dense", {"category": 0.25, "document": 0.35, "acts_on": "cosine"}),
        ({"mode": "lexical"}, "lexical", {"category": 0.1, "document": 0.15, "acts_on": "lexical"}),
    ],
)
def test_a_way_of_searching_that_was_not_calibrated_has_its_defaults_and_a_note(
    calibrated, words, options, kind, thresholds
) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, category_threshold=0.25, document_threshold=0.35)
    found = ask(calibrated(1.2), **options)
    assert found.thresholds == thresholds
    assert found.notes == (f"the calibration knows nothing of {kind} search: the default thresholds were used",)
    assert "apple" in ids(found)


def test_a_calibration_that_needs_a_router_where_there_is_none_gives_way_with_a_note(calibrated, words) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, category_threshold=0.25, document_threshold=0.35)
    routed = Evidence(features=("router",), coefficients=(1.0,), intercept=0.0)
    found = ask(calibrated(9.0, routed))
    assert found.thresholds == {"category": 0.25, "document": 0.35, "acts_on": "cosine"}
    assert found.notes == ("the calibration needs the learned router, which was left out: the default thresholds were used",)


def test_a_calibration_with_a_feature_that_no_search_gives_is_refused(calibrated) -> None:
    strange = Evidence(features=("mood",), coefficients=(1.0,), intercept=0.0)
    with pytest.raises(InputError, match="the calibration needs mood, which this search does not give"):
        ask(calibrated(0.5, strange))


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(words):
    """What a search finds for "red apple" among documents of one text each, and its judge."""

    def judged(*texts: str, **options):
        documents = [Document(id=f"d{i}", text=text, category="c") for i, text in enumerate(texts)]
        base = KnowledgeBase.from_documents(documents, words)
        retriever = TwoStageRetriever(base, category_threshold=-1, document_threshold=-1, **options)
        [(_, settings)] = retriever.plan(["red apple"])
        search = Search(base, settings, None, None)
        [found] = search.find(["red apple"], FixedThreshold(-1.0))
        return Judge(search), found

    return judged


def test_coverage_is_that_of_the_best_sentence(judged) -> None:
    # the first has both words in one sentence; of the second each sentence has one of them; the third has none
    judge, found = judged("A car. The red apple.", "A red car. An apple.", "A tram.")
    where = np.argsort(found.scored.places)
    coverage = judge.features("red apple", found, where, ("coverage",))["coverage"]
    weight = judge.view.lexical.weight
    red, apple = weight("red") + weight("~red"), weight("apple") + weight("~appl") + weight("appl*")
    assert coverage == pytest.approx([1.0, max(red, apple) / (red + apple), 0.0])


def test_only_the_features_asked_for_are_given_and_those_that_the_search_lacks_are_not(judged) -> None:
    judge, found = judged("red", "apple", hybrid=False)
    values = judge.features("red apple", found, np.array([0, 1]), ("cosine", "lexical", "router"))
    assert set(values) == {"cosine"}


def test_features_of_no_documents_are_empty(judged) -> None:
    judge, found = judged("red", "apple")
    values = judge.features("red apple", found, np.zeros(0, dtype=np.int64), ("cosine", "lexical", "coverage"))
    assert {name: value.shape for name, value in values.items()} == {"cosine": (0,), "lexical": (0,), "coverage": (0,)}


# -- reranking and diversity ------------------------------------------------------------------------------------------


def by_length(question, passages) -> list[float]:
    """A reranker that prefers the longest passage."""
    return [float(len(passage)) for passage in passages]


def test_a_reranker_orders_what_was_kept_and_thresholds_do_not_look_at_it(calibrated) -> None:
    found = ask(calibrated(0.65), reranker=by_length)
    assert [(hit.document.id, hit.rerank_score) for hit in found.hits] == [("both", 10.0), ("apple", 5.0)]
    assert [miss.document.id for miss in found.near_misses] == ["three", "car"]


def test_hits_below_the_rerankers_reach_follow_in_their_order(base) -> None:
    found = ask(base, category_threshold=-1, document_threshold=0.3, reranker=by_length, rerank_top=2)
    assert [(hit.document.id, hit.rerank_score) for hit in found.hits] == [("both", 10.0), ("apple", 5.0), ("three", None)]


def test_a_reranker_can_bring_in_what_was_beyond_k(base) -> None:
    found = ask(base, category_threshold=-1, document_threshold=0.3, reranker=by_length, k=1)
    assert ids(found) == ["three"]


def test_a_reranker_is_not_asked_about_nothing(calibrated) -> None:
    def never(question, passages) -> list[float]:
        raise AssertionError("asked")

    assert not ask(calibrated(1.2), reranker=never)


def test_diversity_puts_a_repetition_behind(words) -> None:
    documents = [
        Document(id=name, text=text, category="c") for name, text in [("a", "apple"), ("b", "apple"), ("c", "apple pear")]
    ]
    with KnowledgeBase.from_documents(documents, words) as base:
        options = {"category_threshold": -1, "document_threshold": 0.3, "k": 2}
        assert ids(ask(base, **options)) == ["a", "b"]
        assert ids(ask(base, diversity=0.9, **options)) == ["a", "c"]


# -- the best of many -------------------------------------------------------------------------------------------------

few = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(few, few), max_size=12), st.integers(1, 14))
def test_the_best_are_those_of_a_full_sort_with_ties_in_their_order(rows, k) -> None:
    values, ties = (np.array([row[i] for row in rows], dtype=np.float64) for i in (0, 1))
    expected = sorted(range(len(rows)), key=lambda i: (-rows[i][0], -rows[i][1], i))[:k]
    assert best(values, ties, k).tolist() == expected


def test_what_is_ruled_out_by_minus_infinity_comes_last() -> None:
    assert best(np.array([-np.inf, 0.1, 0.2]), np.zeros(3), 3).tolist() == [2, 1, 0]
