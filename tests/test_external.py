"""The two stages over a store of somebody else's: here a list of vectors that can be checked by hand."""

from __future__ import annotations

import asyncio
import datetime
import logging
import math

import numpy as np
import pytest

from gemma_rag.answer import GroundedAnswerer
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.external import Candidate, ExternalRetriever
from gemma_rag.prompts import EMBEDDINGGEMMA
from gemma_rag.results import Outcome
from gemma_rag.routing import Gate


class Circle:
    """Entries on the unit circle, so that the cosine of two is the cosine of the angle between them (in degrees)."""

    name = "Circle"

    def __init__(self, *entries: tuple[str, str, float]) -> None:
        self.entries = entries
        self.searches: list[tuple[int, dict]] = []

    def search(self, vector, k, within):
        self.searches.append((k, dict(within)))
        found = [
            Candidate(
                Document(id=key, text=f"Entry {key}.", category=category, metadata={"angle": angle}),
                float(vector @ [math.cos(math.radians(angle)), math.sin(math.radians(angle))]),
            )
            for key, category, angle in self.entries
            if all({"category": category, "angle": angle}[name] in values for name, values in within.items())
        ]
        return sorted(found, key=lambda candidate: -candidate.score)[:k]


def at_zero(question: str) -> list[float]:
    return [1.0, 0.0]


def cosine(angle: float) -> float:
    return math.cos(math.radians(angle))


NEAR = [("a1", "a", 10), ("a2", "a", 20), ("b1", "b", 40), ("c1", "c", 90)]


OFF = {"category_threshold": -1.0, "document_threshold": -1.0}


def asked(*entries, **settings):
    source = Circle(*(entries or NEAR))
    return ExternalRetriever(source, at_zero, **{"category_threshold": 0.0, "document_threshold": 0.0, **settings}), source


def ids(retrieval):
    return [hit.document.id for hit in retrieval.hits]


# -- stage one ----------------------------------------------------------------------------------------------------------


def test_a_category_scores_as_its_best_entry_does():
    found = asked()[0].retrieve("?")
    assert [(c.name, round(c.score, 4)) for c in found.categories] == [
        ("a", round(cosine(10), 4)),
        ("b", round(cosine(40), 4)),
        ("c", round(cosine(90), 4)),
    ]


def test_the_gate_opens_up_to_its_mass_and_rescues_what_promises_more_than_the_last_hit():
    retriever, _ = asked(k=2)
    found = retriever.retrieve("?")  # softmax of 0.985, 0.766, 0.0 at 0.05: the first has 0.987 of the mass
    assert [(c.name, c.kept, c.why) for c in found.categories] == [("a", True, "mass"), ("b", False, ""), ("c", False, "")]
    found = retriever.retrieve("?", k=3)  # a has no third entry, so the others may hold it
    assert [(c.name, c.kept, c.why) for c in found.categories] == [
        ("a", True, "mass"),
        ("b", True, "rescue"),
        ("c", True, "rescue"),
    ]
    assert ids(found) == ["a1", "a2", "b1"]


def test_no_more_categories_than_allowed_are_opened():
    found = asked(max_categories=1)[0].retrieve("?", k=3)
    assert ids(found) == ["a1", "a2"]


def test_a_question_that_fits_no_category_is_refused_at_stage_one():
    found = asked(category_threshold=0.99)[0].retrieve("?")
    assert (found.outcome, found.hits) == (Outcome.CATEGORY_BELOW_THRESHOLD, ())
    assert [c.kept for c in found.categories] == [False, False, False]


def test_a_first_search_that_found_enough_is_the_only_one():
    retriever, source = asked(k=1)
    retriever.retrieve("?")
    assert source.searches == [(64, {})]


def test_the_opened_categories_are_searched_where_the_first_search_was_cut_short():
    entries = [("b1", "b", 1), ("b2", "b", 2), *((f"a{i}", "a", 3 + i) for i in range(6))]
    retriever, source = asked(*entries, k=2, probe=4, gate=Gate(mass=0.1))
    found = retriever.retrieve("?", max_categories=1)
    assert source.searches == [(4, {}), (4, {"category": ["b"]})]
    assert ids(found) == ["b1", "b2"]


class Spaced(Circle):
    """A store that knows each category with white space around it, as files of others do."""

    def search(self, vector, k, within):
        names = [name for name in within.get("category", ["a ", "b "]) if name.endswith(" ")]
        found = super().search(vector, k, {"category": [name.strip() for name in names]})
        return [
            Candidate(each.document.model_copy(update={"metadata": {"category": f"{each.document.category} "}}), each.score)
            for each in found
        ]


def test_a_category_with_white_space_around_it_is_searched_as_the_store_knows_it():
    source = Spaced(("b1", "b", 1), ("b2", "b", 2), *((f"a{i}", "a", 3 + i) for i in range(6)))
    retriever = ExternalRetriever(source, at_zero, k=2, probe=4, gate=Gate(mass=0.1), **OFF)
    assert ids(retriever.retrieve("?", max_categories=1)) == ["b1", "b2"]


def test_a_source_that_drops_entries_is_still_searched_twice():
    class WithBlanks(Circle):
        def search(self, vector, k, within):
            return [each for each in super().search(vector, k, within) if each.document.id != "blank"]

    source = WithBlanks(("blank", "a", 0), ("b1", "b", 1), *((f"a{i}", "a", 3 + i) for i in range(6)), ("b2", "b", 40))
    retriever = ExternalRetriever(source, at_zero, k=2, probe=4, gate=Gate(mass=0.1), **OFF)
    assert ids(retriever.retrieve("?", max_categories=1)) == ["b1", "b2"]


def test_a_second_search_loses_nothing_of_the_first():
    class Forgetful(Circle):
        def search(self, vector, k, within):
            return [] if within else super().search(vector, k, within)

    source = Forgetful(("b1", "b", 1), *((f"a{i}", "a", 3 + i) for i in range(6)))
    retriever = ExternalRetriever(source, at_zero, k=2, probe=4, gate=Gate(mass=0.1), **OFF)
    assert ids(retriever.retrieve("?", max_categories=1)) == ["b1"]


def test_flat_mode_has_no_stage_one():
    retriever, source = asked(mode="flat", k=3)
    found = retriever.retrieve("?")
    assert (ids(found), found.categories, found.thresholds["category"]) == (["a1", "a2", "b1"], (), None)
    assert math.isnan(found.hits[0].category_score)
    assert source.searches == [(6, {})]


def test_every_hit_that_searching_everything_gives_is_found(words):
    rng = np.random.default_rng(0)
    entries = [(f"d{i}", f"c{i % 17}", float(angle)) for i, angle in enumerate(rng.uniform(0, 360, 300))]
    retriever, _ = asked(*entries, k=5, category_threshold=-1, document_threshold=-1)
    assert ids(retriever.retrieve("?")) == ids(retriever.retrieve("?", mode="flat"))


# -- stage two ----------------------------------------------------------------------------------------------------------


def test_what_falls_short_of_the_document_threshold_is_a_near_miss_with_its_margin():
    found = asked(document_threshold=0.95)[0].retrieve("?")
    assert ids(found) == ["a1"]
    (miss,) = [miss for miss in found.near_misses if miss.document.id == "a2"]
    assert miss.margin == pytest.approx(0.95 - cosine(20))


def test_nothing_above_the_document_threshold_is_a_refusal_of_stage_two():
    found = asked(document_threshold=0.999)[0].retrieve("?")
    assert (found.outcome, found.hits) == (Outcome.DOCUMENT_BELOW_THRESHOLD, ())


def test_hits_carry_the_score_of_their_category():
    hit = asked()[0].retrieve("?").hits[0]
    assert (hit.score, hit.category_score) == (pytest.approx(cosine(10)), pytest.approx(cosine(10)))


def test_the_default_thresholds_are_those_of_the_profile():
    found = asked(category_threshold=None, document_threshold=None, profile=EMBEDDINGGEMMA)[0].retrieve("?")
    assert (found.thresholds["category"], found.thresholds["document"]) == (0.4, 0.4)


def test_without_a_profile_a_warning_says_that_nothing_is_refused(caplog):
    retriever, source = asked(category_threshold=None, document_threshold=None)
    source.name = "Circle of this test"
    with caplog.at_level(logging.WARNING):
        found = retriever.retrieve("?")
    assert "nobody has measured thresholds for Circle of this test" in caplog.text
    assert found.thresholds["document"] == -1.0


# -- filters ------------------------------------------------------------------------------------------------------------


def test_categories_and_where_go_to_the_store():
    retriever, source = asked()
    found = retriever.retrieve("?", categories=["a", "b"], where={"angle": [20, 40]})
    assert ids(found) == ["a2", "b1"]
    assert source.searches[0] == (64, {"angle": [20, 40], "category": ["a", "b"]})


def test_filters_that_nothing_passes_are_their_own_outcome():
    assert asked()[0].retrieve("?", where={"angle": 1}).outcome is Outcome.FILTERED_OUT


@pytest.mark.parametrize("value", [{"$gte": 20}, b"ab", [[20]], datetime.date(2026, 1, 1)])
def test_a_filter_with_what_is_no_value_is_refused(value):
    with pytest.raises(InputError, match=r"where has .* for 'angle', .* there are no operators such as \$gte"):
        asked()[0].retrieve("?", where={"angle": value})


def test_numbers_of_numpy_are_values():
    assert ids(asked()[0].retrieve("?", where={"angle": np.int64(20)})) == ["a2"]


def test_categories_that_contradict_the_filter_ask_no_store():
    retriever, source = asked()
    assert retriever.retrieve("?", categories=["a"], where={"category": "b"}).outcome is Outcome.FILTERED_OUT
    assert source.searches == []


def test_an_empty_store_is_its_own_outcome():
    retriever = ExternalRetriever(Circle(), at_zero, category_threshold=0.0, document_threshold=0.0)
    assert retriever.retrieve("?").outcome is Outcome.EMPTY_KNOWLEDGE_BASE


# -- wrong input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is a number, at least 1, and is 0"),
        ({"probe": True}, "probe is a number"),
        ({"max_categories": 0}, "max_categories is a number"),
        ({"mode": "lexical"}, "the mode is 'two-stage' or 'flat', and is 'lexical'"),
        ({"document_threshold": "strictest"}, "no threshold preset is named 'strictest'"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_at_once(settings, message):
    with pytest.raises(InputError, match=message):
        asked(**settings)


def test_an_unknown_setting_of_a_call_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no setting 'hybrid': there are k, category_threshold, document_threshold, mode"):
        asked()[0].retrieve("?", hybrid=True)


@pytest.mark.parametrize("question", ["", " \n", None, 3])
def test_an_empty_question_is_refused(question):
    with pytest.raises(InputError, match="ask something"):
        asked()[0].retrieve(question)


def test_one_category_as_a_string_is_refused():
    with pytest.raises(InputError, match="put it in a list"):
        asked()[0].retrieve("?", categories="a")


def test_a_filter_that_is_no_mapping_is_refused():
    with pytest.raises(InputError, match="where is a mapping"):
        asked()[0].retrieve("?", where=["a"])


# -- as others use it ---------------------------------------------------------------------------------------------------


def test_the_async_form_gives_the_same():
    retriever, _ = asked()
    assert ids(asyncio.run(retriever.aretrieve("?", k=2))) == ids(retriever.retrieve("?", k=2))


def test_answers_are_quoted_from_it_by_words_where_the_encoder_is_not_known():
    answer = GroundedAnswerer(asked()[0]).answer("Which entry is a2?")
    assert (answer.text, answer.citations[0].id) == ("“Entry a2.” [2]", "a2")


def test_its_result_is_plain_json():
    found = asked()[0].retrieve("?").to_json()
    assert (found["mode"], found["documents_total"], found["documents_scored"]) == ("two-stage", None, 4)
