"""The retriever's modes, its calls of the encoder, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_rag.chunking import Chunker
from gemma_rag.documents import Document
from gemma_rag.errors import InputError
from gemma_rag.knowledge_base import KnowledgeBase
from gemma_rag.prompts import NO_PROMPTS, Task
from gemma_rag.results import Outcome
from gemma_rag.retriever import TwoStageRetriever
from gemma_rag.routing import Gate
from gemma_rag.thresholds import DynamicThreshold

EVERYTHING = {"category_threshold": -1, "document_threshold": -1}
ROUGHLY = {"abs": 1e-3}  # the WordEncoder's small last component moves a cosine by up to 2e-4
MODES = ["two-stage", "flat", "lexical"]


def document(line: str) -> Document:
    """A document written as one line: id, category, text."""
    name, category, text = line.split(" ", 2)
    return Document(id=name, category=category, text=text)


def ids(retrieval) -> list[str]:
    return [hit.document.id for hit in retrieval.hits]


@pytest.fixture
def build(words):
    """Builds a knowledge base from lines; the encoder forgets what it was asked for that."""

    def build(*lines: str, **options) -> KnowledgeBase:
        base = KnowledgeBase.from_documents([document(line) for line in lines], words, **options)
        words.calls.clear()
        return base

    return build


@pytest.fixture
def base(build) -> KnowledgeBase:
    return build("apple fruit apple", "mixed fruit apple pear", "plum fruit plum", "car traffic car", "bus traffic bus tram")


@pytest.fixture
def without_encoder(base, tmp_path) -> KnowledgeBase:
    """A stored knowledge base whose encoder nobody can load."""
    base.save(tmp_path / "kb")
    return KnowledgeBase.open(tmp_path / "kb")


# -- flat -------------------------------------------------------------------------------------------------------------


def test_flat_mode_scores_every_document(base) -> None:
    found = TwoStageRetriever(base, mode="flat", **EVERYTHING).retrieve("apple")
    assert (found.documents_scored, found.documents_total) == (5, 5)


def test_flat_mode_has_no_category_scores(base) -> None:
    found = TwoStageRetriever(base, mode="flat", document_threshold=0.5).retrieve("apple")
    assert all(math.isnan(each.category_score) for each in (*found.hits, *found.near_misses))


def test_flat_mode_has_no_categories(base) -> None:
    assert TwoStageRetriever(base, mode="flat", **EVERYTHING).retrieve("apple").categories == ()


def test_flat_mode_has_no_category_threshold(base) -> None:
    found = TwoStageRetriever(base, mode="flat", category_threshold=1, document_threshold=0.5).retrieve("apple")
    assert (found.outcome, found.thresholds) == (Outcome.ANSWERED, {"category": None, "document": 0.5})


def test_flat_mode_writes_null_for_the_category_score(base) -> None:
    written = TwoStageRetriever(base, mode="flat", **EVERYTHING).retrieve("apple").to_json()
    assert [hit["category_score"] for hit in written["hits"]] == [None] * 4


KNOWN_WORDS = ["red", "green", "apple", "pear", "car", "zebra"]
TEXTS = st.lists(st.sampled_from(KNOWN_WORDS), min_size=1, max_size=5).map(" ".join)


@given(st.lists(st.tuples(st.sampled_from(["red", "car", "misc"]), TEXTS), min_size=1, max_size=8), TEXTS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_stages_with_every_category_open_find_what_flat_search_finds(build, rows, question) -> None:
    base = build(*(f"{i} {category} {text}" for i, (category, text) in enumerate(rows)))
    retriever = TwoStageRetriever(base, k=20, gate=Gate(mass=1.0), **EVERYTHING)
    both = [retriever.retrieve(question, mode=mode) for mode in ("two-stage", "flat")]
    two_stage, flat = ([(hit.document.id, hit.score, hit.passage) for hit in found.hits] for found in both)
    assert two_stage == flat


# -- the published naive form -----------------------------------------------------------------------------------------

MISLEADING = ["apple apple apple", "plum apple plum", "misfiled car apple pear"]  # an apple filed under "car"


def test_by_names_alone_a_document_in_a_misleading_category_is_lost(build) -> None:
    # "apple pear" against the names: "apple" 0.707, "car" 0
    retriever = TwoStageRetriever(build(*MISLEADING), gate=Gate(name_weight=1), max_categories=1, **EVERYTHING)
    assert ids(retriever.retrieve("apple pear")) == ["apple", "plum"]


def test_the_default_gate_finds_the_document_in_a_misleading_category(build) -> None:
    # "apple pear": "car" has the centroid (0.707, 0.707), so 0.8 * 1 + 0.2 * 0; "apple" 0.8 * 0.5 + 0.2 * 0.707 = 0.54
    assert ids(TwoStageRetriever(build(*MISLEADING), **EVERYTHING).retrieve("apple pear"))[0] == "misfiled"


def test_by_names_alone_a_category_scores_as_its_name(build) -> None:
    retriever = TwoStageRetriever(build(*MISLEADING), gate=Gate(name_weight=1), max_categories=1, **EVERYTHING)
    assert [(category.name, category.score) for category in retriever.retrieve("apple pear").categories] == [
        ("apple", pytest.approx(math.sqrt(0.5), **ROUGHLY)),
        ("car", pytest.approx(0, **ROUGHLY)),
    ]


# -- hybrid -----------------------------------------------------------------------------------------------------------

# the encoder does not know "zebra"; for it "apple" is nearer to "apple zebra" than "apple pear zebra" is
ZEBRAS = ["near fruit apple", "worded fruit apple pear zebra", "far fruit plum"]


def test_hybrid_search_orders_by_cosine_and_words_together(build) -> None:
    # near: 0.7 * 1 + 0.3 * 0; worded: 0.7 * 0.707 + 0.3 * 1 = 0.795; far: 0
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=True, **EVERYTHING).retrieve("apple zebra")
    assert [(hit.document.id, hit.fused_score) for hit in found.hits] == [
        ("worded", pytest.approx(0.795, **ROUGHLY)),
        ("near", pytest.approx(0.7, **ROUGHLY)),
        ("far", pytest.approx(0.0, **ROUGHLY)),
    ]


def test_hits_of_hybrid_search_keep_their_cosine(build) -> None:
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=True, **EVERYTHING).retrieve("apple zebra")
    assert [hit.score for hit in found.hits] == pytest.approx([math.sqrt(0.5), 1, 0], **ROUGHLY)


def test_hits_of_hybrid_search_have_their_lexical_score(build) -> None:
    base = build(*ZEBRAS)
    found = TwoStageRetriever(base, hybrid=True, **EVERYTHING).retrieve("apple zebra")
    expected = base.view().lexical.scores("apple zebra").tolist()
    assert [hit.lexical_score for hit in found.hits] == [expected[1], expected[0], 0.0]


def test_thresholds_act_on_the_cosine_in_hybrid_search(build) -> None:
    # worded is first by the fused score, and its cosine is 0.707
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=True, category_threshold=-1, document_threshold=0.8)
    assert ids(found.retrieve("apple zebra")) == ["near"]


def test_without_hybrid_hits_are_ordered_by_cosine(build) -> None:
    assert ids(TwoStageRetriever(build(*ZEBRAS), **EVERYTHING).retrieve("apple zebra")) == ["near", "worded", "far"]


def test_without_hybrid_hits_have_no_scores_of_words(build) -> None:
    [hit, *_] = TwoStageRetriever(build(*ZEBRAS), **EVERYTHING).retrieve("apple zebra").hits
    assert (hit.lexical_score, hit.fused_score) == (None, None)


def test_hybrid_works_in_flat_mode(build) -> None:
    found = TwoStageRetriever(build(*ZEBRAS), mode="flat", hybrid=True, **EVERYTHING).retrieve("apple zebra")
    assert ids(found) == ["worded", "near", "far"]


# -- lexical ----------------------------------------------------------------------------------------------------------


def test_lexical_mode_needs_no_encoder(without_encoder) -> None:
    assert ids(TwoStageRetriever(without_encoder, mode="lexical").retrieve("apple")) == ["apple", "mixed"]


def test_the_other_modes_do_need_the_encoder(without_encoder) -> None:
    with pytest.raises(InputError, match="encoder of your own"):
        TwoStageRetriever(without_encoder).retrieve("apple")


def test_lexical_mode_scores_the_shared_words(base) -> None:
    expected = base.view().lexical.scores("apple").tolist()
    found = TwoStageRetriever(base, mode="lexical", **EVERYTHING).retrieve("apple")
    assert [hit.score for hit in found.hits] == expected[:2]


def test_in_lexical_mode_a_category_scores_as_its_best_document(base) -> None:
    found = TwoStageRetriever(base, mode="lexical", **EVERYTHING).retrieve("apple")
    assert [(category.name, category.score) for category in found.categories] == [
        ("fruit", found.hits[0].score),
        ("traffic", 0.0),
    ]


def test_lexical_mode_scores_only_documents_that_share_a_word(base) -> None:
    assert TwoStageRetriever(base, mode="lexical", **EVERYTHING).retrieve("apple").documents_scored == 2


def test_in_lexical_mode_a_question_without_a_known_word_fits_no_category(base) -> None:
    found = TwoStageRetriever(base, mode="lexical").retrieve("zebra")
    assert (found.outcome, found.documents_scored) == (Outcome.CATEGORY_BELOW_THRESHOLD, 0)


def test_lexical_mode_opens_no_more_than_max_categories(build) -> None:
    base = build("a fruit apple", "b traffic apple car bus tram", "c colour red")
    found = TwoStageRetriever(base, mode="lexical", max_categories=1, **EVERYTHING).retrieve("apple")
    assert ids(found) == ["a"]


def test_the_passage_of_lexical_mode_is_the_best_chunk(words) -> None:
    text = "\n\n".join(" ".join([word] * 12) for word in ("apple", "pear", "plum"))
    long = Document(id="long", category="fruit", text=text)
    base = KnowledgeBase.from_documents([long], words, chunker=Chunker(max_tokens=16))
    [hit] = TwoStageRetriever(base, mode="lexical", **EVERYTHING).retrieve("pear").hits
    assert hit.passage == " ".join(["pear"] * 12)


# -- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "tasks"), [("two-stage", {Task.QUERY, Task.CLASSIFICATION}), ("flat", {Task.QUERY}), ("lexical", set())]
)
def test_a_question_is_encoded_under_the_prompts_of_its_mode(base, words, mode, tasks) -> None:
    TwoStageRetriever(base, mode=mode, **EVERYTHING).retrieve("apple")
    assert {item.task for call in words.calls for item in call} == tasks


def test_both_prompts_of_a_question_go_to_the_encoder_in_one_call(base, words) -> None:
    TwoStageRetriever(base).retrieve("apple")
    assert [len(call) for call in words.calls] == [2]


def test_many_questions_go_to_the_encoder_in_one_call(base, words) -> None:
    TwoStageRetriever(base).retrieve_many(["apple", "car", "plum"])
    assert [len(call) for call in words.calls] == [6]


def test_nothing_but_the_question_is_encoded_when_it_is_asked(base, words) -> None:
    TwoStageRetriever(base, hybrid=True).retrieve("apple")
    assert {(item.text, item.title) for call in words.calls for item in call} == {("apple", None)}


# -- many questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_many_questions_get_what_each_gets_alone(base, mode) -> None:
    retriever = TwoStageRetriever(base, mode=mode, category_threshold=0.1, document_threshold=0.1)
    questions = ["apple", "bus car", "zebra", "pear plum"]
    together, alone = retriever.retrieve_many(questions), [retriever.retrieve(question) for question in questions]
    seen = [
        [(found.question, found.outcome, ids(found), found.documents_scored) for found in each] for each in (together, alone)
    ]
    assert seen[0] == seen[1]


def test_no_questions_get_no_results(base) -> None:
    assert TwoStageRetriever(base).retrieve_many([]) == []


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.9, "dynamic", DynamicThreshold(floor=0.2)], ids=repr)
def test_a_retrieval_is_plain_json(base, mode, threshold) -> None:
    found = TwoStageRetriever(base, mode=mode, category_threshold=0, document_threshold=threshold).retrieve("apple")
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


@pytest.mark.parametrize("key", ["question", "outcome", "categories", "hits", "near_misses", "thresholds", "timings_ms"])
def test_a_retrieval_as_json_has_the_key(base, key) -> None:
    assert key in TwoStageRetriever(base).retrieve("apple", **EVERYTHING).to_json()


def test_the_time_of_every_retrieval_is_measured(base) -> None:
    assert TwoStageRetriever(base).retrieve("apple", **EVERYTHING).timings_ms["total"] > 0


# -- auto: the mode that a question needs -----------------------------------------------------------------------------


@pytest.fixture
def bilingual(words) -> TwoStageRetriever:
    """A knowledge base in two languages, of a model that reads English only."""
    documents = [
        Document(id="apple", category="fruit", text="apple apple"),
        Document(id="usb", category="安全", text="来历不明的 U 盘不得插入公司电脑。"),
    ]
    words.profile = dataclasses.replace(NO_PROMPTS, languages=("en",))
    base = KnowledgeBase.from_documents(documents, words)
    return TwoStageRetriever(base, category_threshold=0.5, document_threshold=0.5)


def test_auto_is_two_stage_for_a_question_that_the_model_reads(bilingual) -> None:
    assert bilingual.retrieve("apple").mode == "two-stage"


def test_auto_matches_words_for_a_question_that_the_model_does_not_read(bilingual) -> None:
    found = bilingual.retrieve("U 盘可以插入公司电脑吗？")
    assert (found.mode, [hit.document.id for hit in found.hits]) == ("lexical", ["usb"])


def test_auto_does_not_put_thresholds_for_cosines_on_matching_words(bilingual) -> None:
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？").thresholds == {"category": 0.1, "document": 0.15}


def test_auto_says_that_it_matches_words(bilingual, caplog) -> None:
    bilingual.retrieve("U 盘可以插入公司电脑吗？")
    assert "1 questions are searched by matching words instead" in caplog.text


def test_auto_keeps_the_order_of_questions_in_two_languages(bilingual) -> None:
    found = bilingual.retrieve_many(["U 盘", "apple", "电脑"])
    assert [(each.question, each.mode) for each in found] == [("U 盘", "lexical"), ("apple", "two-stage"), ("电脑", "lexical")]


def test_auto_is_two_stage_for_chinese_where_the_model_reads_chinese(bilingual, words) -> None:
    words.profile = NO_PROMPTS
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？").mode == "two-stage"


def test_a_mode_that_was_asked_for_is_kept(bilingual) -> None:
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？", mode="two-stage").mode == "two-stage"
