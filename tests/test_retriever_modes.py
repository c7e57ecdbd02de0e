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
from gemma_rag.prompts import EMBEDDINGGEMMA, NO_PROMPTS, Task
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
    assert (found.outcome, found.thresholds) == (
        Outcome.ANSWERED,
        {"category": None, "document": 0.5, "acts_on": "cosine"},
    )


def test_flat_mode_writes_null_for_the_category_score(base) -> None:
    written = TwoStageRetriever(base, mode="flat", **EVERYTHING).retrieve("apple").to_json()
    assert [hit["category_score"] for hit in written["hits"]] == [None] * 4


KNOWN_WORDS = ["red", "green", "apple", "pear", "car", "zebra"]
TEXTS = st.lists(st.sampled_from(KNOWN_WORDS), min_size=1, max_size=5).map(" ".join)


@given(st.lists(st.tuples(st.sampled_from(["red", "car", "misc"]), TEXTS), min_size=1, max_size=8), TEXTS, st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_stages_with_every_category_open_find_what_flat_search_finds(build, rows, question, hybrid) -> None:
    base = build(*(f"{i} {category} {text}" for i, (category, text) in enumerate(rows)))
    retriever = TwoStageRetriever(base, k=20, gate=Gate(mass=1.0), hybrid=hybrid, **EVERYTHING)
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
    # "apple pear": "car" has one document with a cosine of 1, so 0.8 * 1 + 0.2 * 0; "apple" has 0.707 by any of its parts
    assert ids(TwoStageRetriever(build(*MISLEADING), **EVERYTHING).retrieve("apple pear"))[0] == "misfiled"


def test_by_names_alone_a_category_scores_as_its_name(build) -> None:
    retriever = TwoStageRetriever(build(*MISLEADING), gate=Gate(name_weight=1), max_categories=1, **EVERYTHING)
    assert [(category.name, category.score) for category in retriever.retrieve("apple pear").categories] == [
        ("apple", pytest.approx(math.sqrt(0.5), **ROUGHLY)),
        ("car", pytest.approx(0, **ROUGHLY)),
    ]


# -- hybrid -----------------------------------------------------------------------------------------------------------

# the encoder does not know "zebra"; for it "apple" is nearer to "apple zebra" than the second text, with 2 / sqrt(5) = 0.894
ZEBRAS = ["near fruit apple", "worded fruit apple apple pear zebra zebra", "far fruit plum"]


def test_hybrid_search_orders_by_cosine_and_words_together(build) -> None:
    base = build(*ZEBRAS)
    near, worded, _ = base.view().lexical.scores("apple zebra").tolist()
    found = TwoStageRetriever(base, **EVERYTHING).retrieve("apple zebra")
    assert [(hit.document.id, hit.fused_score) for hit in found.hits] == [
        ("worded", pytest.approx(0.5 * 2 / math.sqrt(5) + 0.5 * worded, **ROUGHLY)),
        ("near", pytest.approx(0.5 * 1 + 0.5 * near, **ROUGHLY)),
        ("far", pytest.approx(0.0, **ROUGHLY)),
    ]


def test_the_share_of_words_can_be_chosen(build) -> None:
    base = build(*ZEBRAS)
    _, worded, _ = base.view().lexical.scores("apple zebra").tolist()
    [hit, *_] = TwoStageRetriever(base, lexical_weight=0.8, **EVERYTHING).retrieve("apple zebra").hits
    assert (hit.document.id, hit.fused_score) == ("worded", pytest.approx(0.2 * 2 / math.sqrt(5) + 0.8 * worded, **ROUGHLY))


def test_a_share_of_0_is_the_dense_order(build, words) -> None:
    retriever = TwoStageRetriever(build(*ZEBRAS, "car traffic zebra"), **EVERYTHING)
    weightless, dense = retriever.retrieve("apple zebra", lexical_weight=0), retriever.retrieve("apple zebra", hybrid=False)
    assert (weightless.hits, weightless.documents_scored) == (dense.hits, dense.documents_scored)


def test_a_share_of_1_orders_by_words_alone_and_equal_ones_by_cosine(build) -> None:
    base = build("plain fruit plum", "apple fruit apple", "worded fruit pear zebra", "near fruit apple plum")
    found = TwoStageRetriever(base, lexical_weight=1, **EVERYTHING).retrieve("plum zebra")
    # worded and plain have a word each, zebra the rarer one; near has a longer text; apple has none
    assert ids(found) == ["worded", "plain", "near", "apple"]
    assert [hit.fused_score for hit in found.hits] == [hit.lexical_score for hit in found.hits]


def test_hits_of_hybrid_search_keep_their_cosine(build) -> None:
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=True, **EVERYTHING).retrieve("apple zebra")
    assert [hit.score for hit in found.hits] == pytest.approx([2 / math.sqrt(5), 1, 0], **ROUGHLY)


def test_hits_of_hybrid_search_have_their_lexical_score(build) -> None:
    base = build(*ZEBRAS)
    found = TwoStageRetriever(base, hybrid=True, **EVERYTHING).retrieve("apple zebra")
    expected = base.view().lexical.scores("apple zebra").tolist()
    assert [hit.lexical_score for hit in found.hits] == [expected[1], expected[0], 0.0]


def test_thresholds_act_on_the_cosine_in_hybrid_search(build) -> None:
    # worded is first by the fused score, and its cosine is 0.894
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=True, category_threshold=-1, document_threshold=0.95)
    assert ids(found.retrieve("apple zebra")) == ["near"]


def test_without_hybrid_hits_are_ordered_by_cosine(build) -> None:
    found = TwoStageRetriever(build(*ZEBRAS), hybrid=False, **EVERYTHING).retrieve("apple zebra")
    assert ids(found) == ["near", "worded", "far"]


def test_without_hybrid_hits_have_no_scores_of_words(build) -> None:
    [hit, *_] = TwoStageRetriever(build(*ZEBRAS), hybrid=False, **EVERYTHING).retrieve("apple zebra").hits
    assert (hit.lexical_score, hit.fused_score) == (None, None)


def test_hybrid_works_in_flat_mode(build) -> None:
    found = TwoStageRetriever(build(*ZEBRAS), mode="flat", hybrid=True, **EVERYTHING).retrieve("apple zebra")
    assert ids(found) == ["worded", "near", "far"]


# stage one opens fruit alone for "apple zebra", and two hits are found there; the zebra is somewhere else
OUTSIDE = ["a fruit apple", "b fruit apple red", "c fruit apple pear", "zebra animals zebra", "bus animals bus"]


def test_a_document_outside_the_opened_categories_that_matches_by_words_is_scored(build) -> None:
    retriever = TwoStageRetriever(build(*OUTSIDE), k=2, **EVERYTHING)
    scored = [retriever.retrieve("apple zebra", hybrid=hybrid).documents_scored for hybrid in (False, True)]
    assert scored == [3, 4]  # bus, which shares no word, is not


def test_a_document_that_words_brought_in_can_be_a_hit_and_its_category_says_why(build) -> None:
    found = TwoStageRetriever(build(*OUTSIDE), k=2, lexical_weight=0.9, **EVERYTHING).retrieve("apple zebra")
    assert (sorted(ids(found)), found.documents_scored) == (["a", "zebra"], 4)
    assert [(each.name, each.kept, each.why) for each in found.categories] == [
        ("fruit", True, "mass"),
        ("animals", False, "words"),
    ]


def test_a_category_whose_documents_words_brought_in_without_a_hit_says_nothing(build) -> None:
    found = TwoStageRetriever(build(*OUTSIDE), k=2, **EVERYTHING).retrieve("apple zebra")
    assert (ids(found), found.documents_scored, found.categories[1].why) == (["a", "b"], 4, "")


def test_the_document_threshold_acts_on_the_cosine_of_what_words_brought_in(build) -> None:
    found = TwoStageRetriever(build(*OUTSIDE), k=2, lexical_weight=0.9, category_threshold=-1, document_threshold=0.5)
    assert ids(found.retrieve("apple zebra")) == ["a", "b"]


@pytest.mark.parametrize("limit", [{"max_categories": 1}, {"categories": ["fruit"]}], ids=str)
def test_words_bring_nothing_in_from_where_it_may_not_come(build, limit) -> None:
    found = TwoStageRetriever(build(*OUTSIDE), k=2, lexical_weight=0.9, **EVERYTHING).retrieve("apple zebra", **limit)
    assert (ids(found), found.documents_scored) == (["a", "b"], 3)


def test_words_bring_nothing_in_that_was_filtered_out(words) -> None:
    documents = [document(line).model_copy(update={"metadata": {"year": 2024}}) for line in OUTSIDE]
    documents[3] = document(OUTSIDE[3])
    base = KnowledgeBase.from_documents(documents, words)
    found = TwoStageRetriever(base, k=2, lexical_weight=0.9, **EVERYTHING).retrieve("apple zebra", where={"year": 2024})
    assert (ids(found), found.documents_scored) == (["a", "b"], 3)


def test_what_was_filtered_out_does_not_take_the_place_of_what_words_bring_in(words) -> None:
    # twenty zebras that match better than the one of this year, and words bring in no more than ten documents
    this_year = [document(line) for line in (*OUTSIDE[:3], "new animals zebra car bus tram")]
    others = [document(f"old{i} animals zebra") for i in range(20)]
    documents = [*others, *(each.model_copy(update={"metadata": {"year": 2024}}) for each in this_year)]
    retriever = TwoStageRetriever(KnowledgeBase.from_documents(documents, words), k=2, **EVERYTHING)
    assert retriever.retrieve("apple zebra", where={"year": 2024}).documents_scored == 4


def test_words_bring_nothing_in_for_a_question_that_fits_no_category(build) -> None:
    found = TwoStageRetriever(build(*OUTSIDE), category_threshold=0.99, document_threshold=-1).retrieve("apple zebra")
    assert (found.outcome, found.documents_scored) == (Outcome.CATEGORY_BELOW_THRESHOLD, 0)


# -- reranking --------------------------------------------------------------------------------------------------------

# "apple": 1, 2 / sqrt(5) = 0.894, 0.707, 0
RANKED = ["first fruit apple", "second fruit apple apple pear", "third fruit apple plum", "last fruit car"]


class Reranker:
    """Prefers long passages; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def __call__(self, question, passages):
        self.calls.append((question, list(passages)))
        return [len(passage) for passage in passages]


def test_a_reranker_orders_the_hits_and_its_scores_stand_on_them(build) -> None:
    found = TwoStageRetriever(build(*RANKED), hybrid=False, reranker=Reranker(), **EVERYTHING).retrieve("apple")
    assert [(hit.document.id, hit.rerank_score) for hit in found.hits] == [
        ("second", 16.0),
        ("third", 10.0),
        ("first", 5.0),
        ("last", 3.0),
    ]


def test_without_a_reranker_there_is_no_score_of_it(build) -> None:
    found = TwoStageRetriever(build(*RANKED), hybrid=False, **EVERYTHING).retrieve("apple")
    assert ([hit.rerank_score for hit in found.hits], ids(found)) == ([None] * 4, ["first", "second", "third", "last"])


def test_the_other_scores_of_a_hit_are_what_they_are_without_a_reranker(build) -> None:
    retriever = TwoStageRetriever(build(*RANKED), **EVERYTHING)
    plain, reranked = retriever.retrieve("apple"), retriever.retrieve("apple", reranker=Reranker())
    seen = [{hit.document.id: (hit.score, hit.fused_score) for hit in found.hits} for found in (plain, reranked)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("mode", MODES)
def test_thresholds_do_not_look_at_the_rerankers_scores(build, mode) -> None:
    retriever = TwoStageRetriever(build(*RANKED), hybrid=False, category_threshold=-1, document_threshold=0.3, mode=mode)
    plain, reranked = (
        retriever.retrieve("apple"),
        retriever.retrieve("apple", reranker=lambda _, passages: [-9] * len(passages)),
    )
    assert sorted(ids(plain)) == sorted(ids(reranked)) != []
    assert [miss.document.id for miss in plain.near_misses] == [miss.document.id for miss in reranked.near_misses]


def test_only_the_first_hits_are_reranked_and_the_others_follow_in_their_order(build) -> None:
    reranker = Reranker()
    found = TwoStageRetriever(build(*RANKED), hybrid=False, reranker=reranker, rerank_top=2, **EVERYTHING).retrieve("apple")
    assert [(hit.document.id, hit.rerank_score) for hit in found.hits] == [
        ("second", 16.0),
        ("first", 5.0),
        ("third", None),
        ("last", None),
    ]
    assert reranker.calls == [("apple", ["apple", "apple apple pear"])]


def test_a_reranker_sees_more_than_the_hits_that_are_wanted(build) -> None:
    found = TwoStageRetriever(build(*RANKED), hybrid=False, reranker=Reranker(), **EVERYTHING).retrieve("apple", 1)
    assert ids(found) == ["second"]


def test_a_reranker_does_not_see_what_the_threshold_refused(build) -> None:
    reranker = Reranker()
    options = {"category_threshold": -1, "document_threshold": 0.8}
    TwoStageRetriever(build(*RANKED), hybrid=False, reranker=reranker, **options).retrieve("apple")
    assert [passages for _, passages in reranker.calls] == [["apple", "apple apple pear"]]


def test_a_reranker_is_not_called_where_nothing_was_kept(build) -> None:
    reranker = Reranker()
    TwoStageRetriever(build(*RANKED), reranker=reranker).retrieve("pear", category_threshold=-1, document_threshold=1)
    TwoStageRetriever(build(*RANKED), reranker=reranker).retrieve("pear", category_threshold=1, document_threshold=-1)
    assert reranker.calls == []


def test_a_reranker_reads_the_title_and_the_best_chunk(words) -> None:
    text = "\n\n".join(" ".join([word] * 12) for word in ("apple", "pear", "plum"))
    long = Document(id="long", title="Fruit", category="fruit", text=text)
    reranker = Reranker()
    base = KnowledgeBase.from_documents([long], words, chunker=Chunker(max_tokens=16))
    TwoStageRetriever(base, reranker=reranker, **EVERYTHING).retrieve("pear")
    assert reranker.calls == [("pear", ["Fruit\n" + " ".join(["pear"] * 12)])]


def test_passages_of_equal_scores_keep_their_order(build) -> None:
    retriever = TwoStageRetriever(
        build(*RANKED), hybrid=False, reranker=lambda _, passages: [0.5] * len(passages), **EVERYTHING
    )
    assert ids(retriever.retrieve("apple")) == ["first", "second", "third", "last"]


# -- diversity --------------------------------------------------------------------------------------------------------

TWINS = ["one fruit apple apple pear", "twin fruit apple apple pear", "other fruit apple car car", "far fruit bus"]


@pytest.mark.parametrize(("diversity", "expected"), [(0.0, ["one", "twin"]), (0.5, ["one", "other"])])
def test_diversity_puts_something_else_before_a_repetition(build, diversity, expected) -> None:
    # "apple" with 0.894, 0.894, 0.447, 0, scaled 1, 1, 0.5, 0; their cosines with one: twin 1, other 2 / 5 = 0.4, far 0
    # half and half: twin 0.5 - 0.5 = 0, other 0.25 - 0.2 = 0.05, far 0 - 0
    found = TwoStageRetriever(build(*TWINS), hybrid=False, diversity=diversity, **EVERYTHING).retrieve("apple", 2)
    assert ids(found) == expected


def test_diversity_does_not_bring_back_what_the_threshold_refused(build) -> None:
    retriever = TwoStageRetriever(build(*TWINS), hybrid=False, diversity=1.0, category_threshold=-1, document_threshold=0.8)
    assert ids(retriever.retrieve("apple", 2)) == ["one", "twin"]


@pytest.mark.parametrize("mode", MODES)
def test_diversity_works_in_every_mode(build, mode) -> None:
    found = TwoStageRetriever(build(*TWINS[:3]), mode=mode, diversity=0.9, **EVERYTHING).retrieve("apple", 2)
    assert ids(found) == ["one", "other"]


def test_diversity_works_on_the_rerankers_order(build) -> None:
    retriever = TwoStageRetriever(build(*TWINS), hybrid=False, diversity=0.01, **EVERYTHING)
    found = retriever.retrieve("apple", reranker=lambda _, passages: range(len(passages)))
    assert ids(found) == ["far", "other", "twin", "one"]


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
    words.profile = EMBEDDINGGEMMA
    TwoStageRetriever(base, mode=mode, **EVERYTHING).retrieve("apple")
    assert {item.task for call in words.calls for item in call} == tasks


@pytest.mark.parametrize(("profile", "each"), [(NO_PROMPTS, 1), (EMBEDDINGGEMMA, 2)], ids=["identical prompts", "two prompts"])
@pytest.mark.parametrize("questions", [["apple"], ["apple", "car", "plum"]], ids=len)
def test_questions_go_to_the_encoder_in_one_call_and_once_for_each_different_prompt(
    base, words, profile, each, questions
) -> None:
    words.profile = profile
    TwoStageRetriever(base, **EVERYTHING).retrieve_many(questions)
    assert [len(call) for call in words.calls] == [each * len(questions)]


def test_nothing_but_the_question_is_encoded_when_it_is_asked(base, words) -> None:
    TwoStageRetriever(base, hybrid=True).retrieve("apple")
    assert {(item.text, item.title) for call in words.calls for item in call} == {("apple", None)}


# -- many questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{}, {"hybrid": False}, {"reranker": lambda _, passages: [len(each) for each in passages], "diversity": 0.5}],
    ids=["hybrid", "dense", "reranked"],
)
def test_many_questions_get_what_each_gets_alone(base, mode, options) -> None:
    retriever = TwoStageRetriever(base, mode=mode, category_threshold=0.1, document_threshold=0.1, **options)
    questions = ["apple", "bus car", "zebra", "pear plum"]
    together, alone = retriever.retrieve_many(questions), [retriever.retrieve(question) for question in questions]
    seen = [[{**found.to_json(), "timings_ms": None} for found in each] for each in (together, alone)]
    assert seen[0] == seen[1]


def test_settings_of_a_call_for_many_questions_are_those_of_a_call_for_one(base) -> None:
    retriever, options = (
        TwoStageRetriever(base),
        {"k": 1, "where": {}, "categories": ["fruit"], "lexical_weight": 1, **EVERYTHING},
    )
    [many], one = retriever.retrieve_many(["pear"], **options), retriever.retrieve("pear", **options)
    assert (many.hits, many.thresholds, many.categories) == (one.hits, one.thresholds, one.categories)


def test_no_questions_get_no_results(base) -> None:
    assert TwoStageRetriever(base).retrieve_many([]) == []


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.9, "dynamic", DynamicThreshold(floor=0.2)], ids=repr)
def test_a_retrieval_is_plain_json(base, mode, threshold) -> None:
    found = TwoStageRetriever(base, mode=mode, category_threshold=0, document_threshold=threshold).retrieve("apple")
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


@pytest.mark.parametrize(
    "key", ["question", "outcome", "categories", "hits", "near_misses", "thresholds", "notes", "timings_ms"]
)
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
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？").thresholds == {
        "category": 0.1,
        "document": 0.15,
        "acts_on": "lexical",
    }


def test_auto_says_that_it_matches_words(bilingual, caplog) -> None:
    bilingual.retrieve("U 盘可以插入公司电脑吗？")
    assert "1 question is searched by matching words instead" in caplog.text


def test_auto_keeps_the_order_of_questions_in_two_languages(bilingual) -> None:
    found = bilingual.retrieve_many(["U 盘", "apple", "电脑"])
    assert [(each.question, each.mode) for each in found] == [("U 盘", "lexical"), ("apple", "two-stage"), ("电脑", "lexical")]


def test_auto_is_two_stage_for_chinese_where_the_model_reads_chinese(bilingual, words) -> None:
    words.profile = NO_PROMPTS
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？").mode == "two-stage"


def test_a_mode_that_was_asked_for_is_kept(bilingual) -> None:
    assert bilingual.retrieve("U 盘可以插入公司电脑吗？", mode="two-stage").mode == "two-stage"
