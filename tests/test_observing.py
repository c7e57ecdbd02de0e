"""What a search makes of labelled questions, thresholds off: numbers by hand on three documents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma_rag.calibration import best_f1
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.labelled import as_labelled
from gemma_rag.learned import Calibration, Evidence, KindCalibration, Learned, Ranking, Router
from gemma_rag.observing import FEATURES, observe
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.retriever import TwoStageRetriever

DOCUMENTS = [
    Document(id="apple", text="apple", category="fruit"),
    Document(id="both", text="apple pear", category="fruit"),
    Document(id="car", text="car", category="traffic"),
]
LABELLED = as_labelled(
    [
        {"question": "apple", "relevant": ["apple"]},
        {"question": "pear", "relevant": ["car"]},
        {"question": "car", "relevant": []},
    ]
)
ROUGHLY = {"abs": 1e-3}  # the WordEncoder's small last component moves a cosine by up to 2e-4


@pytest.fixture
def base(words):
    with KnowledgeBase.from_documents(DOCUMENTS, words) as base:
        yield base


def test_the_first_document_of_each_question(base) -> None:
    [(kind, some)] = observe(base, LABELLED).items()
    assert (kind, some.places) == ("hybrid", (0, 1, 2))
    assert some.answerable.tolist() == [True, True, False]
    assert some.right.tolist() == [True, False, False]  # "pear" finds both, and its label says car
    assert some.groups == ("fruit", "fruit", "traffic")
    assert some.values["cosine"] == pytest.approx([1, 0.5**0.5, 1], **ROUGHLY)
    assert some.values["coverage"].tolist() == [1, 1, 1]


def test_lexical_scores_are_those_of_the_index(base) -> None:
    some = observe(base, LABELLED)["hybrid"]
    view = base.view()
    best = [view.lexical.scores(item.question).max() for item in LABELLED]
    assert some.values["lexical"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("options", "kind", "weights"),
    [
        ({}, "hybrid", {"cosine": 0.5, "lexical": 0.5}),
        ({"lexical_weight": 0.25}, "hybrid", {"cosine": 0.75, "lexical": 0.25}),
        ({"hybrid": False}, "dense", {"cosine": 1.0}),
        ({"mode": "flat"}, "hybrid", {"cosine": 0.5, "lexical": 0.5}),
        ({"mode": "lexical"}, "lexical", {"lexical": 1.0}),
    ],
)
def test_each_way_of_searching_has_its_kind_its_features_and_its_order(base, options, kind, weights) -> None:
    [(found, some)] = observe(base, LABELLED, TwoStageRetriever(base, **options)).items()
    assert (found, some.weights, tuple(some.values)) == (kind, weights, FEATURES[kind])
    fused = sum(weight * some.values[name] for name, weight in weights.items())
    assert some.fused == pytest.approx(fused, abs=1e-6)


def test_flat_search_has_no_scores_of_categories(base) -> None:
    assert np.isnan(observe(base, LABELLED, TwoStageRetriever(base, mode="flat"))["hybrid"].category_scores).all()


def test_the_score_of_the_best_category_is_what_stage_one_gave_it(base) -> None:
    some = observe(base, LABELLED)["hybrid"]
    asked = TwoStageRetriever(base, category_threshold=-1, document_threshold=-1).retrieve_many([i.question for i in LABELLED])
    assert some.category_scores == pytest.approx([found.categories[0].score for found in asked])


def test_a_question_that_finds_nothing_has_no_group_and_scores_0(base) -> None:
    labelled = as_labelled([{"question": "whale", "relevant": ["car"]}])
    some = observe(base, labelled, TwoStageRetriever(base, mode="lexical"))["lexical"]
    assert (some.groups, some.right.tolist(), some.fused.tolist()) == ((None,), [False], [0.0])
    assert {name: values.tolist() for name, values in some.values.items()} == {"lexical": [0.0], "coverage": [0.0]}


def test_held_out_the_next_best_document_is_the_first_and_no_question_has_an_answer(base) -> None:
    labelled = as_labelled([{"question": "apple", "relevant": ["apple"]}, {"question": "car", "relevant": ["car"]}])
    some = observe(base, labelled, held_out=True)["hybrid"]
    assert some.values["cosine"] == pytest.approx([0.5**0.5, 0], **ROUGHLY)
    assert not some.answerable.any()
    assert not some.right.any()


def test_held_out_with_every_document_relevant_nothing_is_found(base) -> None:
    labelled = as_labelled([{"question": "apple", "relevant": ["apple", "both", "car"]}])
    some = observe(base, labelled, held_out=True)["hybrid"]
    assert (some.groups, some.fused.tolist()) == ((None,), [0.0])


def test_thresholds_are_off_even_where_there_is_a_calibration(base) -> None:
    # evidence 0 is below every threshold: in a retrieval everything is refused
    plain = observe(base, LABELLED)["hybrid"]
    never = best_f1([2.0, 3.0], [False, True], [False, True])
    evidence = Evidence(features=("cosine",), coefficients=(0.0,), intercept=0.0)
    kind = KindCalibration(evidence=evidence, document=never, questions=(1, 1))
    base.learn(Learned(calibration=Calibration(fingerprint=base.manifest.fingerprint, kinds={"hybrid": kind})))
    assert not TwoStageRetriever(base).retrieve("apple")
    assert observe(base, LABELLED)["hybrid"].values["cosine"].tolist() == plain.values["cosine"].tolist()


def test_a_learned_router_is_a_feature_and_part_of_the_order(base) -> None:
    router = Router(("fruit", "traffic"), np.zeros((2, 10), np.float32), np.log(np.array([0.25, 0.75], np.float32)))
    ranking = Ranking(
        lexical_weight=0.5,
        router_weight=0.1,
        categories=router.categories,
        fingerprint=base.manifest.fingerprint,
        questions=20,
    )
    base.learn(Learned(ranking, router))
    some = observe(base, LABELLED)["hybrid"]
    assert some.weights == {"cosine": 0.5, "lexical": 0.5, "router": 0.1}
    assert some.values["router"] == pytest.approx(np.log([0.25, 0.25, 0.75]), abs=1e-6)
    fused = sum(weight * some.values[name] for name, weight in some.weights.items())
    assert some.fused == pytest.approx(fused, abs=1e-6)


def test_questions_that_the_model_does_not_read_are_observed_apart(words) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, languages=("en",))
    documents = [*DOCUMENTS, Document(id="pin", text="重置密码", category="it")]
    labelled = as_labelled([{"question": "重置密码", "relevant": ["pin"]}, *LABELLED])
    with KnowledgeBase.from_documents(documents, words) as base:
        observed = observe(base, labelled)
    assert {kind: some.places for kind, some in observed.items()} == {"hybrid": (1, 2, 3), "lexical": (0,)}
    assert observed["lexical"].right.tolist() == [True]


def test_some_of_the_questions_are_all_that_is_known_of_them(base) -> None:
    every = observe(base, LABELLED)["hybrid"]
    some = every.some(np.array([True, False, True]))
    assert (some.places, some.groups) == ((0, 2), ("fruit", "traffic"))
    for name in ("answerable", "right", "category_scores", "fused"):
        assert getattr(some, name).tolist() == getattr(every, name)[[0, 2]].tolist()
    assert {name: len(values) for name, values in some.values.items()} == {"cosine": 2, "lexical": 2, "coverage": 2}


def test_two_parts_beside_each_other_are_the_whole(base) -> None:
    every = observe(base, LABELLED)["hybrid"]
    again = every.some(np.array([0])).beside(every.some(np.array([1, 2])))
    for field in dataclasses.fields(every):
        one, other = getattr(every, field.name), getattr(again, field.name)
        if field.name == "values":
            assert {name: column.tolist() for name, column in one.items()} == {n: c.tolist() for n, c in other.items()}
        else:
            assert np.array_equal(one, other), field.name


def test_a_retriever_of_another_knowledge_base_is_refused(words) -> None:
    one, other = (KnowledgeBase.from_documents(DOCUMENTS, words) for _ in range(2))
    with pytest.raises(InputError, match="another knowledge base"):
        observe(one, LABELLED, TwoStageRetriever(other))
