from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Category, Document
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.results import Outcome
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate
from gemma_rag.thresholds import Cut, DynamicThreshold, FixedThreshold

EVERYTHING = {"category_threshold": -1, "document_threshold": -1}
ROUGHLY = {"abs": 1e-3}  # the WordEncoder's small last component moves a cosine by up to 2e-4
FRUIT_AND_TRAFFIC = [
    "apple fruit apple",
    "mixed fruit apple pear",
    "plum fruit plum",
    "car traffic car",
    "bus traffic bus tram",
]


def document(line: str, **fields) -> Document:
    """A document written as one line: id, category, text."""
    name, category, text = line.split(" ", 2)
    return Document(id=name, category=category, text=text, **fields)


def ids(retrieval) -> list[str]:
    return [hit.document.id for hit in retrieval.hits]


@pytest.fixture
def build(words):
    """Builds a knowledge base from lines; the encoder forgets what it was asked for that."""

    def build(lines, **options) -> KnowledgeBase:
        documents = [line if isinstance(line, Document) else document(line) for line in lines]
        base = KnowledgeBase.from_documents(documents, words, **options)
        words.calls.clear()
        return base

    return build


@pytest.fixture
def base(build) -> KnowledgeBase:
    return build(FRUIT_AND_TRAFFIC)


@pytest.fixture
def measured(words):
    """Gives the encoder a profile with measured thresholds, and a name of its own."""

    def measured(category: float | None, document: float | None, **fields) -> None:
        words.profile = dataclasses.replace(NO_PROMPTS, category_threshold=category, document_threshold=document, **fields)

    return measured


# -- outcomes ---------------------------------------------------------------------------------------------------------


def test_answered_with_the_documents_above_the_threshold_best_first(base) -> None:
    # "apple": apple 1, mixed 1 / sqrt 2 = 0.707, plum 0; traffic is not opened
    found = TwoStageRetriever(base).retrieve("apple", category_threshold=0.3, document_threshold=0.3)
    assert (found.outcome, ids(found)) == (Outcome.ANSWERED, ["apple", "mixed"])


def test_a_question_that_fits_no_category_ends_at_stage_one(base) -> None:
    # fruit, the better one, scores 0.619 (see below)
    found = TwoStageRetriever(base).retrieve("pear", category_threshold=0.63, document_threshold=0.3)
    assert (found.outcome, found.documents_scored) == (Outcome.CATEGORY_BELOW_THRESHOLD, 0)


def test_a_refused_question_says_what_every_category_scored(base) -> None:
    found = TwoStageRetriever(base).retrieve("pear", category_threshold=0.63, document_threshold=0.3)
    assert [(category.name, category.kept, category.why) for category in found.categories] == [
        ("fruit", False, ""),
        ("traffic", False, ""),
    ]


def test_a_question_that_fits_no_document_ends_at_stage_two(base) -> None:
    found = TwoStageRetriever(base).retrieve("pear", category_threshold=0, document_threshold=0.8)
    assert (found.outcome, found.hits) == (Outcome.DOCUMENT_BELOW_THRESHOLD, ())


def test_filters_that_no_document_passes_have_an_outcome_of_their_own(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", where={"year": 2024}, **EVERYTHING)
    assert found.outcome is Outcome.FILTERED_OUT


@pytest.mark.parametrize("mode", ["two-stage", "flat", "lexical"])
def test_an_empty_knowledge_base_has_an_outcome_of_its_own(build, mode) -> None:
    assert TwoStageRetriever(build([]), mode=mode).retrieve("apple").outcome is Outcome.EMPTY_KNOWLEDGE_BASE


def test_near_misses_come_best_first_with_their_margins(base) -> None:
    # "pear": mixed 0.707, the other two 0; margins 0.8 - 0.707 and 0.8 - 0
    found = TwoStageRetriever(base).retrieve("pear", category_threshold=0, document_threshold=0.8)
    assert [(miss.document.id, miss.margin) for miss in found.near_misses[:2]] == [
        ("mixed", pytest.approx(0.0929, **ROUGHLY)),
        ("apple", pytest.approx(0.8, **ROUGHLY)),
    ]


def test_a_hit_is_no_near_miss(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", 2, category_threshold=0.3, document_threshold=0.3)
    assert (ids(found), [miss.document.id for miss in found.near_misses]) == (["apple", "mixed"], ["plum"])


def test_a_result_is_true_where_it_has_hits(base) -> None:
    assert TwoStageRetriever(base).retrieve("apple", **EVERYTHING)


def test_a_result_is_false_where_it_has_none(base) -> None:
    assert not TwoStageRetriever(base).retrieve("apple", category_threshold=1, document_threshold=0)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_cosines_by_hand(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", **EVERYTHING)
    assert [hit.score for hit in found.hits[:2]] == pytest.approx([1, math.sqrt(0.5)], **ROUGHLY)


def test_category_scores_by_hand(base) -> None:
    # the cosines of "pear" with fruit's documents are 0, 0.707, 0: mean 0.236, standard deviation 0.333; of three documents
    # the best can lie sqrt(2) deviations above the mean: 0.236 + 1.414 * 0.333 = 0.707, which is what it is. The name is an
    # unknown word, 0.01, and has a share of 0.2 / (0.2 + 0.8 * sqrt(3)) = 0.126: 0.874 * 0.707 + 0.126 * 0.01 = 0.619
    found = TwoStageRetriever(base).retrieve("pear", **EVERYTHING)
    assert [(category.name, category.score) for category in found.categories] == [
        ("fruit", pytest.approx(0.6192, **ROUGHLY)),
        ("traffic", pytest.approx(0.0016, **ROUGHLY)),
    ]


def test_a_hit_has_the_score_of_its_category(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", **EVERYTHING)
    assert found.hits[0].category_score == found.categories[0].score


def test_only_documents_of_opened_categories_are_scored(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", 2, **EVERYTHING)
    assert (found.documents_scored, found.documents_total) == (3, 5)
    assert [(category.name, category.kept, category.why) for category in found.categories] == [
        ("fruit", True, "mass"),
        ("traffic", False, ""),
    ]


def test_a_category_that_promises_more_than_the_last_hit_holds_is_opened_after_all(base) -> None:
    # of three hits the last, plum, has 0.0001, and traffic, with 0.0016, promises more
    found = TwoStageRetriever(base).retrieve("apple", 3, **EVERYTHING)
    assert [(category.name, category.kept, category.why) for category in found.categories] == [
        ("fruit", True, "mass"),
        ("traffic", True, "rescue"),
    ]
    assert (found.documents_scored, len(found.hits)) == (5, 3)


def test_more_hits_than_the_opened_categories_have_are_looked_for_in_the_others(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", 9, **EVERYTHING)
    assert sorted(ids(found)) == ["apple", "bus", "car", "mixed", "plum"]


def test_no_category_is_opened_afterwards_beyond_max_categories(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", 9, max_categories=1, **EVERYTHING)
    assert (ids(found), found.categories[1].kept) == (["apple", "mixed", "plum"], False)


def test_no_category_is_opened_afterwards_that_was_not_asked_for(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple", 9, categories=["fruit"], **EVERYTHING)
    assert ids(found) == ["apple", "mixed", "plum"]


def test_the_probabilities_of_categories_are_a_softmax_of_their_scores(base) -> None:
    # scores 0.6192 and 0.0016, a temperature of 0.5: 1 / (1 + exp(-0.6176 / 0.5)) = 0.775
    found = TwoStageRetriever(base, gate=Gate(mass=1.0, temperature=0.5)).retrieve("pear", **EVERYTHING)
    assert [category.probability for category in found.categories] == pytest.approx([0.775, 0.225], **ROUGHLY)


def test_a_document_of_several_chunks_is_one_hit_with_its_best_chunk_as_the_passage(build) -> None:
    text = "\n\n".join([" ".join(["apple"] * 12), " ".join(["pear"] * 12), " ".join(["plum"] * 12)])
    long = Document(id="long", category="fruit", text=text)
    found = TwoStageRetriever(build([long], chunker=Chunker(max_tokens=16))).retrieve("pear", **EVERYTHING)
    assert [(hit.document.id, hit.passage) for hit in found.hits] == [("long", " ".join(["pear"] * 12))]


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_thresholds_default_to_the_profiles(base, measured) -> None:
    measured(0.25, 0.35)
    assert TwoStageRetriever(base).retrieve("apple").thresholds == {"category": 0.25, "document": 0.35, "acts_on": "cosine"}


def test_thresholds_of_the_retriever_win_over_the_profiles(base, measured) -> None:
    measured(0.25, 0.35)
    retriever = TwoStageRetriever(base, category_threshold=0.5, document_threshold=0.6)
    assert retriever.retrieve("apple").thresholds == {"category": 0.5, "document": 0.6, "acts_on": "cosine"}


def test_thresholds_of_a_call_win_over_the_retrievers(base) -> None:
    retriever = TwoStageRetriever(base, category_threshold=0.5, document_threshold=0.6)
    found = retriever.retrieve("apple", category_threshold=0.1, document_threshold=0.2)
    assert found.thresholds == {"category": 0.1, "document": 0.2, "acts_on": "cosine"}


def test_one_threshold_can_be_given_and_the_other_left_to_the_profile(base, measured) -> None:
    measured(0.25, 0.35)
    assert TwoStageRetriever(base).retrieve("apple", document_threshold=0.2).thresholds == {
        "category": 0.25,
        "document": 0.2,
        "acts_on": "cosine",
    }


def test_thresholds_that_nobody_measured_refuse_nothing(base) -> None:
    assert TwoStageRetriever(base).retrieve("apple").thresholds == {"category": -1.0, "document": -1.0, "acts_on": "cosine"}


def test_lexical_thresholds_are_those_of_words(base, measured) -> None:
    measured(0.25, 0.35)
    assert TwoStageRetriever(base, mode="lexical").retrieve("apple").thresholds == {
        "category": 0.1,
        "document": 0.15,
        "acts_on": "lexical",
    }


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)])
def test_a_threshold_of_0_in_a_call_is_not_taken_for_none(base, zero) -> None:
    retriever = TwoStageRetriever(base, category_threshold=0.9, document_threshold=0.9)
    found = retriever.retrieve("apple", category_threshold=zero, document_threshold=zero)
    assert found.thresholds == {"category": 0.0, "document": 0.0, "acts_on": "cosine"}


def test_a_threshold_of_0_of_the_retriever_is_not_taken_for_none(base, measured) -> None:
    measured(0.9, 0.9)
    found = TwoStageRetriever(base, category_threshold=0, document_threshold=0).retrieve("apple")
    assert found.thresholds == {"category": 0.0, "document": 0.0, "acts_on": "cosine"}


class TopOne:
    """A threshold of somebody's own."""

    def __repr__(self) -> str:
        return "TopOne()"

    def apply(self, scores) -> Cut:
        best = max(scores, default=0.0)
        return Cut(np.asarray(scores) >= best, float(best))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        ("strict", ["apple"]),  # 0.85, of 1, 0.707 and 0
        ("loose", ["apple", "mixed"]),  # 0.58
        ("dynamic", ["apple", "mixed"]),  # 0.85 * (1 + 0.707 + 0) / 3 = 0.484, or less with the other category's
        (DynamicThreshold(ratio=1.0, top_n=2), ["apple"]),  # (1 + 0.707) / 2 = 0.854
        (FixedThreshold(0.7), ["apple", "mixed"]),
        (TopOne(), ["apple"]),
    ],
    ids=repr,
)
def test_thresholds_of_every_kind_cut_the_hits(base, threshold, expected) -> None:
    assert ids(TwoStageRetriever(base, document_threshold=threshold, category_threshold=0).retrieve("apple")) == expected


@pytest.mark.parametrize(("threshold", "answered"), [("loose", True), ("balanced", False), (FixedThreshold(0.63), False)])
def test_thresholds_of_every_kind_judge_the_best_category(base, threshold, answered) -> None:
    # fruit scores 0.619: above 0.58, below 0.72
    found = TwoStageRetriever(base).retrieve("pear", category_threshold=threshold, document_threshold=0)
    assert bool(found) is answered


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "expected"), [(1, ["apple"]), (2, ["apple", "mixed"]), (3, ["apple", "mixed", "plum"])])
def test_k_is_the_most_hits(base, k, expected) -> None:
    assert ids(TwoStageRetriever(base).retrieve("apple", k, **EVERYTHING)) == expected


def test_options_of_a_call_do_not_change_the_retriever(base) -> None:
    retriever = TwoStageRetriever(base, **EVERYTHING)
    before = retriever.retrieve("apple")
    retriever.retrieve("car", 1, mode="flat", hybrid=True, max_categories=1, document_threshold=0.9, categories=["traffic"])
    assert (ids(retriever.retrieve("apple")), retriever) == (ids(before), TwoStageRetriever(base, **EVERYTHING))


def test_categories_restrict_the_search(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple car", categories=["traffic"], **EVERYTHING)
    assert ids(found) == ["car", "bus"]


def test_categories_that_were_not_asked_for_are_not_scored(base) -> None:
    found = TwoStageRetriever(base).retrieve("apple car", categories=["traffic"], **EVERYTHING)
    assert [category.name for category in found.categories] == ["traffic"]


def test_the_category_threshold_looks_at_the_categories_asked_for(base) -> None:
    # fruit would pass
    found = TwoStageRetriever(base).retrieve("apple", categories=["traffic"], category_threshold=0.3, document_threshold=0)
    assert found.outcome is Outcome.CATEGORY_BELOW_THRESHOLD


def test_no_categories_to_search_filter_everything_out(base) -> None:
    assert TwoStageRetriever(base).retrieve("apple", categories=[], **EVERYTHING).outcome is Outcome.FILTERED_OUT


def test_of_max_categories_the_best_are_opened(build) -> None:
    base = build(["a fruit apple", "b colour apple red red", "c traffic car"])
    found = TwoStageRetriever(base, gate=Gate(mass=1.0)).retrieve("apple", max_categories=2, **EVERYTHING)
    assert [category.name for category in found.categories if category.kept] == ["fruit", "colour"]


def test_a_knowledge_base_of_one_category_is_searched(build) -> None:
    assert ids(TwoStageRetriever(build(["a fruit apple"])).retrieve("apple", **EVERYTHING)) == ["a"]


METADATA = {
    "a": {"year": 2023, "language": "en", "draft": False},
    "b": {"year": 2024, "language": "zh", "draft": True, "owner": None},
    "c": {"year": 2024, "language": "en"},
    "d": {},
}


@pytest.mark.parametrize("mode", ["two-stage", "flat", "lexical"])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"year": 2024}, "bc"),
        ({"year": "2024"}, ""),  # a string is no number
        ({"language": ["en", "zh"]}, "abc"),
        ({"language": ("zh", "fr")}, "b"),
        ({"year": 2024, "language": "en"}, "c"),
        ({"missing": 1}, ""),
        ({"draft": True}, "b"),
        ({"draft": False}, "a"),
        ({"owner": None}, "b"),  # a null is there, a missing key is not
        ({"language": []}, ""),
        ({}, "abcd"),
    ],
    ids=str,
)
def test_where_keeps_the_documents_with_that_metadata(build, where, expected, mode) -> None:
    base = build([document(f"{name} fruit apple", metadata=metadata) for name, metadata in METADATA.items()])
    assert sorted(ids(TwoStageRetriever(base, mode=mode, **EVERYTHING).retrieve("apple", 9, where=where))) == list(expected)


def test_where_leaves_out_categories_without_such_documents(build) -> None:
    base = build([document("a fruit apple", metadata={"year": 2024}), document("b traffic car", metadata={"year": 2023})])
    found = TwoStageRetriever(base).retrieve("car", where={"year": 2024}, **EVERYTHING)
    assert [category.name for category in found.categories] == ["fruit"]


def test_documents_that_where_leaves_out_are_not_near_misses(build) -> None:
    base = build([document("a fruit apple", metadata={"year": 2024}), document("b fruit pear", metadata={"year": 2023})])
    found = TwoStageRetriever(base).retrieve("plum", where={"year": 2024}, category_threshold=-1, document_threshold=0.9)
    assert [miss.document.id for miss in found.near_misses] == ["a"]


# -- documents of several categories ----------------------------------------------------------------------------------


@pytest.fixture
def shared(build) -> KnowledgeBase:
    """The same five documents, and one that is filed under colours, and under traffic and gifts too."""
    taxi = document("taxi colours red car", also_in=("traffic", "gifts"), metadata={"year": 2024})
    return build([*FRUIT_AND_TRAFFIC, taxi])


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "dense"])
@pytest.mark.parametrize("mode", ["two-stage", "lexical"])
@pytest.mark.parametrize(
    ("categories", "found"),
    [(["colours"], True), (["traffic"], True), (["gifts"], True), (["fruit", "gifts"], True), (["fruit"], False)],
)
def test_a_document_is_found_through_any_of_its_categories(shared, categories, found, mode, hybrid) -> None:
    retriever = TwoStageRetriever(shared, mode=mode, hybrid=hybrid, **EVERYTHING)
    assert ("taxi" in ids(retriever.retrieve("red", 9, categories=categories))) is found


@pytest.mark.parametrize("mode", ["two-stage", "lexical"])
def test_a_document_of_several_categories_is_one_hit(shared, mode) -> None:
    found = TwoStageRetriever(shared, mode=mode, **EVERYTHING).retrieve("red car", 9)
    assert (ids(found).count("taxi"), found.documents_total) == (1, 6)


def test_a_document_of_several_categories_is_scored_once(shared) -> None:
    found = TwoStageRetriever(shared, gate=Gate(mass=1.0), **EVERYTHING).retrieve("red car")
    assert found.documents_scored == found.documents_total == 6


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "dense"])
def test_the_score_of_a_document_does_not_depend_on_the_category_it_is_found_through(shared, hybrid) -> None:
    retriever = TwoStageRetriever(shared, hybrid=hybrid, **EVERYTHING)
    hits = [retriever.retrieve("red", categories=[name]).hits[0] for name in ("colours", "traffic", "gifts")]
    assert [(hit.document.id, hit.passage) for hit in hits] == [("taxi", "red car")] * 3
    assert [hit.score for hit in hits] == pytest.approx([math.sqrt(0.5)] * 3, **ROUGHLY)


@pytest.mark.parametrize("mode", ["two-stage", "lexical"])
def test_a_hit_has_the_score_of_the_best_of_its_categories(shared, mode) -> None:
    found = TwoStageRetriever(shared, mode=mode, **EVERYTHING).retrieve("bus red car", 9)
    [score] = [hit.category_score for hit in found.hits if hit.document.id == "taxi"]
    assert score == max(each.score for each in found.categories if each.name in ("colours", "traffic", "gifts"))


def test_a_guest_counts_for_the_score_of_a_category(shared) -> None:
    # gifts has the taxi alone: with one document 0.8 * 0.707 + 0.2 * 0.01, and colours, too, has no other
    scores = {each.name: each.score for each in TwoStageRetriever(shared, **EVERYTHING).retrieve("red").categories}
    assert (scores["gifts"], scores["colours"]) == pytest.approx((0.5677, 0.5677), **ROUGHLY)


@pytest.mark.parametrize("mode", ["two-stage", "lexical"])
@pytest.mark.parametrize(("where", "expected"), [({"year": 2024}, ["taxi"]), ({"year": 2023}, [])], ids=str)
def test_filters_apply_to_guests_too(shared, where, expected, mode) -> None:
    found = TwoStageRetriever(shared, mode=mode, **EVERYTHING).retrieve("red", categories=["gifts"], where=where)
    assert ids(found) == expected


def test_where_keeps_all_categories_of_the_documents_that_pass(shared) -> None:
    found = TwoStageRetriever(shared, **EVERYTHING).retrieve("red", where={"year": 2024})
    assert sorted(category.name for category in found.categories) == ["colours", "gifts", "traffic"]


def test_a_guest_is_found_in_lexical_mode_with_its_best_chunk(build) -> None:
    text = "\n\n".join(" ".join([word] * 12) for word in ("apple", "pear", "plum"))
    long = Document(id="long", category="fruit", also_in=("gifts",), text=text)
    retriever = TwoStageRetriever(build([long], chunker=Chunker(max_tokens=16)), mode="lexical", **EVERYTHING)
    assert [hit.passage for hit in retriever.retrieve("pear", categories=["gifts"]).hits] == [" ".join(["pear"] * 12)]


def test_a_hit_written_as_json_names_all_of_its_categories(shared) -> None:
    [hit] = TwoStageRetriever(shared, **EVERYTHING).retrieve("red", 1).to_json()["hits"]
    assert (hit["category"], hit["also_in"]) == ("colours", ["traffic", "gifts"])


# -- categories as paths ----------------------------------------------------------------------------------------------

NESTED = ["laptop IT/Devices red", "password IT/Accounts green", "rules IT blue", "hours ITEMS red", "pay HR/IT green"]


@pytest.mark.parametrize("mode", ["two-stage", "flat", "lexical"])
@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (["IT"], ["laptop", "password", "rules"]),
        (["IT/Accounts"], ["password"]),
        (["HR"], ["pay"]),
        (["HR", "IT/Devices"], ["laptop", "pay"]),
        (["ITEMS"], ["hours"]),
    ],
    ids=str,
)
def test_a_category_is_searched_with_those_inside_it(build, categories, expected, mode) -> None:
    retriever = TwoStageRetriever(build(NESTED), mode=mode, **EVERYTHING)
    assert sorted(ids(retriever.retrieve("red green blue", 9, categories=categories))) == expected


@pytest.mark.parametrize("name", ["Accounts", "IT/", "I", "it", "IT/Accounts/Passwords"])
def test_part_of_a_path_that_is_no_category_is_unknown(build, name) -> None:
    with pytest.raises(InputError, match=rf"no category '{name}'\. It has HR/IT, IT, IT/Accounts, IT/Devices, ITEMS"):
        TwoStageRetriever(build(NESTED)).retrieve("red", categories=[name])


def test_the_scores_of_nested_categories_are_those_of_the_categories_that_have_documents(build) -> None:
    found = TwoStageRetriever(build(NESTED), gate=Gate(mass=1.0), **EVERYTHING).retrieve("green")
    assert {category.name for category in found.categories} == {"IT", "IT/Accounts", "IT/Devices", "ITEMS", "HR/IT"}
    assert [category.name for category in found.categories[:2]] == ["HR/IT", "IT/Accounts"]
    assert {category.kept for category in found.categories} == {True}


def test_a_guest_may_lie_in_another_branch(build) -> None:
    base = build([*NESTED, document("badge HR/New apple", also_in=("IT/Accounts",))])
    retriever = TwoStageRetriever(base, **EVERYTHING)
    assert [ids(retriever.retrieve("apple", 1, categories=[name])) for name in ("IT", "HR", "IT/Accounts")] == [["badge"]] * 3


# -- example questions ------------------------------------------------------------------------------------------------


def test_an_example_question_draws_questions_like_it(build) -> None:
    # neither has a document or a name that says anything of trams
    described = [Category(name="traffic", examples=("car", "tram bus")), Category(name="fruit", examples=("plum",))]
    base = build(["pear fruit pear", "blue traffic blue"], categories=described)
    found = TwoStageRetriever(base, **EVERYTHING).retrieve("tram")
    # of the name and the two examples the closest counts: 0.8 * 0 + 0.2 * 0.707
    assert [(category.name, category.score) for category in found.categories] == [
        ("traffic", pytest.approx(0.2 * math.sqrt(0.5), abs=3e-3)),
        ("fruit", pytest.approx(0.0, abs=3e-3)),
    ]
