"""What the retriever warns of and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from uuid import uuid4

import pytest

from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS
from gemma_rag.retriever import TwoStageRetriever


@pytest.fixture
def base(words) -> KnowledgeBase:
    rows = [("apple", "fruit"), ("pear", "fruit"), ("car", "traffic")]
    return KnowledgeBase.from_documents([Document(id=text, category=name, text=text) for text, name in rows], words)


# -- warnings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def renamed(words):
    """The encoder under a name that no other test uses: a warning comes once for each model."""
    words.space = words.space.model_copy(update={"model": uuid4().hex})
    return words


def test_thresholds_that_nobody_measured_are_warned_of_once_for_each_model(renamed, base, caplog) -> None:
    retriever = TwoStageRetriever(base)
    retriever.retrieve("apple")
    retriever.retrieve("apple")
    assert [record.message for record in caplog.records if "nobody has measured" in record.message] == [
        f"nobody has measured thresholds for {renamed.space.model}: without category_threshold and document_threshold "
        "nothing is refused"
    ]


@pytest.mark.parametrize("mode", ["two-stage", "lexical"])
def test_given_thresholds_are_not_warned_of(renamed, base, caplog, mode) -> None:
    TwoStageRetriever(base, mode=mode).retrieve("apple", category_threshold=0.2, document_threshold=0.2)
    assert caplog.records == []


def test_flat_mode_with_a_document_threshold_is_not_warned_of(renamed, base, caplog) -> None:
    TwoStageRetriever(base, mode="flat").retrieve("apple", document_threshold=0.2)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("languages", "question", "mode", "warned"),
    [
        (("en",), "如何重置密码", "two-stage", True),
        (("en",), "如何重置密码", "flat", True),
        (("en",), "如何重置密码", "lexical", False),
        (("en",), "How do I reset it?", "two-stage", False),
        (("en", "zh"), "如何重置密码", "two-stage", False),
        ((), "如何重置密码", "two-stage", False),  # multilingual
    ],
)
def test_a_chinese_question_to_a_model_that_does_not_read_chinese_is_warned_of(
    words, base, caplog, languages, question, mode, warned
) -> None:
    words.profile = dataclasses.replace(NO_PROMPTS, languages=languages)
    TwoStageRetriever(base, mode=mode, category_threshold=-1, document_threshold=-1).retrieve(question)
    assert any("does not read Chinese" in record.message for record in caplog.records) is warned


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", " \n", "\u3000", None, 7])
def test_an_empty_question_is_refused(base, question) -> None:
    with pytest.raises(InputError, match="empty"):
        TwoStageRetriever(base).retrieve(question)


def test_an_empty_question_among_many_is_named_by_its_index(base) -> None:
    with pytest.raises(InputError, match="index 1"):
        TwoStageRetriever(base).retrieve_many(["apple", " "])


def test_one_string_for_many_questions_is_refused(base) -> None:
    with pytest.raises(InputError, match="call retrieve for one question"):
        TwoStageRetriever(base).retrieve_many("apple")


def test_an_unknown_category_is_refused_with_those_there_are(base) -> None:
    with pytest.raises(InputError, match=r"no category 'animals'\. It has fruit, traffic"):
        TwoStageRetriever(base).retrieve("apple", categories=["fruit", "animals"])


def test_one_string_for_categories_is_refused(base) -> None:
    with pytest.raises(InputError, match="put it in a list"):
        TwoStageRetriever(base).retrieve("apple", categories="fruit")


BAD_OPTIONS = [
    ({"k": 0}, "k is"),
    ({"k": -1}, "k is"),
    ({"k": 1.5}, "k is"),
    ({"k": True}, "k is"),
    ({"mode": "naive"}, "two-stage, flat, lexical"),
    ({"max_categories": 0}, "max_categories"),
    ({"category_threshold": 1.1}, "cosine"),
    ({"document_threshold": math.nan}, "cosine"),
    ({"document_threshold": "stricter"}, "strict, balanced, loose"),
    ({"document_threshold": True}, "a threshold is"),
    ({"lexical_weight": -0.1}, r"lexical_weight is from 0 to 1, and is -0\.1"),
    ({"lexical_weight": 1.1}, "lexical_weight"),
    ({"lexical_weight": math.nan}, "lexical_weight"),
    ({"lexical_weight": "half"}, "lexical_weight"),
    ({"diversity": 2}, "diversity is from 0 to 1, and is 2"),
    ({"diversity": math.nan}, "diversity"),
    ({"rerank_top": 0}, "rerank_top is the number of hits that the reranker sees, at least 1, and is 0"),
    ({"rerank_top": 2.5}, "rerank_top"),
    ({"gate": 0.5}, r"gate is a gemma_rag\.routing\.Gate, and is 0\.5"),
    ({"hybrid": "yes"}, "hybrid is True or False, and is 'yes'"),
    ({"reranker": 7}, "a reranker is a function"),
    ({"reranker": " "}, "a reranker is a function"),
    ({"reranker": dict}, "a reranker is a function"),
    ({"max_categories": 1.5}, "max_categories"),
    ({"max_categories": True}, "max_categories"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_a_bad_option_of_a_call_is_refused(base, options, message) -> None:
    with pytest.raises(InputError, match=message):
        TwoStageRetriever(base).retrieve("apple", **options)


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_a_bad_option_of_the_retriever_is_refused_at_once(base, options, message) -> None:
    with pytest.raises(InputError, match=message):
        TwoStageRetriever(base, **options)


@pytest.mark.parametrize("call", ["retrieve", "retrieve_many", "plan"])
def test_an_unknown_setting_is_refused_with_those_there_are(base, call) -> None:
    retriever = TwoStageRetriever(base)
    question = "apple" if call == "retrieve" else ["apple"]
    with pytest.raises(
        InputError, match=r"no setting treshold, hybird: there are k, category_threshold, .*reranker, .*diversity"
    ):
        getattr(retriever, call)(question, treshold=0.4, hybird=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gave 1 scores for 2 passages"),
        ([1.0, 2.0, 3.0], "gave 3 scores for 2 passages"),
        ([[1.0], [2.0]], r"gave \[\[1\.0\], \[2\.0\]\], of shape \(2, 1\), for 2 passages"),
        (["high", "low"], r"gave \['high', 'low'\], and a list of 2 numbers was expected"),
        (None, "gave None"),
        ([1.0, math.nan], "gave nan for the passage at index 1"),
        ([math.inf, 0.0], "gave inf for the passage at index 0"),
    ],
    ids=str,
)
def test_what_is_no_list_of_scores_is_refused_with_the_rerankers_name(base, given, message) -> None:
    def scorer(question, passages):
        return given

    retriever = TwoStageRetriever(base, hybrid=False, reranker=scorer, category_threshold=-1, document_threshold=-1)
    with pytest.raises(InputError, match=f"the reranker .*scorer {message}"):
        retriever.retrieve("apple", categories=["fruit"])


def test_an_error_in_a_reranker_is_not_hidden(base) -> None:
    def scorer(question, passages):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        TwoStageRetriever(base, reranker=scorer, category_threshold=-1, document_threshold=-1).retrieve("apple")
